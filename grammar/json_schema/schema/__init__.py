"""Schema documents, and the patterns and formats in them."""

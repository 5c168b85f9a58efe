"""What the keywords of a schema mean, and what is wrong with a schema."""

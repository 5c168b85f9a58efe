"""The page that shows a running server."""

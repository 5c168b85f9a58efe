"""The meaning of the keywords of a schema, and the errors in a schema."""

"""The frames that read JSON values, and their tables."""

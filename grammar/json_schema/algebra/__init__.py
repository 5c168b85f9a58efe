"""Sets of JSON values: and, or, not, which sets are empty, and the cost of their shortest values."""

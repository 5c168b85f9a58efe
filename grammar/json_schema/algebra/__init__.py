"""Sets of JSON values: and, or, not, which of them are empty, and what their shortest value costs."""

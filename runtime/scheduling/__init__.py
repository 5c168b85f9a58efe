"""The scheduler chooses the tokens of the next step. No torch."""

"""Models: configurations, weight files, and the decoder that runs them."""

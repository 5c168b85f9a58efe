"""Tensor parallelism: one model, divided among processes that run every step together."""

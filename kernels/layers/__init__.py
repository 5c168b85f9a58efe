"""Norms, rotary embedding, activations and products of small batches."""

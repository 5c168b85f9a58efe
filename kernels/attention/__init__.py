"""Attention over the paged cache: decode, extend, and decode over shared prefixes."""

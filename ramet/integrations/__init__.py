"""Ramet inside of other systems."""

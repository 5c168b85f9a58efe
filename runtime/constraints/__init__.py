"""Grammars of running requests, on the host or on the device."""

"""Engines and models for tests: scripted, simulated, tiny, with dummy weights."""

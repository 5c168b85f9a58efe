"""The native endpoints."""

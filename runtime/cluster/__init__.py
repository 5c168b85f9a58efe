"""Replicas of an engine, and the router that places requests on them."""

"""Device tables of running sequences, and copies of their pages."""

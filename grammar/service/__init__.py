"""The compile service: every kind of source, on worker threads, with limits and caches."""

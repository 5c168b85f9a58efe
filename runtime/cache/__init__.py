"""KV pages and their owners: the pool, the radix tree, eviction, integrity checks."""

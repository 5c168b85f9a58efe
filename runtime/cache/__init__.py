"""KV pages and who owns them: the pool, the radix tree, eviction, integrity."""

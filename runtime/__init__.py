"""Models, KV cache, scheduler, engine loop, program executor."""

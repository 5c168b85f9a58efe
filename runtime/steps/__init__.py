"""One step on the device: inputs, slots, KV memory, and the ways to run a step."""

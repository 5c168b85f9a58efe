"""Token masks of closed automata on the device, and the walk of sampled tokens."""

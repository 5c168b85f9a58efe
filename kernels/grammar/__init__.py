"""Token masks of closed automata on the device, and the transitions of sampled tokens."""

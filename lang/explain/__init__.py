"""What a program will cost, what it did cost, why a prompt was not cached, and drawings of it."""

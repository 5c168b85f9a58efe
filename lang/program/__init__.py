"""`@function`: programs as users call them, one by one, in batches, streamed and compiled."""

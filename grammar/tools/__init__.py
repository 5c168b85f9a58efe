"""Tool calls: sets of tools, how models write calls, and the calls in a text as it comes."""

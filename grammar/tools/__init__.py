"""Tool calls: sets of tools, the formats in which models write calls, and a reader of the calls in a streamed text."""

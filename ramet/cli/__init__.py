"""The `ramet` command: one module a subcommand."""

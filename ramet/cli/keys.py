"""`ramet keys`: add, list and remove the keys of a file for `ramet serve --api-keys-file`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ramet.errors import ConfigError

if TYPE_CHECKING:
    from ramet.runtime.server.keys import KeyFile

_LIMITS = {
    "max_in_flight": "requests that may run or wait",
    "max_queued_tokens": "prompt tokens of requests that may wait",
    "tokens_per_minute": "tokens of prompts and answers",
}


def add_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keep the file of `ramet serve --api-keys-file`. It holds digests, not keys. A server reads it again on SIGHUP."
    )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    summary = "Make a key for a name and print it, once. A name that has a key has two then: remove the old one later."
    add = actions.add_parser("add", help=summary, description=summary)
    add.add_argument("file", type=Path, help="is made if it is not there")
    add.add_argument("name", help="of a user or a service; in metrics and in the log")
    for field, text in _LIMITS.items():
        flag = "--" + field.replace("_", "-")
        add.add_argument(flag, type=int, metavar="N", help=f"{text}; 0: no limit [as before]")
    listing = actions.add_parser("list", help="List the names and their limits.")
    listing.add_argument("file", type=Path)
    summary = "Remove a name with all its keys, or its old keys alone."
    remove = actions.add_parser("remove", help=summary, description=summary)
    remove.add_argument("file", type=Path)
    remove.add_argument("name")
    remove.add_argument("--old", action="store_true", help="remove all its keys but the newest")


def run_keys(arguments: argparse.Namespace) -> int:
    """Change or show a file of keys."""
    from ramet.runtime.server.keys import KeyFile, read_keys, write_keys

    path: Path = arguments.file
    if arguments.action == "list":
        _print(read_keys(path))
        return 0
    keys = KeyFile() if arguments.action == "add" and not path.exists() else read_keys(path)
    if arguments.action == "add":
        keys, key = _added(keys, arguments)
        write_keys(path, keys)
        print(key)
    else:
        write_keys(path, _removed(keys, arguments))
    Console(stderr=True, highlight=False).print(f"{path} is written; send SIGHUP to the server, which reads it again")
    return 0


def _added(keys: KeyFile, arguments: argparse.Namespace) -> tuple[KeyFile, str]:
    import msgspec

    from ramet.runtime.server.keys import KeyEntry, digest_of_key, new_key

    key = new_key()
    try:
        entry = keys.entry(arguments.name) or KeyEntry(name=arguments.name)
        given = {field: getattr(arguments, field) for field in _LIMITS}
        limits = {field: value or None for field, value in given.items() if value is not None}
        digests = (*entry.sha256, digest_of_key(key.encode()))
        return keys.with_entry(msgspec.structs.replace(entry, sha256=digests, **limits)), key
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _removed(keys: KeyFile, arguments: argparse.Namespace) -> KeyFile:
    import msgspec

    entry = keys.entry(arguments.name)
    if entry is None:
        names = ", ".join(sorted(other.name for other in keys.keys)) or "none"
        raise ConfigError(f"{arguments.file} has no name {arguments.name!r}; it has {names}")
    if arguments.old:
        return keys.with_entry(msgspec.structs.replace(entry, sha256=entry.sha256[-1:]))
    return keys.without(entry.name)


def _print(keys: KeyFile) -> None:
    table = Table("name", "keys", *_LIMITS, box=None)
    for entry in sorted(keys.keys, key=lambda entry: entry.name):
        digests = " ".join(digest[:8] for digest in entry.sha256)
        limits = (getattr(entry, field) for field in _LIMITS)
        table.add_row(entry.name, digests, *("none" if value is None else f"{value:,}" for value in limits))
    Console(highlight=False, soft_wrap=True).print(table)

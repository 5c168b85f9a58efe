"""Files of API keys: whose they are, and what each of their owners may use. Only digests of keys are kept.

A file of keys is JSON; `ramet keys` writes it:

    {"keys": [{"name": "alice", "sha256": ["9f86d0..."], "max_in_flight": 8, "tokens_per_minute": 60000}]}

A name may have several keys, so that a new one works before the old one ends. Keys are drawn with 256 bits of chance,
so a plain digest cannot be reversed by trying. Not here: looking keys up, and counting what is used (`tenants`).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from pathlib import Path

import msgspec

from ramet.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = "ramet-"
MAX_FILE_BYTES = 16 << 20


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A name and its keys. `sha256`: their digests, the newest last.

    `max_in_flight`: requests that run or wait. `max_queued_tokens`: prompt tokens of requests and programs that wait.
    `tokens_per_minute`: tokens of prompts and answers; what is used beyond is owed, and no request is taken until it is
    paid back. None: no limit. A value that cannot be raises ValueError.
    """

    name: str
    sha256: tuple[str, ...] = ()
    max_in_flight: int | None = None
    max_queued_tokens: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the name {self.name[:80]!r} must be 1 to 64 letters, digits, dots, dashes and underscores"
            )
        for digest in self.sha256:
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"a sha256 of {self.name!r} is {digest[:80]!r} but must be 64 hexadecimal digits")
        for field in ("max_in_flight", "max_queued_tokens", "tokens_per_minute"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(
                    f"{field} of {self.name!r} is {value} but must be at least 1; leave it out for no limit"
                )


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a file of keys. Two entries of one name, or one key of two names, raise ValueError."""

    keys: tuple[KeyEntry, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.keys]
        digests = [digest for entry in self.keys for digest in entry.sha256]
        for what, found in (("name", names), ("sha256", digests)):
            twice = next((one for one in found if found.count(one) > 1), None) if len(set(found)) < len(found) else None
            if twice is not None:
                raise ValueError(f"the {what} {twice!r} is there twice")

    def entry(self, name: str) -> KeyEntry | None:
        return next((entry for entry in self.keys if entry.name == name), None)

    def with_entry(self, changed: KeyEntry) -> KeyFile:
        """Return a copy in which this entry is new, or replaces the one with its name."""
        others = tuple(entry for entry in self.keys if entry.name != changed.name)
        return KeyFile((*others, changed))

    def without(self, name: str) -> KeyFile:
        return KeyFile(tuple(entry for entry in self.keys if entry.name != name))


def read_keys(path: Path) -> KeyFile:
    """Read a file of keys. Raises ConfigError naming the wrong place."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the file of keys {path} has {len(data):,} bytes; the limit is {MAX_FILE_BYTES:,}")
    try:
        return msgspec.json.decode(data, type=KeyFile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"the file of keys {path} is wrong: {error}; `ramet keys` writes it") from error


def write_keys(path: Path, keys: KeyFile) -> None:
    """Write a file of keys that only its owner can read, in one piece: a server may read it at any time."""
    data = msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n"
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # readable by its owner alone
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be written: {error.strerror or error}") from error


def new_key() -> str:
    """Draw a key."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of_key(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()

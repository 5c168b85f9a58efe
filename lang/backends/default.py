"""Chooses a program's backend: the given one, that of the block, the default one, or the default model's engine."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ramet.errors import ConfigError
from ramet.lang.backends.in_process import EngineBackend, default_model, is_engine
from ramet.lang.backends.models import Models
from ramet.lang.backends.protocol import Backend, block_backend


class _Default:
    """The only shared state of the process: the backend of programs that name none, created at first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.backend: Backend | None = None
        self.known: weakref.WeakKeyDictionary[Any, Backend] = weakref.WeakKeyDictionary()  # by engine
        self.remote: dict[str, Backend] = {}  # by address
        self.several: weakref.WeakValueDictionary[tuple[tuple[str, Backend], ...], Models] = (
            weakref.WeakValueDictionary()
        )


_default = _Default()


def set_default_backend(backend: object | None) -> None:
    """Set the backend (or engine) of programs that name none. None restores the default model's engine."""
    found = None if backend is None else as_backend(backend)
    with _default.lock:
        _default.backend = found


@contextmanager
def use_backend(backend: object) -> Iterator[Backend]:
    """Make this backend (or engine) the default within the block."""
    found = as_backend(backend)
    token = block_backend.set(found)
    try:
        yield found
    finally:
        block_backend.reset(token)


def as_backend(given: object) -> Backend:
    """Return a backend unchanged, and make one of an engine, a server's address, or several of these by name.

    Raises ConfigError for others.
    """
    if isinstance(given, Backend):
        return given
    if isinstance(given, Mapping):
        return _several(given)
    if isinstance(given, str) and given.startswith(("http://", "https://")):
        from ramet.lang.backends.remote import Remote  # imports asyncio and TLS, which are not needed in process

        with _default.lock:
            return _default.remote.setdefault(given, Remote(given))
    if is_engine(given):
        with _default.lock:
            found = _default.known.get(given)
            if found is None:
                found = _default.known[given] = EngineBackend(given)
        return found
    raise ConfigError(
        f"backend is {given!r}, but must be an Engine, a Backend such as MockBackend, a server's http:// address, or a "
        "dict of these by the names of their models"
    )


def _several(given: Mapping[object, object]) -> Backend:
    """Return the backend of several models by name, the same one for the same backends, so that runs share it."""
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ConfigError(f"backend is {given!r}, but a dict of backends has a name, which is not empty, for each")
    backends = {str(name): as_backend(one) for name, one in given.items()}
    nested = next((name for name, one in backends.items() if isinstance(one, Models)), None)
    if nested is not None:
        raise ConfigError(f"backend {nested!r} is a dict of backends itself; put them all into one")
    with _default.lock:
        found = _default.several.get(tuple(backends.items()))
        if found is None:
            found = _default.several[tuple(backends.items())] = Models(backends)
    return found


def choose_backend(given: object | None = None) -> Backend:
    """Return a call's backend: the given one, else the block's, else the default, else the default model's engine."""
    if given is not None:
        return as_backend(given)
    of_block = block_backend.get()
    if of_block is not None:
        return of_block
    with _default.lock:
        if _default.backend is None:
            _default.backend = default_model()
        return _default.backend

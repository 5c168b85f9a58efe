"""Where programs run. `Backend` is all that the language knows of a runtime.

Not here: other machines (remote.py) and other engines (openai.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol, Self, cast, runtime_checkable

from ramet.errors import ConfigError
from ramet.lang.graph.ir import Graph
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run import OnEvent

if TYPE_CHECKING:
    from ramet.runtime.programs.engine import ProgramEngine
    from ramet.runtime.testing.scripted_model import Script, ScriptedEngine, ScriptedStats


class Session(Protocol):
    """One running program."""

    def extend(self, graph: Graph, *, is_last: bool = False) -> None:
        """Send the next part. `is_last`: `finish` follows at once. Raises InvalidProgram."""

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        """Stop these nodes and what needs them; None: everything."""

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        """Answer a tool call that an event asked for."""

    def finish(self) -> None:
        """No more parts will come: the program ends when its last node does."""


@runtime_checkable
class Backend(Protocol):
    """Runs programs. `on_event` may be called on any thread."""

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session: ...


@runtime_checkable
class TakesRows(Protocol):
    """A backend that takes the rows of a compiled batch together. The rows start when their sessions are finished."""

    def start_rows(
        self, options: ProgramOptions, graph: Graph, rows: Sequence[Mapping[str, Any]], on_events: Sequence[OnEvent]
    ) -> Sequence[Session]: ...


class EngineBackend:
    """An engine of this process. As a context manager it is the default backend of the block."""

    def __init__(self, engine: ProgramEngine) -> None:
        from ramet.runtime.programs.executor import ProgramHost

        self.engine = engine
        self._host = ProgramHost(engine)
        self._tokens: list[Token[Backend | None]] = []

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session:
        return self._host.start(options, on_event)

    def __enter__(self) -> Self:
        self._tokens.append(_scoped.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _scoped.reset(self._tokens.pop())


class MockBackend(EngineBackend):
    """A backend without a model, for tests: answers from a script, in milliseconds.

    `script`: text to look for in the prompt -> answer or list of answers; or a list of answers in the order of the
    requests; or a function of the prompt; without one, words are drawn by a hash of the prompt.
    """

    engine: ScriptedEngine

    def __init__(
        self, script: Script = None, *, failures: Mapping[str, Exception] | None = None, latency_s: float = 0.0
    ) -> None:
        from ramet.runtime.testing.scripted_model import ScriptedEngine

        super().__init__(ScriptedEngine(script, failures=failures, latency_s=latency_s))

    def stats(self) -> ScriptedStats:
        """What the engine has counted so far."""
        return self.engine.stats()


class _Default:
    """The one thing that the process shares: the backend of programs that name none, made at first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.backend: Backend | None = None
        self.known: weakref.WeakKeyDictionary[Any, Backend] = weakref.WeakKeyDictionary()  # by engine
        self.remote: dict[str, Backend] = {}  # by address


_default = _Default()
_scoped: ContextVar[Backend | None] = ContextVar("ramet_backend", default=None)


def set_default_backend(backend: object | None) -> None:
    """Set the backend (or engine) of programs that name none; None: back to the default model's engine."""
    found = None if backend is None else as_backend(backend)
    with _default.lock:
        _default.backend = found


@contextmanager
def use_backend(backend: object) -> Iterator[Backend]:
    """Make this backend (or engine) the default one inside of a block."""
    found = as_backend(backend)
    token = _scoped.set(found)
    try:
        yield found
    finally:
        _scoped.reset(token)


def as_backend(given: object) -> Backend:
    """A backend as it is, an engine or a server's address as a backend. Raises ConfigError for anything else."""
    if isinstance(given, Backend):
        return given
    if isinstance(given, str) and given.startswith(("http://", "https://")):
        from ramet.lang.backends.remote import Remote

        with _default.lock:
            return _default.remote.setdefault(given, Remote(given))
    if hasattr(given, "submit") and hasattr(given, "tokenizer"):
        with _default.lock:
            found = _default.known.get(given)
            if found is None:
                found = _default.known[given] = EngineBackend(cast("ProgramEngine", given))
        return found
    raise ConfigError(
        f"backend is {given!r}, but must be an Engine, a Backend such as MockBackend, or a server's http:// address"
    )


def choose_backend(given: object | None = None) -> Backend:
    """The backend of a call: the one given, else the block's, else the default, else the default model's engine."""
    if given is not None:
        return as_backend(given)
    scoped = _scoped.get()
    if scoped is not None:
        return scoped
    with _default.lock:
        if _default.backend is None:
            from ramet.runtime.engine.engine import Engine

            _default.backend = EngineBackend(Engine())
        return _default.backend

"""Where programs run. `Backend` is all that the language knows of a runtime.

Not here: other machines (remote.py) and other engines (openai.py).
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, cast, runtime_checkable

from ramet.errors import ConfigError, InvalidRequest
from ramet.lang.graph.ir import Graph, NodeEvent, is_json

if TYPE_CHECKING:
    from ramet.runtime.programs.engine import ProgramEngine
    from ramet.runtime.testing.scripted_model import Script, ScriptedEngine, ScriptedStats

MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 1e9  # threads can't wait for any number of seconds

OnEvent: TypeAlias = Callable[[NodeEvent], None]


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """What holds for a whole run of a program.

    `deadline_s`: seconds of time.monotonic(). Lower `priority` runs first. `token_budget`: tokens that all generations
    together may write. `cache_salt`: prefixes are shared only with runs of the same salt. `text_events`: report text as
    it is generated, not only when a node is done.

    Raises:
        InvalidRequest: a value that no runtime can work with.
    """

    program: str = "program"
    deadline_s: float | None = None
    token_budget: int | None = None
    priority: int = 0
    cache_salt: str = ""
    text_events: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise InvalidRequest(f"{self.program}: {name} is {value!r}, but must be {limit}", param=name)

        check(
            _is_int(self.priority) and abs(self.priority) <= MAX_PRIORITY,
            "priority",
            f"an integer up to {MAX_PRIORITY}",
        )
        check(isinstance(self.cache_salt, str) and is_json(self.cache_salt), "cache_salt", "text that UTF-8 can write")
        budget = self.token_budget
        check(budget is None or (_is_int(budget) and budget >= 1), "token_budget", "an integer from 1, or None")


def deadline(program: str, timeout_s: float | None) -> float | None:
    """The moment of time.monotonic() at which a run's time is over. Raises InvalidRequest."""
    if timeout_s is None:
        return None
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not math.isfinite(timeout_s) or timeout_s > MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"{program}: timeout_s is {timeout_s!r}, but must be seconds up to {MAX_TIMEOUT_S:,.0f}, or None",
            param="timeout_s",
        )
    return time.monotonic() + timeout_s


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        self._ids = itertools.count()
        self._tokens: list[Token[Backend | None]] = []

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session:
        from ramet.runtime.programs.engine import ProgramLimits

        limits = ProgramLimits(
            program_id=f"{options.program}-{next(self._ids)}",
            cache_salt=options.cache_salt,
            priority=options.priority,
            deadline_s=options.deadline_s,
            token_budget=options.token_budget,
            text_events=options.text_events,
        )
        return self._host.start(on_event, limits)

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

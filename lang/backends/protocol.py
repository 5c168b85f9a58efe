"""The language's interface to a runtime: a `Backend` starts a program, and its `Session` runs it.

Not here: the backends (in_process.py, remote.py, openai.py), and the choice of one for a program (default.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Protocol, Self, runtime_checkable

from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.ir import Graph
from ramet.lang.graph.options import ProgramOptions


class Session(Protocol):
    """One running program."""

    def extend(self, graph: Graph, *, is_last: bool = False) -> None:
        """Send the next part. `is_last`: `finish` follows at once. Raises InvalidProgram."""

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        """Stop these nodes and all that need them; None: everything."""

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        """Answer a tool call that an event asked for."""

    def finish(self) -> None:
        """Declare that no more parts will come. The program ends with its last node."""


@runtime_checkable
class Backend(Protocol):
    """Runs programs. `on_event` may be called on any thread."""

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session: ...


block_backend: ContextVar[Backend | None] = ContextVar("ramet_backend", default=None)  # of the innermost block


class BlockBackend(Backend):
    """A backend that is a context manager. It is the default backend of programs in the block."""

    def __init__(self) -> None:
        self._blocks: list[Token[Backend | None]] = []

    def start_rows(
        self, options: ProgramOptions, graph: Graph, rows: Sequence[Mapping[str, Any]], on_events: Sequence[OnEvent]
    ) -> Sequence[Session] | None:
        """Take the rows of a compiled batch together; they start when their sessions are finished.

        None: this backend takes each row by itself.
        """
        return None

    def close(self) -> None:
        """Release the backend's resources. Called when its last block ends. The backend may be used again."""

    def __enter__(self) -> Self:
        self._blocks.append(block_backend.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        block_backend.reset(self._blocks.pop())
        if not self._blocks:
            self.close()

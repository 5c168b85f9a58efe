"""The rows of a batch: how many run at once, and the order in which they start.

On request, rows with the same prefix start next to each other. A prefix is then read while it is in the cache, even in
a small cache, and may be evicted when its last row is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from ramet.errors import ConfigError
from ramet.lang import explain as explanations
from ramet.lang.graph import ir
from ramet.lang.recording.state import State

THREADS = 64  # only programs that wait for a value in Python occupy a thread
T = TypeVar("T")


class States(list[State]):
    """The states of a batch, in the order of its rows. A notebook shows them as a table."""

    def _repr_html_(self) -> str:
        rows = []
        for number, state in enumerate(self[: explanations.MAX_ROWS + 1]):
            error = state.error()
            found = str(error) if error is not None else ""
            values = state.variables if error is None else {}
            rows.append((number, state.recorder.run.options.program, found, values))
        names = list(dict.fromkeys(name for *_, values in rows for name in values))
        cells = [
            (number, found, *(repr(values[name]) if name in values else "" for name in names))
            for number, _, found, values in rows
        ]
        return explanations.table(("row", "error", *names), cells)


def run_rows(
    calls: Sequence[T],
    new_state: Callable[[T], State],
    record: Callable[[State, T], None],
    *,
    num_threads: int | None,
    max_live: int,
) -> Generator[State]:
    """Run every row's call, at most `max_live` at once. Yield their states in order, each when it is done.

    `record` runs a program's function, on one of `num_threads` threads. Its exception is raised when the state is read.
    """
    waiting = deque(calls)
    live: deque[tuple[State, Future[None]]] = deque()

    def recorded(state: State, call: T) -> None:
        try:
            record(state, call)
        except Exception as error:  # a row fails alone
            state.recorder.run.outcomes.fail(error)

    with ThreadPoolExecutor(num_threads or min(THREADS, len(calls) or 1)) as pool:
        try:
            while waiting or live:
                while waiting and len(live) < max_live:
                    call = waiting.popleft()
                    state = new_state(call)
                    live.append((state, pool.submit(copy_context().run, recorded, state, call)))
                state, recording = live[0]
                recording.result()
                state.recorder.run.wait_all(quietly=True)
                live.popleft()
                yield state
        finally:  # the caller left early or was interrupted, so nobody will read the rest
            for state, recording in live:
                recording.cancel()
                state.cancel()


def raises(failures: str) -> bool:
    """Return whether a run raises what failed in it: "raise", or "keep". Raises ConfigError."""
    if failures not in ("raise", "keep"):
        raise ConfigError(f"failures is {failures!r}, but must be one of raise, keep")
    return failures == "raise"


@contextmanager
def cancelling(states: Sequence[State]) -> Iterator[None]:
    """Cancel the runs of these states (also of those added in the block) if the block is left by an exception.

    Such as an interrupt while the caller waits for them, or the cancellation of its task.
    """
    try:
        yield
    except BaseException:
        for state in states:
            state.cancel()
        raise


def row_order(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[int]:
    """Return the indices of `rows` (arguments by name), sorted by the values of `names`; the first name counts most."""
    keys = [tuple(_text(row.get(name)) for name in names) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (keys[index], index))


def in_row_order(order: Sequence[int], results: Iterable[T]) -> Iterator[T]:
    """Yield results, which come in `order`, in the order of the rows; each as soon as all earlier rows are there."""
    early: dict[int, T] = {}
    due = 0
    for index, result in zip(order, results, strict=True):
        early[index] = result
        while due in early:
            yield early.pop(due)
            due += 1


def arguments_in_text(graph: ir.Graph) -> list[str]:
    """Return the arguments that are used in text, in the order of their first use."""
    nodes = graph.nodes
    used = (nodes[ref.node] for node in nodes if isinstance(node, ir.Text) for ref in ir.refs(node))
    return list(dict.fromkeys(node.name for node in used if isinstance(node, ir.Argument)))


def _text(value: object) -> str:
    return ir.value_text(value) if ir.is_json(value) else repr(value)

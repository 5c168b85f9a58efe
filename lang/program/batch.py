"""The rows of a batch: how many are alive at once, and the order in which they begin.

Rows with the same prefix begin next to each other, where that is asked for. A prefix is then read while it is in the
cache, however small that is, and is let go when its last row is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from ramet.lang.graph import ir
from ramet.lang.recording.state import State

THREADS = 64  # only programs that wait for a value in Python occupy one
T = TypeVar("T")


def run_rows(
    calls: Sequence[T],
    new_state: Callable[[T], State],
    record: Callable[[State, T], None],
    *,
    num_threads: int | None,
    max_live: int,
) -> Generator[State]:
    """Run every row's call, at most `max_live` at once; yields their states in order, each when it is done.

    `record` runs a program's function, on one of `num_threads` threads. What it raises is raised by reading the state.
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
        finally:  # left early: nobody will read the rest
            for state, _ in live:
                state.cancel()


def row_order(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[int]:
    """Indices of `rows` (their arguments by name), sorted by the values of `names`, of which the first counts most."""
    keys = [tuple(_text(row.get(name)) for name in names) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (keys[index], index))


def in_row_order(order: Sequence[int], results: Iterable[T]) -> Iterator[T]:
    """Results that come as `order` says, in the order of the rows; each as soon as those before it are there."""
    early: dict[int, T] = {}
    due = 0
    for index, result in zip(order, results, strict=True):
        early[index] = result
        while due in early:
            yield early.pop(due)
            due += 1


def arguments_in_text(graph: ir.Graph) -> list[str]:
    """The arguments that stand in text, in the order in which the program puts them there."""
    nodes = graph.nodes
    used = (nodes[ref.node] for node in nodes if isinstance(node, ir.Text) for ref in ir.refs(node))
    return list(dict.fromkeys(node.name for node in used if isinstance(node, ir.Argument)))


def _text(value: object) -> str:
    return ir.value_text(value) if ir.is_json(value) else repr(value)

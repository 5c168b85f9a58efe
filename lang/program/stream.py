"""Follows a running program: yields one variable as it is generated, or every event."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ramet.errors import UndefinedVariable
from ramet.lang.explain import transcript
from ramet.lang.graph import ir
from ramet.lang.recording.state import State

_END = object()
_SHOW_S = 0.1  # between two looks of a notebook's cell


class Stream:
    """An iterator (`for`, `async for`) over pieces of text of variable `var`, or over NodeEvents if `var` is None.

    A variable that is written as JSON comes as its value so far, each time it grows: `{"name": "An"}`, then
    `{"name": "Ann", "age": 4}`. A text or number at its end may still go on. `state[var]` has the type's own value.
    It ends with the program. It raises the exception of the program's function and, unless failures are kept, the error
    of the followed variable, or in the end that of another node.
    Leaving the iteration early cancels the program.
    """

    def __init__(self, state: State, var: str | None, *, raises: bool = True) -> None:
        """`raises`: raise errors of nodes, instead of leaving them in the state."""
        self.state = state
        self._raises = raises
        self._run = state.recorder.run
        self._var = var
        self._json: dict[int, tuple[str, Any]] = {}  # by node: text so far, the last value that was yielded
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()  # events, an exception, _END
        self._wake: Callable[[], object] | None = None
        self._error: BaseException | None = None
        self._is_recorded = False
        self._run.outcomes.listen(self._on_event)

    def run(self, record: Callable[[], object]) -> None:
        """Run the program's function on this thread."""
        try:
            record()
        except BaseException as error:
            self._error = error
        self._end_recording()

    def recorded(self, task: asyncio.Future[Any]) -> None:
        """Take the end of the program's function, which ran as a task of an event loop."""
        self._error = None if task.cancelled() else task.exception()
        self._end_recording()

    def _end_recording(self) -> None:
        self._is_recorded = True
        self._check_end()

    def _on_event(self, event: ir.NodeEvent) -> None:
        self._put(event)
        self._check_end()

    def _check_end(self) -> None:
        if self._is_recorded and (self._error is not None or self._run.is_done()):
            self._put(_END)

    def _put(self, item: object) -> None:
        self._items.put(item)
        wake = self._wake
        if wake is not None:
            wake()

    def __iter__(self) -> Iterator[Any]:
        is_over = False
        try:
            while True:
                item = self._items.get()
                if item is _END:
                    is_over = True
                    break
                yield from self._shown(item)
        finally:
            if not is_over:
                self._run.cancel()
        self._check_whole()

    async def __aiter__(self) -> AsyncIterator[Any]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(changed.set)
        is_over = False
        try:
            while not is_over:
                changed.clear()
                while not self._items.empty():
                    item = self._items.get_nowait()
                    if item is _END:
                        is_over = True
                        break
                    for shown in self._shown(item):
                        yield shown
                if not is_over:
                    await changed.wait()
        finally:
            self._wake = None
            if not is_over:
                self._run.cancel()
        self._check_whole()

    def _ipython_display_(self) -> None:
        """Show the program in a notebook's cell while it writes."""
        from IPython.display import HTML, display

        shown = display(HTML(""), display_id=True)
        texts: dict[int, str] = {}
        shown_s = 0.0
        self._var = None
        for event in self:
            texts[event.node] = event.text if event.kind == "done" else texts.get(event.node, "") + event.text
            if time.monotonic() - shown_s >= _SHOW_S:
                shown.update(HTML(transcript(self._run.nodes, texts)))
                shown_s = time.monotonic()
        shown.update(self.state)

    def _check_whole(self) -> None:
        """Raise, at the end, the program's error, or an error if it never wrote the variable."""
        if self._error is not None:
            raise self._error
        if self._var is not None:
            known = {ir.variable(node.label) for node in self._run.nodes if node.label is not None}
            if self._var not in known:
                raise UndefinedVariable(
                    f"{self._run.options.program}: no variable {self._var!r} was written; known: "
                    f"{', '.join(sorted(known)) or 'none'}",
                    program=self._run.options.program,
                )
        if self._raises:
            self._run.check()

    def _shown(self, event: ir.NodeEvent) -> Iterator[Any]:
        if self._var is None:
            yield event
            return
        if event.name is None or ir.variable(event.name) != self._var:
            return
        if event.kind == "error":
            error = self._run.error_of(event.node)
            if error is not None and self._raises:
                raise error
            return
        node = self._run.nodes[event.node]
        if event.kind == "text" and isinstance(node, ir.Generate) and node.type == "json":
            yield from self._grown(event)
        elif event.kind == "text" or isinstance(node, ir.Select | ir.Capture):
            yield event.text or str(event.value)

    def _grown(self, event: ir.NodeEvent) -> Iterator[Any]:  # Any: JSON
        """Yield the JSON value so far, if it has changed."""
        from pydantic_core import from_json

        before, shown = self._json.get(event.node, ("", _END))
        text = before + event.text
        try:
            found = from_json(text, allow_partial="trailing-strings")
        except ValueError:  # nothing of it is written yet
            found = shown
        self._json[event.node] = (text, found)
        if found != shown:
            yield found

"""A program compiled ahead of time: its whole graph, run again and again with other arguments without its function.

Only where the function needs no generated value, and no argument's value, in Python; what it depends on besides its
arguments (globals, the clock, chance) is as it was when it was compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ramet.errors import InvalidProgram
from ramet.lang import ir
from ramet.lang.backend import ProgramOptions, choose_backend
from ramet.lang.run import Run
from ramet.lang.state import State
from ramet.lang.trace import Trace
from ramet.lang.values import Value

if TYPE_CHECKING:
    from ramet.lang.function import Function


class Compiled:
    """`graph` with the variables of its last state. Arguments given when it was compiled are the defaults of a run."""

    def __init__(self, trace: Trace) -> None:
        self.name = trace.program
        self.graph = ir.Graph(trace.graph.nodes)
        self.arguments = tuple(node.name for node in self.graph.nodes if isinstance(node, ir.Argument))
        self._given = dict(trace.graph.arguments)
        self._end = trace.state

    def run(self, **kwargs: Any) -> State:
        """Run the graph and wait for its end. Arguments by name; `backend`, `timeout_s`, `token_budget`, `priority` and
        `cache_salt` as in Function.run."""
        state = self.start(**kwargs)
        state.wait()
        return state

    async def arun(self, **kwargs: Any) -> State:
        """`run` for an event loop."""
        state = self.start(**kwargs)
        await state
        return state

    def run_batch(self, rows: Iterable[Mapping[str, Any]], **kwargs: Any) -> list[State]:
        """Run the graph for every row of arguments, all at once; results in their order."""
        states = [self.start(**{**kwargs, **row}) for row in rows]
        return [state.wait() for state in states]

    def start(
        self,
        *,
        backend: object | None = None,
        timeout_s: float | None = None,
        token_budget: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **arguments: Any,
    ) -> State:
        """Submit the graph, and return its state without waiting. Raises InvalidProgram for missing arguments."""
        arguments = {**self._given, **arguments}
        unknown = sorted(set(arguments) - set(self.arguments))
        missing = [name for name in self.arguments if name not in arguments]
        if unknown or missing:
            what = f"has no argument {unknown[0]!r}" if unknown else f"needs argument {missing[0]!r}"
            raise InvalidProgram(f"the compiled {self.name} {what}; it takes {', '.join(self.arguments) or 'none'}")
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        run = Run(
            choose_backend(backend),
            ProgramOptions(self.name, deadline_s, token_budget, priority, cache_salt),
        )
        run.nodes = list(self.graph.nodes)
        run.placeholders = self._end._run.placeholders  # of texts that the function returned
        for name, value in arguments.items():
            if not ir.is_json(value):
                raise InvalidProgram(f"argument {name!r} of {self.name} has no JSON form: {value!r}")
            run.arguments[name] = value
        state = State(run, self._end._tip)
        move = _mover(run)
        state._variables = {name: move(value) for name, value in self._end._variables.items()}
        state._returned = move(self._end._returned)
        run.finish()
        return state


def compile_function(program: Function, given: Mapping[str, Any]) -> Compiled:
    """See Function.compile."""
    trace = program.trace(**given)
    if trace.stop is not None:
        raise InvalidProgram(
            f"{program.name} can't be compiled: {trace.stop.line} needs a value in Python ({trace.stop.why}); "
            "use run(), which waits for it there",
            program=program.name,
            source_line=trace.stop.line,
        )
    return Compiled(trace)


def _mover(run: Run) -> Callable[[Any], Any]:
    """Values of the trace, as values of a run."""

    def move(item: Any) -> Any:
        if isinstance(item, Value):
            return Value(run, item._node, item._name, item._output, item._path, item._shape)
        if isinstance(item, list):
            return [move(one) for one in item]
        if type(item) is tuple:
            return tuple(move(one) for one in item)
        if isinstance(item, dict):
            return {key: move(one) for key, one in item.items()}
        return item

    return move

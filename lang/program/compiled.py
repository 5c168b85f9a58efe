"""A program compiled ahead of time: its whole graph, which runs with new arguments without calling its function.

A function can be compiled if it needs no generated value, and no value of an open argument, in Python. Everything else
that it reads (globals, the clock, random numbers) stays as it was at compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ramet.errors import InvalidProgram
from ramet.lang.backends.default import choose_backend
from ramet.lang.backends.protocol import Backend, BlockBackend
from ramet.lang.graph import ir
from ramet.lang.graph.options import RUN_OPTIONS, ProgramOptions, run_options
from ramet.lang.program.batch import States, cancelling, raises
from ramet.lang.program.trace import ArgumentSource, as_argument
from ramet.lang.recording.recorder import Recorder
from ramet.lang.recording.state import State
from ramet.lang.running.run import Run
from ramet.lang.running.values import Source, Value, source_of


class Compiled:
    """A `graph` with the variables of its last state. Arguments given at compilation are the defaults of a run.

    A run also accepts parameters that the graph doesn't depend on.
    """

    def __init__(self, traced: State, given: Iterable[str] = (), parameters: Iterable[str] = ()) -> None:
        """`traced`: the state at the end of a trace. `given`: names of the arguments given to it.

        `parameters`: names of all parameters of the function.

        Raises InvalidProgram if the trace needed a generated value.
        """
        record = traced.record
        if record.stop is not None:
            raise InvalidProgram(
                f"{record.program} can't be compiled: {record.stop.line} needs a value in Python ({record.stop.why}); "
                "use run(), which waits for it there",
                program=record.program,
                source_line=record.stop.line,
            )
        self.name = record.program
        self.graph = ir.Graph(record.graph.nodes)
        self._end = traced.recorder
        kept = [
            one for one in _sources([self._end.run.returned, self._end.variables]) if isinstance(one, ArgumentSource)
        ]
        in_text = [node.name for node in self.graph.nodes if isinstance(node, ir.Argument)]
        returned = [one.argument for one in kept if one.argument not in record.specialised]
        self.arguments = tuple(dict.fromkeys([*in_text, *returned]))
        self._unused = frozenset(parameters) - {*given, *record.specialised, *self.arguments}
        self._kept = {one.argument: example for one in kept for example in one.examples}
        self._given = {**{n: v for n, v in self._kept.items() if n in returned}, **record.graph.arguments}

    def run(self, *, failures: str = "raise", **kwargs: Any) -> State:
        """Run the graph and wait for its end.

        `kwargs`: arguments by name, and `backend`, `timeout_s`, `token_budget`, `priority`, `cache_salt` and `adapter`
        as in Function.run. Raises ProgramError if a node failed, unless `failures` is "keep".
        """
        is_raised, state = raises(failures), self.start(**kwargs)
        with cancelling([state]):
            state.wait()
        if is_raised:
            state.recorder.run.check()
        return state

    async def arun(self, *, failures: str = "raise", **kwargs: Any) -> State:
        """`run` for an event loop."""
        is_raised, state = raises(failures), self.start(**kwargs)
        with cancelling([state]):
            await state
        if is_raised:
            state.recorder.run.check()
        return state

    def run_batch(self, rows: Iterable[Mapping[str, Any]], **kwargs: Any) -> list[State]:
        """Run the graph for all rows of arguments at once, and return their states in order.

        A server receives the rows together, many in one request. If a row has wrong arguments, or the wait is
        interrupted, all rows are cancelled.
        """
        states: list[State] = []
        with cancelling(states):
            self._start_rows([{**kwargs, **row} for row in rows], states)
            return States(state.wait() for state in states)

    def start(self, *, backend: object | None = None, **kwargs: Any) -> State:
        """Submit the graph, and return its state without waiting. `kwargs`: as in `run`.

        Raises InvalidProgram if arguments are missing.
        """
        given = {name: kwargs.pop(name) for name in RUN_OPTIONS if name in kwargs and name not in self.arguments}
        state = self._new_state(choose_backend(backend), run_options(self.name, given), kwargs)
        state.recorder.run.finish()
        return state

    def _start_rows(self, rows: list[dict[str, Any]], states: list[State]) -> None:
        """Start every row, and add its state to `states`.

        A backend that takes rows receives those together that differ only in arguments.
        """
        own = set(self.arguments)
        common = [{name: value for name, value in row.items() if name not in own} for row in rows]
        backends = [one.pop("backend", None) for one in common]
        is_alike = all(one == common[0] for one in common) and all(one is backends[0] for one in backends)
        backend = choose_backend(backends[0]) if rows else None
        if is_alike and isinstance(backend, BlockBackend) and common[0].keys() <= {*RUN_OPTIONS}:
            options = run_options(self.name, common[0])
            found = [self._new_state(backend, options, {n: v for n, v in row.items() if n in own}) for row in rows]
            runs = [state.recorder.run for state in found]
            sessions = backend.start_rows(
                options, self.graph, [run.arguments for run in runs], [run.on_event for run in runs]
            )
        else:
            sessions = None
        if sessions is None:
            for row in rows:
                states.append(self.start(**row))
            return
        states += found
        index = ir.GraphIndex()
        index.add(self.graph)
        for run, session in zip(runs, sessions, strict=True):
            run.attach(session, index)
        for session in sessions:
            session.finish()

    def _new_state(self, backend: Backend, options: ProgramOptions, arguments: Mapping[str, Any]) -> State:
        """Return the state of a run that holds the whole graph, not submitted yet."""
        own = {name: value for name, value in arguments.items() if name not in self._unused}
        arguments = {**self._given, **own}
        unknown = sorted(set(arguments) - set(self.arguments))
        missing = [name for name in self.arguments if name not in arguments]
        if unknown or missing:
            what = f"has no argument {unknown[0]!r}" if unknown else f"needs argument {missing[0]!r}"
            way_out = f"it takes {', '.join(self.arguments) or 'none'}"
            if unknown and unknown[0] in ir.Sampling.__struct_fields__:
                way_out = f"what it samples with is fixed: give it to compile({unknown[0]}=...)"
            raise InvalidProgram(f"the compiled {self.name} {what}; {way_out}")
        for name, value in arguments.items():
            if not ir.is_json(value):
                raise InvalidProgram(f"argument {name!r} of {self.name} has no JSON form: {value!r}")
        given = {name: as_argument(value) for name, value in arguments.items()}
        traced, values = self._end.run, {**self._kept, **own}
        run = Run(backend, options, graph=ir.Graph(self.graph.nodes, given), placeholders=traced.placeholders)
        run.returned = _moved(traced.returned, run, values)
        return State(Recorder(run, self._end.tip, variables=_moved(self._end.variables, run, values)))


def _moved(item: Any, run: Run, arguments: Mapping[str, Any]) -> Any:  # Any: a program's result or variable
    """Convert values of the trace to values of a run with these arguments."""
    if isinstance(item, Value):
        return source_of(item).in_run(run, arguments)
    if isinstance(item, list):
        return [_moved(one, run, arguments) for one in item]
    if type(item) is tuple:
        return tuple(_moved(one, run, arguments) for one in item)
    if isinstance(item, dict):
        return {key: _moved(one, run, arguments) for key, one in item.items()}
    return item


def _sources(item: Any) -> Iterator[Source]:
    """Yield the sources of all values in lists, tuples and dictionaries."""
    if isinstance(item, Value):
        yield source_of(item)
    elif isinstance(item, list) or type(item) is tuple:
        for one in item:
            yield from _sources(one)
    elif isinstance(item, dict):
        for one in item.values():
            yield from _sources(one)

"""`@function`: an ordinary Python function, sync or async, whose first parameter is the program's state.

`run`, `arun`, `run_batch`, `stream` and `astream` execute it. Called with a state, it becomes a part of that state's
program. The function runs once for each call. When it needs a generated value in Python, the nodes recorded so far are
submitted, and recording continues once the value is there.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Protocol, TypeVar, cast, overload

from ramet.errors import ConfigError, InvalidProgram, InvalidRequest, RametError
from ramet.lang import explain as explanations
from ramet.lang.backends.default import choose_backend, use_backend
from ramet.lang.graph import ir
from ramet.lang.graph.options import RUN_OPTIONS, run_options
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.graph.sampling import to_sampling
from ramet.lang.passes.target import Target, target_of
from ramet.lang.program.batch import States, arguments_in_text, cancelling, in_row_order, raises, row_order, run_rows
from ramet.lang.program.compiled import Compiled
from ramet.lang.program.stream import Stream
from ramet.lang.program.trace import TraceStopped, TracingRun, symbolic
from ramet.lang.recording.recorder import Recorder
from ramet.lang.recording.state import R, State
from ramet.lang.running.run import Run
from ramet.lang.running.source_lines import line_of
from ramet.lang.running.tools import Tool, as_tools, tools_by_name
from ramet.lang.running.values import plain

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P", default=...)
else:  # defaults came with Python 3.13
    from typing import ParamSpec

    P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_OPTIONS = (
    "backend",
    *RUN_OPTIONS,
    "seed",
    "stage",
    "tools",
    "failures",
)
_STAGES = ("needed", "always")
_ORDERS = ("given", "prefix")
MAX_ARMS = 32  # ways through a program that a plan follows


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: the function's own arguments, and the options of the run."""

    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    sampling: ir.Sampling


class Runs(Protocol[T_co, P]):
    """A way to run a program, for type checkers: with the function's own arguments, or with options of the run, too.

    Python's types can't add keywords to those of another function. So arguments are checked where no option is given,
    and options are checked wherever they stand.
    """

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co: ...
    @overload
    def __call__(self, *args: Any, backend: object, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, timeout_s: float | None, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, token_budget: int | None, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, priority: int, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, cache_salt: str, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, seed: int | None, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, stage: str, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, tools: object, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, failures: str, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, var: str | None, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, temperature: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, max_tokens: int, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, min_tokens: int, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, string_tokens: int | None, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, top_k: int, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, top_p: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, min_p: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, frequency_penalty: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, presence_penalty: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, repetition_penalty: float, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, logit_bias: Mapping[int, float], **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, stop: str | Sequence[str], **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, stop_regex: str | Sequence[str], **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, stop_token_ids: Sequence[int], **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, ignore_eos: bool, **options: Any) -> T_co: ...
    @overload
    def __call__(self, *args: Any, logprobs: int | None, **options: Any) -> T_co: ...


def typed(method: Callable[Concatenate[Function[P, R], ...], T]) -> Runs[T, P]:
    """Tell type checkers that a method takes the arguments of the program's function."""
    return cast(Any, method)  # type: ignore[no-any-return]  # a method as it is


class Function(Generic[P, R]):
    """A program. `defaults` are sampling values for all its generations."""

    def __init__(
        self,
        body: Callable[..., Any],
        *,
        name: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        bound: Mapping[str, Any] | None = None,
        tools: Sequence[Tool | Callable[..., Any]] = (),
    ) -> None:
        functools.update_wrapper(self, body)  # sets __name__, __doc__, __wrapped__
        self.body = body
        self.name: str = name or str(getattr(body, "__name__", "program"))
        self.is_async = inspect.iscoroutinefunction(body)
        if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
            raise InvalidProgram(
                f"{self.name} has a `yield`, so calling it would run nothing; append to the state, and return values"
            )
        self.defaults = dict(defaults or {})
        self.bound = dict(bound or {})
        self.tools = as_tools(tools) if tools else ()
        parameters = list(inspect.signature(body).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise InvalidProgram(f"{self.name}: the first parameter of a program is its state: def {self.name}(s, ...)")
        self.parameters = parameters[1:]
        self._signature = inspect.Signature(self.parameters)
        self._sampling = to_sampling(plain(self.defaults))

    def __get__(self, instance: object, owner: type | None = None) -> Function[P, R]:
        """Bind a method to its object. The state is then the parameter after `self`."""
        if instance is None:
            return self
        body = self.body.__get__(instance, owner)
        return Function(body, name=self.name, defaults=self.defaults, bound=self.bound, tools=self.tools)

    def __call__(self, state: State, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the body as a part of `state`'s program. Use `run` for a separate run."""
        if not isinstance(state, State):
            raise TypeError(f"{self.name}(...) takes a state and becomes a part of its program; to run it: .run(...)")
        bound = self._signature.bind(*args, **{**self.bound, **kwargs})
        with ExitStack() as scope:
            scope.enter_context(state.recorder.default_sampling(self._sampling))
            self._declare_tools(state)
            if self.is_async:
                inside: Any = self._inline(state, bound, scope.pop_all())
                inside.__qualname__ = self.name  # Python names it in its warning if nobody awaits it
                return cast(R, inside)
            return cast(R, self.body(state, *bound.args, **bound.kwargs))

    async def _inline(self, state: State, bound: inspect.BoundArguments, scope: ExitStack) -> Any:
        with scope:
            return await self.body(state, *bound.args, **bound.kwargs)

    def bind(self, **arguments: Any) -> Function[..., R]:
        """Return the same program with some arguments given."""
        unknown = [name for name in arguments if name not in self._signature.parameters]
        if unknown:
            raise TypeError(f"{self.name} has no parameter {unknown[0]!r}")
        return Function(
            self.body, name=self.name, defaults=self.defaults, bound={**self.bound, **arguments}, tools=self.tools
        )

    def _declare_tools(self, state: State) -> None:
        if self.tools:
            state.recorder.use_tools(self.tools, line_of(self.body))

    # Running.

    @typed
    def run(self, *args: Any, **kwargs: Any) -> State[R]:
        """Run the program and wait for its end.

        Options besides the function's own arguments: `backend`, `timeout_s`, `token_budget`, `priority`, `cache_salt`,
        `adapter` (a LoRA, for generations that name none), `seed` (each generation's own seed is derived from it),
        `stage` ("needed": submit when a value is needed; "always": after each generation and the text behind it),
        `tools`, `failures`, and sampling defaults such as `temperature` and `max_tokens`.

        Raises the exception of the function itself, and ProgramError for a generation, selection or tool that failed,
        unless the function met that error, reading a value, and went on. `failures="keep"` leaves errors of nodes in
        the state (State.error), where reading their values raises them.
        """
        if self.is_async:
            self._refuse_loop()
            return asyncio.run(self.arun(*args, **kwargs))
        call = self._split(args, kwargs)
        state = self._new_state(call)
        with cancelling([state]):
            self._record(state, call)
            state.wait()
        return _checked(state, call)

    @typed
    def start(self, *args: Any, **kwargs: Any) -> State[R]:
        """Run the program, and leave its run open: what is appended to the state goes on in it (State.say, close)."""
        if self.is_async:
            raise InvalidProgram(f"{self.name} is async; start() takes a program that is not")
        call = self._split(args, kwargs)
        state = self._new_state(call)
        with cancelling([state]):
            self._record(state, call, stays_open=True)
            state.wait()
            return _checked(state, call)

    def _refuse_loop(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise InvalidProgram(f"{self.name} is async and an event loop runs here; use: await {self.name}.arun(...)")

    @typed
    async def arun(self, *args: Any, **kwargs: Any) -> State[R]:
        """`run` for an event loop. A sync program records on a thread of its own, since it may wait for a value."""
        call = self._split(args, kwargs)
        state = self._new_state(call)
        with cancelling([state]):
            if self.is_async:
                await self._arecord(state, call)
            else:
                await _in_own_thread(lambda: self._record(state, call))
            await state
        return _checked(state, call)

    @typed
    def stream(self, *args: Any, var: str | None = None, **kwargs: Any) -> Stream:
        """Run the program and return a stream of its text of variable `var`, or of all events if `var` is None.

        A variable that is written as JSON (a model, a list, a schema) comes as its JSON value so far (Stream). The
        stream's `state` is the program's state. Leaving the iteration early cancels the program.
        """
        call = self._split(args, kwargs)
        state = self._new_state(call, keep_events=True)
        stream = Stream(state, var, raises=raises(call.options.get("failures", "raise")))

        def work() -> None:
            stream.run(lambda: self._record(state, call))

        threading.Thread(target=copy_context().run, args=(work,), name=f"ramet-{self.name}", daemon=True).start()
        return stream

    @typed
    async def astream(self, *args: Any, var: str | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """`stream` for an event loop."""
        call = self._split(args, kwargs)
        state = self._new_state(call, keep_events=True)
        stream = Stream(state, var, raises=raises(call.options.get("failures", "raise")))
        if self.is_async:
            recording = asyncio.ensure_future(self._arecord(state, call))
        else:
            recording = asyncio.ensure_future(_in_own_thread(lambda: self._record(state, call)))
        recording.add_done_callback(stream.recorded)
        async for item in stream:
            yield item

    @overload
    def run_batch(
        self, rows: Iterable[Any], *, generator_style: None = None, progress_bar: bool = False, **kwargs: Any
    ) -> list[State]: ...
    @overload
    def run_batch(
        self, rows: Iterable[Any], *, generator_style: bool, progress_bar: bool = False, **kwargs: Any
    ) -> Any: ...
    def run_batch(
        self,
        rows: Iterable[Any],
        *,
        generator_style: bool | None = None,
        progress_bar: bool = False,
        num_threads: int | None = None,
        max_live: int = 1024,
        order: str = "given",
        **kwargs: Any,
    ) -> Any:
        """Run the program for every row. A row is a dict of arguments, a tuple of them, or the only argument.

        Rows run together, at most `max_live` at once. Results come in the order of the rows: as a list, or one by one
        as they are ready with `generator_style=True`. A row fails alone: its error stays in its state, where reading a
        value raises it, or is raised in the row's turn with `failures="raise"`. `order="prefix"` starts rows
        with equal prefixes next to each other, so that a prefix is computed once even if the cache is small. This
        traces the program first.
        """
        calls = [self._split_row(row, kwargs) for row in rows]
        if order not in _ORDERS:
            raise ConfigError(f"order is {order!r}, but must be one of {', '.join(_ORDERS)}")
        for name, value in (("num_threads", num_threads), ("max_live", max_live)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, but must be an integer from 1")
        starts, by_row = list(range(len(calls))), calls
        if order == "prefix" and len(calls) > 1:
            starts = row_order([call.arguments for call in calls], self._argument_order(calls[0].arguments))
            calls = [calls[index] for index in starts]
        states = in_row_order(starts, self._run_calls(calls, progress_bar, num_threads, max_live))
        if calls and raises(calls[0].options.get("failures", "keep")):
            states = (_checked(state, call) for state, call in zip(states, by_row, strict=True))
        return states if generator_style else States(states)

    def _argument_order(self, row: Mapping[str, Any]) -> list[str]:
        """Return the names of arguments. Those used in text come first, in the order of their first use."""
        names = [parameter.name for parameter in self.parameters]
        try:
            first = arguments_in_text(self.trace(**row).graph)
        except (RametError, TypeError, ValueError):  # the row's own run will report the error
            return names
        return [*first, *(name for name in names if name not in first)]

    def _run_calls(
        self, calls: list[_Call], progress_bar: bool, num_threads: int | None, max_live: int
    ) -> Iterator[State]:
        states = run_rows(calls, self._new_state, self._record, num_threads=num_threads, max_live=max_live)
        with closing(states):
            yield from _shown_progress(states, len(calls), self.name) if progress_bar else states

    # Tracing.

    def trace(self, *args: Any, **kwargs: Any) -> RunRecord:
        """Record the program without running it. Arguments that are left out stay symbolic.

        The record's graph has the given arguments. Its `stop` is where the trace needed a generated value, and ended.

        Some functions can't work with symbolic arguments, for example because they pass one to code that requires a
        plain string. Such a function is traced with the given values themselves.
        """
        return self._symbolic_trace(self._split(args, kwargs, is_partial=True)).record

    def _symbolic_trace(self, call: _Call, arm: Sequence[int] | None = None) -> State:
        """Return the state at the end of a trace."""
        try:
            return self._trace(call, is_symbolic=True, arm=arm)
        except Exception:
            missing = [p.name for p in self.parameters if p.name not in call.arguments]
            if missing:
                raise
            return self._trace(call, is_symbolic=False, arm=arm)

    def _trace(self, call: _Call, *, is_symbolic: bool, arm: Sequence[int] | None = None) -> State:
        run = TracingRun(self.name, call.options.get("seed"), arm)
        state = State(Recorder(run, sampling=call.sampling))
        names = [p.name for p in self.parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        arguments = symbolic(run, names, call.arguments) if is_symbolic else dict(call.arguments)
        backend = call.options.get("backend")
        with suppress(TraceStopped), use_backend(backend) if backend is not None else nullcontext():
            self._record(state, replace(call, arguments=arguments))
        return state

    def compile(self, **given: Any) -> Compiled:
        """Trace the program once and keep its graph. `.run(...)` of the result doesn't execute the function again.

        `given`: defaults of the arguments. An argument whose value the function needs in Python must be given; the
        compiled graph then holds for that value only. Raises InvalidProgram if a generated value is needed.
        """
        traced = self._symbolic_trace(self._split((), given, is_partial=True))
        return Compiled(traced, given, [parameter.name for parameter in self.parameters])

    # Costs.

    def explain(
        self, *args: Any, rows: Iterable[Any] | None = None, analyze: bool = False, **kwargs: Any
    ) -> explanations.Explanation:
        """Predict the program's cost without running it: prompt, shared and new tokens, a KV bound, results of passes.

        Arguments may be left out; if all are given, the counts are exact wherever the text is known. `rows`: the rows
        of a batch (see run_batch). `analyze`: run the program, and report measurements. `backend` tokenises the text.
        """
        if not analyze:
            return self.plan(args, kwargs, rows=rows)
        if rows is not None:
            raise InvalidRequest(
                "explain(rows=...) can't analyze; run the batch, and explain its states", param="analyze"
            )
        plan = self.plan(args, kwargs)
        options = {} if "failures" in self._signature.parameters else {"failures": "keep"}  # its own comes first
        after = explanations.explain_run(self.run(*args, **{**options, **kwargs}).record)
        return replace(plan, measured=after.measured, stages=after.stages)

    def plan(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        rows: Iterable[Any] | None = None,
        target: Target | None = None,
    ) -> explanations.Explanation:
        """Do the same as `explain`, with the arguments in a dictionary, or with only a tokenizer (`target`)."""
        if rows is not None:
            calls = [self._split_row(row, kwargs) for row in rows]
            if not calls:
                raise InvalidRequest("rows is empty; a batch needs at least one row", param="rows")
            target = target or target_of(calls[0].options.get("backend"))
            return explanations.explain_rows([self._trace(call, is_symbolic=False).record for call in calls], target)
        call = self._split(args, kwargs, is_partial=True)
        target = target or target_of(call.options.get("backend"))
        return explanations.explain_arms(*self._arms(call), target, self._unbound_graph(call))

    def _arms(self, call: _Call) -> tuple[list[RunRecord], bool]:
        """Trace every way that the program can go where the choices of a selection, or the first branch that is done,
        decide. Returns at most `MAX_ARMS` of them, and whether these are all.
        """
        waiting, found = list[tuple[int, ...]]([()]), list[RunRecord]()
        while waiting and len(found) < MAX_ARMS:
            arm = waiting.pop()
            state = self._whole_trace(call, arm)
            run = state.recorder.run
            assert isinstance(run, TracingRun)
            taken = [option for option, _ in run.taken]
            for place in range(len(arm), len(taken)):
                waiting += [(*taken[:place], other) for other in range(1, run.taken[place][1])]
            found.append(state.record)
        return found, not waiting

    def why_miss(self, *args: Any, var: str | None = None, **kwargs: Any) -> list[explanations.Miss]:
        """Return, for each generation with a known prompt, where it leaves the cached ones. The costliest first."""
        call = self._split(args, kwargs)
        backend = choose_backend(call.options.get("backend"))
        record = self._trace(call, is_symbolic=False).record
        return explanations.why_miss_plan(record, backend, call.options.get("cache_salt", ""), var)

    def graph(self, **arguments: Any) -> explanations.Drawing:
        """Return a drawing of the program and its plan: `.mermaid()`, `.svg()`, `.html()`, `.save("p.html")`."""
        return self.draw(arguments)

    def draw(self, arguments: Mapping[str, Any], *, target: Target | None = None) -> explanations.Drawing:
        """Do the same as `graph`, with the arguments in a dictionary, or with only a tokenizer (`target`)."""
        call = self._split((), arguments, is_partial=True)
        record = self._whole_trace(call).record
        target = target or target_of(call.options.get("backend"))
        return explanations.draw_plan(
            record, explanations.explain_plan(record, target, self._unbound_graph(call)), target
        )

    def _whole_trace(self, call: _Call, arm: Sequence[int] | None = None) -> State:
        """Trace the call. If every argument is given, the nodes equal those of a run; else arguments stay symbolic."""
        if all(p.name in call.arguments for p in self.parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)):
            return self._trace(call, is_symbolic=False, arm=arm)
        return self._symbolic_trace(call, arm)

    def _unbound_graph(self, call: _Call) -> ir.Graph | None:
        """Return the graph of all calls, in which all arguments are symbolic. None for a program without arguments."""
        if not call.arguments and not self.parameters:
            return None
        return ir.Graph(self._symbolic_trace(call).record.graph.nodes)

    # Recording.

    def _new_state(self, call: _Call, *, keep_events: bool = False) -> State:
        options = call.options
        stage = options.get("stage", "needed")
        if stage not in _STAGES:
            raise ConfigError(f"stage is {stage!r}, but must be one of {', '.join(_STAGES)}")
        raises(options.get("failures", "raise"))  # an unknown wish is refused before anything runs
        seed = options.get("seed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise InvalidRequest(f"{self.name}: seed is {seed!r}, but must be an integer, or None", param="seed")
        run = Run(
            choose_backend(options.get("backend")),
            run_options(self.name, options, text_events=keep_events),
            seed=seed,
            stage_always=stage == "always",
            keep_events=keep_events,
            tools=tools_by_name(options.get("tools")),
        )
        return State(Recorder(run, sampling=call.sampling))

    def _record(self, state: State, call: _Call, *, stays_open: bool = False) -> None:
        """Run the body on this thread. Its exception cancels the run and is raised."""
        run = state.recorder.run
        with run.recording(stays_open=stays_open):
            self._declare_tools(state)
            result = self.body(state, **call.arguments)
            run.returned = asyncio.run(result) if self.is_async else result

    async def _arecord(self, state: State, call: _Call) -> None:
        """Run an async body on the event loop that runs here."""
        run = state.recorder.run
        with run.recording():
            self._declare_tools(state)
            run.returned = await self.body(state, **call.arguments)

    # Arguments.

    def _split(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_partial: bool = False) -> _Call:
        """Separate the function's arguments from the run's options. The function's own names take precedence."""
        own = {name: value for name, value in kwargs.items() if name in self._signature.parameters}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        options = {name: rest.pop(name) for name in _OPTIONS if name in rest}
        sampling = {name: rest.pop(name) for name in ir.Sampling.__struct_fields__ if name in rest}
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters)
        if rest and not takes_any:
            raise TypeError(f"{self.name} has no parameter {next(iter(rest))!r}, and it is no option of a run either")
        try:
            bind = self._signature.bind_partial if is_partial else self._signature.bind
            bound = bind(*args, **{**self.bound, **own, **rest})
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                if not value:
                    continue
                raise InvalidRequest(f"{self.name}: a program can't take *{name} in a run; pass a list")
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = plain(value)  # values of an enclosing program
        return _Call(arguments, options, to_sampling(plain({**self.defaults, **sampling})))

    def _split_row(self, row: Any, kwargs: Mapping[str, Any]) -> _Call:
        if isinstance(row, Mapping):
            return self._split((), {**kwargs, **row})
        return self._split(row if isinstance(row, tuple) else (row,), kwargs)

    def __repr__(self) -> str:
        return f"<program {self.name}{self._signature}>"


def _checked(state: State[R], call: _Call) -> State[R]:
    """Return the state of a run that is over. Raises its error, unless the call keeps errors."""
    if raises(call.options.get("failures", "raise")):
        state.recorder.run.check()
    return state


async def _in_own_thread(work: Callable[[], None]) -> None:
    """Run `work` on a thread of its own. asyncio's pool is a few threads; programs that wait would fill it."""
    ended: Future[None] = Future()
    ended.set_running_or_notify_cancel()  # so that a cancelled wait leaves it as it is
    context = copy_context()

    def run() -> None:
        try:
            ended.set_result(context.run(work))
        except BaseException as error:  # raised where the result is awaited
            ended.set_exception(error)

    threading.Thread(target=run, name="ramet-program", daemon=True).start()
    await asyncio.wrap_future(ended)


def _shown_progress(states: Iterable[State], total: int, name: str) -> Iterator[State]:
    """Yield the states of a batch, and show a progress bar on the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        yield from bar.track(states, total=total, description=name)


class Makes(Protocol):
    """What makes a function a program, for type checkers."""

    @overload
    def __call__(self, body: Callable[Concatenate[State, P], Coroutine[Any, Any, R]]) -> Function[P, R]: ...
    @overload
    def __call__(self, body: Callable[Concatenate[State, P], R]) -> Function[P, R]: ...
    @overload
    def __call__(self, body: Callable[Concatenate[Any, State, P], R]) -> Function[P, R]: ...  # a method


@overload
def function(
    body: Callable[Concatenate[State, P], Coroutine[Any, Any, R]],
) -> Function[P, R]: ...
@overload
def function(body: Callable[Concatenate[State, P], R]) -> Function[P, R]: ...
@overload
def function(body: Callable[Concatenate[Any, State, P], R]) -> Function[P, R]: ...
@overload
def function(
    body: None = None,
    *,
    name: str | None = None,
    tools: Sequence[Tool | Callable[..., Any]] = (),
    **defaults: Any,
) -> Makes: ...
def function(
    body: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    tools: Sequence[Tool | Callable[..., Any]] = (),
    **defaults: Any,
) -> Any:
    """Make a function a program: `@function`, or `@function(temperature=0, max_tokens=64)` with sampling defaults.

    `tools`: tools that are declared at the start of every run; see State.call_tools.
    """
    if body is not None:
        return Function(body, name=name, defaults=defaults, tools=tools)
    return lambda wrapped: Function(wrapped, name=name, defaults=defaults, tools=tools)

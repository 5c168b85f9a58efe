"""`call_tools`: the model calls tools, reads what they return, and goes on until it answers.

One step is a generation in the model's own format for tools, and a message with the result of each call. Results are
data edges: a program waits only for what the model calls, and tools run while other branches decode. The loop is a
generator that yields the node it needs next, so that one thread can drive the loops of many branches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ramet.errors import InvalidProgram, InvalidRequest, ProgramCancelled
from ramet.lang.graph import ir
from ramet.lang.recording.generations import generate
from ramet.lang.recording.primitives import Gen, merge_sampling, to_sampling
from ramet.lang.recording.tools import Tool, as_tools, declared
from ramet.lang.recording.types import OutputType, Shape
from ramet.lang.recording.values import ToolUse, Value

if TYPE_CHECKING:
    import asyncio

    from ramet.lang.recording.state import State

MAX_TOKENS = 512  # of one message where the program says nothing: arguments that are cut are of no use
WHY = "which tools the model calls"
_SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}, "calls": {"type": "array"}}}
ANSWER = OutputType("tools", shape=Shape(_SCHEMA, _SCHEMA))


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """What `call_tools` was told. `choice`: of the first step; the later ones are free to answer."""

    tools: tuple[Tool, ...]
    max_steps: int
    name: str
    calls: str
    choice: str
    parallel: bool
    on_error: Literal["raise", "report"]
    sampling: ir.Sampling
    loop: asyncio.AbstractEventLoop | None = None  # where async tools run; None: on threads

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise InvalidRequest(f"max_steps is {self.max_steps!r}, but must be at least 1", param="max_steps")
        if self.choice not in ("auto", "required", *names):
            known = ", ".join(["auto", "required", *names])
            raise InvalidRequest(f"choice is {self.choice!r}, but must be one of {known}", param="choice")
        if self.on_error not in ("raise", "report"):
            raise InvalidRequest(f'on_error is {self.on_error!r}, but must be "raise" or "report"', param="on_error")


def loop_options(
    state: State,
    tools: Sequence[Tool | Callable[..., Any]] | None,
    *,
    max_steps: int = 8,
    name: str = "answer",
    calls: str = "calls",
    choice: str = "auto",
    parallel: bool = True,
    on_error: Literal["raise", "report"] = "raise",
    **sampling: Any,  # Any: sampling values, which are checked
) -> LoopOptions:
    """What State.call_tools was told, checked. Raises InvalidProgram, InvalidRequest, InvalidSampling."""
    found = state._tools if tools is None else as_tools(tools)
    if not found:
        raise InvalidProgram("call_tools has no tools; give them, or declare them first", program=state._program)
    unknown = [one for one in sampling if one not in ir.Sampling.__struct_fields__]
    if unknown:
        raise TypeError(f"call_tools has no parameter {unknown[0]!r}")
    values = to_sampling(sampling)
    if merge_sampling(values, state._sampling).max_tokens is None:
        values = merge_sampling(ir.Sampling(max_tokens=MAX_TOKENS), values)
    return LoopOptions(found, max_steps, name, calls, choice, parallel, on_error, values)


def use_tools(state: State, tools: tuple[Tool, ...], line: str | None = None) -> None:
    """Declare tools on a branch, so that the model is told of them. Nothing happens where it has just these already."""
    if state._tools == tools:
        return
    if state._role is not None:
        raise InvalidProgram(
            f"tools are declared inside of a {state._role} message; declare them between messages, best before all",
            program=state._program,
        )
    known = state._run.tools
    for tool in tools:
        if known.setdefault(tool.name, tool) != tool:
            raise InvalidProgram(f"the program has another tool of the name {tool.name!r}", program=state._program)
    state._add(ir.Tools, tools=declared(tools), line=line)
    state._tools = tools


def tool_loop(state: State, options: LoopOptions) -> Generator[int, None, Value]:
    """The steps of one branch; yields the generation that it needs, and goes on when that is done."""
    if state._role is not None:
        raise InvalidProgram(
            f"call_tools writes messages of its own, but a {state._role} message is open; end that one first",
            program=state._program,
        )
    use_tools(state, options.tools)
    uses: list[ToolUse] = []
    last: list[ToolUse] = []
    for step in range(options.max_steps + 1):
        choice = options.choice if step == 0 else "auto" if step < options.max_steps else "none"
        item = Gen(options.name, ANSWER, _constraint(options, choice), options.sampling)
        with state.assistant():
            value = generate(state, item)
        yield value._node
        _raise_failure(last)
        calls = value._read(WHY)["calls"]
        if not calls:
            break
        last = _record_calls(state, options, value, calls)
        uses += last
    answer = value._child("text")
    assert answer is not None
    state._variables[options.name] = answer
    state._variables[options.calls] = uses
    return answer


def _raise_failure(uses: Sequence[ToolUse]) -> None:
    """Raise a tool's error itself, not that of the generation which needed its result."""
    for use in uses:
        error = use.result._run.error_of(use.result._node)
        if error is not None and not isinstance(error, ProgramCancelled):
            raise error


def _record_calls(state: State, options: LoopOptions, value: Value, calls: Sequence[dict[str, Any]]) -> list[ToolUse]:
    run, tip = state._run, state._tip
    nodes = []
    for index, call in enumerate(calls):
        arguments = (ir.Ref(value._node, ("calls", index, "arguments")),)
        node = run.record(ir.ToolCall, tip, tool=call["name"], arguments=arguments, on_error=options.on_error)
        if options.loop is not None:
            run.loops[node.id] = options.loop
        nodes.append(node.id)
    for node_id in nodes:
        with state.tool():
            state._add(ir.Text, parts=(ir.Ref(node_id),))
    return [
        ToolUse(call["name"], call["arguments"], Value(run, node, call["name"]))
        for call, node in zip(calls, nodes, strict=True)
    ]


def _constraint(options: LoopOptions, choice: str) -> ir.Constraint:
    tools = [{"name": tool.name, "parameters": tool.parameters} for tool in options.tools]
    known = choice in ("auto", "required", "none")
    source = {
        "tools": tools,
        "choice": choice if known else {"name": choice},
        "parallel": options.parallel,
        "json": {"whitespace": "bounded"},
    }
    return ir.Constraint("tools", json.dumps(source, ensure_ascii=False))


def drive(loops: Sequence[tuple[State, Generator[int, None, Value]]]) -> list[Value]:
    """Run the loops of several branches of one program on this thread, each as far as it can go."""
    if not loops:
        return []
    run = loops[0][0]._run
    answers: dict[int, Value] = {}
    waiting: dict[int, int] = {}  # loop -> node

    def advance(index: int) -> None:
        try:
            waiting[index] = next(loops[index][1])
        except StopIteration as end:
            waiting.pop(index, None)
            answers[index] = end.value

    for index in range(len(loops)):
        advance(index)
    while waiting:
        ready = [index for index, node in waiting.items() if run.result_of(node) is not None]
        if not ready:
            run.need(next(iter(waiting.values())), WHY)
            run.wait(lambda: any(run.result_of(node) is not None for node in waiting.values()))
            continue
        for index in ready:
            advance(index)
    return [answers[index] for index in range(len(loops))]


async def adrive(state: State, loop: Generator[int, None, Value]) -> Value:
    """Run one branch's loop on an event loop."""
    try:
        while True:
            await state._run.aread_quietly(next(loop), WHY)
    except StopIteration as end:
        found: Value = end.value
        return found

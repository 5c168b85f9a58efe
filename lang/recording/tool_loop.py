"""`call_tools`: the model calls tools and reads their results, until it answers.

One step is a generation in the model's own tool format, and a message with the result of each call. Results are data
edges: a program waits only for the model's calls, not for results, and tools run while other branches decode. The loop
is a Python generator that yields the node it needs next, so that a thread or an event loop can wait for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ramet.errors import InvalidProgram, InvalidRequest, ProgramCancelled
from ramet.lang.graph import ir
from ramet.lang.graph.sampling import to_sampling
from ramet.lang.recording.generations import Gen
from ramet.lang.recording.recorder import Recorder
from ramet.lang.running.output_types import OutputType, Shape
from ramet.lang.running.run import Run
from ramet.lang.running.tools import Tool, as_tools
from ramet.lang.running.values import NodeSource, ToolUse, Value, plain

MAX_TOKENS = 512  # the default for one message: large, because arguments that are cut off are useless
WHY = "which tools the model calls"
_SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}, "calls": {"type": "array"}}}
ANSWER = OutputType("tools", shape=Shape(_SCHEMA, _SCHEMA))


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """The options of `call_tools`. `choice`: for the first step; in later ones the model is free to answer."""

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
    recorder: Recorder,
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
    """Check the options of State.call_tools. Raises InvalidProgram, InvalidRequest, InvalidSampling."""
    found = recorder.tools if tools is None else as_tools(tools)
    if not found:
        raise InvalidProgram("call_tools has no tools; give them, or declare them first", program=recorder.program)
    unknown = [one for one in sampling if one not in ir.Sampling.__struct_fields__]
    if unknown:
        raise TypeError(f"call_tools has no parameter {unknown[0]!r}")
    values = to_sampling(plain(sampling))
    if values.filled(recorder.sampling).max_tokens is None:
        values = values.filled(ir.Sampling(max_tokens=MAX_TOKENS))
    return LoopOptions(found, max_steps, name, calls, choice, parallel, on_error, values)


def tool_loop(recorder: Recorder, options: LoopOptions) -> Generator[int, None, Value]:
    """Run the steps of one branch. Yields the generation that it needs, and resumes when that is done."""
    if recorder.role is not None:
        raise InvalidProgram(
            f"call_tools writes messages of its own, but a {recorder.role} message is open; end that one first",
            program=recorder.program,
        )
    recorder.use_tools(options.tools)
    uses: list[ToolUse] = []
    called: list[int] = []  # ToolCall nodes of the last step
    for step in range(options.max_steps + 1):
        choice = options.choice if step == 0 else "auto" if step < options.max_steps else "none"
        with recorder.message("assistant"):
            message = Gen(options.name, ANSWER, _constraint(options, choice), options.sampling).record(recorder)
        yield message.node
        _raise_failure(recorder.run, called)
        calls = message.read(WHY)["calls"]
        if not calls:
            break
        called = _record_calls(recorder, options, message.node, calls)
        uses += [
            ToolUse(call["name"], call["arguments"], Value(NodeSource(recorder.run, node, call["name"])))
            for call, node in zip(calls, called, strict=True)
        ]
    text = message.child("text")
    assert text is not None
    answer = Value(text)
    recorder.variables[options.name] = answer
    recorder.variables[options.calls] = uses
    return answer


def _raise_failure(run: Run, nodes: Sequence[int]) -> None:
    """Raise a tool's own error, instead of the error of the generation that needed its result."""
    for node in nodes:
        error = run.error_of(node)
        if error is not None and not isinstance(error, ProgramCancelled):
            raise error


def _record_calls(recorder: Recorder, options: LoopOptions, message: int, calls: Sequence[dict[str, Any]]) -> list[int]:
    """Record a message's calls, which run at once, and a message with each result. Returns the call nodes."""
    run, tip = recorder.run, recorder.tip
    nodes = []
    for index, call in enumerate(calls):
        arguments = (ir.Ref(message, ("calls", index, "arguments")),)
        node = run.record(ir.ToolCall, tip, tool=call["name"], arguments=arguments, on_error=options.on_error)
        if options.loop is not None:
            run.tools.use_loop(node, options.loop)
        nodes.append(node)
    for node in nodes:
        with recorder.message("tool"):
            recorder.add(ir.Text, parts=(ir.Ref(node),))
    return nodes


def _constraint(options: LoopOptions, choice: str) -> ir.Constraint:
    tools = [{"name": tool.name, "parameters": tool.parameters} for tool in options.tools]
    known = choice in ("auto", "required", "none")
    source = {
        "tools": tools,
        "choice": choice if known else {"name": choice},
        "parallel": options.parallel,
    }
    return ir.Constraint("tools", json.dumps(source, ensure_ascii=False))


def drive(run: Run, loop: Generator[int, None, Value]) -> Value:
    """Run one branch's loop on this thread."""
    try:
        while True:
            run.read_quietly(next(loop), WHY)
    except StopIteration as end:
        found: Value = end.value
        return found


async def adrive(run: Run, loop: Generator[int, None, Value]) -> Value:
    """Run one branch's loop on an event loop."""
    try:
        while True:
            await run.aread_quietly(next(loop), WHY)
    except StopIteration as end:
        found: Value = end.value
        return found

"""`call_tools`: the model calls tools and reads their results, until it answers.

One step is a generation in the model's own tool format, and a message with the result of each call. Results are data
edges: a program waits only for the model's calls, not for results, and tools run while other branches decode. The loop
is a Python generator that yields the node it needs next, so that a thread or an event loop can wait for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator, Sequence
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
RESULT = OutputType()  # JSON of any type


def tool_loop(
    recorder: Recorder,
    given: Sequence[Tool | Callable[..., Any]] | None,
    *,
    max_steps: int = 8,
    name: str = "answer",
    calls: str = "calls",
    choice: str = "auto",
    parallel: bool = True,
    on_error: Literal["raise", "report"] = "raise",
    loop: asyncio.AbstractEventLoop | None = None,
    model: str = "",
    **sampling: Any,  # Any: sampling values, which are checked
) -> Generator[int, None, Value]:
    """Run the steps of one branch. Yields the generation that it needs, and resumes when that is done.

    The options are those of State.call_tools. `choice` holds for the first step; in later ones the model is free to
    answer. `loop`: where async tools run; None: on threads. Raises InvalidProgram, InvalidRequest.
    """
    tools = recorder.tools if given is None else as_tools(given)
    if not tools:
        raise InvalidProgram("call_tools has no tools; give them, or declare them first", program=recorder.program)
    unknown = [one for one in sampling if one not in ir.Sampling.__struct_fields__]
    if unknown:
        raise TypeError(f"call_tools has no parameter {unknown[0]!r}")
    values = to_sampling(plain(sampling))
    if values.filled(recorder.sampling).max_tokens is None:
        values = values.filled(ir.Sampling(max_tokens=MAX_TOKENS))
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise InvalidRequest(f"max_steps is {max_steps!r}, but must be at least 1", param="max_steps")
    if choice not in (known := ["auto", "required", *(tool.name for tool in tools)]):
        raise InvalidRequest(f"choice is {choice!r}, but must be one of {', '.join(known)}", param="choice")
    if on_error not in ("raise", "report"):
        raise InvalidRequest(f'on_error is {on_error!r}, but must be "raise" or "report"', param="on_error")
    if recorder.role is not None:
        raise InvalidProgram(
            f"call_tools writes messages of its own, but a {recorder.role} message is open; end that one first",
            program=recorder.program,
        )
    recorder.use_tools(tools)
    uses: list[ToolUse] = []
    called: list[int] = []  # ToolCall nodes of the last step
    for step in range(max_steps + 1):
        now = choice if step == 0 else "auto" if step < max_steps else "none"
        with recorder.message("assistant"):
            message = Gen(name, ANSWER, _constraint(tools, now, parallel), values, model=model).record(recorder)
        if loop is not None:
            recorder.run.tools.use_loop(message.node, loop)
        yield message.node
        _raise_failure(recorder.run, called)
        asked = message.read(WHY)["calls"]
        if not asked:
            break
        called = _record_calls(recorder, message.node, asked, on_error)
        uses += [
            ToolUse(call["name"], call["arguments"], Value(NodeSource(recorder.run, node, call["name"], RESULT)))
            for call, node in zip(asked, called, strict=True)
        ]
    text = message.child("text")
    assert text is not None
    answer = Value(text)
    recorder.variables[name] = answer
    recorder.variables[calls] = uses
    return answer


def _raise_failure(run: Run, nodes: Sequence[int]) -> None:
    """Raise a tool's own error, instead of the error of the generation that needed its result."""
    for node in nodes:
        error = run.error_of(node)
        if error is not None and not isinstance(error, ProgramCancelled):
            raise error


def _record_calls(
    recorder: Recorder,
    message: int,
    calls: Sequence[dict[str, Any]],
    on_error: str,
) -> list[int]:
    """Record a message's calls, which run at once, and a message with each result. Returns the call nodes."""
    run, tip = recorder.run, recorder.tip
    nodes = []
    for index, call in enumerate(calls):
        arguments = (ir.Ref(message, ("calls", index, "arguments")),)
        nodes.append(run.record(ir.ToolCall, tip, tool=call["name"], arguments=arguments, on_error=on_error))
    for node in nodes:
        with recorder.message("tool"):
            recorder.add(ir.Text, parts=(ir.Ref(node),))
    return nodes


def _constraint(tools: Sequence[Tool], choice: str, parallel: bool) -> ir.Constraint:
    source = {
        "tools": [{"name": tool.name, "parameters": tool.parameters} for tool in tools],
        "choice": choice if choice in ("auto", "required", "none") else {"name": choice},
        "parallel": parallel,
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

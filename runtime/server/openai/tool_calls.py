"""Turn an answer's text into OpenAI's deltas: reasoning, content, tool calls.

Calls come from the events of the format's reader, never from a search in the text. Not here: the formats in which
models write calls (runtime/text/tool_style.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from ramet.grammar.tools.events import ArgumentsDelta, CallEnd, CallStart, Event, ToolCallReader
from ramet.runtime.server.openai.answers import AnsweredCall, CalledFunction
from ramet.runtime.server.openai.reasoning import ReasoningSplitter
from ramet.runtime.server.sending import Json
from ramet.runtime.text.tool_style import ToolStyle, schemas_of


@dataclass(slots=True)
class WrittenCall:
    """A call of an answer. If `is_complete`, `arguments` is complete JSON; otherwise it must not be used."""

    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False

    def answered(self) -> AnsweredCall:
        """The call in the form of an answer."""
        function = CalledFunction(name=self.name, arguments=self.arguments)
        return AnsweredCall(
            id=self.id, type="function", function=function, incomplete=UNSET if self.is_complete else True
        )

    def plain(self) -> Json:
        """The call as JSON, in the form in which a client sends it back in the history."""
        call: Json = msgspec.to_builtins(self.answered())
        return call


@dataclass(slots=True)
class AnswerReader:
    """Turns one choice's text into deltas of OpenAI's streams. `reasoning`, `content`, `calls`: the text read so far.

    White space between a text and the calls after it belongs to neither. Owner: the answer's coroutine.
    """

    splitter: ReasoningSplitter | None
    style: ToolStyle | None  # None: no calls in this answer
    tools: Sequence[Json] = ()
    reasoning: str = ""
    content: str = ""
    calls: list[WrittenCall] = field(default_factory=list)
    _tools: ToolCallReader | None = None
    _held: str = ""
    _is_cut: bool = False  # inside of what may begin a call

    def __post_init__(self) -> None:
        self._tools = None if self.style is None else ToolCallReader(self.style.format, schemas_of(self.tools))

    def push(self, text: str) -> list[Json]:
        """Add a piece of text. Returns the deltas that are certain now."""
        reasoning, content = ("", text) if self.splitter is None else self.splitter.push(text)
        return self._taken(reasoning, content)

    def finish(self, *, is_cut: bool = False) -> list[Json]:
        """Return the remaining deltas after the end of the text. is_cut: it was to go on, so half a marker is no text.

        A call that was cut before its name began is left out.
        """
        reasoning, content = ("", "") if self.splitter is None else self.splitter.finish()
        deltas = self._taken(reasoning, content)
        if self._tools is not None:
            self._is_cut = is_cut and self._tools.is_held
            deltas += self._read(self._tools.finish(is_cut=is_cut))
        held, self._held = self._held, ""
        return deltas + (self._said(held) if held and not self.calls else [])

    @property
    def is_cut(self) -> bool:
        """True if a call of this answer is incomplete, or was left out."""
        return self._is_cut or any(not call.is_complete for call in self.calls)

    def _taken(self, reasoning: str, content: str) -> list[Json]:
        deltas: list[Json] = []
        if reasoning:
            self.reasoning += reasoning
            deltas.append({"reasoning_content": reasoning})
        if content and self._tools is not None:
            return deltas + self._read(self._tools.push(content.encode("utf-8", "replace")))
        return deltas + (self._said(content) if content else [])

    def _read(self, events: Sequence[Event]) -> list[Json]:
        deltas: list[Json] = []
        for event in events:
            if isinstance(event, str):
                text = self._held + event
                border = len(text.rstrip())
                self._held = text[border:]
                deltas += self._said(text[:border]) if border else []
            elif isinstance(event, CallStart):
                self._held = ""
                assert self.style is not None
                call = WrittenCall(self.style.new_call_id(), event.name)
                self.calls.append(call)
                function = {"name": call.name, "arguments": ""}
                deltas.append(_call_delta(event.index, id=call.id, type="function", function=function))
            elif isinstance(event, ArgumentsDelta):
                self.calls[event.index].arguments += event.text
                deltas.append(_call_delta(event.index, function={"arguments": event.text}))
            else:
                deltas += self._ended(event)
        return deltas

    def _ended(self, event: CallEnd) -> list[Json]:
        call = self.calls[event.index]
        call.is_complete = event.is_complete and _is_object(call.arguments)
        return [] if call.is_complete else [_call_delta(event.index, incomplete=True)]

    def _said(self, text: str) -> list[Json]:
        self.content += text
        return [{"content": text}]


def _call_delta(index: int, **fields: Any) -> Json:  # Any: JSON
    return {"tool_calls": [{"index": index, **fields}]}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False

"""The format of a model's tool calls, detected from its chat template.

The template renders a conversation with a call. The known format that can parse the result is the model's. If none can,
a format is derived from the result. If a template does not support tools, they are described in text.

Not here: parsing calls as their text comes (grammar/tools/events.py), OpenAI's form of calls (server/openai).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ramet.errors import InvalidGrammar, InvalidRequest
from ramet.grammar.tools.events import ArgumentsDelta, CallStart, ToolCallReader
from ramet.grammar.tools.formats import FORMATS, ToolFormat
from ramet.lang.graph.json_form import Whitespace, whitespace_named
from ramet.runtime.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

Json: TypeAlias = dict[str, Any]  # Any: JSON

_OTHER_KEY = "rametotherkey"
_NAME, _KEY, _RESULT, _CONTENT = "rametprobename", "rametprobekey", "RametProbeResult", "RametProbeContent"
_ARGUMENTS = re.compile(r'\{\s*"' + _KEY + r'"\s*:\s*1\s*\}')
_TWO_ARGUMENTS = re.compile(rf'"{_KEY}":(\s*)1,(\s*)"{_OTHER_KEY}"')
_PARAMETER = re.compile(rf"{_KEY}>\s*1\s*<")
_CALL_ID = re.compile(r',"id":"\w+"')
_USER: Json = {"role": "user", "content": "Hi"}
_TOOL: Json = {
    "type": "function",
    "function": {"name": _NAME, "description": "-", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """The form in which a model receives tools, calls them, and receives their results.

    `shows_tools`, `shows_calls`, `shows_results`: the template writes these itself; else they are written into the
    contents of messages. `max_calls`: the most calls in one answer; None: any number. `id_length`: the characters of a
    call's id; None: any number. `whitespace`: of the arguments.
    """

    format: ToolFormat
    shows_tools: bool
    shows_calls: bool
    shows_results: bool
    max_calls: int | None = None
    id_length: int | None = None
    whitespace: Whitespace = "model"

    @property
    def format_source(self) -> str | Json:
        """The format in the form of tool sets: its name if it has one, else its fields."""
        for name, known in FORMATS.items():
            if known == self.format:
                return name
        return dataclasses.asdict(self.format)

    def new_call_id(self) -> str:
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        alphabet = string.ascii_letters + string.digits
        return "".join(secrets.choice(alphabet) for _ in range(self.id_length))

    def adapt(self, messages: Sequence[Json], tools: Sequence[Json] | None) -> tuple[list[Json], list[Json] | None]:
        """Convert messages and tools to the form that this template can show."""
        adapted = [self._adapted(message) for message in messages]
        if not self.shows_results:
            adapted = _with_results_as_text(adapted)
        if not tools or self.shows_tools:
            return adapted, list(tools) if tools else None
        text = self.description(tools)
        if adapted and adapted[0]["role"] == "system":
            first = {**adapted[0], "content": f"{adapted[0]['content']}\n\n{text}".lstrip()}
            return [first, *adapted[1:]], None
        return [{"role": "system", "content": text}, *adapted], None

    def _adapted(self, message: Json) -> Json:
        calls = message.get("tool_calls")
        if self.shows_calls or not calls:
            return message
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        text = self.written([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
        plain["content"] = f"{plain['content']}\n{text}" if plain.get("content") else text
        return plain

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Return the text of calls, each (name, arguments as JSON text), as this model writes it."""
        layout = self.format
        one = (
            layout.before_name + name + layout.before_arguments + self._given(given) + layout.after_arguments
            for name, given in calls
        )
        return layout.begin + layout.separator.join(one) + layout.end

    def _given(self, arguments: str) -> str:
        """Return arguments, given as JSON text, as this model writes them."""
        layout = self.format
        if not layout.before_key:
            return arguments
        return "".join(
            f"{layout.before_key}{key}{layout.before_value}"
            f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{layout.after_value}"
            for key, value in json.loads(arguments).items()
        )

    def description(self, tools: Sequence[Json]) -> str:
        """Return a text that describes tools and how to call them, for templates that do not show tools."""
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False, separators=(",", ":")) for tool in tools)
        example = self.written([("NAME", '{"PARAMETER": "VALUE"}' if self.format.before_key else "ARGUMENTS")])
        return (
            "These functions can be called, each given with the JSON schema of its arguments:\n"
            f"<tools>\n{listed}\n</tools>\n"
            "A call is written as below, with the function's name and "
            f"{'each argument' if self.format.before_key else 'a JSON object of arguments'}:\n{example}"
        )

    def tool_set(
        self,
        tools: Sequence[Json],
        choice: str | Json,
        *,
        parallel: bool,
        answer: object,
    ) -> Json:
        """Return a tool set in JSON, whose fields grammar/tools/tool_set.py describes.

        `choice`: as there. `answer`: the JSON schema of an answer without calls; None: any text.
        """
        source: Json = {
            "tools": [
                {"name": tool["function"]["name"], "parameters": tool["function"]["parameters"]} for tool in tools
            ],
            "format": self.format_source,
            "choice": choice,
            "parallel": parallel if self.max_calls is None else self.max_calls,
        }
        return source if answer is None else {**source, "answer": answer}

    def shown_specials(self, special_tokens: Mapping[str, int]) -> dict[int, str]:
        """Return the special tokens that write parts of calls, with their spellings. They count as answer text."""
        layout = self.format
        parts = (layout.begin, layout.before_name, layout.before_arguments, layout.after_arguments, layout.end)
        text = "".join((*parts, layout.before_key, layout.before_value, layout.after_value))
        return {token: spelling for spelling, token in special_tokens.items() if spelling and spelling in text}

    def read_calls(self, answer: bytes, tools: Sequence[Json] = ()) -> dict[str, object]:
        """Parse an answer of a request with these tools.

        Returns {"text": the text without calls, "calls": [{"name": ..., "arguments": {...}}]}.
        Raises ValueError if a call is cut off, or its arguments are not a JSON object.
        """
        reader = ToolCallReader(self.format, schemas_of(tools))
        text: list[str] = []
        calls: list[dict[str, Any]] = []
        for event in [*reader.push(answer), *reader.finish()]:
            if isinstance(event, str):
                text.append(event)
            elif isinstance(event, CallStart):
                calls.append({"name": event.name, "arguments": ""})
            elif isinstance(event, ArgumentsDelta):
                calls[event.index]["arguments"] += event.text
            elif not event.is_complete:
                raise ValueError(f"the call of {calls[event.index]['name']!r} is not complete")
        for call in calls:
            arguments = json.loads(call["arguments"])
            if not isinstance(arguments, dict):
                raise ValueError(f"the arguments of {call['name']!r} are no JSON object")
            call["arguments"] = arguments
        return {"text": "".join(text).strip() if calls else "".join(text), "calls": calls}


def schemas_of(tools: Sequence[Json]) -> Json:
    """Return the schemas of the tools' arguments by name. Tools are in OpenAI's form, or as in a tool set."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters", {}) for function in functions}


def _with_results_as_text(messages: list[Json]) -> list[Json]:
    """Write tool results into user messages. Adjoining ones share a message, because roles may have to alternate."""
    out: list[Json] = []
    is_open = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if is_open:
                out[-1]["content"] += f"\n{text}"
            else:
                out.append({"role": "user", "content": text})
            is_open = True
        else:
            out.append(message)
            is_open = False
    return out


def tool_style(template: ChatTemplate) -> ToolStyle:
    """Detect from a template how its model calls tools. Renders it several times."""
    shown = _rendered(template, [_USER], tools=[_TOOL])
    shows_tools = shown is not None and _NAME in shown
    for id_length in (None, 9):
        answer = _answer(1, id_length)
        text = _rendered(template, [_USER, answer], tools=[_TOOL])
        if text is not None:
            break
    shows_calls = text is not None and _NAME in text[text.rfind("Hi") :] and _shows_arguments(text)
    two = _rendered(template, [_USER, _answer(2, id_length)], tools=[_TOOL]) if shows_calls else ""
    layout = _format_of(template, text, two) if shows_calls and text is not None else None
    if layout is None:
        layout, shows_calls, id_length, two = _format_by_family(template.source), False, None, ""
        # A template that shows tools also tells the model how to call them. Where that is not a way that is read (other
        # tags around each parameter), the tools are described in text, with the way that is.
        shows_tools = shown is not None and shows_tools and layout.marker in shown and "<function=" not in shown
    result: Json = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": _call_id(0, id_length)}
    before: Json = answer if shows_calls else {"role": "assistant", "content": _CONTENT}
    results = _rendered(template, [_USER, before, result], tools=[_TOOL])
    return ToolStyle(
        layout,
        shows_tools,
        shows_calls,
        results is not None and _RESULT in results,
        1 if two is None else None,
        id_length,
        _whitespace(template, id_length) if shows_calls else "model",
    )


def _shows_arguments(text: str) -> bool:
    return _ARGUMENTS.search(text) is not None or _PARAMETER.search(text) is not None


def _call_id(index: int, length: int | None) -> str:
    return f"call_{index}" if length is None else str(index).zfill(length)


def _whitespace(template: ChatTemplate, id_length: int | None) -> Whitespace:
    """Return the white space of the arguments that a template writes."""
    answer = _answer(1, id_length, {_KEY: 1, _OTHER_KEY: 2})
    found = _TWO_ARGUMENTS.search(_rendered(template, [_USER, answer], tools=[_TOOL]) or "")
    if found is None:
        return "model"
    after_colon, after_comma = found.groups()
    if "\n" in after_comma:
        return whitespace_named(f"indent={len(after_comma) - after_comma.rindex(chr(10)) - 1}") or "model"
    return "model" if after_colon and after_comma else "any" if after_colon or after_comma else "compact"


def _answer(num_calls: int, id_length: int | None, arguments: Json | None = None) -> Json:
    calls = [
        {
            "id": _call_id(index, id_length),
            "type": "function",
            "function": {"name": _NAME, "arguments": arguments or {_KEY: 1}},
        }
        for index in range(num_calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _rendered(
    template: ChatTemplate, messages: Sequence[Json], *, tools: Sequence[Json] | None = None, is_open: bool = False
) -> str | None:
    """Return the template's text; None if it refuses the conversation."""
    try:
        return template.render(messages, add_generation_prompt=is_open, tools=tools)
    except InvalidRequest:
        return None


def _format_of(template: ChatTemplate, text: str, two: str | None) -> ToolFormat | None:
    """Return the known format that can parse the template's text, or one derived from it; None if neither works."""
    compact = re.sub(r"\s", "", text)
    for layout in FORMATS.values():
        head = re.sub(r"\s", "", layout.begin + layout.before_name + _NAME + layout.before_arguments)
        if layout.before_key:
            one = f"{layout.before_key}{_KEY}{layout.before_value}1{layout.after_value}{layout.after_arguments}"
            if head + re.sub(r"\s", "", one) in compact:
                return _with_separator(layout, two)
            continue
        end = re.sub(r"\s", "", layout.after_arguments + layout.end)
        at = compact.rfind(head)
        if at < 0:
            continue
        rest = _ARGUMENTS.sub("", compact[at + len(head) :], count=1)
        if _CALL_ID.sub("", rest, count=1).startswith(end):
            return _as_written(layout, text)
    return _derived_format(template, text, two)


def _with_separator(layout: ToolFormat, two: str | None) -> ToolFormat:
    """Return the format with the white space that the template writes between two calls."""
    found = re.search(rf"{re.escape(layout.after_arguments)}(\s*){re.escape(layout.before_name)}", two or "")
    return layout if found is None else dataclasses.replace(layout, separator=found[1])


def _as_written(layout: ToolFormat, text: str) -> ToolFormat:
    """Return the format with the template's white space before the first call, which the model has learnt."""
    if not layout.begin:
        return layout
    begin, name = (r"\s*".join(map(re.escape, "".join(part.split()))) for part in (layout.begin, layout.before_name))
    found = re.search(rf"({begin}\s*){name}\s*{_NAME}", text)
    assert found is not None  # it was detected without white space
    return dataclasses.replace(layout, begin=found[1])


def _derived_format(template: ChatTemplate, text: str, two: str | None) -> ToolFormat | None:
    """Derive a format from one written call and from two. Its marker is the text before the first brace, or before the
    name."""
    opened = _rendered(template, [_USER], tools=[_TOOL], is_open=True)
    plain = _rendered(template, [_USER, {"role": "assistant", "content": _CONTENT}], tools=[_TOOL])
    arguments = _ARGUMENTS.search(text)
    if opened is None or plain is None or arguments is None or not text.startswith(opened) or _CONTENT not in plain:
        return None
    closing = plain[plain.rindex(_CONTENT) + len(_CONTENT) :]
    body = text[len(opened) : len(text) - len(closing)]
    if not text.endswith(closing) or _NAME not in body:
        return None
    before, after = body.split(_NAME, 1)
    arguments = _ARGUMENTS.search(after)
    if arguments is None:
        return None
    tag, end, separator = before.partition("{")[0].rstrip(), after[arguments.end() :], "\n"
    calls = list(_ARGUMENTS.finditer(two or ""))
    if two is not None and len(calls) == 2:
        between = two[calls[0].end() : two.rindex(_NAME)]
        if between.startswith(end) and between.endswith(before) and len(between) >= len(end) + len(before):
            separator = between[len(end) : len(between) - len(before)]
    try:
        return ToolFormat(
            marker=tag or before,
            before_name=before,
            before_arguments=after[: arguments.start()],
            after_arguments=end,
            separator=separator,
            is_only_at_start=not tag,
        )
    except InvalidGrammar as error:
        logger.warning("the chat template's tool calls cannot be read (%s); tools are described in text", error)
        return None


def _format_by_family(source: str) -> ToolFormat:
    """Return the format for a template without tools: that of the family's model card, or else Hermes tags."""
    if "<start_of_turn>" in source:
        return FORMATS["gemma"]
    if "<|tool_call|>" in source:
        return FORMATS["granite"]
    return FORMATS["smollm2" if "SmolLM" in source and "/think" not in source else "hermes"]  # SmolLM3 thinks

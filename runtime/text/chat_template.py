"""The model's own chat template: the text of a conversation, and the text that one message adds to it.

`render` returns the same text as transformers' `apply_chat_template`. A program, however, appends to its conversation
piece by piece: `role_text` returns the text to append when a message opens and when it closes. Some templates write an
earlier message differently once others follow it (Qwen3 drops the reasoning of earlier turns). A program's appended
text stays unchanged; the text between two messages is still right.

Templates are untrusted: they run in Jinja's sandbox, on plain JSON values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from ramet.errors import BrokenModelFile, InvalidRequest
from ramet.runtime.text.template_limits import BoundedEnvironment, TemplateTooCostly, render_bounded

Message = Mapping[str, Any]  # {"role": ..., "content": ...} and what a template reads besides, such as tool_calls
ToolSchema = Mapping[str, Any]  # {"type": "function", "function": ...} as in OpenAI's API

# For models without a template (base models). The turns are plain text; a stop string ends one.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
_PLAIN_STOPS = ("\n\n### ",)

# Stand-ins for contents while the text around them is searched. They are words, so that trimming keeps them whole.
_MARK, _NEW_MARK = "RametMarkPrevious", "RametMarkNew"


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """How a family of models marks its thinking before an answer.

    `opening`, `closing`: the marks with the white space that models write around them.
    """

    open: str
    close: str
    opening: str
    closing: str


THINK = ThinkingMarks("<think>", "</think>", "<think>\n", "</think>\n\n")  # Qwen3, QwQ, DeepSeek-R1, SmolLM3
_THINKING = (THINK, ThinkingMarks("[THINK]", "[/THINK]", "[THINK]", "[/THINK]"))  # the second: Magistral


@dataclass(frozen=True, slots=True)
class RoleText:
    """The text that a message adds to a conversation before its content and after it."""

    before: str
    after: str


class ChatTemplate:
    """A compiled template. Thread-safe.

    `stop_strings`: strings that end an assistant's turn if no token does. Only the plain default has them.
    `thinking`: how the model marks its thinking; None if the template mentions no known marks.
    """

    def __init__(
        self,
        source: str,
        *,
        special_texts: Mapping[str, str] | None = None,
        tool_source: str | None = None,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        """Compile `source`.

        `special_texts`: special tokens that the template may name, such as `bos_token`. `tool_source`: the template for
        conversations with tools, if the model has two. Raises: BrokenModelFile for a template that does not parse.
        """
        self.source = source
        self.stop_strings = stop_strings
        self.thinking = next((marks for marks in _THINKING if marks.open in source or marks.close in source), None)
        self._special_texts = {"bos_token": "", "eos_token": ""} | dict(special_texts or {})
        self._template = _compile(source)
        self._tool_template = _compile(tool_source) if tool_source is not None else self._template

    @classmethod
    def plain(cls, special_texts: Mapping[str, str] | None = None) -> ChatTemplate:
        """Return the default for a model without a template: `### User:`, a line break, the content, an empty line."""
        return cls(PLAIN_TEMPLATE, special_texts=special_texts, stop_strings=_PLAIN_STOPS)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[ToolSchema] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, with special tokens spelled out.

        `continue_final_message`: leave the last message open, to be continued. `variables`: further variables of the
        template, such as `enable_thinking`.
        Raises: InvalidRequest (param `messages`) with the template's own message if it refuses the conversation.
        """
        if not messages:
            raise InvalidRequest("messages is empty; a conversation needs at least one", param="messages")
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not continue_final_message:
            return self._render(plain, add_generation_prompt, tools, variables)
        if add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
            )
        return self._render_open(plain, tools, variables)

    def role_text(
        self,
        previous: Sequence[Message],
        role: str,
        *,
        tools: Sequence[ToolSchema] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> RoleText:
        """Return the text to append when a message of `role` opens after the messages `previous`, and when it closes.

        The assistant's opening is the generation prompt. Some templates show a message only together with the next one
        (Gemma puts the system message at the start of the first user turn); a user message is then assumed to follow.
        The content goes between the two texts unchanged, even if the template would trim it.

        Raises: InvalidRequest if the template refuses or drops such a message here, or writes the end of the last
        message differently once this one follows.
        """
        shown = [_plain_message(message, index) for index, message in enumerate(previous)]
        new = {"role": role, "content": _NEW_MARK}
        close = ""
        if shown:
            shown[-1]["content"] = _MARK
            alone = self._render(shown, False, tools, variables)
            # If it is not shown alone, nothing is appended after its content; the next opening does that.
            close = alone[alone.rindex(_MARK) + len(_MARK) :] if _MARK in alone else ""
        whole = self._render([*shown, new], False, tools, variables)
        if _NEW_MARK not in whole and role != "user":
            whole = self._render([*shown, new, {"role": "user", "content": "Hi"}], False, tools, variables)
            after = ""
        else:
            after = whole[whole.rfind(_NEW_MARK) + len(_NEW_MARK) :]
        if _NEW_MARK not in whole:
            raise InvalidRequest(f"the chat template does not show a {role} message here", param="messages")
        before = self._between(shown, close, whole[: whole.rindex(_NEW_MARK)], role)
        if role == "assistant" and shown:
            # The generation prompt may hold more than a message's opening, such as an empty block of reasoning.
            before = self._between(shown, close, self._render(shown, True, tools, variables), role) or before
        return RoleText(before, after)

    def _between(self, shown: list[dict[str, Any]], close: str, text: str, role: str) -> str:
        """Return the opening of a new message: the part of `text` after the last message of `shown` and its `close`."""
        if not shown:
            return text
        last = shown[-1]["role"]
        if _MARK not in text:
            raise InvalidRequest(f"the chat template drops a {last} message before a {role} message", param="messages")
        between = text[text.rindex(_MARK) + len(_MARK) :]
        if not between.startswith(close):
            raise InvalidRequest(
                f"the chat template ends a {last} message with {close!r} when it comes last, but writes {between!r} "
                f"between it and a {role} message: the second cannot be appended to the first",
                param="messages",
            )
        return between[len(close) :]

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[ToolSchema] | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        template = self._tool_template if tools else self._template
        values = self._special_texts | _plain(dict(variables or {}))
        try:
            return render_bounded(
                template,
                {
                    **values,
                    "messages": messages,
                    "tools": _plain(list(tools)) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except TemplateTooCostly as error:
            raise InvalidRequest(f"the model's chat template is given up: {error.message}", param="messages") from error
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise InvalidRequest(
                f"the model's chat template refuses the messages ({roles}): {error.message or error}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {error!r}", param="messages"
            ) from error

    def _render_open(
        self, messages: list[dict[str, Any]], tools: Sequence[ToolSchema] | None, variables: Mapping[str, Any] | None
    ) -> str:
        content = messages[-1].get("content")
        if not isinstance(content, str) or not content:
            raise InvalidRequest("continue_final_message is set but the last message has no text", param="messages")
        marked = [*messages[:-1], {**messages[-1], "content": content + _NEW_MARK}]
        text = self._render(marked, False, tools, variables)
        at = text.rfind(_NEW_MARK)
        if at < 0:
            raise InvalidRequest(
                "the chat template does not show the last message, so it can't be continued", param="messages"
            )
        return text[:at]


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"message {index} must be an object with a role", param="messages")
    plain: dict[str, Any] = _plain(message)
    plain["content"] = _text_content(plain.get("content"), index)
    calls = plain.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function.get("arguments"), str):  # OpenAI sends JSON text; templates write `arguments | tojson`
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise InvalidRequest(
                    f"message {index}: a tool call's arguments are no JSON: {error}", param="messages"
                ) from error
    return plain


def _text_content(content: object, index: int) -> str:
    """Return a message's content as text. None (a message with only tool calls) is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InvalidRequest(f"message {index}: the content must be text, or a list of text parts", param="messages")


def _plain(value: Any) -> Any:
    """Rebuild a value from JSON types only, so that a template can't reach an object's methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise InvalidRequest(f"a chat template gets JSON values, not a {type(value).__name__}", param="messages")


def _compile(source: str) -> jinja2.Template:
    """Compile a template with the options, filters and functions of transformers' `apply_chat_template`."""
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BrokenModelFile(f"the chat template does not parse: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks text to train on. Here it renders only its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without HTML escapes, which Jinja's own filter adds and a prompt must not contain."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

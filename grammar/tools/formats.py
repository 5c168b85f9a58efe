"""The formats in which models write tool calls, as data: the texts before, between and after names and arguments.

    begin  before_name NAME before_arguments ARGUMENTS after_arguments  (separator before_name ... )*  end

Arguments are a JSON object, or, if `before_key` is not empty, a text of this form for each one:

    before_key KEY before_value VALUE after_value

`marker` is the beginning of `begin + before_name`. Free text must not contain it: where it appears, a call begins.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ramet.errors import InvalidGrammar

NAME_PATTERN = r"[A-Za-z0-9_.:/-]{1,128}"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The texts around a call. is_only_at_start: calls stand only at the start of the answer."""

    marker: str
    before_name: str
    before_arguments: str
    after_arguments: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    is_only_at_start: bool = False
    before_key: str = ""
    before_value: str = ""
    after_value: str = ""

    def __post_init__(self) -> None:
        if not self.marker or not (self.begin + self.before_name).startswith(self.marker):
            raise InvalidGrammar(
                f"the marker {self.marker!r} must be the beginning of {self.begin + self.before_name!r}, and not empty"
            )
        if not self.before_name:
            raise InvalidGrammar("before_name must not be empty: it tells one call from the next")
        tags = (self.before_key, self.before_value.strip(), self.after_value.strip(), self.first_after_parameters)
        if any((self.before_key, self.before_value, self.after_value)) and not all(tags):
            raise InvalidGrammar("before_key, before_value, after_value and after_arguments belong together")
        follows_name = self.before_arguments.lstrip()[:1]
        if not follows_name or re.fullmatch(NAME_PATTERN, follows_name):
            raise InvalidGrammar(
                f"before_arguments is {self.before_arguments!r} but must begin with a character that no name has"
            )

    @property
    def first_after_parameters(self) -> str:
        """The beginning of `after_arguments` that tells the last argument from others: its first line."""
        return self.after_arguments.partition("\n")[0]


FORMATS: Mapping[str, ToolFormat] = {
    # NousResearch's Hermes models and Qwen 2.5 and 3: their chat templates
    "hermes": ToolFormat(
        marker="<tool_call>",
        before_name='<tool_call>\n{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}\n</tool_call>",
        separator="\n",
    ),
    # Llama 3.1 to 3.3: the JSON form of Meta's prompt format page; calls are the whole answer
    "llama3": ToolFormat(
        marker='{"name": "',
        before_name='{"name": "',
        before_arguments='", "parameters": ',
        after_arguments="}",
        separator="; ",
        is_only_at_start=True,
    ),
    # Mistral's tokenizers v3 and v7; the marker is a special token there (see `with_marker_tokens`)
    "mistral": ToolFormat(
        marker="[TOOL_CALLS]",
        begin="[TOOL_CALLS][",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        end="]",
    ),
    # Mistral's tokenizers from v11
    "mistral-v11": ToolFormat(
        marker="[TOOL_CALLS]",
        before_name="[TOOL_CALLS]",
        before_arguments="[ARGS]",
        after_arguments="",
    ),
    # the function calling prompt of SmolLM2's model card: one list of calls between tags
    "smollm2": ToolFormat(
        marker="<tool_call>",
        begin="<tool_call>[",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        end="]</tool_call>",
    ),
    # Granite 3.0 to 3.3: their chat templates ask for a list of calls after this token
    "granite": ToolFormat(
        marker="<|tool_call|>",
        begin="<|tool_call|>[",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        end="]",
    ),
    # Qwen3-Coder and Qwen3.5: their chat templates; a tag for each argument
    "qwen3-coder": ToolFormat(
        marker="<tool_call>",
        before_name="<tool_call>\n<function=",
        before_arguments=">\n",
        after_arguments="</function>\n</tool_call>",
        separator="\n",
        before_key="<parameter=",
        before_value=">\n",
        after_value="\n</parameter>\n",
    ),
    # Seed-OSS: its chat template
    "seed-oss": ToolFormat(
        marker="<seed:tool_call>",
        before_name="<seed:tool_call>\n<function=",
        before_arguments=">\n",
        after_arguments="</function>\n</seed:tool_call>",
        before_key="<parameter=",
        before_value=">",
        after_value="</parameter>\n",
    ),
    # Google's prompt for function calling with Gemma 3: a JSON object as the whole answer
    "gemma": ToolFormat(
        marker='{"name": "',
        before_name='{"name": "',
        before_arguments='", "parameters": ',
        after_arguments="}",
        separator="\n",
        is_only_at_start=True,
    ),
}


def checked_fields(source: Any, what: str, known: Collection[str]) -> Mapping[str, Any]:  # Any: JSON
    """Return an object of JSON whose fields are all known. Raises InvalidGrammar, which says what it should be."""
    if not isinstance(source, Mapping):
        raise InvalidGrammar(f"{what} must be an object, not {source!r}")
    wrong = sorted(set(source) - {*known}, key=str)
    if wrong:
        raise InvalidGrammar(f"{what} has no field {wrong[0]!r}; its fields are {', '.join(sorted(known))}")
    return source


def tool_format(source: str | Mapping[str, Any] | ToolFormat) -> ToolFormat:
    """Return a format, given by its name, by its fields, or as a ToolFormat.

    Raises: InvalidGrammar.
    """
    if isinstance(source, ToolFormat):
        return source
    if isinstance(source, str):
        if source not in FORMATS:
            raise InvalidGrammar(f"there is no tool format {source!r}; formats are {', '.join(FORMATS)}")
        return FORMATS[source]
    source = checked_fields(source, "a tool format", [f.name for f in fields(ToolFormat)])
    for name, value in source.items():
        if not isinstance(value, bool if name == "is_only_at_start" else str):
            raise InvalidGrammar(f"the field {name!r} of a tool format is {value!r}, of type {type(value).__name__}")
    try:
        return ToolFormat(**source)
    except TypeError as error:
        raise InvalidGrammar(f"the tool format lacks a field: {error}") from error

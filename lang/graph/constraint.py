"""The constraint of a generation, as it travels with the graph and in requests. grammar/service compiles it."""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

import msgspec

from ramet.errors import InvalidRequest
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm

Tokenization: TypeAlias = Literal["canonical", "any"]

INT = r"-?(?:0|[1-9][0-9]{0,14})"
FLOAT = INT + r"(?:\.[0-9]{1,15})?"
_LONGEST = {INT: 1 + 15, FLOAT: 1 + 15 + 1 + 15}


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The language that a generated text must match. `source`: a pattern, a Lark grammar, a text, or canonical JSON.

    A `grammar` is composed of others, as JSON (grammar/tools/composed.py).
    A set of tools (grammar/tools/tool_set.py) without a `format` uses the format of the model's chat template.
    `tokenization`: of text that the constraint forces: as the tokenizer splits it, or in any tokens.
    `form`: of the JSON in the text; the field `json` of a set of tools comes first.

    Raises: InvalidRequest if the text has no JSON, but a form.
    """

    kind: Literal["json_schema", "regex", "cfg", "choice", "substring", "tools", "structural_tag", "grammar"]
    source: str
    tokenization: Tokenization = "canonical"
    form: JsonForm = AS_CONFIGURED

    def __post_init__(self) -> None:
        if self.form != AS_CONFIGURED and self.kind not in ("json_schema", "tools", "structural_tag", "grammar"):
            name = next(iter(self.form.said()))
            raise InvalidRequest(f"{name} is of JSON, but a {self.kind} has none; leave it out", param=name)

    def longest(self) -> int | None:
        """Return the number of bytes of the longest text: of choices, and of numbers. None: it is not known."""
        if self.kind == "choice":
            return max(len(str(text).encode()) for text in json.loads(self.source))
        return _LONGEST.get(self.source) if self.kind == "regex" else None

"""The constraint of a generation, as it travels with the graph and in requests. grammar/service compiles it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Tokenization: TypeAlias = Literal["canonical", "any"]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The language that a generated text must match. `source`: a pattern, a Lark grammar, a text, or canonical JSON.

    A `grammar` is composed of others, as JSON (grammar/tools/composed.py).
    A set of tools (grammar/tools/tool_set.py) without a `format` uses the format of the model's chat template.
    `in_order`: the properties of a JSON schema come in the schema's order, and only named properties are allowed.
    `tokenization`: of text that the constraint forces: as the tokenizer splits it, or in any tokens.
    """

    kind: Literal["json_schema", "regex", "cfg", "choice", "substring", "tools", "structural_tag", "grammar"]
    source: str
    in_order: bool = False
    tokenization: Tokenization = "canonical"

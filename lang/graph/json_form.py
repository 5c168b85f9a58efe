"""The form of JSON that a schema leaves open: its white space, the order of properties, and properties without a name.

Not here: what each value means for an automaton (grammar/ir.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from ramet.errors import InvalidRequest
from ramet.grammar.ir import AdditionalProperties as AdditionalProperties
from ramet.grammar.ir import Order as Order
from ramet.grammar.ir import Whitespace as Whitespace

KNOWN: Mapping[str, tuple[str, ...]] = {
    "whitespace": get_args(Whitespace),
    "order": get_args(Order),
    "additional_properties": get_args(AdditionalProperties),
}
# What other servers' patterns of the white space between two tokens come to here: what it writes fits the pattern.
_PATTERNS: Mapping[str, Whitespace] = {
    "": "compact",
    **dict.fromkeys(("[ ]?", " ?", "[ ]{0,1}", r"\s?", r"[\s]?", "[ ]*", " *"), "model"),
    **dict.fromkeys((r"\s*", r"[\s]*", r"[\n\t ]*", r"[ \n\t]*", r"[ \t\n]*", r"[ \n\r\t]*", r"[ \t\n\r]*"), "any"),
    **dict.fromkeys(("[\n\t ]*", "[ \n\t]*", "[ \t\n]*"), "any"),
}


class JsonForm(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How JSON is written where a schema leaves it open. None: as the runtime is configured.

    whitespace: "model", one space after each comma and colon, as `json.dumps` writes; "compact", none; "indent=2" (0 to
    8), lines as `json.dumps` writes them; "any", whatever JSON allows, within bounds.
    order: of properties; "declared", as the schema names them; "any".
    additional_properties: "closed", an object whose schema has `properties` and says nothing of others has no others;
    "schema", it may have any others, as the letter of the schema says.
    """

    whitespace: Whitespace | None = None
    order: Order | None = None
    additional_properties: AdditionalProperties | None = None

    def said(self) -> dict[str, Any]:  # Any: each field has its own type
        """Return the fields that are set."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}

    def filled(self, other: JsonForm) -> JsonForm:
        """Return the form with another's values where this one has none."""
        return JsonForm(**{**other.said(), **self.said()})


AS_CONFIGURED = JsonForm()


def json_form(**given: object) -> JsonForm:
    """Make a form of values that a user gave. Raises InvalidRequest for an unknown value."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, str) or value not in KNOWN[name]):
            known = ", ".join(f'"{one}"' for one in KNOWN[name])
            raise InvalidRequest(f"{name} is {value!r}, but must be one of {known}", param=name)
    return msgspec.convert(given, JsonForm)


def whitespace_named(text: str) -> Whitespace | None:
    """Return the white space that is meant by its name, or by a pattern of the white space between two tokens.

    Other servers take such patterns: `[ ]?`, `\\s*`. None: another pattern.
    """
    known: Whitespace
    for known in get_args(Whitespace):
        if text == known:
            return known
    return _PATTERNS.get(text)

"""Structural tags: free text in which certain marks begin a JSON value of a schema.

As JSON, in the form of SGLang and vLLM:

    {"type": "structural_tag",
     "triggers": ["<function="],
     "structures": [{"begin": "<function=add>", "schema": {...}, "end": "</function>"}]}

or in XGrammar's newer form, of which triggered tags with JSON schemas are understood:

    {"type": "structural_tag",
     "format": {"type": "triggered_tags", "triggers": [...], "at_least_one": false, "stop_after_first": false,
                "tags": [{"begin": ..., "content": {"type": "json_schema", "json_schema": {...}}, "end": ...}]}}

The language: text without triggers, then a trigger and the rest of one of the structures whose `begin` starts with it,
then again text without triggers, and so on.
Source: the semantics are those of XGrammar's documentation of structural tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.regular.utf8 import text_dfa, utf8_table
from ramet.grammar.tools.formats import checked_fields
from ramet.grammar.tools.text_with_values import Gap, TextBuilder, TextWithValues

MAX_TAGS = 1024
MAX_TRIGGERS = 64
_FIRST_SURROGATE = 0xD800  # surrogates, which are in no text, stand for what follows a trigger


_Tag = tuple[str, ir.JsonSchema, str]  # what stands before a value, its schema, what stands after it


def structural_text(source: Any, options: ir.JsonOptions | None = None) -> TextWithValues:  # Any: JSON
    """Return the texts that a structural tag allows, in either form. options: of all its schemas.

    Raises: InvalidGrammar naming the error, also if two tags have the same beginning.
    """
    fields, tags = _read(source)
    triggers, switches = _checked(fields, tags)
    at_least_one, stop_after_first = switches
    made = [(begin, ir.JsonSchema(schema, options or ir.JsonOptions()), end) for begin, schema, end in tags]
    rows, accepting, marked = _free_text(triggers)
    builder = TextBuilder()
    first = builder.add(rows, accepting & (not at_least_one))
    if stop_after_first:
        later = builder.new(is_end=True)
    elif at_least_one:
        later = builder.add(rows, accepting)
    else:
        later = first
    for start in {first} if stop_after_first else {first, later}:
        for trigger, state in zip(triggers, marked, strict=True):
            for tag in made:
                if tag[0].startswith(trigger):
                    _add_tag(builder, builder.spell(start + state, tag[0][len(trigger) :]), tag, later)
    if builder.is_ambiguous:
        raise InvalidGrammar("the beginning of one tag begins another; end them apart, as in `<a>` and `<ab>`")
    return builder.build(often=triggers[0])


def _read(source: Any) -> tuple[Mapping[str, Any], list[tuple[Any, Any, Any]]]:
    """Return the fields that say which parts may stand where, and the begin, schema and end of each part."""
    fields = checked_fields(source, "a structural tag", {"type", "triggers", "structures", "format"})
    if fields.get("type", "structural_tag") != "structural_tag":
        raise InvalidGrammar(f"the type of a structural tag is 'structural_tag', not {fields['type']!r}")
    if "format" in fields:
        return _of_format(fields["format"])
    tags = [
        checked_fields(tag, f"structures[{i}]", {"begin", "schema", "end"})
        for i, tag in enumerate(_list(fields, "structures"))
    ]
    return fields, [(tag.get("begin"), tag.get("schema"), tag.get("end")) for tag in tags]


def _of_format(source: Any) -> tuple[Mapping[str, Any], list[tuple[Any, Any, Any]]]:
    if not isinstance(source, Mapping) or source.get("type") != "triggered_tags":
        kind = source.get("type") if isinstance(source, Mapping) else source
        raise InvalidGrammar(f"the format of a structural tag must be of type 'triggered_tags' here, not {kind!r}")
    known = {"type", "triggers", "tags", "at_least_one", "stop_after_first"}
    fields = checked_fields(source, "the format of a structural tag", known)
    tags = []
    for i, given in enumerate(_list(fields, "tags")):
        tag = checked_fields(given, f"tags[{i}]", {"type", "begin", "content", "end"})
        content = tag.get("content")
        if not isinstance(content, Mapping) or content.get("type") != "json_schema":
            raise InvalidGrammar(f"the content of tags[{i}] must be of type 'json_schema' here, not {content!r}")
        tags.append(
            (
                tag.get("begin"),
                checked_fields(content, "a content", {"type", "json_schema"}).get("json_schema"),
                tag.get("end"),
            )
        )
    return fields, tags


def _checked(fields: Mapping[str, Any], tags: Sequence[tuple[Any, Any, Any]]) -> tuple[list[str], list[bool]]:
    """Return the triggers, and whether one part must come, and the first one ends the text.

    Raises: InvalidGrammar for wrong tags or triggers.
    """
    triggers = _list(fields, "triggers")
    if not 1 <= len(triggers) <= MAX_TRIGGERS or not 1 <= len(tags) <= MAX_TAGS:
        raise InvalidGrammar(
            f"there are {len(triggers):,} triggers and {len(tags):,} tags; "
            f"1 to {MAX_TRIGGERS} triggers and 1 to {MAX_TAGS:,} tags are possible"
        )
    for begin, schema, end in tags:
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict | bool):
            raise InvalidGrammar("a tag has the texts `begin` and `end`, and a JSON schema between them")
        if not any(isinstance(trigger, str) and begin.startswith(trigger) for trigger in triggers):
            raise InvalidGrammar(f"no trigger is the beginning of {begin!r}")
    for trigger in triggers:
        if not isinstance(trigger, str) or not trigger or not any(begin.startswith(trigger) for begin, _, _ in tags):
            raise InvalidGrammar(f"the trigger {trigger!r} begins no tag")
    for one, other in permutations(triggers, 2):
        if one in other:
            raise InvalidGrammar(f"the trigger {one!r} is part of the trigger {other!r}")
    switches = [fields.get(name, False) for name in ("at_least_one", "stop_after_first")]
    if not all(isinstance(value, bool) for value in switches):
        raise InvalidGrammar("at_least_one and stop_after_first are true or false")
    return triggers, switches


def _add_tag(builder: TextBuilder, state: int, tag: _Tag, later: int) -> None:
    """Add the value of a tag, which begins in `state`, and the tag's end, which leads to the state `later`."""
    begin, schema, end = tag
    if state in builder.gaps:
        raise InvalidGrammar(f"two tags begin with {begin!r}")
    after = later
    if end:
        after = builder.new()
        builder.lead(after, end, later)
    builder.put(state, Gap(schema, after))


def _free_text(triggers: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]]:
    """Return the automaton of text that ends with its first trigger, or has none.

    Returns (transitions, accepting, state after each trigger).
    """
    any_trigger = ir.Choice(tuple(ir.text(trigger) for trigger in triggers))
    free = ir.Complement(ir.Concatenation((ir.ANY_TEXT, any_trigger, ir.ANY_TEXT)))
    later = ir.Complement(ir.Concatenation((ir.ANY_TEXT, any_trigger, ir.ANY_CHAR, ir.ANY_TEXT)))
    ways: list[ir.Node] = [free]
    for index, trigger in enumerate(triggers):
        before = ir.Intersect((ir.Concatenation((ir.ANY_TEXT, ir.text(trigger))), later))
        mark = _FIRST_SURROGATE + index
        ways.append(ir.Concatenation((before, ir.Chars(((mark, mark),)))))
    dfa = text_dfa(ir.Choice(tuple(ways)), name="free text")
    table = utf8_table(dfa)
    marked = [
        next(s for s in range(len(dfa.transitions)) if dfa.step(s, _FIRST_SURROGATE + index) >= 0)
        for index in range(len(triggers))
    ]
    return table.transitions, table.accepting, marked


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:  # Any: JSON
    value = fields.get(name)
    if not isinstance(value, list):
        raise InvalidGrammar(f"the field {name!r} must be a list, not {value!r}")
    return value

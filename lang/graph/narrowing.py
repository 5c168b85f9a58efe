"""Checks that become masks: a constraint, narrowed to the values that pass the checks of a generation.

A check is *masked* if the texts whose values pass it are a regular language, or the values of a JSON schema. Then the
model can't write a value that fails. The other checks are *retried*: the value is generated again if it fails. All
checks are made of the finished value in any case, because a value may be cut off before it is complete.

Not here: compiling the narrowed constraint (grammar/tools/composed.py), checks in Python.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from ramet.lang.graph.checks import Check
from ramet.lang.graph.constraint import Constraint

MAX_STATES = 10_000  # an estimate of the states of all masked checks together; the checks past it are retried

Json: TypeAlias = Any  # JSON: a node of a composed grammar, or a JSON schema

_SPACE = r"\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # where str.split() splits
_BREAK = r"\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029"  # where str.splitlines() splits, besides \r
_JSON_TYPES = frozenset(("null", "boolean", "number", "string", "array", "object"))
_WITH_LENGTH = frozenset(("string", "array", "object"))
_REGULAR = {"regex": "regex", "choice": "choices", "substring": "substring_of"}  # kinds of constraints -> fields


@dataclass(frozen=True, slots=True)
class Narrowing:
    """`constraint`: the constraint with the masked checks; that of the node if no check is masked."""

    constraint: Constraint | None
    masked: tuple[Check, ...] = ()
    retried: tuple[Check, ...] = ()


def narrowing(
    constraint: Constraint | None, checks: tuple[Check, ...], type: str, stop: tuple[str, ...] = ()
) -> Narrowing:
    """Return which checks of a generation are masked and which are retried, and its narrowed constraint.

    `type`: how the text becomes a JSON value (ir.Generate). `stop`: the stop strings, which cut the text off.
    """
    if not checks:
        return Narrowing(constraint)
    if constraint is not None and not _is_readable(constraint):
        return Narrowing(constraint, (), checks)  # compiling it says what is wrong
    lower = _lowering(constraint, type)
    masked, lowered, retried, states = list[Check](), list[Json](), list[Check](), 1
    for check in checks:
        found = None if lower is None else lower(check)
        size = states * _num_states(check)
        if found is None or size > MAX_STATES:
            retried.append(check)
        else:
            masked.append(check)
            lowered.append(found)
            states = size
    if not masked:
        return Narrowing(constraint, (), tuple(retried))
    return Narrowing(_narrowed(constraint, lowered, stop if type == "str" else ()), tuple(masked), tuple(retried))


def _is_readable(constraint: Constraint) -> bool:
    """Return whether the source of a constraint has the form that its kind asks for, as far as it matters here."""
    if constraint.kind not in ("json_schema", "choice"):
        return True
    try:
        source = json.loads(constraint.source)
    except (ValueError, RecursionError):
        return False
    if constraint.kind == "choice":
        return isinstance(source, list)
    return isinstance(source, bool) or (isinstance(source, dict) and isinstance(source.get("allOf", []), list))


def _lowering(constraint: Constraint | None, type: str) -> Callable[[Check], Json | None] | None:
    """Return the function that turns a check into a part of the constraint, or into None if it is to be retried."""
    if constraint is not None and constraint.kind == "json_schema":
        types = _types(json.loads(constraint.source)) if type == "json" else frozenset()
        return (lambda check: _keywords(check, types)) if types else None
    if constraint is not None and constraint.kind not in _REGULAR:
        return None
    if type == "str":
        return _text
    return _number if type in ("int", "float") else None


def _narrowed(given: Constraint | None, lowered: Sequence[Json], stop: tuple[str, ...]) -> Constraint:
    if given is not None and given.kind == "json_schema":
        schema = json.loads(given.source)
        schema = dict(schema) if isinstance(schema, Mapping) else {"not": {}} if schema is False else {}
        own = [{"$ref": schema.pop("$ref")}] if "$ref" in schema else []  # drafts up to 7 ignore what stands beside it
        schema["allOf"] = [*schema.get("allOf", ()), *own, *lowered]
        return msgspec.structs.replace(given, source=json.dumps(schema, ensure_ascii=False))
    parts = list(lowered)
    if given is not None:
        source = json.loads(given.source) if given.kind == "choice" else given.source
        parts.insert(0, {_REGULAR[given.kind]: source})
    whole: Json = {"all": parts} if len(parts) > 1 else parts[0]
    if given is None and stop:
        whole = {"until": list(stop), "of": whole}
    whole_source = json.dumps(whole, ensure_ascii=False)
    return Constraint("grammar", whole_source, tokenization="canonical" if given is None else given.tokenization)


def _num_states(check: Check) -> int:
    """Return an estimate of the states of a check's automaton."""
    if check.of:
        return math.prod(map(_num_states, check.of))
    if check.kind == "length":
        return int(check.at_most if check.at_most is not None else check.at_least or 0) + 2
    return 2  # the states of texts add up rather than multiply


# Text.


def _text(check: Check) -> Json | None:
    """Return the texts that pass a check, as a node of a composed grammar."""
    if check.of:
        parts = [_text(one) for one in check.of]
        if any(part is None for part in parts):
            return None
        if check.kind == "not":
            return {"not": parts[0]}
        return {"all" if check.kind == "all" else "select": parts}
    if check.kind == "in":
        return {"select": [one for one in check.values if isinstance(one, str)]}
    if check.kind == "between":
        return {"select": []}  # text is no number
    if check.kind == "length":
        low, high = _limits(check)
        return {"regex": _length(check)} if high is None or high >= low else {"select": []}
    return {"regex": _pattern(check)}


def _pattern(check: Check) -> str:
    texts = "|".join(map(re.escape, check.values))
    begin = "" if check.kind == "starts_with" else "(?s:.)*"
    return f"{begin}(?:{texts})" + ("" if check.kind == "ends_with" else "(?s:.)*")


def _length(check: Check) -> str:
    """Return the pattern of the texts of this length."""
    low, high = _limits(check)
    if check.unit == "characters":
        return f"(?s:.){_count(low, high)}"
    if check.unit == "words":
        words = f"[^{_SPACE}]+(?:[{_SPACE}]+[^{_SPACE}]+){_count(low - 1, _less(high))}"
        if high == 0:
            words = ""
        return f"[{_SPACE}]*" + (words if low or not words else f"(?:{words})?") + f"[{_SPACE}]*"
    inside, end = rf"[^\r{_BREAK}]", rf"(?:\r\n|\r(?!\n)|[{_BREAK}])"
    whole = f"(?:{inside}*{end}){_count(low, high)}"
    if high == 0:
        return whole
    return f"{whole}|(?:{inside}*{end}){_count(low - 1, _less(high))}{inside}+"


def _limits(check: Check) -> tuple[int, int | None]:
    low = max(0, math.ceil(check.at_least or 0))
    return low, None if check.at_most is None else math.floor(check.at_most)


def _less(high: int | None) -> int | None:
    return None if high is None else high - 1


def _count(low: int, high: int | None) -> str:
    return f"{{{max(low, 0)},{'' if high is None else max(high, 0)}}}"


# Numbers that are written as text.


def _number(check: Check) -> Json | None:
    """Return the texts of numbers that pass a check."""
    if check.kind in ("all", "any"):
        parts = [_number(one) for one in check.of]
        return None if any(part is None for part in parts) else {"all" if check.kind == "all" else "select": parts}
    if check.kind == "not":
        part = _number(check.of[0])
        return None if part is None else {"all": [{"number": {}}, {"not": part}]}
    if check.kind == "between":
        return _range(check.at_least, check.at_most)
    if check.kind == "in":
        return {"select": [_range(one, one) for one in check.values if _is_number(one)]}
    return None  # the check looks at the number as JSON writes it


def _range(low: float | None, high: float | None) -> Json:
    limits = {"minimum": low, "maximum": high}
    return {"number": {name: limit for name, limit in limits.items() if limit is not None}}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# JSON values.


def _keywords(check: Check, types: frozenset[str]) -> Json | None:
    """Return the JSON schema of the values that pass a check, among values of these types."""
    if check.of:
        parts = [_keywords(one, types) for one in check.of]
        if any(part is None for part in parts):
            return None
        return {"not": parts[0]} if check.kind == "not" else {f"{check.kind}Of": parts}
    if check.kind == "in":
        return {"enum": list(check.values)}
    if check.kind == "between":
        limits = {"type": "number", "minimum": check.at_least, "maximum": check.at_most}
        return {name: limit for name, limit in limits.items() if limit is not None}
    if check.kind == "length":
        return _json_length(check, types)
    return {"pattern": f"^(?:{_json_pattern(_pattern(check))})$"} if types == {"string"} else None


def _json_length(check: Check, types: frozenset[str]) -> Json | None:
    if not types <= _WITH_LENGTH:
        return None  # the length of a number is that of its text
    low, high = _limits(check)
    if high is not None and high < low:
        return {"not": {}}
    limits = {"min": low or None, "max": high}
    units = {"array": "Items", "object": "Properties", "string": "Length"}
    names = [units[kind] for kind in sorted(types) if kind != "string" or check.unit == "characters"]
    found: dict[str, Json] = {f"{end}{n}": v for end, v in limits.items() for n in names if v is not None}
    if "string" in types and check.unit != "characters":
        found["pattern"] = f"^(?:{_json_pattern(_length(check))})$"
    return found


def _json_pattern(pattern: str) -> str:
    r"""Return a pattern of Python in the dialect of JSON schemas, for what `_length` and `_pattern` write."""
    pattern = re.sub(r"\\x([0-9a-f]{2})", r"\\u00\1", pattern.replace("(?s:.)", r"[\s\S]"))
    return re.sub(r"\\([^\w\\^$.*+?()\[\]{}|/\s-])", r"\1", pattern).replace("\\\n", "\\n").replace("\\ ", " ")


def _types(schema: Json) -> frozenset[str]:
    """Return the JSON types that values of the schema may have; all of them if that is not seen at once."""
    root = schema

    def of(part: Json, depth: int) -> frozenset[str]:
        if not isinstance(part, Mapping) or depth > 20:
            return _JSON_TYPES
        found = _JSON_TYPES
        if "type" in part:
            named = part["type"] if isinstance(part["type"], list) else [part["type"]]
            found &= {"number" if one == "integer" else str(one) for one in named}
        if isinstance(part.get("$ref"), str):
            found &= of(_target(root, part["$ref"]), depth + 1)
        for name in ("anyOf", "oneOf"):
            if isinstance(part.get(name), list):
                found &= frozenset().union(*(of(one, depth + 1) for one in part[name]))
        if isinstance(part.get("enum"), list):
            found &= {_type_of(one) for one in part["enum"]}
        return found & {_type_of(part["const"])} if "const" in part else found

    return of(schema, 0)


def _target(root: Json, ref: str) -> Json:
    """Return the part of a schema that a reference names; True, the schema of all values, if it can't be followed."""
    if not ref.startswith("#/"):
        return True
    part = root
    for step in ref[2:].split("/"):
        part = part.get(step.replace("~1", "/").replace("~0", "~"), True) if isinstance(part, Mapping) else True
    return part


def _type_of(value: Json) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {"str": "string", "list": "array", "dict": "object", "NoneType": "null"}
    return names.get(type(value).__name__, "number")

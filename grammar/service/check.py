"""For people who write schemas and grammars: what a constraint enforces, and where and why it refuses a text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from ramet.errors import UnsupportedSchema
from ramet.grammar.ir import JsonOptions
from ramet.grammar.json_schema.keywords.interpreter import Interpreter, hides_others
from ramet.grammar.json_schema.keywords.narrowing import says_others
from ramet.grammar.json_schema.keywords.schema_errors import survey
from ramet.grammar.json_schema.keywords.table import KEYWORDS
from ramet.grammar.json_schema.schema import formats
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.vocabulary import Vocabulary

_MAX_SHOWN = 12  # of what may follow in a place
_MAX_FORCED = 40  # bytes of a text that is forced


@dataclass(frozen=True, slots=True)
class Coverage:
    """The effect of each keyword of a JSON schema. Places are JSON pointers.

    enforced: keyword -> number of places. problems: (pointer, keyword, reason) of keywords that cannot be enforced.
    annotations: (pointer, keyword) of keywords that say nothing about values.
    unknown: keywords of no specification, or of a later one.
    hidden: keywords beside a $ref, which drafts up to 7 ignore.
    unknown_formats: (pointer, format); the specification treats these as annotations.
    closed: schemas with `properties` that say nothing of other ones, if these are left out for that reason.
    """

    enforced: dict[str, int]
    problems: list[tuple[str, str, str]]
    annotations: list[tuple[str, str]]
    unknown: list[tuple[str, str]]
    unknown_formats: list[tuple[str, str]]
    hidden: list[tuple[str, str]]
    closed: list[str]


def coverage(schema: Any, options: JsonOptions | None = None) -> Coverage:
    """Look at every subschema that can matter.

    Raises: InvalidSchema if it is not a schema.
    """
    options = options or JsonOptions()
    interpreter = Interpreter(KEYWORDS, 20_000, closes_objects=options.additional_properties == "closed")
    root = interpreter.open(schema, options.registry)
    problems: list[tuple[str, str, str]] = []
    try:
        survey(interpreter, root)
    except UnsupportedSchema as error:
        problems = error.problems
    enforced: Counter[str] = Counter()
    annotations: list[tuple[str, str]] = []
    unknown: list[tuple[str, str]] = []
    unknown_formats: list[tuple[str, str]] = []
    hidden: list[tuple[str, str]] = []
    closed: list[str] = []
    refused = {(pointer, keyword) for pointer, keyword, _ in problems}
    for node in root.registry.nodes:
        if not isinstance(node.schema, dict):
            continue
        if interpreter.closes_objects and says_others(node.schema) is False:
            closed.append(node.pointer or "/")
        for name, value in node.schema.items():
            place = (node.pointer or "/", name)
            keyword = KEYWORDS.rows.get(name)
            if keyword is None or not keyword.is_known(node.draft):
                unknown.append(place)
            elif keyword.role == "annotation":
                annotations.append(place)
            elif keyword.role == "structure":
                continue
            elif name != "$ref" and hides_others(node):
                hidden.append(place)
            elif name == "format" and not (isinstance(value, str) and value in formats.KNOWN):
                unknown_formats.append((node.pointer or "/", str(value)))
            else:
                enforced[name] += (node.pointer, name) not in refused
    return Coverage(dict(+enforced), problems, annotations, unknown, unknown_formats, hidden, closed)


@cache
def byte_vocabulary() -> Vocabulary:
    """Return a vocabulary with one token for each byte, and an end token."""
    return Vocabulary([*(bytes((b,)) for b in range(256)), b""], [256], [256])


@dataclass(frozen=True, slots=True)
class Walk:
    """How much of a text is accepted: `num_bytes` bytes. `allowed` describes what may follow them instead.

    The text is in the language if all its bytes were accepted and `may_end`.
    """

    text: bytes
    num_bytes: int
    may_end: bool
    allowed: list[str]

    @property
    def is_accepted(self) -> bool:
        return self.num_bytes == len(self.text) and self.may_end


def walk(grammar: CompiledGrammar, text: str) -> Walk:
    """Follow a text byte by byte. `grammar` must be compiled for `byte_vocabulary()`."""
    data = text.encode()
    state, at = 0, 0
    while at < len(data):
        following = grammar.advance(state, data[at])
        if following is None:
            break
        state, at = following, at + 1
    # a caret points at characters: go back to the first byte of the refused one
    begin = at
    while 0 < begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin -= 1
    if begin < at:
        back = grammar.advance_bytes(0, data[:begin])
        assert back is not None
        state, at = back, begin
    return Walk(data, at, grammar.is_accepting(state), continuations(grammar, state))


def continuations(grammar: CompiledGrammar, state: int) -> list[str]:
    """Describe what may follow: sets of characters that lead to the same place, each with the text that it forces."""
    eos = set(grammar.vocabulary.eos_ids)
    groups: dict[int, list[int]] = {}
    for token in grammar.allowed_tokens(state).tolist():
        if token not in eos:
            following = grammar.advance(state, token)
            assert following is not None
            groups.setdefault(-1 if token >= 0x80 else following, []).append(token)
    out = []
    for following, tokens in groups.items():
        if following == -1:
            out.append("non-ASCII characters")
        elif len(tokens) == 1:
            out.append(repr((bytes(tokens) + _forced(grammar, following)).decode("utf-8", "replace")))
        else:
            out.append(_ranges(tokens))
    if len(out) > _MAX_SHOWN:
        out = [*out[: _MAX_SHOWN - 1], f"and {len(out) - _MAX_SHOWN + 1} more"]
    if grammar.is_accepting(state):
        out.append("the end of the text")
    return out


def _forced(grammar: CompiledGrammar, state: int) -> bytes:
    out = bytearray()
    while len(out) < _MAX_FORCED and not grammar.is_accepting(state):
        allowed = grammar.allowed_tokens(state).tolist()
        if len(allowed) != 1:
            break
        out.append(allowed[0])
        following = grammar.advance(state, allowed[0])
        assert following is not None
        state = following
    return bytes(out)


def _ranges(tokens: list[int]) -> str:
    """Return ascending ASCII codes as ranges, such as `[0-9 a-f]`."""
    spans: list[list[int]] = []
    for token in tokens:
        if spans and token == spans[-1][1] + 1:
            spans[-1][1] = token
        else:
            spans.append([token, token])
    return "[" + " ".join(_name(a) if a == b else f"{_name(a)}-{_name(b)}" for a, b in spans) + "]"


def _name(code: int) -> str:
    return chr(code) if 0x20 < code < 0x7F else f"\\x{code:02x}"

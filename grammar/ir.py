"""The intermediate grammar: the common form of all sources (regex, Lark, choices, tools, JSON schema).

A grammar is `NamedRules`: named rules, and the start rule. A rule's body is a `Node`. A grammar describes a language,
which is a set of byte strings.

    Bytes(b"...")                      exactly these bytes (they need not be UTF-8)
    Chars(((97, 122), (48, 57)))       one code point from inclusive ranges, as UTF-8
    Concatenation((a, b, ...))         all parts in order; Concatenation(()) is the empty string
    Choice((a, b, ...))                any of them, no order and no priority; Choice(()) is the empty language
    Repeat(a, low, high | None)        low to high times; None: any number
    Lookahead(a, is_negative)          the rest of the surrounding Terminal must (not) start with a; no width
    Lookbehind(ranges, at_start)       the character before must be in ranges (regular/lookbehind.py removes it)
    Intersect((a, b)), Complement(a)   of regular languages, inside a Terminal; the complement is within all UTF-8 text
    Terminal(a, name)                  `a` is regular (no Reference to a recursive rule): made into one small automaton
    Table(rows, byte_class, accepting)  a deterministic byte automaton, all of whose states are known
    Reference("rule")                  another rule; recursion of any kind is allowed, left recursion included
    JsonSchema(schema, options)        the JSON texts of the values that a JSON schema accepts
    Named(a, name)                     the texts of `a`; what it reads is kept under this name (tools/captures.py)

Guarantees to a source: every node is allowed everywhere (except Lookahead, which must be inside a Terminal, or in a
grammar that is regular as a whole; and Named, which only composed grammars have). Ambiguity is harmless, because only
membership counts. Parts from which no text can be finished are removed, so that a mask never leads to a dead end. A
part without recursion becomes one table, which is fast. Recursion runs on a stack of configurations, which grows as it
is visited.

A regular expression is a Terminal; priorities and greediness do not exist here. The source must write Lark's `%ignore`
into the rules. `NamedRules.of(node)` wraps a grammar without named rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ramet.errors import InvalidGrammar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_CODE_POINT = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points, ascending, not touching each other."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Exactly these bytes."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Chars:
    """One code point from `ranges`, as UTF-8. Surrogates (D800-DFFF) have no UTF-8 form and never match."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concatenation:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item` from `low` to `high` times (None: no upper bound)."""

    item: Node
    low: int = 0
    high: int | None = None

    def __post_init__(self) -> None:
        assert self.low >= 0, self.low
        assert self.high is None or self.high >= self.low, (self.low, self.high)


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A condition without width: the text up to the end of the Terminal must (or must not) start with `item`."""

    item: Node
    is_negative: bool = False


@dataclass(frozen=True, slots=True)
class Lookbehind:
    """A condition without width: the character before is one of `ranges`. Only patterns have it, before they become
    terminals. at_start: whether it holds where there is no character before; None: that is not known.
    """

    ranges: Ranges
    at_start: bool | None


@dataclass(frozen=True, slots=True)
class Intersect:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Complement:
    """All UTF-8 texts except those of `item`."""

    item: Node


@dataclass(frozen=True, slots=True)
class Terminal:
    """A regular part that becomes one automaton; `name` is for messages."""

    item: Node
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A deterministic byte automaton. State 0 is the start, and every state leads to an accepting one.

    rows: int32 [num_states, num_classes], -1 where refused. byte_class: uint8 [256]. accepting: bool [num_states].
    """

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    accepting: NDArray[np.bool_]

    @property
    def transitions(self) -> NDArray[np.int32]:
        """The rows over bytes, int32 [num_states, 256]."""
        return self.rows[:, self.byte_class]

    def accepts(self, text: bytes) -> bool:
        state = 0
        for byte in text:
            state = int(self.rows[state, self.byte_class[byte]])
            if state < 0:
                return False
        return bool(self.accepting[state])


@dataclass(frozen=True, slots=True)
class Reference:
    rule: str


Whitespace = Literal[
    "model",
    "compact",
    "any",
    "indent=0",
    "indent=1",
    "indent=2",
    "indent=3",
    "indent=4",
    "indent=5",
    "indent=6",
    "indent=7",
    "indent=8",
]


Order = Literal["declared", "any"]
AdditionalProperties = Literal["closed", "schema"]


@dataclass(frozen=True, slots=True)
class JsonOptions:
    """The options of turning a JSON schema into a language. The defaults keep the letter of the schema.

    whitespace: "model", one space after each comma and colon, as `json.dumps` writes; "compact", none; "indent=2" (0 to
    8), lines as `json.dumps` writes them; "any", whatever JSON allows, within bounds (json_schema/frames/layout.py).
    order: "any"; "declared", properties in the schema's order, and then those that it does not name.
    additional_properties: "schema", what the schema allows; "closed", no others where a schema has `properties` and
    says nothing of others.
    integers: "any", with a zero fraction part, too; "plain", without.
    strict: the schema must keep OpenAI's rules for structured outputs.
    on_unsupported: "error" raises UnsupportedSchema; "validate" lets the part be any JSON (the caller then validates).
    registry: documents by absolute URI, for remote references; nothing is ever fetched.

    Raises: InvalidGrammar for an unknown value.
    """

    whitespace: Whitespace = "model"
    order: Order = "any"
    additional_properties: AdditionalProperties = "schema"
    integers: Literal["any", "plain"] = "any"
    strict: bool = False
    on_unsupported: Literal["error", "validate"] = "error"
    registry: Mapping[str, Any] = field(default_factory=dict)  # values are JSON schemas: dict or bool

    def __post_init__(self) -> None:
        for name, known in _KNOWN_VALUES.items():
            value = getattr(self, name)
            if value not in known:
                raise InvalidGrammar(f"{name} is {value!r}, but must be one of {', '.join(map(str, known))}")


_KNOWN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "whitespace": get_args(Whitespace),
    "order": get_args(Order),
    "additional_properties": get_args(AdditionalProperties),
    "integers": ("any", "plain"),
    "strict": (False, True),
    "on_unsupported": ("error", "validate"),
}

AS_MODELS_WRITE: Mapping[str, Any] = {"order": "declared", "additional_properties": "closed", "integers": "plain"}
"""The values of JsonOptions for texts that a model is to write, in addition to the defaults."""


@dataclass(frozen=True, slots=True, eq=False)
class JsonSchema:
    """The JSON texts of the values that `schema` (a decoded JSON document: dict or bool) accepts."""

    schema: Any  # any JSON value; whether it is a schema is checked by the compiler
    options: JsonOptions = JsonOptions()


@dataclass(frozen=True, slots=True)
class Named:
    item: Node
    name: str


Node = (
    Bytes
    | Chars
    | Concatenation
    | Choice
    | Repeat
    | Lookahead
    | Lookbehind
    | Intersect
    | Complement
    | Terminal
    | Table
    | Reference
    | JsonSchema
    | Named
)


@dataclass(frozen=True, slots=True)
class NamedRules:
    """A grammar: named rules, and the start rule."""

    rules: Mapping[str, Node]
    start: str = "start"

    @staticmethod
    def of(node: Node) -> NamedRules:
        """Wrap one node as a grammar without other rules."""
        return NamedRules({"start": node})

    def inlined(self, node: Node) -> Node:
        """Replace each reference by the rule that it names. The rules must not be recursive."""
        return changed(node, lambda one: self.inlined(self.rules[one.rule]) if isinstance(one, Reference) else None)

    def recursive(self) -> frozenset[str]:
        """Return the rules that inlining does not make regular.

        These are the rules on a cycle of references, those that hold a JSON schema, and those that refer to such rules.
        """
        uses = {name: references(node) for name, node in self.rules.items() if not holds(node, _is_schema)}
        plain: set[str] = set()
        while fresh := {name for name, used in uses.items() if name not in plain and used <= plain}:
            plain |= fresh
        return frozenset(set(self.rules) - plain)


def parts_of(node: Node) -> tuple[Node, ...]:
    """Return the nodes that a node is made of."""
    match node:
        case Concatenation(parts) | Choice(parts) | Intersect(parts):
            return parts
        case Repeat(item) | Lookahead(item) | Complement(item) | Terminal(item) | Named(item):
            return (item,)
    return ()


def holds(node: Node, is_wanted: Callable[[Node], bool]) -> bool:
    """Tell whether a node, or some part of it, is wanted."""
    return is_wanted(node) or any(holds(part, is_wanted) for part in parts_of(node))


def changed(node: Node, change: Callable[[Node], Node | None]) -> Node:
    """Return a node in which parts are replaced by what `change` returns for them; None looks at the part's parts."""
    found = change(node)
    return with_parts(node, [changed(part, change) for part in parts_of(node)]) if found is None else found


def with_parts(node: Node, parts: Sequence[Node]) -> Node:
    """Return a node that is made of other parts, as many as before."""
    match node:
        case Concatenation() | Choice() | Intersect():
            return type(node)(tuple(parts))
        case Repeat() | Lookahead() | Complement() | Terminal() | Named():
            return replace(node, item=parts[0])
    return node


def references(node: Node) -> set[str]:
    """Return the names of the rules that a node refers to."""
    if isinstance(node, Reference):
        return {node.rule}
    return set().union(*map(references, parts_of(node)))


def _is_schema(node: Node) -> bool:
    return isinstance(node, JsonSchema)


EMPTY = Concatenation(())
NOTHING = Choice(())
ANY_CHAR = Chars(((0, 0xD7FF), (0xE000, MAX_CODE_POINT)))
ANY_TEXT = Repeat(ANY_CHAR)


def text(value: str) -> Bytes:
    """Return a node for exactly this text, in UTF-8."""
    return Bytes(value.encode())


def one_of(values: tuple[str, ...] | list[str]) -> Choice:
    """Return a node for one of these texts."""
    return Choice(tuple(text(v) for v in values))


def optional(node: Node) -> Repeat:
    return Repeat(node, 0, 1)


def normalize_ranges(ranges: list[tuple[int, int]]) -> Ranges:
    """Sort inclusive ranges and join those that overlap or touch."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(r for r in ranges if r[0] <= r[1]):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def complement_ranges(ranges: Ranges) -> Ranges:
    """Return all code points that are not in `ranges`."""
    out, start = [], 0
    for low, high in ranges:
        if low > start:
            out.append((start, low - 1))
        start = high + 1
    if start <= MAX_CODE_POINT:
        out.append((start, MAX_CODE_POINT))
    return tuple(out)

"""Text with JSON values in it, such as tool calls: one table for the text, with gaps for the values.

The text before a place decides whether a value begins there. So free text, markers and names are one frame. Each gap is
an exit of that frame: it leads into the frames of a schema, and from the end of the value back into the text. All
schemas share one machine, so their common parts are stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError, InvalidGrammar, UnsupportedSchema
from ramet.grammar import ir
from ramet.grammar.json_schema.algebra.values import Expr
from ramet.grammar.json_schema.compile import Schemas
from ramet.grammar.json_schema.frames.compilation import Compilation, TextContext
from ramet.grammar.json_schema.frames.tables import AT_VALUE, NUMBER, VALUE_STARTS
from ramet.grammar.machine.automaton import Limits, Machine
from ramet.grammar.machine.compiled_grammar import CompiledGrammar, Problem
from ramet.grammar.machine.frame import PREFERRED_BYTES, REFUSE, Frame, compress_rows, leave, target
from ramet.grammar.machine.vocabulary import Vocabulary

_IN_NUMBERS = b"0123456789.eE+-"
_DONE = 0  # the frame's first exit; exit 1 + i is gap i


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """A place in the text for a value of `schema`. The text continues in the state `after`."""

    schema: ir.JsonSchema
    after: int


@dataclass(frozen=True, slots=True, eq=False)
class TextWithValues:
    """A deterministic byte automaton with start state 0. In the states of `gaps`, a JSON value follows.

    transitions: int32 [num_states, 256], -1 refused. accepting: bool [num_states]. Every state leads to an accepting
    one. All schemas have the same options. often: a text whose states occur often, so that their masks are made ahead.
    names: of schemas, for messages.
    """

    transitions: NDArray[np.int32]
    accepting: NDArray[np.bool_]
    gaps: dict[int, Gap]
    often: bytes = b""
    names: dict[ir.JsonSchema, str] = field(default_factory=dict)


class TextBuilder:
    """Builds a text with values from copies of automata, texts that continue from their states, and gaps."""

    def __init__(self) -> None:
        self.gaps: dict[int, Gap] = {}
        self._accepting: list[bool] = []
        self._edges: list[dict[int, int]] = []  # for each state, byte -> state, beside the edges of the copies
        self._copies: list[tuple[int, NDArray[np.int32]]] = []  # first state, transitions

    def new(self, *, is_end: bool = False) -> int:
        """Add a state. is_end: the text may end there."""
        self._accepting.append(is_end)
        self._edges.append({})
        return len(self._edges) - 1

    def add(self, transitions: NDArray[np.int32], accepting: NDArray[np.bool_]) -> int:
        """Add a copy of an automaton; return its first state."""
        first = len(self._edges)
        self._copies.append((first, transitions))
        self._accepting += accepting.tolist()
        self._edges += [{} for _ in transitions]
        return first

    def spell(self, state: int, text: str) -> int:
        """Add a text from a state; return the state where it ends. Shares what was spelled from there before."""
        return self._spell(state, text.encode())

    def _spell(self, state: int, data: bytes) -> int:
        for byte in data:
            edges = self._edges[state]
            if byte not in edges:
                edges[byte] = self.new()
            state = edges[byte]
        return state

    def lead(self, state: int, text: str, to: int) -> bool:
        """Add a text, not empty, from a state to the state `to`; return False if another text begins alike."""
        data = text.encode()
        edges = self._edges[self._spell(state, data[:-1])]
        if data[-1] in edges:
            return False
        edges[data[-1]] = to
        return True

    def put(self, state: int, gap: Gap) -> None:
        """Place a gap in a state: a value follows there."""
        self.gaps[state] = gap

    def end_at(self, state: int) -> None:
        """Allow the text to end in a state."""
        self._accepting[state] = True

    @property
    def is_ambiguous(self) -> bool:
        """Tell whether a spelled text can continue in a state in which a value stands."""
        return any(self._edges[state] for state in self.gaps)

    def build(self, *, often: str = "", names: Mapping[ir.JsonSchema, str] | None = None) -> TextWithValues:
        """Return the text. For `often` and `names` see TextWithValues."""
        wide = np.full((len(self._accepting), 256), -1, dtype=np.int32)
        for first, transitions in self._copies:
            wide[first : first + len(transitions)] = np.where(transitions >= 0, transitions + first, -1)
        states = np.repeat(np.arange(len(wide)), [len(edges) for edges in self._edges])
        read = np.array([byte for edges in self._edges for byte in edges], dtype=np.int64)
        wide[states, read] = [to for edges in self._edges for to in edges.values()]
        accepting = np.asarray(self._accepting, dtype=np.bool_)
        return TextWithValues(wide, accepting, self.gaps, often.encode(), dict(names or {}))


def compile_with_values(text: TextWithValues, vocabulary: Vocabulary, limits: Limits) -> CompiledGrammar:
    """Compile a text with values in it.

    Raises: InvalidGrammar if a value and a text can have the same beginning; UnsupportedSchema with the problems of all
    schemas; InvalidSchema, GrammarError, GrammarTooLarge.
    """
    machine = Machine(vocabulary, limits)
    compilation, roots, unenforced = _place_all(text, machine)
    frame = _AroundValues(machine, text, compilation, roots)
    return CompiledGrammar(machine, target(frame.instance), unenforced)


class _AroundValues(Frame):
    """The text around the values, as one frame. Its exits are the gaps and the end."""

    def __init__(
        self,
        machine: Machine,
        text: TextWithValues,
        compilation: Compilation | None,
        roots: dict[ir.JsonSchema, Expr],
    ) -> None:
        self.machine = machine
        self.compilation = compilation
        self.roots = roots
        self.gaps = list(text.gaps.values())
        rows = text.transitions.copy()
        values = np.ix_(list(text.gaps), list(VALUE_STARTS))
        if (rows[values] != REFUSE).any():
            raise InvalidGrammar(
                "a JSON value and a text can begin alike in the same place; put a text before the value that tells "
                "them apart"
            )
        for gap in self.gaps:
            if compilation is not None and (compilation.expressions.kinds(roots[gap.schema]) >> NUMBER) & 1:
                self._check_after_number(rows[gap.after])
        exits = [leave(1 + i, again=True) for i in range(len(self.gaps))]
        rows[values] = np.array(exits, dtype=np.int32)[:, None]
        compressed, byte_class = compress_rows(rows)
        self.costs, self.exits = _ways_out(text, compressed, self._cost_of)
        self.transitions = text.transitions
        self.is_way_out = text.accepting.tolist()
        for i, state in enumerate(text.gaps):
            self.is_way_out[state] = self.is_way_out[state] or self.exits[state] == 1 + i
        self.steps: dict[int, tuple[int, int]] = {}  # state -> (byte, next state) on the way out
        ends = np.where(text.accepting, _DONE, REFUSE).astype(np.int32)
        self.table = machine.table(compressed, byte_class, 1 + len(self.gaps), ends)
        self.instance = machine.add(self)

    @staticmethod
    def _check_after_number(row: NDArray[np.int32]) -> None:
        """Raise InvalidGrammar if the text after a number may begin with a character of numbers."""
        found = [chr(byte) for byte in _IN_NUMBERS if row[byte] != REFUSE]
        if found:
            raise InvalidGrammar(
                f"a JSON number can go on with the text after it ({found[0]!r}); put a text between them that begins "
                "with no digit, point or exponent"
            )

    def _cost_of(self, schema: ir.JsonSchema) -> int:
        assert self.compilation is not None
        return self.compilation.expressions.cost(self.roots[schema])

    def resolve(self, exit_index: int) -> int:
        if exit_index == _DONE:
            return target(self.machine.done)
        gap = self.gaps[exit_index - 1]
        assert self.compilation is not None
        context = TextContext(target(self.instance, gap.after), self.costs[gap.after])
        return self.compilation.value((self.roots[gap.schema],), context, AT_VALUE)

    def closing_exit(self, local: int) -> int:
        return self.exits[local]

    def closing_way(self, local: int, exit_index: int) -> bytes:
        """Return the text from a state to the place where its exit is taken."""
        out = bytearray()
        while not self.is_way_out[local]:
            found = self.steps.get(local)
            if found is None:
                following = self.transitions[local].tolist()
                found = next(
                    (byte, to)
                    for byte, to in ((b, following[b]) for b in PREFERRED_BYTES)
                    if to >= 0 and self.costs[to] == self.costs[local] - 1 and self.exits[to] == exit_index
                )
                self.steps[local] = found
            out.append(found[0])
            local = found[1]
        return bytes(out)


def _ways_out(
    text: TextWithValues, rows: NDArray[np.int32], cost_of: Callable[[ir.JsonSchema], int]
) -> tuple[list[int], list[int]]:
    """Estimate for each state the bytes to the end, and find the first exit on the way there (Dijkstra from the ends).

    rows: the transitions of the text over byte classes; entries below 0 are not transitions.
    """
    n = len(text.accepting)
    before: list[list[int]] = [[] for _ in range(n)]  # target -> sources, a byte away
    sources, classes = np.nonzero(rows >= 0)
    for pair in np.unique(rows[sources, classes] * np.int64(n) + sources).tolist():
        before[pair // n].append(pair % n)
    values: dict[int, list[tuple[int, int, int]]] = {}  # state after a value -> (state before it, its cost, exit)
    for i, (state, gap) in enumerate(text.gaps.items()):
        values.setdefault(gap.after, []).append((state, cost_of(gap.schema), 1 + i))
    costs = [-1] * n
    exits = [_DONE] * n
    reached = {0: [(s, _DONE) for s in np.flatnonzero(text.accepting).tolist()]}  # cost -> (state, first exit)
    while reached:
        cost = min(reached)
        for state, way in sorted(reached.pop(cost)):
            if costs[state] >= 0:
                continue
            costs[state], exits[state] = cost, way
            if before[state]:
                reached.setdefault(cost + 1, []).extend([(s, way) for s in before[state] if costs[s] < 0])
            for source, step, exit_index in values.get(state, ()):
                reached.setdefault(cost + step, []).append((source, exit_index))
    return costs, exits


def _place_all(
    text: TextWithValues, machine: Machine
) -> tuple[Compilation | None, dict[ir.JsonSchema, Expr], list[Problem]]:
    """Read all schemas; return (compilation, their expressions, what masks will not prevent).

    The compilation places them; it is None if there is no schema. Raises with the problems of all schemas, by name.
    """
    sources = list(dict.fromkeys(gap.schema for gap in text.gaps.values()))
    if not sources:
        return None, {}, []
    options = sources[0].options
    if any(s.options != options for s in sources):
        raise InvalidGrammar("the JSON schemas of one grammar must have the same options")
    schemas = Schemas(options, machine.limits.max_regular_states)
    expressions = schemas.expressions
    roots: dict[ir.JsonSchema, Expr] = {}
    problems: list[Problem] = []
    for source in sources:
        name = text.names.get(source)
        try:
            roots[source], nodes = schemas.read(source.schema)
            if expressions.is_empty(roots[source]):
                raise GrammarError(f"a schema is contradictory: no JSON value satisfies {str(source.schema)[:200]}")
            for node in nodes:
                expressions.values(expressions.of_schema(node))
        except UnsupportedSchema as error:
            problems.extend((p, k, f"{reason} ({name})" if name else reason) for p, k, reason in error.problems)
        except GrammarError as error:
            if name:
                error.args = (f"{name}: {error.args[0]}", *error.args[1:])
            raise
    if problems:
        raise UnsupportedSchema(problems)
    return schemas.compilation(machine), roots, schemas.unenforced

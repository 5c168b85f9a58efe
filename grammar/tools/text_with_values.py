"""Regular text with JSON values in it (tool calls): one table whose gaps lead into the schemas' frames and back.

Where a value may begin is decided by the text before it, so that no stack and no set of threads is needed: free text,
markers and names run as one table, and all schemas share one machine, so that what they have in common is there once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError, InvalidGrammar, InvalidSchema, UnsupportedSchema
from ramet.grammar import ir
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.values import Const, Expr
from ramet.grammar.json_schema.compile import WARM_NODES
from ramet.grammar.json_schema.frames.frames import Context, Json
from ramet.grammar.json_schema.keywords.keywords import Interpreter
from ramet.grammar.json_schema.keywords.schema_errors import survey
from ramet.grammar.json_schema.keywords.strict import check_strict
from ramet.grammar.json_schema.schema.document import Document, Registry, SchemaNode
from ramet.grammar.machine.automaton import REFUSE, Machine, compress_rows, leave, target
from ramet.grammar.machine.automaton import Table as FrameTable
from ramet.grammar.machine.compiler import CompiledGrammar, Limits
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular.byte_language import PREFERRED_BYTES

_VALUE_STARTS = b'{["-0123456789tfn'
_DONE = 0  # the frame's first exit; exit 1 + i is gap i


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """A value of `schema` in the text, and the state behind it."""

    schema: ir.JsonSchema
    after: int


@dataclass(frozen=True, slots=True, eq=False)
class LinkedText:
    """A deterministic byte automaton with start state 0; in the states of `gaps` a JSON value stands.

    transitions: int32 [num_states, 256], -1 refused. accepting: bool [num_states]. Every state leads to an accepting
    one. All schemas have the same options. often: a text whose states are met again and again, so that their masks are
    worth making ahead. names: of schemas, for messages.
    """

    transitions: NDArray[np.int32]
    accepting: NDArray[np.bool_]
    gaps: dict[int, Gap]
    often: bytes = b""
    names: dict[ir.JsonSchema, str] = field(default_factory=dict)


def compile_linked(
    text: LinkedText, vocabulary: Vocabulary, *, limits: Limits | None = None, key: str = ""
) -> CompiledGrammar:
    """Compile a text with values in it.

    Raises: InvalidGrammar where a value and a text may begin alike; UnsupportedSchema with the problems of all schemas;
    InvalidSchema, GrammarError, GrammarTooLarge.
    """
    limits = limits or Limits()
    machine = Machine(limits.max_states, limits.max_time_s)
    schemas = list(dict.fromkeys(gap.schema for gap in text.gaps.values()))
    json, roots = _place_all(schemas, text.names, machine, limits.max_regular_states)
    frame = _TextFrame(machine, text, json, roots)
    return CompiledGrammar(machine, target(frame.instance), vocabulary, key, limits.max_mask_bytes)


class _TextFrame:
    """The text, as one frame; the gaps are exits."""

    def __init__(
        self,
        machine: Machine,
        text: LinkedText,
        json: Json | None,
        roots: dict[ir.JsonSchema, Expr],
    ) -> None:
        self.machine = machine
        self.json = json
        self.roots = roots
        self.gaps = list(text.gaps.values())
        rows = text.transitions.copy()
        values = np.ix_(list(text.gaps), list(_VALUE_STARTS))
        if (rows[values] != REFUSE).any():
            raise InvalidGrammar(
                "a JSON value and a text can begin alike in the same place; put a text before the value that tells "
                "them apart"
            )
        exits = [leave(1 + i, again=True) for i in range(len(self.gaps))]
        rows[values] = np.array(exits, dtype=np.int32)[:, None]
        compressed, byte_class = compress_rows(rows)
        self.costs, self.exits = _ways_out(text, compressed, self._cost_of)
        self.transitions = text.transitions
        self.is_way_out = text.accepting.tolist()
        for i, state in enumerate(text.gaps):
            self.is_way_out[state] = self.is_way_out[state] or self.exits[state] == 1 + i
        self.steps: dict[int, tuple[int, int]] = {}  # state -> (byte, state) on the way out
        ends = np.where(text.accepting, _DONE, REFUSE).astype(np.int32)
        self.table: FrameTable = machine.table(compressed, byte_class, 1 + len(self.gaps), ends)
        self.instance = machine.add(self)

    def _cost_of(self, schema: ir.JsonSchema) -> int:
        assert self.json is not None
        return self.json.expressions.cost(self.roots[schema])

    def resolve(self, exit_index: int) -> int:
        if exit_index == _DONE:
            return target(self.machine.done)
        gap = self.gaps[exit_index - 1]
        assert self.json is not None
        return self.json.value((self.roots[gap.schema],), _BehindGap(self, gap.after, self.json.new_number()), 2)

    def closing_exit(self, local: int) -> int:
        return self.exits[local]

    def closing_way(self, exit_index: int, local: int) -> bytes:
        """The text from a state to where its exit is taken."""
        out = bytearray()
        while not self.is_way_out[local]:
            found = self.steps.get(local)
            if found is None:
                following = self.transitions[local][PREFERRED_BYTES]
                found = next(
                    (byte, to)
                    for byte, to in zip(PREFERRED_BYTES.tolist(), following.tolist(), strict=True)
                    if to >= 0 and self.costs[to] == self.costs[local] - 1 and self.exits[to] == exit_index
                )
                self.steps[local] = found
            out.append(found[0])
            local = found[1]
        return bytes(out)


class _BehindGap:
    """Context of a value: the text goes on."""

    remembers = False
    is_anonymous = False
    is_for_masks = False

    def __init__(self, frame: _TextFrame, after: int, number: int) -> None:
        self.frame = frame
        self.after = after
        self.number = number

    def resume(self, mask: int, value: Const | None) -> int:
        return target(self.frame.instance, self.after)

    def rest(self, tag: int) -> int:
        return self.frame.costs[self.after]

    def mask_twin(self) -> Context:
        return self


def _ways_out(
    text: LinkedText, rows: NDArray[np.int32], cost_of: Callable[[ir.JsonSchema], int]
) -> tuple[list[int], list[int]]:
    """For each state, about the bytes to the end, and the first exit on the way there (Dijkstra from the ends).

    rows: the text's transitions over byte classes, where entries below 0 are no transitions.
    """
    n = len(text.accepting)
    before: list[list[int]] = [[] for _ in range(n)]  # target -> sources, a byte away
    sources, classes = np.nonzero(rows >= 0)
    for pair in np.unique(rows[sources, classes] * np.int64(n) + sources).tolist():
        before[pair // n].append(pair % n)
    values: dict[int, list[tuple[int, int, int]]] = {}  # state behind a value -> (state before it, its cost, exit)
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
    schemas: list[ir.JsonSchema], names: dict[ir.JsonSchema, str], machine: Machine, max_states: int
) -> tuple[Json | None, dict[ir.JsonSchema, Expr]]:
    """Read all schemas into one set of expressions. Raises with the problems of all of them, and the schema's name."""
    if not schemas:
        return None, {}
    options = schemas[0].options
    if any(s.options != options for s in schemas):
        raise InvalidGrammar("the JSON schemas of one grammar must have the same options")
    interpreters: list[Interpreter] = []
    owners: dict[Document, Interpreter] = {}

    def owner(node: SchemaNode) -> Interpreter:
        found = owners.get(node.document)
        if found is None:
            found = owners[node.document] = next(i for i in reversed(interpreters) if i.registry.has(node))
        return found

    expressions: Expressions | None = None
    roots: dict[ir.JsonSchema, Expr] = {}
    problems: list[tuple[str, str, str]] = []

    def place(schema: ir.JsonSchema) -> None:
        nonlocal expressions
        if not isinstance(schema.schema, dict | bool):
            raise InvalidSchema("a schema must be an object or a boolean", "")
        registry = Registry(schema.schema, options.registry)
        lenient = options.on_unsupported == "validate"
        interpreter = Interpreter(registry, max_states, only_named=options.mode != "exact", lenient=lenient)
        if expressions is None:
            expressions = Expressions(
                interpreter.languages,
                lambda node: owner(node).interpret(node),
                lambda node: owner(node).interpret_not(node),
                lenient=lenient,
            )
        interpreter.expressions, interpreter.languages = expressions, expressions.languages
        interpreters.append(interpreter)
        machine.unenforced.extend(survey(interpreter))
        if options.mode == "strict":
            check_strict(registry.root)
        roots[schema] = expressions.of_schema(registry.root)
        if expressions.is_empty(roots[schema]):
            raise GrammarError(f"a schema is contradictory: no JSON value satisfies {str(schema.schema)[:200]}")
        for node in registry.nodes[:WARM_NODES]:
            expressions.values(expressions.of_schema(node))

    for schema in schemas:
        name = names.get(schema)
        try:
            place(schema)
        except UnsupportedSchema as error:
            problems.extend((p, k, f"{reason} ({name})" if name else reason) for p, k, reason in error.problems)
        except GrammarError as error:
            if name:
                error.args = (f"{name}: {error.args[0]}", *error.args[1:])
            raise
    if problems:
        raise UnsupportedSchema(problems)
    assert expressions is not None
    json = Json(machine, expressions, spaced=options.whitespace == "bounded", ordered=options.mode != "exact")
    return json, roots

"""Regular text with JSON values in it (tool calls, templates): one table whose gaps lead into the schemas' frames and back.

Where a value may begin is decided by the text before it, so that no stack and no set of threads is needed: free text, markers
and names run as one table, and all schemas share one machine, so that what they have in common is there once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError, InvalidGrammar, InvalidSchema, UnsupportedSchema
from ramet.grammar import ir
from ramet.grammar.automaton import REFUSE, Machine, compress_rows, leave, target
from ramet.grammar.automaton import Table as FrameTable
from ramet.grammar.compiler import CompiledGrammar, Limits
from ramet.grammar.json_schema.document import Registry, SchemaNode
from ramet.grammar.json_schema.expressions import Expressions
from ramet.grammar.json_schema.frames import Json
from ramet.grammar.json_schema.keywords import Interpreter, survey
from ramet.grammar.json_schema.values import Expr, Values
from ramet.grammar.pushdown import inline
from ramet.grammar.utf8 import text_dfa, utf8_table
from ramet.grammar.vocabulary import Vocabulary

# each schema stands as one surrogate, which no text contains
_FIRST_SYMBOL, MAX_SCHEMAS = 0xD800, 2048
_VALUE_STARTS = b'{["-0123456789tfn'
_DONE = 0  # the frame's first exit; exit 1 + i is gap i


def compile_linked(
    grammar: ir.Grammar, vocabulary: Vocabulary, *, limits: Limits | None = None, key: str = ""
) -> CompiledGrammar:
    """Compile a grammar whose rules are not recursive and whose JSON schemas all have the same options.

    Raises: InvalidGrammar where a value and a text may begin alike; UnsupportedSchema with the problems of all schemas;
    GrammarError, GrammarTooLarge.
    """
    limits = limits or Limits()
    schemas: dict[ir.JsonSchema, int] = {}
    node = _with_symbols(inline(grammar.rules[grammar.start], grammar), schemas)
    dfa = text_dfa(node, max_states=limits.max_regular_states, name="the text around the JSON values")
    if not any(dfa.accepting):
        raise GrammarError("the grammar is contradictory: no text matches it")
    gaps: dict[int, _Gap] = {}
    for schema, number in schemas.items():
        symbol = _FIRST_SYMBOL + number
        for state in range(len(dfa.transitions)):
            after = dfa.step(state, symbol)
            if after >= 0:
                if state in gaps:
                    raise InvalidGrammar("two JSON schemas can begin in the same place; join them with anyOf")
                gaps[state] = _Gap(schema, after)
    table = utf8_table(dfa, name="the text around the JSON values")
    machine = Machine(limits.max_states)
    json, roots = _place_all(list(schemas), machine, limits.max_regular_states)
    frame = _TextFrame(machine, table, gaps, json, roots)
    return CompiledGrammar(machine, target(frame.instance), vocabulary, key)


@dataclass(frozen=True, slots=True, eq=False)
class _Gap:
    """A value of `schema`, and the state of the text behind it."""

    schema: ir.JsonSchema
    after: int


class _TextFrame:
    """The text, as one frame; the gaps are exits."""

    def __init__(
        self,
        machine: Machine,
        table: ir.Table,
        gaps: dict[int, _Gap],
        json: Json | None,
        roots: dict[ir.JsonSchema, Expr],
    ) -> None:
        self.machine = machine
        self.json = json
        self.roots = roots
        self.gaps = list(gaps.values())
        rows = table.transitions.copy()
        starts = list(_VALUE_STARTS)
        for i, state in enumerate(gaps):
            if (rows[state, starts] != REFUSE).any():
                raise InvalidGrammar(
                    "a JSON value and a text can begin alike in the same place; put a text before the value that tells them apart"
                )
            rows[state, starts] = leave(1 + i, again=True)
        self.costs, self.exits = _ways_out(table, gaps, self._cost_of)
        compressed, byte_class = compress_rows(rows)
        ends = np.where(table.accepting, _DONE, REFUSE).astype(np.int32)
        self.table: FrameTable = machine.table(compressed, byte_class, 1 + len(gaps), ends)
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


class _BehindGap:
    """Context of a value: the text goes on."""

    remembers = False
    is_anonymous = False

    def __init__(self, frame: _TextFrame, after: int, number: int) -> None:
        self.frame = frame
        self.after = after
        self.number = number

    def resume(self, mask: int, value: object | None) -> int:
        return target(self.frame.instance, self.after)

    def rest(self, tag: int) -> int:
        return self.frame.costs[self.after]


def _ways_out(
    table: ir.Table, gaps: dict[int, _Gap], cost_of: Callable[[ir.JsonSchema], int]
) -> tuple[list[int], list[int]]:
    """For each state, about the bytes to the end, and the first exit on the way there (Dijkstra from the ends)."""
    n = len(table.accepting)
    before: list[list[tuple[int, int, int]]] = [[] for _ in range(n)]  # target -> (source, cost, exit or -1)
    sources, _ = np.nonzero(table.transitions >= 0)
    targets: NDArray[np.int32] = table.transitions[table.transitions >= 0]
    for s, t in {*zip(sources.tolist(), targets.tolist(), strict=True)}:
        before[t].append((s, 1, -1))
    for i, (state, gap) in enumerate(gaps.items()):
        before[gap.after].append((state, cost_of(gap.schema), 1 + i))
    costs = [-1] * n
    exits = [_DONE] * n
    queue = [(0, s, _DONE) for s in np.flatnonzero(table.accepting).tolist()]
    while queue:
        cost, state, way = heapq.heappop(queue)
        if costs[state] >= 0:
            continue
        costs[state], exits[state] = cost, way
        for source, step, exit_index in before[state]:
            if costs[source] < 0:
                heapq.heappush(queue, (cost + step, source, way if exit_index < 0 else exit_index))
    return costs, exits


def _place_all(
    schemas: list[ir.JsonSchema], machine: Machine, max_states: int
) -> tuple[Json | None, dict[ir.JsonSchema, Expr]]:
    """Read all schemas into one set of expressions. Raises with the problems of all of them."""
    if not schemas:
        return None, {}
    options = schemas[0].options
    if any(s.options != options for s in schemas):
        raise InvalidGrammar("the JSON schemas of one grammar must have the same options")
    interpreters: list[Interpreter] = []

    def interpret(node: SchemaNode) -> Values:
        for interpreter in interpreters:
            nodes = interpreter.registry.nodes
            if node.number < len(nodes) and nodes[node.number] is node:
                return interpreter.interpret(node)
        raise AssertionError(node.pointer)

    expressions: Expressions | None = None
    roots: dict[ir.JsonSchema, Expr] = {}
    problems: list[tuple[str, str, str]] = []
    for schema in schemas:
        if not isinstance(schema.schema, dict | bool):
            raise InvalidSchema("a schema must be an object or a boolean", "")
        registry = Registry(schema.schema, options.registry)
        interpreter = Interpreter(registry, max_states, only_named=options.mode != "exact")
        if expressions is None:
            expressions = Expressions(interpreter.languages, interpret)
        interpreter.expressions, interpreter.languages = expressions, expressions.languages
        interpreters.append(interpreter)
        try:
            survey(interpreter)
        except UnsupportedSchema as error:
            problems.extend(error.problems)
            continue
        roots[schema] = expressions.of_schema(registry.root)
        if expressions.is_empty(roots[schema]):
            raise GrammarError(f"a schema is contradictory: no JSON value satisfies {str(schema.schema)[:200]}")
    if problems:
        raise UnsupportedSchema(problems)
    assert expressions is not None
    json = Json(machine, expressions, spaced=options.whitespace == "bounded", ordered=options.mode != "exact")
    return json, roots


def _with_symbols(node: ir.Node, schemas: dict[ir.JsonSchema, int]) -> ir.Node:
    """The node with a symbol for each JSON schema, numbered in the order in which they are met."""
    match node:
        case ir.JsonSchema():
            number = schemas.setdefault(node, len(schemas))
            if number >= MAX_SCHEMAS:
                raise InvalidGrammar(f"the grammar has more than {MAX_SCHEMAS:,} JSON schemas")
            return ir.Chars(((_FIRST_SYMBOL + number, _FIRST_SYMBOL + number),))
        case ir.Sequence(parts):
            return ir.Sequence(tuple(_with_symbols(p, schemas) for p in parts))
        case ir.Choice(options):
            return ir.Choice(tuple(_with_symbols(o, schemas) for o in options))
        case ir.Repeat(item, low, high):
            return ir.Repeat(_with_symbols(item, schemas), low, high)
        case _:
            return node

"""Context-free grammars on the machine: configurations are sets of threads over a graph-structured stack.

A thread is (leaf, state of the leaf's automaton, stack node). Stack nodes are interned by content, so a configuration
is the same object whenever the same continuations are open; a call in tail position reuses its caller's node, and left
recursion closes a cycle within one step, so both kinds of recursion stay finite where the language is regular.

Source: GSS as in Tomita's generalized LR parsing; nullable rules as in Scott and Johnstone's "GLL parsing" (2010).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge, InvalidGrammar
from ramet.grammar import ir, regular
from ramet.grammar.automaton import DEAD, UNKNOWN, Machine, leave, target

MAX_THREADS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A regular part, and the grammar state after it. rows: int32 [n, 256]; cost[q]: bytes to the nearest accepting
    state.
    """

    rows: NDArray[np.int32]
    accepting: list[int]
    goes_on: list[bool]
    then: int


@dataclass(frozen=True, slots=True, eq=False)
class StackNode:
    """A rule that was called; `edges`: (grammar state to go on with, caller's node). Identity is content (see
    `_intern`)."""

    number: int
    edges: list[tuple[int, StackNode]]


Thread = tuple[int, int, int]  # leaf, state, stack node's number
Parent = StackNode | int  # of an earlier step, or the number of a rule called in this one
State = tuple[str, int, int, list[int]]  # kind; leaf or rule; what follows a rule; alternatives


@dataclass(frozen=True, slots=True)
class Configuration:
    """Interned by value."""

    threads: frozenset[Thread]
    accepts: bool


class Pushdown:
    """A grammar compiled to states: leaf (a regular part), or (alternatives), call (of a rule), return."""

    def __init__(self, grammar: ir.Grammar, machine: Machine, max_regular_states: int = 20_000) -> None:
        self.grammar = grammar
        self.machine = machine
        self.max_regular_states = max_regular_states
        self.states: list[State] = [("return", 0, 0, [])]
        self.leaves: list[Leaf] = []
        self.dfas: dict[ir.Node, tuple[NDArray[np.int32], list[int]]] = {}
        self.recursive = _recursive_rules(grammar)
        self.rule_state: dict[str, int] = {}
        self.rule_names: list[str] = []
        self.rule_index: dict[str, int] = {}
        self.nodes: list[StackNode] = [StackNode(0, [])]
        self.node_index: dict[Hashable, StackNode] = {}
        self.identity = np.arange(256, dtype=np.uint8)
        row = np.array([[leave(b) for b in range(256)]], dtype=np.int32)
        self.wide = [
            machine.table(row, self.identity, 256, None),
            machine.table(row, self.identity, 257, np.array([256], dtype=np.int32)),
        ]
        self._compile_rules()

    # --- grammar -> states

    def _compile_rules(self) -> None:
        pending = [self.grammar.start]
        while pending:
            name = pending.pop()
            if name in self.rule_state:
                continue
            if name not in self.grammar.rules:
                raise InvalidGrammar(f"rule {name!r} is used but not defined")
            self.rule_state[name] = -1
            self.rule_state[name] = self._compile(self.grammar.rules[name], 0, pending)
        self.productive = self._productive()

    @cached_property
    def costs(self) -> _Costs:
        return _Costs(self)

    def _add(self, state: State) -> int:
        self.states.append(state)
        return len(self.states) - 1

    def _compile(self, node: ir.Node, then: int, pending: list[str]) -> int:
        if self._is_regular(node):
            return self._leaf(node, then)
        match node:
            case ir.Sequence(parts):
                for group in reversed(self._group(parts)):
                    then = self._compile(group, then, pending)
                return then
            case ir.Choice(options):
                plain = tuple(o for o in options if self._is_regular(o))
                rest = [self._compile(o, then, pending) for o in options if not self._is_regular(o)]
                if plain:
                    rest.append(self._leaf(ir.Choice(plain), then))
                return self._add(("or", 0, 0, rest))
            case ir.Repeat(item, low, high):
                if high is None:
                    targets: list[int] = []
                    loop = self._add(("or", 0, 0, targets))
                    targets.extend([self._compile(item, loop, pending), then])
                    state = loop
                else:
                    state = then
                    for _ in range(high - low):
                        state = self._add(("or", 0, 0, [self._compile(item, state, pending), then]))
                for _ in range(low):
                    state = self._compile(item, state, pending)
                return state
            case ir.Reference(rule):
                if rule not in self.grammar.rules:
                    raise InvalidGrammar(f"rule {rule!r} is used but not defined")
                if rule not in self.rule_index:
                    self.rule_index[rule] = len(self.rule_names)
                    self.rule_names.append(rule)
                pending.append(rule)
                return self._add(("call", self.rule_index[rule], then, []))
            case _:
                raise InvalidGrammar(f"{type(node).__name__} cannot stand in a recursive part of a grammar")

    def _group(self, parts: tuple[ir.Node, ...]) -> list[ir.Node]:
        """Join neighbours that are regular, so that each run of them is one automaton."""
        out: list[ir.Node] = []
        run: list[ir.Node] = []
        for part in parts:
            if self._is_regular(part):
                run.append(part)
                continue
            if run:
                out.append(ir.Sequence(tuple(run)))
                run = []
            out.append(part)
        if run:
            out.append(ir.Sequence(tuple(run)))
        return out

    def _is_regular(self, node: ir.Node) -> bool:
        match node:
            case ir.Sequence(parts) | ir.Choice(parts) | ir.Intersect(parts):
                return all(self._is_regular(p) for p in parts)
            case ir.Repeat(item, _, _) | ir.Terminal(item, _) | ir.Complement(item) | ir.Lookahead(item, _):
                return self._is_regular(item)
            case ir.Reference(rule):
                return rule in self.grammar.rules and rule not in self.recursive
            case ir.JsonSchema():
                return False
            case _:
                return True

    def _leaf(self, node: ir.Node, then: int) -> int:
        node = inline(node, self.grammar)
        found = self.dfas.get(node)
        if found is None:
            name = node.name if isinstance(node, ir.Terminal) else "a terminal of the grammar"
            dfa = regular.compile_bytes(node, max_states=self.max_regular_states, name=name)
            found = self.dfas[node] = (regular.byte_table(dfa), dfa.accepting)
        rows, accepting = found
        if not any(accepting):
            return self._add(("or", 0, 0, []))
        self.leaves.append(Leaf(rows, accepting, (rows.max(axis=1) >= 0).tolist(), then))
        return self._add(("leaf", len(self.leaves) - 1, 0, []))

    def _productive(self) -> list[bool]:
        """Which states can be finished: the least fixed point."""
        ok = [False] * len(self.states)
        ok[0] = True
        changed = True
        while changed:
            changed = False
            for s, state in enumerate(self.states):
                if ok[s]:
                    continue
                if state[0] == "leaf":
                    good = ok[self.leaves[state[1]].then]
                elif state[0] == "call":
                    good = ok[self.rule_state[self.rule_names[state[1]]]] and ok[state[2]]
                else:
                    good = any(ok[t] for t in state[3])
                if good:
                    ok[s] = changed = True
        return ok

    # --- running

    def start(self) -> int:
        """Return the packed target of the start configuration, DEAD if the language is empty."""
        root = self.rule_state[self.grammar.start]
        if not self.productive[root]:
            return DEAD
        return self.configuration([(root, self.nodes[0])])

    def configuration(self, entries: list[tuple[int, StackNode]], threads: set[Thread] | None = None) -> int:
        found = _Closure(self, entries, set() if threads is None else threads).result()
        if not found.threads and not found.accepts:
            return DEAD
        return target(self.machine.intern(("pushdown", id(self), found), lambda: ConfigurationFrame(self, found)))

    def node(self, key: Hashable, edges: list[tuple[int, StackNode]]) -> StackNode:
        found = self.node_index.get(key)
        if found is None:
            found = self.node_index[key] = StackNode(len(self.nodes), edges)
            self.nodes.append(found)
        return found


class _Closure:
    """One step's expansion of grammar states to threads."""

    def __init__(self, owner: Pushdown, entries: list[tuple[int, StackNode]], threads: set[Thread]) -> None:
        self.owner = owner
        self.accepts = False
        self.threads = threads
        self.local_edges: dict[int, set[tuple[int, Parent]]] = {}  # rule -> (then, StackNode | rule number)
        self.local_threads: set[tuple[int, int, Parent]] = set()
        self.returned: set[int] = set()
        self.seen: set[tuple[int, Parent]] = set()
        for state, node in entries:
            self.visit(state, node)

    def visit(self, state: int, parent: Parent) -> None:
        """`parent`: a StackNode of earlier steps, or the number of a rule called in this one."""
        stack: list[tuple[int, Parent]] = [(state, parent)]
        owner = self.owner
        while stack:
            entry = stack.pop()
            if entry in self.seen or not owner.productive[entry[0]]:
                continue
            self.seen.add(entry)
            state, parent = entry
            what = owner.states[state]
            if what[0] == "leaf":
                leaf_index = what[1]
                leaf = owner.leaves[leaf_index]
                if leaf.goes_on[0]:
                    self.local_threads.add((leaf_index, 0, parent))
                if leaf.accepting[0]:
                    stack.append((leaf.then, parent))
            elif what[0] == "or":
                stack.extend((t, parent) for t in what[3])
            elif what[0] == "call":
                rule, then = what[1], what[2]
                if then == 0:  # a tail call returns to the caller's caller
                    stack.append((owner.rule_state[owner.rule_names[rule]], parent))
                    continue
                edges = self.local_edges.setdefault(rule, set())
                if (then, parent) not in edges:
                    edges.add((then, parent))
                    if rule in self.returned:
                        stack.append((then, parent))
                stack.append((owner.rule_state[owner.rule_names[rule]], rule))
            elif isinstance(parent, StackNode):
                if parent.number == 0:
                    self.accepts = True
                stack.extend(parent.edges)
            else:
                self.returned.add(parent)
                stack.extend(self.local_edges[parent])

    def result(self) -> Configuration:
        names = self._name_nodes()
        for leaf, q, parent in self.local_threads:
            node = parent if isinstance(parent, StackNode) else names[parent]
            self.threads.add((leaf, q, node.number))
        if len(self.threads) > MAX_THREADS:
            raise GrammarTooLarge(f"the grammar is too ambiguous: more than {MAX_THREADS:,} ways are open at once")
        return Configuration(frozenset(self.threads), self.accepts)

    def _name_nodes(self) -> dict[int, StackNode]:
        """Intern this step's stack nodes by their content; those on a cycle together."""
        names: dict[int, StackNode] = {}
        pending = dict(self.local_edges)
        while pending:
            ready = [r for r, edges in pending.items() if all(isinstance(p, StackNode) or p in names for _, p in edges)]
            if not ready:
                break
            for rule in ready:
                edges = [(t, p if isinstance(p, StackNode) else names[p]) for t, p in pending.pop(rule)]
                names[rule] = self.owner.node((rule, frozenset((t, n.number) for t, n in edges)), edges)
        if pending:
            content = frozenset(
                (
                    rule,
                    frozenset(
                        (t, True, p.number)
                        if isinstance(p, StackNode)
                        else (t, p in names, names[p].number if p in names else p)
                        for t, p in edges
                    ),
                )
                for rule, edges in pending.items()
            )
            fresh: dict[int, list[tuple[int, StackNode]]] = {rule: [] for rule in pending}
            for rule in pending:
                names[rule] = self.owner.node((rule, content), fresh[rule])
            for rule, local in pending.items():
                if names[rule].edges is fresh[rule]:
                    fresh[rule].extend((t, p if isinstance(p, StackNode) else names[p]) for t, p in local)
        return names


class ConfigurationFrame:
    """One configuration as a frame of one state; all its bytes are exits."""

    def __init__(self, owner: Pushdown, configuration: Configuration) -> None:
        self.owner = owner
        self.configuration = configuration
        self.table = owner.wide[1 if configuration.accepts else 0]
        self.groups: NDArray[np.int64] | None = None
        self.threads = sorted(configuration.threads)

    def resolve(self, exit_index: int) -> int:
        owner = self.owner
        if exit_index == 256:
            return target(owner.machine.done)
        if self.groups is None:
            rows = (
                np.stack([owner.leaves[leaf].rows[q] for leaf, q, _ in self.threads])
                if self.threads
                else np.full((1, 256), -1)
            )
            self.groups = np.unique(rows, axis=1, return_inverse=True)[1].reshape(-1)
        found = self._after(exit_index)
        # bytes that no thread tells apart have one target
        instance = owner.machine.interned[("pushdown", id(owner), self.configuration)]
        offset = owner.machine.exit_offsets[instance]
        same = np.flatnonzero(self.groups == self.groups[exit_index])
        here = owner.machine.exits[offset : offset + 256]
        here[same[here[same] == UNKNOWN]] = found
        return found

    def _after(self, byte: int) -> int:
        owner = self.owner
        threads: set[Thread] = set()
        entries: list[tuple[int, StackNode]] = []
        for leaf_index, q, number in self.threads:
            leaf = owner.leaves[leaf_index]
            to = int(leaf.rows[q, byte])
            if to < 0:
                continue
            if leaf.goes_on[to]:
                threads.add((leaf_index, to, number))
            if leaf.accepting[to]:
                entries.append((leaf.then, owner.nodes[number]))
        return owner.configuration(entries, threads) if threads or entries else DEAD

    def closing_exit(self, local: int) -> int:
        """The first byte of a shortest text that finishes one of the threads."""
        owner = self.owner
        best: tuple[int, int] | None = None
        for leaf_index, q, number in self.threads:
            leaf = owner.leaves[leaf_index]
            rest = owner.costs.state(leaf.then) + owner.costs.node(owner.nodes[number])
            for byte in owner.costs.order:
                to = int(leaf.rows[q, byte])
                if to >= 0 and (best is None or owner.costs.leaf(leaf_index)[to] + rest < best[0]):
                    best = (owner.costs.leaf(leaf_index)[to] + rest, byte)
        assert best is not None
        return best[1]


class _Costs:
    """Bytes of the shortest texts: from a leaf's state, a grammar state to its return, a stack node to the end."""

    def __init__(self, owner: Pushdown) -> None:
        self.owner = owner
        self.order = [*range(97, 123), *range(48, 58), *range(32, 127), *range(256)]
        self.leaves: dict[int, list[int]] = {}
        self.nodes: dict[int, int] = {0: 0}
        self.states = self._states()

    def leaf(self, index: int) -> list[int]:
        found = self.leaves.get(index)
        if found is None:
            leaf = self.owner.leaves[index]
            cost = np.where(leaf.accepting, 0, _FAR)
            edges = np.where(leaf.rows >= 0, leaf.rows, len(cost))
            for _ in range(len(cost)):
                nearer = np.minimum(cost, np.append(cost, _FAR)[edges].min(axis=1) + 1)
                if (nearer == cost).all():
                    break
                cost = nearer
            found = self.leaves[index] = cost.tolist()
        return found

    def state(self, state: int) -> int:
        return self.states[state]

    def node(self, node: StackNode) -> int:
        """Breadth over the stack: cycles never make a text shorter."""
        found = self.nodes.get(node.number)
        if found is None:
            self.nodes[node.number] = _FAR
            found = min((self.states[then] + self.node(parent) for then, parent in node.edges), default=_FAR)
            self.nodes[node.number] = found
        return found

    def _states(self) -> list[int]:
        owner = self.owner
        cost = [_FAR] * len(owner.states)
        cost[0] = 0
        changed = True
        while changed:
            changed = False
            for s, what in enumerate(owner.states):
                if what[0] == "leaf":
                    new = self.leaf(what[1])[0] + cost[owner.leaves[what[1]].then]
                elif what[0] == "call":
                    new = cost[owner.rule_state[owner.rule_names[what[1]]]] + cost[what[2]]
                elif what[0] == "or":
                    new = min((cost[t] for t in what[3]), default=_FAR)
                else:
                    continue
                if new < cost[s]:
                    cost[s] = new
                    changed = True
        return cost


_FAR = 1 << 40


def inline(node: ir.Node, grammar: ir.Grammar) -> ir.Node:
    """Replace references by the rules they name (which must not be recursive)."""
    match node:
        case ir.Reference(rule):
            return inline(grammar.rules[rule], grammar)
        case ir.Sequence(parts):
            return ir.Sequence(tuple(inline(p, grammar) for p in parts))
        case ir.Choice(parts):
            return ir.Choice(tuple(inline(p, grammar) for p in parts))
        case ir.Intersect(parts):
            return ir.Intersect(tuple(inline(p, grammar) for p in parts))
        case ir.Repeat(item, low, high):
            return ir.Repeat(inline(item, grammar), low, high)
        case ir.Lookahead(item, negative):
            return ir.Lookahead(inline(item, grammar), negative)
        case ir.Complement(item):
            return ir.Complement(inline(item, grammar))
        case ir.Terminal(item, name):
            return ir.Terminal(inline(item, grammar), name)
        case _:
            return node


def references(node: ir.Node) -> set[str]:
    """Names of the rules that a node refers to."""
    match node:
        case ir.Reference(rule):
            return {rule}
        case ir.Sequence(parts) | ir.Choice(parts) | ir.Intersect(parts):
            return set().union(*(references(p) for p in parts)) if parts else set()
        case ir.Repeat(item, _, _) | ir.Terminal(item, _) | ir.Complement(item) | ir.Lookahead(item, _):
            return references(item)
        case ir.JsonSchema():
            return {""}  # not regular: no rule has this name, see `_recursive_rules`
        case _:
            return set()


def _recursive_rules(grammar: ir.Grammar) -> frozenset[str]:
    """Rules that are not regular by inlining: on a cycle of references, or reaching one, or holding a JSON schema."""
    uses = {name: references(node) for name, node in grammar.rules.items()}
    plain: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name, used in uses.items():
            if name not in plain and used <= plain:
                plain.add(name)
                changed = True
    return frozenset(set(grammar.rules) - plain)

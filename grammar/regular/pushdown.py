"""Context-free grammars on the machine: sets of threads over a graph-structured stack (GSS).

A *thread* is one way to read the text so far: (leaf, state of the leaf's automaton, stack node). The leaf is the
regular part that is being read. The stack node holds the rules that were called to get there. A *configuration* is the
set of all threads. Stack nodes with equal content are one object, and so are configurations with equal threads.

Two rules keep recursion finite if the language is regular. A call in tail position reuses the stack node of its caller.
Left recursion makes a cycle of stack nodes within one step.

Source: GSS as in Tomita's generalized LR parsing; nullable rules as in Scott and Johnstone's "GLL parsing" (2010).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge, InvalidGrammar
from ramet.grammar import deadline, ir
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import DEAD, PREFERRED_BYTES, REFUSE, Frame, leave, target
from ramet.grammar.regular import dfas
from ramet.grammar.regular import languages as regular

MAX_THREADS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A regular part of a grammar.

    rows: int32 [n, 256], -1 refused. goes_on[q]: more bytes may follow in state q.
    then: the grammar state after the part.
    """

    rows: NDArray[np.int32]
    accepting: list[int]
    goes_on: list[bool]
    then: int


@dataclass(frozen=True, slots=True, eq=False)
class StackNode:
    """A rule that was called. Pushdown.node makes one node for each content.

    edges: (grammar state after the rule, stack node of the caller).
    """

    number: int
    edges: list[tuple[int, StackNode]]


Thread = tuple[int, int, int]  # leaf, state, number of the stack node
Parent = StackNode | int  # a stack node of an earlier step, or the number of a rule called in this step
State = tuple[str, int, int, list[int]]  # kind; leaf or rule; state after a rule; alternatives


Configuration = tuple[frozenset[Thread], bool]  # all ways to read the text so far; whether the text may end here


class Pushdown:
    """A grammar compiled to states of four kinds.

    A state reads a leaf and continues (leaf), continues in one of several states (or), calls a rule (call), or returns
    from a rule (return).
    """

    def __init__(self, grammar: ir.NamedRules, machine: Machine) -> None:
        self.grammar = grammar
        self.machine = machine
        self.states: list[State] = [("return", 0, 0, [])]
        self.leaves: list[Leaf] = []
        self.dfas: dict[ir.Node, tuple[NDArray[np.int32], list[int]]] = {}
        self.recursive = grammar.recursive()
        self.rule_state: dict[str, int] = {}
        self.rule_names: list[str] = []
        self.rule_index: dict[str, int] = {}
        self.nodes: list[StackNode] = [StackNode(0, [])]
        self.node_index: dict[Hashable, StackNode] = {}
        self.readings: dict[tuple[frozenset[tuple[int, int]], bool], Reading] = {}
        self._digests: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._instances: dict[Configuration, int] = {}
        self._closures: dict[frozenset[tuple[int, int]], Configuration] = {}
        self._weights = np.random.default_rng(1)
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
            case ir.Concatenation(parts):
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
        """Join neighbouring regular parts, so that each group is one automaton."""
        out: list[ir.Node] = []
        run: list[ir.Node] = []
        for part in parts:
            if self._is_regular(part):
                run.append(part)
                continue
            if run:
                out.append(ir.Concatenation(tuple(run)))
                run = []
            out.append(part)
        if run:
            out.append(ir.Concatenation(tuple(run)))
        return out

    def _is_regular(self, node: ir.Node) -> bool:
        return not ir.holds(node, self._is_not_regular)

    def _is_not_regular(self, node: ir.Node) -> bool:
        """Tell whether a node, apart from its parts, is not regular, or not known to be."""
        if isinstance(node, ir.Reference):
            return node.rule not in self.grammar.rules or node.rule in self.recursive
        return isinstance(node, ir.JsonSchema)

    def _leaf(self, node: ir.Node, then: int) -> int:
        node = self.grammar.inlined(node)
        found = self.dfas.get(node)
        if found is None:
            name = node.name if isinstance(node, ir.Terminal) else "a terminal of the grammar"
            dfa = regular.compile_bytes(node, max_states=self.machine.limits.max_regular_states, name=name)
            found = self.dfas[node] = (dfas.byte_table(dfa), dfa.accepting)
        rows, accepting = found
        if not any(accepting):
            return self._add(("or", 0, 0, []))
        self.leaves.append(Leaf(rows, accepting, (rows.max(axis=1) >= 0).tolist(), then))
        return self._add(("leaf", len(self.leaves) - 1, 0, []))

    def _productive(self) -> list[bool]:
        """Return for each state whether some text leads from it to the end of its rule: the least fixed point."""
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

    def configuration(self, entries: list[tuple[int, StackNode]], threads: frozenset[Thread] = frozenset()) -> int:
        key = frozenset((state, node.number) for state, node in entries)
        found = self._closures.get(key)
        if found is None:
            found = self._closures[key] = _closure(self, entries)
        found = found[0] | threads, found[1]
        if found == (frozenset(), False):
            return DEAD
        if len(found[0]) > MAX_THREADS:
            raise GrammarTooLarge(f"the grammar is too ambiguous: more than {MAX_THREADS:,} ways are open at once")
        instance = self._instances.get(found)
        if instance is None:
            instance = self._instances[found] = self.machine.add(ConfigurationFrame(self, found))
        return target(instance)

    def reading(self, configuration: Configuration) -> Reading:
        threads, accepts = configuration
        key = frozenset((leaf, q) for leaf, q, _ in threads), accepts
        found = self.readings.get(key)
        if found is None:
            found = self.readings[key] = Reading(self, *key)
        return found

    def digest(self, leaf: int, q: int) -> NDArray[np.int64]:
        """Return int64 [256]: a weighted digest of the result of each byte in this state of a leaf, 0 if refused."""
        found = self._digests.get((leaf, q))
        if found is None:
            weight = int(self._weights.integers(1, 2**62))
            found = self._digests[leaf, q] = (self.leaves[leaf].rows[q].astype(np.int64) + 1) * weight
        return found

    def node(self, key: Hashable, edges: list[tuple[int, StackNode]]) -> StackNode:
        found = self.node_index.get(key)
        if found is None:
            found = self.node_index[key] = StackNode(len(self.nodes), edges)
            self.nodes.append(found)
        return found


def _closure(owner: Pushdown, entries: list[tuple[int, StackNode]]) -> Configuration:
    """Collect the threads that grammar states reach before the next byte is read."""
    accepts = False
    threads: set[tuple[int, int, Parent]] = set()
    edges: dict[int, set[tuple[int, Parent]]] = {}  # of the rules called now: (state after the rule, caller)
    returned: set[int] = set()  # rules called now that have returned
    seen: set[tuple[int, Parent]] = set()
    waiting: list[tuple[int, Parent]] = list(reversed(entries))
    while waiting:
        entry = waiting.pop()
        if entry in seen or not owner.productive[entry[0]]:
            continue
        seen.add(entry)
        state, parent = entry
        what = owner.states[state]
        if what[0] == "leaf":
            leaf = owner.leaves[what[1]]
            if leaf.goes_on[0]:
                threads.add((what[1], 0, parent))
            if leaf.accepting[0]:
                waiting.append((leaf.then, parent))
        elif what[0] == "or":
            waiting.extend((t, parent) for t in what[3])
        elif what[0] == "call":
            rule, then = what[1], what[2]
            if then == 0:  # a tail call: return to the caller of the caller
                waiting.append((owner.rule_state[owner.rule_names[rule]], parent))
                continue
            callers = edges.setdefault(rule, set())
            if (then, parent) not in callers:
                callers.add((then, parent))
                if rule in returned:
                    waiting.append((then, parent))
            waiting.append((owner.rule_state[owner.rule_names[rule]], rule))
        elif isinstance(parent, StackNode):
            accepts = accepts or parent.number == 0
            waiting.extend(parent.edges)
        else:
            returned.add(parent)
            waiting.extend(edges[parent])
    nodes = _stack_nodes(owner, edges)
    return frozenset([(leaf, q, _node_of(parent, nodes).number) for leaf, q, parent in threads]), accepts


def _node_of(parent: Parent, nodes: dict[int, StackNode]) -> StackNode:
    return parent if isinstance(parent, StackNode) else nodes[parent]


def _stack_nodes(owner: Pushdown, edges: dict[int, set[tuple[int, Parent]]]) -> dict[int, StackNode]:
    """Return the stack node of each rule called in this step, by its content. Nodes on a cycle are found together."""
    nodes: dict[int, StackNode] = {}
    pending = dict(edges)
    while pending:
        ready = [r for r, some in pending.items() if all(isinstance(p, StackNode) or p in nodes for _, p in some)]
        if not ready:
            break
        for rule in ready:
            known = [(t, _node_of(p, nodes)) for t, p in pending.pop(rule)]
            nodes[rule] = owner.node((rule, frozenset((t, n.number) for t, n in known)), known)
    if pending:
        content = frozenset(
            (
                rule,
                frozenset(
                    (t, True, p.number)
                    if isinstance(p, StackNode)
                    else (t, p in nodes, nodes[p].number if p in nodes else p)
                    for t, p in some
                ),
            )
            for rule, some in pending.items()
        )
        fresh: dict[int, list[tuple[int, StackNode]]] = {rule: [] for rule in pending}
        for rule in pending:
            nodes[rule] = owner.node((rule, content), fresh[rule])
        for rule, some in pending.items():
            if nodes[rule].edges is fresh[rule]:
                fresh[rule].extend((t, _node_of(p, nodes)) for t, p in some)
    return nodes


class Reading:
    """The table shared by all configurations that have the same leaf states, whatever their stacks.

    Bytes that all leaf states treat alike have one exit. They are found by equal digests; two different bytes have
    equal digests with probability 2^-60.
    """

    def __init__(self, owner: Pushdown, states: frozenset[tuple[int, int]], accepts: bool) -> None:
        self.owner = owner
        self.states = states
        digest = np.zeros(256, dtype=np.int64)
        for leaf, q in states:
            digest += owner.digest(leaf, q)  # the sums wrap, which is harmless
        values, first, classes = np.unique(digest, return_index=True, return_inverse=True)
        self.samples: list[int] = first.tolist()
        self.end = len(values)
        row = np.array([[leave(c) if v else REFUSE for c, v in enumerate(values.tolist())]], dtype=np.int32)
        ends = np.array([self.end], dtype=np.int32) if accepts else None
        self.table = owner.machine.table(row, classes.reshape(-1).astype(np.uint8), self.end + 1, ends)
        self._moves: dict[int, dict[tuple[int, int], tuple[int | None, int | None]]] = {}

    def moves(self, exit_index: int) -> dict[tuple[int, int], tuple[int | None, int | None]]:
        """Return the result of an exit for each leaf state.

        A result: (next state if more may follow, grammar state after the leaf if the leaf accepts).
        """
        found = self._moves.get(exit_index)
        if found is None:
            byte = self.samples[exit_index]
            found = self._moves[exit_index] = {}
            for index, q in self.states:
                leaf = self.owner.leaves[index]
                to = int(leaf.rows[q, byte])
                if to >= 0:
                    found[index, q] = to if leaf.goes_on[to] else None, leaf.then if leaf.accepting[to] else None
        return found


class ConfigurationFrame(Frame):
    """A configuration as a frame. It has one state, and each class of bytes is an exit."""

    def __init__(self, owner: Pushdown, configuration: Configuration) -> None:
        self.owner = owner
        self.reading = owner.reading(configuration)
        self.table = self.reading.table
        self.threads = sorted(configuration[0])

    def resolve(self, exit_index: int) -> int:
        owner = self.owner
        if exit_index == self.reading.end:
            return target(owner.machine.done)
        moves = self.reading.moves(exit_index)
        threads: list[Thread] = []
        entries: list[tuple[int, StackNode]] = []
        for leaf, q, number in self.threads:
            to, then = moves.get((leaf, q), (None, None))
            if to is not None:
                threads.append((leaf, to, number))
            if then is not None:
                entries.append((then, owner.nodes[number]))
        return owner.configuration(entries, frozenset(threads)) if threads or entries else DEAD

    def closing_exit(self, local: int) -> int:
        """Return the exit of the first byte of a shortest text that completes one of the threads."""
        owner = self.owner
        best: tuple[int, int] | None = None
        for leaf_index, q, number in self.threads:
            leaf = owner.leaves[leaf_index]
            rest = owner.costs.state(leaf.then) + owner.costs.node(owner.nodes[number])
            for byte in PREFERRED_BYTES:
                to = int(leaf.rows[q, byte])
                if to >= 0 and (best is None or owner.costs.leaf(leaf_index)[to] + rest < best[0]):
                    best = (owner.costs.leaf(leaf_index)[to] + rest, byte)
        assert best is not None
        return int(self.table.byte_class[best[1]])


class _Costs:
    """The bytes of shortest texts from three places.

    From a leaf's state to the end of the leaf, from a grammar state to the end of its rule, from a stack node to the
    end.
    """

    def __init__(self, owner: Pushdown) -> None:
        self.owner = owner
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
        """Return the cost from a stack node to the end."""
        if node.number not in self.nodes:
            self._find(node)
        return self.nodes[node.number]

    def _find(self, start: StackNode) -> None:
        """Find the costs of a stack node and of those that it leads to: from the known ones backwards, the least
        first. Stacks may be deep, and have cycles.
        """
        ways: list[tuple[int, int]] = []  # (cost, number of a node), by a known node
        before: dict[int, list[tuple[int, int]]] = {}  # node -> (cost of the rest of a rule, a node that returns to it)
        unknown, pending = {start.number}, [start]
        while pending:
            deadline.check()
            at = pending.pop()
            for then, parent in at.edges:
                known = self.nodes.get(parent.number)
                if known is not None:
                    ways.append((self.states[then] + known, at.number))
                    continue
                before.setdefault(parent.number, []).append((self.states[then], at.number))
                if parent.number not in unknown:
                    unknown.add(parent.number)
                    pending.append(parent)
        heapq.heapify(ways)
        found: dict[int, int] = {}
        while ways:
            cost, number = heapq.heappop(ways)
            if number not in found:
                found[number] = cost
                for rest, earlier in before.get(number, ()):
                    heapq.heappush(ways, (cost + rest, earlier))
        self.nodes.update({number: found.get(number, _FAR) for number in unknown})

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

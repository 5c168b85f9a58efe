"""JSON objects on the machine: any order of keys, each at most once, several alternatives at a time.

An object under way is a node: the keys seen, and the threads that are still possible. A thread is (tag, spec, what must
still exist, rivals: constants that the object must not become and is like so far); alternatives of one tag are several
threads. Keys that a schema names are bits; other keys are remembered
by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from ramet.grammar.automaton import CONCRETE, DEAD, Table, target
from ramet.grammar.json_schema import distinct
from ramet.grammar.json_schema import values as v
from ramet.grammar.json_schema.behind import MAX_TAGS, ObjectEnd, before_end, behind
from ramet.grammar.json_schema.frames import Context, Json
from ramet.grammar.json_schema.key_frames import KeyFrame, MemoryKeyFrame, mask_keys
from ramet.grammar.json_schema.keys import Space
from ramet.grammar.json_schema.punctuation import CLOSE, GO_ON, next_key_rows, open_object_rows
from ramet.grammar.json_schema.values import FALSE, INFINITE, Const, Exists, Expr

Thread = tuple[int, int, int, tuple[int, ...]]  # tag, spec (index in the space), bits of what must still exist, rivals
Content = frozenset[tuple[str, int]]  # keys and numbers of their values (see distinct.py)


class ObjectNode:
    """An object under way. Interned: `number` identifies it."""

    def __init__(
        self,
        space: Space,
        threads: tuple[Thread, ...],
        seen: int,
        extras: frozenset[str],
        anonymous: int,
        context: Context,
        forgets: bool = False,
        content: Content | None = None,
    ) -> None:
        self.space = space
        self.json = space.json
        self.threads = threads
        self.seen = seen
        self.extras = extras
        self.anonymous = anonymous  # keys read within one token's walk, whose names are not known
        self.context = context
        self.forgets = forgets  # unnamed keys may have come, no matter which: see `mask_twin`
        self.content = content  # where the context asks for the value; None also where some of it is not known
        self.has_rivals = any(rivals for *_, rivals in threads)
        self.number = self.json.new_number()
        # do the keys seen change nothing but that they may not come again?
        self.is_simple = not (self.has_rivals or self.json.ordered) and all(space.is_simple[t[1]] for t in threads)
        self._alive: tuple[int, int] | None = None
        self._twins: list[ObjectNode | None] = [None, None]
        self._mask_keys: list[int | None] = [None, None]
        self._exprs: dict[tuple[object, int], tuple[Expr, ...]] = {}

    def mask_twin(self, forgets: bool) -> ObjectNode:
        """The same in the context's twin. forgets: also without the unnamed keys that came, where they change nothing
        but that they may not come again."""
        found = self._twins[forgets]
        if found is None:
            found = self._twins[forgets] = self._in(self.context.mask_twin(), forgets)
        return found

    def mask_keys(self, is_committed: bool) -> int:
        """The instance where masks of a key's text are walked (see there): what is around the object is not known.
        is_committed: some of the text has been read, so that keys that came are refused by that text."""
        found = self._mask_keys[is_committed]
        if found is None:
            node = self._in(self.json.somewhere, forgets=self.is_simple or bool(self.extras))
            found = self._mask_keys[is_committed] = mask_keys(node, is_committed or not self.has_extras)
        return found

    def _in(self, context: Context, forgets: bool) -> ObjectNode:
        if (forgets or self.forgets) and self.may_forget(self.extras):
            return object_node(self.space, self.threads, self.seen, frozenset(), 0, context, True)
        if context is self.context and self.content is None:
            return self
        return object_node(self.space, self.threads, self.seen, self.extras, self.anonymous, context, self.forgets)

    def may_forget(self, extras: frozenset[str]) -> bool:
        return self.space.may_forget({spec for _, spec, _, _ in self.threads}, extras)

    @property
    def has_extras(self) -> bool:
        """Unnamed keys came before."""
        return self.forgets or bool(self.extras)

    @property
    def count(self) -> int:
        return self.seen.bit_count() + len(self.extras) + self.anonymous

    def needed(self, spec: int, seen: int) -> int:
        """Bits of the names that must still come."""
        space = self.space
        o = space.specs[spec]
        if not o.dependent:
            return space.required[spec] & ~seen
        present = frozenset(k for i, k in enumerate(space.names) if (seen >> i) & 1)
        keys = self.json.expressions.closure_of_keys(o, o.required | present)
        return sum(1 << space.index[k] for k in keys) & ~seen

    def may_finish(self, thread: Thread, seen: int, count: int) -> bool:
        """Can the object still be completed as this thread wants it?"""
        _, spec, exists, rivals = thread
        space, o = self.space, self.space.specs[spec]
        if rivals and not space.may_differ(spec, exists, rivals, seen):
            return False
        if space.is_simple[spec]:
            return True
        needed = self.needed(spec, seen)
        named, others = space.alive(spec)
        if needed & ~named:
            return False
        extra = 0
        for i, x in enumerate(o.exists):
            if (exists >> i) & 1:
                way = self._way_to_exist(spec, x, seen, needed)
                if way is None:
                    return False
                extra += way
        if o.high is not None and count + needed.bit_count() + extra > o.high:
            return False
        return bool(others) or count + (named & ~seen).bit_count() >= o.low

    def _way_to_exist(self, spec: int, x: Exists, seen: int, needed: int) -> int | None:
        """0: a key that must come anyway can be the witness; 1: another one can; None: no way."""
        space, e = self.space, self.json.expressions
        best: int | None = None
        for label in range(space.num_labels):
            if label < len(space.names) and (seen >> label) & 1:
                continue
            if space.in_class(x, label) and not e.is_empty(e.both(space.expr(spec, label), x.expr)):
                if label < len(space.names) and (needed >> label) & 1:
                    return 0
                best = 1
        return best

    def branches(self, label: int) -> list[tuple[Thread, Expr]]:
        """The threads that may read a key of this label, each with what its value must be."""
        space, e = self.space, self.json.expressions
        if self.is_simple:
            values = [(thread, space.expr(thread[1], label)) for thread in self.threads]
            return [(thread, value) for thread, value in values if not e.is_empty(value)]
        seen = self.seen | (1 << label) if label < len(space.names) else self.seen
        count = self.count + 1
        out: list[tuple[Thread, Expr]] = []
        for thread in self.threads:
            tag, spec, exists, rivals = thread
            expr = space.expr(spec, label)
            if expr == FALSE or e.is_empty(expr):
                continue
            o = space.specs[spec]
            if self.json.ordered and not self._in_order(spec, label):
                continue
            named, others = space.alive(spec)
            if not (named >> label if label < len(space.names) else others >> (label - len(space.names))) & 1:
                continue
            witness = [i for i, x in enumerate(o.exists) if (exists >> i) & 1 and space.in_class(x, label)]
            for size in range(len(witness) + 1):
                for chosen in combinations(witness, size):
                    value, left = expr, exists
                    for i in chosen:
                        value = e.both(value, o.exists[i].expr)
                        left &= ~(1 << i)
                    for kind, still in self._ways_to_differ(value, rivals, label):
                        following = (tag, spec, left, still)
                        if not e.is_empty(kind) and self.may_finish(following, seen, count):
                            out.append((following, kind))
        return out

    def _ways_to_differ(
        self, value: Expr, rivals: tuple[int, ...], label: int
    ) -> Iterable[tuple[Expr, tuple[int, ...]]]:
        """The value that a key of this label must have, to become different from some rivals or stay like others."""
        names, constants = self.space.names, self.json.expressions.constants
        if not rivals or label >= len(names):  # the names are also those of the rivals
            return ((value, ()),)
        return constants.split(value, rivals, lambda r: constants.members(r).get(names[label]))

    def exprs(self, label: int) -> tuple[Expr, ...]:
        """What the value of a key of this label must be, for each of the threads that may read it."""
        known = self.space.exprs_of_threads if self.is_simple else self._exprs  # does it depend on the keys seen?
        found = known.get((self.threads, label))
        if found is None:
            found = known[self.threads, label] = tuple(dict.fromkeys(e for _, e in self.branches(label)))
        return found

    def _in_order(self, spec: int, label: int) -> bool:
        """declared_order: after all named keys seen, and not past one that must still come."""
        if label >= len(self.space.names):
            return not self.needed(spec, self.seen)
        behind = (1 << label) - 1
        return self.seen >> label == 0 and not self.has_extras and not self.needed(spec, self.seen) & behind

    def alive(self) -> tuple[int, int]:
        """Labels of the keys that may come: (bits of names, bits of signatures)."""
        if self._alive is None:
            space = self.space
            n = len(space.names)
            named = others = 0
            if self.is_simple:
                for spec in {spec for _, spec, _, _ in self.threads}:
                    a, b = space.alive(spec)
                    named |= a
                    others |= b
                named &= ~self.seen
            else:
                named = sum(1 << i for i in range(n) if not (self.seen >> i) & 1 and self.branches(i))
                others = sum(1 << i for i in range(len(space.signatures)) if self.branches(n + i))
            self._alive = space.possible(named, others, self.extras)
        return self._alive

    def may_close(self, thread: Thread) -> bool:
        _, spec, exists, rivals = thread
        if exists or self.needed(spec, self.seen) or self.count < self.space.specs[spec].low:
            return False
        members = self.json.expressions.constants.members
        return not any(len(members(r)) == self.count for r in rivals)

    def closing_tags(self) -> int:
        """Tags that the object satisfies if it ends here."""
        mask = 0
        for thread in self.threads:
            if self.may_close(thread):
                mask |= 1 << thread[0]
        return mask

    def end(self) -> ObjectEnd:
        named, others = self.alive()
        relevant = self.json.machine.key_starts
        starts: bytes | None = b""
        if relevant and self.space.is_open(others):
            starts = None
        elif relevant:
            starts = relevant if others else bytes(b for b in relevant if named & self.space.names_from(b))
        return ObjectEnd(self.closing_tags(), bool(named or others), starts)

    def close(self) -> int:
        mask = self.closing_tags()
        if not mask:
            return DEAD
        if self.content is None:
            return CONCRETE if self.context.is_anonymous else self.context.resume(mask, None)
        return self.context.resume(mask, ("object", self.content))

    def cost(self, thread: Thread, seen: int) -> int:
        """About the bytes that this thread still has to write, to the end of the text."""
        tag, spec, exists, rivals = thread
        space, e = self.space, self.json.expressions
        needed = self.needed(spec, seen)
        total = 1 + self.context.rest(tag)
        total += sum(20 + 2 * e.cost(x.expr) for i, x in enumerate(space.specs[spec].exists) if (exists >> i) & 1)
        for i in range(needed.bit_length()):
            if (needed >> i) & 1:
                total += len(space.names[i]) + 4 + e.cost(space.expr(spec, i))
        members, count = e.constants.members, seen.bit_count()
        if any(len(members(r)) == count for r in rivals):  # more must come, so that it differs
            total += 1000
        return total + 1000 * self.missing(thread, seen)

    def missing(self, thread: Thread, seen: int) -> int:
        """Keys that must still come, beyond those that are needed by name."""
        _, spec, _, _ = thread
        present = self.needed(spec, seen).bit_count() + seen.bit_count() + len(self.extras) + self.anonymous
        return max(self.space.specs[spec].low - present, 0)

    def key(self) -> int:
        """Target inside the next key, after its opening quote."""
        named, others = self.alive()
        if not named and not others:
            return DEAD
        if self.anonymous and others and not self.space.is_open(others):
            return CONCRETE  # whether a text of this key can be finished depends on the keys that are not known
        kind = MemoryKeyFrame if others else KeyFrame
        return target(self.json.machine.intern(("key", self.number), lambda: kind(self)))

    def any_key(self) -> int:
        """As `key`, but for masks only: unnamed keys are not compared with those seen."""
        key = self.key()
        frame = self.json.machine.frames[key >> 32]
        return target(frame.shared()) if isinstance(frame, MemoryKeyFrame) else key

    def follow(self, label: int, key: str | None) -> int:
        """Target after a key (its name is given where the label is no name and it is known)."""
        context = self.property_context(label, key)
        return self.json.value(context.exprs, context, 0) if context.exprs else DEAD

    def property_context(self, label: int, key: str | None) -> PropertyContext:
        contexts = self.json.property_contexts
        found: PropertyContext | None = contexts.get((self.number, label, key))
        if found is None:
            found = contexts[self.number, label, key] = PropertyContext(self, label, key)
        return found


class PropertyContext:
    """After a property's value."""

    is_anonymous = False
    is_for_masks = False

    def __init__(self, node: ObjectNode, label: int, key: str | None) -> None:
        self.node = node
        self.label = label
        self.key = key
        self.number = node.json.new_number()
        self.remembers = node.content is not None
        branches = node.branches(label)
        self.exprs = tuple(dict.fromkeys(e for _, e in branches))
        self.branches = [(t, self.exprs.index(e)) for t, e in branches]
        is_name = label < len(node.space.names)
        self.seen = node.seen | (1 << label) if is_name else node.seen
        self.extras = node.extras if is_name or key is None else node.extras | {key}
        self.anonymous = node.anonymous + (0 if is_name or key is not None or node.forgets else 1)
        self._twin: Context | None = None
        if key is not None and not is_name:
            node.space.note_key(key, NextFrame.gaps)

    def mask_twin(self) -> Context:
        if self._twin is None:
            self._twin = self._make_twin()
        return self._twin

    def _make_twin(self) -> Context:
        node = self.node
        if not self.anonymous and len(self.exprs) <= MAX_TAGS:
            ends = tuple(self.following(mask).end() for mask in range(1, 1 << len(self.exprs)))
            return behind(node.json, ends, node.context.mask_twin())
        twin = node.mask_twin(forgets=node.forgets or (bool(self.extras) and node.may_forget(self.extras)))
        key = None if twin.forgets else self.key
        return self if twin is node else twin.property_context(self.label, key)

    def rest(self, tag: int) -> int:
        return min(self.node.cost(t, self.seen) for t, i in self.branches if i == tag)

    def following(self, mask: int, content: Content | None = None) -> ObjectNode:
        """The object after a value that satisfies the tags in `mask`."""
        threads = tuple(sorted({t for t, tag in self.branches if (mask >> tag) & 1}))
        node = self.node
        return object_node(
            node.space, threads, self.seen, self.extras, self.anonymous, node.context, node.forgets, content
        )

    def resume(self, mask: int, value: Const | None) -> int:
        return target(before_key(NextFrame, self.following(mask, self._content(value))))

    def _content(self, value: Const | None) -> Content | None:
        """What the object holds after this value."""
        node = self.node
        key = node.space.names[self.label] if self.label < len(node.space.names) else self.key
        if node.content is None or key is None or value is None:
            return None
        return node.content | {(key, node.json.expressions.constants.number(value))}


def object_node(
    space: Space,
    threads: tuple[Thread, ...],
    seen: int,
    extras: frozenset[str],
    anonymous: int,
    context: Context,
    forgets: bool = False,
    content: Content | None = None,
) -> ObjectNode:
    nodes: dict[object, ObjectNode] = space.json.object_nodes
    key = (space.number, threads, seen, extras, anonymous, context.number, forgets, content)
    found = nodes.get(key)
    if found is None:
        found = nodes[key] = ObjectNode(space, threads, seen, extras, anonymous, context, forgets, content)
    return found


def space_of(json: Json, specs: tuple[v.Objects, ...]) -> Space:
    found: Space | None = json.spaces.get(specs)
    if found is None:
        found = json.spaces[specs] = Space(json, specs)
    return found


def prepare(json: Json, spec: v.Objects) -> None:
    """Make what objects of this spec alone will need first; not for patterns, whose automata may take long."""
    if spec.rules or spec.exists:
        return
    space = space_of(json, (spec,))
    space.table(*space.alive(0), frozenset())


def open_object(json: Json, specs: list[tuple[v.Objects, ...]], context: Context) -> int:
    """Target after `{`."""
    pairs = [
        (tag, o) for tag, group in enumerate(specs) for o in group if json.expressions.cost_of_object(o) < INFINITE
    ]
    if not pairs:
        return DEAD
    whole = {o: distinct.without_excluded(json.expressions, o) if o.excluded else o for _, o in pairs}
    bases = tuple(dict.fromkeys(whole.values()))
    space = space_of(json, bases)
    position = {o: i for i, o in enumerate(bases)}
    threads = tuple(
        sorted({(tag, position[whole[o]], (1 << len(o.exists)) - 1, tuple(sorted(o.excluded))) for tag, o in pairs})
    )
    node = object_node(space, threads, 0, frozenset(), 0, context, content=frozenset() if context.remembers else None)
    if context.is_for_masks:
        return before_end(json, node.end(), context, is_open=True)
    return target(before_key(OpenFrame, node))


def before_key(kind: type[OpenFrame], node: ObjectNode, is_shared: bool = False) -> int:
    """The instance before a key. Where unnamed keys were read, masks from here are walked in a shared copy of it, which
    takes any unnamed key; `refused_prefixes` then takes those away that came before."""
    return node.json.machine.intern((kind, node.number, is_shared), lambda: kind(node, is_shared))


class OpenFrame:
    """Right after `{`."""

    gaps: tuple[tuple[bytes, ...], ...] = ((b'"',),)  # for each local state, what may stand up to a key's text

    def __init__(self, node: ObjectNode, is_shared: bool) -> None:
        self.node = node
        self.is_shared = is_shared
        self.table = self.make_table()

    def make_table(self) -> Table:
        return self.node.json.constant_table(open_object_rows, (), 2)

    def resolve(self, exit_index: int) -> int:
        if exit_index == CLOSE:
            return self.node.close()
        return self.node.any_key() if self.is_shared else self.node.key()

    def mask_twin(self, local: int) -> int:
        node = self.node.mask_twin(forgets=bool(self.node.extras))
        return target(before_key(type(self), node, self.is_shared or node.has_extras), local)

    def refused_prefixes(self, local: int) -> list[bytes]:
        """Texts that may not follow here: those that would finish an unnamed key for the second time."""
        extras = self.node.extras
        return self.node.space.endings(local, extras, self.gaps[local]) if extras else []

    def closing_exit(self, local: int) -> int:
        node = self.node
        if local:
            return GO_ON
        costs = [(node.cost(t, node.seen), 0 if node.may_close(t) else 1) for t in node.threads]
        return CLOSE if min(costs)[1] == 0 else GO_ON


class NextFrame(OpenFrame):
    """After a property: `}` or a comma and the next key."""

    gaps = ((b',"', b', "'), (b'"', b' "'), (b'"',))

    def mask_twin(self, local: int) -> int:
        node = self.node
        if local or node.anonymous:
            return super().mask_twin(local)
        return before_end(node.json, node.end(), node.context.mask_twin(), is_open=False)

    def make_table(self) -> Table:
        json = self.node.json
        may_go_on = any(self.node.alive())
        return json.constant_table(next_key_rows, (json.spaced, may_go_on), 2)

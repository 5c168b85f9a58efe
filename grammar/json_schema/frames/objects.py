"""JSON objects on the machine: any order of keys, each at most once, several alternatives at a time.

An object under way is a node: how far it has come (see object_states.py), and where it stands.
"""

from __future__ import annotations

from ramet.grammar.json_schema.algebra import distinct, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import Const, Expr
from ramet.grammar.json_schema.frames.frames import Context, Json
from ramet.grammar.json_schema.frames.key_frames import KeyFrame, MemoryKeyFrame, mask_keys
from ramet.grammar.json_schema.frames.keys import Space
from ramet.grammar.json_schema.frames.lookahead import MAX_TAGS, before_end, behind
from ramet.grammar.json_schema.frames.object_states import ObjectState, Thread
from ramet.grammar.json_schema.frames.punctuation import CLOSE, GO_ON, next_key_rows, open_object_rows
from ramet.grammar.machine.automaton import CONCRETE, DEAD, Table, target

Content = frozenset[tuple[str, int]]  # keys and numbers of their values (see distinct.py)


class ObjectNode:
    """An object under way in its place. Interned: `number` identifies it."""

    def __init__(self, state: ObjectState, context: Context, content: Content | None) -> None:
        self.json = state.json
        self.state = state
        self.context = context
        self.content = content  # where the context asks for the value; None also where some of it is not known
        self.number = state.json.new_number()
        self._twins: list[ObjectNode | None] = [None, None]
        self._mask_keys: list[int | None] = [None, None]

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
            state = self.state
            node = self._in(self.json.somewhere, forgets=state.is_simple or bool(state.extras))
            found = self._mask_keys[is_committed] = mask_keys(node, is_committed or not state.has_extras)
        return found

    def _in(self, context: Context, forgets: bool) -> ObjectNode:
        state = self.state
        if (forgets or state.forgets) and state.may_forget(state.extras):
            return object_node(state.space.state(state.threads, state.seen, frozenset(), 0, True), context)
        if context is self.context and self.content is None:
            return self
        return object_node(state, context)

    def close(self) -> int:
        mask = self.state.closing_tags()
        if not mask:
            return DEAD
        if self.content is None:
            return CONCRETE if self.context.is_anonymous else self.context.resume(mask, None)
        return self.context.resume(mask, ("object", self.content))

    def cost(self, thread: Thread, seen: int) -> int:
        """About the bytes that this thread still has to write, to the end of the text."""
        tag, spec, exists, rivals = thread
        state = self.state
        space, e = state.space, self.json.expressions
        needed = state.needed(spec, seen)
        total = 1 + self.context.rest(tag)
        total += sum(20 + 2 * e.cost(x.expr) for i, x in enumerate(space.specs[spec].exists) if (exists >> i) & 1)
        for i in range(needed.bit_length()):
            if (needed >> i) & 1:
                total += len(space.names[i]) + 4 + e.cost(space.expr(spec, i))
        members, count = e.constants.members, seen.bit_count()
        if any(len(members(r)) == count for r in rivals):  # more must come, so that it differs
            total += 1000
        return total + 1000 * state.missing(thread, seen)

    def key(self) -> int:
        """Target inside the next key, after its opening quote."""
        state = self.state
        named, others = state.alive()
        if not named and not others:
            return DEAD
        if state.anonymous and others and not state.space.is_open(others):
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
        self.exprs, self.branches = node.state.choices(label)
        self.seen, self.extras, self.anonymous = node.state.keys_after(label, key)
        self._twin: Context | None = None
        if self.extras is not node.state.extras and key is not None:
            node.state.space.note_key(key, NextFrame.gaps)

    def mask_twin(self) -> Context:
        if self._twin is None:
            self._twin = self._make_twin()
        return self._twin

    def _make_twin(self) -> Context:
        node, state = self.node, self.node.state
        if not self.anonymous and len(self.exprs) <= MAX_TAGS:
            return behind(node.json, state.ends(self.label, self.key), node.context.mask_twin())
        twin = node.mask_twin(forgets=state.forgets or (bool(self.extras) and state.may_forget(self.extras)))
        key = None if twin.state.forgets else self.key
        return self if twin is node else twin.property_context(self.label, key)

    def rest(self, tag: int) -> int:
        return min(self.node.cost(t, self.seen) for t, i in self.branches if i == tag)

    def resume(self, mask: int, value: Const | None) -> int:
        following = object_node(
            self.node.state.after(self.label, self.key, mask), self.node.context, self._content(value)
        )
        return target(before_key(NextFrame, following))

    def _content(self, value: Const | None) -> Content | None:
        """What the object holds after this value."""
        node, names = self.node, self.node.state.space.names
        key = names[self.label] if self.label < len(names) else self.key
        if node.content is None or key is None or value is None:
            return None
        return node.content | {(key, node.json.expressions.constants.number(value))}


def object_node(state: ObjectState, context: Context, content: Content | None = None) -> ObjectNode:
    nodes: dict[object, ObjectNode] = state.json.object_nodes
    key = (state.number, context.number, content)
    found = nodes.get(key)
    if found is None:
        found = nodes[key] = ObjectNode(state, context, content)
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


def open_object(json: Json, exprs: tuple[Expr, ...], context: Context) -> int:
    """Target after `{` of a value that is one of `exprs`, each a tag."""
    opened: dict[object, ObjectState | None] = json.opened_objects
    if exprs not in opened:
        opened[exprs] = _opened(json, exprs)
    state = opened[exprs]
    if state is None:
        return DEAD
    if context.is_for_masks:
        return before_end(json, state.end(), context, is_open=True)
    return target(before_key(OpenFrame, object_node(state, context, frozenset() if context.remembers else None)))


def _opened(json: Json, exprs: tuple[Expr, ...]) -> ObjectState | None:
    e = json.expressions
    pairs = [(tag, o) for tag, x in enumerate(exprs) for o in specs.objects_of(e, x)]
    if not pairs:
        return None
    if len(pairs) == 1 and not pairs[0][1].excluded:
        tag, o = pairs[0]
        return space_of(json, (o,)).state(((tag, 0, (1 << len(o.exists)) - 1, ()),), 0, frozenset(), 0, False)
    whole = {o: distinct.without_excluded(e, o) if o.excluded else o for _, o in pairs}
    bases = tuple(dict.fromkeys(whole.values()))
    position = {o: i for i, o in enumerate(bases)}
    threads = tuple(
        sorted({(tag, position[whole[o]], (1 << len(o.exists)) - 1, tuple(sorted(o.excluded))) for tag, o in pairs})
    )
    return space_of(json, bases).state(threads, 0, frozenset(), 0, False)


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
        return self.node.json.constant_table(open_object_rows, (True, True), 2)

    def resolve(self, exit_index: int) -> int:
        if exit_index == CLOSE:
            return self.node.close()
        return self.node.any_key() if self.is_shared else self.node.key()

    def mask_twin(self, local: int) -> int:
        node = self.node.mask_twin(forgets=bool(self.node.state.extras))
        return target(before_key(type(self), node, self.is_shared or node.state.has_extras), local)

    def refused_prefixes(self, local: int) -> list[bytes]:
        """Texts that may not follow here: those that would finish an unnamed key for the second time."""
        extras = self.node.state.extras
        return self.node.state.space.endings(local, extras, self.gaps[local]) if extras else []

    def closing_exit(self, local: int) -> int:
        node = self.node
        if local:
            return GO_ON
        state = node.state
        costs = [(node.cost(t, state.seen), 0 if state.may_close(t) else 1) for t in state.threads]
        return CLOSE if min(costs)[1] == 0 else GO_ON


class NextFrame(OpenFrame):
    """After a property: `}` or a comma and the next key."""

    gaps = ((b',"', b', "'), (b'"', b' "'), (b'"',))

    def mask_twin(self, local: int) -> int:
        node = self.node
        if local or node.state.anonymous:
            return super().mask_twin(local)
        return before_end(node.json, node.state.end(), node.context.mask_twin(), is_open=False)

    def make_table(self) -> Table:
        json = self.node.json
        may_go_on = any(self.node.state.alive())
        return json.constant_table(next_key_rows, (json.spaced, may_go_on, True), 2)

"""JSON objects on the machine. Keys come in any order, each at most once, and several alternatives are followed at a
time.

An object that is being read is a node: its state (see object_states.py) and its context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from ramet.grammar.json_schema.algebra import costs, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import INFINITE, TRUE, Const, Expr
from ramet.grammar.json_schema.frames.compilation import Compilation, Context
from ramet.grammar.json_schema.frames.keys import KeySpace, ObjectThread
from ramet.grammar.json_schema.frames.lookahead import (
    MAX_TAGS,
    EndsContext,
    Somewhere,
    any_key_table,
    before_end,
    only_exit,
    place_table,
)
from ramet.grammar.json_schema.frames.object_states import ObjectState
from ramet.grammar.json_schema.frames.tables import BEFORE_COLON, CLOSE, GO_ON
from ramet.grammar.machine.frame import (
    DEAD,
    NEEDS_RUN,
    Frame,
    FrameTable,
    leave,
    path_to_exit,
    target,
    ways_to_exits,
)

Content = frozenset[tuple[str, int]]  # keys, each with the number of its value (see constants.py)
Place = tuple[tuple[Expr, ...], Context]  # the expressions of a value, and its context

# likely ones first; a control character only by an escape
_KEY_BYTES = bytes(dict.fromkeys([*b"abcdefghijklmnopqrstuvwxyz0123456789_-. ", *range(0x23, 0x5C), *range(256)]))


def prepare(compilation: Compilation, spec: v.Objects) -> None:
    """Make what objects of this spec alone will need first. Skips specs with patterns: their automata may take long."""
    if spec.rules or spec.exists:
        return
    space = compilation.once(KeySpace, (costs.closed(compilation.expressions, spec),))
    space.table(*space.alive(0), frozenset())


def open_object(compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> int:
    """Return the target after the opening brace."""
    state = compilation.once(_opened, exprs)
    if state is None:
        return DEAD
    if context.is_for_masks:
        return before_end(compilation, state.end(), context, is_open=True)
    content: Content | None = frozenset() if context.remembers else None
    return target(compilation.frame(ObjectFrame, compilation.once(ObjectNode, state, context, content), True))


def _opened(compilation: Compilation, exprs: tuple[Expr, ...]) -> ObjectState | None:
    e = compilation.expressions
    pairs = [(tag, costs.closed(e, o)) for tag, x in enumerate(exprs) for o in costs.objects_of(e, x)]
    if not pairs:
        return None
    whole = {o: specs.without_excluded(e, o) if o.excluded else o for _, o in pairs}
    bases = tuple(dict.fromkeys(whole.values()))
    position = {o: i for i, o in enumerate(bases)}
    threads = tuple(
        sorted({(tag, position[whole[o]], (1 << len(o.exists)) - 1, tuple(sorted(o.excluded))) for tag, o in pairs})
    )
    return compilation.once(ObjectState, compilation.once(KeySpace, bases), threads, 0, frozenset[str](), 0, False)


class ObjectNode:
    """An object that is being read, in its place.

    content: the properties read so far, if the context asks for the value. None if it does not, or if some are not
    known.
    """

    def __init__(self, compilation: Compilation, state: ObjectState, context: Context, content: Content | None) -> None:
        self.compilation = compilation
        self.state = state
        self.context = context
        self.content = content
        self.depth = compilation.layout.inside(context.depth)
        self._twins: list[ObjectNode | None] = [None, None]
        self._mask_keys: list[int | None] = [None, None]
        self._needed: dict[int, tuple[int, int]] = {}  # by spec: bits of the keys that must still come, their cost

    def mask_twin(self, forgets: bool) -> ObjectNode:
        """Return the same object in the twin of its context.

        forgets: also without the unnamed keys read so far, if their only effect is that they may not come again.
        """
        found = self._twins[forgets]
        if found is None:
            found = self._twins[forgets] = self._in(self.context.mask_twin(), forgets)
        return found

    def mask_keys(self, is_committed: bool) -> int:
        """Return the instance in which the masks of a key's text are made (see MaskKeyFrame). It knows nothing of the
        surroundings.

        is_committed: some of the key's text was read before. That text then decides which earlier keys are refused.
        """
        found = self._mask_keys[is_committed]
        if found is None:
            state = self.state
            node = self._in(self._somewhere(), forgets=state.is_simple or bool(state.extras))
            is_shared = is_committed or not state.has_extras
            found = self._mask_keys[is_committed] = self.compilation.frame(MaskKeyFrame, node, is_shared)
        return found

    def _somewhere(self) -> Context:
        return self.compilation.once(Somewhere, self.context.depth)

    def _in(self, context: Context, forgets: bool) -> ObjectNode:
        state = self.state
        if (forgets or state.forgets) and state.may_forget(state.extras):
            state = self.compilation.once(
                ObjectState, state.space, state.threads, state.seen, frozenset[str](), 0, True
            )
        elif context is self.context and self.content is None:
            return self
        return self.compilation.once(ObjectNode, state, context, None)

    def close(self) -> int:
        """Return the target after the closing brace."""
        value = None if self.content is None else ("object", self.content)
        return self.context.after_bracket(self.state.closing_tags(), value)

    def cost(self, thread: ObjectThread, seen: int) -> int:
        """Estimate the bytes that this thread still has to write, to the end of the text."""
        tag, spec, exists, rivals = thread
        state = self.state
        space, e = state.space, self.compilation.expressions
        total = 1 + self.context.rest(tag) + self._cost_of_needed(spec, seen)
        total += sum(20 + 2 * e.cost(x.expr) for i, x in enumerate(space.specs[spec].exists) if (exists >> i) & 1)
        members, count = e.constants.members, seen.bit_count()
        if any(len(members(r)) == count for r in rivals):  # more keys must come, to differ from a rival
            total += 1000
        return total + 1000 * state.missing(thread, seen)

    def _cost_of_needed(self, spec: int, seen: int) -> int:
        """Return the cost of the named keys that must still come. Cheap if `seen` has few keys more than the state."""
        state = self.state
        now = self._needed.get(spec)
        if now is None:
            needed = state.space.needed(spec, state.seen)
            now = self._needed[spec] = needed, self._cost_of_keys(spec, needed)
        needed = state.space.needed(spec, seen)
        if needed & ~now[0]:
            return self._cost_of_keys(spec, needed)
        return now[1] - self._cost_of_keys(spec, now[0] & ~needed)

    def _cost_of_keys(self, spec: int, keys: int) -> int:
        space, e = self.state.space, self.compilation.expressions
        total = 0
        while keys:
            i = (keys & -keys).bit_length() - 1
            keys &= keys - 1
            total += len(space.names[i]) + 4 + e.cost(space.expr(spec, i))
        return total

    def key(self, is_shared: bool) -> int:
        """Return the target inside the next key, after its opening quote.

        is_shared: for masks; unnamed keys are not compared with earlier keys.
        """
        state = self.state
        named, others = state.alive()
        if not named and not others:
            return DEAD
        if state.anonymous and others and not state.space.is_open(others):
            return NEEDS_RUN  # keys that are not known decide whether a text of this key can be completed
        return target(self.compilation.frame(KeyFrame, self, is_shared and bool(others), b""))

    def follow(self, label: int, key: str | None) -> int:
        """Return the target after a key. key: the text of an unnamed key, None if it is not known."""
        context = self.compilation.once(PropertyContext, self, label, key)
        return self.compilation.value(context.exprs, context, BEFORE_COLON) if context.exprs else DEAD


class PropertyContext(Context):
    """The context of a property's value."""

    def __init__(self, compilation: Compilation, node: ObjectNode, label: int, key: str | None) -> None:
        self.compilation = compilation
        self.node = node
        self.label = label
        self.key = key
        self.depth = node.depth
        self.remembers = node.content is not None
        self.exprs, self.branches = node.state.choices(label)
        self.seen, self.extras, self.anonymous = node.state.keys_after(label, key)
        self._twin: Context | None = None
        self._rests: dict[int, int] = {}
        if self.extras is not node.state.extras and key is not None:
            node.state.space.note_key(key)

    def mask_twin(self) -> Context:
        if self._twin is None:
            self._twin = self._make_twin()
        return self._twin

    def _make_twin(self) -> Context:
        node, state = self.node, self.node.state
        if not self.anonymous and len(self.exprs) <= MAX_TAGS:
            return self.compilation.once(EndsContext, state.ends(self.label, self.key), node.context.mask_twin())
        twin = node.mask_twin(forgets=state.forgets or (bool(self.extras) and state.may_forget(self.extras)))
        key = None if twin.state.forgets else self.key
        return self if twin is node else self.compilation.once(PropertyContext, twin, self.label, key)

    def rest(self, tag: int) -> int:
        found = self._rests.get(tag)
        if found is None:
            found = self._rests[tag] = min(self.node.cost(t, self.seen) for t, i in self.branches if i == tag)
        return found

    def resume(self, mask: int, value: Const | None) -> int:
        state = self.node.state.after(self.label, self.key, mask)
        following = self.compilation.once(ObjectNode, state, self.node.context, self._content(value))
        return target(self.compilation.frame(ObjectFrame, following, False))

    def _content(self, value: Const | None) -> Content | None:
        """Return the properties of the object after this value; None if they are not known."""
        node, names = self.node, self.node.state.space.names
        key = names[self.label] if self.label < len(names) else self.key
        if node.content is None or key is None or value is None:
            return None
        return node.content | {(key, self.compilation.expressions.constants.number(value))}


class ObjectFrame(Frame):
    """A place where an object may end or go on.

    is_open: the place is right after `{`, not after a property. is_shared: masks are made in a copy of the frame that
    accepts every unnamed key, also one that came before. `refused_prefixes` then removes the keys that came.
    """

    def __init__(self, compilation: Compilation, node: ObjectNode, is_open: bool, is_shared: bool = False) -> None:
        self.compilation = compilation
        self.node = node
        self.is_open = is_open
        self.is_shared = is_shared
        state, is_tight = node.state, compilation.layout.is_tight
        # where no white space may stand, the exits alone tell that one of the ways is impossible
        may_go_on = (is_tight and is_open) or any(state.alive())
        may_close = is_tight or bool(state.closing_tags())
        self.table = place_table(compilation, False, is_open, node.depth, may_go_on, may_close)

    def resolve(self, exit_index: int) -> int:
        return self.node.close() if exit_index == CLOSE else self.node.key(self.is_shared)

    def mask_twin(self, local: int) -> int:
        node, state = self.node, self.node.state
        if not self.is_open and not local and not state.anonymous:
            return before_end(self.compilation, state.end(), node.context.mask_twin(), is_open=False)
        twin = node.mask_twin(forgets=bool(state.extras))
        is_shared = self.is_shared or state.has_extras
        return target(self.compilation.frame(ObjectFrame, twin, self.is_open, is_shared), local)

    def refused_prefixes(self, local: int) -> Sequence[bytes]:
        """Return the texts that would complete an unnamed key that came before."""
        extras = self.node.state.extras
        if not extras:
            return ()
        return self.node.state.space.endings_after(self.compilation.once(gaps_before_key, self.table, local), extras)

    def closing_exit(self, local: int) -> int:
        only = only_exit(self.table, local)
        if only is not None:
            return only
        node, state = self.node, self.node.state
        costs = [(node.cost(t, state.seen), 0 if state.may_close(t) else 1) for t in state.threads]
        return CLOSE if min(costs)[1] == 0 else GO_ON


def gaps_before_key(compilation: Compilation, table: FrameTable, local: int) -> frozenset[bytes]:
    """Return what may stand before a key in this place, up to its opening quote, if tokens have it so."""
    return frozenset([gap for gap in compilation.machine.vocabulary.gaps if _opens_key(table, local, gap)])


def _opens_key(table: FrameTable, local: int, gap: bytes) -> bool:
    for byte in gap[:-1]:
        local = int(table.rows[local, table.byte_class[byte]])
        if local < 0:
            return False
    return int(table.rows[local, table.byte_class[gap[-1]]]) == leave(GO_ON)


# --- the text of a key


class KeyFrame(Frame):
    """The text of a key and its closing quote. Exit i is name i; the further exits are the signatures of unnamed keys.

    If unnamed keys may come, the frame has memory, because an unnamed key is identified by its text. The frame in which
    a key begins (is_committed False) serves masks that read the whole text of a key in one token. If a token ends
    inside the key, the text goes on in a copy of the frame that knows the text so far.
    """

    def __init__(self, compilation: Compilation, node: ObjectNode, is_committed: bool, text: bytes) -> None:
        self.compilation = compilation
        self.node = node
        self.is_committed = is_committed
        self.text = text
        self.has_memory = bool(node.state.alive()[1])
        self.table = node.state.table()
        self.num_names = len(node.state.space.names)

    def resolve(self, exit_index: int) -> int:
        node, state = self.node, self.node.state
        if exit_index < self.num_names:
            return DEAD if (state.seen >> exit_index) & 1 else node.follow(exit_index, None)
        if state.anonymous or (state.has_extras and not self.is_committed):
            return NEEDS_RUN
        if not state.space.is_open(state.alive()[1]):  # this key may decide whether a further key can be completed
            return NEEDS_RUN
        return node.mask_twin(forgets=True).follow(exit_index, None)

    def resolve_text(self, exit_index: int, text: bytes, last: bytes) -> int:
        if exit_index < self.num_names:
            return self.resolve(exit_index)
        key = json.loads(b'"' + text + b'"')
        return DEAD if key in self.node.state.extras else self.node.follow(exit_index, key)

    def remember(self, text: bytes) -> int:
        return self.compilation.frame(KeyFrame, self.node, True, text)

    def mask_twin(self, local: int) -> int:
        return target(self.node.mask_keys(self.is_committed), local)

    def refused_prefixes(self, local: int) -> Sequence[bytes]:
        """Return the texts that would complete an unnamed key that came before."""
        extras = self.node.state.extras
        return self.node.state.space.endings(self.text, extras) if extras and self.has_memory else ()

    def closing_exit(self, local: int) -> int:
        """Return a key that some thread needs, if the text so far allows one. The thread with the least cost comes
        first.
        """
        node, state = self.node, self.node.state
        n = self.num_names
        if state.is_simple and len(state.threads) == 1:
            return self._simple_closing_exit(local)
        ways: list[tuple[int, int]] = []
        needed = 0
        for _, spec, _, _ in state.threads:
            needed |= state.space.needed(spec, state.seen)
        reachable = list(self._reachable(local))
        first = [(label, length) for label, length in reachable if label < n and (needed >> label) & 1]
        for label, length in first or reachable:
            for t, e in state.branches(label):
                seen = state.seen | (1 << label) if label < n else state.seen
                cost = node.cost(t, seen) + self.compilation.expressions.cost(e)
                if label >= n and state.missing(t, seen):
                    cost -= 1000  # an unnamed key also counts towards the missing keys
                ways.append((cost + length, label))
        return min(ways)[1]

    def _simple_closing_exit(self, local: int) -> int:
        """Do as `closing_exit` for one thread that only says which keys must come, and that none comes again.

        In whatever order the needed keys come, they take the same number of bytes. So the first one is taken.
        """
        state, expressions = self.node.state, self.compilation.expressions
        ((_, spec, _, _),) = state.threads
        needed = state.space.needed(spec, state.seen)
        least, best = INFINITE, None
        for label, length in self._reachable(local):
            if label < self.num_names and (needed >> label) & 1:
                return label
            if length < least:
                least, best = min((least, best), (length + expressions.cost(state.space.expr(spec, label)), label))
        assert best is not None
        return best

    def _reachable(self, local: int) -> Iterator[tuple[int, int]]:
        """Yield the labels of keys that the text so far may become and that may come, each with the bytes left."""
        state, n = self.node.state, self.num_names
        named, others = state.alive()
        lengths = ways_to_exits(self.table, local).lengths
        for label in np.flatnonzero(lengths >= 0).tolist():
            if not ((named >> label) & 1 if label < n else (others >> (label - n)) & 1):
                continue
            length = int(lengths[label])
            if label >= n and state.extras:
                way = self.closing_way(local, label)
                if way is None:
                    continue
                length = len(way)
            yield label, length

    def closing_way(self, local: int, exit_index: int) -> bytes | None:
        """Return a short text to an exit that makes a key that did not come before."""
        extras = self.node.state.extras
        if exit_index < self.num_names or not extras:
            ways = ways_to_exits(self.table, local)
            return ways.way(exit_index) if ways.lengths[exit_index] >= 0 else None
        rows, byte_class = self.table.rows, self.table.byte_class
        level = [(local, b"")]
        for _ in range(len(extras) + self.table.num_states + 1):
            following = []
            for state, text in level:
                way = path_to_exit(self.table, exit_index, state)
                if way is not None and json.loads(b'"' + self.text + text + way) not in extras:
                    return text + way
                for byte in _KEY_BYTES:
                    to = int(rows[state, byte_class[byte]])
                    if to >= 0:
                        following.append((to, text + bytes((byte,))))
            level = following[: 4 * len(extras) + 4]
        return None


class MaskKeyFrame(Frame):
    """Keys, for masks only. The frame knows nothing of what surrounds the object, so the few tokens that end the object
    are run.

    is_shared: unnamed keys are not compared with earlier keys.
    """

    def __init__(self, compilation: Compilation, node: ObjectNode, is_shared: bool) -> None:
        self.compilation = compilation
        self.node = node
        self.is_shared = is_shared
        self.table = node.state.table()
        self._loop_twin: int | None = None

    def resolve(self, exit_index: int) -> int:
        state = self.node.state
        if exit_index < len(state.space.names):
            if (state.seen >> exit_index) & 1:
                return DEAD
        elif state.anonymous or (state.has_extras and not self.is_shared):
            return NEEDS_RUN
        exprs, context = self._place(exit_index)
        return self.compilation.value(exprs, context, BEFORE_COLON) if exprs else DEAD

    def _place(self, label: int) -> Place:
        """Return the expressions and the context of a key's value."""
        node = self.node
        plainest = self.compilation.expressions.plainest
        if self.compilation.machine.vocabulary.reads_past_values:
            context = self.compilation.once(PropertyContext, node, label, None)
            if not context.anonymous:
                return tuple(map(plainest, context.exprs)), context.mask_twin()
        exprs = tuple(dict.fromkeys(map(plainest, node.state.choices(label)[0])))
        return exprs, self.compilation.once(Somewhere, node.depth)

    def loop_twin(self) -> int | None:
        """Return the loop state of the frame of unnamed keys whose values have the same places."""
        if self._loop_twin is None:
            self._loop_twin = self._find_loop_twin()
        return self._loop_twin

    def _find_loop_twin(self) -> int:
        state, space = self.node.state, self.node.state.space
        if state.anonymous or not self.is_shared:
            return target(self.compilation.frame(MaskKeyFrame, self.node, self.is_shared), self.table.loop)
        places = tuple([self._place(label) for label in range(len(space.names), space.num_labels)])
        if space.languages:
            return target(
                self.compilation.frame(UnnamedKeyFrame, self.table, len(space.names), places), self.table.loop
            )
        table = self.compilation.once(any_key_table)
        return target(self.compilation.frame(UnnamedKeyFrame, table, 0, places), table.loop)


class UnnamedKeyFrame(Frame):
    """Unnamed keys, for masks only. Objects with different named keys share the mask of its loop state.

    places: the places of the values, for the exits from `first` on. The exits before `first` are named keys, which the
    loop state never reaches.
    """

    def __init__(self, compilation: Compilation, table: FrameTable, first: int, places: tuple[Place, ...]) -> None:
        self.compilation = compilation
        self.table = table
        self.first = first
        self.places = places
        # if any value may follow any key, all grammars with these options have the same mask
        ((exprs, context), *others) = places
        is_any = table is compilation.once(any_key_table) and not others and exprs == (TRUE,)
        if is_any and isinstance(context, Somewhere):
            self.loop_key = ("any key", compilation.layout, context.depth, compilation.ordered)

    def resolve(self, exit_index: int) -> int:
        exprs, context = self.places[exit_index - self.first]
        return self.compilation.value(exprs, context, BEFORE_COLON) if exprs else DEAD

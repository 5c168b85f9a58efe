"""The text of an object's key on the machine: named keys, unnamed ones that are remembered, and keys for masks only."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING

from ramet.grammar.json_schema.algebra.values import TRUE
from ramet.grammar.machine.automaton import CONCRETE, DEAD, path_to_exit, target

if TYPE_CHECKING:
    from ramet.grammar.json_schema.algebra.values import Expr
    from ramet.grammar.json_schema.frames.frames import Context, Json
    from ramet.grammar.json_schema.frames.objects import ObjectNode

# likely ones first; a control character only by an escape
_KEY_BYTES = bytes(dict.fromkeys([*b"abcdefghijklmnopqrstuvwxyz0123456789_-. ", *range(0x23, 0x5C), *range(256)]))


def mask_keys(node: ObjectNode, is_shared: bool) -> int:
    """The instance where masks of a key's text are walked. is_shared: unnamed keys are not compared with those seen."""
    return node.json.machine.intern(("mask keys", node.number, is_shared), lambda: MaskKeyFrame(node, is_shared))


class MaskKeyFrame:
    """Keys for masks only: around the object is not known what stands. Few tokens end it; those are run."""

    def __init__(self, node: ObjectNode, is_shared: bool) -> None:
        self.node = node
        self.is_shared = is_shared
        self.table = node.state.table()
        self._loop_twin: int | None = None

    def resolve(self, exit_index: int) -> int:
        node, state = self.node, self.node.state
        if exit_index < len(state.space.names):
            if (state.seen >> exit_index) & 1:
                return DEAD
        elif state.anonymous or (state.has_extras and not self.is_shared):
            return CONCRETE
        exprs, context = self._value(exit_index)
        return node.json.value(exprs, context, 0) if exprs else DEAD

    def _value(self, label: int) -> tuple[tuple[Expr, ...], Context]:
        """What the value of a key must be, and where it stands."""
        node = self.node
        plainest = node.json.expressions.plainest
        if node.json.machine.reads_past_values:
            context = node.property_context(label, None)
            if not context.anonymous:
                return tuple(map(plainest, context.exprs)), context.mask_twin()
        return tuple(dict.fromkeys(map(plainest, node.state.choices(label)[0]))), node.json.somewhere

    def loop_twin(self) -> int:
        """The state that has the mask of the loop state (see Table): unnamed keys with values of the same kinds."""
        if self._loop_twin is None:
            self._loop_twin = self._find_loop_twin()
        return self._loop_twin

    def _find_loop_twin(self) -> int:
        node, state, space = self.node, self.node.state, self.node.state.space
        if state.anonymous or not self.is_shared:
            return target(mask_keys(node, self.is_shared), self.table.loop)
        if not space.languages:
            return any_key(node.json, *self._value(len(space.names)))
        values = [self._value(label) for label in range(len(space.names), space.num_labels)]
        places = tuple((exprs, context.number) for exprs, context in values)
        key = ("loop of keys", space.number, id(self.table), places)
        return target(node.json.machine.intern(key, lambda: MaskKeyFrame(node, True)), self.table.loop)

    def closing_exit(self, local: int) -> int:
        raise AssertionError("texts are closed from where they stand")


def any_key(json: Json, exprs: tuple[Expr, ...], context: Context) -> int:
    """Target inside a key of any text whose value is one of these, for masks."""
    key = ("any key", exprs, context.number)
    return target(json.machine.intern(key, lambda: AnyKeyFrame(json, exprs, context)))


class AnyKeyFrame:
    """Keys without names, for masks only: the same for all objects that take any key."""

    def __init__(self, json: Json, exprs: tuple[Expr, ...], context: Context) -> None:
        self.json = json
        self.exprs = exprs
        self.context = context
        self.table = json.any_key_table()
        # where any value may follow, all grammars with these options have the same mask
        is_any = exprs == (TRUE,) and context is json.somewhere
        self.loop_key = ("any key", json.spaced, json.ordered) if is_any else None

    def resolve(self, exit_index: int) -> int:
        return self.json.value(self.exprs, self.context, 0) if self.exprs else DEAD

    def closing_exit(self, local: int) -> int:
        raise AssertionError("texts are closed from where they stand")


class KeyFrame:
    """The text of a key and its closing quote."""

    is_committed = False

    def __init__(self, node: ObjectNode) -> None:
        self.node = node
        self.table = node.state.table()

    def mask_twin(self, local: int) -> int:
        return target(self.node.mask_keys(self.is_committed), local)

    def resolve(self, exit_index: int) -> int:
        state = self.node.state
        if exit_index < len(state.space.names) and (state.seen >> exit_index) & 1:
            return DEAD
        return self.node.follow(exit_index, None)

    def closing_exit(self, local: int) -> int:
        """A key that some thread needs, if the text read so far allows one; the thread with the least to do first."""
        node, state = self.node, self.node.state
        named, others = state.alive()
        ways = []
        for label in range(state.space.num_labels):
            n = len(state.space.names)
            if not ((named >> label) & 1 if label < n else (others >> (label - n)) & 1):
                continue
            way = self.closing_way(local, label)
            if way is None:
                continue
            seen = state.seen | (1 << label) if label < n else state.seen
            for t, e in state.branches(label):
                cost = node.cost(t, seen) + node.json.expressions.cost(e)
                if label >= n and state.missing(t, seen):
                    cost -= 1000  # a key without a name counts, too
                ways.append((cost + len(way), label))
        return min(ways)[1]

    def closing_way(self, local: int, exit_index: int) -> bytes | None:
        return path_to_exit(self.table, exit_index, local)


class MemoryKeyFrame(KeyFrame):
    """Keys that are not named may come: what was read is needed to know the key.

    The frame as entered is for masks that read a key's whole text within one token; once a token ends inside the key,
    the state stands in a copy that knows the text so far (`is_committed`).
    """

    text = b""

    def resolve(self, exit_index: int) -> int:
        node, state = self.node, self.node.state
        if exit_index < len(state.space.names):
            return super().resolve(exit_index)
        if state.anonymous or (state.has_extras and not self.is_committed):
            return CONCRETE
        if not state.space.is_open(state.alive()[1]):  # whether a further key can be finished may depend on this one
            return CONCRETE
        return node.mask_twin(forgets=True).follow(exit_index, None)

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        if exit_index < len(self.node.state.space.names):
            return self.resolve(exit_index)
        key = json_module.loads(b'"' + text + b'"')
        return DEAD if key in self.node.state.extras else self.node.follow(exit_index, key)

    def closing_way(self, local: int, exit_index: int) -> bytes | None:
        """A short way to an exit that makes a key which is not there yet."""
        extras = self.node.state.extras
        if exit_index < len(self.node.state.space.names) or not extras:
            return path_to_exit(self.table, exit_index, local)
        rows, byte_class = self.table.rows, self.table.byte_class
        level = [(local, b"")]
        for _ in range(len(extras) + self.table.num_states + 1):
            following = []
            for state, text in level:
                way = path_to_exit(self.table, exit_index, state)
                if way is not None and json_module.loads(b'"' + self.text + text + way) not in extras:
                    return text + way
                for byte in _KEY_BYTES:
                    to = int(rows[state, byte_class[byte]])
                    if to >= 0:
                        following.append((to, text + bytes((byte,))))
            level = following[: 4 * len(extras) + 4]
        return None

    def shared(self) -> int:
        """The copy whose masks all copies with a text share."""
        return self.node.json.machine.intern(("key text", self.node.number), lambda: self._copy(None))

    def remember(self, text: bytes) -> int:
        machine = self.node.json.machine
        return machine.intern(("key text", self.node.number, text), lambda: self._copy(text))

    def _copy(self, text: bytes | None) -> MemoryKeyFrame:
        """With a text, or (None) the copy whose masks all others share."""
        copy = object.__new__(MemoryKeyFrame)
        copy.node, copy.table, copy.is_committed = self.node, self.table, True
        copy.text = text or b""
        return copy

    def refused_prefixes(self, local: int) -> list[bytes]:
        """Texts that may not follow here: those that would finish a key for the second time."""
        extras = self.node.state.extras
        return self.node.state.space.endings(self.text, extras, ()) if extras else []

"""JSON arrays on the machine: positions, counts of `contains`, and items that must differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import costs, distinct, specs
from ramet.grammar.json_schema.algebra.values import Arrays, Const, Expr
from ramet.grammar.json_schema.frames.compilation import Compilation, Context, TextContext
from ramet.grammar.json_schema.frames.lookahead import (
    MAX_TAGS,
    End,
    EndsContext,
    before_end,
    only_exit,
    place_table,
)
from ramet.grammar.json_schema.frames.tables import AFTER_COMMA, AT_VALUE, CLOSE, GO_ON
from ramet.grammar.machine.frame import DEAD, REFUSE, Frame, target

# a spec that an array may still satisfy: tag, spec, number of items found for each `contains`, rivals (constants
# that the array must not become, and that it equals so far)
ArrayThread = tuple[int, Arrays, tuple[int, ...], tuple[int, ...]]
ArrayChoices = tuple[tuple[Expr, ...], list[tuple[ArrayThread, int]]]
_MAX_AT_ONCE = 1 << 12  # items; arrays that need more are completed item by item, up to the time limit
Items = tuple[int, ...]  # numbers of the items (see constants.py)


class ArrayState:
    """How much of an array was read, apart from its place. So what may follow is computed once for all places.

    threads: the specs that the array may still satisfy. index: number of items read, counted until no thread
    distinguishes positions. seen: numbers of the items that must not come again.
    """

    def __init__(
        self, compilation: Compilation, threads: tuple[ArrayThread, ...], index: int, seen: frozenset[int]
    ) -> None:
        self.compilation = compilation
        self.threads = threads
        self.index = index
        self.seen = seen
        self.compares = any(spec.unique or spec.repeats for _, spec, _, _ in threads)
        self._choices: ArrayChoices | None = None
        self._is_free: bool | None = None
        self._end: End | None = None
        self._ends: tuple[End, ...] | None = None

    def choices(self) -> ArrayChoices:
        """Return (the expressions of the next item, the threads that may read it).

        Each thread has the index of its expression.
        """
        if self._choices is None:
            branches = self._branches()
            exprs = tuple(dict.fromkeys([e for _, e in branches]))
            self._choices = exprs, [(t, exprs.index(e)) for t, e in branches]
        return self._choices

    def _branches(self) -> list[tuple[ArrayThread, Expr]]:
        e, index = self.compilation.expressions, self.index
        out: list[tuple[ArrayThread, Expr]] = []
        for thread in self.threads:
            tag, spec, counts, rivals = thread
            if not rivals and spec.is_plain:  # as below, but there is nothing to compare or to count
                value = specs.item(spec, index)
                if (spec.high is None or index < spec.high) and not e.is_empty(value):
                    out.append((thread, value))
                continue
            for value, after in specs.item_choices(e, spec, index, counts):
                for compared, rest in distinct.compared(e, spec, index, after, value, self.seen):
                    for kind, still in e.constants.split(compared, rivals, self._item_of):
                        following = (tag, rest, after, still)
                        if not e.is_empty(kind) and self.may_finish(following, index + 1):
                            out.append((following, kind))
        return out

    def _item_of(self, rival: int) -> int | None:
        """Return the item that a rival has at the index of the next item; None if the rival ends before it."""
        items = self.compilation.expressions.constants.items(rival)
        return items[self.index] if self.index < len(items) else None

    def may_finish(self, thread: ArrayThread, index: int) -> bool:
        """Tell whether the array can still be completed to satisfy this thread."""
        _, spec, counts, rivals = thread
        e = self.compilation.expressions
        if rivals:
            return distinct.array_may_differ(e, spec, rivals, index, counts)
        return distinct.may_fill(e, spec, index, counts, self.seen)

    def is_free(self) -> bool:
        """Tell whether the array can go on, whatever items came before, with any item of a kind that is free."""
        if self._is_free is None:
            self._is_free = self._find_is_free()
        return self._is_free

    def _find_is_free(self) -> bool:
        e = self.compilation.expressions
        if any(rivals or (spec.repeats and not distinct.is_endless(e, spec)) for _, spec, _, rivals in self.threads):
            return False
        exprs = {x for _, spec, _, _ in self.threads if spec.unique for x in (*spec.prefix[self.index :], spec.rest)}
        return all(distinct.has_free_kind(e, x) for x in exprs)

    def may_close(self, thread: ArrayThread) -> bool:
        _, spec, counts, rivals = thread
        if spec.repeats or not specs.may_close(spec, self.index, counts):
            return False
        if not rivals:
            return True
        items = self.compilation.expressions.constants.items
        return not any(len(items(r)) == self.index for r in rivals)

    def closing_tags(self) -> int:
        """Return the tags that the array satisfies if it ends here."""
        mask = 0
        for thread in self.threads:
            if self.may_close(thread):
                mask |= 1 << thread[0]
        return mask

    def end(self) -> End:
        if self._end is None:
            plainest = self.compilation.expressions.plainest
            item = tuple(dict.fromkeys([plainest(e) for e in self.choices()[0]]))
            self._end = End.of_array(self.closing_tags(), item)
        return self._end

    def ends(self) -> tuple[End, ...]:
        """Return, at index mask - 1, what may follow an item that satisfies the tags in `mask`."""
        if self._ends is None:
            masks = range(1, 1 << len(self.choices()[0]))
            self._ends = tuple([self.after(mask, self.seen).end() for mask in masks])
        return self._ends

    def after(self, mask: int, seen: frozenset[int]) -> ArrayState:
        """Return the array after an item that satisfies the tags in `mask`."""
        threads = tuple(dict.fromkeys([t for t, tag in self.choices()[1] if (mask >> tag) & 1]))
        index = min(self.index + 1, max([self._last_index(t) for t in threads], default=0))
        if threads == self.threads and index == self.index and seen == self.seen:
            return self
        return self.compilation.once(ArrayState, threads, index, seen)

    def _last_index(self, thread: ArrayThread) -> int:
        """Return the index from which on a thread treats all positions alike."""
        _, spec, _, rivals = thread
        items = self.compilation.expressions.constants.items
        last = specs.last_index(spec)
        return max(last, *(len(items(r)) + 1 for r in rivals)) if rivals else last


class ArrayNode:
    """An array that is being read, in its place.

    anonymous: the number of earlier items that must not come again and are not known, because a walk over the
    vocabulary read them. items: all items so far, if the context asks for the value. None if it does not, or if some
    are not known.
    """

    def __init__(
        self, compilation: Compilation, state: ArrayState, anonymous: int, context: Context, items: Items | None
    ) -> None:
        self.compilation = compilation
        self.state = state
        self.anonymous = anonymous
        self.context = context
        self.items = items
        self.depth = compilation.layout.inside(context.depth)

    def mask_twin(self) -> ArrayNode:
        """Return the same array in the twin of its context."""
        context = self.context.mask_twin()
        if context is self.context and self.items is None:
            return self
        return self.compilation.once(ArrayNode, self.state, self.anonymous, context, None)

    def close(self) -> int:
        """Return the target after the closing bracket."""
        value = None if self.items is None else ("array", self.items)
        return self.context.after_bracket(self.state.closing_tags(), value)

    def cost(self, thread: ArrayThread, index: int) -> int:
        """Estimate the bytes that this thread still has to write, to the end of the text."""
        tag, spec, counts, rivals = thread
        e = self.compilation.expressions
        total = 1 + self.context.rest(tag)
        if spec.repeats or any(len(e.constants.items(r)) == index for r in rivals):  # more items must come
            total += 1000
        if spec.contains:
            return total + costs.of_witness(e, spec) * (specs.items_needed(e, spec, index, counts) or 0)
        missing = max(spec.low - index, 0)
        known = [e.cost(specs.item(spec, index + i)) + 1 for i in range(min(missing, len(spec.prefix) + 1))]
        return total + sum(known) + (missing - len(known)) * (known[-1] if known else 0)

    def item_context(self) -> ItemContext:
        return self.compilation.once(ItemContext, self)

    def item(self, local: int) -> int:
        exprs, _ = self.state.choices()
        return self.compilation.value(exprs, self.item_context(), local) if exprs else DEAD


class ItemContext(Context):
    """The context of an item."""

    def __init__(self, compilation: Compilation, node: ArrayNode) -> None:
        self.compilation = compilation
        self.node = node
        self.depth = node.depth
        state = node.state
        self.remembers = state.compares or node.items is not None
        if self.remembers:  # so that a walk need not look at what the array refuses after each of many values
            table = place_table(compilation, True, False, node.depth, may_go_on=True, may_close=True)
            self.following = bytes(np.flatnonzero(table.rows[0, table.byte_class] != REFUSE).tolist())
        # if earlier items can make it impossible to complete a text, the text can only continue after a known item
        self.is_anonymous = state.compares and (node.anonymous > 0 or not state.is_free())
        self.must_differ = state.compares and node.anonymous > 0
        self._twin: Context | None = None
        self._rests: dict[int, int] = {}

    def mask_twin(self) -> Context:
        if self._twin is None:
            self._twin = self._make_twin()
        return self._twin

    def _make_twin(self) -> Context:
        node, state = self.node, self.node.state
        if state.compares or len(state.choices()[0]) > MAX_TAGS:
            return node.mask_twin().item_context()
        return self.compilation.once(EndsContext, state.ends(), node.context.mask_twin())

    def rest(self, tag: int) -> int:
        found = self._rests.get(tag)
        if found is None:
            state = self.node.state
            costs = [self.node.cost(t, state.index + 1) for t, i in state.choices()[1] if i == tag]
            found = self._rests[tag] = min(costs)
        return found

    def resume(self, mask: int, value: Const | None) -> int:
        node, state = self.node, self.node.state
        seen, anonymous, items = state.seen, node.anonymous, node.items
        if value is None:
            anonymous += int(state.compares)
            items = None
        elif self.remembers:
            number = self.compilation.expressions.constants.number(value)
            seen = seen | {number} if state.compares else seen
            items = None if items is None else (*items, number)
        following = self.compilation.once(ArrayNode, state.after(mask, seen), anonymous, node.context, items)
        return target(self.compilation.frame(ArrayFrame, following, False))


def _different_items(compilation: Compilation, expr: Expr, count: int, depth: int) -> tuple[tuple[int, bytes], ...]:
    """Return up to `count` different values of an expression, short ones, with their texts at a depth of the layout."""
    e, machine = compilation.expressions, compilation.machine
    out: list[tuple[int, bytes]] = []
    for number in distinct.specimens(e, expr, count)[:count]:
        deadline.check()
        text = e.constants.scalar_text(number)
        if text is None:
            only, context = e.both(expr, e.constants.expr(number)), TextContext(target(machine.done), 0, depth)
            out.append((number, machine.closing_bytes(compilation.value((only,), context, AT_VALUE))))
        else:
            out.append((number, text.encode()))
    return tuple(out)


def open_array(compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> int:
    """Return the target after the opening bracket."""
    state = compilation.once(_opened, exprs)
    if not state.threads:
        return DEAD
    if context.is_for_masks:
        return before_end(compilation, state.end(), context, is_open=True)
    node = compilation.once(ArrayNode, state, 0, context, () if context.remembers else None)
    return target(compilation.frame(ArrayFrame, node, True))


def _opened(compilation: Compilation, exprs: tuple[Expr, ...]) -> ArrayState:
    threads: list[ArrayThread] = []
    for tag, expr in enumerate(exprs):
        for a in costs.arrays_of(compilation.expressions, expr):
            whole = replace(a, excluded=frozenset()) if a.excluded else a
            threads.append((tag, whole, (0,) * len(a.contains), tuple(sorted(a.excluded))))
    return compilation.once(ArrayState, tuple(threads), 0, frozenset[int]())


class ArrayFrame(Frame):
    """A place where an array may end or go on. is_open: the place is right after `[`, not after an item."""

    def __init__(self, compilation: Compilation, node: ArrayNode, is_open: bool) -> None:
        self.compilation = compilation
        self.node = node
        self.is_open = is_open
        state = node.state
        # without white space, the exits alone tell that one of the ways is impossible
        may_go_on = compilation.layout.is_tight or bool(state.choices()[0])
        may_close = compilation.layout.is_tight or bool(state.closing_tags())
        self.table = place_table(compilation, True, is_open, node.depth, may_go_on, may_close)

    def mask_twin(self, local: int) -> int:
        node = self.node
        outer = node.context.mask_twin()
        if not self.is_open:
            return before_end(self.compilation, node.state.end(), outer, is_open=False, local=local)
        exprs = tuple(map(self.compilation.expressions.plainest, node.state.choices()[0]))
        end, inner = End.of_array(node.state.closing_tags(), exprs), node.item_context().mask_twin()
        return before_end(self.compilation, end, outer, is_open=True, inner=inner, local=local)

    def resolve(self, exit_index: int) -> int:
        return self.node.close() if exit_index == CLOSE else self.node.item(AT_VALUE if self.is_open else AFTER_COMMA)

    def closing_exit(self, local: int) -> int:
        only = only_exit(self.table, local)
        if only is not None:
            return only
        node, state = self.node, self.node.state
        costs = [(node.cost(t, state.index), 0 if state.may_close(t) else 1) for t in state.threads]
        return CLOSE if min(costs)[1] == 0 else GO_ON

    def closing_jump(self, local: int) -> tuple[bytes, int] | None:
        """Write all missing different items at once. One by one, each would need a table without all the others."""
        node, state, layout = self.node, self.node.state, self.compilation.layout
        tags = {tag for tag, _, _, _ in state.threads}
        if self.is_open or local or node.anonymous or len(tags) > 1:
            return None
        ways = [self._missing(thread) for thread in state.threads]
        chosen = min([way for way in ways if way], key=len, default=None)
        if chosen is None:
            return None
        comma = layout.in_between.shortest + b"," + layout.after_comma(node.depth).shortest
        text = b"".join([comma + text for _, text in chosen]) + layout.before_bracket(node.depth).shortest + b"]"
        value = None if node.items is None else ("array", (*node.items, *(number for number, _ in chosen)))
        after = node.context.resume(1 << tags.pop(), value)
        return (text, after) if after >= 0 else None

    def _missing(self, thread: ArrayThread) -> list[tuple[int, bytes]] | None:
        """Return different items with which the array satisfies a thread, if all that counts is how many there are."""
        state = self.node.state
        _, spec, counts, rivals = thread
        missing = spec.low - state.index
        if not spec.unique or spec.repeats or rivals or missing <= 0 or state.index < len(spec.prefix):
            return None
        if spec.low > _MAX_AT_ONCE:
            return None
        if any(count < c.low or c.high is not None for c, count in zip(spec.contains, counts, strict=True)):
            return None
        items = self.compilation.once(_different_items, spec.rest, spec.low, self.node.depth)
        chosen = [item for item in items if item[0] not in state.seen][:missing]
        return chosen if len(chosen) == missing else None

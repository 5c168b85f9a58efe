"""JSON arrays on the machine: positions, counts of `contains`, items that must differ."""

from __future__ import annotations

from dataclasses import replace

from ramet.grammar.automaton import CONCRETE, DEAD, target
from ramet.grammar.json_schema import distinct, specs
from ramet.grammar.json_schema.behind import MAX_TAGS, ArrayEnd, before_end, behind
from ramet.grammar.json_schema.frames import Context, Json
from ramet.grammar.json_schema.punctuation import CLOSE, GO_ON, next_item_rows, open_array_rows
from ramet.grammar.json_schema.values import INFINITE, Arrays, Const, Expr

# tag, spec, items found of each `contains`, constants that the array must not become and is like so far
Thread = tuple[int, Arrays, tuple[int, ...], tuple[int, ...]]
Items = tuple[int, ...]  # their numbers (see distinct.py)


class ArrayNode:
    """An array under way. `index`: items read, no further than any thread can tell; `seen`: numbers of those that must
    not come again; `anonymous`: how many of these are not known; `items`: all of them, where the context asks for the
    value; None also where some are not known.
    """

    def __init__(
        self,
        json: Json,
        threads: tuple[Thread, ...],
        index: int,
        seen: frozenset[int],
        anonymous: int,
        context: Context,
        items: Items | None,
    ) -> None:
        self.json = json
        self.threads = threads
        self.index = index
        self.seen = seen
        self.anonymous = anonymous
        self.context = context
        self.items = items
        self.number = json.new_number()
        self.compares = any(spec.unique or spec.repeats for _, spec, _, _ in threads)
        self._item: ItemContext | None = None
        self._twin: ArrayNode | None = None

    def mask_twin(self) -> ArrayNode:
        """The same in the context's twin."""
        if self._twin is None:
            context = self.context.mask_twin()
            self._twin = (
                self
                if context is self.context and self.items is None
                else array_node(self.json, self.threads, self.index, self.seen, self.anonymous, context, None)
            )
        return self._twin

    def branches(self) -> list[tuple[Thread, Expr]]:
        """The threads that may read one more item, each with what it must be."""
        e, index = self.json.expressions, self.index
        out: list[tuple[Thread, Expr]] = []
        for tag, spec, counts, rivals in self.threads:
            for value, after in specs.item_choices(e, spec, index, counts):
                for compared, rest in distinct.compared(e, spec, index, after, value, self.seen):
                    for kind, still in e.constants.split(compared, rivals, self._item_of):
                        thread = (tag, rest, after, still)
                        if not e.is_empty(kind) and self.may_finish(thread, index + 1):
                            out.append((thread, kind))
        return out

    def _item_of(self, rival: int) -> int | None:
        """The item of a constant in the place of the next one."""
        items = self.json.expressions.constants.items(rival)
        return items[self.index] if self.index < len(items) else None

    def may_finish(self, thread: Thread, index: int) -> bool:
        """Can the array still be completed as this thread wants it?"""
        _, spec, counts, rivals = thread
        e = self.json.expressions
        if rivals:
            return distinct.array_may_differ(e, spec, rivals, index, counts)
        return distinct.may_fill(e, spec, index, counts, self.seen)

    def is_free(self) -> bool:
        """Can no item from here on be stuck because of those before it?"""
        e = self.json.expressions
        if any(rivals or (spec.repeats and not distinct.is_endless(e, spec)) for _, spec, _, rivals in self.threads):
            return False
        exprs = {x for _, spec, _, _ in self.threads if spec.unique for x in (*spec.prefix[self.index :], spec.rest)}
        return all(distinct.is_free(e, x) for x in exprs)

    def may_close(self, thread: Thread) -> bool:
        _, spec, counts, rivals = thread
        items = self.json.expressions.constants.items
        if spec.repeats or not specs.may_close(spec, self.index, counts):
            return False
        return not any(len(items(r)) == self.index for r in rivals)

    def closing_tags(self) -> int:
        """Tags that the array satisfies if it ends here."""
        mask = 0
        for thread in self.threads:
            if self.may_close(thread):
                mask |= 1 << thread[0]
        return mask

    def end(self) -> ArrayEnd:
        exprs = map(self.json.expressions.plainest, self.item_context().exprs)
        return ArrayEnd(self.closing_tags(), tuple(dict.fromkeys(exprs)))

    def close(self) -> int:
        mask = self.closing_tags()
        if not mask:
            return DEAD
        if self.items is None:
            return CONCRETE if self.context.is_anonymous else self.context.resume(mask, None)
        return self.context.resume(mask, ("array", self.items))

    def cost(self, thread: Thread, index: int) -> int:
        """About the bytes that this thread still has to write, to the end of the text."""
        tag, spec, counts, rivals = thread
        e = self.json.expressions
        total = 1 + self.context.rest(tag)
        if spec.repeats or any(len(e.constants.items(r)) == index for r in rivals):  # more must come
            total += 1000
        if spec.contains:
            return total + e.cost_of_witness(spec) * (specs.items_needed(e, spec, index, counts) or 0)
        missing = max(spec.low - index, 0)
        known = [e.cost(specs.item(spec, index + i)) + 1 for i in range(min(missing, len(spec.prefix) + 1))]
        return total + sum(known) + (missing - len(known)) * (known[-1] if known else 0)

    def item_context(self) -> ItemContext:
        if self._item is None:
            self._item = ItemContext(self)
        return self._item

    def item(self, local: int) -> int:
        context = self.item_context()
        return self.json.value(context.exprs, context, local) if context.exprs else DEAD


class ItemContext:
    """After an item."""

    def __init__(self, node: ArrayNode) -> None:
        self.node = node
        self.number = node.json.new_number()
        self.is_for_masks = False
        self.remembers = node.compares or node.items is not None
        # where some text can be stuck because of what came before, an item must be known to go on
        self.is_anonymous = node.compares and (node.anonymous > 0 or not node.is_free())
        branches = node.branches()
        self.exprs = tuple(dict.fromkeys(e for _, e in branches))
        self.branches = [(t, self.exprs.index(e)) for t, e in branches]
        self._twin: Context | None = None

    def mask_twin(self) -> Context:
        if self._twin is None:
            self._twin = self._make_twin()
        return self._twin

    def _make_twin(self) -> Context:
        node = self.node
        if node.compares or len(self.exprs) > MAX_TAGS:
            return node.mask_twin().item_context()
        masks = range(1, 1 << len(self.exprs))
        ends = tuple(self.following(mask, node.seen, node.anonymous, None).end() for mask in masks)
        return behind(node.json, ends, node.context.mask_twin())

    def rest(self, tag: int) -> int:
        return min(self.node.cost(t, self.node.index + 1) for t, i in self.branches if i == tag)

    def following(self, mask: int, seen: frozenset[int], anonymous: int, items: Items | None) -> ArrayNode:
        """The array after an item that satisfies the tags in `mask`."""
        node = self.node
        threads = tuple(dict.fromkeys(t for t, tag in self.branches if (mask >> tag) & 1))
        return array_node(node.json, threads, node.index + 1, seen, anonymous, node.context, items)

    def resume(self, mask: int, value: Const | None) -> int:
        node = self.node
        seen, anonymous, items = node.seen, node.anonymous, node.items
        if value is None:
            anonymous += int(node.compares)
            items = None
        elif self.remembers:
            number = node.json.expressions.constants.number(value)
            seen = seen | {number} if node.compares else seen
            items = None if items is None else (*items, number)
        return target(before_item(NextFrame, self.following(mask, seen, anonymous, items)))


def array_node(
    json: Json,
    threads: tuple[Thread, ...],
    index: int,
    seen: frozenset[int],
    anonymous: int,
    context: Context,
    items: Items | None,
) -> ArrayNode:
    index = min(index, max((_last_index(json, t) for t in threads), default=0))
    nodes = json.array_nodes
    key = (threads, index, seen, anonymous, context.number, items)
    found = nodes.get(key)
    if found is None:
        found = nodes[key] = ArrayNode(json, threads, index, seen, anonymous, context, items)
    return found


def _last_index(json: Json, thread: Thread) -> int:
    """From this index on a thread cannot tell positions apart."""
    _, spec, _, rivals = thread
    return max(specs.last_index(spec), *(len(json.expressions.constants.items(r)) + 1 for r in rivals), 0)


def open_array(json: Json, specs: list[tuple[Arrays, ...]], context: Context) -> int:
    """Target after `[`."""
    threads = tuple(
        (tag, replace(a, excluded=frozenset()), (0,) * len(a.contains), tuple(sorted(a.excluded)))
        for tag, group in enumerate(specs)
        for a in group
        if json.expressions.cost_of_array(a) < INFINITE
    )
    if not threads:
        return DEAD
    node = array_node(json, threads, 0, frozenset(), 0, context, () if context.remembers else None)
    if context.is_for_masks:
        return before_end(json, node.end(), context, is_open=True)
    return target(before_item(OpenFrame, node))


def before_item(kind: type[OpenFrame], node: ArrayNode) -> int:
    """The instance where an item may begin."""
    return node.json.machine.intern((kind, node.number), lambda: kind(node))


class OpenFrame:
    """Right after `[`."""

    def __init__(self, node: ArrayNode) -> None:
        self.node = node
        self.table = node.json.constant_table(open_array_rows, (), 2)

    def mask_twin(self, local: int) -> int:
        node = self.node
        item = node.item_context()
        exprs = tuple(map(node.json.expressions.plainest, item.exprs))
        end = ArrayEnd(node.closing_tags(), exprs)
        return before_end(node.json, end, node.context.mask_twin(), is_open=True, inner=item.mask_twin())

    def resolve(self, exit_index: int) -> int:
        return self.node.close() if exit_index == CLOSE else self.node.item(2)

    def closing_exit(self, local: int) -> int:
        node = self.node
        costs = [(node.cost(t, node.index), 0 if node.may_close(t) else 1) for t in node.threads]
        return CLOSE if min(costs)[1] == 0 else GO_ON


class NextFrame(OpenFrame):
    """After an item: `]` or a comma."""

    def __init__(self, node: ArrayNode) -> None:
        self.node = node
        self.table = node.json.constant_table(next_item_rows, (), 2)

    def mask_twin(self, local: int) -> int:
        node = self.node
        return before_end(node.json, node.end(), node.context.mask_twin(), is_open=False)

    def resolve(self, exit_index: int) -> int:
        return self.node.close() if exit_index == CLOSE else self.node.item(1)

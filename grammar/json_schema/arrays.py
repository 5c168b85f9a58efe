"""JSON arrays on the machine: positions, counts of `contains`, items that must differ."""

from __future__ import annotations

from ramet.grammar import numeric
from ramet.grammar.automaton import DEAD, target
from ramet.grammar.json_schema import specs
from ramet.grammar.json_schema import values as v
from ramet.grammar.json_schema.behind import MAX_TAGS, ArrayEnd, before_end, behind
from ramet.grammar.json_schema.expressions import INFINITE, MANY
from ramet.grammar.json_schema.frames import Context, Json
from ramet.grammar.json_schema.punctuation import CLOSE, GO_ON, next_item_rows, open_array_rows
from ramet.grammar.json_schema.values import Arrays, Expr, Strings, Values
from ramet.grammar.numeric import Numbers

Thread = tuple[int, Arrays, tuple[int, ...]]  # tag, spec, items found of each `contains`


class ArrayNode:
    """An array under way. `index`: items read, no further than any thread can tell; `seen`: scalars that may not come
    again.
    """

    def __init__(
        self,
        json: Json,
        threads: tuple[Thread, ...],
        index: int,
        seen: frozenset[object],
        anonymous: int,
        context: Context,
    ) -> None:
        self.json = json
        self.threads = threads
        self.index = index
        self.seen = seen
        self.anonymous = anonymous
        self.context = context
        self.number = json.new_number()
        self.is_unique = any(spec.unique for _, spec, _ in threads)
        self._item: ItemContext | None = None
        self._twin: ArrayNode | None = None

    def mask_twin(self) -> ArrayNode:
        """The same in the context's twin."""
        if self._twin is None:
            context = self.context.mask_twin()
            self._twin = (
                self
                if context is self.context
                else array_node(self.json, self.threads, self.index, self.seen, self.anonymous, context)
            )
        return self._twin

    def branches(self) -> list[tuple[Thread, Expr]]:
        """The threads that may read one more item, each with what it must be."""
        e = self.json.expressions
        out: list[tuple[Thread, Expr]] = []
        fresh = e.of_values(all_but(self.seen)) if self.seen else v.TRUE
        for tag, spec, counts in self.threads:
            for value, after in specs.item_choices(e, spec, self.index, counts):
                if spec.unique:
                    value = e.both(value, fresh)
                thread = (tag, spec, after)
                if self.may_finish(thread, self.index + 1) and not e.is_empty(value):
                    out.append((thread, value))
        return out

    def may_finish(self, thread: Thread, index: int) -> bool:
        """Can the array still be completed as this thread wants it?"""
        _, spec, counts = thread
        if spec.contains and specs.items_needed(self.json.expressions, spec, index, counts) is None:
            return False
        missing = spec.low - index
        if missing > 0 and spec.unique:
            used = len(self.seen) + 1 + self.anonymous
            return self.json.expressions.count(spec.rest) + len(spec.prefix) >= missing + used
        return True

    def has_few_values(self) -> bool:
        """Can items that may not come again run out?"""
        count = self.json.expressions.count
        return any(
            spec.unique and any(count(e) < MANY for e in (*spec.prefix, spec.rest)) for _, spec, _ in self.threads
        )

    def may_close(self, thread: Thread) -> bool:
        _, spec, counts = thread
        return specs.may_close(spec, self.index, counts)

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
        return self.context.resume(mask, None) if mask else DEAD

    def cost(self, thread: Thread, index: int) -> int:
        """About the bytes that this thread still has to write, to the end of the text."""
        tag, spec, counts = thread
        e = self.json.expressions
        total = 1 + self.context.rest(tag)
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
        self.remembers = node.is_unique
        # which values are left matters where there are few: what a scalar was must then be known to go on
        self.is_anonymous = bool(node.anonymous) or (self.remembers and node.has_few_values())
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
        if node.is_unique or len(self.exprs) > MAX_TAGS:
            return node.mask_twin().item_context()
        masks = range(1, 1 << len(self.exprs))
        ends = tuple(self.following(mask, node.seen, node.anonymous).end() for mask in masks)
        return behind(node.json, ends, node.context.mask_twin())

    def rest(self, tag: int) -> int:
        return min(self.node.cost(t, self.node.index + 1) for t, i in self.branches if i == tag)

    def following(self, mask: int, seen: frozenset[object], anonymous: int) -> ArrayNode:
        """The array after an item that satisfies the tags in `mask`."""
        node = self.node
        threads = tuple(dict.fromkeys(t for t, tag in self.branches if (mask >> tag) & 1))
        return array_node(node.json, threads, node.index + 1, seen, anonymous, node.context)

    def resume(self, mask: int, value: object | None) -> int:
        seen, anonymous = self.node.seen, self.node.anonymous
        if self.remembers:
            seen, anonymous = (seen, anonymous + 1) if value is None else (seen | {value}, anonymous)
        return target(before_item(NextFrame, self.following(mask, seen, anonymous)))


def array_node(
    json: Json, threads: tuple[Thread, ...], index: int, seen: frozenset[object], anonymous: int, context: Context
) -> ArrayNode:
    index = min(index, max((specs.last_index(spec) for _, spec, _ in threads), default=0))
    nodes = json.array_nodes
    key = (threads, index, seen, anonymous, context.number)
    found = nodes.get(key)
    if found is None:
        found = nodes[key] = ArrayNode(json, threads, index, seen, anonymous, context)
    return found


def open_array(json: Json, specs: list[tuple[Arrays, ...]], context: Context) -> int:
    """Target after `[`."""
    threads = tuple(
        (tag, a, (0,) * len(a.contains))
        for tag, group in enumerate(specs)
        for a in group
        if json.expressions.cost_of_array(a) < INFINITE
    )
    if not threads:
        return DEAD
    node = array_node(json, threads, 0, frozenset(), 0, context)
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
        return before_end(node.json, node.end(), node.context.mask_twin(), is_open=type(self) is OpenFrame)

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

    def resolve(self, exit_index: int) -> int:
        return self.node.close() if exit_index == CLOSE else self.node.item(1)


def all_but(seen: frozenset[object]) -> Values:
    """All values but these scalars: ("string", text), ("number", fraction), ("bool", b), ("null", None)."""
    texts = frozenset(x[1] for x in seen if x[0] == "string")  # type: ignore[index]
    numbers = frozenset(x[1] for x in seen if x[0] == "number")  # type: ignore[index]
    booleans = 3
    for x in seen:
        if x[0] == "bool":  # type: ignore[index]
            booleans &= ~(2 if x[1] else 1)  # type: ignore[index]
    return Values(
        not any(x[0] == "null" for x in seen),  # type: ignore[index]
        booleans,
        (Numbers(excluded=numbers) if numbers else numeric.ANY,),
        (Strings(excluded=texts) if texts else v.ANY_STRINGS,),
        (v.ANY_OBJECTS,),
        (v.ANY_ARRAYS,),
    )

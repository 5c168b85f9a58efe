"""How much of a JSON object was read, apart from its place: which keys may follow, and whether it may end.

A state consists of the keys that came and of the *threads*. A thread is a spec that the object may still satisfy. It
also holds the `exists` conditions of its spec that no key has satisfied yet. And it holds its rivals: the constants
that the object must not become, and that it equals so far. A tag with several specs has several threads.

A *named* key, which some spec names, is stored as a bit. An *unnamed* key is stored as its text.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from ramet.grammar.json_schema.algebra.values import FALSE, Exists, Expr
from ramet.grammar.json_schema.frames.compilation import Compilation
from ramet.grammar.json_schema.frames.keys import KeySpace, ObjectChoices, ObjectThread
from ramet.grammar.json_schema.frames.lookahead import End
from ramet.grammar.machine.frame import FrameTable


class ObjectState:
    """The state of an object. What may follow is computed once for all objects in the same state.

    threads: the specs that the object may still satisfy. seen: bits of the named keys that came. extras: the unnamed
    keys that came. anonymous: how many unnamed keys were read by a walk over the vocabulary, so that their texts are
    not known. forgets: unnamed keys may have come, but the state does not hold them (see ObjectNode.mask_twin).
    """

    def __init__(
        self,
        compilation: Compilation,
        space: KeySpace,
        threads: tuple[ObjectThread, ...],
        seen: int,
        extras: frozenset[str],
        anonymous: int,
        forgets: bool,
    ) -> None:
        self.space = space
        self.compilation = compilation
        self.threads = threads
        self.seen = seen
        self.extras = extras
        self.anonymous = anonymous
        self.forgets = forgets
        self.has_extras = forgets or bool(extras)  # unnamed keys came before
        self.count = seen.bit_count() + len(extras) + anonymous
        # True: the only effect of the keys seen is that they may not come again
        self.is_simple = space.are_simple(threads)
        self._alive: tuple[int, int] | None = None
        self._closing_tags: int | None = None
        self._end: End | None = None
        self._table: FrameTable | None = None
        # answers that do not depend on the keys seen are shared by all states of the space
        self._choices = space.choices_of_threads if self.is_simple else {}
        self._ends: dict[tuple[int, str | None], tuple[End, ...]] = {}

    def may_forget(self, extras: frozenset[str]) -> bool:
        return self.space.may_forget({spec for _, spec, _, _ in self.threads}, extras)

    def may_finish(self, thread: ObjectThread, seen: int, count: int) -> bool:
        """Tell whether the object can still be completed to satisfy this thread."""
        _, spec, exists, rivals = thread
        space, o = self.space, self.space.specs[spec]
        if rivals and not space.may_differ(spec, exists, rivals, seen):
            return False
        if space.is_simple[spec]:
            return True
        needed = self.space.needed(spec, seen)
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
        """Return how many extra keys an `exists` needs; None if no key can satisfy it.

        0: a key that must come anyway can satisfy it. 1: another key can.
        """
        space, e = self.space, self.compilation.expressions
        best: int | None = None
        for label in range(space.num_labels):
            if label < len(space.names) and (seen >> label) & 1:
                continue
            if space.in_class(x, label) and not e.is_empty(e.both(space.expr(spec, label), x.expr)):
                if label < len(space.names) and (needed >> label) & 1:
                    return 0
                best = 1
        return best

    def branches(self, label: int) -> list[tuple[ObjectThread, Expr]]:
        """Return the threads that may read a key of this label, each with the expression of its value."""
        space, e = self.space, self.compilation.expressions
        if self.is_simple:
            values = [(thread, space.expr(thread[1], label)) for thread in self.threads]
            return [(thread, value) for thread, value in values if not e.is_empty(value)]
        seen = self.seen | (1 << label) if label < len(space.names) else self.seen
        count = self.count + 1
        out: list[tuple[ObjectThread, Expr]] = []
        for thread in self.threads:
            tag, spec, exists, rivals = thread
            expr = space.expr(spec, label)
            if expr == FALSE or e.is_empty(expr):
                continue
            o = space.specs[spec]
            if self.compilation.ordered and not self._in_order(spec, label):
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
        """Yield what the value of a key of this label must be, to become different from some rivals or stay like the
        others.
        """
        names, constants = self.space.names, self.compilation.expressions.constants
        if not rivals or label >= len(names):  # the keys of the rivals are among the names
            return ((value, ()),)
        return constants.split(value, rivals, lambda r: constants.members(r).get(names[label]))

    def choices(self, label: int) -> ObjectChoices:
        """Return (the expressions of the value of a key of this label, the threads that may read it).

        Each thread has the index of its expression.
        """
        found = self._choices.get((self.threads, label))
        if found is None:
            branches = self.branches(label)
            if len(branches) == 1:
                thread, expr = branches[0]
                found = (expr,), [(thread, 0)]
            else:
                exprs = tuple(dict.fromkeys(e for _, e in branches))
                found = exprs, [(t, exprs.index(e)) for t, e in branches]
            self._choices[self.threads, label] = found
        return found

    def keys_after(self, label: int, key: str | None) -> tuple[int, frozenset[str], int]:
        """Return (seen, extras, anonymous) after one more key. key: the text of an unnamed key, None if it is not
        known.
        """
        if label < len(self.space.names):
            return self.seen | (1 << label), self.extras, self.anonymous
        if key is not None:
            return self.seen, self.extras | {key}, self.anonymous
        return self.seen, self.extras, self.anonymous + (0 if self.forgets else 1)

    def after(self, label: int, key: str | None, mask: int) -> ObjectState:
        """Return the object after a property whose value satisfies the tags in `mask`."""
        choices = self.choices(label)[1]
        if len(choices) == 1:
            threads: tuple[ObjectThread, ...] = (choices[0][0],)
        else:
            threads = tuple(sorted({t for t, tag in choices if (mask >> tag) & 1}))
        seen, extras, anonymous = self.keys_after(label, key)
        return self.compilation.once(ObjectState, self.space, threads, seen, extras, anonymous, self.forgets)

    def ends(self, label: int, key: str | None) -> tuple[End, ...]:
        """Return, at index mask - 1, what may follow a property's value that satisfies the tags in `mask`."""
        found = self._ends.get((label, key))
        if found is None:
            masks = range(1, 1 << len(self.choices(label)[0]))
            found = self._ends[label, key] = tuple([self.after(label, key, mask).end() for mask in masks])
        return found

    def _in_order(self, spec: int, label: int) -> bool:
        """Tell whether the declared order allows a key: it comes after all named keys seen, and skips no key that must
        come.
        """
        if label >= len(self.space.names):
            return not self.space.needed(spec, self.seen)
        earlier = (1 << label) - 1
        return self.seen >> label == 0 and not self.has_extras and not self.space.needed(spec, self.seen) & earlier

    def alive(self) -> tuple[int, int]:
        """Return the labels of the keys that may come: (bits of names, bits of signatures)."""
        if self._alive is None:
            space = self.space
            n = len(space.names)
            named = others = 0
            if self.is_simple:
                for _, spec, _, _ in self.threads:
                    a, b = space.alive(spec)
                    named |= a
                    others |= b
                named &= ~self.seen
            else:
                named = sum(1 << i for i in range(n) if not (self.seen >> i) & 1 and self.branches(i))
                others = sum(1 << i for i in range(len(space.signatures)) if self.branches(n + i))
            self._alive = space.possible(named, others, self.extras)
        return self._alive

    def table(self) -> FrameTable:
        """Return the table that reads the next key."""
        if self._table is None:
            self._table = self.space.table(*self.alive(), self.extras)
        return self._table

    def may_close(self, thread: ObjectThread) -> bool:
        _, spec, exists, rivals = thread
        if exists or self.space.needed(spec, self.seen) or self.count < self.space.specs[spec].low:
            return False
        members = self.compilation.expressions.constants.members
        return not any(len(members(r)) == self.count for r in rivals)

    def closing_tags(self) -> int:
        """Return the tags that the object satisfies if it ends here."""
        mask = self._closing_tags
        if mask is None:
            mask = 0
            for thread in self.threads:
                if not self.space.required[thread[1]] & ~self.seen if self.is_simple else self.may_close(thread):
                    mask |= 1 << thread[0]
            self._closing_tags = mask
        return mask

    def end(self) -> End:
        if self._end is None:
            named, others = self.alive()
            relevant = self.compilation.machine.vocabulary.key_starts
            starts: bytes | None = b""
            if relevant and self.space.is_open(others):
                starts = None
            elif relevant:
                starts = relevant if others else bytes(b for b in relevant if named & self.space.names_from(b))
            self._end = End(self.closing_tags(), bool(named or others), starts=starts)
        return self._end

    def missing(self, thread: ObjectThread, seen: int) -> int:
        """Return how many keys must still come, beyond those that are needed by name."""
        _, spec, _, _ = thread
        present = self.space.needed(spec, seen).bit_count() + seen.bit_count() + len(self.extras) + self.anonymous
        return max(self.space.specs[spec].low - present, 0)

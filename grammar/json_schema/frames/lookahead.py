"""What follows a value as far as masks look at it, so that values in different places share their masks.

After a value come closing brackets, a comma, and the next key or item. A token that ends a value seldom reads further
than the first byte of that key or item. So a mask depends on little of what surrounds the value: on which brackets may
close, and on how the next key or item may begin. A value whose surroundings agree in that has one *mask twin* (see
Frame.mask_twin), which stands in a context of this module: masks are made there, once. The few tokens that read further
are run one by one from the value itself.

No text ever stands in these frames and contexts.
"""

from __future__ import annotations

from typing import NamedTuple

from ramet.grammar.json_schema.algebra.values import Const, Expr
from ramet.grammar.json_schema.frames.compilation import Compilation, Context
from ramet.grammar.json_schema.frames.tables import (
    CLOSE,
    any_key_rows,
    key_start_rows,
    next_item_rows,
    next_key_rows,
    open_array_rows,
    open_object_rows,
    unread_rows,
)
from ramet.grammar.machine.frame import NEEDS_RUN, Frame, FrameTable, target

MAX_TAGS = 2  # a value with more tags has a twin of its own: 2 ** tags sets of them would have to be looked at


class MaskFrame(Frame):
    """A frame for masks only."""

    def closing_exit(self, local: int) -> int:
        raise AssertionError("texts are closed from where they stand")


class MaskContext(Context):
    """A context for masks only."""

    is_for_masks = True

    def rest(self, tag: int) -> int:
        raise AssertionError("texts are closed from where they stand")


class Somewhere(MaskContext):
    """Nothing is known of what follows: tokens that end the value are run."""

    def __init__(self, compilation: Compilation) -> None:
        pass

    def resume(self, mask: int, value: Const | None) -> int:
        return NEEDS_RUN


class UnreadFrame(MaskFrame):
    """A text into which masks do not look: tokens that read on in it are run."""

    def __init__(self, compilation: Compilation) -> None:
        self.table = compilation.constant_table(unread_rows, (), 1)

    def resolve(self, exit_index: int) -> int:
        return NEEDS_RUN


class KeyStartFrame(MaskFrame):
    """A key of which masks look at the first byte only.

    starts: the bytes with which it may begin, of those that any token has after a comma and a quote; None where it may
    be any text.
    """

    def __init__(self, compilation: Compilation, starts: bytes | None) -> None:
        if starts is None:
            self.table = compilation.once(any_key_table)
        else:
            refused = bytes(b for b in compilation.machine.vocabulary.key_starts if b not in starts)
            self.table = compilation.constant_table(key_start_rows, (refused,), 1)

    def resolve(self, exit_index: int) -> int:
        return NEEDS_RUN


def any_key_table(compilation: Compilation) -> FrameTable:
    """The table of keys that may be any text; it has one exit."""
    return compilation.string_table(any_key_rows(), 1)


class ObjectEnd(NamedTuple):
    """What may follow in an object. tags: those that it satisfies if it ends here, 0 where it may not; may_go_on: a key
    may come; starts: how that key may begin, see KeyStartFrame."""

    tags: int
    may_go_on: bool
    starts: bytes | None


class ArrayEnd(NamedTuple):
    """What may follow in an array. tags: those that it satisfies if it ends here, 0 where it may not; item: what the
    next item must be."""

    tags: int
    item: tuple[Expr, ...]


End = ObjectEnd | ArrayEnd


class EndsContext(MaskContext):
    """Of a value, only what follows in its object or array is known, and what follows that.

    ends[mask - 1]: what follows a value that satisfies the tags in `mask`. outer: the context of the object or array.
    """

    def __init__(self, compilation: Compilation, ends: tuple[End, ...], outer: Context) -> None:
        self.compilation = compilation
        self.ends = ends
        self.outer = outer

    def resume(self, mask: int, value: Const | None) -> int:
        return before_end(self.compilation, self.ends[mask - 1], self.outer, is_open=False)


def before_end(
    compilation: Compilation, end: End, outer: Context, *, is_open: bool, inner: Context | None = None
) -> int:
    """Target where an object or array may end.

    is_open: right after its opening bracket, else after a property or an item. inner: the context of the next item;
    left out, nothing is known of what follows the item.
    """
    inner = inner or compilation.once(Somewhere)
    return target(compilation.frame(EndFrame, end, outer, is_open, inner))


class EndFrame(MaskFrame):
    """The bracket that closes an object or array, or what leads to its next key or item."""

    def __init__(self, compilation: Compilation, end: End, outer: Context, is_open: bool, inner: Context) -> None:
        self.compilation = compilation
        self.inner = inner
        self.end = end
        self.outer = outer
        self.is_open = is_open
        may_close = bool(end.tags)
        if isinstance(end, ArrayEnd):
            rows = open_array_rows if is_open else next_item_rows
            self.table = compilation.constant_table(rows, (bool(end.item), may_close), 2)
        elif is_open:
            self.table = compilation.constant_table(open_object_rows, (end.may_go_on, may_close), 2)
        else:
            self.table = compilation.constant_table(next_key_rows, (compilation.spaced, end.may_go_on, may_close), 2)

    def resolve(self, exit_index: int) -> int:
        end = self.end
        if exit_index == CLOSE:
            return NEEDS_RUN if self.outer.is_anonymous else self.outer.resume(end.tags, None)
        if isinstance(end, ArrayEnd):
            return self.compilation.value(end.item, self.inner, 2 if self.is_open else 1)
        return target(self.compilation.frame(KeyStartFrame, end.starts))

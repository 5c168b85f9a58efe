"""The text after a value, described only as far as masks read it, so that values in different places share masks.

After a value come closing brackets, a comma, and the next key or item. A token that ends a value rarely reads past the
first byte of that key or item. So a mask depends on little of the surroundings: which brackets may close, and how the
next key or item may begin. Values whose surroundings agree in this have one *mask twin* (see Frame.mask_twin). The twin
has a context of this module, and its mask is made once. The few tokens that read further are run one by one from the
value itself.

For example, the strings of {"type": "object", "additionalProperties": {"type": "string"}} have the same twin, whatever
keys came before: after each of them, the object may end or go on with any key.

No text ever gets to these frames and contexts.
"""

from __future__ import annotations

from typing import NamedTuple

from ramet.grammar.json_schema.algebra.values import Const, Expr
from ramet.grammar.json_schema.frames.compilation import Compilation, Context
from ramet.grammar.json_schema.frames.tables import (
    AFTER_COMMA,
    AT_VALUE,
    CLOSE,
    GO_ON,
    next_item_rows,
    next_key_rows,
    open_array_rows,
    open_object_rows,
    unread_rows,
)
from ramet.grammar.machine.frame import NEEDS_RUN, Frame, FrameTable, OneWayFrame, path_to_exit, target
from ramet.grammar.regular.strings import any_string_content

MAX_TAGS = 2  # a value with more tags is its own twin: otherwise 2 ** tags sets of tags would have to be compared


class Somewhere(Context):
    """A context of which only the depth is known. A token that ends the value is checked by running it."""

    is_for_masks = True

    def __init__(self, compilation: Compilation, depth: int) -> None:
        self.depth = depth

    def resume(self, mask: int, value: Const | None) -> int:
        return NEEDS_RUN


def unread(compilation: Compilation, refused: bytes = b"") -> int:
    """Return the target at a text of which masks read the first byte alone: any but the refused ones.

    Tokens that read on are checked by running them.
    """
    return _unread(compilation, compilation.constant_table(unread_rows, (refused,), 1))


def _unread(compilation: Compilation, table: FrameTable) -> int:
    return target(compilation.frame(_made_unread, table))


def _made_unread(compilation: Compilation, table: FrameTable) -> OneWayFrame:
    return OneWayFrame(table, NEEDS_RUN)


def any_key_table(compilation: Compilation) -> FrameTable:
    """Return the table of keys that may be any text. It has one exit."""
    return compilation.string_table(any_string_content(), 1)


class End(NamedTuple):
    """What may follow in an array or object.

    tags: the tags that it satisfies if it ends here, 0 if it may not end. may_go_on: a further item or key may follow.
    item: the expressions of the next item of an array; None in an object. starts: the bytes with which the next key of
    an object may begin, among those that follow a comma and a quote in some token; None: the key may be any text.
    """

    tags: int
    may_go_on: bool
    item: tuple[Expr, ...] | None = None
    starts: bytes | None = None

    @staticmethod
    def of_array(tags: int, item: tuple[Expr, ...]) -> End:
        return End(tags, bool(item), item)


class EndsContext(Context):
    """A context that knows only what may follow in the object or array around the value, and the context around that.

    ends[mask - 1]: what follows a value that satisfies the tags in `mask`. outer: the context of the object or array.
    """

    is_for_masks = True

    def __init__(self, compilation: Compilation, ends: tuple[End, ...], outer: Context) -> None:
        self.compilation = compilation
        self.ends = ends
        self.outer = outer
        self.depth = compilation.layout.inside(outer.depth)

    def resume(self, mask: int, value: Const | None) -> int:
        return before_end(self.compilation, self.ends[mask - 1], self.outer, is_open=False)


def before_end(
    compilation: Compilation, end: End, outer: Context, *, is_open: bool, inner: Context | None = None, local: int = 0
) -> int:
    """Return the target at a place where an object or array may end.

    is_open: the place is right after the opening bracket, not after a property or an item. inner: the context of the
    next item; by default, nothing is known of what follows the item. local: a state of the white space in that place.
    """
    inner = inner or compilation.once(Somewhere, compilation.layout.inside(outer.depth))
    return target(compilation.frame(EndFrame, end, outer, is_open, inner), local)


def place_table(
    compilation: Compilation, is_array: bool, is_open: bool, depth: int, may_go_on: bool, may_close: bool
) -> FrameTable:
    """Return the table of a place where an object or array may end or go on. Its exits are GO_ON and CLOSE.

    depth: of the items or properties.
    """
    if is_array:
        rows = open_array_rows if is_open else next_item_rows
    else:
        rows = open_object_rows if is_open else next_key_rows
    return compilation.constant_table(rows, (compilation.layout, depth, may_go_on, may_close), 2)


def only_exit(table: FrameTable, local: int) -> int | None:
    """Return the exit of such a table that is still possible in a state; None if both are."""
    possible = [exit_index for exit_index in (GO_ON, CLOSE) if path_to_exit(table, exit_index, local) is not None]
    return possible[0] if len(possible) == 1 else None


class EndFrame(Frame):
    """The bracket that closes an object or array, or the comma before its next key or item."""

    def __init__(self, compilation: Compilation, end: End, outer: Context, is_open: bool, inner: Context) -> None:
        self.compilation = compilation
        self.inner = inner
        self.end = end
        self.outer = outer
        self.is_open = is_open
        self.table = place_table(
            compilation, end.item is not None, is_open, inner.depth, end.may_go_on, may_close=bool(end.tags)
        )

    def resolve(self, exit_index: int) -> int:
        end = self.end
        if exit_index == CLOSE:
            return NEEDS_RUN if self.outer.is_anonymous else self.outer.resume(end.tags, None)
        compilation = self.compilation
        if end.item is not None:
            return compilation.value(end.item, self.inner, AT_VALUE if self.is_open else AFTER_COMMA)
        if end.starts is None:
            return _unread(compilation, compilation.once(any_key_table))
        return unread(compilation, bytes(b for b in compilation.machine.vocabulary.key_starts if b not in end.starts))

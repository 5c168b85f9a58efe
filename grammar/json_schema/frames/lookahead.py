"""What follows a value, as far as the tokens that end it can see: for masks only.

After a value stand closing brackets, then a comma, then the next key or item. Which of them may stand there is nearly
all that a mask of the value depends on; hardly any token ends a value and reads on beyond the first byte of the next
key or item, and those that do are run one by one. So values in places with the same brackets share their masks, however
different the objects around them are.
"""

from __future__ import annotations

from typing import NamedTuple

from ramet.grammar.json_schema.algebra.values import Const, Expr
from ramet.grammar.json_schema.frames.frames import Context, Json
from ramet.grammar.json_schema.frames.punctuation import (
    CLOSE,
    next_item_rows,
    next_key_rows,
    open_array_rows,
    open_object_rows,
)
from ramet.grammar.machine.automaton import CONCRETE, target

MAX_TAGS = 2  # of a value, up to which the places behind it are looked at one by one


class ObjectEnd(NamedTuple):
    """Before a key: tags of the object if it ends here, 0 where it may not; whether a key may come; with which bytes
    it may begin, of those that matter (see Json.key_start)."""

    tags: int
    may_go_on: bool
    starts: bytes | None


class ArrayEnd(NamedTuple):
    """Before an item: tags of the array if it ends here, 0 where it may not; what the next item must be."""

    tags: int
    item: tuple[Expr, ...]


End = ObjectEnd | ArrayEnd


class Behind:
    """Context of a value. ends[m - 1]: what follows a value that satisfies the tags in m. outer: the context, of this
    kind or the text's own, of the object or array that the value stands in."""

    remembers = False
    is_anonymous = False
    is_for_masks = True

    def __init__(self, json: Json, ends: tuple[End, ...], outer: Context) -> None:
        self.json = json
        self.ends = ends
        self.outer = outer
        self.number = json.new_number()

    def resume(self, mask: int, value: Const | None) -> int:
        return before_end(self.json, self.ends[mask - 1], self.outer, is_open=False)

    def rest(self, tag: int) -> int:
        raise AssertionError("texts are closed from where they stand")

    def mask_twin(self) -> Context:
        return self


def behind(json: Json, ends: tuple[End, ...], outer: Context) -> Behind:
    found: Behind | None = json.behind.get((ends, outer.number))
    if found is None:
        found = json.behind[ends, outer.number] = Behind(json, ends, outer)
    return found


def before_end(json: Json, end: End, outer: Context, *, is_open: bool, inner: Context | None = None) -> int:
    """Target where an object or array may end; is_open: right after its opening bracket.

    inner: the context of the next item, where tokens that begin here are to be looked at; else it stands somewhere.
    """
    inner = inner or json.somewhere
    key = ("end", type(end), end, outer.number, is_open, inner.number)
    return target(json.machine.intern(key, lambda: EndFrame(json, end, outer, is_open, inner)))


class EndFrame:
    """After an opening bracket, a property or an item."""

    def __init__(self, json: Json, end: End, outer: Context, is_open: bool, inner: Context) -> None:
        self.json = json
        self.inner = inner
        self.end = end
        self.outer = outer
        self.is_open = is_open
        may_close = bool(end.tags)
        if isinstance(end, ArrayEnd):
            rows = open_array_rows if is_open else next_item_rows
            self.table = json.constant_table(rows, (bool(end.item), may_close), 2)
        elif is_open:
            self.table = json.constant_table(open_object_rows, (end.may_go_on, may_close), 2)
        else:
            self.table = json.constant_table(next_key_rows, (json.spaced, end.may_go_on, may_close), 2)

    def resolve(self, exit_index: int) -> int:
        end = self.end
        if exit_index == CLOSE:
            return CONCRETE if self.outer.is_anonymous else self.outer.resume(end.tags, None)
        if isinstance(end, ArrayEnd):
            return self.json.value(end.item, self.inner, 2 if self.is_open else 1)
        return self.json.key_start(end.starts)

    def closing_exit(self, local: int) -> int:
        raise AssertionError("texts are closed from where they stand")

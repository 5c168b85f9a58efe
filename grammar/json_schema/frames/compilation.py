"""One compilation of JSON schemas: the objects that its frames share, and the frame at the beginning of a value.

A value may have to satisfy one of several expressions, for example because of `anyOf`. They are followed side by side.
Each expression is a *tag*: bit `t` of a mask stands for expression `t`. When the value ends, its context gets the mask
of the tags that the value satisfies. The mask is never 0. The context then goes on with the alternatives that these
tags still allow. So there is one configuration, however many alternatives there are. With

    {"anyOf": [{"properties": {"a": {"type": "integer"}}},
               {"properties": {"a": {"type": "number"}}, "required": ["b"]}]}

the value of "a" has two tags. 1 satisfies both (mask 0b11), and the object may end. 1.5 satisfies only the second one
(mask 0b10), and a key "b" must follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.json_schema.algebra import costs, distinct
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.values import INFINITE, Const, Expr, Values
from ramet.grammar.json_schema.frames.layout import Layout
from ramet.grammar.json_schema.frames.tables import (
    ARRAY,
    FALSE,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    TRUE,
    compressed_rows,
    dispatch_rows,
)
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import DEAD, NEEDS_RUN, Frame, FrameTable, length_to_exit, target
from ramet.grammar.regular.strings import Content

_KINDS = (STRING, NUMBER, OBJECT, ARRAY)  # the order of `distinct.free_kinds`
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Context(ABC):
    """The surroundings of a value: decides what follows it.

    remembers: `resume` must get the value itself, because what may follow depends on it.
    is_anonymous: the context remembers earlier values, but one of them is not known, because a walk over the vocabulary
    read it.
    must_differ: the value must differ from the unknown one, too.
    is_for_masks: it stands for many places that share their masks. No text ever gets there (lookahead.py), so it needs
    no `rest`.
    depth: of the value, as its layout counts (see Layout.inside).
    following: the bytes that may follow the value. None: any byte.
    """

    remembers: bool = False
    is_anonymous: bool = False
    must_differ: bool = False
    is_for_masks: bool = False
    depth: int = 0
    following: bytes | None = None

    @abstractmethod
    def resume(self, mask: int, value: Const | None) -> int:
        """Return the target after a value that satisfies the tags in `mask`. value: None if it is not known."""

    def after_bracket(self, mask: int, value: Const | None) -> int:
        """Return the target after the bracket that closes an object or array; DEAD if that satisfies no tag."""
        if not mask:
            return DEAD
        return NEEDS_RUN if value is None and self.is_anonymous else self.resume(mask, value)

    def rest(self, tag: int) -> int:
        """Estimate the bytes that must follow a value that satisfies this tag, to the end of the text."""
        raise AssertionError(f"{self} closes no text")

    def mask_twin(self) -> Context:
        """Return the context in which values have the same masks as here (see Frame.mask_twin); itself if there is no
        other.
        """
        return self

    def least_rest(self, mask: int) -> int:
        """Return the least `rest` of the tags in `mask`."""
        return min(self.rest(tag) for tag in range(mask.bit_length()) if (mask >> tag) & 1)


class TextContext(Context):
    """The text around all JSON. It continues at the target `after`, with about `num_bytes` bytes left to its end."""

    def __init__(self, after: int, num_bytes: int, depth: int = 0) -> None:
        self.after = after
        self.num_bytes = num_bytes
        self.depth = depth

    def resume(self, mask: int, value: Const | None) -> int:
        return self.after

    def rest(self, tag: int) -> int:
        return self.num_bytes


Opener = Callable[["Compilation", tuple[Expr, ...], Context], int]
"""Returns the target in a value that is one of the expressions: after its first byte, before the first of a number,
after the whole of true, false or null.
"""


class Compilation:
    """All schemas that are compiled together for one machine: one, or several in one text.

    openers: for each kind of value, the function that makes its first frame. ordered: properties come in declared
    order. plain_integers: integers have no fraction part. See ir.JsonOptions.
    """

    def __init__(
        self,
        machine: Machine,
        expressions: Expressions,
        openers: Mapping[int, Opener],
        *,
        layout: Layout,
        ordered: bool,
        plain_integers: bool,
    ) -> None:
        self.machine = machine
        self.expressions = expressions
        self.openers = openers
        self.layout = layout
        self.ordered = ordered
        self.plain_integers = plain_integers
        self._made: dict[tuple[object, ...], Any] = {}  # Any: the first item of a key says what type its value has

    def once(self, make: Callable[[Compilation, *Ts], T], *arguments: *Ts) -> T:
        """Return make(self, *arguments). It is called once; later calls with equal arguments return the same object.

        So the results can be compared by identity, and can be arguments themselves.
        """
        key = (make, *arguments)
        found: T | None = self._made.get(key)
        if found is None:
            if key in self._made:
                return found  # type: ignore[return-value]  # `make` returned None
            found = self._made[key] = make(self, *arguments)
        return found

    def frame(self, make: Callable[[Compilation, *Ts], Frame], *arguments: *Ts) -> int:
        """Do as `once` for a frame, and return its instance."""
        key = (make, *arguments)
        found: int | None = self._made.get(key)
        if found is None:
            found = self._made[key] = self.machine.add(make(self, *arguments))
        return found

    def value(self, exprs: tuple[Expr, ...], context: Context, local: int) -> int:
        """Return the target at a value. local: BEFORE_COLON, AFTER_COMMA or AT_VALUE."""
        return target(self.frame(ValueFrame, exprs, context), local)

    def constant_table(
        self, make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...], num_exits: int
    ) -> FrameTable:
        """Return the table whose wide rows are make(*arguments). The rows must not depend on the schema."""
        return self.once(_constant_table, make, arguments, num_exits)

    def string_table(self, content: Content, num_exits: int) -> FrameTable:
        """Put the table of a string's content on the machine. Each call makes a new table."""
        return self.machine.table(content.rows, content.byte_class, num_exits, None, content.depths, content.loop)


def _constant_table(
    compilation: Compilation,
    make: Callable[..., NDArray[np.int32]],
    arguments: tuple[object, ...],
    num_exits: int,
) -> FrameTable:
    rows, byte_class = compressed_rows(make, arguments)
    return compilation.machine.table(rows, byte_class, num_exits, None)


class ValueFrame(Frame):
    """The first byte of a value, which decides the kind of value, and all of a literal. The kind is the exit."""

    def __init__(self, compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> None:
        self.compilation = compilation
        kinds = 0
        for e in exprs:
            kinds |= compilation.expressions.kinds(e)
        self.table = compilation.constant_table(dispatch_rows, (compilation.layout, context.depth, kinds), 7)
        self.exprs = exprs
        self.context = context

    def resolve(self, exit_index: int) -> int:
        if self.context.must_differ and exit_index in _KINDS and not self._is_free(_KINDS.index(exit_index)):
            return NEEDS_RUN  # an earlier item may be the only way to complete this one
        return self.compilation.openers[exit_index](self.compilation, self.exprs, self.context)

    def _is_free(self, kind: int) -> bool:
        e = self.compilation.expressions
        return all(distinct.free_kinds(e, expr)[kind] for expr in self.exprs)

    def mask_twin(self, local: int) -> int:
        exprs = tuple(map(self.compilation.expressions.plainest, self.exprs))
        return self.compilation.value(exprs, self.context.mask_twin(), local)

    def closing_exit(self, local: int) -> int:
        """Return the kind of value that is shortest to write, together with all that follows; inside a literal, its
        kind.
        """
        expressions, machine = self.compilation.expressions, self.compilation.machine
        own = self.compilation.frame(ValueFrame, self.exprs, self.context)
        ways: list[tuple[int, int]] = []
        for tag, a in enumerate(map(expressions.values, self.exprs)):
            cheapest = {
                NULL: 4 if a.null else INFINITE,
                TRUE: 4 if a.booleans & 2 else INFINITE,
                FALSE: 5 if a.booleans & 1 else INFINITE,
                NUMBER: 3 if a.numbers else INFINITE,
                STRING: costs.of_values(expressions, Values(strings=a.strings)) if a.strings else INFINITE,
                ARRAY: min((costs.of_array(expressions, r) for r in a.arrays), default=INFINITE),
                OBJECT: min((costs.of_object(expressions, o) for o in a.objects), default=INFINITE),
            }
            rest = self.context.rest(tag)
            ways.extend((cost + rest, kind) for kind, cost in cheapest.items() if cost < INFINITE)
        ways = [(cost, kind) for cost, kind in ways if length_to_exit(self.table, kind, local) is not None]
        return next(kind for _, kind in sorted(ways) if machine.exit_target(own, kind) >= 0)

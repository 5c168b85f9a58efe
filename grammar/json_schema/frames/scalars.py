"""Strings, numbers, true, false and null on the machine."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import replace
from fractions import Fraction

import numpy as np

from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import Const, Expr, Strings, Values
from ramet.grammar.json_schema.frames.compilation import Compilation, Context
from ramet.grammar.json_schema.frames.lengths import BoundedStrings, Layers, bounded_strings
from ramet.grammar.json_schema.frames.lookahead import Somewhere, unread
from ramet.grammar.json_schema.frames.tables import (
    CHUNK,
    FALSE,
    NULL,
    TRUE,
    digit_rows,
    number_rows,
    renumbered,
    string_rows,
)
from ramet.grammar.machine.frame import (
    DEAD,
    LOCAL_BITS,
    LOCAL_MASK,
    NEEDS_RUN,
    Frame,
    FrameTable,
    compress_rows,
    length_to_exit,
    target,
)
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers, fraction
from ramet.grammar.regular.strings import Content, counted_rows, free_string_rows

TaggedStrings = tuple[tuple[Strings, ...], ...]  # for each tag, its specs: one of them must hold
TaggedNumbers = tuple[tuple[Numbers, ...], ...]
TableOfMasks = tuple[FrameTable, tuple[int, ...]]  # a table, and for each exit the mask of the tags that are satisfied

_CONSTANTS: dict[int, Const] = {TRUE: ("bool", True), FALSE: ("bool", False), NULL: ("null", None)}
_ANY: TaggedStrings = ((v.ANY_STRINGS,),)


def open_string(compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> int:
    """Return the target after the opening quote."""
    if isinstance(context, Somewhere):  # hardly any token begins before such a string and continues in it
        return unread(compilation)
    return _string(compilation, tuple([compilation.expressions.values(e).strings for e in exprs]), context)


def open_number(compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> int:
    """Return the target before the first byte."""
    specs = _numbers_of(compilation, tuple([compilation.expressions.values(e).numbers for e in exprs]))
    if len(specs) == len(specs[0]) == 1 and numeric.is_read_by_value(specs[0][0]):
        if numeric.completion(specs[0][0], "") is None:
            return DEAD
        return target(compilation.frame(DigitsFrame, specs[0][0], "", context, b""))
    return target(compilation.frame(NumberFrame, specs, context, b""))


def prepare_scalars(compilation: Compilation, values: Values) -> None:
    """Make the rows that numbers and strings of these values alone will need. They are kept for all compilations."""
    strings = values.strings
    if values.numbers and not any(numeric.is_read_by_value(n) for n in values.numbers):
        number_rows(_numbers_of(compilation, (values.numbers,)))
    if not strings or strings == (v.ANY_STRINGS,) or _is_counted((strings,)):
        return
    if bounded_strings((strings,), compilation.expressions.languages) is None:
        _string_rows(compilation, (strings,))


def _numbers_of(compilation: Compilation, specs: TaggedNumbers) -> TaggedNumbers:
    # with several tags, it must be known which of them are satisfied
    if compilation.plain_integers and len(specs) == 1:
        return (tuple(_as_models_write(n) for n in specs[0]),)
    return specs


def open_literal(kind: int, compilation: Compilation, exprs: tuple[Expr, ...], context: Context) -> int:
    """Return the target after true, false or null."""
    mask = sum(1 << i for i, e in enumerate(exprs) if _allows(compilation.expressions.values(e), kind))
    return context.resume(mask, _CONSTANTS[kind])


def _allows(a: Values, kind: int) -> bool:
    return a.null if kind == NULL else bool(a.booleans & (2 if kind == TRUE else 1))


def _as_models_write(numbers: Numbers) -> Numbers:
    """Let integers have no fraction part."""
    is_free = numbers.integer and numbers.plain is None and numbers.finite is None
    return replace(numbers, plain=True) if is_free else numbers


class TextFrame(Frame):
    """The text of a string or a number, or a part of it.

    masks: for each exit that ends the value, the tags that the value then satisfies. The exits after those continue in
    the next part. If the context remembers values, the frame has memory, and its parts pass the text on.
    """

    def __init__(self, compilation: Compilation, table: TableOfMasks, context: Context, text: bytes) -> None:
        self.compilation = compilation
        self.table, self.masks = table
        self.context = context
        self.has_memory = context.remembers
        self.text = text

    @abstractmethod
    def moved(self, context: Context, text: bytes) -> int:
        """Return the instance of the same frame in this context after this text."""

    def next_part(self, exit_index: int) -> int:
        """Return the target of an exit that does not end the value."""
        raise AssertionError(f"{self} is not a part")

    def read(self, text: bytes) -> Const:
        """Return the value that a text stands for."""
        return ("string", json.loads(b'"' + text + b'"'))

    def resolve(self, exit_index: int) -> int:
        if exit_index >= len(self.masks):
            return self.next_part(exit_index)
        if self.context.is_anonymous:
            return NEEDS_RUN
        return self.context.resume(self.masks[exit_index], None)

    def resolve_text(self, exit_index: int, text: bytes, last: bytes) -> int:
        if exit_index < len(self.masks):
            return self.context.resume(self.masks[exit_index], self.read(text))
        part = self.next_part(exit_index)
        frame = self.compilation.machine.frames[part >> LOCAL_BITS]
        return target(frame.remember(text + last), part & LOCAL_MASK)

    def remember(self, text: bytes) -> int:
        return self.moved(self.context, text)

    def mask_twin(self, local: int) -> int:
        return target(self.moved(self.context.mask_twin(), b""), local)

    def closing_exit(self, local: int) -> int:
        ways = []
        for exit_index, mask in enumerate(self.masks):
            length = length_to_exit(self.table, exit_index, local)
            if length is not None:
                ways.append((length + self.context.least_rest(mask), exit_index))
        return min(ways)[1]


class NumberFrame(TextFrame):
    """A number."""

    def __init__(self, compilation: Compilation, specs: TaggedNumbers, context: Context, text: bytes) -> None:
        super().__init__(compilation, compilation.once(_number_table, specs, context.following), context, text)
        self.specs = specs

    def moved(self, context: Context, text: bytes) -> int:
        return self.compilation.frame(NumberFrame, self.specs, context, text)

    def read(self, text: bytes) -> Const:
        return ("number", fraction(json.loads(text)))


def _number_table(compilation: Compilation, specs: TaggedNumbers, following: bytes | None) -> TableOfMasks:
    rows, byte_class, ends, masks = number_rows(specs, following)
    return compilation.machine.table(rows, byte_class, max(len(masks), 1), ends), masks


_SYMBOLS = "0123456789.-"


def _digits_table(compilation: Compilation, symbols: str, may_end: bool, following: bytes | None) -> TableOfMasks:
    rows, ends = digit_rows(_SYMBOLS, symbols, may_end, following)
    return compilation.machine.table(*compress_rows(rows), 1 + len(_SYMBOLS), ends), (1,)


class DigitsFrame(TextFrame):
    """A number whose divisor has too many remainders for a table. Each text so far has a frame of its own.

    Exit 0 ends the number, exit 1 + i reads _SYMBOLS[i]. so_far: the text of the number.
    """

    def __init__(self, compilation: Compilation, numbers: Numbers, so_far: str, context: Context, text: bytes) -> None:
        self.numbers = numbers
        self.so_far = so_far
        symbols = "".join(c for c in numeric.symbols_after(so_far) if numeric.may_go_on(numbers, so_far + c))
        may_end = numeric.is_text_of(numbers, so_far)
        super().__init__(
            compilation, compilation.once(_digits_table, symbols, may_end, context.following), context, text
        )

    def moved(self, context: Context, text: bytes) -> int:
        return self.compilation.frame(DigitsFrame, self.numbers, self.so_far, context, text)

    def next_part(self, exit_index: int) -> int:
        so_far = self.so_far + _SYMBOLS[exit_index - 1]
        return target(self.compilation.frame(DigitsFrame, self.numbers, so_far, self.context, b""))

    def read(self, text: bytes) -> Const:
        return ("number", Fraction(self.so_far))

    def closing_exit(self, local: int) -> int:
        return 0

    def closing_jump(self, local: int) -> tuple[bytes, int] | None:
        rest = numeric.completion(self.numbers, self.so_far)
        assert rest is not None
        if not rest:
            return None
        text = self.text + rest.encode() if self.has_memory else b""
        after = self.compilation.frame(DigitsFrame, self.numbers, self.so_far + rest, self.context, text)
        return rest.encode(), target(after)


# --- strings


def _string(compilation: Compilation, specs: TaggedStrings, context: Context) -> int:
    """Return the target after the opening quote of a string, in one of three forms.

    A counted number of any characters; layers, if the length and the language are both limited; or one table.
    """
    if _is_counted(specs):
        return _counted(compilation, specs[0][0].low, specs[0][0].high, context)
    bounded = compilation.once(_bounded_strings, specs)
    if bounded is not None:
        return _layer(compilation, bounded, 0, 0, context) if bounded.is_alive(0, 0) else DEAD
    return target(compilation.frame(StringFrame, specs, context, b""))


def _is_counted(specs: TaggedStrings) -> bool:
    """Tell whether only the number of characters counts."""
    if specs == _ANY or len(specs) > 1 or len(specs[0]) > 1:
        return False
    s = specs[0][0]
    return not (s.languages or s.excluded) and s.finite is None


class StringFrame(TextFrame):
    """A string in one table."""

    is_string = True

    def __init__(self, compilation: Compilation, specs: TaggedStrings, context: Context, text: bytes) -> None:
        super().__init__(compilation, compilation.once(_string_table, specs), context, text)
        self.specs = specs

    def moved(self, context: Context, text: bytes) -> int:
        return self.compilation.frame(StringFrame, self.specs, context, text)


def _string_table(compilation: Compilation, specs: TaggedStrings) -> TableOfMasks:
    if specs == _ANY:
        return compilation.string_table(free_string_rows(), 1), (1,)
    rows, masks = _string_rows(compilation, specs)
    return compilation.string_table(rows, max(len(masks), 1)), masks


def _string_rows(compilation: Compilation, specs: TaggedStrings) -> tuple[Content, tuple[int, ...]]:
    languages = compilation.expressions.languages
    used = sorted({n for tag in specs for s in tag for n, _ in s.languages})
    sources = tuple(languages.sources[n] for n in used)
    index = {n: i for i, n in enumerate(used)}
    return string_rows(renumbered(specs, index), sources, languages.max_states)


def _counted(compilation: Compilation, low: int, high: int | None, context: Context) -> int:
    """Return the target inside a string that takes low..high more characters, with no other condition."""
    if low > 0:
        n = min(low, CHUNK)
        rest = (low - n, None if high is None else high - n)
        table = compilation.once(_chunk_table, False, False)
    elif high is None:
        return _string(compilation, _ANY, context)
    elif high > CHUNK:
        n, rest = CHUNK, (0, high - CHUNK)
        table = compilation.once(_chunk_table, True, False)
    else:
        n, rest = high, (0, 0)
        table = compilation.once(_chunk_table, True, True)
    return target(compilation.frame(CountFrame, table, rest, context, b""), CHUNK - n)


def _chunk_table(compilation: Compilation, closable: bool, last: bool) -> FrameTable:
    return compilation.string_table(counted_rows(CHUNK, closable, last), 2)


class CountFrame(TextFrame):
    """Up to CHUNK characters of a string. Exit 1 goes on with `rest`: (at least, at most) so many more characters."""

    is_string = True

    def __init__(
        self, compilation: Compilation, table: FrameTable, rest: tuple[int, int | None], context: Context, text: bytes
    ) -> None:
        super().__init__(compilation, (table, (1,)), context, text)
        self.rest = rest

    def moved(self, context: Context, text: bytes) -> int:
        return self.compilation.frame(CountFrame, self.table, self.rest, context, text)

    def next_part(self, exit_index: int) -> int:
        return _counted(self.compilation, *self.rest, self.context)

    def characters_left(self, local: int) -> int | None:
        if local > CHUNK:
            return None
        return CHUNK - local + (1 << 20 if self.rest[1] is None else self.rest[1])

    def closing_exit(self, local: int) -> int:
        return 0 if length_to_exit(self.table, 0, local) is not None else 1


def _bounded_strings(compilation: Compilation, specs: TaggedStrings) -> BoundedStrings | None:
    return bounded_strings(specs, compilation.expressions.languages)


def _layer(compilation: Compilation, strings: BoundedStrings, position: int, state: int, context: Context) -> int:
    """Return the target inside a string, `position` characters after its beginning."""
    position = min(position, strings.last)
    return target(compilation.frame(LayersFrame, strings, position, context, b""), state)


def _layers_table(compilation: Compilation, layers: Layers) -> TableOfMasks:
    return compilation.string_table(layers.rows, layers.num_exits), layers.masks


class LayersFrame(TextFrame):
    """Some characters of a string whose length and language are both limited: see lengths.py."""

    is_string = True

    def __init__(
        self, compilation: Compilation, strings: BoundedStrings, position: int, context: Context, text: bytes
    ) -> None:
        self.layers = strings.layers(position)
        super().__init__(compilation, compilation.once(_layers_table, self.layers), context, text)
        self.strings = strings
        self.position = position

    def moved(self, context: Context, text: bytes) -> int:
        return self.compilation.frame(LayersFrame, self.strings, self.position, context, text)

    def next_part(self, exit_index: int) -> int:
        position = self.position + self.layers.num_layers
        return _layer(self.compilation, self.strings, position, exit_index - len(self.masks), self.context)

    def closing_exit(self, local: int) -> int:
        return self._closing(local)[1]

    def closing_way(self, local: int, exit_index: int) -> bytes:
        way, found = self._closing(local)
        assert found == exit_index
        return way

    def _closing(self, local: int) -> tuple[bytes, int]:
        """Return the shortest way to an end, up to the end of this table, and the exit that it takes."""
        costs = [self.context.least_rest(mask) for mask in self.masks]
        if self.table.num_exits > len(self.masks):
            # the cost also counts the quote and what follows; otherwise continuing would look cheaper than ending
            rest = 1 + min(self.context.rest(tag) for tag in self.strings.tags)
            following = self.strings.distances(self.position + self.layers.num_layers)
            costs += (following.astype(np.int64) + rest).tolist()
        return self.layers.way_out(local, tuple(costs))

"""JSON values on the machine: frames for values, strings, numbers and literals.

Several expressions are followed at once over the same value, each as a *tag*; when the value ends, the set of tags that
it satisfies (a bit mask, never 0) is handed to the context, which goes on with those alternatives that it still allows.
So `anyOf` and its kin are deterministic: one configuration, whatever the number of alternatives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.json_schema.algebra import costs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.values import INFINITE, Const, Expr, Strings, Values
from ramet.grammar.json_schema.frames.tables import (
    ARRAY,
    CHUNK,
    FALSE,
    LITERALS,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    TRUE,
    StringRows,
    any_key_rows,
    compressed_rows,
    counted_string,
    dispatch_rows,
    free_string,
    key_start_rows,
    literal_rows,
    number_rows,
    renumbered,
    string_rows,
    unread_rows,
)
from ramet.grammar.machine.automaton import CONCRETE, LOCAL_BITS, Machine, Table, path_to_exit, target
from ramet.grammar.regular.numbers import Numbers


class Context(Protocol):
    """What follows a value. `number` identifies it. remembers: it must be told which value it was."""

    number: int
    remembers: bool
    is_anonymous: bool  # remembers, but does not know some earlier value
    is_for_masks: bool  # no text that was written stands in it: see lookahead.py

    def resume(self, mask: int, value: Const | None) -> int:
        """Return the target after a value that satisfies the tags in `mask`.

        value: a constant (see distinct.py); None where it is not known.
        """

    def rest(self, tag: int) -> int:
        """About the bytes that must follow a value that satisfies this tag, to the end of the text."""

    def mask_twin(self) -> Context:
        """The context that gives the values in it the same masks (see Machine.mask_twin); itself where there is no
        other."""


class Somewhere:
    """A context that is not known. For masks: what reaches it is decided by runs, each from its own state."""

    remembers = False
    is_anonymous = False
    is_for_masks = True

    def __init__(self, number: int) -> None:
        self.number = number

    def resume(self, mask: int, value: Const | None) -> int:
        return CONCRETE

    def rest(self, tag: int) -> int:
        raise AssertionError("texts are closed from where they stand")

    def mask_twin(self) -> Context:
        return self


class Unread:
    """A text that masks do not look into: tokens that read on in it are run, each from its own state."""

    def __init__(self, json: Json) -> None:
        self.table = json.constant_table(unread_rows, (), 1)

    def resolve(self, exit_index: int) -> int:
        return CONCRETE

    def closing_exit(self, local: int) -> int:
        raise AssertionError("texts are closed from where they stand")


class KeyStart(Unread):
    """A key of which only the first byte is looked at, or that may be any text."""

    def __init__(self, json: Json, starts: bytes | None) -> None:
        if starts is None:
            self.table = json.any_key_table()
        else:
            refused = bytes(b for b in json.machine.key_starts if b not in starts)
            self.table = json.constant_table(key_start_rows, (refused,), 1)


class Json:
    """Everything that the frames of one compiled schema share."""

    def __init__(self, machine: Machine, expressions: Expressions, *, spaced: bool, ordered: bool) -> None:
        self.machine = machine
        self.expressions = expressions
        self.spaced = spaced
        self.ordered = ordered
        self._tables: dict[object, tuple[Table, tuple[int, ...]]] = {}
        self.bounded_strings: dict[object, Any] = {}
        self.contexts = 0
        self.somewhere = Somewhere(self.new_number())
        # interned by content; typed loosely because the modules of objects and arrays build on this one
        self.property_contexts: dict[object, Any] = {}
        self.object_nodes: dict[object, Any] = {}
        self.array_nodes: dict[object, Any] = {}
        self.array_states: dict[object, Any] = {}
        self.opened_arrays: dict[object, Any] = {}
        self.opened_objects: dict[object, Any] = {}
        self.spaces: dict[object, Any] = {}
        self.behind: dict[object, Any] = {}

    def unread(self) -> int:
        return target(self.machine.intern("unread", lambda: Unread(self)))

    def key_start(self, starts: bytes | None) -> int:
        """Target at the start of a key for masks that look little further. starts: with which bytes it may begin, of
        those that any token has behind a comma and a quote; None: it may be any text."""
        return target(self.machine.intern(("key start", starts), lambda: KeyStart(self, starts)))

    def constant_table(
        self, make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...], num_exits: int
    ) -> Table:
        """The table whose wide rows are make(*arguments), which do not depend on the schema."""
        found = self._tables.get((make, arguments))
        if found is None:
            rows, byte_class = compressed_rows(make, arguments)
            found = self._tables[make, arguments] = self.machine.table(rows, byte_class, num_exits, None), ()
        return found[0]

    def new_number(self) -> int:
        self.contexts += 1
        return self.contexts

    def any_key_table(self) -> Table:
        found = self._tables.get(any_key_rows)
        if found is None:
            found = self._tables[any_key_rows] = self.string_frame(any_key_rows(), 1), ()
        return found[0]

    def string_frame(self, rows: StringRows, num_exits: int) -> Table:
        """Put the table of a string's content on the machine."""
        return self.machine.table(rows.rows, rows.byte_class, num_exits, None, rows.depths, rows.loop)

    def value(self, exprs: tuple[Expr, ...], context: Context, local: int) -> int:
        """Target at a value: local 0 before its colon, 1 where a space may stand, 2 at its first byte."""
        key = ("value", exprs, context.number)
        return target(self.machine.intern(key, lambda: ValueFrame(self, exprs, context)), local)

    # --- tables of scalars

    def string_table(self, specs: tuple[tuple[Strings, ...], ...]) -> tuple[Table, tuple[int, ...]]:
        """Table of the strings of each tag, and the mask of tags of each exit."""
        found = self._tables.get(specs)
        if found is None:
            masks: tuple[int, ...] = (1,)
            if specs == ((v.ANY_STRINGS,),):
                rows = free_string()
            else:
                languages = self.expressions.languages
                used = sorted({n for tag in specs for s in tag for n, _ in s.languages})
                sources = tuple(languages.sources[n] for n in used)
                index = {n: i for i, n in enumerate(used)}
                rows, masks = string_rows(renumbered(specs, index), sources, languages.max_states)
            found = self._tables[specs] = self.string_frame(rows, max(len(masks), 1)), masks
        return found

    def number_table(self, specs: tuple[tuple[Numbers, ...], ...]) -> tuple[Table, tuple[int, ...]]:
        if self.ordered and len(specs) == 1:  # with several tags, which of them hold must be known
            specs = (tuple(_as_models_write(n) for n in specs[0]),)
        found = self._tables.get(specs)
        if found is None:
            rows, byte_class, ends, masks = number_rows(specs)
            found = self._tables[specs] = self.machine.table(rows, byte_class, max(len(masks), 1), ends), masks
        return found

    def counted(self, low: int, high: int | None, context: Context) -> int:
        """Target inside a string that takes low..high more characters and nothing else is asked of."""
        if low > 0:
            n = min(low, CHUNK)
            key: tuple[object, ...] = ("count", "must", low - n, None if high is None else high - n)
            rest = (low - n, None if high is None else high - n)
            make = self._chunk(False, False)
        elif high is None:
            return self.string((_ANY_STRINGS,), context)
        elif high > CHUNK:
            n, rest = CHUNK, (0, high - CHUNK)
            key = ("count", "may", *rest)
            make = self._chunk(True, False)
        else:
            n, rest = high, (0, 0)
            key = ("count", "last")
            make = self._chunk(True, True)
        return target(self.part(make, rest, context, key), CHUNK - n)

    def part(self, table: Table, rest: tuple[int, int | None], context: Context, key: tuple[object, ...]) -> int:
        """The instance of a part of a counted string; `key` says which, but for the context."""
        kind = RememberingCount if context.remembers else CountFrame
        return self.machine.intern((*key, context.number), lambda: kind(self, table, rest, context, key))

    def _chunk(self, closable: bool, last: bool) -> Table:
        key = ("chunk", closable, last)
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = self.string_frame(counted_string(closable, last), 2), ()
        return found[0]

    def string(self, specs: tuple[tuple[Strings, ...], ...], context: Context) -> int:
        if len(specs) == 1 and len(specs[0]) == 1:
            s = specs[0][0]
            if s is not v.ANY_STRINGS and s != v.ANY_STRINGS and not (s.languages or s.excluded) and s.finite is None:
                return self.counted(s.low, s.high, context)
        from ramet.grammar.json_schema.frames.length_frames import bounded_string

        bounded = bounded_string(self, specs, context)
        if bounded is not None:
            return bounded
        kind = RememberingString if context.remembers else StringFrame
        return target(self.machine.intern(("string", specs, context.number), lambda: kind(self, specs, context)))


_ANY_STRINGS = (v.ANY_STRINGS,)


class ValueFrame:
    """The first byte of a value decides its kind."""

    def __init__(self, json: Json, exprs: tuple[Expr, ...], context: Context) -> None:
        self.json = json
        kinds = 0
        for e in exprs:
            kinds |= json.expressions.kinds(e)
        self.table = json.constant_table(dispatch_rows, (json.spaced, kinds), 7)
        self.exprs = exprs
        self.context = context

    def mask_twin(self, local: int) -> int:
        exprs = tuple(map(self.json.expressions.plainest, self.exprs))
        return self.json.value(exprs, self.context.mask_twin(), local)

    def values(self) -> list[Values]:
        return [self.json.expressions.values(e) for e in self.exprs]

    def resolve(self, exit_index: int) -> int:
        if exit_index == STRING and self.context is self.json.somewhere:
            return self.json.unread()  # hardly any token begins before a value that is a string and reads on in it
        if exit_index == OBJECT:
            from ramet.grammar.json_schema.frames.objects import open_object

            return open_object(self.json, self.exprs, self.context)
        if exit_index == ARRAY:
            from ramet.grammar.json_schema.frames.arrays import open_array

            return open_array(self.json, self.exprs, self.context)
        values = self.values()
        if exit_index == STRING:
            return self.json.string(tuple([a.strings for a in values]), self.context)
        if exit_index == NUMBER:
            return target(number(self.json, tuple([a.numbers for a in values]), self.context))
        mask = sum(1 << i for i, a in enumerate(values) if _allows(a, exit_index))
        return target(literal(self.json, exit_index, mask, self.context))

    def closing_exit(self, local: int) -> int:
        """The kind of value that is shortest to finish, with all that follows."""
        expressions, machine = self.json.expressions, self.json.machine
        at = machine.interned[("value", self.exprs, self.context.number)]
        ways: list[tuple[int, int]] = []
        for tag, a in enumerate(self.values()):
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
        return next(kind for _, kind in sorted(ways) if machine.exit_target(at, kind) >= 0)


def _allows(a: Values, kind: int) -> bool:
    return a.null if kind == NULL else bool(a.booleans & (2 if kind == TRUE else 1))


def literal(json: Json, kind: int, mask: int, context: Context) -> int:
    """The instance of a literal's rest."""
    key = ("literal", kind, mask, context.number)
    return json.machine.intern(key, lambda: LiteralFrame(json, kind, mask, context))


class LiteralFrame:
    """The rest of true, false or null."""

    def __init__(self, json: Json, kind: int, mask: int, context: Context) -> None:
        self.json = json
        self.kind = kind
        self.table = json.constant_table(literal_rows, (LITERALS[kind],), 1)
        self.value = {TRUE: ("bool", True), FALSE: ("bool", False), NULL: ("null", None)}[kind]
        self.mask = mask
        self.context = context

    def resolve(self, exit_index: int) -> int:
        return self.context.resume(self.mask, self.value)

    def mask_twin(self, local: int) -> int:
        return target(literal(self.json, self.kind, self.mask, self.context.mask_twin()), local)

    def closing_exit(self, local: int) -> int:
        return 0


def rest_of(context: Context, mask: int) -> int:
    """The least that follows any of these tags."""
    return min(context.rest(tag) for tag in range(mask.bit_length()) if (mask >> tag) & 1)


class _Scalar:
    """Common to strings and numbers: exits are masks of tags."""

    table: Table
    masks: tuple[int, ...]
    context: Context
    text = b""

    def resolve(self, exit_index: int) -> int:
        if self.context.is_anonymous:
            return CONCRETE
        return self.context.resume(self.masks[exit_index], None)

    def closing_exit(self, local: int) -> int:
        ways = []
        for exit_index, mask in enumerate(self.masks):
            way = path_to_exit(self.table, exit_index, local)
            if way is not None:
                ways.append((len(way) + rest_of(self.context, mask), exit_index))
        return min(ways)[1]


def _as_models_write(numbers: Numbers) -> Numbers:
    """Integers without a fraction part."""
    is_free = numbers.integer and numbers.plain is None and numbers.finite is None
    return replace(numbers, plain=True) if is_free else numbers


def number(json: Json, specs: tuple[tuple[Numbers, ...], ...], context: Context) -> int:
    """The instance of a number's text."""
    kind = RememberingNumber if context.remembers else NumberFrame
    return json.machine.intern(("number", specs, context.number), lambda: kind(json, specs, context))


class StringFrame(_Scalar):
    def __init__(self, json: Json, specs: tuple[tuple[Strings, ...], ...], context: Context) -> None:
        self.json = json
        self.table, self.masks = json.string_table(specs)
        self.key: tuple[object, ...] = ("string", specs, context.number)
        self.context = context
        self.specs = specs

    def mask_twin(self, local: int) -> int:
        return target(self.json.string(self.specs, self.context.mask_twin()) >> LOCAL_BITS, local)


class NumberFrame(_Scalar):
    def __init__(self, json: Json, specs: tuple[tuple[Numbers, ...], ...], context: Context) -> None:
        self.json = json
        self.table, self.masks = json.number_table(specs)
        self.key: tuple[object, ...] = ("number", specs, context.number)
        self.context = context
        self.specs = specs

    def mask_twin(self, local: int) -> int:
        return target(number(self.json, self.specs, self.context.mask_twin()), local)


class CountFrame(_Scalar):
    """A part of a string's characters; exit 1 goes on with the next part."""

    def __init__(
        self, json: Json, table: Table, rest: tuple[int, int | None], context: Context, key: tuple[object, ...]
    ) -> None:
        self.json = json
        self.table = table
        self.masks = (1,)
        self.rest = rest
        self.context = context
        self.key = (*key, context.number)

    def mask_twin(self, local: int) -> int:
        return target(self.json.part(self.table, self.rest, self.context.mask_twin(), self.key[:-1]), local)

    def resolve(self, exit_index: int) -> int:
        if exit_index == 1:
            return self.json.counted(*self.rest, self.context)
        return super().resolve(exit_index)

    def characters_left(self, local: int) -> int | None:
        """How many characters may still come, exactly (without a bound: very many); None inside a character."""
        if local > CHUNK:
            return None
        return CHUNK - local + (1 << 20 if self.rest[1] is None else self.rest[1])

    def closing_exit(self, local: int) -> int:
        return 0 if path_to_exit(self.table, 0, local) is not None else 1


class _Remembering:
    """Adds the text that was read, for contexts that remember."""

    json: Json
    key: tuple[object, ...]
    context: Context
    masks: tuple[int, ...]
    text: bytes = b""

    def mask_twin(self, local: int) -> int:
        machine = self.json.machine
        if self.text:
            return machine.mask_twin(target(machine.interned[self.key], local))
        return super().mask_twin(local)  # type: ignore[misc,no-any-return]

    def remember(self, text: bytes) -> int:
        if not text:
            return self.json.machine.interned[self.key]

        def make():  # type: ignore[no-untyped-def]
            copy = object.__new__(type(self))
            copy.__dict__.update(self.__dict__)
            copy.text = text
            return copy

        return self.json.machine.intern((*self.key, text), make)

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        return self.context.resume(self.masks[exit_index], self.read(text))

    def read(self, text: bytes) -> Const:
        return ("string", json.loads(b'"' + text + b'"'))


class RememberingString(_Remembering, StringFrame):
    pass


class RememberingNumber(_Remembering, NumberFrame):
    def read(self, text: bytes) -> Const:
        from ramet.grammar.json_schema.keywords.keywords import fraction

        return ("number", fraction(json.loads(text)))


class RememberingCount(_Remembering, CountFrame):
    """Counted strings in memory contexts keep their text over the parts."""

    def goes_on(self, exit_index: int) -> bool:
        return exit_index == 1

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        if exit_index == 1:
            following = self.json.counted(*self.rest, self.context)
            frame = self.json.machine.frames[following >> 32]
            return target(frame.remember(text), following & 0xFFFFFFFF)  # type: ignore[attr-defined]
        return super().resolve_text(exit_index, text)

"""Python `re` patterns -> IR. A text is in the language exactly when `re.fullmatch(pattern, text)` matches.

Understood: literals, classes, `\\d \\w \\s` (Unicode unless re.ASCII), groups, alternation, repetition (lazy or not:
the same texts), flags `i m s x a u` (also scoped), lookaheads, `^ $ \\A \\Z \\b \\B` where what stands before decides
them. Refused with InvalidRegex, by name and position: lookbehinds, backreferences, conditionals, atomic groups,
possessive repeats. Only texts that UTF-8 can write belong to a language: a surrogate never matches. `\\B` matches the
empty text, as it does in Python from 3.14 on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from ramet.errors import GrammarTooLarge, InvalidRegex
from ramet.grammar import char_classes as chars
from ramet.grammar import ir

MAX_COUNT = 100_000

_CATEGORIES = {
    sre.CATEGORY_DIGIT: "d",
    sre.CATEGORY_NOT_DIGIT: "D",
    sre.CATEGORY_SPACE: "s",
    sre.CATEGORY_NOT_SPACE: "S",
    sre.CATEGORY_WORD: "w",
    sre.CATEGORY_NOT_WORD: "W",
}
_NO_BYTE_AFTER = ir.Lookahead(ir.ANY_CHAR, is_negative=True)
_LAST_NEWLINE = ir.Lookahead(
    ir.Choice((ir.Chars(chars.NOT_NEWLINE), ir.Sequence((ir.Chars(chars.NEWLINE), ir.ANY_CHAR)))), is_negative=True
)
_LINE_END = ir.Lookahead(ir.Chars(chars.NOT_NEWLINE), is_negative=True)

# what may stand before a position: the start of the text, a newline, a word character, any other character
_START, _NEWLINE, _WORD, _OTHER = "start", "newline", "word", "other"
_Before = frozenset[str]

_Item = tuple[Any, Any]  # (opcode, argument) as re's parser gives them: the argument's type depends on the opcode


def parse_regex(pattern: str, flags: int = 0, *, has_lookahead: bool = True, name: str = "") -> ir.Terminal:
    """Return the terminal whose texts are the full matches of `pattern`.

    `flags`: of module `re`. `has_lookahead` False refuses lookaheads and anchors inside the pattern (for a part of a
    larger text, where they would look beyond the part).
    Raises: InvalidRegex naming the construct and its position; GrammarTooLarge for a count above 100,000.
    """
    if not isinstance(pattern, str):
        raise InvalidRegex(f"a pattern is a str, not {type(pattern).__name__}")
    if flags & re.LOCALE:
        raise InvalidRegex("re.LOCALE depends on the machine's locale; leave it out")
    try:
        parsed = _parser.parse(pattern, flags)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise InvalidRegex(f"the pattern {_short(pattern)} does not parse: {error.msg}{where}") from error
    except RecursionError as error:
        raise GrammarTooLarge(f"the pattern {_short(pattern)} is nested too deeply") from error
    except OverflowError as error:
        raise GrammarTooLarge(f"a repeat count of the pattern {_short(pattern)} is too large") from error
    converter = _Converter(pattern, has_lookahead)
    try:
        node, _ = converter.sequence(list(parsed), parsed.state.flags, frozenset((_START,)), at_end=True)
    except RecursionError as error:
        raise GrammarTooLarge(f"the pattern {_short(pattern)} is nested too deeply") from error
    return ir.Terminal(node, name or f"the pattern {_short(pattern)}")


class _Converter:
    """One pattern's items -> nodes. Each method returns the node and what may stand behind it."""

    def __init__(self, pattern: str, has_lookahead: bool) -> None:
        self.pattern = pattern
        self.has_lookahead = has_lookahead

    def sequence(self, items: list[_Item], flags: int, before: _Before, *, at_end: bool) -> tuple[ir.Node, _Before]:
        """`at_end`: nothing follows these items but the end of the text."""
        parts: list[ir.Node] = []
        literal = bytearray()
        last = len(items) - 1
        while last >= 0 and items[last][0] is sre.AT:  # anchors at the end have no width
            last -= 1
        for i, (op, argument) in enumerate(items):
            node, before = self.item(op, argument, flags, before, at_end=at_end and i >= last)
            if isinstance(node, ir.Bytes):
                literal += node.value
                continue
            if literal:
                parts.append(ir.Bytes(bytes(literal)))
                literal.clear()
            if node != ir.EMPTY:
                parts.append(node)
        if literal:
            parts.append(ir.Bytes(bytes(literal)))
        return (parts[0] if len(parts) == 1 else ir.Sequence(tuple(parts))), before

    def item(self, op: Any, argument: Any, flags: int, before: _Before, *, at_end: bool) -> tuple[ir.Node, _Before]:
        if op is sre.SUBPATTERN:
            _, add, remove, inner = argument
            return self.sequence(list(inner), (flags | add) & ~remove, before, at_end=at_end)
        if op is sre.BRANCH:
            ways = [self.sequence(list(way), flags, before, at_end=at_end) for way in argument[1]]
            return ir.Choice(tuple(n for n, _ in ways)), frozenset().union(*(b for _, b in ways))
        if op is sre.MAX_REPEAT or op is sre.MIN_REPEAT:
            return self.repeat(argument, flags, before, at_end=at_end)
        if op is sre.AT:
            return self.anchor(argument, flags, before, at_end=at_end), before
        if op is sre.ASSERT or op is sre.ASSERT_NOT:
            return self.lookahead(op, argument, flags, before), before
        if op is sre.FAILURE:
            return ir.NOTHING, before
        if op in _REFUSED:
            raise self.refused(*_REFUSED[op])
        ranges = self.characters(op, argument, flags)
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            return ir.Bytes(chr(ranges[0][0]).encode()), self.kinds(ranges, flags)
        return ir.Chars(ranges), self.kinds(ranges, flags)

    def repeat(self, argument: Any, flags: int, before: _Before, *, at_end: bool) -> tuple[ir.Node, _Before]:
        low, high, inner = argument
        most = None if high is sre.MAXREPEAT else int(high)
        if low > MAX_COUNT or (most or 0) > MAX_COUNT:
            raise GrammarTooLarge(
                f"the pattern {_short(self.pattern)} repeats {max(low, most or 0):,} times; the limit is {MAX_COUNT:,}"
            )
        items = list(inner)
        is_once = most is not None and most <= 1
        entry = before
        while True:  # what stands before an iteration is what stood before the repeat, or an iteration
            node, after = self.sequence(items, flags, entry, at_end=at_end and is_once)
            if is_once or after <= entry:
                break
            entry |= after
        if most == 0 or node == ir.EMPTY:
            return ir.EMPTY, before
        return ir.Repeat(node, low, most), after | before if low == 0 else after

    def characters(self, op: Any, argument: Any, flags: int) -> ir.Ranges:
        """The set of one character's item."""
        is_ascii = bool(flags & re.ASCII)
        if op is sre.ANY:
            return chars.EVERYTHING if flags & re.DOTALL else chars.NOT_NEWLINE
        if op is sre.LITERAL or op is sre.NOT_LITERAL:
            ranges = self.fold(((argument, argument),), flags)
            return ranges if op is sre.LITERAL else chars.complement(ranges)
        if op is sre.IN:
            spans: list[tuple[int, int]] = []
            classes: list[tuple[int, int]] = []
            for kind, value in argument:
                if kind is sre.LITERAL:
                    spans.append((value, value))
                elif kind is sre.RANGE:
                    spans.append(value)
                elif kind is sre.CATEGORY:
                    classes.extend(chars.category(_CATEGORIES[value], is_ascii))
            folded = self.fold(ir.normalize_ranges(spans), flags)
            ranges = chars.intersect(ir.normalize_ranges([*folded, *classes]), chars.EVERYTHING)
            return chars.complement(ranges) if argument[0][0] is sre.NEGATE else ranges
        raise InvalidRegex(f"the pattern {_short(self.pattern)} uses {op}, which is not supported")

    def fold(self, ranges: ir.Ranges, flags: int) -> ir.Ranges:
        if flags & re.IGNORECASE:
            ranges = chars.ignore_case(ranges, bool(flags & re.ASCII))
        return chars.intersect(ranges, chars.EVERYTHING)

    def kinds(self, ranges: ir.Ranges, flags: int) -> _Before:
        word = chars.category("w", bool(flags & re.ASCII))
        num_word = _size(chars.intersect(ranges, word))
        num_newline = _size(chars.intersect(ranges, chars.NEWLINE))
        out = set()
        if num_word:
            out.add(_WORD)
        if num_newline:
            out.add(_NEWLINE)
        if _size(ranges) > num_word + num_newline:
            out.add(_OTHER)
        return frozenset(out)

    # --- what has no width

    def anchor(self, at: Any, flags: int, before: _Before, *, at_end: bool) -> ir.Node:
        multiline = bool(flags & re.MULTILINE)
        if at in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            if at is sre.AT_BEGINNING and multiline:
                return self.decided(before, {_START, _NEWLINE}, "^")
            return self.decided(before, {_START}, "^" if at is sre.AT_BEGINNING else r"\A")
        if at in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            return self.boundary(at is sre.AT_BOUNDARY, flags, before, at_end=at_end)
        if at_end:
            return ir.EMPTY
        self.check_lookahead("$" if at is sre.AT_END else r"\Z")
        if at is sre.AT_END_STRING:
            return _NO_BYTE_AFTER
        return _LINE_END if multiline else _LAST_NEWLINE

    def boundary(self, is_boundary: bool, flags: int, before: _Before, *, at_end: bool) -> ir.Node:
        name = r"\b" if is_boundary else r"\B"
        after_word = self.decided(before, {_WORD}, name) == ir.EMPTY
        needs_word = after_word != is_boundary  # what must follow
        if at_end:
            return ir.NOTHING if needs_word else ir.EMPTY
        self.check_lookahead(name)
        word = ir.Chars(chars.category("w", bool(flags & re.ASCII)))
        return ir.Lookahead(word, is_negative=not needs_word)

    def decided(self, before: _Before, wanted: set[str], name: str) -> ir.Node:
        """EMPTY where all that may stand before is wanted, NOTHING where none is; refused in between."""
        if before <= wanted:
            return ir.EMPTY
        if not before & wanted:
            return ir.NOTHING
        raise self.refused(name, f"{name} behind a part that may end in more than one way")

    def lookahead(self, op: Any, argument: Any, flags: int, before: _Before) -> ir.Node:
        direction, inner = argument
        is_negative = op is sre.ASSERT_NOT
        if direction < 0:
            raise self.refused("(?<!" if is_negative else "(?<=", "a lookbehind")
        self.check_lookahead("(?!" if is_negative else "(?=")
        node, _ = self.sequence(list(inner), flags, before, at_end=False)
        return ir.Lookahead(node, is_negative)

    def check_lookahead(self, name: str) -> None:
        if not self.has_lookahead:
            raise self.refused(name, f"{name} (it looks beyond the terminal)")

    def refused(self, token: str, what: str) -> InvalidRegex:
        positions = [p for p, t in _constructs(self.pattern) if t == token]
        where = f" (position {', '.join(map(str, positions))})" if positions else ""
        return InvalidRegex(
            f"the pattern {_short(self.pattern)} uses {what}{where}, which cannot be enforced while generating; "
            "rewrite the pattern without it"
        )


_REFUSED = {
    sre.GROUPREF: ("backreference", "a backreference"),
    sre.GROUPREF_EXISTS: ("(?(", "a conditional group"),
    sre.ATOMIC_GROUP: ("(?>", "an atomic group"),
    sre.POSSESSIVE_REPEAT: ("possessive", "a possessive repeat"),
}

_LEXEME = re.compile(
    r"""(?P<backreference>\\[1-9]|\(\?P=) | (?P<escape>\\[AZbB]) | \\. | \[\^?\]?(?:\\.|[^\]\\])*\]
      | (?P<group>\(\?(?:<[=!]|[=!>(])) | (?P<possessive>(?<!\\)[*+?}]\+) | (?P<anchor>[\^$])""",
    re.VERBOSE | re.DOTALL,
)


def _constructs(pattern: str) -> Iterable[tuple[int, str]]:
    """(position, token) of what may be refused; comments of verbose patterns are not told apart."""
    for m in _LEXEME.finditer(pattern):
        if m.lastgroup in ("backreference", "possessive"):
            yield m.start(), m.lastgroup
        elif m.lastgroup is not None:
            yield m.start(), m.group()


def _size(ranges: ir.Ranges) -> int:
    return sum(high - low + 1 for low, high in ranges)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")

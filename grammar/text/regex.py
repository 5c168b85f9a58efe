r"""Python `re` patterns -> IR. A text is in the language exactly if `re.fullmatch(pattern, text)` matches.

Understood: literals, classes, `\d \w \s` (Unicode unless re.ASCII), groups, alternation, repetition (a lazy repeat has
the same texts as a greedy one), flags `i m s x a u` (also scoped), lookaheads, lookbehinds of one character, and `^ $
\A \Z \b \B` if the text before them decides whether they match. Refused with InvalidRegex, by name and position: longer
lookbehinds, backreferences, conditionals, atomic groups, possessive repeats.

A language holds only texts that UTF-8 can write: a surrogate never matches. `\B` matches the empty text, as in Python
from 3.14 on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as sre
from re import _parser
from typing import Any

from ramet.errors import GrammarTooLarge, InvalidRegex
from ramet.grammar import ir
from ramet.grammar.regular import char_classes as chars

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
    ir.Choice((ir.Chars(chars.NOT_NEWLINE), ir.Concatenation((ir.Chars(chars.NEWLINE), ir.ANY_CHAR)))), is_negative=True
)
_LINE_END = ir.Lookahead(ir.Chars(chars.NOT_NEWLINE), is_negative=True)

# what may stand before a position: the start of the text, a newline, a word character, any other character
_START, _NEWLINE, _WORD, _OTHER = "start", "newline", "word", "other"
_Before = frozenset[str]

_Item = tuple[Any, Any]  # (opcode, argument) as re's parser gives them: the argument's type depends on the opcode


def parse_regex(pattern: str, flags: int = 0, *, is_lexeme: bool = False, name: str = "") -> ir.Terminal:
    """Return the terminal whose texts are the full matches of `pattern`.

    flags: of module `re`. is_lexeme: the pattern describes a word inside a longer text, as for a lexer. Then a lazy
    repeat stops at the first place where the rest of the pattern matches (alternatives have no order). A negative
    lookahead sees only the word. Anchors and positive lookaheads would have to see more, and are refused.
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
    converter = _Converter(pattern, is_lexeme)
    try:
        node, _ = converter.sequence(list(parsed), parsed.state.flags, frozenset((_START,)), at_end=True)
    except RecursionError as error:
        raise GrammarTooLarge(f"the pattern {_short(pattern)} is nested too deeply") from error
    return ir.Terminal(node, name or f"the pattern {_short(pattern)}")


class _Converter:
    """Turns the items of one pattern into nodes.

    The methods return the node, and what may stand before the position after it.
    """

    def __init__(self, pattern: str, is_lexeme: bool) -> None:
        self.pattern = pattern
        self.is_lexeme = is_lexeme

    def sequence(self, items: list[_Item], flags: int, before: _Before, *, at_end: bool) -> tuple[ir.Node, _Before]:
        """Return the node of a list of items. at_end: only the end of the text follows these items."""
        items = _flattened(items)
        parts: list[ir.Node] = []
        entry = before
        last = len(items) - 1
        while last >= 0 and items[last][0] is sre.AT:  # anchors at the end have no width
            last -= 1
        stop = _end_of_lazy(items) if self.is_lexeme else None
        for i, (op, argument) in enumerate(items):
            if i == stop:
                parts = [_shortest(_joined(parts))]
            if op in (sre.ASSERT, sre.ASSERT_NOT) and argument[0] < 0:
                parts = [self.lookbehind(op, argument, flags, _joined(parts), entry)]
                continue
            node, before = self.item(op, argument, flags, before, at_end=at_end and i >= last)
            if isinstance(node, ir.Bytes) and parts and isinstance(parts[-1], ir.Bytes):
                parts[-1] = ir.Bytes(parts[-1].value + node.value)
            elif node != ir.EMPTY:
                parts.append(node)
        if stop == len(items):
            parts = [_shortest(_joined(parts))]
        return _joined(parts), before

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
        while True:  # before an iteration stands what stood before the repeat, or another iteration
            node, after = self.sequence(items, flags, entry, at_end=at_end and is_once)
            if is_once or after <= entry:
                break
            entry |= after
        if most == 0 or node == ir.EMPTY:
            return ir.EMPTY, before
        return ir.Repeat(node, low, most), after | before if low == 0 else after

    def characters(self, op: Any, argument: Any, flags: int) -> ir.Ranges:
        """Return the set of characters of an item that matches one character."""
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
            if self.is_lexeme:
                raise self.beyond("^" if at is sre.AT_BEGINNING else r"\A")
            if at is sre.AT_BEGINNING and multiline:
                return self.decided(before, {_START, _NEWLINE}, "^")
            return self.decided(before, {_START}, "^" if at is sre.AT_BEGINNING else r"\A")
        if at in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            return self.boundary(at is sre.AT_BOUNDARY, flags, before, at_end=at_end)
        if self.is_lexeme:
            raise self.beyond("$" if at is sre.AT_END else r"\Z")
        if at_end:
            return ir.EMPTY
        if at is sre.AT_END_STRING:
            return _NO_BYTE_AFTER
        return _LINE_END if multiline else _LAST_NEWLINE

    def boundary(self, is_boundary: bool, flags: int, before: _Before, *, at_end: bool) -> ir.Node:
        name = r"\b" if is_boundary else r"\B"
        after_word = self.decided(before, {_WORD}, name) == ir.EMPTY
        needs_word = after_word != is_boundary  # whether a word character must follow
        if at_end:
            return ir.NOTHING if needs_word else ir.EMPTY
        word = ir.Chars(chars.category("w", bool(flags & re.ASCII)))
        return ir.Lookahead(word, is_negative=not needs_word)

    def decided(self, before: _Before, wanted: set[str], name: str) -> ir.Node:
        """Return EMPTY if everything that may stand before is wanted, NOTHING if none of it is. Refuse other cases."""
        if before <= wanted:
            return ir.EMPTY
        if not before & wanted:
            return ir.NOTHING
        raise self.refused(name, f"{name} behind a part that may end in more than one way")

    def lookahead(self, op: Any, argument: Any, flags: int, before: _Before) -> ir.Node:
        is_negative = op is sre.ASSERT_NOT
        if self.is_lexeme and not is_negative:
            raise self.beyond("(?=")
        node, _ = self.sequence(list(argument[1]), flags, before, at_end=False)
        return ir.Lookahead(node, is_negative)

    def lookbehind(self, op: Any, argument: Any, flags: int, node: ir.Node, entry: _Before) -> ir.Node:
        """Return the texts of `node` whose last character is in a set (or is not in it)."""
        is_negative = op is sre.ASSERT_NOT
        token = "(?<!" if is_negative else "(?<="
        inner = _flattened(list(argument[1]))
        if len(inner) != 1 or inner[0][0] not in _ONE_CHARACTER:
            raise self.refused(token, "a lookbehind of more than one character")
        ranges = self.characters(*inner[0], flags)
        ends = _ends_in(node, chars.complement(ranges) if is_negative else ranges)
        if ends is None:
            raise self.refused(token, "a lookbehind behind a part that is too complex")
        with_text, empty = ends
        if empty == ir.NOTHING:
            return with_text
        if entry != {_START} or self.is_lexeme:
            raise self.refused(token, "a lookbehind behind a part that may be empty")
        return ir.Choice((with_text, empty)) if is_negative else with_text

    def beyond(self, token: str) -> InvalidRegex:
        return self.refused(token, f"{token} (it looks beyond the terminal)")

    def refused(self, token: str, what: str) -> InvalidRegex:
        positions = [p for p, t in constructs(self.pattern) if t == token]
        where = f" (position {', '.join(map(str, positions))})" if positions else ""
        return InvalidRegex(
            f"the pattern {_short(self.pattern)} uses {what}{where}, which cannot be enforced while generating; "
            "rewrite the pattern without it"
        )


def _flattened(items: list[_Item]) -> list[_Item]:
    """Return the items with each group that sets no flags replaced by its content."""
    out: list[_Item] = []
    for op, argument in items:
        if op is sre.SUBPATTERN and not argument[1] and not argument[2]:
            out.extend(_flattened(list(argument[3])))
        else:
            out.append((op, argument))
    return out


def _joined(parts: list[ir.Node]) -> ir.Node:
    return parts[0] if len(parts) == 1 else ir.Concatenation(tuple(parts))


def _end_of_lazy(items: list[_Item]) -> int | None:
    """Return the end of the part that a lazy repeat makes as short as possible: after its last item that is not
    optional.
    """
    if not any(op is sre.MIN_REPEAT for op, _ in items):
        return None
    stop = len(items)
    while stop and items[stop - 1][0] is sre.MAX_REPEAT and items[stop - 1][1][0] == 0:
        stop -= 1
    return stop


def _shortest(node: ir.Node) -> ir.Node:
    """Return the texts of `node` that have no shorter beginning in `node`."""
    closed = ir.Terminal(node)  # so that lookaheads see only the node
    return ir.Intersect((closed, ir.Complement(ir.Concatenation((closed, ir.ANY_CHAR, ir.ANY_TEXT)))))


def _ends_in(node: ir.Node, ranges: ir.Ranges) -> tuple[ir.Node, ir.Node] | None:
    """Return the texts of `node` whose last character is in `ranges`, and its empty text.

    The empty text is a node without width, or NOTHING.
    """
    match node:
        case ir.Bytes(value):
            last = ord(value.decode()[-1])
            return (node if any(low <= last <= high for low, high in ranges) else ir.NOTHING), ir.NOTHING
        case ir.Chars(own):
            return ir.Chars(chars.intersect(own, ranges)), ir.NOTHING
        case ir.Lookahead():
            return ir.NOTHING, node
        case ir.Choice(options):
            found = [_ends_in(o, ranges) for o in options]
            if any(f is None for f in found):
                return None
            kept = [f for f in found if f is not None]
            empties = tuple(e for _, e in kept if e != ir.NOTHING)
            return ir.Choice(tuple(w for w, _ in kept)), (empties[0] if len(empties) == 1 else ir.Choice(empties))
        case ir.Repeat(item, low, high):
            one = _ends_in(item, ranges)
            if one is None or one[1] not in (ir.NOTHING, ir.EMPTY):
                return None
            least = 0 if one[1] == ir.EMPTY else max(low - 1, 0)
            most = None if high is None else max(high - 1, least)
            before = ir.Repeat(item, least, most)
            return ir.Concatenation((before, one[0])), ir.EMPTY if low == 0 or one[1] == ir.EMPTY else ir.NOTHING
        case ir.Concatenation(parts):
            ways: list[ir.Node] = []
            after: tuple[ir.Node, ...] = ()
            for i in reversed(range(len(parts))):
                part = _ends_in(parts[i], ranges)
                if part is None:
                    return None
                ways.append(ir.Concatenation((*parts[:i], part[0], *after)))
                after = (part[1], *after)
                if part[1] == ir.NOTHING:
                    return ir.Choice(tuple(ways)), ir.NOTHING
            return ir.Choice(tuple(ways)), ir.Concatenation(tuple(b for b in after if b != ir.EMPTY))
    return None


_ONE_CHARACTER = (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY)

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


def constructs(pattern: str) -> Iterable[tuple[int, str]]:
    """Yield (position, token) of each construct that may be refused, also in the comments of verbose patterns."""
    for m in _LEXEME.finditer(pattern):
        if m.lastgroup in ("backreference", "possessive"):
            yield m.start(), m.lastgroup
        elif m.lastgroup is not None:
            yield m.start(), m.group()


def _size(ranges: ir.Ranges) -> int:
    return sum(high - low + 1 for low, high in ranges)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")

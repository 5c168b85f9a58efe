r"""Python `re` patterns -> IR. A text is in the language exactly if `re.fullmatch(pattern, text)` matches.

Understood: literals, classes, `\d \w \s` (Unicode unless re.ASCII), groups, alternation, repetition (a lazy repeat has
the same texts as a greedy one), flags `i m s x a u` (also scoped), lookaheads, lookbehinds of one character, and `^ $
\A \Z \b \B`, and backreferences to groups with few texts (see backreferences.py). Refused with InvalidRegex, by name
and position: longer lookbehinds, other backreferences, conditionals, atomic groups, possessive repeats.

A language holds only texts that UTF-8 can write: a surrogate never matches. `\B` matches the empty text, as in Python
from 3.14 on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from re import _constants as sre
from re import _parser
from typing import Any

from ramet.errors import GrammarTooLarge, InvalidRegex
from ramet.grammar import ir
from ramet.grammar.regular import char_classes as chars
from ramet.grammar.regular.backreferences import ignoring_case, without_backreferences
from ramet.grammar.regular.lookbehind import END, UNKNOWN, without_lookbehinds

MAX_COUNT = 100_000

_CATEGORIES = {
    sre.CATEGORY_DIGIT: "d",
    sre.CATEGORY_NOT_DIGIT: "D",
    sre.CATEGORY_SPACE: "s",
    sre.CATEGORY_NOT_SPACE: "S",
    sre.CATEGORY_WORD: "w",
    sre.CATEGORY_NOT_WORD: "W",
}
_LAST_NEWLINE = ir.Lookahead(
    ir.Choice((ir.Chars(chars.NOT_NEWLINE), ir.Concatenation((ir.Chars(chars.NEWLINE), ir.ANY_CHAR)))), is_negative=True
)
_LINE_END = ir.Lookahead(ir.Chars(chars.NOT_NEWLINE), is_negative=True)

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
        node = without_lookbehinds(converter.whole(list(parsed), parsed.state.flags))
    except RecursionError as error:
        raise GrammarTooLarge(f"the pattern {_short(pattern)} is nested too deeply") from error
    return ir.Terminal(node, name or f"the pattern {_short(pattern)}")


class _Converter:
    """Turns the items of one pattern into nodes."""

    def __init__(self, pattern: str, is_lexeme: bool) -> None:
        self.pattern = pattern
        self.is_lexeme = is_lexeme
        self.referred: frozenset[int] = frozenset()  # the groups that back references name

    def whole(self, items: list[_Item], flags: int) -> ir.Node:
        """Return the node of the whole pattern, without back references."""
        self.referred = frozenset(_referred(items))
        return self.unreferred(self.sequence(items, flags))

    def unreferred(self, node: ir.Node) -> ir.Node:
        """Return a node without back references. All groups that it refers to are in it."""
        try:
            return without_backreferences(node)
        except InvalidRegex as error:
            raise self.refused("backreference", str(error)) from error

    def sequence(self, items: list[_Item], flags: int) -> ir.Node:
        """Return the node of a list of items."""
        items = _flattened(items, self.referred)
        parts: list[ir.Node] = []
        stop = _end_of_lazy(items) if self.is_lexeme else None
        for i, (op, argument) in enumerate(items):
            if i == stop:
                parts = [self.shortest(parts)]
            node = self.item(op, argument, flags)
            if isinstance(node, ir.Bytes) and parts and isinstance(parts[-1], ir.Bytes):
                parts[-1] = ir.Bytes(parts[-1].value + node.value)
            elif node != ir.EMPTY:
                parts.append(node)
        if stop == len(items):
            parts = [self.shortest(parts)]
        return _joined(parts)

    def shortest(self, parts: list[ir.Node]) -> ir.Node:
        """Return the texts of a sequence that have no shorter beginning in it."""
        node = without_lookbehinds(self.unreferred(_joined(parts)), UNKNOWN)
        closed = ir.Terminal(node)  # so that lookaheads see only the node
        return ir.Intersect((closed, ir.Complement(ir.Concatenation((closed, ir.ANY_CHAR, ir.ANY_TEXT)))))

    def item(self, op: Any, argument: Any, flags: int) -> ir.Node:
        if op is sre.SUBPATTERN:
            group, add, remove, inner = argument
            node = self.sequence(list(inner), (flags | add) & ~remove)
            return ir.Named(node, str(group)) if group in self.referred else node
        if op is sre.GROUPREF:
            reference = ir.Reference(str(argument))
            if flags & re.IGNORECASE:
                return ignoring_case(reference, is_ascii=bool(flags & re.ASCII))
            return reference
        if op is sre.BRANCH:
            return ir.Choice(tuple(self.sequence(list(way), flags) for way in argument[1]))
        if op is sre.MAX_REPEAT or op is sre.MIN_REPEAT:
            return self.repeat(argument, flags)
        if op is sre.AT:
            return self.anchor(argument, flags)
        if op is sre.ASSERT or op is sre.ASSERT_NOT:
            return self.lookbehind(op, argument, flags) if argument[0] < 0 else self.lookahead(op, argument, flags)
        if op is sre.FAILURE:
            return ir.NOTHING
        if op in _REFUSED:
            raise self.refused(*_REFUSED[op])
        ranges = self.characters(op, argument, flags)
        is_one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
        return ir.Bytes(chr(ranges[0][0]).encode()) if is_one else ir.Chars(ranges)

    def repeat(self, argument: Any, flags: int) -> ir.Node:
        low, high, inner = argument
        most = None if high is sre.MAXREPEAT else int(high)
        if low > MAX_COUNT or (most or 0) > MAX_COUNT:
            raise GrammarTooLarge(
                f"the pattern {_short(self.pattern)} repeats {max(low, most or 0):,} times; the limit is {MAX_COUNT:,}"
            )
        node = self.sequence(list(inner), flags)
        return ir.EMPTY if most == 0 or node == ir.EMPTY else ir.Repeat(node, low, most)

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

    # --- what has no width

    def anchor(self, at: Any, flags: int) -> ir.Node:
        multiline = bool(flags & re.MULTILINE)
        if at in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            word = chars.category("w", bool(flags & re.ASCII))
            after, before = ir.Lookbehind(word, at_start=False), ir.Lookahead(ir.Chars(word))
            not_after = ir.Lookbehind(chars.complement(word), at_start=True)
            not_before = ir.Lookahead(ir.Chars(word), is_negative=True)
            if at is sre.AT_NON_BOUNDARY:
                before, not_before = not_before, before
            return ir.Choice((ir.Concatenation((after, not_before)), ir.Concatenation((not_after, before))))
        if at in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            if self.is_lexeme:
                raise self.beyond("^" if at is sre.AT_BEGINNING else r"\A")
            return ir.Lookbehind(chars.NEWLINE if multiline and at is sre.AT_BEGINNING else (), at_start=True)
        if self.is_lexeme:
            raise self.beyond("$" if at is sre.AT_END else r"\Z")
        if at is sre.AT_END_STRING:
            return END
        return _LINE_END if multiline else _LAST_NEWLINE

    def lookahead(self, op: Any, argument: Any, flags: int) -> ir.Node:
        is_negative = op is sre.ASSERT_NOT
        if self.is_lexeme and not is_negative:
            raise self.beyond("(?=")
        return ir.Lookahead(self.sequence(list(argument[1]), flags), is_negative)

    def lookbehind(self, op: Any, argument: Any, flags: int) -> ir.Node:
        is_negative = op is sre.ASSERT_NOT
        inner = _flattened(list(argument[1]), frozenset())
        if len(inner) != 1 or inner[0][0] not in _ONE_CHARACTER:
            raise self.refused("(?<!" if is_negative else "(?<=", "a lookbehind of more than one character")
        ranges = self.characters(*inner[0], flags)
        at_start = None if self.is_lexeme else is_negative
        return ir.Lookbehind(chars.complement(ranges) if is_negative else ranges, at_start)

    def beyond(self, token: str) -> InvalidRegex:
        return self.refused(token, f"{token} (it looks beyond the terminal)")

    def refused(self, token: str, what: str) -> InvalidRegex:
        positions = [p for p, t in constructs(self.pattern) if t == token]
        where = f" (position {', '.join(map(str, positions))})" if positions else ""
        return InvalidRegex(
            f"the pattern {_short(self.pattern)} uses {what}{where}, which cannot be enforced while generating; "
            f"{_INSTEAD.get(token, 'rewrite the pattern without it')}"
        )


def _referred(items: Any) -> Iterator[int]:  # Any: parts of sre's tree, which is nested sequences
    """Yield the numbers of the groups that back references name."""
    if isinstance(items, tuple) and len(items) == 2 and items[0] is sre.GROUPREF:
        yield items[1]
    elif isinstance(items, list | tuple | _parser.SubPattern):
        for one in items:
            yield from _referred(one)


def _flattened(items: list[_Item], kept: frozenset[int]) -> list[_Item]:
    """Return the items with each group that sets no flags, and is not to be kept, replaced by its content."""
    out: list[_Item] = []
    for op, argument in items:
        if op is sre.SUBPATTERN and not argument[1] and not argument[2] and argument[0] not in kept:
            out.extend(_flattened(list(argument[3]), kept))
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


_ONE_CHARACTER = (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY)

_REFUSED = {
    sre.GROUPREF_EXISTS: ("(?(", "a conditional group"),
    sre.ATOMIC_GROUP: ("(?>", "an atomic group"),
    sre.POSSESSIVE_REPEAT: ("possessive", "a possessive repeat"),
}

_INSTEAD = {  # the way out, where there is a usual one
    "backreference": "write the texts of the group out, as `'[^']*'|\"[^\"]*\"` for `(['\"]).*?\\1`",
    "(?<=": "look at one character, or let the pattern read what stands before: `(foo)bar` for `foo(?<=foo)bar`",
    "(?<!": "look at one character, or write out what may stand before",
    "(?(": "write both ways out as alternatives: `ab|c` for `(a)?(?(1)b|c)`",
    **dict.fromkeys(("^", "$", r"\A", r"\Z"), "leave it out: a terminal begins and ends by itself"),
    "(?=": "write what follows into the rule behind the terminal",
    "(?>": "use a plain group, and say in it what must not follow",
    "possessive": "use a plain repeat, and say behind it what must not follow",
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


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")

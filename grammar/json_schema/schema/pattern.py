"""Regular expressions of JSON Schema (ECMA-262 with the u flag, leniently) to IR nodes over code points.

A pattern is searched for, not matched whole. So `search` allows any text around it, except where it is anchored.
Refused by name: back references, lookbehind, word boundaries, and anchors in places that depend on the text before.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from ramet.errors import InvalidRegex
from ramet.grammar import deadline, ir

_DIGITS: ir.Ranges = ((48, 57),)
_WORD: ir.Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: ir.Ranges = ir.normalize_ranges(
    [
        (9, 13),
        (32, 32),
        (0xA0, 0xA0),
        (0x1680, 0x1680),
        (0x2000, 0x200A),
        (0x2028, 0x2029),
        (0x202F, 0x202F),
        (0x205F, 0x205F),
        (0x3000, 0x3000),
        (0xFEFF, 0xFEFF),
    ]
)
_LINE_ENDS: ir.Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0, "a": 7, "e": 27}
MAX_REPEAT = 1_000_000
MAX_DEPTH = 100
MIN_COUNT = 100  # from this count on, repetitions of one class are counted without states
_COUNTED = re.compile(r"\^(\.|\\[dDsSwW]|\[(?:[^\]\\]|\\.)+\])\{([0-9]{1,9})(?:(,)([0-9]{0,9}))?\}\$")


class UnsupportedPattern(InvalidRegex):
    """A pattern that is valid but cannot be enforced. The message names the construct."""


@dataclass(frozen=True, slots=True)
class _Anchor:
    """`^` (is_start) or `$`."""

    is_start: bool


_START, _END = _Anchor(True), _Anchor(False)
_Part = ir.Node | _Anchor


def search(pattern: str) -> ir.Node:
    """Return the texts in which `pattern` is found.

    Raises: InvalidRegex with the position; UnsupportedPattern naming the construct.
    """
    return ir.Choice(tuple(_around(branch) for branch in _branches(_Parser(pattern).parse())))


def without_count(source: str) -> tuple[str, tuple[int, int | None]] | tuple[str]:
    """Split a pattern that is only one repeated character class into the class and the count.

    `^[a-z]{1,5000}$` is `^[a-z]*$` in strings of 1..5000 characters, and these are counted at no cost (see lengths.py).
    """
    found = _COUNTED.fullmatch(source)
    if found is None:
        return (source,)
    low, comma, high = found[2], found[3], found[4]
    most = int(high) if high else None if comma else int(low)
    if max(int(low), most or 0) < MIN_COUNT or (most is not None and int(low) > most):
        return (source,)
    return f"^{found[1]}*$", (int(low), most)


def _branches(node: ir.Node) -> list[ir.Node]:
    """Split alternatives at the top level, so that each has its own anchors."""
    if isinstance(node, ir.Choice):
        return [b for o in node.options for b in _branches(o)]
    if isinstance(node, ir.Concatenation) and node.parts:
        parts = list(node.parts)
        for at in (0, len(parts) - 1):
            part = parts[at]
            if isinstance(part, ir.Repeat) and (part.low, part.high) == (0, 1) and _has_anchor(part):
                part = ir.Choice((part.item, ir.EMPTY))
            if isinstance(part, ir.Concatenation):
                return _branches(ir.Concatenation((*parts[:at], *part.parts, *parts[at + 1 :])))
            if isinstance(part, ir.Choice) and _has_anchor(part):
                out = []
                for option in part.options:
                    out.extend(_branches(ir.Concatenation((*parts[:at], option, *parts[at + 1 :]))))
                return out
    return [node]


def _around(node: ir.Node) -> ir.Node:
    parts: list[_Part] = list(node.parts) if isinstance(node, ir.Concatenation) else [node]
    starts = ends = False
    while parts and parts[0] is _START:
        starts = True
        parts.pop(0)
    while parts and parts[-1] is _END:
        ends = True
        parts.pop()
    # an anchor between assertions at the very start still holds: ^(?=a)^b
    inner = [_resolve(p, i == 0 or all(isinstance(q, ir.Lookahead) for q in parts[:i])) for i, p in enumerate(parts)]
    whole: list[ir.Node] = [] if starts else [ir.ANY_TEXT]
    whole.extend(inner)
    if not ends:
        whole.append(ir.ANY_TEXT)
    return ir.Concatenation(tuple(whole))


def _has_anchor(node: _Part) -> bool:
    match node:
        case _Anchor():
            return True
        case ir.Concatenation(parts) | ir.Choice(parts):
            return any(_has_anchor(p) for p in parts)
        case ir.Repeat(item, _, _):
            return _has_anchor(item)
        case _:
            return False


def _resolve(node: _Part, at_start: bool) -> ir.Node:
    """Turn the anchors inside a part into lookaheads, or refuse them."""
    match node:
        case _Anchor(is_start):
            if is_start:
                raise UnsupportedPattern("an anchor ^ that is not at the start of an alternative")
            return ir.Lookahead(ir.ANY_CHAR, is_negative=True)
        case ir.Concatenation(parts):
            return ir.Concatenation(tuple(_resolve(p, False) for p in parts))
        case ir.Choice(parts):
            return ir.Choice(tuple(_resolve(p, False) for p in parts))
        case ir.Repeat(item, low, high):
            return ir.Repeat(_resolve(item, False), low, high)
        case ir.Lookahead(item, negative):
            return ir.Lookahead(_lookahead(item, at_start), negative)
        case _:
            return node


def _lookahead(item: ir.Node, at_start: bool) -> ir.Node:
    branches = []
    for branch in _branches(item):
        parts: list[_Part] = list(branch.parts) if isinstance(branch, ir.Concatenation) else [branch]
        while at_start and parts and parts[0] is _START:
            parts.pop(0)
        branches.append(ir.Concatenation(tuple(_resolve(p, False) for p in parts)))
    return ir.Choice(tuple(branches))


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.text = pattern
        self.name = f"pattern {pattern[:100]!r}"
        self.at = 0
        self.ignore_case = False
        self.dot_all = False
        self.depth = 0

    def parse(self) -> ir.Node:
        node = self.alternatives()
        if self.at < len(self.text):
            raise self.error("unmatched )")
        return node

    def error(self, what: str) -> InvalidRegex:
        return InvalidRegex(f"pattern {self.text[:200]!r}: {what} at position {self.at}")

    def unsupported(self, what: str) -> UnsupportedPattern:
        return UnsupportedPattern(f"pattern {self.text[:200]!r}: {what} is not supported (position {self.at})")

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, expected: str) -> bool:
        if self.text.startswith(expected, self.at):
            self.at += len(expected)
            return True
        return False

    def alternatives(self) -> ir.Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"groups nested deeper than {MAX_DEPTH}")
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else ir.Choice(tuple(options))

    def sequence(self) -> ir.Node:
        parts: list[_Part] = []
        while self.peek() not in ("", "|", ")"):
            atom = self.atom()
            if atom is not None:
                parts.append(self.quantified(atom))
        return ir.Concatenation(tuple(parts))  # type: ignore[arg-type]  # anchors are resolved by `search`

    def quantified(self, atom: _Part) -> _Part:
        low, high = 1, 1
        c = self.peek()
        if c and c in "*+?":
            self.at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]  # type: ignore[assignment]
        elif c == "{":
            found = self.braces()
            if found is None:
                return atom
            low, high = found  # type: ignore[assignment]
        else:
            return atom
        if not self.take("?") and self.peek() == "+":
            raise self.unsupported("a possessive quantifier")
        if self.peek() and self.peek() in "*+?":
            raise self.error("nothing to repeat")
        if isinstance(atom, _Anchor):
            return ir.EMPTY if low == 0 else atom
        if isinstance(atom, ir.Lookahead):
            return ir.EMPTY if low == 0 else atom
        return ir.Repeat(atom, low, high)

    def braces(self) -> tuple[int, int | None] | None:
        """Read {n}, {n,} or {n,m}. Anything else is a literal brace."""
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : end].partition(",") if end > 0 else ("", "", "")
        if not (low.isascii() and low.isdigit()) or (high and not (high.isascii() and high.isdigit())):
            return None
        self.at = end + 1
        numbers = int(low), (int(high) if high else None) if comma else int(low)
        if max(numbers[0], numbers[1] or 0) > MAX_REPEAT:
            raise self.error(f"a repetition beyond {MAX_REPEAT:,}")
        if numbers[1] is not None and numbers[0] > numbers[1]:
            raise self.error("numbers out of order in {}")
        return numbers

    def atom(self) -> _Part | None:
        deadline.check(self.name)
        c = self.text[self.at]
        self.at += 1
        if c == "^":
            return _START
        if c == "$":
            return _END
        if c == ".":
            return ir.ANY_CHAR if self.dot_all else ir.Chars(ir.complement_ranges(_LINE_ENDS))
        if c == "(":
            return self.group()
        if c == "[":
            return self.char_class()
        if c == "\\":
            return self.escape()
        if c in "*+?":
            raise self.error("nothing to repeat")
        if c == "{":
            self.at -= 1
            if self.braces() is not None:
                raise self.error("nothing to repeat")
            self.at += 1
        return self.literal(ord(c))

    def literal(self, code: int) -> ir.Node:
        return ir.Chars(self.folded([(code, code)]))

    def folded(self, ranges: list[tuple[int, int]]) -> ir.Ranges:
        if not self.ignore_case:
            return ir.normalize_ranges(ranges)
        out = list(ranges)
        for low, high in ranges:
            for code in range(low, min(high, low + 1000) + 1):
                out.extend((ord(v), ord(v)) for v in (chr(code).lower(), chr(code).upper()) if len(v) == 1)
        return ir.normalize_ranges(out)

    def group(self) -> _Part | None:
        if not self.take("?"):
            return self.finish_group()
        if self.take(":"):
            return self.finish_group()
        if self.take("="):
            return ir.Lookahead(self.finish_group())
        if self.take("!"):
            return ir.Lookahead(self.finish_group(), is_negative=True)
        if self.take("<=") or self.take("<!"):
            raise self.unsupported("lookbehind")
        if self.take("#"):
            end = self.text.find(")", self.at)
            if end < 0:
                raise self.error("missing )")
            self.at = end + 1
            return None
        if self.take("<") or self.take("P<"):
            end = self.text.find(">", self.at)
            if end < 0:
                raise self.error("missing >")
            self.at = end + 1
            return self.finish_group()
        if self.take("P="):
            raise self.unsupported("a back reference")
        return self.flags()

    def flags(self) -> _Part | None:
        begin = self.at
        while self.peek() and self.peek() in "imsuxa":
            self.at += 1
        letters = self.text[begin : self.at]
        if not letters or set(letters) - set("isua"):
            raise self.unsupported(f"the group (?{self.text[begin : begin + 1]}")
        before = self.ignore_case, self.dot_all
        self.ignore_case |= "i" in letters
        self.dot_all |= "s" in letters
        if self.take(")"):
            return None
        if not self.take(":"):
            raise self.error("missing : in group")
        node = self.finish_group()
        self.ignore_case, self.dot_all = before
        return node

    def finish_group(self) -> ir.Node:
        node = self.alternatives()
        if not self.take(")"):
            raise self.error("missing )")
        return node

    # --- characters

    def escape(self) -> _Part:
        c = self.peek()
        if c in ("b", "B"):
            raise self.unsupported("a word boundary")
        if (c.isdigit() and c != "0") or c == "k":
            raise self.unsupported("a back reference")
        if c in ("A", "Z", "z"):  # not ECMA, but common
            self.at += 1
            return _START if c == "A" else _END
        return ir.Chars(self.folded(self.class_escape()))

    def class_escape(self) -> list[tuple[int, int]]:
        """Return the ranges of an escape inside a class, after its backslash."""
        c = self.peek()
        if not c:
            raise self.error("a backslash at the end")
        self.at += 1
        if c in "dDwWsS":
            ranges = {"d": _DIGITS, "w": _WORD, "s": _SPACE}[c.lower()]
            return list(ranges if c.islower() else ir.complement_ranges(ranges))
        if c in "pP":
            return self.property(c == "P")
        code = self.code_of(c)
        return [(code, code)]

    def code_of(self, c: str) -> int:
        if c in _CONTROL:
            return _CONTROL[c]
        if c == "x":
            return self.hex_digits(2)
        if c == "u":
            if self.take("{"):
                end = self.text.find("}", self.at)
                digits = self.text[self.at : end] if end > 0 else ""
                self.at = end + 1
                try:
                    code = int(digits, 16)
                except ValueError:
                    raise self.error("a bad \\u{} escape") from None
                if code > ir.MAX_CODE_POINT:
                    raise self.error("a code point beyond 10FFFF")
                return code
            code = self.hex_digits(4)
            if 0xD800 <= code <= 0xDBFF and self.text.startswith("\\u", self.at):
                mark = self.at
                self.at += 2
                low = self.hex_digits(4)
                if 0xDC00 <= low <= 0xDFFF:
                    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                self.at = mark
            return code
        if c == "c" and self.peek().isascii() and self.peek().isalpha():
            self.at += 1
            return ord(self.text[self.at - 1]) % 32
        return ord(c)

    def hex_digits(self, count: int) -> int:
        digits = self.text[self.at : self.at + count]
        try:
            code = int(digits, 16)
        except ValueError:
            raise self.error("a bad hexadecimal escape") from None
        if len(digits) != count:
            raise self.error("a bad hexadecimal escape")
        self.at += count
        return code

    def property(self, negated: bool) -> list[tuple[int, int]]:
        if not self.take("{"):
            raise self.error("\\p without {")
        end = self.text.find("}", self.at)
        if end < 0:
            raise self.error("missing }")
        name = self.text[self.at : end]
        self.at = end + 1
        ranges = unicode_property(name.rpartition("=")[2])
        if ranges is None:
            raise self.unsupported(f"the Unicode property {name}")
        return list(ir.complement_ranges(ranges) if negated else ranges)

    def char_class(self) -> ir.Node:
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while True:
            c = self.peek()
            if not c:
                raise self.error("missing ]")
            self.at += 1
            if c == "]" and not first:
                break
            if c == "]" and first and self.text.find("]", self.at) < 0:
                break
            if c == "]" and first:  # [] is the empty class, [^] any character
                break
            first = False
            low = self.class_atom(c)
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                mark = self.at
                self.at += 2
                high = self.class_atom(self.text[self.at - 1])
                if isinstance(low, int) and isinstance(high, int):
                    if low > high:
                        self.at = mark
                        raise self.error("a range out of order")
                    ranges.append((low, high))
                    continue
                self.at = mark
            ranges.extend([(low, low)] if isinstance(low, int) else low)
        folded = self.folded(ranges)
        return ir.Chars(ir.complement_ranges(folded) if negated else folded)

    def class_atom(self, c: str) -> int | list[tuple[int, int]]:
        if c != "\\":
            return ord(c)
        if self.peek() == "b":
            self.at += 1
            return 8
        ranges = self.class_escape()
        return ranges[0][0] if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else ranges


_LONG_NAMES = {
    "Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm",
    "Other_Letter": "Lo", "Mark": "M", "Nonspacing_Mark": "Mn", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd",
    "Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P", "Symbol": "S", "Separator": "Z",
    "Space_Separator": "Zs", "Other": "C", "Control": "Cc", "cntrl": "Cc",
}  # fmt: skip


@cache
def unicode_property(name: str) -> ir.Ranges | None:
    """Return the code points of a general category (by short or long name) or of one of a few binary properties.

    None if the property is unknown.
    """
    if name == "Any":
        return ((0, ir.MAX_CODE_POINT),)
    if name == "ASCII":
        return ((0, 127),)
    if name in ("Alphabetic", "Alpha"):
        name = "L"
    category = _LONG_NAMES.get(name, name)
    if not 1 <= len(category) <= 2 or category[0] not in "LMNPSZC":
        return None
    out: list[tuple[int, int]] = []
    for code in range(ir.MAX_CODE_POINT + 1):
        if unicodedata.category(chr(code)).startswith(category):
            if out and out[-1][1] == code - 1:
                out[-1] = (out[-1][0], code)
            else:
                out.append((code, code))
    return tuple(out) or None

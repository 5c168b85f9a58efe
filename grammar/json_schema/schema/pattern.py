"""Regular expressions of JSON Schema (ECMA-262 with the u flag, leniently) to IR nodes over code points.

A pattern is searched for, not matched whole. So `search` allows any text around it, except where it is anchored.
Refused by name: lookbehinds of more than one character, and back references to other groups than those with few texts
(see backreferences.py).
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from ramet.errors import InvalidRegex
from ramet.grammar import deadline, ir
from ramet.grammar.regular.backreferences import without_backreferences
from ramet.grammar.regular.lookbehind import END, without_lookbehinds

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
_REFERENCE = re.compile(r"\\([1-9][0-9]*)|\\k<([^>]*)>|\(\?P=([^)]*)\)")
_COUNTED = re.compile(r"\^(\.|\\[dDsSwW]|\[(?:[^\]\\]|\\.)+\])\{([0-9]{1,9})(?:(,)([0-9]{0,9}))?\}\$")


class UnsupportedPattern(InvalidRegex):
    """A pattern that is valid but cannot be enforced. The message names the construct."""


_START = ir.Lookbehind((), at_start=True)
_AFTER_WORD = ir.Lookbehind(_WORD, at_start=False)
_NOT_AFTER_WORD = ir.Lookbehind(ir.complement_ranges(_WORD), at_start=True)
_BEFORE_WORD, _NOT_BEFORE_WORD = ir.Lookahead(ir.Chars(_WORD)), ir.Lookahead(ir.Chars(_WORD), is_negative=True)
_BOUNDARIES = {
    "b": ((_AFTER_WORD, _NOT_BEFORE_WORD), (_NOT_AFTER_WORD, _BEFORE_WORD)),
    "B": ((_AFTER_WORD, _BEFORE_WORD), (_NOT_AFTER_WORD, _NOT_BEFORE_WORD)),
}


def search(pattern: str) -> ir.Node:
    """Return the texts in which `pattern` is found.

    Raises: InvalidRegex with the position; UnsupportedPattern naming the construct.
    """
    node = _Parser(pattern).parse()
    try:
        node = without_backreferences(node)
    except InvalidRegex as error:
        raise UnsupportedPattern(f"pattern {pattern[:200]!r}: {error} is not supported") from error
    return without_lookbehinds(ir.Concatenation((ir.ANY_TEXT, node, ir.ANY_TEXT)))


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


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.text = pattern
        self.name = f"pattern {pattern[:100]!r}"
        self.at = 0
        self.ignore_case = False
        self.dot_all = False
        self.depth = 0
        self.num_groups = 0
        # names and numbers; in a class, what looks like a reference is none, which is harmless
        self.referred = {name for found in _REFERENCE.findall(pattern) for name in found}

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
        parts: list[ir.Node] = []
        while self.peek() not in ("", "|", ")"):
            atom = self.atom()
            if atom is not None:
                parts.append(self.quantified(atom))
        return ir.Concatenation(tuple(parts))

    def quantified(self, atom: ir.Node) -> ir.Node:
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
        if isinstance(atom, ir.Lookahead | ir.Lookbehind):
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

    def atom(self) -> ir.Node | None:
        deadline.check(self.name)
        c = self.text[self.at]
        self.at += 1
        if c == "^":
            return _START
        if c == "$":
            return END
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

    def group(self) -> ir.Node | None:
        if not self.take("?"):
            return self.captured("")
        if self.take(":"):
            return self.finish_group()
        if self.take("="):
            return ir.Lookahead(self.finish_group())
        if self.take("!"):
            return ir.Lookahead(self.finish_group(), is_negative=True)
        if self.take("<="):
            return self.lookbehind(is_negative=False)
        if self.take("<!"):
            return self.lookbehind(is_negative=True)
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
            name, self.at = self.text[self.at : end], end + 1
            return self.captured(name)
        if self.take("P="):
            return self.reference_to(self.up_to(")"))
        return self.flags()

    def captured(self, name: str) -> ir.Node:
        self.num_groups += 1
        number = str(self.num_groups)
        node = self.finish_group()
        for one in (number, name):
            node = ir.Named(node, one) if one in self.referred - {""} else node
        return node

    def reference_to(self, name: str) -> ir.Node:
        if self.ignore_case:
            raise self.unsupported("a back reference that ignores case")
        return ir.Reference(name)

    def up_to(self, mark: str) -> str:
        end = self.text.find(mark, self.at)
        if end < 0:
            raise self.error(f"missing {mark}")
        begin, self.at = self.at, end + 1
        return self.text[begin:end]

    def lookbehind(self, *, is_negative: bool) -> ir.Node:
        at = self.at
        node = self.finish_group()
        while isinstance(node, ir.Concatenation | ir.Choice) and len(parts := _parts(node)) == 1:
            node = parts[0]
        if not isinstance(node, ir.Chars):
            self.at = at
            raise self.unsupported("a lookbehind of more or less than one character")
        return ir.Lookbehind(ir.complement_ranges(node.ranges) if is_negative else node.ranges, is_negative)

    def flags(self) -> ir.Node | None:
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

    def escape(self) -> ir.Node:
        c = self.peek()
        if c in _BOUNDARIES:
            self.at += 1
            return ir.Choice(tuple(map(ir.Concatenation, _BOUNDARIES[c])))
        if c in "123456789" and c:
            begin = self.at
            while self.peek().isascii() and self.peek().isdigit():
                self.at += 1
            return self.reference_to(self.text[begin : self.at])
        if self.take("k<"):
            return self.reference_to(self.up_to(">"))
        if c in ("A", "Z", "z"):  # not ECMA, but common
            self.at += 1
            return _START if c == "A" else END
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


def _parts(node: ir.Concatenation | ir.Choice) -> tuple[ir.Node, ...]:
    return node.parts if isinstance(node, ir.Concatenation) else node.options


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

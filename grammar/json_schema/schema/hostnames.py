"""Host names beyond ASCII (RFC 5890 to 5893) as a pattern. It describes names whose validity shows letter by letter.

It is stricter than the RFCs. Labels are in lower case, in the scripts whose letters are listed below. A label beyond
ASCII has at most 16 characters, so that its encoded form has at most 63 bytes. There are no two hyphens in a row and no
combining accents. Labels that are already encoded (`xn--`) are left out, because no regular language tells whether they
can be decoded.
"""

from __future__ import annotations

from ramet.grammar import ir
from ramet.grammar.json_schema.schema.pattern import search

MAX_CHARACTERS = 55
"""Of a whole name: its encoded form has at most 253 bytes, though every second character may take nine."""

_LATIN = "\\u00DF-\\u00F6\\u00F8-\\u00FF" + "".join(
    f"\\u{code:04X}"
    for code in range(0x0100, 0x0180)
    if chr(code).islower() and code not in (0x0133, 0x0140, 0x0149, 0x017F)
)
_GREEK = "\\u03AC-\\u03CE"
_CYRILLIC = "\\u0430-\\u045F"
_DEVANAGARI = "\\u0904-\\u0928\\u092A-\\u0930\\u0932\\u0933\\u0935-\\u0939\\u0966-\\u096F"
_DEVANAGARI_SIGNS = "\\u093E-\\u094C"
_TIBETAN = "\\u0F0B"
_KANA_HAN = "\\u3041-\\u3096\\u30A1-\\u30FA\\u3007\\u4E00-\\u9FFF"
_HANGUL = "\\uAC00-\\uD7A3"
_HEBREW = "\\u05D0-\\u05EA"
_ARABIC_DUAL = "\\u0628\\u062A-\\u062E\\u0633-\\u063A\\u0641-\\u0647\\u064A"  # letters that join to both sides
_ARABIC_RIGHT = "\\u0627\\u0629\\u062F-\\u0632\\u0648"  # letters that join to the letter before
_RIGHT_TO_LEFT = f"{_HEBREW}{_ARABIC_DUAL}{_ARABIC_RIGHT}\\u0621\\u06FD\\u06FE"

_LETTER = f"0-9a-z\\u06F0-\\u06F9{_LATIN}{_GREEK}{_CYRILLIC}{_DEVANAGARI}{_TIBETAN}{_KANA_HAN}{_HANGUL}"
# characters that stand only beside certain letters come with them: middle dot, Greek keraia, katakana middle dot,
# virama
_TOGETHER = (
    f"l(?:\\u00B7l)+|[{_GREEK}](?:\\u0375[{_GREEK}])+|\\u30FB+[{_KANA_HAN}]|[\\u0915-\\u0928]\\u094D[\\u200C\\u200D]?"
)
_LEFT_TO_RIGHT = f"(?:[{_LETTER}]|{_TOGETHER})(?:-?(?:[{_LETTER}]|{_TOGETHER})|[{_DEVANAGARI_SIGNS}])*"
_JOINED = (
    f"[{_ARABIC_DUAL}](?:\\u200C[{_ARABIC_DUAL}])*\\u200C[{_ARABIC_DUAL}{_ARABIC_RIGHT}]"
    f"|[{_HEBREW}](?:[\\u05F3\\u05F4][{_HEBREW}])+"
)


def _right_to_left(digits: str) -> str:
    return f"(?:[{_RIGHT_TO_LEFT}]|{_JOINED})(?:-?(?:[{_RIGHT_TO_LEFT}{digits}]|{_JOINED}))*"


_DOT = "[.\\u3002\\uFF0E\\uFF61]"
_ASCII = "(?![Xx][Nn]-)[0-9A-Za-z]+(?:-[0-9A-Za-z]+)*"


def idn_hostname() -> ir.Node:
    """Return the language, over code points. The caller must limit it to MAX_CHARACTERS."""
    arabic_indic = _right_to_left("\\u0660-\\u0669")  # must not be mixed with other digits
    wide = search(f"^(?:{_LEFT_TO_RIGHT}|{_right_to_left('0-9')}|{arabic_indic})$")
    label = ir.Choice((search(f"^(?:{_ASCII})$"), ir.Intersect((wide, ir.Repeat(ir.ANY_CHAR, 1, 16)))))
    return ir.Concatenation((label, ir.Repeat(ir.Concatenation((search(f"^{_DOT}$"), label)))))

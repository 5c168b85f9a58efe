"""Placeholders: short strings that represent values that do not exist yet.

`f"Dear {s['name']}"` must give a string at once. So formatting a value inserts a short run of private-use characters.
It represents the value until the text is appended to a branch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from itertools import count

from ramet.errors import InvalidProgram

# One placeholder: START, eight digits in base 256 (four of the run's key, four of the index), a label, END. The label
# explains a placeholder that is seen by mistake (printed, or in a file's name). All characters except the label are in
# Unicode's Supplementary Private Use Area-A, which text does not use; the key makes a chance match impossible.
_START, _END, _ZERO = "\U000f0000", "\U000f0001", 0xF0100
PLACEHOLDER = re.compile(f"{_START}([\U000f0100-\U000f01ff]{{8}})[^{_END}]*{_END}")
_CUT = re.compile(f"{_START}([\U000f0100-\U000f01ff]{{2,4}})")  # its beginning, with a part of the key
_ESCAPED = (r"\udb80\udc00", r"\U000f0000", "%F3%B0%80%80")  # START, as json.dumps, repr() and urllib write it


def has_placeholder(text: str) -> bool:
    """Return whether the text contains a placeholder of a value or of a description such as `gen(...)`."""
    return str.__contains__(text, _START)  # not `in`, which may read the value (ValueText)


class Placeholders:
    """The placeholders of one run. `key` distinguishes them from those of other runs."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(4)
        self._items: dict[int, tuple[object, str]] = {}  # with the label
        self._indices = count()  # several threads of a program may put values into text

    def add(self, item: object, label: str) -> str:
        index = next(self._indices)
        label = f"‹Value of {label}›"  # a change of its letters shows that the text was changed
        self._items[index] = (item, label)
        digits = self.key + index.to_bytes(4, "big")
        return _START + "".join(chr(_ZERO + byte) for byte in digits) + label + _END

    def split(self, text: str, foreign: Callable[[bytes, int], object]) -> list[object]:
        """Split text into strings and the items of its placeholders. `foreign` returns the item of another run.

        Raises InvalidProgram if the text was changed within a placeholder: cut, escaped, in capitals.
        """
        text = str.__str__(text)  # a plain string, also of a ValueText
        if self._items and any(mark in text for mark in _ESCAPED):
            raise InvalidProgram(
                "a text was escaped (by json.dumps, repr or urllib, say) while a generated value stands in it; read "
                "the value first: str(s[...])"
            )
        if _START not in text:
            return [self._whole(text)] if text else []
        found: list[object] = []
        start = 0
        for match in PLACEHOLDER.finditer(text):
            if match.start() > start:
                found.append(self._whole(text[start : match.start()]))
            found.append(self._item(match, foreign))
            start = match.end()
        if start < len(text):
            found.append(self._whole(text[start:]))
        return found

    def _item(self, match: re.Match[str], foreign: Callable[[bytes, int], object]) -> object:
        digits = bytes(ord(char) - _ZERO for char in match[1])
        index = int.from_bytes(digits[4:], "big")
        if digits[:4] != self.key:
            return foreign(digits[:4], index)
        item, label = self._items[index]
        if match[0][9:-1] != label:
            raise InvalidProgram(
                f"a text was changed (by upper() or replace(), say) while {label} stands in it; read the value "
                "first: str(s[...])"
            )
        return item

    def _whole(self, text: str) -> str:
        """Return text without placeholders. Raises InvalidProgram if it contains a part of one of this run."""
        cuts = _CUT.findall(text) if _START in text else ()
        is_cut = any(self.key.startswith(bytes(ord(char) - _ZERO for char in digits)) for digits in cuts)
        if is_cut or (self._items and "›" + _END in text):
            raise InvalidProgram(
                "a text was cut within a generated value that stands in it; read the value first: str(s[...])"
            )
        return text

    def get(self, index: int) -> object:
        return self._items[index][0]

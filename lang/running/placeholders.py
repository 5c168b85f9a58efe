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


def has_placeholder(text: str) -> bool:
    """Return whether the text contains a placeholder of a value or of a description such as `gen(...)`."""
    return _START in text


class Placeholders:
    """The placeholders of one run. `key` distinguishes them from those of other runs."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(4)
        self._items: dict[int, object] = {}
        self._indices = count()  # several threads of a program may put values into text

    def add(self, item: object, label: str) -> str:
        index = next(self._indices)
        self._items[index] = item
        digits = self.key + index.to_bytes(4, "big")
        return _START + "".join(chr(_ZERO + byte) for byte in digits) + f"‹{label}›" + _END

    def split(self, text: str, foreign: Callable[[bytes, int], object]) -> list[object]:
        """Split text into strings and the items of its placeholders. `foreign` returns the item of another run."""
        if _START not in text:
            return [text] if text else []
        found: list[object] = []
        for i, piece in enumerate(PLACEHOLDER.split(text)):
            if i % 2 == 0:
                if piece:
                    found.append(self._whole(piece))
                continue
            digits = bytes(ord(char) - _ZERO for char in piece)
            index = int.from_bytes(digits[4:], "big")
            found.append(self._items[index] if digits[:4] == self.key else foreign(digits[:4], index))
        return found

    def _whole(self, text: str) -> str:
        """Return text without placeholders. Raises InvalidProgram if it contains a part of one of this run."""
        for digits in _CUT.findall(text) if _START in text else ():
            if self.key.startswith(bytes(ord(char) - _ZERO for char in digits)):
                raise InvalidProgram(
                    "a text was cut within a generated value that stands in it; read the value first: str(s[...])"
                )
        return text

    def get(self, index: int) -> object:
        return self._items[index]

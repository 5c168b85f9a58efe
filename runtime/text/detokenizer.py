"""Incremental detokenizing: turns token ids into text as they come, and finds stop strings in that text.

A token costs time for its own bytes only, not for the text so far. The bytes of an incomplete character are held back,
and so is text that may be the beginning of a stop string, or of what follows a constrained value.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class Detokenizer:
    """Decodes UTF-8 piece by piece; the pieces together equal decoding all bytes at once, with U+FFFD for errors."""

    __slots__ = ("_decoder", "_held", "_num_to_skip", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes], num_to_skip: int = 0) -> None:
        """`num_to_skip`: the bytes at the beginning that are no part of the text."""
        self._token_bytes = token_bytes
        self._num_to_skip = num_to_skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""

    def push(self, token_ids: Iterable[int], num_held: int = 0) -> str:
        """Return the text that these tokens complete. Special tokens have no text.

        `num_held`: the bytes at the end that are held back until the next call: they may be no part of the text.
        """
        token_bytes = self._token_bytes
        text = b"".join([token_bytes[token] for token in token_ids])
        if self._num_to_skip:
            skipped = min(self._num_to_skip, len(text))
            self._num_to_skip -= skipped
            text = text[skipped:]
        if num_held or self._held:
            text = self._held + text
            end = max(len(text) - num_held, 0)
            text, self._held = text[:end], text[end:]
        return self._decoder.decode(text)

    @property
    def held(self) -> str:
        """The text that is held back."""
        return self._held.decode("utf-8", "replace")

    def flush(self, num_after: int = 0) -> str:
        """Return the end of the text: U+FFFD if a character was cut off, else "". The next push begins a new text.

        `num_after`: the bytes at the end that are no part of the text, of those that were held back.
        """
        rest = self._decoder.decode(self._held[: len(self._held) - num_after], final=True)
        self._decoder.reset()
        self._held = b""
        return rest


class StopStringScanner:
    """Looks for stop strings in a stream of text, and holds back text that may become one.

    The stop string that is complete first matches; of several that end at the same character, the longest. The cuts
    between pieces make no difference. After a match no more text is returned. `matched`: the stop string that matched.
    `num_kept`: the number of characters returned so far; after a match, the start of the stop string. Source:
    Knuth-Morris-Pratt, run for each stop string.
    """

    __slots__ = ("_failures", "_held", "_lengths", "_stops", "matched", "num_kept")

    def __init__(self, stops: Iterable[str]) -> None:
        """`stops`: strings that are not empty. Raises ValueError for an empty one."""
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string is empty")
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # for each stop string: how much of it the text so far ends with
        self._held = ""
        self.matched: str | None = None
        self.num_kept = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next text. Return the text that is released now, and the stop string that matched, if any."""
        if self.matched is not None:
            return "", self.matched
        for position, character in enumerate(text):
            for index, stop in enumerate(self._stops):
                length = self._lengths[index]
                while length and stop[length] != character:
                    length = self._failures[index][length - 1]
                if stop[length] == character:
                    length += 1
                self._lengths[index] = length
                if length == len(stop) and (self.matched is None or length > len(self.matched)):
                    self.matched = stop
                    self._lengths[index] = 0  # the loop ends with this character
            if self.matched is not None:
                known = self._held + text[: position + 1]
                return self._give(known[: len(known) - len(self.matched)], ""), self.matched
        known = self._held + text
        border = len(known) - max(self._lengths, default=0)
        return self._give(known[:border], known[border:]), None

    def ends_with(self, text: str, following: str) -> bool:
        """Return whether a stop string that begins in `text`, or right after it, would end in it or in `following`.

        Takes neither.
        """
        num_known = self.num_kept + len(self._held) + len(text)
        before = list(self._lengths), self._held, self.num_kept
        found = self.push(text)[1] is not None or self.push(following)[1] is not None
        found = found and self.num_kept <= num_known
        self._lengths, self._held, self.num_kept = before
        self.matched = None
        return found

    def flush(self, text: str = "") -> str:
        """Take the last text. Return it with the held-back text, up to a stop string in it; "" after a match."""
        safe, matched = self.push(text)
        return safe if matched is not None else safe + self._give(self._held, "")

    def _give(self, text: str, held: str) -> str:
        self._held = held
        self.num_kept += len(text)
        return text


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = table[length - 1]
        if pattern[length] == pattern[index]:
            length += 1
        table[index] = length
    return table


def count_kept_tokens(token_bytes: Sequence[bytes], token_ids: Sequence[int], text: str) -> int:
    """Count the leading tokens that lie wholly inside `text`, which is a prefix of their decoded text.

    A token that `text` cuts does not count. Special tokens after its last character don't count either.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    position = kept = 0
    for index, token in enumerate(token_ids):
        if not token_bytes[token]:
            continue
        position += len(decoder.decode(token_bytes[token]))
        if position + bool(decoder.getstate()[0]) > len(
            text
        ):  # counting the character whose last bytes are still to come
            break
        kept = index + 1
    return kept

"""Token ids to text as they come, and stop strings in that text.

Both work on the bytes and characters that arrive, never on the text so far: a token costs its own length. Bytes of a
character that is not complete yet are held back, and so is text that may turn out to begin a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class Detokenizer:
    """Incremental UTF-8 decoding. The concatenated output equals decoding all bytes at once with U+FFFD for errors."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; special tokens have none."""
        token_bytes = self._token_bytes
        return self._decoder.decode(b"".join([token_bytes[token] for token in token_ids]))

    def flush(self) -> str:
        """What is held back at the end: "" or U+FFFD for a character that was cut off. The next push starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopStringScanner:
    """Looks for stop strings in a stream of text and holds back what may become one.

    The stop string that is complete first wins; of several that end at the same character, the longest. How the text is
    cut into pieces makes no difference. After a match nothing more is given out. `matched`: that string;
    `num_kept`: characters given out so far, which is where the stop string begins once there is a match.
    Source: Knuth-Morris-Pratt, run for each stop string.
    """

    __slots__ = ("_failures", "_held", "_lengths", "_stops", "matched", "num_kept")

    def __init__(self, stops: Iterable[str]) -> None:
        """`stops`: non-empty strings. The end tokens of a model are not its business."""
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string is empty")
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # for each stop string: how much of it the text so far ends with
        self._held = ""
        self.matched: str | None = None
        self.num_kept = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to give out, the stop string that is complete now, if any)."""
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

    def flush(self, text: str = "") -> str:
        """The end of the stream: what `text` adds, and what was held back ("" after a match)."""
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
    """How many tokens lie wholly inside `text`, a prefix of what they decode to.

    A token that is cut does not count, nor do special tokens behind the last character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    position = kept = 0
    for index, token in enumerate(token_ids):
        if not token_bytes[token]:
            continue
        position += len(decoder.decode(token_bytes[token]))
        if position + bool(decoder.getstate()[0]) > len(text):  # with the character whose other bytes are to come
            break
        kept = index + 1
    return kept

"""Incremental detokenizing: turns token ids into text as they come.

A token costs time for its own bytes only, not for the text so far. The bytes of an incomplete character are held back,
and so is text that may be the beginning of what follows a constrained value. Not here: stop strings (`stops`).
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

        `num_after`: how many of the held-back bytes, counted from their end, are no part of the text.
        """
        rest = self._decoder.decode(self._held[: len(self._held) - num_after], final=True)
        self._decoder.reset()
        self._held = b""
        return rest


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

"""How a model's tokenizer splits a text. Masks use it to allow the tokens that the model saw in training.

A tokenizer first cuts a text into pieces, such as words and marks, and then splits each piece into tokens. So the
tokens of a text can depend on the character before it: `"a` may be one piece at the beginning, and two after `{`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MAX_KEPT = 1 << 15
_MAX_PIECE = 16  # bytes of a text in which the end of its first piece is looked for
_LIKE_MARKS, _LIKE_SPACE, _LIKE_DIGITS = (b"}", b" "), (b" ", b"\n", b"}"), (b"1",)


class Splitter(Protocol):
    """The part of a tokenizer that masks use. All texts are whole characters in UTF-8."""

    def split(self, text: bytes) -> list[int]:
        """Return the tokens of a text that follows other text."""

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        """Return how many bytes of `text` stand in one piece with the character before it.

        0: a piece ends between them, or where it ends is not known.
        """


@dataclass(slots=True, eq=False)
class Cut:
    """A place in a text where a token may begin that goes past its end.

    first: the token with which the split of `head`, the part before, begins. rest: the part behind. unsure: tokens that
    begin with `rest` and go on. A token is removed once it is known that the tokenizer does not cut before it. before:
    tokens before which it is known to cut. Two grammars may update these sets at once, and one update may be lost.
    """

    first: int
    head: bytes
    rest: bytes
    before: NDArray[np.int64]
    unsure: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Beginning:
    """How the tokens of a text may begin, as far as the text itself says.

    shorter: the tokens that write a part of it. whole: those that write all of it. firsts: the tokens with which its
    splits begin; none if they are not known. cuts: the places where the split may differ, because a token that begins
    there goes past the text's end.
    """

    shorter: tuple[int, ...]
    whole: tuple[int, ...]
    firsts: frozenset[int]
    cuts: tuple[Cut, ...]


class Splits:
    """The splits of one tokenizer. Answers are kept. Thread-safe: at worst an answer is computed twice.

    token_bytes: of all tokens. never: ids that write no text.
    """

    def __init__(self, splitter: Splitter, token_bytes: Sequence[bytes], never: frozenset[int]) -> None:
        self.splitter = splitter
        self._token_bytes = token_bytes
        self._never = never
        self._known: dict[bytes, tuple[int, ...]] = {}
        self._going_on: dict[tuple[bytes, int], bool] = {}
        self._rests: dict[tuple[bytes, bytes], int] = {}

    def tokens(self, text: bytes) -> tuple[int, ...]:
        """Return the tokens of a text; none if the tokenizer would change the text, or cannot write it.

        text: whole characters in UTF-8.
        """
        found = self._known.get(text)
        if found is None:
            tokens = tuple(self.splitter.split(text))
            if len(self._known) >= _MAX_KEPT:
                self._known = {}
            found = self._known[text] = tokens if self._writes(tokens, text) else ()
        return found

    def firsts(self, text: bytes) -> set[int]:
        """Return the tokens with which a split of `text` may begin: one, or several if what stands before decides."""
        tokens = self.tokens(text)
        if not tokens:
            return set()
        firsts = {tokens[0]}
        for before in _contexts(text[0]):
            rest = self._rest_of_piece(before, whole_characters(text[:_MAX_PIECE]))
            firsts.update(self.tokens(text[:rest])[:1])
        return firsts

    def goes_on(self, text: bytes, token: int) -> bool:
        """Tell whether the tokenizer splits `text` and a token after it where that token begins.

        True if the token ends inside a character, because then the split depends on what follows.
        """
        found = self._going_on.get((text, token))
        if found is None:
            if len(self._going_on) >= _MAX_KEPT:
                self._going_on = {}
            whole = text + self._token_bytes[token]
            found = not is_text(whole) or self.tokens(whole) == (*self.tokens(text), token)
            self._going_on[text, token] = found
        return found

    def _rest_of_piece(self, before: bytes, text: bytes) -> int:
        found = self._rests.get((before, text))
        if found is None:
            if len(self._rests) >= _MAX_KEPT:
                self._rests = {}
            found = self._rests[before, text] = self.splitter.rest_of_piece(before, text)
        return found

    def _writes(self, tokens: tuple[int, ...], text: bytes) -> bool:
        size = len(self._token_bytes)
        if any(not 0 <= token < size or token in self._never for token in tokens):
            return False
        return b"".join(self._token_bytes[token] for token in tokens) == text


def _contexts(first: int) -> tuple[bytes, ...]:
    """Return the characters after which a text that begins with this byte may be cut into other pieces.

    There is one for each kind of character that tokenizers' rules tell apart. Where a word ends does not depend on the
    character before it.
    """
    if chr(first).isalpha() or first >= 0x80:
        return ()
    return _LIKE_DIGITS if chr(first).isdigit() else _LIKE_SPACE if chr(first).isspace() else _LIKE_MARKS


def is_text(content: bytes) -> bool:
    """Tell whether the bytes are whole characters in UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def whole_characters(content: bytes) -> bytes:
    """Return the whole characters at the beginning: without the part of a character at the end.

    Empty if the bytes do not begin with a character, or are not UTF-8.
    """
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content[: error.start] if error.end == len(content) and error.reason == "unexpected end of data" else b""
    return content

"""The token path of a branch: append-only token ids, and text that waits to be tokenised.

Text is tokenised in the longest possible runs: all text between two borders (a generation, a selection, a fork) is one
run, however the program cut it into pieces. Generated text is never tokenised again, except the end of a token that a
stop string cut in two. Not here: running nodes (executor.py), the text of roles (chat_template.py).
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ramet.lang.graph.prompt_tokens import GivenBack, Piece, takes_space
from ramet.runtime.text.tokenizer import Tokenizer

Encode: TypeAlias = Callable[[Sequence[Piece[str]], bool], list[int]]  # pieces, and whether nothing stands before them


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """One point of one branch: the `tokens` added after `parent`, and the `piece` of text after them, if one waits.

    All branches that continue from here share it; it never changes. `length` counts all tokens up to here.
    `num_literal`: the bytes at the end of `tokens` that are the author's own text.
    """

    parent: Path | None = None
    tokens: tuple[int, ...] = ()
    length: int = 0
    piece: Piece[str] | None = None
    num_literal: int = 0

    @property
    def pending(self) -> list[Piece[str]]:
        """The text that waits to be tokenised, in pieces. O(pieces)."""
        found: list[Piece[str]] = []
        at: Path | None = self
        while at is not None and at.piece is not None:
            found.append(at.piece)
            at = None if at.tokens else at.parent
        return found[::-1]

    def append(self, text: str, *, is_markup: bool = False) -> Path:
        """Append text, which is tokenised later."""
        if not text:
            return self
        return Path(self, (), self.length, Piece(text, is_markup))

    def extend(self, tokens: Sequence[int], rest: str = "") -> Path:
        """Append tokens, and `rest` as pending text. No text may be pending before."""
        assert self.piece is None
        return Path(self, tuple(tokens), self.length + len(tokens), Piece(rest) if rest else None)

    def flush(self, encode: Encode) -> Path:
        """Tokenise the pending text."""
        if self.piece is None:
            return self
        pending = self.pending
        tokens = encode(pending, self.length == 0)
        literal = itertools.takewhile(lambda piece: not piece.is_markup, reversed(pending))
        num_literal = sum(len(piece.text.encode()) for piece in literal)
        return Path(self, tuple(tokens), self.length + len(tokens), num_literal=num_literal)

    def given_back(self, rule: GivenBack) -> bytes:
        """Return the last token if the model should write it again, else b"". No text may be pending."""
        assert self.piece is None
        return rule(self.tokens[-1], self.num_literal) if self.tokens and self.length > 1 else b""

    def takes_space(self, tokenizer: Tokenizer) -> bool:
        """Return whether a space may stand between the author's text at the end and a value. No text may be pending."""
        return bool(self.num_literal and self.tokens) and takes_space(tokenizer.token_bytes[self.tokens[-1]])

    def without_last(self) -> Path:
        """Return the path without its last token, which this point added."""
        return Path(self.parent, self.tokens[:-1], self.length - 1)

    def token_ids(self) -> list[int]:
        """Return all tokens from the beginning. O(length)."""
        chunks: list[tuple[int, ...]] = []
        at: Path | None = self
        while at is not None:
            if at.tokens:
                chunks.append(at.tokens)
            at = at.parent
        return [token for chunk in reversed(chunks) for token in chunk]


def keep_text(token_bytes: Sequence[bytes], tokens: Sequence[int], text: str) -> tuple[list[int], str]:
    """Split generated `tokens` where their kept `text` ends (a stop string cuts it): whole tokens, remaining text.

    `text` is a prefix of the tokens' decoded text, with U+FFFD for invalid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    position = count = end = 0
    for index, token in enumerate(tokens):
        position += len(decoder.decode(token_bytes[token]))
        if position > len(text):
            break
        if not decoder.getstate()[0]:  # no character is incomplete
            count, end = index + 1, position
    return list(tokens[:count]), text[end:]

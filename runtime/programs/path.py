"""The token path of a branch: append-only token ids, and text that waits to be tokenised.

Text is tokenised in the longest possible runs: all text between two borders (a generation, a selection, a fork) is one
run, however the program cut it into pieces. Generated text is never tokenised again, except the end of a token that a
stop string cut in two. Not here: running nodes (executor.py), the text of roles (chat_template.py).
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ramet.lang.graph.healing import Healing
from ramet.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text. With `is_markup` (a chat template's text), spellings of special tokens become these tokens."""

    text: str
    is_markup: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """One point of one branch: the `tokens` added after `parent`, and the `pending` text after them.

    All branches that continue from here share it; it never changes. `length` counts all tokens up to here.
    `num_literal`: the bytes at the end of `tokens` that are the author's own text.
    """

    parent: Path | None = None
    tokens: tuple[int, ...] = ()
    length: int = 0
    pending: tuple[Piece, ...] = ()
    num_literal: int = 0

    def append(self, text: str, *, is_markup: bool = False) -> Path:
        """Append text, which is tokenised later."""
        if not text:
            return self
        return Path(self, (), self.length, (*self.pending, Piece(text, is_markup)))

    def extend(self, tokens: Sequence[int], rest: str = "") -> Path:
        """Append tokens, and `rest` as pending text. No text may be pending before."""
        assert not self.pending
        return Path(self, tuple(tokens), self.length + len(tokens), (Piece(rest),) if rest else ())

    def flush(self, encoder: PieceEncoder) -> Path:
        """Tokenise the pending text."""
        if not self.pending:
            return self
        tokens = encoder.encode(self.pending, is_start=self.length == 0)
        literal = itertools.takewhile(lambda piece: not piece.is_markup, reversed(self.pending))
        num_literal = sum(len(piece.text.encode()) for piece in literal)
        return Path(self, tuple(tokens), self.length + len(tokens), num_literal=num_literal)

    def given_back(self, healing: Healing) -> bytes:
        """Return the last token if the model should write it again, else b"". No text may be pending."""
        assert not self.pending
        return healing.given_back(self.tokens[-1], self.num_literal) if self.tokens and self.length > 1 else b""

    def takes_space(self, tokenizer: Tokenizer) -> bool:
        """Return whether a space may stand between the author's text at the end and a value. No text may be pending.

        It may after a word or a mark that a space follows in prose, such as `Age:`, and not after `(`, `$` or `_`.
        """
        if not self.num_literal or not self.tokens:
            return False
        last = tokenizer.token_bytes[self.tokens[-1]].decode(errors="ignore")[-1:]
        return last.isalnum() or last in tuple(".:,;?!)")

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


class PieceEncoder:
    """Tokenises adjoining pieces as one text, but with special tokens in markup only. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = tokenizer.special_tokens
        names = [re.escape(name) for name in sorted(self._specials, key=len, reverse=True)]
        self._border = re.compile(f"({'|'.join(names)})") if names else None

    def encode(self, pieces: Sequence[Piece], *, is_start: bool) -> list[int]:
        """Return the token ids of the pieces.

        `is_start`: nothing precedes them. Then the tokenizer's opening token is added, unless markup comes first, which
        has its own.
        """
        tokens: list[int] = []
        opening = is_start and bool(pieces) and not pieces[0].is_markup
        for i, run in enumerate(self._runs(pieces)):
            if isinstance(run, int):
                tokens.append(run)
                continue
            is_first = is_start and i == 0
            tokens.extend(self._tokenizer.encode(run, add_special=opening and is_first, continues=not is_first))
        return tokens

    def _runs(self, pieces: Sequence[Piece]) -> list[str | int]:
        """Return the special tokens, and the texts between them."""
        runs: list[str | int] = []
        for piece in pieces:
            parts = [piece.text]
            if piece.is_markup and self._border is not None:
                parts = self._border.split(piece.text)
            for i, part in enumerate(parts):
                if i % 2:
                    runs.append(self._specials[part])
                elif part and runs and isinstance(runs[-1], str):
                    runs[-1] += part
                elif part:
                    runs.append(part)
        return runs


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

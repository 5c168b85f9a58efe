"""A tokenizer that refuses a text that cannot fit the context, before it spends seconds on encoding it.

Encoding takes about 1.5 us per byte, so a body of 32 MB would occupy a thread for 46 s, and two would occupy them all.
A text that is too long by its bytes alone is not encoded at all. If a text is longer than texts that fill the context
usually are, its beginning alone is encoded first.
"""

from __future__ import annotations

from collections.abc import Iterable

from ramet.errors import ContextOverflow
from ramet.runtime.text.tokenizer import Tokenizer

_MARGIN = 2  # a normaliser may shorten a text before it is tokenised
_USUAL_CHARACTERS = 8  # of a token, at most: English prose has 4 to 5
# A beginning is cut anywhere: its last tokens are not those of the whole text. So many more than fit are enough.
_SURE = 1.25


class BoundedTokenizer:
    """A `Tokenizer` that wraps another one, and encodes only texts that may fit the context."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self.token_bytes = tokenizer.token_bytes
        self.vocab_size = tokenizer.vocab_size
        self.special_ids = tokenizer.special_ids
        self.eos_ids = tokenizer.eos_ids
        self.bos_id = tokenizer.bos_id
        self.pad_id = tokenizer.pad_id
        self.chat_template = tokenizer.chat_template
        self.special_tokens = tokenizer.special_tokens
        longest = max(map(len, self.token_bytes), default=1)
        longest = max(longest, *(len(spelling.encode()) for spelling in self.special_tokens), 1)
        self.max_bytes = _MARGIN * context_length * longest

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        """As the wrapped one. Raises ContextOverflow if the text's tokens are surely more than the context has."""
        if len(text) > self.max_bytes or (4 * len(text) > self.max_bytes and len(text.encode()) > self.max_bytes):
            raise self._too_long(text)
        beginning = text[: _USUAL_CHARACTERS * self._context_length]
        if len(beginning) < len(text):
            tokens = self._tokenizer.encode(beginning, parse_special=parse_special, continues=continues)
            if len(tokens) > _SURE * self._context_length:
                raise self._too_long(text)
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special, continues=continues)

    def _too_long(self, text: str) -> ContextOverflow:
        return ContextOverflow(
            f"a text of {len(text):,} characters cannot fit the context of {self._context_length:,} tokens; "
            f"shorten it, or raise --context-length",
            param="prompt",
        )

    def split(self, text: bytes) -> list[int]:
        return self._tokenizer.split(text)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return self._tokenizer.rest_of_piece(before, text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_id(token)

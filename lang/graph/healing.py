"""Token healing: which token at the end of a prompt is given back to the model.

A tokenizer splits a text as a whole, so a prompt that ends with a space or with half a word has a last token that the
model rarely saw before what it wants to write: it would write ` yes` as one token, after `Answer:`. The last token of
the author's text is therefore given back where the vocabulary has a longer one that begins with it, and the model
writes its bytes again, as part of any token that begins with them.

The executor and the passes apply this rule; a backend that takes text alone leaves it to its server.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property


class Healing:
    """The rule for one vocabulary. `token_bytes` as in a tokenizer: empty for special tokens."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._found: dict[int, bytes] = {}

    def given_back(self, token: int, num_literal: int) -> bytes:
        """Return the bytes of a prompt's last token if it is given back, else b"".

        `num_literal`: the bytes of the author's own text at the prompt's end. A token that also holds other text, such
        as a chat template's, stays.
        """
        text = self._token_bytes[token]
        if not text or len(text) > num_literal:
            return b""
        if token not in self._found:
            self._found[token] = text if self._may_go_on(text) else b""
        return self._found[token]

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted({text for text in self._token_bytes if text})

    def _may_go_on(self, text: bytes) -> bool:
        """Return whether a longer token goes on with a letter or a digit; after white space, with anything."""
        try:
            is_space = text.decode()[-1].isspace()
        except UnicodeDecodeError:
            return False  # half of a character
        index = bisect.bisect_right(self._sorted, text)
        while index < len(self._sorted) and self._sorted[index].startswith(text):
            rest = self._sorted[index][len(text) :]
            if is_space or rest.decode(errors="replace")[0].isalnum():
                return True
            index += 1
        return False

"""A tokenizer whose tokens are bytes, for tests of programs and for the scripted model.

Ids 0 to 255 are the bytes. Four special tokens follow: end of text, ChatML's two marks, begin of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tokenizer import half_a_pair

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|begin|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteTokenizer:
    """A `Tokenizer` (see tokenizer.py) of 256 bytes and a few special tokens.

    `vocab_size`: pads the vocabulary to the width of a model's logits. `add_bos`: `encode(add_special=True)` starts
    with `<|begin|>`.
    """

    def __init__(self, *, vocab_size: int | None = None, add_bos: bool = False) -> None:
        self.special_tokens = {text: 256 + index for index, text in enumerate(_SPECIALS)}
        num_tokens = 256 + len(_SPECIALS)
        self.vocab_size = num_tokens if vocab_size is None else vocab_size
        if self.vocab_size < num_tokens:
            raise ValueError(f"vocab_size is {vocab_size} but a byte tokenizer has {num_tokens} tokens")
        self.token_bytes = [bytes([value]) for value in range(256)] + [b""] * (self.vocab_size - 256)
        self.special_ids = frozenset(range(256, self.vocab_size))
        self.eos_ids = frozenset({self.special_tokens["<|endoftext|>"], self.special_tokens["<|im_end|>"]})
        self.bos_id: int | None = self.special_tokens["<|begin|>"] if add_bos else None
        self.pad_id: int | None = self.special_tokens["<|pad|>"]
        self.chat_template = ChatTemplate(_TEMPLATE)
        self._names = {token: text for text, token in self.special_tokens.items()}
        self._special = re.compile("|".join(re.escape(text) for text in _SPECIALS))

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        ids = [self.bos_id] if add_special and self.bos_id is not None else []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise half_a_pair(error) from error
        start = 0
        for match in self._special.finditer(text) if parse_special else ():
            ids += text[start : match.start()].encode()
            ids.append(self.special_tokens[match[0]])
            start = match.end()
        ids += text[start:].encode()
        return ids

    def split(self, text: bytes) -> list[int]:
        return list(text)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return 0

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        spelled = {} if skip_special else self._names
        pieces = (self.token_bytes[token] or spelled.get(token, "").encode() for token in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        if token in self.special_tokens:
            return self.special_tokens[token]
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

"""Two tokenizers that come with the package, for tests of programs: of bytes, and of the commonest pieces of words.

In both, the ids 0 to 255 are the bytes, and there are ChatML's two marks beside tokens for the ends of a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tokenizer import SubwordTokenizer, byte_alphabet, half_a_pair

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


@cache
def small_subword_tokenizer() -> SubwordTokenizer:
    """Return a byte-level BPE tokenizer of 8,256 tokens. It writes a fifth more tokens than one of 49,152.

    Its pieces and their order are the first 8,000 of SmolLM2's, which writes digits one by one, as this one does. The
    rest, 400 kB, would make a first constraint ten times slower where numba is not installed, and change few counts.
    Source: the tokenizer of SmolLM2 (Hugging Face, Apache-2.0).
    """
    text = (Path(__file__).parent / "merges.txt").read_text(encoding="utf-8")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in text.splitlines())]
    alphabet = sorted(byte_alphabet().items(), key=lambda item: item[1])
    pieces = [*(character for character, _ in alphabet), *(left + right for left, right in merges)]
    backend = tokenizers.Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _SPECIALS])
    specials = {text: len(pieces) + index for index, text in enumerate(_SPECIALS)}
    return SubwordTokenizer(
        backend,
        eos_ids=[specials["<|endoftext|>"], specials["<|im_end|>"]],
        pad_id=specials["<|pad|>"],
        chat_template=ChatTemplate(_TEMPLATE),
    )

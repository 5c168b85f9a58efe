"""Text to token ids and back, and the exact bytes of every token.

`Tokenizer` is the protocol that the rest of Ramet uses. `SubwordTokenizer` implements it for models: byte-level
BPE, or SentencePiece with byte fallback, through the `tokenizers` package. Not here: reading a model's files
(models/tokenizer_files.py), a tokenizer for tests (testing/byte_tokenizer.py), incremental decoding (detokenizer.py).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tokenizers

from ramet.errors import BrokenModelFile, InvalidRequest
from ramet.runtime.text.chat_template import ChatTemplate

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"  # SentencePiece's visible space
_MAX_TOKENS = 1 << 22
_LONG_CHARACTERS = 2048  # a text of a millisecond or more; while it is encoded, other threads go on


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer for the engine, grammars and programs.

    `token_bytes[id]`: the bytes that a token stands for. They are empty for special tokens and for ids that only pad
    the model's vocabulary; all of these are in `special_ids`. `vocab_size`: len(token_bytes), the width of the model's
    logits. `special_tokens`: the ids of special tokens by their spellings, padding excepted. `eos_ids`: tokens that end
    a generation. `chat_template`: the model's own, or a plain default.
    """

    token_bytes: list[bytes]
    vocab_size: int
    special_ids: frozenset[int]
    eos_ids: frozenset[int]
    bos_id: int | None
    pad_id: int | None
    chat_template: ChatTemplate
    special_tokens: dict[str, int]

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        """Return the token ids of `text`.

        `add_special`: begin with the begin-of-text token if the model uses one, but never twice. `parse_special`:
        the spelling of a special token becomes that token. This is for the text of a chat template; outside text must
        not be parsed, or it could forge a role. `continues`: the text follows other text, so a SentencePiece tokenizer
        must not put a space before it.

        Raises: InvalidRequest for text that UTF-8 cannot write.
        """

    def split(self, text: bytes) -> list[int]:
        """Return the token ids of a text that follows other text. `text`: whole characters in UTF-8."""

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        """Return how many bytes of `text` stand in one piece with the character `before` it.

        A piece is what a tokenizer cuts a text into before it looks for tokens, such as a word or a row of marks. No
        token goes past its end. 0: a piece ends between the two, or where it ends is not known.
        """

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`. Invalid bytes become U+FFFD. `skip_special`: leave special tokens out."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its spelling in the vocabulary (`<|im_end|>`); None if there is no such token."""


def half_a_pair(error: UnicodeEncodeError) -> InvalidRequest:
    """Return the error for a text that contains half of a surrogate pair."""
    return InvalidRequest(f"a text is not valid Unicode: it holds {error.object[error.start : error.end]!r} alone")


class SubwordTokenizer:
    """A `Tokenizer` over a `tokenizers.Tokenizer`. Immutable after construction; thread-safe."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int | None = None,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        add_bos: bool = False,
        special_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """Wrap `backend`. `vocab_size`: the width of the logits, if it is larger than the vocabulary."""
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._written = backend.to_str()  # the `tokenizer.json` format
        spec: dict[str, Any] = json.loads(self._written)
        added = {item["id"]: item for item in spec.get("added_tokens") or ()}
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        num_tokens = max(vocabulary.values(), default=-1) + 1
        if num_tokens > _MAX_TOKENS:
            raise BrokenModelFile(
                f"the tokenizer has the token {num_tokens - 1:,}; the limit is {_MAX_TOKENS:,} tokens"
            )
        self.vocab_size = max(num_tokens, vocab_size or 0)
        special = {token for token, item in added.items() if item["special"]} | set(special_ids)
        used = set(vocabulary.values())
        special |= {token for token in range(self.vocab_size) if token not in used}
        self.special_ids = frozenset(special)
        self.eos_ids = frozenset(eos_ids)
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.token_bytes = _bytes_of_tokens(spec, vocabulary, added, self.special_ids, self.vocab_size)
        self._spelling = {token: spelling for spelling, token in vocabulary.items()}
        self._vocabulary = vocabulary
        self.special_tokens = {spelling: token for spelling, token in vocabulary.items() if token in special}
        self._add_bos = add_bos and bos_id is not None
        self._has_prefix_space = _has_prefix_space(spec)
        # Parsing special tokens and adding a prefix space are fixed in a backend, so each combination has its own.
        self._backends: dict[tuple[bool, bool], tokenizers.Tokenizer] = {(False, False): backend}
        self._backends_lock = threading.Lock()
        specials = {"bos_token": bos_id, "pad_token": pad_id, "eos_token": next(iter(eos_ids), None)}
        self.special_texts = {
            name: self._spelling.get(token, "") for name, token in specials.items() if token is not None
        }
        self.chat_template = chat_template or ChatTemplate.plain(self.special_texts if self._add_bos else {})

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        backend = self._backend(parse_special, continues and self._has_prefix_space)
        try:
            if len(text) < _LONG_CHARACTERS:
                ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            else:  # the package gives the interpreter's lock away in batches alone
                text.encode()
                ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except UnicodeEncodeError as error:
            raise half_a_pair(error) from error
        if add_special and self._add_bos and self.bos_id is not None and (not ids or ids[0] != self.bos_id):
            ids.insert(0, self.bos_id)
        return ids

    def split(self, text: bytes) -> list[int]:
        return self.encode(text.decode(), continues=True)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        backend = self._backend(False, self._has_prefix_space)
        first, whole = before.decode(), (before + text).decode()
        normalized = whole if backend.normalizer is None else backend.normalizer.normalize_str(whole)
        if backend.pre_tokenizer is None or len(normalized) != len(whole):
            return 0
        for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(normalized):
            if begin < len(first) < end < len(whole):
                return len(whole[len(first) : end].encode())
        return 0

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        pieces = []
        for token in ids:
            if token in self.special_ids:
                pieces.append(b"" if skip_special else self._spelling.get(token, "").encode())
            else:
                pieces.append(self.token_bytes[token])
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text[1:] if self._has_prefix_space and text.startswith(" ") else text

    def token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def token_text(self, token: int) -> str:
        """Return a token's spelling in the vocabulary; "" for an id that only pads it."""
        return self._spelling.get(token, "")

    def _backend(self, parse_special: bool, continues: bool) -> tokenizers.Tokenizer:
        key = (parse_special, continues)
        found = self._backends.get(key)
        if found is not None:
            return found
        with self._backends_lock:
            if key not in self._backends:
                written = self._written
                if continues:
                    written = json.dumps(_without_prefix_space(json.loads(written)))
                backend = tokenizers.Tokenizer.from_str(written)
                backend.encode_special_tokens = not parse_special
                self._backends[key] = backend
            return self._backends[key]


def _steps(part: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, including nested ones."""
    if part is None:
        return ()
    if part["type"] != "Sequence":
        return (part,)
    return [
        step
        for nested in ("normalizers", "pretokenizers", "decoders")
        for item in part.get(nested, ())
        for step in _steps(item)
    ]


def _has_prefix_space(spec: Mapping[str, Any]) -> bool:
    """Return True for SentencePiece tokenizers that put a space before the text (Llama 2, Mistral)."""
    return any(
        step["type"] == "Prepend" and step.get("prepend") == _SPACE_MARK for step in _steps(spec["normalizer"])
    ) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(spec["pre_tokenizer"])
    )


def _without_prefix_space(spec: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = dict(spec)
    kept = [step for step in _steps(spec["normalizer"]) if step["type"] != "Prepend"]
    copied["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    steps = [
        {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
        for step in _steps(spec["pre_tokenizer"])
    ]
    copied["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if steps else None
    return copied


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable character of byte-level BPE. Source: GPT-2's `bytes_to_unicode`."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _bytes_of_tokens(
    spec: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    special_ids: frozenset[int],
    vocab_size: int,
) -> list[bytes]:
    kinds = {step["type"] for part in ("pre_tokenizer", "decoder") for step in _steps(spec[part])}
    is_byte_level = "ByteLevel" in kinds
    if not is_byte_level and "ByteFallback" not in kinds and not spec["model"].get("byte_fallback"):
        raise BrokenModelFile(
            f"the tokenizer is neither byte-level BPE nor SentencePiece with byte fallback (its model is a "
            f"{spec['model'].get('type')}): the bytes of its tokens are not known, so text and grammars would be wrong"
        )
    alphabet = byte_alphabet()
    result = [b""] * vocab_size
    for spelling, token in vocabulary.items():
        if token in special_ids:
            continue
        if token in added:
            result[token] = spelling.encode("utf-8", errors="surrogateescape")
        elif is_byte_level:
            result[token] = _byte_level_bytes(spelling, alphabet)
        else:
            match = _BYTE_PIECE.fullmatch(spelling)
            text = spelling.replace(_SPACE_MARK, " ")
            result[token] = bytes([int(match[1], 16)]) if match else text.encode("utf-8", errors="surrogateescape")
    return result


def _byte_level_bytes(spelling: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in spelling])
    except KeyError:  # an added token that is in the vocabulary in plain spelling
        return spelling.encode("utf-8", errors="surrogateescape")

"""A made-up byte-level vocabulary of any size, for measuring constrained decoding with random weights.

It has what makes masks expensive in real ones: every byte, words with and without a leading space, runs of digits,
punctuation that spans several JSON symbols, tokens that cut a UTF-8 character.
"""

from __future__ import annotations

import itertools
import random

_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_JSON = [
    '{"',
    '":',
    '": "',
    '":"',
    '", "',
    '","',
    '"},',
    '"},{"',
    '"}',
    '"]',
    "],",
    '],"',
    "},{",
    "[{",
    '["',
    "[]",
    "{}",
    '":[',
    '":{',
]


def make_vocabulary(size: int, seed: int = 0) -> list[bytes]:
    """`size` different tokens; the last one is empty: end of text."""
    rng = random.Random(f"vocabulary{seed}")
    tokens: dict[bytes, None] = {bytes([b]): None for b in range(256)}

    def add(token: bytes) -> None:
        if token and len(tokens) < size - 1:
            tokens.setdefault(token, None)

    for text in _JSON:
        add(text.encode())
    for number in range(1000):
        add(str(number).encode())
    printable = [chr(c) for c in range(32, 127)]
    for a, b in itertools.product(printable, repeat=2):
        add((a + b).encode())
    for code in itertools.chain(range(0xA0, 0x800), range(0x4E00, 0x5600)):
        add(chr(code).encode())
        add(chr(code).encode()[:2])
    weights = [1 / (i + 2) for i in range(len(_LETTERS))]
    while len(tokens) < size - 1:
        word = "".join(rng.choices(_LETTERS, weights, k=min(2 + int(rng.expovariate(0.25)), 16)))
        form = rng.random()
        if form < 0.5:
            word = " " + word
        elif form < 0.6:
            word = word.capitalize()
        elif form < 0.62:
            word = word + rng.choice(['"', '",', '":', ".", ", "])
        add(word.encode())
    return [*tokens, b""]

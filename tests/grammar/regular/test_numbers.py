"""Tables of many single numbers, against sets of numbers themselves."""

from __future__ import annotations

import json
import random
from fractions import Fraction

from ramet.grammar.json_schema.frames.tables import number_rows
from ramet.grammar.regular.numbers import ANY, Numbers, fraction


def tags_of(specs: tuple[tuple[Numbers, ...], ...], text: str) -> int:
    """The tags that a whole text satisfies, by the table."""
    rows, byte_class, ends, masks = number_rows(specs)
    state = 0
    for byte in text.encode():
        state = int(rows[state, byte_class[byte]])
        if state < 0:
            return 0
    return masks[ends[state]] if ends[state] >= 0 else 0


def test_a_table_of_many_numbers_knows_each_text() -> None:
    rng = random.Random(5)
    texts = [
        "0",
        "-0",
        "0.0",
        "-0.00",
        "1",
        "10",
        "1.0",
        "1.5",
        "1.50",
        "-3",
        "-3.0",
        "0.25",
        "15",
        "100",
        "12.125",
        "7",
    ]
    texts += [f"{rng.randrange(-30, 30)}{rng.choice(['', '.0', '.5', '.50', '.25'])}" for _ in range(40)]
    values = [fraction(json.loads(t)) for t in texts]
    for _ in range(40):
        some = [frozenset(rng.sample(values, rng.randrange(1, 12))) for _ in range(rng.randrange(2, 6))]
        specs: list[tuple[Numbers, ...]] = [(Numbers(finite=s),) for s in some]
        excluded = frozenset(rng.sample(values, 9))
        specs.append(rng.choice([(), (Numbers(excluded=excluded),), (Numbers(low=Fraction(0), excluded=excluded),)]))
        specs.append(rng.choice([(), (ANY,), (Numbers(integer=True), Numbers(finite=excluded))]))
        for text, value in zip(texts, values, strict=True):
            wanted = sum(1 << i for i, tag in enumerate(specs) if any(n.contains(value) for n in tag))
            assert tags_of(tuple(specs), text) == wanted, (specs, text)
        assert not tags_of(tuple(specs), "1e0") & ~(1 << len(specs) - 1)

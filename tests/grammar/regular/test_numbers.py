"""Tables of many single numbers, against sets of numbers themselves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from ramet.grammar import ir
from ramet.grammar.json_schema.frames.tables import number_rows
from ramet.grammar.regular import dfas
from ramet.grammar.regular.dfas import Dfa
from ramet.grammar.regular.languages import compile_bytes
from ramet.grammar.regular.numbers import ANY, Numbers, automaton, fraction, intersect, simplify


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


def random_numbers(rng: random.Random) -> Numbers:
    divisors = [Fraction(n, d) for n, d in ((1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (1, 2), (3, 2), (1, 4), (1, 10))]
    multiples = frozenset((m, rng.random() < 0.6) for m in rng.sample(divisors, rng.randrange(1, 4)))
    low = rng.choice([None, None, Fraction(rng.randrange(-9, 9), 2)])
    high = rng.choice([None, None, Fraction(rng.randrange(-9, 19), 2)])
    opens = rng.random() < 0.5, rng.random() < 0.5
    excluded = frozenset(Fraction(rng.randrange(-9, 9)) for _ in range(rng.randrange(3)))
    return Numbers(low, opens[0], high, opens[1], rng.choice([None, True, False]), multiples, None, excluded)


def test_a_simplified_set_has_the_same_values_and_is_none_if_there_are_none() -> None:
    rng = random.Random(11)
    values = [Fraction(n, 40) for n in range(-600, 601)]
    for _ in range(120):
        numbers = random_numbers(rng)
        simple = simplify(numbers)
        if simple is None:
            assert automaton(numbers).is_empty, numbers
            continue
        assert not automaton(numbers).is_empty, numbers
        assert [simple.contains(v) for v in values] == [numbers.contains(v) for v in values], numbers


def test_divisors_that_must_all_divide_are_one_divisor() -> None:
    primes = [Numbers(integer=True, multiples=frozenset(((Fraction(p), True),))) for p in (2, 3, 5, 7, 11, 13)]
    both: Numbers | None = ANY
    for numbers in primes:
        assert both is not None
        both = intersect(both, numbers)
    assert both is not None
    assert both.multiples == {(Fraction(30030), True)}
    dfa = automaton(both)
    assert [number for number in range(0, 120_121, 15015) if accepts(dfa, str(number))] == [
        0,
        30030,
        60060,
        90090,
        120120,
    ]


def accepts(dfa: Dfa, text: str) -> bool:
    state = 0
    for char in text:
        state = dfa.step(state, ord(char))
        if state < 0:
            return False
    return bool(dfa.accepting[state])


@pytest.mark.parametrize(
    "numbers",
    [
        Numbers(integer=True),
        Numbers(low=Fraction(2**53 + 1), integer=True),
        Numbers(
            low=Fraction(-(10**20)), high=Fraction(10**20), integer=True, multiples=frozenset(((Fraction(7), True),))
        ),
        Numbers(integer=True, multiples=frozenset(((Fraction(1009), True),))),  # too many states for both
        Numbers(finite=frozenset(Fraction(7 * n) for n in (1, 10**15 - 1, 10**15, 2**60, -(2**70)))),
    ],
)
def test_integers_beyond_what_floats_hold_have_no_fraction_part(numbers: Numbers) -> None:
    dfa = automaton(numbers)
    for value in (7, 7 * 1009 * 10**10, 7 * 1009 * 2**53, -7 * 1009 * 2**60, 7 * 2**60, 7 * 10**15, -7 * 2**70):
        text = str(value)
        assert accepts(dfa, text) == numbers.contains(Fraction(value))
        for tail in (".0", ".00"):
            if accepts(dfa, text + tail):
                assert numbers.contains(Fraction(value))
                assert int(float(text + tail)) == value


def test_excluded_integers_are_excluded_in_every_form() -> None:
    dfa = automaton(Numbers(excluded=frozenset((Fraction(2**60), Fraction(7)))))
    assert not any(accepts(dfa, text) for text in (str(2**60), f"{2**60}.0", "7", "7.00"))
    assert accepts(dfa, "8.0")


@pytest.mark.parametrize("low", [None, Fraction(0), Fraction(-70), Fraction(7, 2)])
@pytest.mark.parametrize("high", [None, Fraction(130), Fraction(2**63)])
@pytest.mark.parametrize(
    "multiples", [frozenset(), frozenset({(Fraction(3), True)}), frozenset({(Fraction(1, 2), True)})]
)
def test_plain_texts_are_those_without_a_fraction_part(
    low: Fraction | None, high: Fraction | None, multiples: frozenset[tuple[Fraction, bool]]
) -> None:
    numbers = Numbers(low, high=high, integer=True, multiples=multiples, excluded=frozenset({Fraction(12)}))
    plain = dfas.intersect([automaton(numbers), compile_bytes(ir.Repeat(ir.Chars(((45, 45), (48, 57)))))])
    assert automaton(replace(numbers, plain=True)).key() == plain.key()

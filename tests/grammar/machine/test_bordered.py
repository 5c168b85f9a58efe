"""A value between known texts: masks, ends and values against brute force over small vocabularies and languages."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import pytest

from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.bordered import Bordered
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import AutomatonTables, TokenTable
from ramet.runtime.constraints.device_grammars import DeviceGrammars

EOS = 0
# (pattern, what follows): finite and endless values, what follows inside of values, readings that differ, overlaps
LANGUAGES = [
    ("[12]{1,3}", " a"),
    ("[12]{1,3}", "1a"),
    ("a(b a)*", " a"),
    ("[ab ]+", " ab"),
    ("[ab ]*", " "),
    ("a|aa|aaa", "aab"),
    ("(ab)*", "aba"),
    ("[12]+(\\.[12]+)?", ".b"),
    ("a( a)*", " b a"),
    ("(a|b){2}", "ba"),
    ("é?a", "é1"),
    ('"[ab]*"', ',"'),
]
ALPHABET = ["1", "2", "a", "b", " ", ".", '"', ","]


def make_vocabulary(seed: int) -> Vocabulary:
    """All single bytes that matter, tokens of two and three characters, and one text that two tokens stand for."""
    rng = np.random.default_rng(seed)
    singles = [c.encode() for c in ALPHABET] + [bytes([b]) for b in "é".encode()]
    longer = ["".join(rng.choice(ALPHABET, size=n)).encode() for n in (2, 2, 3) for _ in range(25)]
    known = [b" a", b" ab", b"ba", b",", b'",', b'","', b"1a", b"aab", b"12", b"aa", "aé".encode(), "é".encode()]
    return Vocabulary([b"</s>", b"", *singles, *dict.fromkeys([*longer, *known]), b"a", b" "], [EOS], [EOS])


def compiled(pattern: str, vocabulary: Vocabulary) -> CompiledGrammar:
    return compile_constraint("regex", pattern, vocabulary)


def readings(pattern: str, after: bytes, text: bytes) -> tuple[bool, set[int]]:
    """Whether the text may still grow into a value, and how much of `after` it may have begun. By brute force."""
    sizes = {k for k in range(1, len(after) + 1) if text.endswith(after[:k]) and is_value(pattern, text[:-k])}
    return may_grow(pattern, text), sizes


@functools.cache
def is_value(pattern: str, text: bytes) -> bool:
    try:
        return re.fullmatch(pattern, text.decode()) is not None
    except UnicodeDecodeError:
        return False


@functools.cache
def may_grow(pattern: str, text: bytes) -> bool:
    half = "é".encode()[1:]
    return any(is_value(pattern, text + rest) for rest in (*texts_of(pattern, 3), half, half + b"a"))


@functools.cache
def texts_of(pattern: str, longest: int) -> list[bytes]:
    """All texts up to a length that are made of the pattern's characters."""
    found = sorted({c for c in pattern if c in '12ab ."é'})
    return ["".join(p).encode() for n in range(longest + 1) for p in itertools.product(found, repeat=n)]


@pytest.mark.parametrize(("pattern", "after"), LANGUAGES)
@pytest.mark.parametrize("before", ["", " ", "a"])
def test_a_mask_allows_exactly_the_tokens_after_which_a_reading_is_left(pattern: str, after: str, before: str) -> None:
    vocabulary = make_vocabulary(3)
    bordered = Bordered(compiled(pattern, vocabulary), vocabulary, before=before.encode(), after=after.encode())
    seen: dict[bytes, int] = {b"": 0}
    waiting = [b""]
    while waiting and len(seen) < 80:
        text = waiting.pop(0)
        state = seen[text]
        row = bordered.mask(state)
        for token, piece in enumerate(vocabulary.token_bytes):
            following = text + piece
            if not text and before and not following.startswith(before.encode()):
                is_alive, began = False, set[int]()
            else:
                is_alive, began = readings(pattern, after.encode(), following[len(before) :])
            is_right = bool(piece) and token not in vocabulary.special_ids and (is_alive or bool(began))
            reached = bordered.advance(state, token)
            assert (reached is not None) == is_right, (text, piece)
            assert bitmask.is_allowed(row, token) == (bordered.is_accepting(state) if token == EOS else is_right)
            if reached is not None:
                assert seen.setdefault(following, reached) == reached, "a state is a function of the text"
                if bordered.is_complete(reached):
                    value = following[len(before) :]
                    longer = [rest for rest in texts_of(pattern, 3) if rest and is_value(pattern, value + rest)]
                    assert (
                        max(began) == len(after) or not is_alive if began else is_value(pattern, value) and not longer
                    )
                elif len(following) < 8 and following not in waiting:
                    waiting.append(following)


@pytest.mark.parametrize(("pattern", "after"), LANGUAGES)
def test_every_value_can_be_written_but_those_that_hold_what_follows(pattern: str, after: str) -> None:
    vocabulary = make_vocabulary(5)
    bordered = Bordered(compiled(pattern, vocabulary), vocabulary, after=after.encode())
    values = [t for t in texts_of(pattern, 5) if is_value(pattern, t)]
    assert len(values) > 1
    for value in values:
        text = value + after.encode()
        written = read_by_bytes(bordered, vocabulary, text)
        shorter = [v for v in values if len(v) < len(value) and text.startswith(v + after.encode())]
        if after.isspace() and is_value(pattern, text):
            assert written == text, "white space may be a part of the value"
        elif not shorter:
            assert written == value, (value, "is ended by what follows it")
        else:
            assert written == min(shorter, key=len), (value, "ends where all that follows was read first")


def read_by_bytes(bordered: Bordered, vocabulary: Vocabulary, text: bytes) -> bytes:
    """The value of a text that is written byte by byte, until it ends; its longest value if it does not end."""
    state, size = 0, 0
    for byte in text:
        token = vocabulary.tokens_with_text(bytes([byte]))[0]
        reached = bordered.advance(state, token)
        assert reached is not None, (text, size)
        state, size = reached, size + 1
        if bordered.is_complete(state):
            break
    return text[: size - bordered.num_after(state, is_last=True)]


@pytest.mark.parametrize(("pattern", "after"), LANGUAGES)
@pytest.mark.parametrize("before", ["", "a"])
def test_a_walk_under_the_masks_ends_with_a_value(pattern: str, after: str, before: str) -> None:
    vocabulary = make_vocabulary(7)
    bordered = Bordered(compiled(pattern, vocabulary), vocabulary, before=before.encode(), after=after.encode())
    rng = np.random.default_rng(11)
    for _ in range(60):
        state, text, is_ended = 0, b"", False
        for _ in range(12):
            choices = bitmask.unpack(bordered.mask(state)).tolist()
            token = int(rng.choice(choices))
            if token == EOS:
                assert bordered.is_accepting(state)
                is_ended = True
                break
            reached = bordered.advance(state, token)
            assert reached is not None
            state, text = reached, text + vocabulary.token_bytes[token]
            hidden = bordered.num_after(state, is_last=False)
            assert may_grow(pattern, text[len(before) : len(text) - hidden]) or not text.startswith(before.encode())
            if bordered.is_complete(state):
                is_ended = True
                break
        if not is_ended:
            for token in bordered.shortest_completion(state):
                state, text = bordered.advance(state, token) or 0, text + vocabulary.token_bytes[token]
        assert bordered.is_accepting(state)
        value = text[len(before) : len(text) - bordered.num_after(state, is_last=True)]
        assert text.startswith(before.encode())
        assert is_value(pattern, value), (text, value)


@pytest.mark.parametrize(("pattern", "after"), [*LANGUAGES, ("[12]{1,3}", ""), ("[ab]+", "b" * 64), ("a|bab", "\n")])
@pytest.mark.parametrize(("before", "lead"), [("", ""), (" a", ""), ("a", ""), ("", " ")])
@pytest.mark.parametrize("has_ends", [False, True])
def test_the_tables_for_a_device_say_what_the_grammar_says(
    pattern: str, after: str, before: str, lead: str, has_ends: bool
) -> None:
    vocabulary = make_vocabulary(9)
    grammar = compiled(pattern, vocabulary)
    bordered = Bordered(grammar, vocabulary, before=before.encode(), after=after.encode(), lead=lead.encode())
    assert bordered.device_tables() is None, "the grammar is not closed yet"
    assert grammar.close()
    if lead and (grammar.is_accepting(0) or grammar.advance_bytes(0, lead.encode()) is not None):
        return  # there is no such request
    tables, base, arena = on_device(bordered, vocabulary, has_ends=has_ends)
    whole = bordered.device_tables()
    assert whole is not None
    seen = {(0, 0)}
    waiting = [(0, 0)]
    while waiting and len(seen) < 150:
        state, local = waiting.pop(0)
        ends = bordered.ends(state) if has_ends else None
        expected = bordered.mask(state) if ends is None else bordered.mask(state) | ends
        if not bordered.is_complete(state):  # nobody reads a mask after the end
            row = arena.mask_rows[arena.mask_index[base + local].long()].numpy()
            assert bitmask.unpack(row).tolist() == bitmask.unpack(expected).tolist(), (state, local)
        assert bordered.is_accepting(state) == (whole.accepting[local] > 0)
        assert bordered.is_complete(state) == whole.is_complete[local]
        counts = [bordered.num_after(state, is_last=is_last) for is_last in (False, True)]
        assert counts == whole.num_after[local].tolist()
        if bordered.is_complete(state):
            continue
        for token in bitmask.unpack(bordered.mask(state)).tolist():
            if token == EOS:
                continue
            reached, after_it = (
                bordered.advance(state, token),
                device_walk(tables, local, vocabulary.token_bytes[token]),
            )
            assert reached is not None
            if (reached, after_it) not in seen:
                seen.add((reached, after_it))
                waiting.append((reached, after_it))


def on_device(
    grammar: Bordered, vocabulary: Vocabulary, *, has_ends: bool
) -> tuple[AutomatonTables, int, GrammarArena]:
    """The tables of a grammar, their place in an arena, and the arena."""
    texts, special = vocabulary.token_bytes, vocabulary.special_ids
    table = TokenTable.create(texts, vocabulary.eos_ids, special, vocabulary.vocab_size)
    arena = GrammarArena(table, 2, max_states=20_000, max_transitions=1 << 18, max_mask_rows=2_000)
    grammars = DeviceGrammars(arena, texts, vocabulary.eos_ids, special)
    tables = grammars.prepare(grammar)
    assert tables is not None
    base = grammars.acquire(grammar, tables, has_ends=has_ends)
    assert base is not None
    return tables, base, arena


def device_walk(tables: AutomatonTables, state: int, text: bytes) -> int:
    for byte in text:
        state = int(tables.transitions[state, tables.byte_class[byte]])
        assert state >= 0, text
    return state


@pytest.mark.parametrize("before", ["", "a", " a"])
def test_the_device_finishes_a_value_by_the_way_that_the_host_knows(before: str) -> None:
    vocabulary = make_vocabulary(1)
    grammar = compiled('"[ab]{2,9}"', vocabulary)
    assert grammar.close()
    bordered = Bordered(grammar, vocabulary, before=before.encode(), after=b",")
    tables, _, _ = on_device(bordered, vocabulary, has_ends=True)
    assert tables.closing is not None
    local, state, text = 0, 0, b""
    assert tables.closing.need[0] == len(bordered.shortest_completion(0))
    while tables.closing.need[local]:
        token = int(tables.closing.token[local])
        reached = bordered.advance(state, token)
        assert reached is not None
        local, state = device_walk(tables, local, vocabulary.token_bytes[token]), reached
        text += vocabulary.token_bytes[token]
    assert is_value('"[ab]{2,9}"', text[len(before) :])


def test_tables_of_too_many_places_are_not_made() -> None:
    vocabulary = make_vocabulary(2)
    grammar = compiled("[ab]{0,3000}", vocabulary)
    assert grammar.close()
    bordered = Bordered(grammar, vocabulary, after=b"ab" * 32)
    assert bordered.is_closed
    assert bordered.device_tables() is None
    assert bordered.device_tables() is None, "nor tried again"


def test_the_token_that_was_given_back_comes_first_and_any_value_may_follow_in_it() -> None:
    vocabulary = make_vocabulary(3)
    free = Bordered(None, vocabulary, before=b" a")
    first = {vocabulary.token_bytes[t] for t in bitmask.unpack(free.mask(0))}
    assert first == {t for t in vocabulary.token_bytes if t.startswith(b" a")}
    assert b" ab" in first
    assert not free.is_accepting(0)
    state = free.advance(0, vocabulary.tokens_with_text(b" ab")[0])
    assert state is not None
    assert free.is_accepting(state)
    assert (free.mask(state) == -1).all()
    assert free.advance(state, EOS) == state, "any token may follow"
    assert free.advance(0, vocabulary.tokens_with_text(b"b")[0]) is None


def test_forced_tokens_stop_where_what_follows_may_begin() -> None:
    texts = [b"</s>", b"a", b"b", b"c", b",", b"c,"]
    vocabulary = Vocabulary(texts, [EOS], [EOS])
    grammar = compiled("abc", vocabulary)
    assert grammar.forced_tokens(0) == [1, 2, 3]
    assert Bordered(grammar, vocabulary, after=b",").forced_tokens(0) == [1, 2], "`c,` may come instead of `c`"
    assert Bordered(grammar, vocabulary, after=b".").forced_tokens(0) == [1, 2, 3]


@pytest.mark.parametrize("after", [b" at", b"\n", b" "])
def test_only_white_space_does_not_end_a_value_that_may_hold_it(after: bytes) -> None:
    texts = [b"</s>", *(bytes([b]) for b in b"at \n")]
    vocabulary = Vocabulary(texts, [EOS], [EOS])
    bordered = Bordered(compiled("[at \n]+", vocabulary), vocabulary, after=after)
    state: int | None = 0
    for byte in b"a" + after:
        assert state is not None
        state = bordered.advance(state, texts.index(bytes([byte])))
    assert state is not None
    assert bordered.is_complete(state) == (after == b" at")
    assert bordered.is_accepting(state)


def test_a_grammar_goes_on_after_a_token_if_longer_ones_hold_its_usual_beginnings() -> None:
    texts = [b"</s>", *(bytes([b]) for b in b' -0123456789abc"{'), b" -", b" a", b" b", b' "', b' {"']
    vocabulary = Vocabulary(texts, [EOS], [EOS])
    assert not compiled("-?[0-9]+", vocabulary).goes_on(b" "), "only ` -` is longer"
    assert compiled("a|b", vocabulary).goes_on(b" ")
    assert compiled('[{]"[a-c]"', vocabulary).goes_on(b" ")
    assert not compiled("[a-c0-9]", vocabulary).goes_on(b" "), "two beginnings of thirteen"
    grammar = compiled("c", vocabulary)
    assert grammar.known_to_go_on(b" ") is None
    assert not grammar.goes_on(b" ")
    assert grammar.known_to_go_on(b" ") is False


def test_grammars_made_of_one_are_kept_by_it() -> None:
    grammar = compiled("c", make_vocabulary(0))
    made = [grammar.derived(key % 20, lambda: Bordered(grammar, grammar.vocabulary, before=b" ")) for key in range(36)]
    assert grammar.derived(15, lambda: made[0]) is made[35]
    assert made[0] is not made[20], "only the last ones are kept"


@pytest.mark.parametrize("pattern", ["[12]{1,3}", "a( a)*", "(ab)*", '"[ab]*"'])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_lead_may_stand_before_the_value_and_changes_nothing_after_it(pattern: str, seed: int) -> None:
    vocabulary = make_vocabulary(seed)
    grammar = compiled(pattern, vocabulary)
    plain = Bordered(grammar, vocabulary, after=b".b")
    led = Bordered(grammar, vocabulary, after=b".b", lead=b" ")
    assert led.is_accepting(0) == plain.is_accepting(0)
    assert len(led.shortest_completion(0)) <= led.completion_bound(0)
    for token, text in enumerate(vocabulary.token_bytes):
        if not text or token == EOS:
            continue
        state = led.advance(0, token)
        assert bitmask.is_allowed(led.mask(0), token) == (state is not None), text
        rest = text[1:] if text.startswith(b" ") else text
        expected = plain._after_text((0, ()), rest) if rest else (0, ())
        assert (None if state is None else led._places[state]) == expected, text
        if expected is not None and state is not None:
            assert led.num_after(state, is_last=True) == plain.num_after(plain._number(expected), is_last=True)

"""Ways out of automata: as short as a search over the vocabulary finds them, and made of tokens that are allowed."""

from __future__ import annotations

import numpy as np
import pytest

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.grammar.closing import IMPOSSIBLE, ClosingTable, TokenTrie, closing_table

WORDS = [b"ab", b"abc", b"yes", b"no", b"xx", b'","', b"12", b"bcx", b"\xc3\xa9"]
TOKENS = [bytes([b]) for b in range(256)] + WORDS + [b"", b"<end>"]
END = len(TOKENS) - 1


def compiled(pattern: str, tokens: list[bytes] = TOKENS):  # type: ignore[no-untyped-def]
    end = len(tokens) - 1
    vocabulary = Vocabulary(tokens, frozenset([end]), frozenset([end]), len(tokens))
    grammar = compile_constraint("regex", pattern, vocabulary)
    assert grammar.close()
    return grammar


def table_of(grammar, tokens: list[bytes] = TOKENS) -> ClosingTable:  # type: ignore[no-untyped-def]
    tables = grammar.device_tables()
    assert tables is not None
    trie = TokenTrie.create(tokens, [len(tokens) - 1])
    return closing_table(tables.byte_class, tables.transitions, tables.accepting, trie)


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3,8}(xy|xx){1,6}", "(yes|no)", '"[^"]{2,20}"', "é[0-9]{1,3}(,[0-9]{2}){2,5}"]
)
def test_following_the_table_ends_in_as_many_tokens_as_it_says(pattern: str) -> None:
    grammar = compiled(pattern)
    table = table_of(grammar)
    for start in range(len(table.need)):
        state, steps = start, 0
        while not grammar.is_accepting(state):
            following = grammar.advance(state, int(table.token[state]))
            assert following is not None
            assert table.need[following] == table.need[state] - 1
            state, steps = following, steps + 1
        assert steps == table.need[start]
        assert table.token[state] == -1


def test_no_way_is_longer_than_its_bytes_and_none_is_worse_than_the_grammars_own_bound() -> None:
    grammar = compiled("(ab|abc|yes){4}xx")
    table = table_of(grammar)
    for state in range(len(table.need)):
        assert table.need[state] <= grammar.completion_bound(state)
    assert table.need[0] == len(grammar.shortest_completion(0))


def test_what_the_vocabulary_cannot_write_is_impossible() -> None:
    tokens = [b"a", b"bb", b"<end>"]
    grammar = compiled("a{2}|bbb", tokens)
    table = table_of(grammar, tokens)
    tables = grammar.device_tables()
    after_b = int(tables.transitions[0, tables.byte_class[ord("b")]])
    assert table.need[0] == 2
    assert table.need[after_b] == 1  # b, then bb
    after_bb = int(tables.transitions[after_b, tables.byte_class[ord("b")]])
    assert table.need[after_bb] == IMPOSSIBLE
    assert table.token[after_bb] == -1


def test_a_trie_has_every_token_but_the_refused_ones() -> None:
    trie = TokenTrie.create(TOKENS, [5, END])

    def find(text: bytes) -> int:
        node = 0
        for byte in text:
            place = int(np.searchsorted(trie.keys, node * 256 + byte))
            if place == len(trie.keys) or trie.keys[place] != node * 256 + byte:
                return -1
            node = place + 1
        return int(trie.token[node])

    assert [find(text) for text in TOKENS[:-2]] == [i if i != 5 else -1 for i in range(len(TOKENS) - 2)]
    assert find(b"<end>") == -1
    assert (np.diff(trie.keys) > 0).all()

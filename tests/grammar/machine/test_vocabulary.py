"""How few tokens write a text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.grammar import Vocabulary

TEXTS = st.binary(min_size=1, max_size=9).map(lambda b: bytes(97 + c % 3 for c in b))


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=12), TEXTS.flatmap(lambda t: st.integers(1, 4).map(lambda n: t * n)))
def test_the_fewest_tokens_of_a_text(tokens: list[bytes], text: bytes) -> None:
    vocabulary = Vocabulary([*tokens, b"</s>"], [len(tokens)])
    fewest: list[int | None] = [0]
    for end in range(1, len(text) + 1):
        before = [fewest[end - len(t)] for t in tokens if text[:end].endswith(t)]
        fewest.append(min((n + 1 for n in before if n is not None), default=None))
    found = vocabulary.fewest_tokens(text)
    assert (None if found is None else len(found)) == fewest[-1]
    assert found is None or b"".join(vocabulary.token_bytes[i] for i in found) == text

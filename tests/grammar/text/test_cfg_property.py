"""Random Lark grammars against a reference that recognises by least fixed points."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import GrammarError
from ramet.grammar import Vocabulary, compile_constraint

TOKENS = [*(bytes((i,)) for i in range(256)), b"ab", b"ba", b"aab", b"bb", b"<eos>"]
VOCABULARY = Vocabulary(TOKENS, [len(TOKENS) - 1], [len(TOKENS) - 1])
RULES = ("start", "x", "y")
TEXTS = ["".join(t) for n in range(6) for t in product("ab", repeat=n)]

# ("text", "ab") | ("rule", "x") | ("all", parts) | ("any", options) | ("repeat", item, operator)
Part = tuple[object, ...]

parts = st.recursive(
    st.one_of(
        st.sampled_from(["a", "b", "ab"]).map(lambda t: ("text", t)), st.sampled_from(RULES).map(lambda r: ("rule", r))
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda p: ("all", tuple(p))),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: ("any", tuple(p))),
        st.tuples(st.just("repeat"), inner, st.sampled_from("*+?")),
    ),
    max_leaves=5,
)
grammars = st.fixed_dictionaries(dict.fromkeys(RULES, parts))


def spelled(part: Part) -> str:
    match part:
        case ("text", text):
            return f'"{text}"'
        case ("rule", str(rule)):
            return rule
        case ("all", tuple(items)):
            return "(" + " ".join(map(spelled, items)) + ")"
        case ("any", tuple(items)):
            return "(" + " | ".join(map(spelled, items)) + ")"
        case ("repeat", tuple(item), operator):
            return f"({spelled(item)}){operator}"
    raise AssertionError(part)


def ends(part: Part, text: str, begins: frozenset[int], known: dict[tuple[str, int], frozenset[int]]) -> frozenset[int]:
    """Where `part` can end if it begins at one of `begins`, by what is known of the rules so far."""
    match part:
        case ("text", str(word)):
            return frozenset(i + len(word) for i in begins if text.startswith(word, i))
        case ("rule", str(rule)):
            return frozenset().union(*(known[rule, i] for i in begins)) if begins else begins
        case ("all", tuple(items)):
            for item in items:
                begins = ends(item, text, begins, known)
            return begins
        case ("any", tuple(items)):
            return frozenset().union(*(ends(item, text, begins, known) for item in items))
        case ("repeat", tuple(item), operator):
            found = begins if operator in ("*", "?") else ends(item, text, begins, known)
            if operator == "?":
                return found | ends(item, text, begins, known)
            while True:
                more = found | ends(item, text, found, known)
                if more == found:
                    return found
                found = more
    raise AssertionError(part)


def recognises(rules: dict[str, Part], text: str) -> bool:
    known = {(rule, i): frozenset[int]() for rule in rules for i in range(len(text) + 1)}
    while True:
        again = {(rule, i): ends(rules[rule], text, frozenset((i,)), known) for rule, i in known}
        if again == known:
            return len(text) in known["start", 0]
        known = again


@settings(max_examples=150, deadline=None)
@given(grammars)
def test_language_masks_and_completions_are_those_of_the_reference(rules: dict[str, Part]) -> None:
    source = "\n".join(f"{rule}: {spelled(part)}" for rule, part in rules.items())
    language = {text for text in TEXTS if recognises(rules, text)}
    try:
        grammar = compile_constraint("cfg", source, VOCABULARY)
    except GrammarError as error:
        assert "no text matches" in str(error), source  # noqa: PT017
        assert not language, source
        return
    for text in TEXTS:
        state = grammar.advance_bytes(0, text.encode())
        assert (state is not None and grammar.is_accepting(state)) == (text in language), (source, text)
        if state is None or len(text) > 3:
            continue
        # never a dead end, and the way out that is given leads out
        rest = b"".join(TOKENS[t] for t in grammar.shortest_completion(state))
        assert recognises(rules, text + rest.decode()), (source, text, rest)
        row = np.unpackbits(grammar.mask(state).view(np.uint8), bitorder="little")
        for token in (97, 98, 256, 257, 258, 259):
            assert row[token] == (grammar.advance(state, token) is not None), (source, text, TOKENS[token])

from __future__ import annotations

import builtins
import json
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from ramet.errors import ConfigError, GrammarError
from ramet.grammar import Grammar, Vocabulary
from ramet.grammar.engines import BACKENDS, load_backend
from ramet.grammar.machine import bitmask

PIECES = [b'{"', b'":', b'","', b"true", b"ab", b"12", b'"}', "é".encode()]
TOKENS = [*(bytes((i,)) for i in range(256)), *PIECES, b"<eos>", b"<pad>"]
EOS = 256 + len(PIECES)
VOCABULARY = Vocabulary(TOKENS, [EOS], [EOS, EOS + 1], len(TOKENS) + 5)
MODULES = {"ramet": "ramet", "llguidance": "llguidance", "xgrammar": "xgrammar", "outlines": "outlines_core"}
INSTALLED = [name for name, module in MODULES.items() if find_spec(module) is not None]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def walk(grammar: Grammar, text: bytes) -> int | None:
    state: int | None = 0
    for byte in text:
        if state is None:
            return None
        state = grammar.advance(state, byte)
    return state


def accepts(grammar: Grammar, text: str) -> bool:
    state = walk(grammar, text.encode())
    return state is not None and grammar.is_accepting(state)


def mask(grammar: Grammar, state: int) -> Any:
    row = np.full(VOCABULARY.num_words, -1, dtype=np.int32)
    grammar.fill_mask(state, row)
    return row


@pytest.fixture(params=INSTALLED)
def backend(request: pytest.FixtureRequest) -> Any:
    return load_backend(request.param)


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("regex", "[abc]+d?", ["ab", "cabd"], ["", "d", "abdd", "e"]),
        ("choice", ["yes", "no", "é+"], ["yes", "é+"], ["y", "yesno", "é"]),
        ("json_schema", SCHEMA, ['{"a":12,"b":"x"}', '{"a":-1,"b":"é"}'],
         ['{"a":1}', '{"a":1,"b":"y"}', '{"a":"1","b":"x"}']),
        ("json_schema", json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 1}),
         ["[true,false]"], ["[]", "[1]"]),
    ],
)  # fmt: skip
def test_languages_agree(backend: Any, kind: str, source: Any, good: list[str], bad: list[str]) -> None:
    grammar = backend.compile(kind, source, VOCABULARY)
    assert [accepts(grammar, t) for t in good] == [True] * len(good)
    assert [accepts(grammar, t) for t in bad] == [False] * len(bad)


def test_masks_agree_with_advance_and_end_tokens_with_accepting(backend: Any) -> None:
    grammar = backend.compile("json_schema", SCHEMA, VOCABULARY)
    state: int | None = 0
    for byte in '{"a":12,"b":"é"}'.encode() + b"\0":
        assert state is not None
        row = mask(grammar, state)
        for token in range(len(TOKENS)):
            allowed = bitmask.is_allowed(row, token)
            if token == EOS:
                assert allowed == grammar.is_accepting(state)
            elif token > EOS:
                assert not allowed
            elif allowed or backend.name != "llguidance":  # which masks all but the usual tokens of a forced text
                assert allowed == (grammar.advance(state, token) is not None), (state, token)
        assert not any(bitmask.is_allowed(row, t) for t in range(len(TOKENS), VOCABULARY.vocab_size))
        if byte:
            state = grammar.advance(state, byte)


def test_states_are_values_that_can_be_gone_back_to(backend: Any) -> None:
    grammar = backend.compile("regex", "[ab]{300}c", VOCABULARY)
    states = [0]
    for i in range(300):
        following = grammar.advance(states[-1], b"ab"[i % 2])
        assert following is not None
        states.append(following)
    assert grammar.advance(states[5], ord("c")) is None
    assert grammar.advance(states[300], ord("c")) is not None
    before = mask(grammar, states[3])
    assert grammar.advance(states[3], ord("a")) is not None
    assert (mask(grammar, states[3]) == before).all()


def test_completions_close_the_text(backend: Any) -> None:
    grammar = backend.compile("json_schema", SCHEMA, VOCABULARY)
    state = walk(grammar, b'{"a":1')
    assert state is not None
    text = b'{"a":1' + b"".join(TOKENS[t] for t in grammar.shortest_completion(state))
    assert json.loads(text)["b"] in ("x", "é")


def test_what_an_engine_refuses_is_a_grammar_error(backend: Any) -> None:
    with pytest.raises(GrammarError):
        backend.compile("json_schema", {"type": "wrong"}, VOCABULARY)
    with pytest.raises(GrammarError):
        backend.compile("nonsense", "x", VOCABULARY)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "ramet"])
def test_a_missing_package_is_named_with_its_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package, _ = BACKENDS[name]
    monkeypatch.delitem(sys.modules, module, raising=False)
    real = builtins.__import__

    def without(target: str, *args: Any, **kwargs: Any) -> Any:
        if target.split(".")[0] == MODULES[name]:
            raise ModuleNotFoundError(f"No module named {target!r}", name=target)
        return real(target, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=f"pip install {package}$"):
        load_backend(name)


def test_an_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="must be one of ramet, llguidance, xgrammar, outlines"):
        load_backend("guess")

"""What frames of JSON share: things made once, and contexts that are told what was written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ramet.grammar import CompiledGrammar, Limits, Vocabulary
from ramet.grammar.ir import JsonOptions
from ramet.grammar.json_schema.algebra.values import Const
from ramet.grammar.json_schema.compile import Schemas
from ramet.grammar.json_schema.frames.compilation import Compilation, Context, TextContext, ValueFrame
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import target

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])


class Asking(Context):
    """Notes the values that end in it; the text ends after them."""

    remembers = True

    def __init__(self, machine: Machine) -> None:
        self.done = target(machine.done)
        self.told: list[Const | None] = []

    def resume(self, mask: int, value: Const | None) -> int:
        self.told.append(value)
        return self.done

    def rest(self, tag: int) -> int:
        return 0


def place(schema: Any) -> tuple[Compilation, int]:
    schemas = Schemas(JsonOptions(), 20_000)
    root, _ = schemas.read(schema)
    return schemas.compilation(Machine(BYTES, Limits())), root


def test_what_is_made_once_is_one_object_even_where_it_is_none() -> None:
    compilation, _ = place(True)
    made: list[tuple[str, int]] = []

    def pair(of: Compilation, name: str, number: int) -> tuple[str, int] | None:
        assert of is compilation
        made.append((name, number))
        return (name, number) if number else None

    assert compilation.once(pair, "a", 1) is compilation.once(pair, "a", 1)
    assert compilation.once(pair, "a", 0) is compilation.once(pair, "a", 0) is None
    assert compilation.once(pair, "b", 1) == ("b", 1)
    assert made == [("a", 1), ("a", 0), ("b", 1)]


def test_equal_frames_are_one_instance_and_another_context_is_another() -> None:
    compilation, root = place({"type": "integer"})
    here, there = TextContext(target(compilation.machine.done), 0), TextContext(target(compilation.machine.done), 0)
    first = compilation.frame(ValueFrame, (root,), here)
    assert compilation.frame(ValueFrame, (root,), here) == first
    assert compilation.frame(ValueFrame, (root,), there) != first


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (True, "null", ("null", None)),
        (True, "true", ("bool", True)),
        (True, '"a\\u0062"', ("string", "ab")),
        ({"maxLength": 300}, json.dumps("x" * 200), ("string", "x" * 200)),
        ({"minLength": 70, "maxLength": 300}, json.dumps("é" * 200), ("string", "é" * 200)),
        ({"pattern": "^[ab]*$", "maxLength": 9000}, json.dumps("ab" * 600), ("string", "ab" * 600)),
    ],
)
def test_a_context_that_remembers_is_told_the_value_however_its_text_was_cut(
    schema: Any, text: str, value: Const
) -> None:
    for size in (1, 7, 1000):
        compilation, root = place(schema)
        context = Asking(compilation.machine)
        grammar = CompiledGrammar(compilation.machine, compilation.value((root,), context, 2))
        data = text.encode()
        state: int | None = 0
        for at in range(0, len(data), size):
            assert state is not None
            state = grammar.advance_bytes(state, data[at : at + size])
        assert state is not None
        assert grammar.is_accepting(state)
        assert context.told[-1] == value

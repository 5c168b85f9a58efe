"""The machine with frames of its own: no source of constraints is needed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ramet.errors import GrammarError, GrammarTooLarge
from ramet.grammar import CompiledGrammar, Limits, Vocabulary
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import DEAD, NEEDS_RUN, REFUSE, Frame, leave, target

PIECES = [b"ab", b"aa", b"a.", b"aa."]
VOCABULARY = Vocabulary([*(bytes((i,)) for i in range(256)), *PIECES, b"<eos>"], [260], [260])
FIRST_PIECE = 256


class Word(Frame):
    """One byte, and then the target `after`: all that a frame must say."""

    def __init__(self, machine: Machine, byte: bytes, after: int) -> None:
        rows = np.full((1, 256), REFUSE, dtype=np.int32)
        rows[0, byte[0]] = leave(0)
        self.table = machine.table(rows, np.arange(256, dtype=np.uint8), 1, None)
        self.after = after
        self.num_asked = 0

    def resolve(self, exit_index: int) -> int:
        self.num_asked += 1
        return self.after

    def closing_exit(self, local: int) -> int:
        return 0


class EvenNumber(Frame):
    """The byte `a` any number of times, then a point, which may only stand after an even number of them."""

    has_memory = True

    def __init__(self, machine: Machine, text: bytes = b"") -> None:
        rows = np.full((1, 256), REFUSE, dtype=np.int32)
        rows[0, ord("a")] = 0
        rows[0, ord(".")] = leave(0)
        self.table = machine.table(rows, np.arange(256, dtype=np.uint8), 1, None)
        self.machine = machine
        self.text = text

    def resolve(self, exit_index: int) -> int:
        return NEEDS_RUN

    def resolve_text(self, exit_index: int, text: bytes, last: bytes) -> int:
        assert last == b"."
        return target(self.machine.done) if len(text) % 2 == 0 else DEAD

    def remember(self, text: bytes) -> int:
        return self.machine.add(EvenNumber(self.machine, text))

    def closing_exit(self, local: int) -> int:
        return 0


def test_a_frame_needs_a_table_and_two_methods() -> None:
    machine = Machine(VOCABULARY, Limits())
    last = machine.add(Word(machine, b"b", target(machine.done)))
    first = Word(machine, b"a", target(last))
    grammar = CompiledGrammar(machine, target(machine.add(first)))
    assert grammar.allowed_tokens(0).tolist() == [ord("a"), FIRST_PIECE]
    assert grammar.shortest_completion(0) == [FIRST_PIECE]
    state = grammar.advance_bytes(0, b"ab")
    assert state is not None
    assert grammar.is_accepting(state)
    assert first.num_asked == 1  # the mask, the completion and the run take one answer


def test_a_frame_with_memory_decides_by_its_whole_text_however_tokens_cut_it() -> None:
    machine = Machine(VOCABULARY, Limits())
    grammar = CompiledGrammar(machine, target(machine.add(EvenNumber(machine))))
    for tokens in ([b"aa."], [b"aa", b"."], [b"a", b"a."], [b"a", b"a", b"."], [b"a", b"a", b"aa."]):
        state: int | None = 0
        for token in tokens:
            assert state is not None
            (number,) = [t for t in VOCABULARY.content_tokens if VOCABULARY.token_bytes[t] == token]
            assert bitmask.is_allowed(grammar.mask(state), number), tokens
            state = grammar.advance(state, number)
        assert state is not None
        assert grammar.is_accepting(state)
    state = grammar.advance_bytes(0, b"a")
    assert state is not None
    assert not bitmask.is_allowed(grammar.mask(state), ord("."))
    assert grammar.advance_bytes(0, b"aaa.") is None


def test_a_frame_without_memory_is_never_asked_for_its_text() -> None:
    machine = Machine(VOCABULARY, Limits())
    word = Word(machine, b"a", target(machine.done))
    with pytest.raises(AssertionError, match="has no memory"):
        word.remember(b"")
    with pytest.raises(AssertionError, match="has no memory"):
        word.resolve_text(0, b"", b"")


def test_a_start_that_is_dead_and_too_many_frames_are_errors() -> None:
    with pytest.raises(GrammarError, match="no text matches"):
        CompiledGrammar(Machine(VOCABULARY, Limits()), DEAD)
    machine = Machine(VOCABULARY, Limits(max_states=2))
    machine.add(Word(machine, b"a", DEAD))
    with pytest.raises(GrammarTooLarge, match="more than 2 configurations"):
        machine.add(Word(machine, b"a", DEAD))


def test_the_machine_loads_no_source_of_constraints() -> None:
    code = (
        "import sys, ramet.grammar.machine.compiled_grammar; "
        "rooms = {'.'.join(m.split('.')[:3]) for m in sys.modules if m.startswith('ramet.grammar.')}; "
        "assert rooms == {'ramet.grammar.machine', 'ramet.grammar.deadline'}, rooms"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""One automaton walked by the host: texts stay finishable, and forced tokens are known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.constraints.host_automaton import HostAutomaton
from ramet.runtime.constraints.incomplete import place_of
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import Batch, Grammar, Request, SamplingParams, ScheduledSequence, Sequence

TOKENIZER = ByteTokenizer()
ENDS = set(TOKENIZER.eos_ids)
END = min(ENDS)


def compiled(pattern: str) -> Grammar:
    words = Vocabulary(TOKENIZER.token_bytes, TOKENIZER.eos_ids, TOKENIZER.special_ids, TOKENIZER.vocab_size)
    return compile_constraint("regex", pattern, words)


def automaton(
    pattern: str, max_tokens: int, stop_ids: frozenset[int] = TOKENIZER.eos_ids, **sampling: Any
) -> HostAutomaton:
    grammar = compiled(pattern)
    prompt = np.zeros(3, dtype=np.int32)
    params = SamplingParams(stop_token_ids=tuple(stop_ids - TOKENIZER.eos_ids), **sampling)
    request = Request("r", prompt, params, max_tokens, stop_ids=stop_ids, grammar=grammar)
    walked = HostAutomaton(Sequence(request), grammar)
    walked.begin(-(-TOKENIZER.vocab_size // 32))
    return walked


def follow(walked: HostAutomaton, text: str) -> None:
    """Take the tokens of a text, as the engine does."""
    for token in text.encode():
        taken = walked.follow([token], lambda num_forced: False)
        walked.sequence.output_ids.extend(taken)


def allowed(walked: HostAutomaton) -> set[int]:
    assert walked.mask is not None
    return set(np.flatnonzero(np.unpackbits(walked.mask.view(np.uint8), bitorder="little")).tolist())


def write(walked: HostAutomaton, text: str) -> str:
    """The text that is kept where a model wants to write `text`."""
    kept = b""
    for wanted in text.encode():
        token = walked.take(wanted)
        assert token is not None
        walked.sequence.output_ids.append(token)
        kept += TOKENIZER.token_bytes[token]
    return kept.decode()


def test_a_token_that_leaves_no_room_is_replaced_by_the_way_to_the_end() -> None:
    assert write(automaton("a{1,9}xyz", max_tokens=9), "aaaaaxyz") == "aaaaaxyz"
    assert write(automaton("a{1,9}xyz", max_tokens=6), "aaaaaa") == "aaaxyz"


def test_a_whole_text_that_any_token_would_break_is_ended() -> None:
    walked = automaton("a(bcdef)?", max_tokens=4)
    assert walked.take(ord("a")) == ord("a")
    walked.sequence.output_ids.append(ord("a"))
    assert walked.take(ord("b")) == END


def test_a_text_that_cannot_be_finished_is_left_alone_from_then_on() -> None:
    walked = automaton("a{1,9}xyz", max_tokens=3)
    assert write(walked, "aaa") == "aaa"
    assert not walked.can_finish


def test_an_end_token_does_not_move_the_automaton() -> None:
    walked = automaton("ab?", max_tokens=9)
    walked.take(ord("a"))
    state = walked.state
    assert walked.take(END) == END
    assert walked.state == state


def test_past_an_ignored_end_token_everything_is_allowed() -> None:
    walked = automaton("ab?", max_tokens=9, stop_ids=frozenset(), ignore_eos=True)
    walked.take(ord("a"))
    walked.take(END)
    assert walked.mask is not None
    walked.follow([END], lambda num_forced: True)
    assert walked.mask is None
    assert walked.forced_run(END) == []


@pytest.mark.parametrize(
    ("max_tokens", "stop_ids", "run"),
    [
        (20, TOKENIZER.eos_ids, "bcdef"),
        (4, TOKENIZER.eos_ids, "bcd"),
        (20, frozenset(b"d"), "bcd"),
        (1, frozenset(), ""),
    ],
)
def test_a_forced_run_ends_with_the_budget_and_with_a_stop_token(
    max_tokens: int, stop_ids: frozenset[int], run: str
) -> None:
    walked = automaton("(ab|b)cdef", max_tokens, stop_ids)
    walked.can_finish = False  # nothing is replaced
    walked.take(ord("a"))
    assert bytes(walked.forced_run(ord("a"))).decode() == run


def test_a_run_that_was_appended_has_been_walked() -> None:
    walked = automaton("abc(d|e)", max_tokens=20)
    walked.take(ord("a"))
    walked.append(walked.forced_run(ord("a")))
    assert walked.state is not None
    assert walked.grammar.advance(walked.state, ord("d")) is not None


class MarksTokenizer(ByteTokenizer):
    """A tokenizer of bytes that joins `",`."""

    JOINED = 300

    def __init__(self) -> None:
        super().__init__(vocab_size=301)
        self.token_bytes[self.JOINED] = b'",'
        self.special_ids -= {self.JOINED}

    def split(self, text: bytes) -> list[int]:
        begin, joined, rest = text.partition(b'",')
        return [*begin, *([self.JOINED, *self.split(rest)] if joined else ())]


@pytest.mark.parametrize(
    ("params", "taken"),
    [
        (SamplingParams(), MarksTokenizer.JOINED),
        (SamplingParams(logprobs=1), ord('"')),
        (SamplingParams(stop=("x",)), ord('"')),
        (SamplingParams(repetition_penalty=1.5), ord('"')),
    ],
)
def test_a_token_is_joined_with_what_must_follow_unless_each_token_is_watched(
    params: SamplingParams, taken: int
) -> None:
    tokenizer = MarksTokenizer()
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, tokenizer)
    grammar = compile_constraint("regex", '[^"]*", [0-9]', words)
    request = Request("r", np.zeros(3, dtype=np.int32), params, 20, stop_ids=tokenizer.eos_ids, grammar=grammar)
    walked = HostAutomaton(Sequence(request), grammar)
    assert walked.take(ord("a")) == ord("a")
    walked.sequence.output_ids.append(ord("a"))
    assert walked.take(ord('"')) == taken
    assert walked.state is not None
    rest = b" 1" if taken == MarksTokenizer.JOINED else b", 1"
    for byte in rest:
        walked.state = walked.grammar.advance(walked.state, byte)
        assert walked.state is not None
    assert walked.grammar.is_accepting(walked.state)


def test_a_text_that_may_go_on_ends_where_the_model_wants_what_cannot_follow() -> None:
    walked = automaton("[0-9]{1,3}", max_tokens=9)
    assert allowed(walked) == set(b"0123456789"), "no text has begun: it must"
    follow(walked, "4")
    assert allowed(walked) == set(range(256)) | ENDS
    assert not walked.is_complete
    assert walked.take(ord(" ")) == END


def test_a_token_that_could_begin_a_continuation_ends_nothing() -> None:
    walked = automaton("a(bc)*", max_tokens=9)
    follow(walked, "a")
    assert allowed(walked) == set(range(256)) | ENDS
    follow(walked, "b")
    assert allowed(walked) == {ord("c")}


def test_no_text_ends_before_its_least_length_or_where_the_end_is_ignored() -> None:
    walked = automaton("a*", max_tokens=9, min_tokens=2)
    for expected in ({ord("a"), *ENDS}, {ord("a"), *ENDS}, set(range(256)) | ENDS):
        assert allowed(walked) == expected
        follow(walked, "a")
    assert walked.take(ord("x")) == END
    assert allowed(automaton("a*", max_tokens=9, stop_ids=frozenset(), ignore_eos=True)) == {ord("a"), *ENDS}


def test_the_end_token_is_the_end_of_text_even_if_stop_tokens_come_before_it() -> None:
    walked = automaton("a*", max_tokens=9, stop_ids=TOKENIZER.eos_ids | {5, ord("a")})
    assert walked.take(ord("x")) == END
    assert walked.take(5) == 5, "a stop token of the caller's own is named as such"


def test_without_an_end_token_a_text_ends_by_its_state() -> None:
    walked = automaton("a*", max_tokens=9, stop_ids=frozenset())
    follow(walked, "a")
    assert not walked.is_complete
    assert walked.follow([ord("x")], lambda num_forced: True) == []
    assert walked.is_complete


def test_a_text_is_complete_where_nothing_can_follow() -> None:
    walked = automaton("ab?", max_tokens=9)
    follow(walked, "a")
    assert not walked.is_complete
    follow(walked, "b")
    assert walked.is_complete
    ignoring = automaton("a", max_tokens=9, stop_ids=frozenset(), ignore_eos=True)
    follow(ignoring, "a")
    assert not ignoring.is_complete


def test_where_a_text_must_come_nearer_to_its_end_the_model_chooses_among_the_ends() -> None:
    walked = automaton("[a-z]*(X1|Y1|ZZ1)", max_tokens=5)
    follow(walked, "ab")
    assert allowed(walked) == set(range(ord("a"), ord("z") + 1)) | set(b"XYZ")
    follow(walked, "c")
    assert allowed(walked) == set(b"XY"), "there is no room for a letter, nor for the longer end"
    follow(walked, "Y1")
    assert walked.is_complete


class TensTokenizer(ByteTokenizer):
    """A tokenizer of bytes that also has a token of ten X."""

    TEN = 300

    def __init__(self) -> None:
        super().__init__(vocab_size=301)
        self.token_bytes[self.TEN] = b"X" * 10
        self.special_ids -= {self.TEN}


@pytest.mark.parametrize(("max_tokens", "kept"), [(90, 8 + 8), (40, 8 + 6), (12, 8)])
def test_a_text_that_was_idle_for_long_keeps_more_tokens_for_its_rest(max_tokens: int, kept: int) -> None:
    tokenizer = TensTokenizer()
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    grammar = compile_constraint("regex", "[a-z]*(X{10}[0-9]){4}", words)  # the shortest rest takes 8 tokens
    request = Request("r", np.zeros(3, dtype=np.int32), SamplingParams(), max_tokens, grammar=grammar)
    walked = HostAutomaton(Sequence(request), grammar)
    walked.begin(-(-tokenizer.vocab_size // 32))
    while ord("a") in allowed(walked):
        follow(walked, "a")
    assert allowed(walked) == {tokenizer.TEN}
    assert max_tokens - len(walked.sequence.output_ids) == kept


NOTES = {
    "type": "object",
    "properties": {"notes": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["notes", "tags"],
}


def of_json(schema: dict[str, Any], **sampling: Any) -> HostAutomaton:
    words = Vocabulary(TOKENIZER.token_bytes, TOKENIZER.eos_ids, TOKENIZER.special_ids, TOKENIZER.vocab_size)
    grammar = compile_constraint("json_schema", json.dumps(schema), words)
    request = Request("r", np.zeros(3, dtype=np.int32), SamplingParams(**sampling), 200, grammar=grammar)
    walked = HostAutomaton(Sequence(request), grammar)
    walked.begin(-(-TOKENIZER.vocab_size // 32))
    return walked


def test_a_string_that_has_its_tokens_is_ended_and_the_others_have_their_own() -> None:
    walked = of_json(NOTES, string_tokens=5)
    for text in ('{"notes": "jo\\"h', '", "tags": ["abcde', '", "abcde'):
        follow(walked, text)
        assert allowed(walked) == {ord('"')}
    follow(walked, '", "abcd')
    assert {ord("e"), ord('"')} < allowed(walked)
    follow(walked, '"]}')
    assert walked.is_complete
    assert [place_of(bytes(walked.sequence.output_ids[:end]).decode()) for end in walked.ended_strings] == [
        "/notes",
        "/tags/0",
        "/tags/1",
    ]


def test_a_string_that_must_be_longer_than_its_tokens_goes_on() -> None:
    walked = of_json({"type": "string", "minLength": 4}, string_tokens=2)
    follow(walked, '"abc')
    assert ord('"') not in allowed(walked)
    follow(walked, "d")
    assert allowed(walked) == {ord('"')}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": "x', "/a"),
        ('{"a": {"b": ["x", "y', "/a/b/1"),
        ('{"a": 1, "k', ""),
        ("[", "/0"),
        ('"x', ""),
        ("", ""),
        ('{"a/b": {"c~": "\\"', "/a~1b/c~0"),
        ('{"a": ["]", "{"], "b": "', "/b"),
        ('{"a": {"b": 1}, "c": [[], [2', "/c/1/0"),
        ('{"\\u00e9": "', "/é"),
        ('}]"', ""),
    ],
)
def test_the_place_where_a_text_ends_is_a_json_pointer(text: str, place: str) -> None:
    assert place_of(text) == place


class Raises:
    """A grammar that fails when it is asked for a mask."""

    def fill_mask(self, state: int, row: object) -> None:
        raise ValueError("broken on purpose")


def test_a_grammar_that_raises_leaves_the_masks_of_others_alone() -> None:
    states = GrammarStates(TOKENIZER.vocab_size, lambda *args: False)
    sequences = [automaton("ab", 5).sequence for _ in range(3)]
    broken: Any = Raises()
    sequences[1] = Sequence(replace(sequences[1].request, grammar=broken))
    for sequence in sequences[:2]:
        states.add(sequence)
    joined = []
    while states.has_work:
        states.work(1.0)
        joined += states.take_joined()
    assert joined == [sequences[0]]
    assert list(states.take_failures()) == [sequences[1]]
    items = tuple(ScheduledSequence(sequence, 0, 3, num_samples=1) for sequence in sequences)
    masks = states.masks(Batch(1, items, 0, 9))
    assert masks is not None
    assert masks.rows == [0]
    (words,) = masks.words  # the others have none
    assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [ord("a")]
    states.close()
    assert not states.take_failures()
    assert states.arena_states(items) is None

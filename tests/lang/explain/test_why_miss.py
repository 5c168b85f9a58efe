"""why_miss(): the first token that differs, the line that wrote it, and what looks like a date, a time or an id."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ramet import Engine, MockBackend, State, assistant, function, gen, user
from ramet.errors import ConfigError, UndefinedVariable
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.probe import differences
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    with MockBackend(tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


@function(temperature=0, max_tokens=8)
def support(s: State, now: str, question: str) -> None:
    s += "You help people. "
    s += f"It is {now}. "
    s += "Be friendly, be short, and say when you do not know. "
    s += f"{question} " + gen("answer")


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("2026-11-24 10:00:01", "2026-11-24 10:00:02", "a date and time: '2026-11-24 10:00:02'"),
        ("2026-11-24", "2026-11-25", "a date: '2026-11-25'"),
        ("10:59", "11:00", "a time: '11:00'"),
        ("1764000000", "1764000060", "a time in seconds: '1764000060'"),
        ("8f14e45f-ceea-467f-a0e6-0123456789ab", "c9f0f895-fb98-4b91-99d0-0123456789ab", "an id (UUID): 'c9f0f895"),
        ("req 5f2b9c1d3e", "req 9a7be41c02", "an id (hexadecimal): '9a7be41c02'"),
        ("day 12345", "day 12399", "a number: '12399'"),
    ],
)
def test_a_field_that_changes_from_call_to_call_is_found(
    backend: MockBackend, first: str, second: str, what: str
) -> None:
    support.run(first, "Where is it?")
    (miss,) = support.why_miss(second, "Where is it?")
    assert miss.volatile is not None
    assert miss.volatile.startswith(what)
    assert miss.line == f"tests/lang/explain/test_why_miss.py:{support.body.__code__.co_firstlineno + 3}"
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert miss.num_same == len("You help people. It is ") + same
    assert "put it behind" in str(miss)


def test_keys_in_another_order_are_found(backend: MockBackend) -> None:
    support.run('{"city": "Rome", "days": 2}', "Where is it?")
    (miss,) = support.why_miss('{"days": 2, "city": "Rome"}', "Where is it?")
    assert miss.volatile == "a reordered key: 'days', there 'city'"
    assert str(miss).endswith("write the keys in the same order every time")
    (other,) = support.why_miss('{"town": "Rome", "days": 2}', "Where is it?")
    assert other.volatile is None


def test_a_difference_that_is_no_such_field_is_named_without_advice(backend: MockBackend) -> None:
    support.run("noon", "Where is it?")
    (miss,) = support.why_miss("night", "Where is it?")
    assert miss.volatile is None
    assert (miss.text[:5], (miss.cached_text or "")[:4]) == ("ight.", "oon.")
    assert str(miss).startswith("gen 'answer': 24 of ")


def test_nothing_in_the_cache_is_a_reason_too(backend: MockBackend) -> None:
    (miss,) = support.why_miss("noon", "Where is it?")
    assert (miss.num_same, miss.cached_text) == (0, None)
    assert "nothing there begins with 'You help" in str(miss)


def test_a_prompt_that_is_all_there_is_no_miss(backend: MockBackend) -> None:
    support.run("noon", "Where is it?")
    state = support.run("noon", "Where is it?")
    (miss,) = state.why_miss()
    assert miss.num_missed == 1
    assert str(miss) == f"gen 'answer': all of its {miss.num_prompt} tokens are cached"


def test_after_a_run_its_own_text_is_not_taken_for_what_was_cached(backend: MockBackend) -> None:
    support.run("10:59", "Where is it?")
    state = support.run("11:00", "Where is it?")
    (miss,) = state.why_miss("answer")
    usage = state.meta("answer")["usage"]
    assert (miss.num_same, miss.num_prompt) == (usage.cached_tokens, usage.prompt_tokens)
    assert miss.volatile == "a time: '11:00', there '10:59'"


def test_a_turn_misses_its_own_text_at_its_own_line(backend: MockBackend) -> None:
    @function(temperature=0, max_tokens=4)
    def chat(s: State) -> None:
        s += user("One.")
        s += assistant(gen("first"))
        s += user("Two.")
        s += assistant(gen("second"))

    found = {miss.name: miss for miss in chat.run().why_miss()}
    assert found["second"].num_same > found["first"].num_same == 0
    assert "Two." in found["second"].text


def test_an_unknown_variable_is_an_error(backend: MockBackend) -> None:
    with pytest.raises(UndefinedVariable, match="no generation 'other'"):
        support.why_miss("noon", "Where?", var="other")


def test_a_backend_that_does_not_tell_is_an_error() -> None:
    class Silent:
        def __init__(self, mock: MockBackend) -> None:
            self.start, self.target = mock.start, mock.target

    with pytest.raises(ConfigError, match="Silent doesn't tell how it tokenises"):
        support.why_miss("noon", "Where?", backend=Silent(MockBackend()))


def test_the_real_engine_tells_the_same(tiny_model: LoadedModel) -> None:
    with Engine(tiny_model, num_kv_tokens=2048, max_running_requests=4, chunked_prefill_size=256) as engine:
        support.run("10:59:30", "Where is it?", backend=engine)
        (planned,) = support.why_miss("11:00:30", "Where is it?", backend=engine)
        state = support.run("11:00:30", "Where is it?", backend=engine)
        (measured,) = state.why_miss()
    for miss in (planned, measured):
        assert miss.volatile == "a time: '11:00:30', there '10:59:30'"
        assert miss.num_same == len("You help people. It is 1")


def test_every_cached_path_that_leaves_is_found_wherever_it_leaves() -> None:
    pool = PagePool(32, 4)
    cache = RadixCache(pool)
    root = cache.root()
    cache.lock(root)
    for tokens in ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 9, 9], [1, 2, 0, 0], [7, 7, 7, 7]):
        pages = pool.allocate(len(tokens) // 4)
        assert pages is not None
        cache.insert(root, np.array(tokens, dtype=np.int32), pages)
    found = [(one.num_same, one.tokens) for one in differences(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])]
    assert found == [(6, (9, 9)), (2, (0, 0)), (0, (7, 7, 7, 7))]
    assert differences(cache, [1, 2], "another salt") == []

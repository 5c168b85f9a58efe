"""What is drafted, and how much of it a step verifies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.probe import following
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.speculation import drafts as drafts_module
from ramet.runtime.speculation.drafts import SOURCES, EarlierRuns, TextDrafts
from ramet.runtime.speculation.speculation import Speculation, StepTimes
from ramet.runtime.types import (
    Batch,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    Status,
    TokenIds,
)

END = 999


def make_sequence(prompt: list[int], output: list[int], *, max_tokens: int = 400, **values: Any) -> Sequence:
    request = Request(
        "r",
        np.asarray(prompt, dtype=np.int32),
        SamplingParams(),
        max_tokens,
        stop_ids=frozenset([END]),
        **values,
    )
    return Sequence(request, output_ids=list(output), status=Status.RUNNING, slot=0)


def drafted(sequence: Sequence, most: int = 16) -> list[int]:
    draft = TextDrafts(sequence, EarlierRuns()).propose(most)
    return [] if draft is None else draft.tokens


def after_longest(text: list[int]) -> tuple[int, list[int]]:
    """By brute force: the length, up to 16, and the continuation of the last longest earlier occurrence of the end."""
    best, place = 1, None
    for end in range(1, len(text)):
        length = 0
        while length < min(end, 16) and text[end - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length >= 2 and length >= best:
            best, place = length, end
    return best, [] if place is None else text[place:]


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_is_what_followed_the_last_longest_occurrence_of_the_texts_end(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        text = [rng.randrange(3) for _ in range(rng.randrange(2, 40))]
        _, expected = after_longest(text)
        found = drafted(make_sequence(text[:1], text[1:]), most=len(expected) or 1)
        assert found == expected, text


def test_a_text_that_repeats_itself_is_drafted_to_go_on_so() -> None:
    assert drafted(make_sequence([1, 2, 3, 1, 2, 3, 1, 2], []), most=7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_draft_ends_before_the_end_of_a_text() -> None:
    assert drafted(make_sequence([1, 2, 3, 4, END, 5, 1, 2], [])) == [3, 4]


def test_the_occurrence_is_followed_token_by_token_and_left_where_the_text_goes_on_otherwise() -> None:
    sequence = make_sequence([1, 2, 3, 4, 5, 6, 7, 1, 2], [])
    drafts = TextDrafts(sequence, EarlierRuns())
    for new, expected in (([3], [4, 5]), ([4, 5], [6, 7]), ([9], []), ([1, 2], [3, 4])):
        drafts.follow(new)
        draft = drafts.propose(2)
        assert (draft.tokens if draft else []) == expected


def test_an_earlier_answer_is_drafted_from_its_first_token_for_a_prompt_with_the_same_end() -> None:
    runs, tail = EarlierRuns(), [50, 51, 52, 53, 54, 55, 56, 57]
    runs.add(make_sequence([1, 2, 3, *tail], [7, 8, 9, 10]))
    cases: list[tuple[list[int], dict[str, Any], list[int] | None]] = [
        ([4, 5, *tail], {}, [7, 8, 9, 10]),
        ([4, 5, *tail], {"owner": "another"}, None),
        ([4, 5, *tail], {"cache_salt": "another"}, None),
        ([4, 5, *tail[:-1], 58], {}, None),
    ]
    for other, values, expected in cases:
        draft = TextDrafts(make_sequence(other, [], **values), runs).propose(9)
        assert (None if draft is None else draft.tokens) == expected


def test_earlier_answers_take_a_bounded_number_of_tokens() -> None:
    runs, rng = EarlierRuns(), random.Random(1)
    for index in range(2_000):
        runs.add(make_sequence([index % 700] * 8, [rng.randrange(99) for _ in range(3_000)], max_tokens=4_000))
        assert runs.num_tokens <= 1_000_000
    kept = sum(len(run) for i in range(700) for run in runs.find(make_sequence([i] * 8, []).request))
    assert kept == runs.num_tokens > 900_000


@pytest.mark.parametrize("seed", range(3))
def test_what_is_cached_after_a_prompt_is_found(seed: int) -> None:
    """By brute force over the texts in the tree, whose prompts end anywhere within pages."""
    rng, pool = random.Random(seed), PagePool(500, 8)
    cache = RadixCache(pool)
    stem, texts = [rng.randrange(50) for _ in range(40)], []
    for _ in range(12):
        text = np.asarray(
            stem[: rng.randrange(1, 40)] + [rng.randrange(50) for _ in range(rng.randrange(1, 40))], dtype=np.int32
        )
        match = cache.match(text)
        cache.lock(match.node)
        pages = pool.allocate(-(-(len(text) - match.num_tokens) // 8))
        assert pages is not None
        cache.insert(match.node, text[match.num_tokens :], pages)
        cache.unlock(match.node)
        texts.append(text.tolist())
    for _ in range(300):
        prompt = (stem if rng.random() < 0.5 else rng.choice(texts))[: rng.randrange(1, 40)]
        found = following(cache, np.asarray(prompt, dtype=np.int32), "", most_texts=50, most_tokens=99)
        after = [text[len(prompt) :] for text in texts if text[: len(prompt)] == prompt and len(text) > len(prompt)]
        longest = [text for text in after if not any(o != text and o[: len(text)] == text for o in after)]
        assert all(text.tolist() in after for text in found)
        assert all(any(text.tolist() == one for text in found) for one in longest), (prompt, found, longest)
        few = following(cache, np.asarray(prompt, dtype=np.int32), "", most_texts=2, most_tokens=3)
        assert 0 < len(few) <= 2 or not found
        assert all(len(text) <= 3 for text in few)
    assert following(cache, np.asarray(stem[:1], dtype=np.int32), "other", most_texts=9, most_tokens=9) == []


def test_what_others_wrote_after_the_same_prompt_is_drafted() -> None:
    pool, prompt = PagePool(50, 8), list(range(100, 119))
    cache = RadixCache(pool)
    pages = pool.allocate(4)
    assert pages is not None
    cache.lock(cache.root())
    cache.insert(cache.root(), np.asarray([*prompt, 7, 8, 9, 10, 11], dtype=np.int32), pages[:3])
    drafts = TextDrafts(make_sequence(prompt, []), EarlierRuns(), cache)
    draft = drafts.propose(9)
    assert draft is not None
    assert (draft.tokens, SOURCES[draft.source]) == ([7, 8, 9, 10, 11], "tree")
    assert TextDrafts(make_sequence(prompt[1:], []), EarlierRuns(), cache).propose(9) is None


def test_a_passage_goes_on_behind_a_word_that_the_text_changes() -> None:
    old = list(range(100, 140))
    new = [*old[:12], 7, *old[13:20], 8, 9, *old[22:]]  # one token for one, then two tokens for two
    drafts = TextDrafts(make_sequence([*old, 1], new[:10]), EarlierRuns())
    right = 0
    for place in range(10, len(new)):
        draft = drafts.propose(1)
        right += draft is not None and draft.tokens == [new[place]]
        drafts.follow([new[place]])
    assert right == len(new) - 10 - 3, "all but the changed words"


def test_of_thousands_of_occurrences_a_few_hundred_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = []

    def counted(text: TokenIds, places: NDArray[np.intp]) -> NDArray[np.intp]:
        looked_at.append(len(places))
        return lengths(text, places)

    lengths = drafts_module._lengths
    monkeypatch.setattr(drafts_module, "_lengths", counted)
    tail, runs = [50, 51, 52, 53, 54, 55, 7, 7], EarlierRuns()
    runs.add(make_sequence([1, *tail], [7] * 2_000, max_tokens=2_000))
    given = np.full(8_000, 7, dtype=np.int32)
    drafts = TextDrafts(make_sequence([*[7] * 8_000, *tail], [], expected_ids=given), runs, worth=only("runs"))
    assert drafts.propose(3) == ([7, 7, 7], SOURCES.index("runs"), 8)
    drafts = TextDrafts(make_sequence([7] * 8_000, [], expected_ids=given), runs, worth=only("given"))
    assert drafts.propose(3) == ([7], SOURCES.index("given"), 16), "what follows its last occurrence"
    assert 128 < max(looked_at) <= 4 * 128


def only(name: str) -> Callable[[int, int], float]:
    return lambda source, length: float(SOURCES[source] == name)


def test_of_two_sources_the_one_is_followed_whose_drafts_are_right() -> None:
    tail, answer, given = [50, 51, 52, 53, 54, 55, 56, 57], [7, 8, 9, 10], [20, 21, 22, 23]
    for better, other, found in (("runs", "given", answer), ("given", "runs", given)):
        runs = EarlierRuns()
        runs.add(make_sequence([1, *tail], answer))
        sequence = make_sequence([2, *tail], [], expected_ids=np.asarray(given, dtype=np.int32))
        drafts = TextDrafts(sequence, runs, worth=only(better))
        assert drafts.propose(9) == (found, SOURCES.index(better), 8)
        assert drafts.rivals == [(SOURCES.index(other), 8, (given if better == "runs" else answer)[0])]
        drafts.follow(found[:1])
        assert not drafts.rivals


def test_a_source_that_was_not_followed_is_learned_from_too() -> None:
    """A client gives the same wrong text each time; what was answered before is right."""
    prompt, answer = [50, 51, 52, 53, 54, 55, 56, 57], list(range(100, 160))
    speculation, wrong = Speculation(), np.asarray([20, 21, 22, 23], dtype=np.int32)
    for _ in range(12):
        sequence = make_sequence(prompt, [], max_tokens=60, expected_ids=wrong)
        while len(sequence.output_ids) < 60:
            step(speculation, [sequence], [answer], slope=0.1)
        sequence.finish_reason = FinishReason.LENGTH
        speculation.release(sequence)
    again = make_sequence(prompt, [], max_tokens=60, expected_ids=wrong)
    found = speculation.propose([again])[again]
    assert found == answer[: len(found)] != []


# --- how many


def step(speculation: Speculation, sequences: list[Sequence], texts: list[list[int]], slope: float) -> int:
    """Run a step whose time grows by `slope` with each token. Returns the number of drafted tokens in it."""
    drafts = speculation.propose(sequences)
    items, num_tokens = [], 0
    for sequence, text in zip(sequences, texts, strict=True):
        num_done = len(sequence.output_ids)
        draft = drafts.get(sequence, [])[: sequence.request.max_tokens - num_done - 1]
        right = next((i for i, t in enumerate(draft) if t != text[num_done + i]), len(draft))
        items.append(ScheduledSequence(sequence, sequence.num_tokens - 1, 1 + len(draft), 1 + len(draft)))
        sequence.output_ids += text[num_done : num_done + right + 1]
        num_tokens += 1 + len(draft)
    items.sort(key=lambda item: item.num_samples)
    num_decode = sum(item.num_samples == 1 for item in items)
    speculation.note_step(Batch(0, tuple(items), num_decode, num_tokens), 0.01 * (1 + slope * (num_tokens - 1)))
    return num_tokens - len(sequences)


def test_right_drafts_are_verified_soon_and_wrong_ones_are_left_again() -> None:
    rng = random.Random(2)
    quoted = [rng.randrange(500) for _ in range(300)]
    sequence = make_sequence([*quoted, 600, 601, *quoted[:2]], [])
    speculation = Speculation()
    text = [*quoted[2:], *(rng.randrange(500) for _ in range(300))]
    counts = []
    while len(sequence.output_ids) < 290:
        counts.append(step(speculation, [sequence], [text], slope=0.15))
    assert len(counts) < 100, "most of the quoted tokens came several in a step"
    for _ in range(40):
        step(speculation, [sequence], [text], slope=0.15)
    assert sum(step(speculation, [sequence], [text], slope=0.15) for _ in range(40)) < 10


def test_no_draft_is_verified_where_a_token_costs_as_much_as_a_step() -> None:
    rng = random.Random(3)
    quoted = [rng.randrange(500) for _ in range(700)]
    sequence = make_sequence([*quoted, 600, 601, *quoted[:2]], [], max_tokens=1000)
    speculation = Speculation()
    counts = [step(speculation, [sequence], [quoted[2:]], slope=1.0) for _ in range(200)]
    assert sum(counts[30:]) == 0


def test_texts_whose_drafts_are_always_wrong_are_hardly_drafted() -> None:
    """Every word of the text occurred before, with another one after it."""
    rng = random.Random(4)
    pairs = [[a, b] for a in range(30) for b in range(30)]
    rng.shuffle(pairs)
    text = [token for pair in pairs for token in pair]
    sequence = make_sequence(text[:800], [], max_tokens=2000)
    speculation = Speculation()
    counts = [step(speculation, [sequence], [text[800:]], slope=0.15) for _ in range(400)]
    assert sum(counts) < 20


def test_the_answer_of_a_sequence_that_ended_is_drafted_for_the_next_one() -> None:
    speculation, prompt = Speculation(), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    answer = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, *range(100, 200)]
    counts = []
    for _ in range(3):
        sequence = make_sequence(prompt, [], max_tokens=60)
        counts.append(0)
        while len(sequence.output_ids) < 60:
            step(speculation, [sequence], [answer], slope=0.1)
            counts[-1] += 1
        sequence.finish_reason = FinishReason.LENGTH
        speculation.release(sequence)
        speculation.release(sequence)  # once more does nothing
    assert counts[0] == 60
    assert counts[1] < 40
    assert counts[2] < 15
    stats = speculation.stats()
    assert stats["num_drafted_tokens_runs"] >= stats["num_accepted_tokens_runs"] > 60
    assert stats["num_drafted_tokens_text"] == 0


def test_nothing_is_looked_for_in_a_full_step_and_what_it_wrote_is_followed_later() -> None:
    quoted, times = list(range(100, 160)), StepTimes()
    prompts = [[index, *quoted, 600, *quoted[:4]] for index in range(40)]
    sequences = [make_sequence(prompt, []) for prompt in prompts]
    for size in (1, 4, 8, 16) * 3:
        times.note(size, 70.0, 0.01 + 0.001 * size)
    speculation = Speculation(times)
    for place in range(4, 34):
        assert speculation.propose(sequences) == {}
        for sequence in sequences:
            sequence.output_ids.append(quoted[place])
    found = speculation.propose(sequences[:1])[sequences[0]]
    assert found == quoted[34 : 34 + len(found)] != []
    sequences[1].finish_reason = FinishReason.LENGTH
    speculation.release(sequences[1])  # its answer is kept like any other
    draft = TextDrafts(make_sequence(prompts[2], []), speculation._runs).propose(3)
    assert draft == (quoted[4:7], SOURCES.index("runs"), 8)


class RightModel:
    """Drafts the right tokens; each takes so many seconds of a clock."""

    def __init__(self, text: list[int], clock: list[float], token_s: float) -> None:
        self.text, self.clock, self.token_s = text, clock, token_s

    def draft(self, sequences: Iterable[Sequence], count: int) -> dict[Sequence, list[int]]:
        self.clock[0] += self.token_s * count
        return {s: self.text[len(s.output_ids) :][:count] for s in sequences}

    def release(self, sequence: Sequence) -> None:
        pass


def test_the_time_of_a_models_draft_is_counted_once() -> None:
    clock, times = [0.0], StepTimes()
    rng = random.Random(7)
    text = [rng.randrange(100_000) for _ in range(1_000)]
    model = RightModel(text, clock, token_s=0.002)
    speculation = Speculation(times, model=model, clock=lambda: clock[0])  # type: ignore[arg-type]
    sequence, sizes = make_sequence([1, 2, 3], [], max_tokens=1_000), []
    while len(sequence.output_ids) < 900:
        begin = clock[0]
        draft = speculation.propose([sequence]).get(sequence, [])
        sizes.append(1 + len(draft))
        clock[0] += 0.006
        item = ScheduledSequence(sequence, sequence.num_tokens - 1, sizes[-1], sizes[-1])
        sequence.output_ids += text[len(sequence.output_ids) :][: sizes[-1]]
        speculation.note_step(Batch(0, (item,), int(not draft), sizes[-1]), clock[0] - begin)
    assert times.seconds(sizes[-1], 500.0) == pytest.approx(0.006)
    assert sizes[-1] >= 8, "a token more takes 2 ms, and a step 6 ms"


def test_times_are_interpolated_between_the_sizes_that_were_measured() -> None:
    times = StepTimes()
    assert times.seconds(8, 300.0) > times.seconds(4, 300.0) > times.seconds(1, 300.0)
    for _ in range(9):
        times.note(1, 300.0, 0.010)
        times.note(8, 300.0, 0.024)
    times.note(8, 300.0, 3.0)  # a step that somebody disturbed
    assert times.seconds(1, 300.0) == pytest.approx(0.010)
    assert times.seconds(7, 300.0) == pytest.approx(0.024)
    assert times.seconds(4, 300.0) == pytest.approx(0.016)
    assert times.seconds(16, 300.0) > 0.024
    for _ in range(600):
        times.note(1, 300.0, 0.020)
    assert times.seconds(8, 300.0) > 0.030, "what was measured long ago is forgotten"


def test_steps_of_short_texts_are_not_compared_with_those_of_long_ones() -> None:
    times = StepTimes()
    for _ in range(5):
        times.note(1, 3000.0, 0.011)
        times.note(4, 3000.0, 0.025)
        times.note(1, 200.0, 0.005)
    assert times.knows(1, 900.0)
    assert not times.knows(4, 900.0)
    assert times.seconds(4, 900.0) < 0.010
    assert times.seconds(4, 2500.0) == pytest.approx(0.025)


class EvenTimes(StepTimes):
    """Times of steps that no clock has measured."""

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return 1 + 0.1 * (num_tokens - 1)


def test_a_text_that_repeats_nothing_is_seldom_looked_at_and_a_repetition_is_found_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = list[int]()
    propose = TextDrafts.propose

    def noted(self: TextDrafts, most: int) -> Any:
        looks.append(most)
        return propose(self, most)

    monkeypatch.setattr(TextDrafts, "propose", noted)
    speculation, sequence = Speculation(EvenTimes()), make_sequence(list(range(50)), [])
    for token in range(100, 180):
        sequence.output_ids.append(token)
        assert not speculation.propose([sequence])
    assert len(looks) <= 16 + 64 // 4 + 1
    num_steps = 0
    for token in range(10, 40):  # what stands in the prompt
        sequence.output_ids.append(token)
        num_steps += 1
        if speculation.propose([sequence]):
            break
    assert num_steps <= 12
    looks.clear()
    for token in range(10 + num_steps, 20 + num_steps):
        sequence.output_ids.append(token)
        assert speculation.propose([sequence])[sequence][0] == token + 1
    assert len(looks) == 10, "where drafts pay, every step looks for them"

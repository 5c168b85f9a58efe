"""How many drafted tokens the next step verifies: as many as pay, by the measured time of steps and drafts' success.

A step of n tokens takes the time that such steps took lately (`StepTimes`). A drafted token is right with the
probability with which the drafts of its kind were right lately, in this sequence and in all (`Successes`); the j-th
token of a draft only if all before it were. So each drafted token has an expected gain, and drafts are taken in the
order of their gains, as far as they raise the tokens that a step yields a second. Where nothing is gained, nothing is
verified.

Every draft is compared with what was sampled, also those that were not verified: a step tells for free whether the
first token would have been right. So nothing has to be tried at a loss. Only a model's drafts cost time: how many
tokens it drafts is decided before, in the same way, with the time of its steps. Where that is none, one is tried now
and then.

Not here: where drafts come from (`drafts`), verification (the scheduler and the steps).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from statistics import median

from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.speculation.draft_model import DraftModel
from ramet.runtime.speculation.drafts import SOURCES, Draft, EarlierRuns, TextDrafts
from ramet.runtime.types import Batch, FinishReason, Sequence

MOST_DRAFTED = 16  # tokens of a draft
MOST_IN_STEP = 32  # tokens of a step with drafts: larger ones are no recorded programs
_MARGIN = 1.05  # by which a step with drafts must be better, as far as is known
_NUM_TIMES = 9  # steps of one size whose median counts
_LEAST_TIMES = 3  # steps without drafts, before there are some
_STALE, _LOOK = 500, 64  # steps after which a size that did not occur is measured anew, looked for every so many
_IDLE, _LOOK_IDLE = 16, 4  # steps in which no draft pays, after which only every so many drafts are looked for
_FIRST_SLOPE = 0.15  # of a step's time, for each further token, until steps are measured
_LEAST_GAIN = 0.05  # of a drafted token that is looked at
_FIRST_SUCCESS, _FIRST_WEIGHT = 0.3, 4.0  # of a kind of drafts, as if so many tokens had been compared
_FADE = 0.995  # weight of a comparison, compared with the next one of its kind
_FADE_OWN = 0.95  # of its sequence
_OWN_WEIGHT = 4.0  # right tokens that a sequence counts as having had, as many as were expected
_MOST_SUCCESS = 0.99
_MODEL = SOURCES.index("model")
_MOST_BY_MODEL = 8  # tokens of a model's draft
_TRY_MODEL = 256  # steps until a model whose drafts do not pay is tried again
_FIRST_BY_MODEL = 0.6  # success of a model's tokens, until they are compared
_LENGTHS = (2, 3, 5, 9, 16)  # lengths of an occurrence from which its drafts are another kind


class StepTimes:
    """The seconds of steps by their number of tokens, measured and interpolated.

    Attention to long texts takes long, too, so steps are compared with those of texts of about the same length.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[int, int], deque[float]] = {}  # by length and size
        self._last: dict[tuple[int, int], int] = {}  # when they occurred last, in steps
        self._medians: dict[
            int, list[tuple[int, float]]
        ] = {}  # by length: sizes and medians, in order; made when asked
        self._num_steps = 0

    def note(self, num_tokens: int, kv_len: float, seconds: float) -> None:
        """Learn from a step. kv_len: the mean length of its rows' texts."""
        length = _length(kv_len)
        key = length, _size(num_tokens)
        self._num_steps += 1
        self._last[key] = self._num_steps
        self._times.setdefault(key, deque(maxlen=_NUM_TIMES)).append(seconds)
        self._medians.pop(length, None)
        if self._num_steps % _LOOK == 0:
            for stale in [other for other, last in self._last.items() if last < self._num_steps - _STALE]:
                del self._last[stale], self._times[stale]
                self._medians.pop(stale[0], None)

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        """True if steps of this size were measured often enough to be compared with others."""
        return len(self._times.get((_length(kv_len), _size(num_tokens)), ())) >= _LEAST_TIMES

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        """Predict the time of a step. Without any measurement, only ratios of these times mean something."""
        size, length = _size(num_tokens), _length(kv_len)
        medians = self._medians.get(length)
        if medians is None:
            sizes = ((known, median(times)) for (other, known), times in self._times.items() if other == length)
            medians = self._medians[length] = sorted(sizes)
        below = max((known for known in medians if known[0] <= size), default=None)
        above = min((known for known in medians if known[0] > size), default=None)
        if below is None or above is None:
            other, seconds = below or above or (1, 1.0)
            return seconds * _grown(size) / _grown(other)
        share = (size - below[0]) / (above[0] - below[0])
        return below[1] + share * max(above[1] - below[1], 0.0)


def _length(kv_len: float) -> int:
    """The length as which a text counts: below 1,024 tokens, 2,048, 4,096, ..."""
    return (int(kv_len) >> 10).bit_length()


def _size(num_tokens: int) -> int:
    """The size as which a step counts: products also compute groups of four tokens."""
    return num_tokens if num_tokens <= 4 else -(-num_tokens // 4) * 4


def _grown(num_tokens: int) -> float:
    return 1 + _FIRST_SLOPE * (num_tokens - 1)


@dataclass(slots=True)
class Successes:
    """Sums that fade: drafted tokens that were right, and how many of them should have been."""

    num_right: float = 0.0
    num_expected: float = 0.0

    def note(self, num_right: float, num_expected: float, fade: float) -> None:
        self.num_right = fade * self.num_right + num_right
        self.num_expected = fade * self.num_expected + num_expected


@dataclass(slots=True, eq=False)
class _Drafted:
    """A live sequence's drafts. `draft`: the last one, made for the tokens after the first `num_output`, and with which
    `success`; its first `num_verified` tokens were in a step.
    """

    text: TextDrafts
    num_output: int
    own: Successes = field(default_factory=Successes)
    draft: Draft | None = None
    success: float = 0.0
    num_verified: int = 0


class Speculation:
    """Chooses the drafted tokens of each step, and learns from its results. Owner: the engine core."""

    def __init__(
        self,
        times: StepTimes | None = None,
        cache: RadixCache | None = None,
        model: DraftModel | None = None,
        most_drafted: int = MOST_DRAFTED,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """times: None begins to measure. cache: what others wrote after the same prompts; None: nothing. most_drafted:
        tokens of a draft. clock: seconds by which the model's drafts are timed.
        """
        self._clock = clock
        self._most_drafted = most_drafted
        self._cache = cache
        self._model = model
        self._model_times = StepTimes()  # of one drafted token, by the number of sequences
        self._num_unasked = 0  # steps since the model was asked
        self._num_idle = 0  # steps since drafts paid
        self.model_s = 0.0  # the model's time, all in all
        self._noted_model_s = 0.0  # the part of it that steps contained
        self.drafted: Counter[str] = Counter()  # tokens of each source that steps have verified
        self.accepted: Counter[str] = Counter()  # those of them that were right
        self._times = StepTimes() if times is None else times
        self._kinds: dict[tuple[int, int], Successes] = {}
        self._runs = EarlierRuns()
        self._live: dict[Sequence, _Drafted] = {}

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        """Draft tokens for some of the sequences that decode in the next step, whose tokens so far are all known."""
        rows = list(sequences)
        kv_len = self._look(rows)
        if kv_len is None:
            return {}
        if self._model is not None:
            self._ask(self._model, rows, kv_len)
        return self._chosen(rows, kv_len)

    def pays(self, sequences: Iterable[Sequence]) -> bool:
        """Whether drafts probably pay, by the known tokens of the sequences that decode in the next step.

        A model drafts nothing for that: on a GPU it would wait for the step in flight.
        """
        rows = list(sequences)
        kv_len = self._look(rows)
        if kv_len is None:
            return False
        return bool(self._model is not None and self._asked(rows, kv_len)[1]) or bool(self._chosen(rows, kv_len))

    def _look(self, rows: list[Sequence]) -> float | None:
        """Look for drafts in the texts, and return the mean length of these; None: nothing is looked for in this step.

        Later, a sequence is followed from where it was left.
        """
        self._num_idle += len(rows) < MOST_IN_STEP
        is_skipped = self._model is None and self._num_idle > _IDLE and self._num_idle % _LOOK_IDLE
        if len(rows) >= MOST_IN_STEP or is_skipped or not rows:
            return None
        for sequence in rows:
            found = self._live.get(sequence)
            if found is None:
                text = TextDrafts(sequence, self._runs, self._cache, self._share_right)
                found = self._live[sequence] = _Drafted(text, len(sequence.output_ids))
            self._read(sequence, found)
            draft = found.draft = found.text.propose(self._most_drafted)
            if draft is not None:
                found.success = self._success(found, draft)
        return sum(sequence.num_tokens for sequence in rows) / len(rows)

    def _chosen(self, rows: list[Sequence], kv_len: float) -> dict[Sequence, list[int]]:
        """The drafts that pay, of those that were found."""
        gains: list[tuple[float, int, Sequence]] = []
        for sequence in rows:
            found = self._live[sequence]
            if found.draft is None:
                continue
            gain = found.success
            for place in range(len(found.draft.tokens)):
                if gain < _LEAST_GAIN:
                    break
                gains.append((gain, -place, sequence))
                gain *= found.success
        chosen = self._choose(gains, len(rows), kv_len)
        if chosen:
            self._num_idle = 0
        return chosen

    def note_step(self, batch: Batch, seconds: float) -> None:
        """Learn from a step that was read, and how long the engine's thread worked on it, drafts included.

        The time of a model's draft is counted apart from that of the step that verifies it.
        """
        seconds -= self.model_s - self._noted_model_s
        self._noted_model_s = self.model_s
        verifying = [item for item in batch.items[batch.num_decode :] if item.num_samples > 1]
        for item in verifying:
            found = self._live.get(item.sequence)
            if found is not None:
                found.num_verified = item.num_samples - 1
        if batch.num_decode + len(verifying) == len(batch.items):
            num_known = sum(item.start + 1 for item in batch.items)
            self._times.note(batch.num_tokens, num_known / len(batch.items), seconds)

    def release(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, and keep its answer. Doing it again changes nothing."""
        found = self._live.pop(sequence, None)
        if self._model is not None:
            self._model.release(sequence)
        if found is not None:
            self._read(sequence, found)
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._runs.add(sequence)

    def stats(self) -> dict[str, float]:
        """Drafted and accepted tokens by source."""
        return {
            f"num_{what}_tokens_{source}": float(counts[source])
            for source in SOURCES
            for what, counts in (("drafted", self.drafted), ("accepted", self.accepted))
        }

    def _asked(self, rows: list[Sequence], kv_len: float) -> tuple[list[Sequence], int]:
        """The rows for which the model's draft is likelier to be right than the one that they have; and its length.

        It is 0 where the model's drafts do not pay, and 1 where this is to be tried.
        """
        success = min(self._share_right(_MODEL, 0), _MOST_SUCCESS)
        asking = [s for s in rows if self._live[s].draft is None or self._live[s].success < success]
        if not asking:
            return asking, 0
        count = self._num_by_model(success, len(rows), len(asking), kv_len)
        return asking, count or int(self._num_unasked >= _TRY_MODEL)

    def _ask(self, model: DraftModel, rows: list[Sequence], kv_len: float) -> None:
        """Let the model draft, where that pays."""
        self._num_unasked += 1
        asking, count = self._asked(rows, kv_len)
        if not count:
            return
        self._num_unasked = 0
        begin = self._clock()
        drafts = model.draft(asking, count)
        seconds = self._clock() - begin
        self.model_s += seconds
        if len(drafts) == len(asking):  # no prompts were computed
            self._model_times.note(len(asking), kv_len, seconds / count)
        success = min(self._share_right(_MODEL, 0), _MOST_SUCCESS)
        for sequence, tokens in drafts.items():
            found = self._live[sequence]
            ends = sequence.request.stop_ids
            end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            if end:
                found.draft, found.success = Draft(tokens[:end], _MODEL, 0), success

    def _num_by_model(self, success: float, num_rows: int, num_asking: int, kv_len: float) -> int:
        """How many tokens the model should draft, so that the steps yield most tokens a second."""
        if not self._times.knows(num_rows, kv_len):
            return 0
        if not self._model_times.knows(num_asking, kv_len):
            return 1
        token_s = self._model_times.seconds(num_asking, kv_len)
        best, best_rate = 0, _MARGIN * num_rows / self._times.seconds(num_rows, kv_len)
        yielded, gain = float(num_rows), 1.0
        for count in range(1, _MOST_BY_MODEL + 1):
            size = num_rows + count * num_asking
            if size > MOST_IN_STEP:
                break
            gain *= success
            yielded += gain * num_asking
            rate = yielded / (self._times.seconds(size, kv_len) + count * token_s)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _read(self, sequence: Sequence, found: _Drafted) -> None:
        """Compare a sequence's new tokens with its last draft, verified or not, and follow them."""
        new = sequence.output_ids[found.num_output :]
        if not new:
            return
        if found.draft is not None:
            pairs = list(zip(found.draft.tokens, new, strict=False))
            num_right = next((i for i, (drafted, token) in enumerate(pairs) if drafted != token), len(pairs))
            num_compared = min(num_right + 1, len(pairs))
            self._of_kind(found.draft.source, found.draft.length).note(num_right, num_compared, _FADE)
            found.own.note(num_right, num_compared * found.success, _FADE_OWN)
            source = SOURCES[found.draft.source]
            self.drafted[source] += found.num_verified
            self.accepted[source] += min(num_right, found.num_verified)
        for rival, length, token in found.text.rivals:
            self._of_kind(rival, length).note(token == new[0], 1, _FADE)
        found.draft, found.num_verified = None, 0
        found.num_output = len(sequence.output_ids)
        found.text.follow(new)

    def _share_right(self, source: int, length: int) -> float:
        kind = self._of_kind(source, length)
        return kind.num_right / kind.num_expected

    def _of_kind(self, source: int, length: int) -> Successes:
        kind = source, bisect_right(_LENGTHS, length)
        if kind not in self._kinds:
            first = _FIRST_BY_MODEL if source == _MODEL else _FIRST_SUCCESS
            self._kinds[kind] = Successes(first * _FIRST_WEIGHT, _FIRST_WEIGHT)
        return self._kinds[kind]

    def _success(self, found: _Drafted, draft: Draft) -> float:
        """The probability of a drafted token: that of its kind, as far as the sequence's own drafts confirm it."""
        share, own = self._share_right(draft.source, draft.length), found.own
        return min(share * (own.num_right + _OWN_WEIGHT) / (own.num_expected + _OWN_WEIGHT), _MOST_SUCCESS)

    def _choose(
        self, gains: list[tuple[float, int, Sequence]], num_rows: int, kv_len: float
    ) -> dict[Sequence, list[int]]:
        """Take the drafted tokens with which the step yields most tokens a second. gains: (gain, -place, sequence)."""
        gains.sort(key=itemgetter(0, 1), reverse=True)
        if not gains or not self._times.knows(num_rows, kv_len):
            return {}
        best, best_rate, num_tokens = 0, _MARGIN * num_rows / self._times.seconds(num_rows, kv_len), float(num_rows)
        for count, (gain, _, _) in enumerate(gains[: max(MOST_IN_STEP - num_rows, 0)], 1):
            num_tokens += gain
            rate = num_tokens / self._times.seconds(num_rows + count, kv_len)
            if rate > best_rate:
                best, best_rate = count, rate
        chosen: dict[Sequence, list[int]] = {}
        for sequence, count in Counter(sequence for _, _, sequence in gains[:best]).items():
            draft = self._live[sequence].draft
            assert draft is not None
            chosen[sequence] = draft.tokens[:count]
        return chosen

"""How long a step will take on this machine, learned from the steps that it has run.

A step's time is modelled as a sum over what it is made of, each part with its own rate:

    seconds = sum_i rate_i * amount_i      amounts: see `step_amounts`

The rates are those that explain the recent steps best (weighted least squares, none negative). Until there are
measurements, and for parts that recent steps did not have, the rates have fixed ratios to each other (`_RATIOS`):
one scale is learned for all of them.

A pure state machine without a clock: measured times are passed in. Not here: what a step contains (`scheduler`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from ramet.runtime.types import Batch, ScheduledSequence, Sequence

# Rates in units of a new token's: a step, a decode row, a new token, a pair of a new token and a key, a row with new
# tokens, a scored position, a step of many tokens. Only their order of magnitude matters.
_RATIOS = np.array((8.0, 1.0, 1.0, 1 / 4000, 4.0, 2.0, 4.0))
_NUM_STEPS = 64  # of each kind, decode alone and with new tokens
_FIT_EVERY = 16  # steps that were predicted well
_GOOD = 0.1  # relative error of such a prediction
_LEAST_TOKENS = 4  # of the first prompt, however long they take
_LEAST_ROWS, _LEAST_SCORED = 4, 32  # what steps may have although nothing like it was measured
_FADE = 0.95  # weight of a step, compared with the one after it
_FAR = 4.0
_TRUST = 0.01  # in fixed ratios, beside one measurement
_SWEEPS = 12


def step_amounts(num_decode: int, extends: Seq[ScheduledSequence], num_few: int = 0) -> tuple[float, ...]:
    """Return what a step is made of, as `_RATIOS` lists it: 1, decode rows, new tokens, the keys that these attend to,
    summed over them, rows with new tokens, scored positions, and 1 if it has new tokens and so many tokens that other
    kernels compute it (`SchedulerConfig.num_few`). A drafted token counts as a decode row: it is computed like one.
    """
    num_decode += sum(item.num_tokens for item in extends if item.num_samples > 1)
    extends = [item for item in extends if item.num_samples <= 1]
    num_new = sum(item.num_tokens for item in extends)
    return (
        1.0,
        num_decode,
        num_new,
        sum(num_pairs(item.start, item.num_tokens) for item in extends),
        len(extends),
        sum(num_scored(item.sequence, item.start, item.num_tokens) for item in extends),
        float(num_new > 0 and 0 < num_few < num_decode + num_new),
    )


class StepCosts:
    """Predicts the seconds of steps. Owner: the scheduler."""

    def __init__(self, first_tokens: int, typical_s: float, num_few: int = 0) -> None:
        """typical_s: seconds of the steps to be predicted. first_tokens: new tokens that take so long, until measured.

        num_few: see SchedulerConfig. Errors count as they are, but for steps that take far longer: there, in relation
        to their time.
        """
        self._first_tokens = first_tokens
        self._typical_s = typical_s
        self._num_few = num_few
        self._rates: list[float] = (_RATIOS * typical_s / first_tokens).tolist()
        self._decode: deque[tuple[tuple[float, ...], float]] = deque(maxlen=_NUM_STEPS)
        self._mixed: deque[tuple[tuple[float, ...], float]] = deque(maxlen=_NUM_STEPS)
        self._num_since_fit = 0

    def note(self, batch: Batch, seconds: float) -> None:
        """Learn from a step that took so long."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        amounts = step_amounts(batch.num_decode, batch.items[batch.num_decode :], self._num_few)
        extends = amounts[3] > 0
        steps = self._mixed if extends else self._decode
        steps.append((amounts, seconds))
        self._num_since_fit += 1
        is_good = not extends or abs(self.seconds(amounts) - seconds) <= _GOOD * seconds
        if not is_good or self._num_since_fit >= _FIT_EVERY:
            self._num_since_fit = 0
            self._fit()

    def most(self) -> tuple[int, int, int]:
        """Return how many new tokens, rows with new tokens and scored positions a step may have to be predicted.

        They are twice what steps had lately: beyond, nobody knows.
        """
        seen = [(int(a[2]), int(a[4]), int(a[5])) for a, _ in self._mixed] or [(0, 0, 0)]
        tokens, rows, scored = (max(column) for column in zip(*seen, strict=True))
        return max(self._first_tokens, 2 * tokens), max(_LEAST_ROWS, 2 * rows), max(_LEAST_SCORED, 2 * scored)

    def seconds(self, amounts: Seq[float]) -> float:
        """Predict the time of a step. amounts: see `step_amounts`."""
        return sum(rate * amount for rate, amount in zip(self._rates, amounts, strict=True))

    def decode_s(self, num_decode: int) -> float:
        """Predict the time of a step with decode rows alone."""
        return self._rates[0] + self._rates[1] * num_decode

    def rows_within(self, seconds: float) -> int:
        """Return how many decode rows a step of so many seconds has."""
        fixed_s, row_s = self._rates[:2]
        return int(min((seconds - fixed_s) / row_s, 1e9)) if row_s > 0 else 1_000_000_000

    def most_within(self, seconds: float, num_decode: int) -> tuple[int | None, float]:
        """Return at most how many new tokens (None: as many as fit) and seconds a step should have beside its rows.

        As many as fit into `seconds`, or as many as make a step of few tokens, whichever computes more new tokens a
        second. What steps of many tokens cost in any case is taken off their seconds.
        """
        room = self._num_few - num_decode
        token, many_s = self._rates[2], self._rates[-1]
        if not self._num_few or token <= 0:
            return None, seconds
        if room <= 0:
            return None, seconds - many_s
        decode_s, few, many = self.decode_s(num_decode), min(room, seconds / token), (seconds - many_s) / token
        if many <= room or few / (decode_s + few * token) >= many / (decode_s + seconds):
            return room, seconds
        return None, seconds - many_s

    def extend_s(self, sequence: Sequence, start: int, num_tokens: int) -> float:
        """Predict the seconds that a sequence's new tokens add to a step."""
        _, _, token, pair, row, scored, _ = self._rates
        extra = scored * num_scored(sequence, start, num_tokens)
        return row + token * num_tokens + pair * num_pairs(start, num_tokens) + extra

    def tokens_within(self, seconds: float, sequence: Sequence, start: int) -> int:
        """Return how many new tokens of a sequence add at most `seconds` to a step, from position `start`."""
        _, _, token, pair, row, scored, _ = self._rates
        if sequence.request.score_from is not None:
            token += scored
        seconds -= row
        if seconds <= 0:
            return 0
        linear = token + pair * start  # pair / 2 * n * n + linear * n = seconds
        if pair * seconds <= 1e-9 * linear * linear:
            return int(min(seconds / linear, 1e9)) if linear > 0 else 1_000_000_000
        return int(min((math.sqrt(linear * linear + 2 * pair * seconds) - linear) / pair, 1e9))

    def _fit(self) -> None:
        """Find the rates that explain the last steps."""
        steps = [*self._decode, *self._mixed]
        ages = [*range(len(self._decode), 0, -1), *range(len(self._mixed), 0, -1)]
        seconds = np.array([seconds for _, seconds in steps])
        weights = _FADE ** (np.array(ages) / 2) / np.maximum(seconds / _FAR, self._typical_s)
        parts = np.array([amounts for amounts, _ in steps]) * _RATIOS * weights[:, None]
        sums = seconds * weights
        whole = parts.sum(axis=1)
        scale = float((whole @ sums) / (whole @ whole))  # of all rates together
        self._rates = (_fitted(parts * scale, sums) * scale * _RATIOS).tolist()


def _fitted(parts: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factors, none negative, with which the columns of `parts` [N, K] add up to about `sums` [N].

    A factor stays near 1 where nothing speaks against it. Source: coordinate descent.
    """
    gram = parts.T @ parts + _TRUST * np.eye(parts.shape[1])
    wanted = parts.T @ sums + _TRUST
    matrix, right = gram.tolist(), wanted.tolist()
    factors = [1.0] * len(right)
    for _ in range(_SWEEPS):
        for i, row in enumerate(matrix):
            rest = sum(a * b for a, b in zip(row, factors, strict=True)) - row[i] * factors[i]
            factors[i] = max(0.0, (right[i] - rest) / row[i])
    return np.array(factors)


def num_pairs(start: int, num_tokens: int) -> float:
    """Return the number of keys that the tokens [start, start + num_tokens) attend to, summed."""
    return num_tokens * (start + (num_tokens + 1) / 2)


def num_scored(sequence: Sequence, start: int, num_tokens: int) -> int:
    """Return how many of the tokens [start, start + num_tokens) predict a scored one."""
    score_from = sequence.request.score_from
    return 0 if score_from is None else max(0, start + num_tokens - max(start, score_from - 1))


class StepBudget:
    """What may still be added to a step: tokens, and seconds beside the rows that decode. Owner: one step's plan.

    The first sequence always gets some tokens, so that prompts go on however long the others take. Where a sequence
    does not fit, the step is full.
    """

    __slots__ = ("_costs", "_least", "_num_rows", "_num_scored", "_seconds", "num_tokens")

    def __init__(self, num_tokens: int, seconds: float, costs: StepCosts, num_decode: int) -> None:
        """seconds: infinite if only tokens count. num_decode: rows that the step has already."""
        self.num_tokens = num_tokens
        self._costs = costs
        self._least = _LEAST_TOKENS
        self._num_rows, self._num_scored = num_tokens, num_tokens
        if not math.isinf(seconds):
            most, self._num_rows, self._num_scored = costs.most()
            best, seconds = costs.most_within(seconds, num_decode)
            self.num_tokens = min(num_tokens, most, num_tokens if best is None else best)
        self._seconds = seconds

    @property
    def has_room(self) -> bool:
        return self.num_tokens > 0 and self._num_rows > 0 and (self._seconds > 0 or self._least > 0)

    def tokens_of(self, sequence: Sequence, start: int) -> int:
        """Return how many tokens of a sequence from `start` fit."""
        if math.isinf(self._seconds):
            return self.num_tokens
        fitting = self._costs.tokens_within(self._seconds, sequence, start)
        if sequence.request.score_from is not None:
            fitting = min(fitting, self._num_scored)
        fitting = max(fitting, self._least)
        if fitting <= 0:
            self._seconds = 0.0
        return min(self.num_tokens, fitting)

    def spend(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        self.num_tokens -= num_tokens
        self._seconds -= self._costs.extend_s(sequence, start, num_tokens)
        self._num_rows -= 1
        self._num_scored -= num_scored(sequence, start, num_tokens)
        self._least = 0

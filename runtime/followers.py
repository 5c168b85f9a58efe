"""Requests that are expected because others have just ended, and how long prompts wait for them.

Conversations and agents send their next request when an answer has arrived. Those whose answers end in one step come
back within milliseconds, but over HTTP one by one. On a CPU a step that takes few prompts costs nearly as much as one
that takes all of them; and what began apart ends apart, so that it happens again in every turn.

Not here: which prompts are admitted (`scheduler`). Programs add their next requests before the next step anyway.
"""

from __future__ import annotations


class Followers:
    """Counts who ended and who came since. Owner: the scheduler. `max_hold_s` of 0: nobody is waited for."""

    def __init__(self, max_hold_s: float) -> None:
        self._max_hold_s = max_hold_s
        self._num_missing = 0
        self._is_holding = False
        self._step_s = 0.0  # when the last step was planned
        self._until_s = 0.0

    def note_end(self, now_s: float) -> None:
        """A request ended with its answer."""
        if self._max_hold_s:
            self._num_missing += 1
            self._until_s = now_s + min(self._max_hold_s, now_s - self._step_s)

    def note_arrival(self) -> None:
        self._num_missing = max(self._num_missing - 1, 0)

    def holds(self, num_live: int, now_s: float) -> bool:
        """Whether prompts should wait; to be asked before each step. `num_live`: requests that wait or run.

        A wait begins where at least two are missing, and no fewer than are there: for fewer, others would wait longer
        than the steps saved take. It ends when all have come, or after as long as the step took in which the last one
        ended (`max_hold_s` at most). Whoever has not come by then is expected no more.
        """
        if now_s >= self._until_s:
            self._num_missing = 0
        least = 1 if self._is_holding else max(2, num_live)
        self._is_holding = self._num_missing >= least
        self._step_s = now_s
        return self._is_holding

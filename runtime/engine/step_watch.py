"""Where the time of the engine's loop goes: the last steps, the longest round and the longest parts of any round, and a
log line for long rounds.

A round is one turn of the loop: commands of callers, one step, delivery of its outputs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

PARTS = ("commands", "schedule", "launch", "device", "grammars", "finish", "deliver")
_LONG_S = 0.1
_LOG_INTERVAL_S = 10.0
_KEPT_STEPS = 1024

Step = tuple[float, float, int, int, int]  # its end (time.monotonic()), seconds, decode rows, extend rows, their tokens


class StepWatch:
    """Measures the parts of rounds. Owner: the engine's thread.

    On a CPU the model computes in `launch`; on a GPU, `device` is the wait for it. `grammars` is the wait for them.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._round = dict.fromkeys(PARTS, 0.0)
        self._longest = dict.fromkeys(PARTS, 0.0)
        self._longest_round_s = 0.0
        self._num_long = 0
        self._report: tuple[float, str] | None = None  # of the longest round that is not logged yet
        self._num_unlogged = 0
        self._last_log = float("-inf")
        self._steps: deque[Step] = deque(maxlen=_KEPT_STEPS)

    def begin(self) -> None:
        """Begin a round. The time since the last one was spent waiting for work."""
        self._last = self._clock()
        self._round = dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or since `begin`, for a part of the round."""
        now = self._clock()
        self._round[part] += now - self._last
        self._last = now

    def end(self, work: str = "") -> None:
        """End a round. work: what its step computed, for the log."""
        spent, longest = self._round, self._longest
        total = 0.0
        for part, seconds in spent.items():
            total += seconds
            if seconds > longest[part]:
                longest[part] = seconds
        self._longest_round_s = max(self._longest_round_s, total)
        if total >= _LONG_S:
            self._note_long(total, work)

    def note_step(self, step: Step) -> None:
        """Keep a step for whoever draws the timeline."""
        self._steps.append(step)

    def take_steps(self) -> list[Step]:
        """Return the last steps that were not taken yet."""
        steps, self._steps = self._steps, deque(maxlen=_KEPT_STEPS)
        return list(steps)

    def stats(self) -> dict[str, float]:
        """Seconds of the longest round, `longest_step_s`, and of each part; the number of long rounds."""
        parts = {f"longest_step_{part}_s": seconds for part, seconds in self._longest.items()}
        return {"longest_step_s": self._longest_round_s, "num_long_steps": float(self._num_long), **parts}

    def _note_long(self, total: float, work: str) -> None:
        self._num_long += 1
        self._num_unlogged += 1
        if self._report is None or total > self._report[0]:
            parts = sorted(self._round.items(), key=lambda item: -item[1])
            text = ", ".join(f"{part} {1000 * seconds:.0f} ms" for part, seconds in parts if seconds >= 0.001)
            self._report = total, f"{text}{f' ({work})' if work else ''}"
        if self._last - self._last_log >= _LOG_INTERVAL_S:
            longest, text = self._report
            logger.info(
                "%d steps took %.0f ms or more; the longest took %.0f ms: %s",
                self._num_unlogged,
                1000 * _LONG_S,
                1000 * longest,
                text,
            )
            self._last_log, self._num_unlogged, self._report = self._last, 0, None

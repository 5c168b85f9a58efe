"""How many replicas there should be: a pure rule. It does no I/O and has no clock, times are passed in.

Replicas are too few while the time to the first token misses its objective, prompts wait that nobody has begun, or
running sequences hold nearly all KV. How much a replica bears is not configured but learned: `bearable` is the number
of begun requests a replica at which they were last too few; it grows slowly while all is well. So

    wanted = requests in flight / (target share of what a replica bears)        and one more while they are too few

One bad moment decides nothing: the number rises to the lowest one of the last `up_s` seconds and falls, one by one,
to the highest one of the last `down_s` seconds, and after each change it rests for as long.

Not here: starting and draining replicas (`server.link.replicas`).
Source: the windows are those of Kubernetes' HorizontalPodAutoscaler ("stabilization windows").
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

_FULL = 0.9  # share of the KV pages that running sequences hold: more is too much
_WAITING = 8.0  # sequences a replica that no step has taken in: more are too many
_TARGET = 0.7  # of what a replica bears
_GROWTH = 1.1  # of `bearable`, in each `down_s` without trouble


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """Limits of the number of replicas, and what they keep.

    ttft_s: objective of the time to the first token, at the 90th percentile. up_s, down_s: seconds for which more or
    fewer must be wanted.
    """

    least: int
    most: int
    ttft_s: float = 2.0
    up_s: float = 10.0
    down_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """The load of all ready replicas. ttft_s: recent 90th percentile; a request that still waits counts with its age.

    kv_usage: of the fullest replica. waiting: sequences that no step has taken in.
    """

    in_flight: int
    waiting: float = 0.0
    kv_usage: float = 0.0
    ttft_s: float = 0.0


class Autoscaler:
    """Says how many replicas are wanted. Its owner asks about every second, while no change is under way."""

    def __init__(self, rule: ScalingRule) -> None:
        self.rule = rule
        self.bearable = math.inf  # begun requests a replica
        self._wanted: deque[tuple[float, int]] = deque()
        self._changed_s = -math.inf
        self._is_too_much = False
        self._since_s = 0.0  # since when that is so, or `bearable` grew

    def decide(self, now_s: float, count: int, load: Load) -> int:
        """Return how many replicas there should be from now on. count: as many are there."""
        rule = self.rule
        is_too_much = load.ttft_s > rule.ttft_s or load.waiting > _WAITING * count or load.kv_usage > _FULL
        if is_too_much != self._is_too_much:
            self._is_too_much, self._since_s = is_too_much, now_s
        lasted_s = now_s - self._since_s
        if is_too_much and lasted_s >= rule.up_s:
            self.bearable = max(min(self.bearable, (load.in_flight - load.waiting) / count), 1.0)
        elif not is_too_much and lasted_s >= rule.down_s:
            self.bearable *= _GROWTH
            self._since_s = now_s
        wanted = max(math.ceil(load.in_flight / (_TARGET * self.bearable)), count + 1 if is_too_much else 0)
        self._wanted.append((now_s, min(max(wanted, rule.least), rule.most)))
        while len(self._wanted) > 1 and self._wanted[1][0] <= now_s - max(rule.up_s, rule.down_s):
            self._wanted.popleft()
        return self._settled(now_s, count)

    def _settled(self, now_s: float, count: int) -> int:
        """The number that the last recommendations agree on; `count` while they do not reach back far enough."""
        rule = self.rule
        up, down = self._since(now_s - rule.up_s), self._since(now_s - rule.down_s)
        rested_s = now_s - self._changed_s
        found = count
        if up and min(up) > count and rested_s >= rule.up_s:
            found = min(up)
        elif down and max(down) < count and rested_s >= rule.down_s:
            found = count - 1
        if found != count:
            self._changed_s = now_s
        return found

    def _since(self, start_s: float) -> list[int]:
        """The recommendations since then; none if the first one is younger."""
        if self._wanted[0][0] > start_s:
            return []
        return [wanted for at_s, wanted in self._wanted if at_s >= start_s]

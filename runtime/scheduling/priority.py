"""The waiting queue and its order: owners take turns, and so do the tasks of one owner; each task has its own order.

A task is what was asked for at once: a program, a batch, one HTTP request with all its choices. Each *flow* (an owner
among all, a task among those of its owner) goes on for a turn of `TURN_S` seconds of the engine's time. After it, the
flow stands in the queue where it would have been if its service had taken its equal share of the time:

    due = (when the turn began) + (the seconds of its service) * (number of flows that wait beside it, and itself)

(of a task: times that number of its owner), at most `MAX_BEHIND_S` from now. Who has not had a whole turn yet, or comes
anew, is due at once. So a small request waits for about one turn of each other flow, whatever waits behind those, and a
flow that is alone loses nothing. The flow that is due first goes first. Among tasks, the time at which one is due
counts like the arrival of its first request, whose key is a time in seconds:

    key = arrival + priority * PRIORITY_STEP_S - credit for its cached prefix

The request with the lowest key goes first: in its task, and among the first ones of tasks that are due. Priorities and
credits do not count among owners: nobody can ask for more than a fair part of the engine. So a request that is the
first of its task is overtaken by none of the same owner that came more than `priority difference * PRIORITY_STEP_S +
MAX_BEHIND_S + MAX_CREDIT_S` after it, or after its task's last turn.

Sources: virtual time of fair queueing, Demers et al. 1989, "Analysis and simulation of a fair queueing algorithm", with
turns as in Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin"; the hierarchy, Bennett and
Zhang 1996, "Hierarchical packet fair queueing algorithms"; what counts as service, Sheng et al. 2024, "Fairness in
serving large language models" (arXiv:2401.00588). The bounded credit is ours.

Not here: whether a request fits (`scheduler`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ramet.runtime.types import Batch, Request, Sequence

PRIORITY_STEP_S = 30.0
MAX_CREDIT_S = 2.0
MAX_BEHIND_S = 30.0
TURN_S = 0.25
DECODE_WEIGHT = 2  # service of a decoded token, in tokens of prompts; as in the source


@dataclass(slots=True, eq=False)
class Waiting:
    """A waiting request. Owner: the scheduler.

    `is_removed`: it was admitted or aborted. `cached_share`: the part of its tokens that was in the cache at the last
    lookup. `wake_at`: the number of the owner's tokens that must be in the tree before this parked request wakes.
    `num_overtaken`: number of requests admitted before it while it was first and did not fit.
    """

    sequence: Sequence
    queued_s: float
    number: int
    cached_share: float = 0.0
    key: float = 0.0
    is_removed: bool = False
    wake_at: int = 0
    num_overtaken: int = 0


@dataclass(slots=True, eq=False)
class Flow:
    """One owner, or one of its tasks: its service, and what waits. Owner of this object: `Flows`, and the queue.

    `unbilled`: tokens of service since `since_s`, which are not a part of `due_s` yet. `num_live`: its requests that
    wait or run; `num_members`: the flows below it that have some. `queue`: the flows below it that wait, or a task's
    requests, as a heap of (key, number, ...). `key`: of its own entry in the heap above it, the only valid one;
    infinite: nothing of it waits.
    """

    name: str
    parent: Flow | None = None
    below: dict[str, Flow] = field(default_factory=dict)
    due_s: float = -math.inf
    unbilled: float = 0.0
    since_s: float = 0.0
    num_live: int = 0
    num_running: int = 0
    num_members: int = 0
    num_waiting: int = 0
    queue: list[tuple[float, int, int, Any]] = field(default_factory=list)  # Any: Flow, or Waiting
    key: float = math.inf


class Flows:
    """All owners and their tasks, and the service that each has had. Owner of this object: the scheduler.

    Of flows without requests only the `max_kept` last ones are remembered: who comes back soon is as far behind as
    before.
    """

    def __init__(self, clock: Callable[[], float], token_s: float = 1e-3, max_kept: int = 4096) -> None:
        """token_s: seconds that a token of service takes, until steps are measured."""
        self._clock = clock
        self._token_s = token_s
        self._max_kept = max_kept
        self._idle: OrderedDict[Flow, None] = OrderedDict()
        self.root = Flow("")
        self.num_tasks = 0  # that have requests

    @property
    def num_owners(self) -> int:
        """Number of owners that have requests."""
        return self.root.num_members

    @property
    def num_served(self) -> int:
        """Number of owners that have running requests."""
        return sum(owner.num_running > 0 for owner in self.root.below.values())

    def task(self, request: Request) -> Flow:
        """Return the task of a request."""
        owner = self._below(self.root, request.owner)
        return self._below(owner, request.task or request.request_id)

    @staticmethod
    def _below(flow: Flow, name: str) -> Flow:
        found = flow.below.get(name)
        if found is None:
            found = flow.below[name] = Flow(name, flow)
        return found

    def enter(self, request: Request) -> Flow:
        """Note a new request. Returns its task."""
        task = self.task(request)
        self.num_tasks += not task.num_live
        flow: Flow = task
        while flow.parent is not None:
            if not flow.num_live:
                self._idle.pop(flow, None)
                flow.parent.num_members += 1
            flow.num_live += 1
            flow = flow.parent
        return task

    def leave(self, task: Flow) -> None:
        """Note the end of a request."""
        flow: Flow = task
        while flow.parent is not None:
            flow.num_live -= 1
            if not flow.num_live:
                self._idle[flow] = None
                flow.parent.num_members -= 1
            flow = flow.parent
        self.num_tasks -= not task.num_live
        while len(self._idle) > self._max_kept:
            oldest, _ = self._idle.popitem(last=False)  # an owner comes after all its tasks
            assert oldest.parent is not None
            del oldest.parent.below[oldest.name]

    def run(self, task: Flow, count: int) -> None:
        """Note that so many more of a task's requests run."""
        assert task.parent is not None
        task.num_running += count
        task.parent.num_running += count

    def add(self, task: Flow, num_tokens: int) -> None:
        """Count tokens of service for a task and its owner."""
        flow: Flow = task
        while flow.parent is not None:
            if not flow.unbilled:
                flow.since_s = self._clock()
            flow.unbilled += num_tokens
            flow = flow.parent

    def note_time(self, batch: Batch, seconds: float) -> None:
        """Learn what service takes, from a step that took so long."""
        num_tokens = batch.num_tokens + (DECODE_WEIGHT - 1) * batch.num_decode
        if seconds > 0 and math.isfinite(seconds) and num_tokens:
            self._token_s += 0.1 * (seconds / num_tokens - self._token_s)

    def due_s(self, flow: Flow) -> float:
        """Return when a flow is due, as far as its whole turns tell."""
        used_s = flow.unbilled * self._token_s
        if used_s >= TURN_S:
            flow.unbilled = 0.0
            above = flow.parent
            while above is not None:
                used_s *= max(above.num_waiting, 1)
                above = above.parent
            flow.due_s = min(max(flow.due_s, flow.since_s + TURN_S) + used_s, self._clock() + MAX_BEHIND_S)
        return flow.due_s

    def rank(self, task: Flow, now_s: float) -> tuple[float, float]:
        """Return what is least for the task that is due first, its owner before itself. All that are due are equal."""
        assert task.parent is not None
        return max(self.due_s(task.parent), now_s), max(self.due_s(task), now_s)


K = TypeVar("K", bound=Hashable)


def equal_parts(wanted: Mapping[K, int], most: int) -> dict[K, int]:
    """Divide `most` among owners that want so much: equally, but what one does not want is the others'.

    Each gets at least 1. Source: max-min fairness.
    """
    parts: dict[K, int] = {}
    for index, (owner, count) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        parts[owner] = min(count, max(most // (len(wanted) - index), 1))
        most -= parts[owner]
    return parts


class WaitingQueue:
    """Waiting requests by owner and task. Push and pop are O(log n); keys that have risen are corrected when they are
    first, and removed requests dropped: once each.
    """

    def __init__(self, flows: Flows) -> None:
        self._flows = flows
        self._numbers = itertools.count()

    @staticmethod
    def key_of(waiting: Waiting) -> float:
        """Compute the request's current key."""
        credit = MAX_CREDIT_S * waiting.cached_share
        return waiting.queued_s + waiting.sequence.request.priority * PRIORITY_STEP_S - credit

    @property
    def owners(self) -> set[str]:
        """The owners of the requests here; perhaps also of some whose last one has been removed."""
        return {owner.name for owner in self._flows.root.below.values() if owner.key < math.inf}

    def push(self, waiting: Waiting) -> None:
        waiting.key = self.key_of(waiting)
        task = self._flows.task(waiting.sequence.request)
        heapq.heappush(task.queue, (waiting.key, waiting.number, next(self._numbers), waiting))
        self._place(task)
        assert task.parent is not None
        self._place(task.parent)

    def pop(self) -> Waiting | None:
        """Take the first request, or None if the queue is empty."""
        owner = self._first(self._flows.root)
        task = None if owner is None else self._first(owner)
        if owner is None or task is None:
            return None
        waiting: Waiting = heapq.heappop(task.queue)[-1]
        return waiting

    def firsts(self) -> Iterator[Waiting]:
        """Yield the first request of each owner, in the order of the owners' names. They stay in the queue."""
        for _, owner in sorted(self._flows.root.below.items()):
            task = self._first(owner) if owner.key < math.inf else None
            head = None if task is None else self._head(task)
            if head is not None:
                yield head

    def _place(self, flow: Flow) -> None:
        """Give a flow an entry in the queue above it, if it has none that comes as early."""
        key, number = self._key_of_flow(flow)
        if key < flow.key:
            assert flow.parent is not None
            flow.parent.num_waiting += flow.key == math.inf
            flow.key = key
            heapq.heappush(flow.parent.queue, (key, number, next(self._numbers), flow))

    def _first(self, above: Flow) -> Flow | None:
        """Return the first flow below one, or None if nothing waits there. Entries whose keys rose are corrected."""
        queue = above.queue
        while queue:
            key, _, _, flow = queue[0]
            if key != flow.key:
                heapq.heappop(queue)
                continue
            now, number = self._key_of_flow(flow)
            if now == key:
                first: Flow = flow
                return first
            flow.key = now
            if now == math.inf:
                heapq.heappop(queue)
                above.num_waiting -= 1
            else:
                heapq.heapreplace(queue, (now, number, next(self._numbers), flow))
        return None

    def _key_of_flow(self, flow: Flow) -> tuple[float, int]:
        """Return a flow's current key, and the number of its first request; infinite, if nothing of it waits."""
        is_owner = flow.parent is self._flows.root
        task = self._first(flow) if is_owner else flow
        head = None if task is None else self._head(task)
        if head is None:
            return math.inf, 0
        due_s = max(head.queued_s, self._flows.due_s(flow))
        return due_s + (0.0 if is_owner else head.key - head.queued_s), head.number

    @staticmethod
    def _head(task: Flow) -> Waiting | None:
        """Return a task's first request, or None. Entries of removed ones are dropped."""
        queue = task.queue
        while queue:
            key, _, _, waiting = queue[0]
            if not waiting.is_removed and key == waiting.key:
                first: Waiting = waiting
                return first
            heapq.heappop(queue)
        return None

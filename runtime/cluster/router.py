"""The router: which replica gets a request. A pure state machine: it does no I/O and has no clock, times are passed in.

A request goes where its first token is expected first:

    cost(replica) = (waiting + waste * lacking) * seconds_a_token * (1 + running / row_scale)

    waiting     tokens of prompts that this replica has still to compute
    lacking     tokens of this prompt that its cache does not hold (`PrefixIndex`, and prompts on their way to it)
    waste       above 1: what is computed twice delays others, too, and takes the place of what they have cached
    running     sequences that decode there; they slow down prompts

Only a few replicas are looked at: holders of the longest cached prefix and of shorter ones, the replica that had the
last request of the same group, and two drawn at random. So where nothing is cached, this is the power of two choices;
a group (a program, a conversation) stays together unless moving pays, because its own replica lacks least; and a prefix
that many ask for is computed on a second replica once its holders are so busy that this is cheaper, and then has two.

A replica that fails again and again is left out for a while (`Breaker`). A replica that is drained gets nothing new.

Not here: sockets, processes, retries (`server/link`), what a cache holds (`prefix_log`).
Source: power of two choices, Mitzenmacher 2001.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ramet.errors import EngineStopped
from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.cluster.prefix_index import HolderTable, PrefixIndex

_FADE, _FADE_OF_ALL = 0.95, 0.99  # weight of a measured prompt, compared with the one after it
_TRUST = 8  # prompts that must be measured until a replica's own speed counts as much as that of all together
_MOST = 4.0  # times as slow as all together: a longer time (code that is compiled, a machine that paused) is cut to it
_LEAST_MEASURED = 64  # tokens to compute: a prompt with fewer takes a step's time, whatever it lacks


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Weights and limits of a router.

    page_size: tokens a key stands for. token_s: seconds of a prompt's token, until measured. num_drawn: replicas drawn
    at random for each request; num_holders: holders looked at for each length of a cached prefix. promise_tokens:
    how exactly prompts on their way are known. stick_tokens: what a group's last replica is expected to hold of its
    next request besides what is known, such as a part of a page. least_moved: tokens that another replica must hold
    besides, for their pages to be worth a move. max_failures: failures in a row that open a breaker,
    for `pause_s` at first and twice as long each time after, up to `max_pause_s`.
    """

    page_size: int = 16
    max_keys: int = 2_000_000
    max_groups: int = 200_000
    token_s: float = 25e-6
    waste: float = 2.0
    row_scale: float = 128.0
    num_drawn: int = 2
    num_holders: int = 3
    promise_tokens: int = 128
    stick_tokens: int = 128
    least_moved: int = 128
    max_failures: int = 3
    pause_s: float = 1.0
    max_pause_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request to be placed. keys: `prefix_keys` of its prompt, for every so many pages (at most the index's `grain`).

    num_tokens: of the prompt. group: the program or conversation that it is part of.
    """

    num_tokens: int
    keys: Sequence[int] = ()
    group: str | None = None
    every: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a request goes. num_cached: prompt tokens that are expected to be cached there.

    source: a replica that holds `num_elsewhere` tokens of the prompt, more than `num_cached`; None: none is known.
    """

    replica: int
    request: RoutedRequest
    num_cached: int
    placed_s: float
    promised: Sequence[int]
    source: int | None = None
    num_elsewhere: int = 0

    @property
    def num_lacking(self) -> int:
        return self.request.num_tokens - self.num_cached


class Breaker:
    """Leaves out a replica that fails: closed, open for a while, then one request on trial."""

    __slots__ = ("_failures", "_max_failures", "_max_pause_s", "_open_until_s", "_pause_s", "_pauses", "_trial_s")

    def __init__(self, max_failures: int, pause_s: float, max_pause_s: float) -> None:
        self._max_failures = max_failures
        self._pause_s, self._max_pause_s = pause_s, max_pause_s
        self._failures = 0
        self._pauses = 0
        self._open_until_s: float | None = None
        self._trial_s: float | None = None

    def allows(self, now_s: float) -> bool:
        """True if a request may be sent now."""
        if self._open_until_s is None:
            return True
        # a trial of which nothing is heard for as long as the longest pause makes room for another
        is_tried = self._trial_s is not None and now_s < self._trial_s + self._max_pause_s
        return now_s >= self._open_until_s and not is_tried

    def note_sent(self, now_s: float) -> None:
        if self._open_until_s is not None:
            self._trial_s = now_s

    def note_success(self) -> None:
        self._failures = self._pauses = 0
        self._open_until_s = self._trial_s = None

    def note_failure(self, now_s: float) -> None:
        self._failures += 1
        if self._failures >= self._max_failures or self._trial_s is not None:
            pause_s = min(self._pause_s * 2**self._pauses, self._max_pause_s)
            self._pauses = min(self._pauses + 1, 30)
            self._open_until_s, self._trial_s = now_s + pause_s, None


@dataclass(slots=True)
class _Speed:
    """Seconds of a prompt's token, measured lately. count: of prompts, older ones counting less."""

    seconds: float = 0.0
    tokens: float = 0.0
    count: float = 0.0

    def note(self, seconds: float, tokens: float, fade: float) -> None:
        self.seconds = fade * self.seconds + seconds
        self.tokens = fade * self.tokens + tokens
        self.count = fade * self.count + 1

    @property
    def token_s(self) -> float:
        return self.seconds / self.tokens


@dataclass(slots=True)
class _Replica:
    """The router's view of one replica."""

    breaker: Breaker
    num_pages: int
    is_draining: bool = False
    waiting: int = 0  # tokens to compute of placed requests that have no token yet
    running: int = 0  # placed requests that have one, and have not ended
    begun_s: float = 0.0
    speed: _Speed = field(default_factory=_Speed)
    in_flight: dict[Placement, bool] = field(default_factory=dict)  # whether it has a token


class Router:
    """Places requests on replicas, which are numbers chosen by the caller. One thread owns it."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.config = config = config or RouterConfig()
        self.index = PrefixIndex(config.max_keys)
        self._replicas: dict[int, _Replica] = {}
        self._order: list[int] = []  # to draw from
        self._promised = HolderTable()  # keys of prompts that are being computed
        self._promise_every = max(config.promise_tokens // config.page_size, 1)
        self._groups: OrderedDict[str, int] = OrderedDict()  # where the last request of a group went
        self._random = random.Random(config.seed)
        self._speed = _Speed()  # of all replicas

    # --- replicas

    def add(self, replica: int, num_pages: int = 0) -> None:
        """Add a replica, or begin anew with one that was restarted: nothing is cached on it, nothing in flight.

        num_pages: of its cache, as far as known, so that the index need not become coarser later.
        """
        self.remove(replica)
        config = self.config
        breaker = Breaker(config.max_failures, config.pause_s, config.max_pause_s)
        self._replicas[replica] = _Replica(breaker, num_pages)
        self._order.append(replica)
        self.index.make_room(sum(state.num_pages for state in self._replicas.values()))

    def remove(self, replica: int) -> None:
        """Forget a replica. Placements on it end without a word."""
        state = self._replicas.get(replica)
        if state is not None:
            for placement in list(state.in_flight):
                self._withdraw(placement, state)
            del self._replicas[replica]
            self._order.remove(replica)
            self.index.forget(replica)

    def drain(self, replica: int) -> None:
        """Give a replica nothing new. What is in flight there goes on."""
        self._replicas[replica].is_draining = True

    @property
    def replicas(self) -> list[int]:
        return sorted(self._order)

    def load(self, replica: int) -> tuple[int, int]:
        """Return the tokens of prompts that a replica has still to compute, and the sequences that decode there."""
        state = self._replicas[replica]
        return state.waiting, state.running

    def apply(self, replica: int, changes: CacheChanges) -> bool:
        """Take over what a replica's cache gained and lost. Returns False if it must be asked for all its keys."""
        return replica not in self._replicas or self.index.apply(replica, changes)

    # --- requests

    def place(self, request: RoutedRequest, now_s: float, avoid: Collection[int] = ()) -> Placement:
        """Choose the replica of a request, and count it there until `finished` or `failed`.

        avoid: replicas that have failed this request already.
        Raises:
            EngineStopped: no replica can take it: they are drained, left out after failures, or to be avoided.
        """
        index, config = self.index, self.config
        keys = index.coarse(request.keys, request.every)
        step = max(self._promise_every // index.grain, 1)
        known, most = self._known(keys)
        own = None if request.group is None else self._groups.get(request.group)
        candidates = self._candidates(keys, step, own, known)
        usable = [r for r in candidates if self._takes(r, now_s, avoid)]
        usable += self._drawn(now_s, avoid, usable)
        if not usable:
            raise EngineStopped(self._why_nobody(now_s, avoid))
        chosen, best, num_held, num_indexed = usable[0], float("inf"), 0, 0
        of_all, tokens_a_key, most_cached = self._token_s_of_all, index.grain * config.page_size, request.num_tokens - 1
        for replica in usable:
            state = self._replicas[replica]
            indexed = known.get(replica)
            if indexed is None:
                indexed = index.num_held_by(keys, replica, most)
            held = self._num_promised(keys, replica, step, indexed) if state.waiting else indexed
            lacking = request.num_tokens - min(held * tokens_a_key, most_cached)
            if replica == own:
                lacking = max(lacking - config.stick_tokens, 0)
            cost = self.seconds(state, state.waiting + config.waste * lacking, of_all)
            if cost < best:
                chosen, best, num_held, num_indexed = replica, cost, held, indexed
        state = self._replicas[chosen]
        promised = keys[step - 1 :: step][num_indexed // step :]
        for key in promised:
            self._promised.add(key, chosen)
        cached = min(num_held * tokens_a_key, most_cached)
        source = max(known, key=known.__getitem__, default=chosen)
        elsewhere = min(known.get(source, 0) * tokens_a_key, most_cached)
        if source == chosen or elsewhere < cached + config.least_moved:
            placement = Placement(chosen, request, max(cached, 0), now_s, promised)
        else:
            placement = Placement(chosen, request, max(cached, 0), now_s, promised, source, elsewhere)
        state.waiting += placement.num_lacking
        state.in_flight[placement] = False
        state.breaker.note_sent(now_s)
        if request.group is not None:
            self._groups[request.group] = chosen
            self._groups.move_to_end(request.group)
            if len(self._groups) > config.max_groups:
                self._groups.popitem(last=False)
        return placement

    def begun(self, placement: Placement, now_s: float) -> None:
        """Note a request's first token: its prompt is computed. Speeds are measured by it."""
        state = self._state_of(placement)
        if state is None or state.in_flight[placement]:
            return
        self._release(placement, state)
        state.in_flight[placement] = True
        state.breaker.note_success()
        if placement.num_lacking >= _LEAST_MEASURED:
            tokens = placement.num_lacking * (1 + state.running / self.config.row_scale)
            seconds = max(now_s - max(placement.placed_s, state.begun_s), 0.0)
            if self._speed.seconds > 0:
                seconds = min(seconds, _MOST * tokens * self._speed.token_s)
            state.speed.note(seconds, tokens, _FADE)
            self._speed.note(seconds, tokens, _FADE_OF_ALL)
        state.begun_s = max(now_s, state.begun_s)
        state.running += 1

    def finished(self, placement: Placement) -> None:
        """Note the end of a request, whether it had begun or not. A second end changes nothing."""
        state = self._state_of(placement)
        if state is not None:
            self._withdraw(placement, state)

    def failed(self, placement: Placement, now_s: float) -> None:
        """Note that the replica failed a request (not: that the request was wrong)."""
        state = self._state_of(placement)
        if state is not None:
            self._withdraw(placement, state)
            state.breaker.note_failure(now_s)

    # --- the choice

    def _known(self, keys: Sequence[int]) -> tuple[dict[int, int], int]:
        """Return some replicas with the number of keys that they hold: of the longest prefix, and of the longest that
        more of them hold; and how many of the keys any replica may hold that is not among the first.
        """
        index = self.index
        num_held = index.num_held(keys)
        if not num_held:
            return {}, 0
        longest = index.holders(keys[num_held - 1])
        low = index.num_shared(keys, num_held)
        known = dict.fromkeys(self._some(index.holders(keys[low - 1])), low) if low else {}
        for replica in [*known, *self._some(longest)] if len(longest) > self.config.num_holders else longest:
            if index.holds(keys[num_held - 1], replica):
                known[replica] = num_held
        return known, low if len(longest) <= self.config.num_holders else num_held

    def _candidates(self, keys: Sequence[int], step: int, own: int | None, known: dict[int, int]) -> list[int]:
        """The replicas worth a look, each once: those known to hold something, the group's own, and where the prefix
        is being computed.
        """
        found = dict.fromkeys(known)
        if own is not None:
            found[own] = None
        promises = keys[step - 1 :: step]
        low, high = max(known.values(), default=0) // step, len(promises)
        first = low
        while low < high:
            middle = (low + high) // 2
            if promises[middle] in self._promised:
                low = middle + 1
            else:
                high = middle
        if low > first:
            found.update(dict.fromkeys(self._some(self._promised.of(promises[low - 1]))))
        return list(found)

    def _some(self, holders: Sequence[int]) -> Sequence[int]:
        """All of a few holders, or as many as are looked at, drawn at random."""
        count = self.config.num_holders
        if len(holders) <= count:
            return holders
        return [holders[int(self._random.random() * len(holders))] for _ in range(count)]

    def _drawn(self, now_s: float, avoid: Collection[int], others: Sequence[int]) -> list[int]:
        """Usable replicas drawn at random, besides `others`. Looks at all replicas only if nothing else is usable."""
        found: list[int] = []
        order = self._order
        for _ in range(self.config.num_drawn if order else 0):
            replica = order[int(self._random.random() * len(order))]
            if replica not in others and replica not in found and self._takes(replica, now_s, avoid):
                found.append(replica)
        if not found and not others:
            found = [replica for replica in order if self._takes(replica, now_s, avoid)]
        return found

    def _takes(self, replica: int, now_s: float, avoid: Collection[int]) -> bool:
        state = self._replicas.get(replica)
        return state is not None and not state.is_draining and replica not in avoid and state.breaker.allows(now_s)

    def _num_promised(self, keys: Sequence[int], replica: int, step: int, num_held: int) -> int:
        """How many of the keys a replica will hold when the prompts before this one are computed."""
        promises, promised = keys[step - 1 :: step], self._promised
        first = low = num_held // step
        high = len(promises)
        while low < high:
            middle = (low + high) // 2
            if promised.holds(promises[middle], replica):
                low = middle + 1
            else:
                high = middle
        return max(num_held, low * step) if low > first else num_held

    def computing_s(self, replica: int, num_tokens: int) -> float:
        """Return the expected seconds in which a replica computes so many tokens of a prompt."""
        return self.seconds(self._replicas[replica], num_tokens, self._token_s_of_all)

    def seconds(self, state: _Replica, num_tokens: float, of_all: float) -> float:
        """Expected seconds of a prompt's tokens. A replica's own speed counts as far as it is measured."""
        speed, token_s = state.speed, of_all
        if speed.count:
            token_s = (speed.count * speed.token_s + _TRUST * of_all) / (speed.count + _TRUST)
        return num_tokens * token_s * (1 + state.running / self.config.row_scale)

    @property
    def _token_s_of_all(self) -> float:
        return self._speed.token_s if self._speed.seconds > 0 else self.config.token_s

    def _why_nobody(self, now_s: float, avoid: Collection[int]) -> str:
        states = self._replicas.items()
        failing = sum(not state.breaker.allows(now_s) for _, state in states)
        draining = sum(state.is_draining for _, state in states)
        failed = sum(replica in avoid for replica, _ in states)
        return (
            f"none of {len(self._order)} replicas can take the request: {draining} are drained, {failing} are left out "
            f"after failures, {failed} have failed it already; retry later, or start more"
        )

    # --- accounts

    def _state_of(self, placement: Placement) -> _Replica | None:
        """The state of the placement's replica while the placement counts there."""
        state = self._replicas.get(placement.replica)
        return state if state is not None and placement in state.in_flight else None

    def _release(self, placement: Placement, state: _Replica) -> None:
        """The prompt no longer waits."""
        state.waiting -= placement.num_lacking
        for key in placement.promised:
            self._promised.discard(key, placement.replica)

    def _withdraw(self, placement: Placement, state: _Replica) -> None:
        """The request counts no longer."""
        if state.in_flight.pop(placement):
            state.running -= 1
        else:
            self._release(placement, state)

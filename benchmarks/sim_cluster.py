"""A simulated cluster: Ramet's router beside other rules, by tokens prefilled, time to first token, and imbalance.

    python benchmarks/sim_cluster.py                                  64 and 1,000 replicas, a million requests each
    python benchmarks/sim_cluster.py --replicas 64 --requests 100000 --rules ramet,sglang
    python benchmarks/sim_cluster.py --cost                           what one decision costs among 1,000 replicas

The router is the real one, fed by the events of simulated caches; it is not told anything that a replica would not say.
A replica is a Llama 3.1 8B on an H100 as SGLang and vLLM run it (measured: a token of a prompt takes 22.2 us, a decode
step 6 ms and 0.088 ms a row), with KV for 400,000 tokens, least recently used pages evicted first, one prompt computed
at a time in chunks of 512 tokens between decode steps, at most 256 sequences. Times are no measurement.

Work: agents (1,024 tokens of tools of one of many kinds, 512 of memory, 4 to 12 turns of 128 + 128, half a second to a
second between turns), questions about documents (Zipf, 1,024 to 8,192 tokens), chats (1 to 12 turns of 128 + 256,
some seconds between). `floor`: every distinct page computed once, which one engine with boundless memory would do.

Rules, with the defaults of their authors: random; round robin; consistent hashing of the conversation (100 points a
replica); SGLang's gateway `cache_aware` (match above 0.3 of the text: the worker of the match, else the shortest queue;
the shortest queue if they differ by more than 64 and by more than 1.5 times; source: sgl-model-gateway, policies/
cache_aware.rs); Ray Serve's PrefixCacheAffinityRouter (queues differ by more than 10: power of two choices; match of
0.1 and more: the shortest queue among the holders, else the smallest tree; source: ray.llm, prefix_aware_router.py).
Both learn from what they sent, never from evictions. Their trees of text are trees of pages here.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import heapq
import itertools
import json
import random
import resource
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from json_line import commit, print_record

from ramet.runtime.cache.prefix_log import CacheChanges, prefix_keys
from ramet.runtime.cluster.prefix_index import HolderTable
from ramet.runtime.cluster.router import RoutedRequest, Router, RouterConfig

PAGE = 128
KV_TOKENS = 400_000
TOKEN_S, STEP_S, ROW_S = 22.2e-6, 6e-3, 0.088e-3
CHUNK = 512
MAX_RUNNING = 256
RATE = 30.0  # requests a second and replica
KINDS = ("agent", "rag", "chat")


# --- the work


@dataclass(slots=True)
class Session:
    """One agent, question or chat. `keys`: of all its pages so far. `new_pages`: of each turn's input."""

    number: int
    kind: int
    keys: list[int]
    turns: int
    new_pages: int
    out_tokens: int
    gap_s: float
    arrived_s: float = 0.0
    placement: Any = None  # Any: the rule's own

    def grow(self, pages: int, ids: itertools.count[int]) -> None:
        depth = len(self.keys)
        self.keys.extend((next(ids) << 8) | ((depth + 1 + i) & 0xFF) for i in range(pages))


class Work:
    """Sessions in the order of their arrival, from a seed."""

    def __init__(self, num_replicas: int, num_requests: int, rate: float, seed: int) -> None:
        self._rng = random.Random(seed)
        numpy_rng = np.random.default_rng(seed)
        self._ids = itertools.count(1)
        self.num_replicas = num_replicas
        self.num_requests = num_requests
        num_tools, num_docs, num_systems = 4 + num_replicas // 4, 24 * num_replicas, 20
        self._tools = [self._path(8) for _ in range(num_tools)]
        self._docs = [self._path(int(p)) for p in numpy_rng.integers(8, 65, num_docs)]
        self._systems = [self._path(3) for _ in range(num_systems)]
        self._weights = {n: np.cumsum(1 / np.arange(1, n + 1)) for n in (num_tools, num_docs, num_systems)}
        # requests a session: 8 of an agent, 1 of a question, 4 of a chat; a third of the requests each
        self._shares = np.cumsum(np.array([1 / 8, 1.0, 1 / 4]) / (1 / 8 + 1 + 1 / 4)).tolist()
        self._mean_gap_s = 1 / (num_replicas * rate / 3 * (1 / 8 + 1 + 1 / 4))

    def _path(self, pages: int) -> list[int]:
        return [(next(self._ids) << 8) | ((i + 1) & 0xFF) for i in range(pages)]

    def _zipf(self, paths: list[list[int]]) -> list[int]:
        weights = self._weights[len(paths)]
        return paths[bisect_left(weights, self._rng.random() * weights[-1])]  # type: ignore[type-var]

    def sessions(self) -> Iterator[tuple[float, Session]]:
        """Each session with the time of its arrival, without an end."""
        now_s, rng = 0.0, self._rng
        for number in itertools.count():
            now_s += rng.expovariate(1 / self._mean_gap_s)
            kind = bisect_right(self._shares, rng.random())
            if kind == 0:
                session = Session(number, 0, list(self._zipf(self._tools)), rng.randint(4, 12), 1, 128, 0.75)
                session.grow(4, self._ids)
            elif kind == 1:
                session = Session(number, 1, list(self._zipf(self._docs)), 1, 1, 128, 0.0)
            else:
                turns = min(1 + int(rng.expovariate(1 / 3.5)), 12)
                session = Session(number, 2, list(self._zipf(self._systems)), turns, 1, 256, 6.0)
            yield now_s, session

    def next_turn(self, session: Session) -> None:
        session.grow(session.new_pages, self._ids)

    def answer(self, session: Session) -> None:
        session.grow(session.out_tokens // PAGE, self._ids)

    def gap_s(self, session: Session) -> float:
        return session.gap_s * (0.5 + self._rng.expovariate(2.0))


# --- replicas


@dataclass(slots=True)
class Replica:
    """A simulated engine. `cache`: keys by last use, the least recently used first, a prefix after what follows it."""

    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    waiting: deque[Session] = field(default_factory=deque)
    running: int = 0
    is_busy: bool = False
    busy_s: float = 0.0
    prefilled: int = 0
    added: list[int] = field(default_factory=list)  # since the last changes
    removed: list[int] = field(default_factory=list)
    number: int = 0

    def num_held(self, keys: Sequence[int]) -> int:
        return bisect_right(range(len(keys)), False, key=lambda i: keys[i] not in self.cache)

    def use(self, keys: Sequence[int]) -> None:
        """Cache a path, and evict what was used longest ago."""
        cache = self.cache
        for key in reversed(keys):
            if key in cache:
                cache.move_to_end(key)
            else:
                cache[key] = None
                self.added.append(key)
        while len(cache) > KV_TOKENS // PAGE:
            self.removed.append(cache.popitem(last=False)[0])

    def changes(self) -> CacheChanges:
        self.number += 1
        added, self.added = self.added, []
        removed, self.removed = self.removed, []
        if removed and added:  # a list that names a key twice would depend on the order
            both = set(added) & set(removed)
            added = [key for key in added if key not in both]
            removed = [key for key in removed if key not in both or key in self.cache]
        return CacheChanges(self.number, added, removed)


# --- rules


class Rule(Protocol):
    def place(self, session: Session, now_s: float) -> int: ...
    def begun(self, session: Session, replica: int, now_s: float) -> None: ...
    def finished(self, session: Session, replica: int) -> None: ...
    def told(self, replica: int, changes: CacheChanges) -> None: ...


class Plain:
    """What other rules have in common: they count requests in flight, and hear nothing of caches."""

    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self.random = random.Random(1)
        self.loads = [0] * num_replicas
        self._at: list[set[int]] = [set(range(num_replicas))]  # replicas by load
        self.low = self.high = 0

    def place(self, session: Session, now_s: float) -> int:
        replica = self.choose(session)
        self._move(replica, 1)
        return replica

    def choose(self, session: Session) -> int:
        raise NotImplementedError("a rule chooses")  # each rule below defines it; begun and told may stay empty

    def begun(self, session: Session, replica: int, now_s: float) -> None:
        pass

    def finished(self, session: Session, replica: int) -> None:
        self._move(replica, -1)

    def told(self, replica: int, changes: CacheChanges) -> None:
        pass

    def _move(self, replica: int, by: int) -> None:
        load = self.loads[replica]
        self._at[load].discard(replica)
        load += by
        self.loads[replica] = load
        if load == len(self._at):
            self._at.append(set())
        self._at[load].add(replica)
        self.low = min(self.low, load)
        while not self._at[self.low]:
            self.low += 1
        self.high = max(self.high, load)
        while not self._at[self.high]:
            self.high -= 1

    def shortest(self) -> int:
        return next(iter(self._at[self.low]))

    def of_two(self) -> int:
        one, other = self.random.randrange(self.num_replicas), self.random.randrange(self.num_replicas)
        return one if self.loads[one] <= self.loads[other] else other


class Random(Plain):
    def choose(self, session: Session) -> int:
        return self.random.randrange(self.num_replicas)


class RoundRobin(Plain):
    number = -1

    def choose(self, session: Session) -> int:
        self.number += 1
        return self.number % self.num_replicas


class ConsistentHash(Plain):
    """The conversation decides."""

    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas)
        points = [(_point(f"{r}-{i}"), r) for r in range(num_replicas) for i in range(100)]
        self._ring, self._owners = zip(*sorted(points), strict=True)

    def choose(self, session: Session) -> int:
        place = bisect_left(self._ring, _point(str(session.number)))
        return int(self._owners[place % len(self._owners)])


def _point(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class SglangCacheAware(Plain):
    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas)
        self._tree: dict[int, int] = {}  # page of text -> the worker that got it last

    def choose(self, session: Session) -> int:
        keys, tree = session.keys, self._tree
        if self.high - self.low > 64 and self.high > 1.5 * self.low:
            replica = self.shortest()
        else:
            num_same = bisect_right(range(len(keys)), False, key=lambda i: keys[i] not in tree)
            replica = tree[keys[num_same - 1]] if num_same > 0.3 * len(keys) else self.shortest()
        for key in keys:
            tree[key] = replica
        return replica


class RayPrefixAware(Plain):
    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas)
        self._tree = HolderTable()
        self._sizes = np.zeros(num_replicas)

    def choose(self, session: Session) -> int:
        keys, tree = session.keys, self._tree
        num_same = bisect_right(range(len(keys)), False, key=lambda i: not tree.of(keys[i]))
        if self.high - self.low > 10:
            replica = self.of_two()
        elif num_same >= 0.1 * len(keys):
            replica = min(tree.of(keys[num_same - 1]), key=self.loads.__getitem__)
        else:
            replica = int(self._sizes.argmin())
        for key in keys:
            if not tree.holds(key, replica):
                tree.add(key, replica)
                self._sizes[replica] += 1
        return replica


class Ramet:
    def __init__(self, num_replicas: int, **config: Any) -> None:  # Any: fields of RouterConfig
        self.router = Router(RouterConfig(page_size=PAGE, **config))
        for replica in range(num_replicas):
            self.router.add(replica)
            self.router.apply(replica, CacheChanges(0, is_whole=True))

    def place(self, session: Session, now_s: float) -> int:
        request = RoutedRequest(len(session.keys) * PAGE + 1, session.keys.copy(), str(session.number))
        placement = session.placement = self.router.place(request, now_s)
        return int(placement.replica)

    def begun(self, session: Session, replica: int, now_s: float) -> None:
        self.router.begun(session.placement, now_s)

    def finished(self, session: Session, replica: int) -> None:
        self.router.finished(session.placement)

    def told(self, replica: int, changes: CacheChanges) -> None:
        assert self.router.apply(replica, changes)


RULES: dict[str, Any] = {  # classes that take the number of replicas
    "random": Random,
    "round_robin": RoundRobin,
    "hashing": ConsistentHash,
    "sglang": SglangCacheAware,
    "ray": RayPrefixAware,
    "ramet": Ramet,
}

# --- the simulation

_ARRIVE, _TURN, _BEGUN, _END = range(4)


def simulate(rule: Rule, work: Work) -> dict[str, Any]:
    """Run all requests of `work` under one rule."""
    replicas = [Replica() for _ in range(work.num_replicas)]
    events: list[tuple[float, int, int, Any, int]] = []  # time, order, kind, session, replica
    order = itertools.count()
    arrivals: Iterator[tuple[float, Session]] = work.sessions()
    first_s, kinds = array("d"), array("b")
    num_placed = prompt_tokens = 0
    gc.disable()  # nothing here is in a circle, and a million sessions make collections slow
    start_s, place_s = time.thread_time(), 0.0

    def push(at_s: float, kind: int, session: Session, replica: int = -1) -> None:
        heapq.heappush(events, (at_s, next(order), kind, session, replica))

    def begin_next(now_s: float, number: int) -> None:
        replica = replicas[number]
        if replica.is_busy or not replica.waiting or replica.running >= MAX_RUNNING:
            return
        session = replica.waiting.popleft()
        held = replica.num_held(session.keys)
        lacking = (len(session.keys) - held) * PAGE + 1
        chunks = -(-lacking // CHUNK)
        seconds = lacking * TOKEN_S + chunks * replica.running * ROW_S + STEP_S
        replica.is_busy = True
        replica.prefilled += lacking - 1
        replica.busy_s += seconds
        push(now_s + seconds, _BEGUN, session, number)

    at_s, session = next(arrivals)
    push(at_s, _ARRIVE, session)
    now_s = 0.0
    while events:
        now_s, _, kind, session, number = heapq.heappop(events)
        if kind <= _TURN:
            if kind == _ARRIVE and num_placed < work.num_requests:
                at_s, following = next(arrivals)
                push(at_s, _ARRIVE, following)
            if num_placed >= work.num_requests:
                continue
            work.next_turn(session)
            num_placed += 1
            prompt_tokens += len(session.keys) * PAGE
            session.arrived_s = now_s
            before_s = time.thread_time()
            number = rule.place(session, now_s)
            place_s += time.thread_time() - before_s
            replicas[number].waiting.append(session)
            begin_next(now_s, number)
        elif kind == _BEGUN:
            replica = replicas[number]
            first_s.append(now_s - session.arrived_s)
            kinds.append(session.kind)
            replica.is_busy = False
            replica.running += 1
            replica.use(session.keys)
            rule.told(number, replica.changes())
            rule.begun(session, number, now_s)
            share = min(replica.busy_s / max(now_s, 1.0), 1.0)
            step_s = STEP_S + ROW_S * replica.running + share * CHUNK * TOKEN_S / 2
            push(now_s + session.out_tokens * step_s, _END, session, number)
            begin_next(now_s, number)
        else:
            replica = replicas[number]
            replica.running -= 1
            work.answer(session)
            replica.use(session.keys)
            rule.told(number, replica.changes())
            rule.finished(session, number)
            session.turns -= 1
            if session.turns > 0:
                push(now_s + work.gap_s(session), _TURN, session)
            begin_next(now_s, number)
    times = np.frombuffer(first_s)
    by_kind = np.frombuffer(kinds, dtype=np.int8)
    prefilled = np.array([replica.prefilled for replica in replicas])
    busy = np.array([replica.busy_s for replica in replicas])
    return {
        "requests": num_placed,
        "prefilled_tokens": int(prefilled.sum()),
        "hit_rate": round(1 - float(prefilled.sum()) / prompt_tokens, 4),
        "ttft_p50_ms": round(1e3 * float(np.percentile(times, 50)), 1),
        "ttft_p99_ms": round(1e3 * float(np.percentile(times, 99)), 1),
        **{f"{name}_p99_ms": round(1e3 * float(np.percentile(times[by_kind == i], 99)), 1)
           for i, name in enumerate(KINDS) if (by_kind == i).any()},
        "imbalance": round(float(busy.max() / busy.mean()), 3),
        "busy": round(float(busy.mean() / now_s), 3),
        "simulated_s": round(now_s, 1),
        "cpu_s": round(time.thread_time() - start_s, 1),
        "place_us": round(1e6 * place_s / num_placed, 1),
    }  # fmt: skip


class _Everything:
    """The floor: one engine that forgets nothing. It counts pages that nobody had before."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.tokens = 0

    def count(self, session: Session) -> None:
        held = bisect_right(range(len(session.keys)), False, key=lambda i: session.keys[i] not in self.seen)
        self.tokens += (len(session.keys) - held) * PAGE
        self.seen.update(session.keys[held:])


class Counted:
    """A rule, with the floor counted beside it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.all = _Everything()

    def place(self, session: Session, now_s: float) -> int:
        self.all.count(session)
        return self.rule.place(session, now_s)

    def begun(self, session: Session, replica: int, now_s: float) -> None:
        self.rule.begun(session, replica, now_s)

    def finished(self, session: Session, replica: int) -> None:
        self.all.seen.update(session.keys)
        self.rule.finished(session, replica)

    def told(self, replica: int, changes: CacheChanges) -> None:
        self.rule.told(replica, changes)


def decision_cost(num_replicas: int, num_requests: int) -> dict[str, Any]:
    """What a request of 4,224 tokens costs the router, with pages of 16, and what it remembers of full caches."""
    rng = np.random.default_rng(0)
    config = RouterConfig()
    router = Router(config)
    tools = rng.integers(0, 100_000, 1024).astype(np.int32)
    shared = prefix_keys(tools, 16)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = itertools.count(1)
    # By replica: keys of its first content that are still there, the longest prefix last; and the keys that came since.
    old: list[array[int]] = []
    came_later = [set(shared) for _ in range(num_replicas)]
    for replica in range(num_replicas):
        own = [(next(number) << 8) | (i & 0xFF) for i in range(65, KV_TOKENS // 16)]
        router.add(replica, KV_TOKENS // 16)
        old.append(array("Q", own[-4096:]))
        router.apply(replica, CacheChanges(1, shared + own, is_whole=True))
    held_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    full = {"max_keys": config.max_keys, "keys": router.index.num_keys, "grain_pages": router.index.grain}
    docs = [rng.integers(0, 100_000, 3072).astype(np.int32) for _ in range(200)]
    numbers = [1] * num_replicas
    costs: dict[str, list[float]] = {"keys": [], "place": [], "begun_and_finished": [], "apply": []}
    gc.disable()
    for i in range(num_requests):
        prompt = np.concatenate([tools, docs[int(200 * rng.random() ** 3)], rng.integers(0, 9, 128).astype(np.int32)])
        whole_keys, every = prefix_keys(prompt, 16), router.index.grain  # an engine knows these; that work is its own
        at = [time.thread_time()]
        keys = prefix_keys(prompt, 16, every=every)
        at.append(time.thread_time())
        placement = router.place(RoutedRequest(len(prompt), keys, f"g{i % 5000}", every), i * 1e-3)
        at.append(time.thread_time())
        router.begun(placement, i * 1e-3 + 0.05)
        router.finished(placement)
        at.append(time.thread_time())
        numbers[placement.replica] += 1
        mine, full_of = came_later[placement.replica], old[placement.replica]
        came = [key for key in whole_keys if key not in mine]
        mine.update(came)
        went = [full_of.pop() for _ in came if full_of]  # it is full: as many pages go
        changes = CacheChanges(numbers[placement.replica], came, went)
        at.append(time.thread_time())
        router.apply(placement.replica, changes)
        at.append(time.thread_time())
        for name, start, stop in zip(costs, (0, 1, 2, 4), (1, 2, 3, 5), strict=True):
            costs[name].append(at[stop] - at[start])
    parts = {f"{name}_us": round(1e6 * float(np.median(values)), 1) for name, values in costs.items()}
    whole = sum(np.array(values) for values in costs.values())
    cores = num_replicas * RATE * float(np.mean(whole))
    return {
        **parts,
        "request_us_p50": round(1e6 * float(np.percentile(whole, 50)), 1),
        "request_us_p99": round(1e6 * float(np.percentile(whole, 99)), 1),
        "cores_at_rate": round(cores, 3),  # of the process with the router, if all replicas get RATE requests a second
        "index": full,
        "index_mb": round(router.index.num_bytes() / 1e6, 1),
        "process_mb": round(held_kb / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=lambda s: [int(n) for n in s.split(",")], default=[64, 1000])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rules", type=lambda s: s.split(","), default=list(RULES))
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second and replica")
    parser.add_argument("--set", type=json.loads, default={}, help="JSON: fields of RouterConfig")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="measure one decision instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "sim_cluster", "commit": commit(), "rate": arguments.rate}
    if arguments.cost:
        for count in arguments.replicas:
            record[f"cost_{count}"] = decision_cost(count, 20_000)
            print(count, "replicas:", record[f"cost_{count}"], flush=True)
        print_record(record, arguments.out)
        return
    for count in arguments.replicas:
        rows: dict[str, dict[str, Any]] = {}
        for name in arguments.rules:
            rule: Rule = RULES[name](count, **(arguments.set if name == "ramet" else {}))
            counted = Counted(rule)
            row = rows[name] = simulate(counted, Work(count, arguments.requests, arguments.rate, arguments.seed))
            row["over_floor"] = round(row["prefilled_tokens"] / counted.all.tokens, 3)
            if name == "ramet":
                row["index_keys"] = rule.router.index.num_keys  # type: ignore[attr-defined]
                row["index_mb"] = round(rule.router.index.num_bytes() / 1e6, 1)  # type: ignore[attr-defined]
            print(f"{count:5} {name:12}", "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        others = [row["prefilled_tokens"] for name, row in rows.items() if name != "ramet"]
        if others and "ramet" in rows:
            rows["ramet"]["fewer_than_best"] = round(min(others) / rows["ramet"]["prefilled_tokens"], 3)
            print(f"{count:5} ramet prefills {rows['ramet']['fewer_than_best']} times fewer tokens than the best other")
        record[f"replicas_{count}"] = rows
    print_record(record, arguments.out)


if __name__ == "__main__":
    main()

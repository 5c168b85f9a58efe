"""What the program's knowledge of its next reads is worth to the cache: against LRU, and against knowing the future.

    python benchmarks/bench_eviction.py [--programs 24] [--out benchmarks/results/eviction.jsonl]

Programs whose branches wait for one another run together on the scripted engine, and every request is noted with what
the executor says of the cache meanwhile (`set_next_use`, `mark_dead`). The same requests are then replayed in their
order, as if each ended at once, into the runtime's radix cache with less and less memory:

    lru        the least recently used goes first, nothing is said
    program    what the engine does: dead, then the farthest next use that programs know of, then LRU
    belady     the same order with every next use known from the recording: what no policy without it can beat by much

Counted are prompt tokens that had to be computed, so times and the machine don't matter. `floor`: with memory for all.
"""

from __future__ import annotations

import argparse
import bisect
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet import Function, State, function, gen
from ramet.lang.backends.in_process import EngineBackend
from ramet.runtime.cache.eviction import lru_rank, next_use_rank
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.handle import RequestHandle
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import RequestOutput, TokenIds

PAGE_SIZE = 16
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the pages that all texts together would take


def rules(program: int, who: object, size: int) -> str:
    """A beginning that no other program, or branch, has."""
    return f"{who} of program {program}. " * size


@function(max_tokens=48)
def debate(s: State, program: int) -> None:
    """Four agents with instructions of their own speak in turns, each knows what the one before it said."""
    agents = s.fork(4)
    agents += lambda i: rules(program, f"Agent {i}", 30)
    said: Any = "Begin."
    for _ in range(4):
        for agent in agents:
            agent += f"\nHeard: {said}\nSay:" + gen("line")
            said = agent["line"]


@function(max_tokens=48)
def pipeline(s: State, program: int) -> None:
    """A plan over a document waits for six experts, one after the other, and is then written."""
    plan, *experts = s.fork(7)
    plan += rules(program, "The document", 60) + gen("plan")
    found: Any = plan["plan"]
    for index, expert in enumerate(experts):
        expert += rules(program, f"Expert {index}", 20) + f"\n{found}\n" + gen("found")
        found = expert["found"]
    plan += f"\nThe experts: {found}\nAll in all:" + gen("end")


@function(max_tokens=48)
def summary(s: State, program: int) -> None:
    """Eight pieces at once, then one text over all."""
    s += rules(program, "The editor", 30)
    parts = s.map(range(8), lambda branch, i: branch.append(rules(program, f"Piece {i}", 10) + gen("part")))
    parts.join()
    s += "".join(f"{part}\n" for part in s["part"]) + gen("all")


PROGRAMS: Sequence[Function] = (debate, pipeline, summary)


@dataclass(slots=True)
class Request:
    """Its prompt, and, once it has ended, the prompt with what was written."""

    prompt: TokenIds
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Hint:
    """What an executor said. `next_use` None: that `tokens[num_live:]` are dead."""

    tokens: TokenIds
    next_use: float | None
    num_live: int = 0


class Recorder(ScriptedEngine):
    """Notes requests as they are made, and hints, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Request | Hint] = []

    def submit(
        self, prompt: str | Sequence[int], *args: Any, on_output: Callable[[RequestOutput], None], **options: Any
    ) -> RequestHandle:
        written: list[int] = []
        request = Request(ids(prompt), ids(prompt))
        self.events.append(request)

        def take(output: RequestOutput) -> None:
            written.extend(output.token_ids)
            if output.finish_reason is not None:
                request.tokens = ids([*prompt, *written[:-1]])
            on_output(output)

        return super().submit(prompt, *args, on_output=take, **options)

    def set_next_use(self, tokens: list[int], next_use: float, cache_salt: str = "") -> None:
        self.events.append(Hint(ids(tokens), next_use))

    def mark_dead(self, tokens: list[int], cache_salt: str = "", num_live: int = 0) -> None:
        self.events.append(Hint(ids(tokens), None, num_live))


def ids(tokens: Any) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def record(num_programs: int) -> list[Request | Hint]:
    """Run the programs together."""
    with Recorder() as engine:
        backend = EngineBackend(engine)
        states = [PROGRAMS[i % len(PROGRAMS)].compile().start(program=i, backend=backend) for i in range(num_programs)]
        for state in states:
            error = state.error()
            if error is not None:
                raise error
        return engine.events


class Future:
    """When each beginning of each recorded text is read next."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._reads: dict[int, list[int]] = {}
        for time, request in enumerate(requests):
            for key in _keys(request.prompt):
                self._reads.setdefault(key, []).append(time)

    def tell(self, cache: RadixCache, tokens: TokenIds, now: int) -> None:
        """Say it to the cache for all of a path: the deepest first, whose beginnings are read sooner."""
        known = math.nan
        for index, key in reversed(list(enumerate(_keys(tokens)))):
            reads = self._reads.get(key, [])
            later = bisect.bisect_right(reads, now)
            when = float(reads[later]) if later < len(reads) else math.inf
            if when != known:
                cache.set_next_use(tokens[: (index + 1) * PAGE_SIZE], when)
                known = when


def _keys(tokens: TokenIds) -> list[int]:
    """One for each beginning of whole pages."""
    keys, key = [], 0
    for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        key = hash((key, tokens[start : start + PAGE_SIZE].tobytes()))
        keys.append(key)
    return keys


def replay(events: Sequence[Request | Hint], policy: str, num_pages: int) -> int:
    """How many prompt tokens are computed."""
    requests = [event for event in events if isinstance(event, Request)]
    future = Future(requests) if policy == "belady" else None
    cache = RadixCache(PagePool(num_pages + 1, PAGE_SIZE), lru_rank if policy == "lru" else next_use_rank)
    computed = time = 0
    for event in events:
        if isinstance(event, Request):
            computed += _serve(cache, event)
            if future is not None:
                future.tell(cache, event.tokens, time)
            time += 1
        elif policy == "program" and event.next_use is None:
            cache.mark_dead(event.tokens, num_live=event.num_live)
        elif policy == "program" and event.next_use is not None:
            cache.set_next_use(event.tokens, event.next_use)
    return computed


def _serve(cache: RadixCache, request: Request) -> int:
    match = cache.match(request.prompt)
    cache.lock(match.node)
    rest = request.tokens[match.num_tokens :]
    page_ids = cache.allocate(-(-len(rest) // PAGE_SIZE))
    assert page_ids is not None, "the smallest cache must hold the longest text"
    _, duplicates = cache.insert(match.node, rest, page_ids)
    cache.pool.free(duplicates)
    cache.unlock(match.node)
    return len(request.prompt) - min(match.num_tokens + match.num_tail_tokens, len(request.prompt) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    events = record(args.programs)
    requests = [event for event in events if isinstance(event, Request)]
    longest = max(-(-len(request.tokens) // PAGE_SIZE) for request in requests)
    all_pages = sum(-(-len(request.tokens) // PAGE_SIZE) for request in requests)
    floor = replay(events, "lru", all_pages)
    distinct = len({key for request in requests for key in _keys(request.tokens)})
    table = Table(title=f"prompt tokens computed, {args.programs} programs, {len(requests)} requests; floor {floor:,}")
    for column in ("pages", "of all", "lru", "program", "belady", "of what belady saves"):
        table.add_column(column, justify="right")
    rows = []
    for share in SHARES:
        num_pages = max(int(distinct * share), longest)
        found = {policy: replay(events, policy, num_pages) for policy in ("lru", "program", "belady")}
        gap = found["lru"] - found["belady"]
        part = (found["lru"] - found["program"]) / gap if gap else 1.0
        rows.append({"pages": num_pages, "share": share, **found, "part_of_gap": round(part, 3)})
        table.add_row(f"{num_pages:,}", f"{share:.0%}", *(f"{value:,}" for value in found.values()), f"{part:.0%}")
    Console().print(table)
    versions = {"commit": commit(), "python": platform.python_version()}
    config = {"programs": args.programs, "requests": len(requests), "floor": floor, "page_size": PAGE_SIZE}
    print_record({"benchmark": "eviction", **versions, **config, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

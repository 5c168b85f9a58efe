"""Time the scheduler and the radix cache alone: host microseconds of a step, of a match and of an insertion.

    python benchmarks/bench_scheduler.py [--steps 400] [--prompt 8192]

The floor is a step of the model: a decode step of an 8B model on one H100 takes about 5 ms; the host's share of it must
stay well under 1 ms at 256 running sequences.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from json_line import commit

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.types import Batch, Request, RowOutput, SamplingParams

PAGE_SIZE = 16


def percentiles(samples_us: list[float]) -> dict[str, float]:
    p20, p50, p80, p99 = np.percentile(samples_us, [20, 50, 80, 99])
    return {name: round(float(v), 1) for name, v in (("p20", p20), ("p50", p50), ("p80", p80), ("p99", p99))}


def make(num_pages: int, max_running: int, context_length: int = 16_384) -> Scheduler:
    pool = PagePool(num_pages, PAGE_SIZE)
    config = SchedulerConfig(context_length, max_running, max_num_tokens_per_step=max(2048, 2 * max_running))
    return Scheduler(config, pool, RadixCache(pool))


def make_request(index: int, prompt: np.ndarray, max_tokens: int) -> Request:
    return Request(f"r{index}", prompt, SamplingParams(), max_tokens, stop_ids=frozenset((1, 2)))


def bench_decode(num_running: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Steady decode with overlap: step t + 1 is scheduled before step t is read."""
    scheduler = make(num_running * 80 + 64, num_running)
    rng = np.random.default_rng(0)
    for index in range(num_running):
        prompt = rng.integers(10, 30_000, 60 + index % PAGE_SIZE, dtype=np.int32)
        scheduler.add(make_request(index, prompt, num_steps + 200))
    outputs = [RowOutput((7,))] * num_running
    launched: Batch | None = None
    while launched is None or launched.num_decode < num_running:
        batch = scheduler.schedule()
        assert batch is not None
        if launched is not None:
            scheduler.finish_step(
                launched.items, [RowOutput((7,)) if i.num_samples else RowOutput() for i in launched.items]
            )
        launched = batch
    schedule_us, finish_us, total_us = [], [], []
    gc.collect()
    for step in range(num_steps):
        t0 = time.perf_counter()
        batch = scheduler.schedule()
        t1 = time.perf_counter()
        scheduler.finish_step(launched.items, outputs)
        t2 = time.perf_counter()
        assert batch is not None
        assert batch.num_decode == num_running
        launched = batch
        if step >= num_steps // 10:
            schedule_us.append((t1 - t0) * 1e6)
            finish_us.append((t2 - t1) * 1e6)
            total_us.append((t2 - t0) * 1e6)
    return {
        "schedule": percentiles(schedule_us),
        "finish_step": percentiles(finish_us),
        "both": percentiles(total_us),
    }


def bench_churn(num_running: int, num_steps: int) -> dict[str, float]:
    """Steps where sequences end and new ones begin: 64 new tokens on one shared prefix of 1,000, 64 to generate."""
    scheduler = make(200_000, num_running)
    rng = np.random.default_rng(0)
    prefix = rng.integers(10, 30_000, 1_000, dtype=np.int32)
    num_added = 0

    def fill() -> None:
        nonlocal num_added
        while scheduler.num_waiting < 64:
            prompt = np.concatenate([prefix, rng.integers(10, 30_000, 64, dtype=np.int32)])
            scheduler.add(make_request(num_added, prompt, 64))
            num_added += 1

    total_us = []
    for step in range(num_steps):
        fill()
        t0 = time.perf_counter()
        batch = scheduler.schedule()
        t1 = time.perf_counter()
        assert batch is not None
        outputs = [RowOutput((7,)) if item.num_samples else RowOutput() for item in batch.items]
        t2 = time.perf_counter()
        scheduler.finish_step(batch.items, outputs)
        if step >= num_steps // 4:
            total_us.append((t1 - t0 + time.perf_counter() - t2) * 1e6)
    return percentiles(total_us)


def timed(run: Callable[[], object], repeat: int) -> dict[str, float]:
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6)
    return percentiles(samples)


def bench_cache(num_tokens: int, num_siblings: int) -> dict[str, dict[str, float]]:
    """Match and insert prompts of `num_tokens`, alone and where `num_siblings` share all but the last page."""
    pool = PagePool(2 * num_siblings + 400 * (num_tokens // PAGE_SIZE + 1), PAGE_SIZE)
    cache = RadixCache(pool)
    rng = np.random.default_rng(0)

    def put(tokens: np.ndarray) -> None:
        match = cache.match(tokens)
        cache.lock(match.node)
        page_ids = cache.allocate(-(-(len(tokens) - match.num_tokens) // PAGE_SIZE))
        assert page_ids is not None
        pool.free(cache.insert(match.node, tokens[match.num_tokens :], page_ids)[1])
        cache.unlock(match.node)

    prompts = [rng.integers(10, 30_000, num_tokens, dtype=np.int32) for _ in range(200)]
    todo = iter(prompts)
    results = {"insert_new": timed(lambda: put(next(todo)), 200)}
    todo = iter(prompts)
    results["match_cached"] = timed(lambda: cache.match(next(todo)), 200)
    document = prompts[0]
    for index in range(num_siblings):
        put(np.concatenate([document, np.full(PAGE_SIZE, 50_000 + index, dtype=np.int32)]))
    question = np.concatenate([document, np.full(PAGE_SIZE, 50_000 + num_siblings // 2, dtype=np.int32)])
    results[f"match_among_{num_siblings}"] = timed(lambda: cache.match(question), 200)
    pool.allocate(pool.num_free)
    results["evict_page"] = timed(lambda: cache.evict(1), num_siblings // 2)
    return results


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--siblings", type=int, default=10_000)
    arguments = parser.parse_args()
    decode = {n: bench_decode(n, arguments.steps) for n in (1, 64, 256, 1024)}
    churn = {n: bench_churn(n, arguments.steps) for n in (64, 256)}
    cache = bench_cache(arguments.prompt, arguments.siblings)
    print(f"{'host µs':38}{'p20':>9}{'p50':>9}{'p80':>9}{'p99':>9}")
    rows = [(f"decode, {n} running: {part}", values) for n, parts in decode.items() for part, values in parts.items()]
    rows += [(f"ends and begins, {n} running", values) for n, values in churn.items()]
    rows += [(f"cache, {arguments.prompt} tokens: {name}", values) for name, values in cache.items()]
    for name, values in rows:
        print(f"{name:38}" + "".join(f"{values[p]:9.1f}" for p in ("p20", "p50", "p80", "p99")))
    print(
        json.dumps(
            {
                "bench": "scheduler",
                "commit": commit(),
                "device": cpu_name(),
                "python": platform.python_version(),
                "numpy": np.__version__,
                "config": vars(arguments),
                "decode_us": decode,
                "churn_us": churn,
                "cache_us": cache,
            }
        )
    )


if __name__ == "__main__":
    main()

"""What a live branch costs: memory and time of ten thousand branches in one process, without a model.

    python benchmarks/bench_branches.py [--branches 10000] [--out benchmarks/results/branches.jsonl]

Recorded: the branches exist in the program, nothing is submitted. Live: all of them wait for the scripted engine.
Memory is what Python allocated (tracemalloc), so that the interpreter and its libraries do not count.
"""

from __future__ import annotations

import argparse
import gc
import platform
import threading
import time
import tracemalloc
from pathlib import Path

from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet import MockBackend, State, function, gen


@function
def fan_out(s: State, branches: int) -> list[State]:
    s += "One prefix for all. "
    found = s.fork(branches)
    found += lambda i: f"Branch {i}: "
    found += gen("x", max_tokens=4)
    return list(found)


def allocated() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def measure(num: int) -> dict[str, float]:
    fan_out.trace(branches=10)  # warm-up: imports, caches
    start_s = time.perf_counter()
    trace = fan_out.trace(branches=num)
    record_s = time.perf_counter() - start_s
    del trace
    tracemalloc.start()
    before = allocated()
    compiled = fan_out.compile(branches=num)  # keeps the branches of its trace
    recorded = allocated() - before
    del compiled
    backend = MockBackend(latency_s=3600)  # nothing ends: every branch stays alive
    threads = threading.active_count()
    first = fan_out.stream(branches=10, backend=backend)  # what the backend has once, such as its vocabulary
    while backend.engine.num_waiting < 10:
        time.sleep(0.05)
    before = allocated()
    stream = fan_out.stream(branches=num, backend=backend)
    while backend.engine.num_waiting < num + 10:
        time.sleep(0.05)
    live = allocated() - before
    threads = threading.active_count() - threads
    stream.state.cancel()
    first.state.cancel()
    backend.engine.shutdown()
    tracemalloc.stop()
    backend = MockBackend()
    start_s = time.perf_counter()
    state = fan_out.run(branches=num, backend=backend)
    run_s = time.perf_counter() - start_s
    assert state.error() is None
    backend.engine.shutdown()
    return {
        "recorded_bytes_per_branch": round(recorded / num),
        "live_bytes_per_branch": round(live / num),
        "threads_while_live": threads,
        "record_us_per_branch": round(1e6 * record_s / num, 1),
        "run_us_per_branch": round(1e6 * run_s / num, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.branches)
    table = Table(title=f"{args.branches:,} branches in one process")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)
    print_record(
        {
            "benchmark": "branches",
            "commit": commit(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "branches": args.branches,
            **found,
        },
        args.out,
    )


if __name__ == "__main__":
    main()

"""Serving under load: time to first token, gaps between tokens, throughput and hit rate, over HTTP and in process.

    python benchmarks/bench_serving.py                                    closed loop, concurrency 1, 10, 50, 100
    python benchmarks/bench_serving.py --in-process --concurrency 50 --rounds 2
    python benchmarks/bench_serving.py --watched --concurrency 50 --rounds 4   what an open explorer costs
    python benchmarks/bench_serving.py --rate 4 --workloads rag,agentic   open loop: so many chains a second
    python benchmarks/bench_serving.py --url http://127.0.0.1:8000 --scale full

Without --url a server with SmolLM2-135M-Instruct is started for the run. The four workloads are those of workloads.py;
`--scale cpu` divides their lengths by eight. The cache is empty before each row (where the server can be told so).
`--in-process` runs the same load on an engine of this process, in turns with the server, and compares: what HTTP costs.
`--watched` runs it again, in turns, while another process reads the stream of the server's `/ui`, as an open page does.
The engine's threads, the server and this client share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: the server's engine waits so, too

import httpx
import numpy as np
import torch
from bench_ttft import served
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table
from serving_load import EngineTarget, HttpTarget, Sample, Target, closed_loop, open_loop
from workloads import MAKERS, Chain, Workload, eighth

from ramet.runtime.engine.engine import Engine

Row = dict[str, Any]  # Any: JSON
NAMES = ("unique", "rag", "multiturn", "agentic")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a load runs. `flush`: empty its cache; `pids`: processes whose CPU time counts, by name.

    `watched`: the server's address, where a page of its explorer is open during the load.
    """

    name: str
    target: Target
    flush: Callable[[], None]
    pids: dict[str, int]
    watched: str | None = None


WATCH = """
import sys, httpx
with httpx.stream("GET", sys.argv[1] + "/ui/events", timeout=None, trust_env=False) as answer:
    answer.raise_for_status()
    for chunk in answer.iter_raw():
        print(len(chunk), flush=True)
"""


@contextlib.contextmanager
def watching(url: str | None) -> Iterator[None]:
    """Read the explorer's stream in a process of its own, from its first frame on."""
    if url is None:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", WATCH, url], stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout is not None
            if not reader.stdout.readline():
                raise SystemExit(f"{url}/ui/events has no stream; was the server started with --no-ui?")
            threading.Thread(target=reader.stdout.read, daemon=True).start()
            yield
            assert reader.poll() is None, "the explorer's stream ended before the load did"
        finally:
            reader.terminate()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def summary(samples: Sequence[Sample], wall_s: float) -> Row:
    """The figures of a row; times in ms."""

    def percentile(values: list[float], q: float) -> float | None:
        return round(float(np.percentile(values, q)) * 1e3, 1) if values else None

    good = [sample for sample in samples if sample.error is None]
    errors = [sample.error for sample in samples if sample.error is not None]
    first = [sample.first_token_s for sample in good if sample.first_token_s is not None]
    gaps = [gap for sample in good for gap in sample.gaps_s]
    totals = [sample.total_s for sample in good]
    num_prompt = sum(sample.num_prompt for sample in good)
    return {
        "requests": len(good),
        "errors": len(errors),
        **({"first_error": errors[0]} if errors else {}),
        "output_tokens": sum(sample.num_output for sample in good),
        "prompt_tokens": num_prompt,
        "tok_s": round(sum(sample.num_output for sample in good) / wall_s, 1),
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p95_ms": percentile(first, 95),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p95_ms": percentile(gaps, 95),
        "e2e_p50_ms": percentile(totals, 50),
        "hit_rate": round(sum(sample.num_cached for sample in good) / max(num_prompt, 1), 3),
        "wall_s": round(wall_s, 2),
    }


async def run_row(
    place: Place, workload: str, load: str, run: Callable[[Target], Awaitable[tuple[list[Sample], float]]]
) -> Row:
    place.flush()
    before = {name: cpu_s(pid) for name, pid in place.pids.items()}
    with watching(place.watched):
        samples, wall_s = await run(place.target)
    spent = {f"cpu_{name}_s": round(cpu_s(pid) - before[name], 2) for name, pid in place.pids.items()}
    return {"where": place.name, "workload": workload, "load": load, **summary(samples, wall_s), **spent}


def make(workload: str, scale: str, n: int, seed: int, high: int) -> list[Chain]:
    made: Workload = eighth(workload, n, seed, high) if scale == "cpu" else MAKERS[workload](n, seed, high)
    return made.chains


def num_chains(concurrency: int) -> int:
    """Enough that a row has a middle, few enough for a CPU."""
    return 6 if concurrency == 1 else max(concurrency, min(2 * concurrency, 75))


async def run_all(arguments: argparse.Namespace, places: Sequence[Place], high: int) -> list[Row]:
    rows: list[Row] = []
    table_console = Console()
    for place in places:  # compilation, page faults, connections
        await closed_loop(place.target, make("unique", "cpu", 4, 99, high), 4)
    for number in range(arguments.rounds):
        for workload in arguments.workloads.split(","):
            for concurrency in [int(text) for text in arguments.concurrency.split(",")] if not arguments.rate else [0]:
                chains = make(workload, arguments.scale, arguments.chains or num_chains(concurrency or 50), 0, high)
                order = places if number % 2 == 0 else list(reversed(places))
                for place in order:

                    async def run(target: Target, c: int = concurrency, chains: list[Chain] = chains) -> Any:
                        if arguments.rate:
                            return await open_loop(target, chains, arguments.rate)
                        return await closed_loop(target, chains, c)

                    load = f"{arguments.rate}/s" if arguments.rate else f"@{concurrency}"
                    row = {"round": number, **await run_row(place, workload, load, run)}
                    rows.append(row)
                    table_console.print(
                        f"{place.name:>10} {workload}{load}: {row['tok_s']} tok/s, {row['wall_s']} s", highlight=False
                    )
    return rows


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    columns = (
        "where", "workload", "load", "tok/s", "TTFT p50", "p95", "ITL p50", "p95", "hit rate", "requests", "errors"
    )  # fmt: skip
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 3 else "right")
    for row in rows:
        keys = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "hit_rate", "requests", "errors")
        table.add_row(row["where"], row["workload"], row["load"], *(str(row[key]) for key in keys))
    Console(width=130).print(table)


def overhead(rows: Sequence[Row], where: str, base: str) -> list[Row]:
    """One place against another for each workload and load: medians over rounds."""
    found: list[Row] = []
    for workload, load in dict.fromkeys((row["workload"], row["load"]) for row in rows):
        both = [row for row in rows if (row["workload"], row["load"]) == (workload, load)]

        def median(where: str, key: str, both: list[Row] = both) -> float:
            return float(np.median([row[key] for row in both if row["where"] == where]))

        throughput = 1.0 - median(where, "tok_s") / median(base, "tok_s")
        found.append(
            {
                "workload": workload,
                "load": load,
                "throughput_percent": round(100 * throughput, 1),
                "ttft_p50_ms": round(median(where, "ttft_p50_ms") - median(base, "ttft_p50_ms"), 1),
                "itl_p50_ms": round(median(where, "itl_p50_ms") - median(base, "itl_p50_ms"), 1),
            }
        )
    return found


@contextlib.contextmanager
def http_places(arguments: argparse.Namespace, flags: list[str]) -> Iterator[tuple[list[Place], str]]:
    with (
        served(arguments.url, arguments.model, flags) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        model = client.get("/v1/models").json()["data"][0]["id"]
        pids = {"client": os.getpid()}
        if arguments.url is None:
            pids["engine"] = client.get("/get_server_info").json()["engine"]["pid"]
            pids["server"] = parent_of(pids["engine"])

        def flush() -> None:
            client.post("/flush_cache")  # other servers may not have it; their hit rate says so

        target = HttpTarget(url, model)
        places = [Place("http", target, flush, pids)]
        if arguments.watched:
            places.append(Place("watched", target, flush, pids, url))
        yield places, model
        target.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Serving under load")
    parser.add_argument("--url", help="an OpenAI-compatible server; default: start one")
    parser.add_argument("--model", default="smollm2-135m", help="what the started server and --in-process load")
    parser.add_argument("--workloads", default=",".join(NAMES), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--concurrency", default="1,10,50,100", help="closed loop: chains in flight")
    parser.add_argument("--rate", type=float, help="open loop instead: chains that begin each second")
    parser.add_argument("--chains", type=int, help="chains of a row; default: by concurrency")
    parser.add_argument("--scale", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--in-process", action="store_true", help="compare with an engine of this process")
    parser.add_argument("--watched", action="store_true", help="compare with the server while its explorer is open")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--high", type=int, default=40_000, help="token ids are drawn below this")
    parser.add_argument("--num-kv-tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.workloads.split(",")) - set(NAMES):
        parser.error(f"--workloads names {', '.join(sorted(unknown))}, but there are {', '.join(NAMES)}")
    flags = ["--num-kv-tokens", str(arguments.num_kv_tokens), "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        places, model = stack.enter_context(http_places(arguments, flags))
        if arguments.in_process:
            engine = stack.enter_context(Engine(arguments.model, num_kv_tokens=arguments.num_kv_tokens))
            places.append(
                Place("in-process", EngineTarget(engine), lambda: void(engine.flush_cache()), {"client": os.getpid()})
            )
        rows = run_loop(run_all(arguments, places, arguments.high))
    show(rows, f"{model}, {'closed' if not arguments.rate else 'open'} loop, times in ms")
    pairs = {
        "HTTP": ("http", "in-process", arguments.in_process),
        "the explorer": ("watched", "http", arguments.watched),
    }
    compared = {name: overhead(rows, where, base) for name, (where, base, is_wanted) in pairs.items() if is_wanted}
    for name, lines in compared.items():
        for line in lines:
            print(
                f"{line['workload']}{line['load']}: {name} costs {line['throughput_percent']} % of throughput, "
                f"{line['ttft_p50_ms']} ms of TTFT p50, {line['itl_p50_ms']} ms of ITL p50"
            )
    result = {
        "benchmark": "serving",
        "commit": commit(),
        "device": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": model,
        "configuration": {k: v for k, v in vars(arguments).items() if k != "out"},
        "rows": rows,
        "overhead": compared,
    }
    print_record(result, arguments.out)


def void(value: object) -> None:
    """For callbacks whose result nobody wants."""


def run_loop(work: Any) -> Any:  # Any: a coroutine and its result
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


if __name__ == "__main__":
    sys.exit(main())

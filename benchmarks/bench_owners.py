"""What a key costs its neighbour: the latency of a small key alone, alone at its share, and beside ten times its load.

    python benchmarks/bench_owners.py [--times 10] [--edits] [--seconds 60] [--out benchmarks/results/owners.jsonl]

    python benchmarks/bench_owners.py --branches 20000 [--out benchmarks/results/owners.jsonl]

SmolLM2-135M-Instruct in this process. Each client asks one request after another, of 20 to 120 new tokens of prompt and
of answer. The small key has one client, the other one `--times` as many. At its share: the small key is alone, and the
engine rests after each step as long as the step took, so that it has half of the machine's time. The target is a p95
beside of at most 1.3 times the p95 at its share. Gap: the longest time between two tokens of the small key. `--edits`:
the other one asks for log-probabilities, penalties and biases, which a CPU's host applies (`--times 128`: the worst).
`--branches`: instead, a server without keys, a program of so many branches, and beside it small chats of another
client, one after the other for two thirds of `--seconds`: milliseconds to their first token, and the tokens that the
server wrote in a second before and meanwhile. A chat that has no token by the end counts as that long.
"""

from __future__ import annotations

import argparse
import platform
import random
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import msgspec
import numpy as np
import torch
from bench_ttft import SYSTEM, first_token_ms, served
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet import Remote, State, function, gen
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.engine.engine import Engine
from ramet.runtime.types import SamplingParams

PLAIN = SamplingParams(temperature=0.0, ignore_eos=True)
EDITED = SamplingParams(
    temperature=0.8,
    ignore_eos=True,
    logprobs=5,
    repetition_penalty=1.1,
    frequency_penalty=0.3,
    logit_bias=dict.fromkeys(range(100, 130), 1.0),
)


def ask(engine: Engine, owner: str, sampling: SamplingParams, rng: random.Random, seconds: float) -> list[list[float]]:
    """One client: requests one after another. Returns when each began and when its tokens came."""
    end_s, found = time.monotonic() + seconds, []
    while (start_s := time.monotonic()) < end_s:
        prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(20, 121))]
        params = msgspec.structs.replace(sampling, max_tokens=rng.randrange(20, 121))
        handle = engine.submit(prompt, params, owner=owner, cache_salt=owner)
        found.append([start_s, *(time.monotonic() for output in handle for _ in output.token_ids)])
    return found


def measure(
    engine: Engine, clients: dict[str, int], seconds: float, edits: bool, seed: int = 1
) -> dict[str, Any]:  # Any: JSON
    """Let the clients of each owner ask for some time. Returns milliseconds of the small one, and tokens a second."""
    found: dict[str, list[list[float]]] = {owner: [] for owner in clients}

    def run(owner: str, number: int) -> None:
        sampling = EDITED if edits and owner == "big" else PLAIN
        found[owner] += ask(engine, owner, sampling, random.Random(f"{seed} {owner} {number}"), seconds)

    threads = [threading.Thread(target=run, args=(owner, i)) for owner, count in clients.items() for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small = found.get("small", [])
    p50, p95 = np.percentile([1000 * (times[-1] - times[0]) for times in small] or [0.0], (50, 95))
    gap = max((1000 * float(np.diff(times[1:]).max()) for times in small), default=0.0)
    tokens = {f"{owner}_tok_s": round(sum(len(t) - 1 for t in rows) / seconds, 1) for owner, rows in found.items()}
    return {
        "requests": len(small),
        "p50_ms": round(float(p50)),
        "p95_ms": round(float(p95)),
        "gap_ms": round(gap),
        **tokens,
    }


_step = EngineCore.step


def half_a_step(core: EngineCore) -> list[Any]:  # Any: updates
    """A step of an engine that has half of the time."""
    start_s = time.monotonic()
    updates = _step(core)
    time.sleep(time.monotonic() - start_s)
    return updates


@function
def many(s: State, count: int) -> None:
    """A prefix of about 512 tokens, and branches that all go on from it."""
    s += SYSTEM
    branches = s.fork(count)
    branches += lambda i: f"Question {i}: "
    branches += gen("answer", max_tokens=64, ignore_eos=True)


def metric(http: httpx.Client, name: str) -> float:
    """The value of one of the server's metrics."""
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def written_tokens(http: httpx.Client) -> float:
    """Tokens that the server has decoded since its start."""
    return metric(http, "ramet_decoded_tokens_total")


def beside_branches(url: str, branches: int, seconds: float) -> dict[str, Any]:  # Any: JSON
    """Run the program, and after a third of the time small chats beside it."""
    waits, last_s = list[float](), 0.0
    with httpx.Client(base_url=url, timeout=httpx.Timeout(seconds), trust_env=False) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        first_token_ms(http, model, "Numbers only. " * 40, "Begin.")
        thread = threading.Thread(target=lambda: many.run(branches, backend=Remote(url)).error(), daemon=True)
        thread.start()
        while metric(http, "ramet_waiting_requests") < 0.9 * branches:
            time.sleep(0.1)
        start_s, tokens = time.monotonic(), written_tokens(http)
        time.sleep(seconds / 3)
        alone = (written_tokens(http) - tokens) / (time.monotonic() - start_s)
        start_s, tokens, last_s = time.monotonic(), written_tokens(http), time.monotonic() + seconds * 2 / 3
        while (left_s := last_s - time.monotonic()) > 1:
            http.timeout = httpx.Timeout(left_s)
            try:
                waits.append(first_token_ms(http, model, "Short.", f"Say {len(waits)}.")[0])
            except httpx.TimeoutException:
                waits.append(1000 * left_s)
        beside = (written_tokens(http) - tokens) / (time.monotonic() - start_s)
    return {
        "chats": len(waits),
        "p50_ms": round(float(np.percentile(waits, 50))),
        "most_ms": round(max(waits)),
        "alone_tok_s": round(alone, 1),
        "beside_tok_s": round(beside, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--edits", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--branches", type=int, default=0)
    args = parser.parse_args()
    if args.branches:
        with served(None, args.model, ["--max-json-values", "10000000"]) as url:
            found = beside_branches(url, args.branches, args.seconds)
        print_record(
            {
                "benchmark": "branches",
                "commit": commit(),
                "device": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "branches": args.branches,
                **found,
            },
            args.out,
        )
        return
    with Engine(args.model) as engine:
        both = {"small": 1, "big": args.times}
        measure(engine, both, min(args.seconds, 10.0), args.edits, seed=0)  # warm-up; steps are measured
        rows = {"alone": measure(engine, {"small": 1}, args.seconds, args.edits)}
        with patch.object(EngineCore, "step", half_a_step):
            rows["alone at its share"] = measure(engine, {"small": 1}, args.seconds, args.edits)
        rows["beside"] = measure(engine, both, args.seconds, args.edits)
        rows["the big one alone"] = measure(engine, {"big": args.times}, args.seconds, args.edits)
    ratio = round(rows["beside"]["p95_ms"] / rows["alone at its share"]["p95_ms"], 2)
    table = Table(title=f"one client beside {args.times}, {args.model}, {torch.get_num_threads()} threads")
    for column in ("", "requests", "p50 ms", "p95 ms", "gap ms", "small tok/s", "big tok/s"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        values = (row.get(key, "") for key in ("requests", "p50_ms", "p95_ms", "gap_ms", "small_tok_s", "big_tok_s"))
        table.add_row(name, *map(str, values))
    Console().print(table)
    print(f"p95 beside / alone at its share: {ratio}")
    print_record(
        {
            "benchmark": "owners",
            "commit": commit(),
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "times": args.times,
            "edits": args.edits,
            "ratio": ratio,
            **rows,
        },
        args.out,
    )


if __name__ == "__main__":
    main()

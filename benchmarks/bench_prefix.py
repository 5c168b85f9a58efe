"""What a cached prefix saves on this machine: time to first token cold and warm, and a fork over one prefix.

    python benchmarks/bench_prefix.py [--prefix 1000] [--branches 32] [--out benchmarks/results/prefix.jsonl]

SmolLM2-135M-Instruct, greedy. Cold: the cache is empty. Warm: the same prefix was used once, with another question. The
alternative, an engine without the cache, is measured in the same run, with four branches (it takes long). The floor of
a warm first token is one decode step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from json_line import commit, print_record
from rich.console import Console
from rich.table import Table

from ramet.runtime.engine.engine import Engine
from ramet.runtime.handle import RequestResult
from ramet.runtime.types import SamplingParams

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def first_token_s(result: RequestResult) -> float:
    return result.timings["first_token_s"]


def prefix_of(engine: Engine, num_tokens: int) -> list[int]:
    """A text of real words, as many tokens long."""
    sentence = "The river runs past the old mill, and the mill turns with it; what the water brings, the wheel takes. "
    ids = engine.tokenizer.encode(sentence * (num_tokens // 10))
    assert len(ids) >= num_tokens
    return ids[:num_tokens]


def measure(engine: Engine, prefix: list[int], repeats: int) -> tuple[list[float], list[float], float]:
    """Cold and warm times to first token, and the warm requests' hit rate."""
    questions = [engine.tokenizer.encode(f" Question {i}: where does the water go?") for i in range(repeats + 1)]
    cold, warm, cached, prompt = [], [], 0, 0
    for i in range(repeats):
        engine.flush_cache()
        cold.append(first_token_s(engine.generate(prefix + questions[i], ONE_TOKEN)))
        result = engine.generate(prefix + questions[i + 1], ONE_TOKEN)
        warm.append(first_token_s(result))
        cached += result.usage.cached_tokens
        prompt += result.usage.prompt_tokens
    return cold, warm, cached / prompt


def fork(engine: Engine, prefix: list[int], branches: int) -> dict[str, Any]:  # Any: JSON
    """All branches at once over a prefix that is in no cache."""
    engine.flush_cache()
    before = engine.stats()
    endings = [engine.tokenizer.encode(f" Branch {i}:") for i in range(branches)]
    handles = [engine.submit([*prefix, *own], SamplingParams(temperature=0.0, max_tokens=8)) for own in endings]
    results = [handle.result() for handle in handles]
    after = engine.stats()
    own = len({tuple(ending[: i + 1]) for ending in endings for i in range(len(ending))})  # endings begin alike
    return {
        "branches": branches,
        "prompt_tokens": sum(r.usage.prompt_tokens for r in results),
        "computed_tokens": int(after["num_computed_tokens"] - before["num_computed_tokens"]),
        "least_possible": len(prefix) + own,
        "wall_s": round(max(r.timings["total_s"] for r in results), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prefix", type=int, default=1000)
    parser.add_argument("--branches", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}  # Any: JSON
    for name, cached in (("radix cache", True), ("no cache", False)):
        with Engine(args.model, radix_cache=cached) as engine:
            prefix = prefix_of(engine, args.prefix)
            measure(engine, prefix, 1)  # warm-up
            cold, warm, hit_rate = measure(engine, prefix, args.repeats)
            rows[name] = {
                "cold_s": round(statistics.median(cold), 4),
                "warm_s": round(statistics.median(warm), 4),
                "warm_over_cold": round(statistics.median(warm) / statistics.median(cold), 4),
                "hit_rate": round(hit_rate, 4),
                "fork": fork(engine, prefix, args.branches if cached else min(4, args.branches)),
            }
    table = Table(title=f"{args.prefix} shared tokens, {args.model}, {torch.get_num_threads()} threads")
    for column in (
        "",
        "TTFT cold",
        "TTFT warm",
        "warm / cold",
        "hit rate",
        "fork: computed of prompt tokens",
        "fork wall",
    ):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        branches = row["fork"]
        table.add_row(
            name,
            f"{row['cold_s'] * 1e3:.0f} ms",
            f"{row['warm_s'] * 1e3:.0f} ms",
            f"1 / {1 / row['warm_over_cold']:.1f}",
            f"{row['hit_rate']:.3f}",
            f"{branches['computed_tokens']:,} of {branches['prompt_tokens']:,}",
            f"{branches['wall_s']:.2f} s",
        )
    Console().print(table)
    print_record(
        {
            "benchmark": "prefix",
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            "prefix": args.prefix,
            "rows": rows,
        },
        args.out,
    )


if __name__ == "__main__":
    main()

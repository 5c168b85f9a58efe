"""What the host does per step of a GPU engine, with a device that does nothing: microseconds of its thread's own time.

    python benchmarks/bench_host.py         decode steps at batch 1, 50 and 256, with drafts at 1 and 8, then whole rows
    python benchmarks/bench_host.py --rows rag@256 --chains 128

The real engine runs: its thread, scheduler, radix cache, tree planner, step graphs and their packing, delivery to
callbacks. Replays of graphs do nothing and every token is 0. Times are CPU times of the engine's thread, so that other
processes do not count. An 8B model's products alone take an H100 5.6 ms a step at batch 1 and 7.3 at 256: the host must
be done before. Prompts run in chunks of 512 tokens, because longer ones are not graphs. Not here: launches of eager
steps, and what CUDA's driver takes for a copy and a replay.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu import MadeUpTokenizer, run_row, tiny_shapes
from bench_speculation import GpuTimes
from json_line import commit, print_record
from workloads import MAKERS, Chain, Turn, Workload

from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.config import llama_3_1_8b
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.speculation.speculation import Speculation
from ramet.runtime.steps.cuda_graph import VERIFIED_DRAFTS
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.testing.dummy import dummy_decoder

CONTEXT = 16_384
STEADY = (1, 50, 256)
STEADY_WITH_DRAFTS = (1, 8)
ROWS = "unique@50,rag@50,multiturn@50,agentic@50,fork@64,rag@256,multiturn@256,agentic@256"


def nothing(body: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a capture: the step it records takes no time and changes nothing."""
    return lambda: None


@dataclass(slots=True)
class Clock:
    """Seconds of CPU time of the engine's thread: of each step by what it did, and of the parts of all steps."""

    steps: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "mixed": []})
    parts: dict[str, float] = field(default_factory=dict)
    kind: str = "decode"

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.thread_time() - begun

        return run

    def watch(self, engine: Engine) -> None:
        """Time the parts of the engine's steps from now on."""
        core = engine._core
        launch, run_once = core.launch, engine._run_once

        def launch_noting(batch: Any) -> Any:
            self.kind = "decode" if batch.num_decode == len(batch.items) else "mixed"
            return launch(batch)

        def run_once_timed() -> bool:
            before = core.scheduler.counters.num_steps
            begun = time.thread_time()
            goes_on = run_once()
            if core.scheduler.counters.num_steps > before:
                self.steps[self.kind].append(time.thread_time() - begun)
            return goes_on

        core.scheduler.schedule = self.timed("schedule", core.scheduler.schedule)  # type: ignore[method-assign]
        core.launch = self.timed("launch", launch_noting)  # type: ignore[method-assign]
        core.collect = self.timed("collect", core.collect)  # type: ignore[method-assign]
        if core.speculation is not None:
            for name in ("pays", "propose"):
                setattr(core.speculation, name, self.timed("drafts", getattr(core.speculation, name)))
        if core.runner.tree is not None:
            core.runner.tree.update = self.timed("tree plans", core.runner.tree.update)  # type: ignore[method-assign]
        engine._run_once = run_once_timed  # type: ignore[method-assign]

    def report(self) -> dict[str, Any]:
        """Microseconds: percentiles of steps, means of the parts over all steps; the rest is delivery and commands."""
        count = sum(map(len, self.steps.values()))
        result: dict[str, Any] = {}
        for kind, samples in self.steps.items():
            if samples:
                p50, p95 = np.percentile(samples, [50, 95]) * 1e6
                result[kind] = {"steps": len(samples), "p50": round(float(p50)), "p95": round(float(p95))}
        total = sum(sum(samples) for samples in self.steps.values())
        parts = {**self.parts, "rest": total - sum(v for k, v in self.parts.items() if k != "tree plans")}
        result["mean"] = {"step": round(total / max(count, 1) * 1e6)} | {
            name: round(seconds / max(count, 1) * 1e6) for name, seconds in parts.items()
        }
        return result


def make_engine(*, has_drafts: bool = False) -> Engine:
    """has_drafts: a text whose tokens are all 0 repeats itself, so all of its drafts are right."""
    shapes = tiny_shapes()
    decoder = dummy_decoder(shapes, "cpu", torch.float32)
    model = LoadedModel("dummy", decoder, MadeUpTokenizer(shapes.vocab_size), shapes, GenerationDefaults())
    config = EngineConfig.from_mapping(
        {"device": "cpu", "context_length": CONTEXT, "num_kv_tokens": 500_000, "chunked_prefill_size": 512}
    )
    engine = Engine(model, config)
    core, given = engine._core, engine._core.runner
    costs = {"mode": "auto", "num_sms": 132, "device": given.device, "dtype": torch.bfloat16}
    tree = TreePlanner(llama_3_1_8b(), core.runner.kv_cache.page_size, config.max_running_requests, **costs)  # type: ignore[arg-type]
    parts = decoder, given.kv_cache, given.slots
    sizes = {"device": given.device, "max_kv_len": given.max_kv_len}
    core.runner = ModelRunner(*parts, **sizes, tree=tree, verifies=has_drafts)
    core.speculation = Speculation(GpuTimes(0.0), most_drafted=VERIFIED_DRAFTS[-1]) if has_drafts else None
    core.runner.capture_graphs(512, nothing)
    core.overlap = True
    return engine


def steady(batch: int, num_tokens: int = 300) -> Workload:
    """Sequences of a prompt that differ in length, all of which run from the first to the last step."""
    chains: list[Chain] = [[Turn([1000 + i] * (40 + i % 16), num_tokens)] for i in range(batch)]
    return Workload(chains)


def measure(name: str, workload: Workload, concurrency: int, *, has_drafts: bool = False) -> dict[str, Any]:
    with make_engine(has_drafts=has_drafts) as engine:
        run_row(engine, MAKERS["unique"](4, seed=9, high=3000), 4, None, limit_s=600)  # first uses
        gc.collect()
        gc.freeze()  # as bench_gpu.py and a server's engine do
        clock = Clock()
        clock.watch(engine)
        tokens_s = run_row(engine, workload, concurrency, None, limit_s=600)
        engine.check_integrity()
    record = {"row": name, **clock.report(), "wall_s": round(tokens_s.wall_s, 2)}
    mean = record["mean"]
    print(
        f"{name:14} "
        + " ".join(f"{kind} p50 {record[kind]['p50']:>5} p95 {record[kind]['p95']:>5} us ({record[kind]['steps']})" for
                   kind in ("decode", "mixed") if kind in record)
        + "  mean " + " ".join(f"{part} {us}" for part, us in mean.items()), flush=True,
    )  # fmt: skip
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROWS, help="workloads at concurrencies; empty for none")
    parser.add_argument("--chains", type=int, default=0, help="chains of a row; 0: once its concurrency")
    parser.add_argument("--out", type=Path, help="append the JSON line here")
    args = parser.parse_args()
    records = [measure(f"decode@{batch}", steady(batch), batch) for batch in STEADY]
    records += [measure(f"drafts@{batch}", steady(batch, 1200), batch, has_drafts=True) for batch in STEADY_WITH_DRAFTS]
    for row in filter(None, args.rows.split(",")):
        kind, concurrency = row.split("@")
        high = tiny_shapes().vocab_size - 100
        workload = MAKERS[kind](args.chains or int(concurrency), high=high)
        records.append(measure(row, workload, int(concurrency)))
    print_record(
        {"benchmark": "host", "commit": commit(), "python": platform.python_version(), "rows": records, "unit": "us"},
        args.out,
    )


if __name__ == "__main__":
    main()

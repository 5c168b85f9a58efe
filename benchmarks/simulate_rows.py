"""What bench_gpu.py's rows would do on an H100: the real scheduler, cache and tree planner, and a model of a step.

    python benchmarks/simulate_rows.py                                what each row's steps are made of
    python benchmarks/simulate_rows.py --rows rag@256 --set max_num_tokens_per_step=8192
    python benchmarks/simulate_rows.py --rows mixed@64 --whole-rows     a program of attention reads all keys of a row
    python benchmarks/simulate_rows.py --brief --drafted 4 --acceptance 0.6     a prediction of what drafts would do

Times are no measurement: products as measured on such a card, attention as the tree planner's cost model has it,
guesses for the rest; launches as the host's share of a step. It shows whether the batch is full, whether tree attention
engages, what padding and chunks cost, and it compares two schedulers; it does not say how fast the kernels are.
With drafts, every row verifies so many drafted tokens in each step, a drafted token is right with that probability, and
drafting costs nothing. A step then starts when the one before is read, its graphs have any size, and attention reads a
sequence's keys once for all its tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu import ORDER
from gpu_report import TARGETS
from json_line import commit, print_record
from numpy.typing import NDArray
from workloads import MAKERS, ROWS, Chain

from ramet.kernels.attention.plan import TreeCostModel, choose_num_parts, tree_config
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.models.config import llama_3_1_8b
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.steps.cuda_graph import StepGraphs
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.types import Batch, Request, RowOutput, SamplingParams, Sequence

PAGE = 16
NUM_PAGES = 27_000  # of 128 KiB a token: what 0.9 of 80 GB leaves beside the weights
MAX_RUNNING = 256
# Tokens and ms of all matrix products of a step: cuBLAS in a CUDA graph on an H100, measured.
PRODUCTS_MS = (
    (1, 5.63), (8, 5.68), (32, 5.74), (64, 5.83), (128, 6.17), (256, 7.29), (512, 12.1), (2048, 44.2), (8192, 168.8),
)  # fmt: skip
OTHER_MS, OTHER_MS_A_TOKEN = 0.6, 0.0022  # norms, rotation, activation, sampling: guesses
PROGRAM_RATE = 54e9  # bytes/s that one program of decode attention reads while few others do: a guess
EXTEND_RATE = 350e12  # flop/s of the attention of prompts: a guess
EAGER_MS, REPLAY_MS, PLAN_MS, PLAN_MS_A_ROW = 6.0, 0.1, 0.05, 0.003  # of the host
MODEL = llama_3_1_8b()


def products_ms(num_tokens: int) -> float:
    return float(np.interp(num_tokens, *np.array(PRODUCTS_MS).T))


def longest_part(kv_lens: NDArray[np.int64]) -> int:
    """The most keys that a program of decode attention reads, as its kernel cuts rows of these lengths."""
    share = max(-(-int(kv_lens.sum()) // choose_num_parts(MODEL.num_kv_heads, 132)), 1)
    counts = np.clip(-(-kv_lens // share), 1, 64)
    return int((-(-kv_lens // counts)).max(initial=0))


@dataclass(slots=True)
class Waiting:
    """A chain's turn in flight, and when it was submitted and last heard of, in seconds."""

    chain: Chain
    turn: int
    submitted_s: float
    heard_s: float


@dataclass
class Row:
    """Runs one workload; `kinds` sums what steps of each kind were made of."""

    scheduler: dict[str, Any]
    uses_tree: bool = True
    pads: bool = True
    cuts: bool = True
    num_drafted: int = 0
    acceptance: float = 0.0
    now_s: float = 0.0
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    in_flight: dict[Sequence, Waiting] = field(default_factory=dict)
    left: list[Chain] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"output": 0, "prompt": 0, "cached": 0})
    num_requests: int = 0

    def __post_init__(self) -> None:
        pool = PagePool(NUM_PAGES, PAGE)
        config = SchedulerConfig(**{"context_length": 16_384, "max_num_tokens_per_step": 4096, **self.scheduler})
        self.engine = Scheduler(config, pool, RadixCache(pool), lambda: self.now_s)
        device = torch.device("cpu")
        self.planner = TreePlanner(
            MODEL, PAGE, MAX_RUNNING, mode="auto", num_sms=132, device=device, dtype=torch.bfloat16
        )
        tile = tree_config(MODEL.head_dim, torch.bfloat16, MODEL.num_heads // MODEL.num_kv_heads)
        self.costs = TreeCostModel(MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim, tile)
        self.graphs = StepGraphs(
            lambda key, buffers: None, MAX_RUNNING, MAX_RUNNING, device, max_extend=512,
            capture=lambda body: body,
        )  # fmt: skip
        self.tokens = np.random.default_rng(0)

    def forget(self) -> None:
        """Count from here."""
        for values in (self.kinds, self.first_token_s, self.gaps_s):
            values.clear()
        self.counts = dict.fromkeys(self.counts, 0)

    def run(self, chains: list[Chain], concurrency: int) -> None:
        """Two steps are in flight, as in the overlapped loop."""
        self.left = list(reversed(chains))
        for _ in range(min(concurrency, len(self.left))):
            self.submit(self.left.pop(), 0, np.zeros(0, dtype=np.int32))
        free_s = self.now_s  # when the device has nothing to do
        last: tuple[Batch, float] | None = None
        while last is not None or self.engine.has_work:
            if self.num_drafted and last is not None:
                self.now_s = max(self.now_s, last[1])
                self.collect(last[0])
                last = None
            drafts = {s: [0] * self.num_drafted for s in self.engine.draftable()} if self.num_drafted else {}
            batch = self.engine.schedule(drafts)
            if batch is not None:
                device_ms, host_ms = self.cost(batch)
                self.now_s += host_ms / 1e3
                free_s = max(self.now_s, free_s) + device_ms / 1e3
            if last is not None:
                self.now_s = max(self.now_s, last[1])
                self.collect(last[0])
            last = None if batch is None else (batch, free_s)

    def submit(self, chain: Chain, turn: int, history: NDArray[np.int32]) -> None:
        prompt = np.concatenate([history, np.asarray(chain[turn].new, dtype=np.int32)])
        self.num_requests += 1
        request = Request(f"r{self.num_requests}", prompt, SamplingParams(), chain[turn].out)
        self.in_flight[self.engine.add(request)] = Waiting(chain, turn, self.now_s, 0.0)

    def collect(self, batch: Batch) -> None:
        drawn = self.tokens.integers(1000, 120_000, len(batch.items)).tolist()
        outputs = []
        for item, token in zip(batch.items, drawn, strict=True):
            num_right = 0
            while num_right < item.num_samples - 1 and self.tokens.random() < self.acceptance:
                num_right += 1
            outputs.append(RowOutput((*[0] * num_right, token) if item.num_samples else ()))
        for sequence in self.engine.finish_step(batch.items, outputs):
            row = self.in_flight[sequence]
            if row.heard_s:
                self.gaps_s.append(self.now_s - row.heard_s)
            else:
                self.first_token_s.append(self.now_s - row.submitted_s)
            row.heard_s = self.now_s
            if not sequence.is_finished:
                continue
            del self.in_flight[sequence]
            request = sequence.request
            self.counts["output"] += len(sequence.output_ids)
            self.counts["prompt"] += request.num_prompt
            self.counts["cached"] += sequence.num_cached
            if row.turn + 1 < len(row.chain):
                self.submit(row.chain, row.turn + 1, sequence.tokens(0, sequence.num_tokens))
            elif self.left:
                self.submit(self.left.pop(), 0, np.zeros(0, dtype=np.int32))

    def alone_s(self, kv_lens: NDArray[np.int64]) -> float:
        """Seconds of the program of decode attention that reads most keys."""
        keys = longest_part(kv_lens) if self.cuts else int(kv_lens.max(initial=0))
        return keys * 4 * MODEL.head_dim / PROGRAM_RATE

    def cost(self, batch: Batch) -> tuple[float, float]:
        """Milliseconds of the device and of the host."""
        extends = [item for item in batch.items[batch.num_decode :] if item.num_samples <= 1]
        rows = batch.items[: len(batch.items) - len(extends)]  # verified ones are the first behind those that decode
        num_new = sum(item.num_tokens for item in extends)
        num_tokens, launch_ms, kind = batch.num_tokens, REPLAY_MS, "decode"
        plan = self.planner.update(rows) if self.uses_tree and len(rows) > 1 else None
        if extends:
            key = self.graphs.key(len(rows), num_new, len(extends), uses_tree=plan is not None)
            kind = ("mixed" if rows else "prompts") + (", eager" if key is None else "")
            num_tokens, launch_ms = (num_tokens, EAGER_MS) if key is None else (key.num_tokens, REPLAY_MS)
        elif not self.num_drafted:
            num_tokens = next(size for size in self.graphs.buckets if size >= num_tokens)
        if not self.pads:
            num_tokens = batch.num_tokens
        lens = np.array([item.start + 1 for item in rows], dtype=np.int64)
        plain_s = max(self.costs.plain_s(1, int(lens.sum())), self.alone_s(lens))
        decode_s = plain_s
        if plan is not None:
            members, shared = plan.members.tolist(), dict[tuple[int, int], int]()
            for _, low, high, first, count in plan.items[: int(plan.num_items)].tolist():
                shared[members[first], count] = shared.get((members[first], count), 0) + high - low
            decode_s = self.costs.tree_s([(count, tokens) for (_, count), tokens in shared.items()])
            suffixes = lens - plan.kv_starts[: len(rows)].numpy()
            decode_s += max(self.costs.plain_s(1, int(suffixes.sum())), self.alone_s(suffixes))
            decode_s += self.costs.costs.fixed_s
        flops = sum(4 * MODEL.num_heads * MODEL.head_dim * i.num_tokens * (i.start + i.num_tokens / 2) for i in extends)
        parts = {
            "products": products_ms(num_tokens),
            "attention": (decode_s + flops / EXTEND_RATE) * MODEL.num_layers * 1e3,
            "rest": OTHER_MS + OTHER_MS_A_TOKEN * num_tokens,
        }
        step_ms = sum(parts.values())
        total = self.kinds.setdefault(kind, {})
        facts = {
            "steps": 1, "ms": step_ms, **parts, "padding": parts["products"] - products_ms(batch.num_tokens),
            "plain attention": (plain_s + flops / EXTEND_RATE) * MODEL.num_layers * 1e3, "rows": len(rows),
            "new": num_new, "prompts": len(extends), "trees": plan is not None,
        }  # fmt: skip
        for name, value in facts.items():
            total[name] = total.get(name, 0.0) + value
        return step_ms, launch_ms + PLAN_MS + PLAN_MS_A_ROW * len(batch.items)


def simulate(
    kind: str,
    concurrency: int,
    count: int,
    scheduler: dict[str, Any],
    *,
    uses_tree: bool = True,
    pads: bool = True,
    cuts: bool = True,
    num_drafted: int = 0,
    acceptance: float = 0.0,
) -> dict[str, Any]:
    """Figures of one row, as bench_gpu.py names them, and means of its steps by kind."""
    workload = MAKERS[kind](count)
    row = Row(scheduler, uses_tree, pads, cuts, num_drafted, acceptance)
    if workload.parent is not None:
        row.run([workload.parent], 1)
        row.forget()
    begun_s = row.now_s
    row.run(workload.chains, concurrency)
    row.engine.check_integrity()
    ttft, gaps = np.percentile(row.first_token_s, [50, 95]) * 1e3, np.percentile(row.gaps_s, 50) * 1e3
    return {
        "row": f"{kind}@{concurrency}",
        "tok_s": round(row.counts["output"] / (row.now_s - begun_s)),
        "ttft_p50_ms": round(float(ttft[0])),
        "ttft_p95_ms": round(float(ttft[1])),
        "itl_p50_ms": round(float(gaps), 2),
        "hit_rate": round(row.counts["cached"] / row.counts["prompt"], 3),
        "wall_s": round(row.now_s - begun_s, 2),
        "preemptions": row.engine.counters.num_preemptions,
        "steps": {
            name: {fact: round(value / total["steps"], 2) for fact, value in total.items() if fact != "steps"}
            | {"count": int(total["steps"])}
            for name, total in row.kinds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="comma-separated, as rag@50; default: all but those under a grammar")
    parser.add_argument("--scale", type=int, default=1, help="divide chains and concurrency by this")
    parser.add_argument("--no-tree", action="store_true", help="plain attention alone")
    parser.add_argument("--no-padding", action="store_true", help="graphs of every size")
    parser.add_argument("--whole-rows", action="store_true", help="no row's keys are cut into parts")
    parser.add_argument("--drafted", type=int, default=0, help="drafted tokens of a row in each step")
    parser.add_argument("--acceptance", type=float, default=0.6, help="probability that one is right after the others")
    parser.add_argument("--brief", action="store_true", help="a line a row")
    parser.add_argument(
        "--set", action="append", default=[], help="a field of SchedulerConfig, as min_mixed_tokens=256"
    )
    parser.add_argument("--out", type=Path, help="append the result to this file")
    args = parser.parse_args()
    config = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    wanted, found = [name for name in args.rows.split(",") if name], []
    rows = {f"{kind}@{concurrency}": (kind, concurrency, count) for kind, concurrency, count in ROWS}
    for name in [name for name in ORDER if name in wanted or not (wanted or name.startswith("json"))]:
        kind, concurrency, count = rows[name]
        sizes = max(concurrency // args.scale, 1), max(count // args.scale, 1)
        values = {"uses_tree": not args.no_tree, "pads": not args.no_padding, "cuts": not args.whole_rows}
        row = simulate(kind, *sizes, config, **values, num_drafted=args.drafted, acceptance=args.acceptance)
        found.append(row)
        goal = TARGETS.get(name)
        beside = f"others {goal.others:>6g} target {goal.target:>6g} floor {goal.floor or '-':>6}" if goal else ""
        print(
            f"{name:14} {row['tok_s']:6} tok/s  {beside:42} TTFT p50 "
            f"{row['ttft_p50_ms']:>5} p95 {row['ttft_p95_ms']:>5} ITL {row['itl_p50_ms']:>6} hit {row['hit_rate']:.3f}"
        )
        for step, mean in {} if args.brief else row["steps"].items():
            print(f"    {step:14} " + "  ".join(f"{fact} {value:g}" for fact, value in mean.items()))
    drafts = {"drafted": args.drafted, "acceptance": args.acceptance} if args.drafted else {}
    print_record(
        {"benchmark": "simulated rows", "commit": commit(), "config": config, **drafts, "rows": found}, args.out
    )


if __name__ == "__main__":
    main()

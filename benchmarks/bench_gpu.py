"""Throughput on one GPU with random weights of Llama-3.1-8B's shapes: the rows that other engines were measured on.

    python benchmarks/bench_gpu.py                      every row, a table, one JSON line last
    python benchmarks/bench_gpu.py --rows rag@50,fork@64
    python benchmarks/bench_gpu.py --profile trace.json.gz --rows unique@50
    python benchmarks/bench_gpu.py --device cpu --tiny --scale 64 --shrink 64    a rehearsal: figures mean nothing

Rows run in the order of their worth, so that an early end leaves those that decide most; `--out` gets a JSON line after
each row, and one of all rows last.

In process, without HTTP and detokenising; max 256 running, context 16,384; the cache is empty before each row; exact
output lengths. `others` and `target` are those of gpu_report.py. `floor` is prefill tokens x 22.2 us + steps x (GEMMs
at that batch + KV bytes read once per shared segment / 3.04 TB/s), both measured on an H100 SXM. Eight short prompts
run before the first row: a process's first use of a library's kernels is no part of any row.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import gzip
import json
import logging
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_report import TARGETS
from json_line import commit
from vocabulary import make_vocabulary
from workloads import JSON_SCHEMA, MAKERS, ROWS, Chain, Workload, shrunk

from ramet.grammar import Vocabulary
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.config import ModelConfig, llama_3_1_8b, smollm2_135m
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.dummy import dummy_decoder
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.types import Grammar, RequestOutput, SamplingParams

# What is worth most first: shared prefixes and constraints, where engines differ most, then batch 1 and loads.
ORDER = [
    "fork@64", "rag@50", "decode1@1", "unique@50", "jsonoff@32", "json@32", "rag@256", "multiturn@50", "agentic@50",
    "unique@10", "mixed@64", "multiturn@256", "agentic@256", "unique@256", "jsonoff@128", "json@128", "jsonoff@1",
    "json@1",
]  # fmt: skip


@dataclass(slots=True)
class Measured:
    """Times of one row, in seconds; token times are of when the engine handed them out."""

    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_output: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    parent_first_token_s: float | None = None
    wall_s: float = 0.0


class ChainRunner:
    """Keeps `concurrency` chains in flight; a chain's next turn is submitted from the engine's own callback."""

    def __init__(self, engine: Engine, chains: list[Chain], concurrency: int, grammar: Grammar | None) -> None:
        self.engine = engine
        self.waiting = list(reversed(chains))
        self.concurrency = concurrency
        self.grammar = grammar
        self.left = len(chains)
        self.done = threading.Event()
        self.measured = Measured()
        self.error: Exception | None = None

    def run(self, limit_s: float) -> Measured:
        """Raises TimeoutError where the chains do not end in time."""
        start_s = time.perf_counter()
        # Taken before the first is submitted: from then on the engine's thread takes from the list, too.
        first = [self.waiting.pop() for _ in range(min(self.concurrency, len(self.waiting)))]
        for chain in first:
            self._submit(chain, 0, [])
        if not self.done.wait(limit_s):
            raise TimeoutError(f"{self.left} of the chains did not end within {limit_s:.0f} s")
        self.measured.wall_s = time.perf_counter() - start_s
        if self.error is not None:
            raise self.error
        return self.measured

    def _submit(self, chain: Chain, turn: int, history: list[int]) -> None:
        prompt = history + chain[turn].new
        generated: list[int] = []
        submitted_s = time.perf_counter()
        last_s = submitted_s
        measured = self.measured

        def on_output(output: RequestOutput) -> None:
            nonlocal last_s
            now_s = time.perf_counter()
            if output.token_ids:
                (measured.first_token_s if not generated else measured.gaps_s).append(now_s - last_s)
                last_s = now_s
                generated.extend(output.token_ids)
            if output.finish_reason is None:
                return
            if output.error is not None or len(generated) != chain[turn].out:
                self.error = output.error or RuntimeError(f"{len(generated)} tokens instead of {chain[turn].out}")
                self.done.set()
                return
            measured.num_output += len(generated)
            measured.num_prompt += output.usage.prompt_tokens
            measured.num_cached += output.usage.cached_tokens
            if turn + 1 < len(chain):
                self._submit(chain, turn + 1, prompt + generated)
            elif self.waiting:
                self.left -= 1
                self._submit(self.waiting.pop(), 0, [])
            else:
                self.left -= 1
                if self.left == 0:
                    self.done.set()

        sampling = SamplingParams(temperature=0.0, max_tokens=chain[turn].out, ignore_eos=True)
        self.engine.submit(prompt, sampling, grammar=self.grammar, on_output=on_output, detokenize=False)


def run_row(engine: Engine, workload: Workload, concurrency: int, grammar: Grammar | None, limit_s: float) -> Measured:
    """Run one row from an empty cache."""
    engine.flush_cache()
    parent_s = None
    if workload.parent is not None:
        parent_s = ChainRunner(engine, [workload.parent], 1, grammar).run(limit_s).first_token_s[0]
    measured = ChainRunner(engine, workload.chains, concurrency, grammar).run(limit_s)
    measured.parent_first_token_s = parent_s
    return measured


def summary(name: str, measured: Measured) -> dict[str, Any]:  # Any: JSON
    """The figures of a row; latencies in ms."""

    def percentile(values: list[float], q: float) -> float:
        return round(float(np.percentile(values, q)) * 1e3, 2) if values else 0.0

    row = {
        "row": name,
        "tok_s": round(measured.num_output / measured.wall_s, 1),
        "ttft_p50_ms": percentile(measured.first_token_s, 50),
        "ttft_p95_ms": percentile(measured.first_token_s, 95),
        "itl_p50_ms": percentile(measured.gaps_s, 50),
        "itl_p95_ms": percentile(measured.gaps_s, 95),
        "hit_rate": round(measured.num_cached / max(measured.num_prompt, 1), 3),
        "wall_s": round(measured.wall_s, 2),
    }
    if measured.parent_first_token_s is not None:
        row["parent_ttft_ms"] = round(measured.parent_first_token_s * 1e3, 1)
    return row


def print_row(row: dict[str, Any], *, is_rehearsal: bool) -> None:
    name = row["row"]
    target = None if is_rehearsal else TARGETS.get(name)
    figure, note = row["tok_s"], ""
    if target is not None:
        figure = row.get(target.figure, float("nan"))
        note = f"others {target.others:>8g}  target {target.target:>7g}  floor {target.floor or '-':>6}"
    print(
        f"{name:14} {figure:>9}  {note:46} tok/s {row['tok_s']:>8} TTFT p50 {row['ttft_p50_ms']:>8} "
        f"p95 {row['ttft_p95_ms']:>8} ITL p50 {row['itl_p50_ms']:>6} hit {row['hit_rate']:.3f} ({row['wall_s']} s)",
        flush=True,
    )


class MadeUpTokenizer:
    """The bytes of a made-up vocabulary; prompts are token ids, so nothing is ever encoded."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = make_vocabulary(vocab_size)
        self.special_ids = frozenset([vocab_size - 1])
        self.eos_ids = frozenset([vocab_size - 1])
        self.special_tokens: dict[str, int] = {}
        self.bos_id: int | None = None
        self.pad_id: int | None = None
        self.chat_template = ChatTemplate.plain({})

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        return list(text.encode())

    def split(self, text: bytes) -> list[int]:
        return list(text)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return 0

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        return b"".join(self.token_bytes[token] for token in ids).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        return None


def tiny_shapes() -> ModelConfig:
    """Two small layers, for rehearsals."""
    return dataclasses.replace(
        smollm2_135m(), hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=4096, max_position_embeddings=16_384, attention_scale=0.25,
    )  # fmt: skip


def dummy_model(shapes: ModelConfig, device: str) -> LoadedModel:
    """Random weights of a model's shapes, drawn on the device."""
    decoder = dummy_decoder(shapes, device, torch.float32 if device == "cpu" else torch.bfloat16)
    return LoadedModel("dummy", decoder, MadeUpTokenizer(shapes.vocab_size), shapes, GenerationDefaults())


def compile_json_grammar(engine: Engine, shrink: int = 1) -> Grammar:
    """The workloads' schema for the engine's vocabulary; prints what its compiling took."""
    schema = JSON_SCHEMA | {"minItems": max(JSON_SCHEMA["minItems"] // shrink, 1)}
    start_s = time.perf_counter()
    tokenizer = engine.tokenizer
    vocabulary = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    ready_s = time.perf_counter()
    grammar = compile_constraint("json_schema", json.dumps(schema), vocabulary, **AS_MODELS_WRITE)
    compiled_s = time.perf_counter()
    is_closed = grammar.close()
    print(
        f"vocabulary {ready_s - start_s:.2f} s, grammar {compiled_s - ready_s:.3f} s, closed {is_closed} "
        f"({grammar.num_states:,} states) {time.perf_counter() - compiled_s:.2f} s",
        flush=True,
    )
    return grammar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="comma-separated, as rag@50; default: all")
    parser.add_argument("--model", default="8b", choices=["8b", "135m"], help="shapes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide chains and concurrency by this: a rehearsal")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this: a rehearsal")
    parser.add_argument("--most", type=int, default=1 << 30, help="chains of a row at most: a short profile")
    parser.add_argument("--profile", default="", help="write a Chrome trace to this file: of the last row alone")
    parser.add_argument("--row-limit", type=float, default=60.0, help="seconds after which a row has failed")
    parser.add_argument("--out", default="", help="append JSON lines to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after this time")
    parser.add_argument("--label", default="", help="what is special about this run, for the JSON lines")
    parser.add_argument("--set", action="append", default=[], help="configuration, as chunked_prefill_size=4096")
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # who got which memory, how long graphs took
    sys.exit(1 if run(parser.parse_args()) else 0)


def start(shapes: ModelConfig, config: EngineConfig) -> tuple[Engine, float, float]:
    """An engine with random weights that has generated; and the seconds until it was there, and had generated."""
    begin_s = time.perf_counter()
    engine = Engine(dummy_model(shapes, config.device), config)
    ready_s = time.perf_counter() - begin_s
    engine.generate([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), detokenize=False)
    return engine, ready_s, time.perf_counter() - begin_s


def run(args: argparse.Namespace) -> list[str]:
    """Measure and print; returns the rows that failed."""
    overrides = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    shapes = tiny_shapes() if args.tiny else llama_3_1_8b() if args.model == "8b" else smollm2_135m()
    sizes: dict[str, object] = {"context_length": 16384} if args.model == "8b" else {}
    if args.tiny:
        sizes["num_kv_tokens"] = 100_000
    config = EngineConfig.from_mapping({"device": args.device, **sizes, **overrides})
    engine, ready_s, first_s = start(shapes, config)
    start_s = time.perf_counter()
    gc.collect()
    gc.freeze()  # as a server's engine does: what the start left is not searched while requests run
    print(f"start to ready {ready_s:.1f} s, to first token {first_s:.1f} s", flush=True)
    facts: dict[str, Any] = {
        "benchmark": "gpu",
        "commit": commit(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": "tiny" if args.tiny else args.model,
        "config": overrides,
        "label": args.label,
        "ready_s": round(ready_s, 1),
        "start_s": round(first_s, 1),
    }

    def write(record: dict[str, Any]) -> str:
        line = json.dumps({**facts, **record})
        if args.out:
            with Path(args.out).open("a") as file:
                file.write(line + "\n")
        return line

    wanted = [name for name in args.rows.split(",") if name]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    grammar: Grammar | None = None
    high = min(120_000, shapes.vocab_size - 1000)
    run_row(engine, shrunk(MAKERS["unique"](8, 1, high), 8 * args.shrink), 8, None, args.row_limit)
    for kind, concurrency, count in sorted(ROWS, key=lambda row: ORDER.index(f"{row[0]}@{row[1]}")):
        name = f"{kind}@{concurrency}"
        if wanted and name not in wanted:
            continue
        if time.perf_counter() - start_s > args.seconds:
            print(f"{name}: no time left", flush=True)
            failed.append(name)
            continue
        try:
            if kind == "json" and grammar is None:
                grammar = compile_json_grammar(engine, args.shrink)
            count = min(max(count // args.scale, 1), args.most)
            chosen = grammar if kind == "json" else None
            row = measure_row(engine, kind, max(concurrency // args.scale, 1), count, high, args, chosen)
        except Exception as error:  # the other rows still tell something
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            failed.append(name)
            if isinstance(error, TimeoutError):
                faulthandler.dump_traceback()  # where the engine's thread is
                break  # what hangs would be in the way of every other row
            continue
        row["row"] = name
        base = next((other["tok_s"] for other in rows if other["row"] == f"jsonoff@{concurrency}"), None)
        if kind == "json" and base:
            row["ratio"] = round(row["tok_s"] / base, 3)
        print_row(row, is_rehearsal=args.tiny)
        rows.append(row)
        write({"row": row})
    engine.check_integrity()
    stats = {key: value for key, value in engine.stats().items() if key in ("num_steps", "num_preemptions")}
    engine.shutdown()
    gc.unfreeze()
    print(write({"rows": rows, "failed": failed, "stats": stats}))
    return failed


def measure_row(
    engine: Engine,
    kind: str,
    concurrency: int,
    count: int,
    high: int,
    args: argparse.Namespace,
    grammar: Grammar | None,
) -> dict[str, Any]:
    """Run one row of a kind; first uses of a batch size, a plan or a grammar stay out of the figures."""

    def run_kind(count: int, seed: int) -> Measured:
        workload = shrunk(MAKERS[kind](count, seed, high), args.shrink)
        return run_row(engine, workload, concurrency, grammar, args.row_limit)

    if kind in ("json", "jsonoff", "decode1"):
        run_kind(min(count, concurrency), 1)
    if not args.profile:
        return summary(kind, run_kind(count, 0))
    with start_profiler(args.device) as profiler:
        row = summary(kind, run_kind(count, 0))
    profiler.export_chrome_trace(args.profile)
    categories = ("kernel", "gpu_memcpy", "gpu_memset") if args.device != "cpu" else ("cpu_op",)
    spans = spans_of(args.profile, categories)
    print(kernel_table(spans))
    return row | ({"idle_percent": round(idle_percent(spans), 2)} if spans else {})


def start_profiler(device: str) -> Any:  # Any: torch has no public type for it
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities = [torch.profiler.ProfilerActivity.CUDA]  # the CPU's events would slow the host down
    return torch.profiler.profile(activities=activities)


def spans_of(path: str, categories: tuple[str, ...]) -> list[tuple[float, float, str]]:
    """Begin, end (us) and name of a trace's events. From the file: torch's own event lists take minutes to build."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("cat") in categories and "dur" in event]
    return sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in found)


def idle_percent(spans: list[tuple[float, float, str]]) -> float:
    """The share of the middle four fifths of a profile, where the batch is full, in which the device did nothing: it
    waited for the host."""
    low, high = spans[0][0], max(end for _, end, _ in spans)
    inner = [s for s in spans if low + 0.1 * (high - low) <= s[0] <= high - 0.1 * (high - low)]
    busy, reached = 0.0, inner[0][0] if inner else low
    first = reached
    for start, end, _ in inner:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 100 * (1 - busy / max(reached - first, 1e-9))


def kernel_table(spans: list[tuple[float, float, str]]) -> str:
    """What kernels took, in total and a step, in us; and the idle share."""
    if not spans:
        return "no kernels in the profile"
    totals: dict[str, tuple[float, int]] = {}
    for start, end, name in spans:
        time_us, count = totals.get(name, (0.0, 0))
        totals[name] = time_us + end - start, count + 1
    total = sum(time_us for time_us, _ in totals.values())
    lines = [f"device idle {idle_percent(spans):.2f} % of the middle of the profile"]
    steps = max(sum(count for name, (_, count) in totals.items() if "_commit_kernel" in name), 1)  # one a step
    lines.append(f"{steps} steps of {total / steps / 1e3:.3f} ms of kernels")
    lines.append(f"{'total ms':>10} {'share':>6} {'calls':>8} {'mean us':>9} {'us a step':>9}  kernel")
    for name, (time_us, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:40]:
        share = 100 * time_us / total
        lines.append(
            f"{time_us / 1e3:10.2f} {share:5.1f}% {count:8d} {time_us / count:9.2f} {time_us / steps:9.1f}  {name[:90]}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

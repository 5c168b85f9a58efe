"""Check and time every kernel but attention, for Llama-3.1-8B's shapes in bf16.

    PYTHONPATH=. python3 benchmarks/bench_kernels.py --out kernels.json       (at the root; about 3 minutes)
    PYTHONPATH=. python3 benchmarks/bench_kernels.py --sections check,sampling

Sections: check (each kernel against its reference on fresh random input; a failure makes the exit status 1), small
(norm, activation, rope, page copy, step inputs), sampling, masks, gemv (small-batch products against cuBLAS, over tile
sizes), gate (gate-up products of larger batches with their activation, in one kernel and in two), stack (32 layers of
products in one graph, as a decode step has them). Times are those of CUDA graph replays, each of many launches, over
rotating buffers where an operand would stay in the L2 cache; median of 7. GB/s counts each input read and each output
written once. `--dry-run` walks the same code in Triton's interpreter with toy shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import (
    BATCHES,
    DEVICE,
    DIM,
    DOT_CONFIGS,
    DRY,
    GATE_ROWS,
    HIDDEN,
    INTER,
    KV_HEADS,
    LAYERS,
    MODES,
    QKV,
    SHAPES,
    SUM_CONFIGS,
    TILE_CONFIGS,
    VOCAB,
    Record,
    integers,
    name_of,
    randn,
    random_automaton,
    rope_arguments,
    sampling_tables,
    token_table,
)  # fmt: skip
from kernel_checks import check, fits_gated
from torch import Tensor

from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import mask_classes
from ramet.kernels.grammar.mask_triton import advance_states_triton, build_masks_triton
from ramet.kernels.layers import activation, gemv, norm, rope
from ramet.kernels.layers.gemv import GemvConfig
from ramet.kernels.layers.matmul_invariant import gated_product_triton, matmul_invariant_triton
from ramet.kernels.ops import EARLY_TRITON, TRITON, Ops
from ramet.kernels.sampling.sample_triton import sample_triton
from ramet.kernels.slots import copy_pages
from ramet.kernels.slots import tables as step_inputs

L2_BYTES = 64 << 20
BATCHES_SMALL = (1, 2) if DRY else (1, 2, 4, 8)


def time_us(calls: list[Callable[[], object]], launches: int = 20) -> float:
    """Return the median time of one call, in microseconds, over replays of a graph that goes round `calls`."""
    if DRY:
        calls[0]()
        return 0.0
    total = -(-launches // len(calls)) * len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for index in range(total):
                calls[index % len(calls)]()
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / total)
    return sorted(times[2:])[3]


def copies(num_bytes: int) -> int:
    """How many operands of this size are needed so that none is found in the L2 cache."""
    return 1 if DRY else max(1, min(32, -(-2 * L2_BYTES // num_bytes)))


def small() -> list[Record]:
    records: list[Record] = []

    def measure(name: str, size: int, num_bytes: int, make: Callable[[], Callable[[], object]]) -> None:
        us = time_us([make() for _ in range(copies(num_bytes))])
        records.append({"section": "small", "name": name, "T": size, "us": us, "gbs": num_bytes / max(us, 1e-9) / 1e3})

    def run_norm(num_tokens: int) -> Callable[[], object]:
        x, residual, weight = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN), randn(HIDDEN)
        return lambda: norm.fused_add_rms_norm_triton(x, residual, weight, 1e-5)

    def run_silu(num_tokens: int) -> Callable[[], object]:
        gate_up = randn(num_tokens, 2 * INTER)
        return lambda: activation.silu_and_mul_triton(gate_up)

    def run_rope(num_tokens: int) -> Callable[[], object]:
        arguments = rope_arguments(num_tokens)
        return lambda: rope.rope_and_write_kv_triton(*arguments)

    for size in [*BATCHES, *([] if DRY else [2048, 8192])]:
        measure("fused_add_rms_norm", size, size * HIDDEN * 8, lambda size=size: run_norm(size))
        measure("silu_and_mul", size, size * INTER * 6, lambda size=size: run_silu(size))
        measure("rope_and_write_kv", size, size * QKV * 4, lambda size=size: run_rope(size))
    for batch in BATCHES:
        time_steps(batch, measure)
    for count in (1, 64):
        pages = torch.arange(1, 2 * count + 1, dtype=torch.int32, device=DEVICE).view(2, count)
        counts = torch.full((count,), 11, dtype=torch.int32, device=DEVICE)
        storage = randn(LAYERS, 2, 2 * count + 1, KV_HEADS, 16, DIM)
        copy = partial(copy_pages.copy_pages_triton, storage, pages[0], pages[1], counts)
        measure(
            f"copy_pages, {LAYERS} layers", count, count * LAYERS * 2 * KV_HEADS * 11 * DIM * 4, lambda run=copy: run
        )
    return records


def time_steps(batch: int, measure: Callable[[str, int, int, Callable[[], Callable[[], object]]], None]) -> None:
    slots, out = step_inputs.SlotTables.create(256, 1024, DEVICE), step_inputs.DecodeInputs.create(batch, DEVICE)
    rows, zeros = torch.arange(batch, dtype=torch.int32, device=DEVICE), integers(1, batch)
    updates = torch.stack((zeros, integers(16, batch), zeros), 1).contiguous()
    columns = slots.last_token, slots.kv_len

    def prepare() -> None:
        step_inputs.prepare_decode_triton(rows, zeros, *columns, slots.page_table, 16, out)

    measure("prepare_decode", batch, batch * 48, lambda: prepare)
    measure("commit_decode", batch, batch * 24, lambda: lambda: step_inputs.commit_decode_triton(rows, zeros, *columns))
    measure("scatter_rows", batch, batch * 24, lambda: lambda: step_inputs.scatter_rows_triton(updates, slots.arena))


def sampling_times() -> list[Record]:
    records = []
    arena = GrammarArena(token_table(), max(BATCHES), max_mask_rows=512, max_states=500)
    base = arena.acquire("bench", random_automaton(200))
    for batch in BATCHES:
        rows, positions = torch.arange(batch, dtype=torch.int32, device=DEVICE), integers(999, batch)
        logits = [randn(batch, VOCAB) * 3 for _ in range(2 if DRY else max(1, min(8, copies(batch * VOCAB * 2))))]
        for mode, columns in [*MODES.items(), ("temperature, grammar", {"temperature": 0.8})]:
            tables = sampling_tables(batch, **columns)
            state = integers(200, batch + 1) + base
            if "grammar" in mode:
                tables = dataclasses.replace(tables, grammar=arena.masks(state))
            us = time_us([lambda x=x, t=tables: sample_triton(x, t, rows, positions) for x in logits])  # noqa: B023
            records.append({"section": "sampling", "name": mode, "B": batch, "us": us})
        tokens = sample_triton(logits[0], tables, rows, positions)
        us = time_us([lambda: advance_states_triton(rows, tokens, state, arena.automata, arena.tokens)])  # noqa: B023
        records.append({"section": "sampling", "name": "advance_states", "B": batch, "us": us})
        us = time_us([lambda x=x: x.argmax(-1) for x in logits])
        records.append({"section": "sampling", "name": "torch.argmax", "B": batch, "us": us})
    return records


def masks() -> list[Record]:
    records = []
    tokens = token_table()
    for num_states in (20,) if DRY else (256, 4096, 12_000):
        automaton = random_automaton(num_states)
        started = time.perf_counter()
        _, representative = mask_classes(automaton.transitions, automaton.accepting, tokens.longest)
        classes_ms = (time.perf_counter() - started) * 1e3
        arena = GrammarArena(tokens, 8, max_states=num_states, max_mask_rows=num_states)
        started = time.perf_counter()
        base = arena.acquire("bench", automaton)
        if not DRY:
            torch.cuda.synchronize()
        acquire_ms = (time.perf_counter() - started) * 1e3
        states = torch.arange(base, base + num_states, dtype=torch.int32, device=DEVICE)
        out = torch.empty((num_states, -(-VOCAB // 32)), dtype=torch.int32, device=DEVICE)
        us = time_us([lambda: build_masks_triton(states, arena.automata, tokens, out)], launches=2)  # noqa: B023
        facts = {"classes": len(representative), "classes_ms": classes_ms, "acquire_ms": acquire_ms}
        records.append({"section": "masks", "name": "build_masks", "states": num_states, "us": us, **facts})
    return records


def try_config(run: Callable[[], Tensor], calls: list[Callable[[], object]]) -> float | str:
    """Time a configuration; a tile that does not fit the card is an answer, too."""
    try:
        run()
        return time_us(calls)
    except Exception as error:  # Triton raises its own types for resources; the message is reported
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def gemv_times() -> list[Record]:
    records: list[Record] = []
    for shape, (num_outputs, depth) in SHAPES.items():
        num_bytes = num_outputs * depth * 2
        weights = [randn(num_outputs, depth) for _ in range(copies(num_bytes))]
        for batch in BATCHES_SMALL:
            x = randn(batch, depth)
            us = time_us([lambda w=w: F.linear(x, w) for w in weights])  # noqa: B023
            records.append(gemv_record(shape, batch, "cuBLAS", us, num_bytes))
            us = time_us([lambda w=w: matmul_invariant_triton(x, w) for w in weights])  # noqa: B023
            records.append(gemv_record(shape, batch, "batch-invariant", us, num_bytes))
            for config in (SUM_CONFIGS if batch == 1 else []) + DOT_CONFIGS:
                calls = [lambda w=w, c=config: gemv.gemv_triton(x, w, config=c) for w in weights]  # noqa: B023
                us_or_error = try_config(calls[0], calls)
                records.append(gemv_record(shape, batch, config, us_or_error, num_bytes))
                if shape == "gate_up" and fits_gated(config):
                    calls = [lambda w=w, c=config: gemv.gemv_silu_and_mul_triton(x, w, config=c) for w in weights]  # noqa: B023
                    us_or_error = try_config(calls[0], calls)
                    records.append(gemv_record("gate_up+silu", batch, config, us_or_error, num_bytes))
            if shape == "gate_up":
                us = time_us([lambda w=w: activation.silu_and_mul_triton(F.linear(x, w)) for w in weights])  # noqa: B023
                records.append(gemv_record("gate_up+silu", batch, "cuBLAS", us, num_bytes))
    return records


def gate_times() -> list[Record]:
    """The gate-up product of larger batches with the activation behind it: in one kernel, and cuBLAS and a kernel."""
    records, shape = [], "gate_up+silu"
    num_bytes = SHAPES["gate_up"][0] * SHAPES["gate_up"][1] * 2
    weights = [randn(*SHAPES["gate_up"]) for _ in range(copies(num_bytes))]
    for rows in GATE_ROWS:
        x = randn(rows, HIDDEN)
        us = time_us([lambda w=w: activation.silu_and_mul_triton(F.linear(x, w)) for w in weights])  # noqa: B023
        records.append({**gemv_record(shape, rows, "cuBLAS", us, num_bytes), "section": "gate"})
        for config in TILE_CONFIGS:
            calls = [lambda w=w, c=config: gated_product_triton(x, w, c) for w in weights]  # noqa: B023
            record = gemv_record(shape, rows, config, try_config(calls[0], calls), num_bytes)
            records.append({**record, "section": "gate"})
    return records


def gemv_record(shape: str, batch: int, config: GemvConfig | str, us: float | str, num_bytes: int) -> Record:
    name = config if isinstance(config, str) else name_of(config)
    outputs, depth = SHAPES[shape.removesuffix("+silu")]
    outputs = outputs // 2 if shape.endswith("+silu") else outputs
    record: Record = {
        "section": "gemv", "shape": shape, "outputs": outputs, "depth": depth, "B": batch, "name": name,
    }  # fmt: skip
    if isinstance(config, GemvConfig):
        record["config"] = dataclasses.astuple(config)
    if isinstance(us, str):
        return {**record, "us": None, "error": us}
    return {**record, "us": us, "gbs": num_bytes / max(us, 1e-9) / 1e3}


def best_config(records: list[Record], shape: str, batch: int) -> GemvConfig | None:
    mine = [
        r
        for r in records
        if (r["section"], r.get("shape"), r.get("B")) == ("gemv", shape, batch) and r["us"] is not None
    ]
    mine = [r for r in mine if "config" in r]
    return GemvConfig(*min(mine, key=lambda r: r["us"])["config"]) if mine else None


def stack(gemv_records: list[Record]) -> list[Record]:
    """All products of a decode step in one graph, every layer with its own weights: cuBLAS, ours, ours folded."""
    weights = [{name: randn(*SHAPES[name]) for name in ("qkv", "o", "gate_up", "down")} for _ in range(LAYERS)]
    head, gain = randn(*SHAPES["head"]), randn(HIDDEN)
    num_bytes = 2 * (LAYERS * sum(SHAPES[n][0] * SHAPES[n][1] for n in weights[0]) + VOCAB * HIDDEN)
    records: list[Record] = []
    for batch in BATCHES_SMALL:
        x, inter, attended = randn(batch, HIDDEN), randn(batch, INTER), randn(batch, HIDDEN)
        chosen = {name: best_config(gemv_records, name, batch) for name in [*SHAPES, "gate_up+silu"]}

        def products(multiply: Callable[[str, Tensor, Tensor], object], x: Tensor = x, inter: Tensor = inter) -> None:
            for layer in weights:
                for name in ("qkv", "o", "gate_up", "down"):
                    multiply(name, inter if name == "down" else x, layer[name])
            multiply("head", x, head)

        def separate(ops: Ops, x: Tensor = x, attended: Tensor = attended) -> None:
            residual = x
            for layer in weights:
                normed, residual = ops.fused_add_rms_norm(x, residual, gain, 1e-5, None)
                F.linear(normed, layer["qkv"])
                normed, residual = ops.fused_add_rms_norm(F.linear(attended, layer["o"]), residual, gain, 1e-5, None)
                x = F.linear(ops.silu_and_mul(F.linear(normed, layer["gate_up"])), layer["down"])
            F.linear(ops.fused_add_rms_norm(x, residual, gain, 1e-5, None)[0], head)

        def folded(early: bool, x: Tensor = x, attended: Tensor = attended, chosen: Any = chosen) -> None:
            cut = {k: dataclasses.replace(v, early_launch=early) if v else None for k, v in chosen.items()}
            for layer in weights:
                gemv.gemv_triton(x, layer["qkv"], None, None, gain, 1e-5, cut["qkv"])
                x = gemv.gemv_triton(attended, layer["o"], None, x, None, 1e-5, cut["o"])
                wide = gemv.gemv_silu_and_mul_triton(x, layer["gate_up"], gain, 1e-5, cut["gate_up+silu"])
                x = gemv.gemv_triton(wide, layer["down"], None, x, None, 1e-5, cut["down"])
            gemv.gemv_triton(x, head, None, None, gain, 1e-5, cut["head"])

        def ours(early: bool, chosen: Any = chosen) -> Callable[[], None]:
            cut = {k: dataclasses.replace(v, early_launch=early) if v else None for k, v in chosen.items()}
            return lambda: products(lambda n, a, w: gemv.gemv_triton(a, w, config=cut[n]))

        variants: dict[str, Callable[[], None]] = {
            "products, cuBLAS": lambda: products(lambda _, a, w: F.linear(a, w)),
            "products, ours": ours(False),
            "products, ours, early launch": ours(True),
            "with norm, silu, residual: cuBLAS + kernels": lambda: separate(TRITON),
            "with norm, silu, residual: cuBLAS + kernels, early launch": lambda: separate(EARLY_TRITON),
            "with norm, silu, residual: folded": lambda: folded(False),
            "with norm, silu, residual: folded, early launch": lambda: folded(True),
        }
        if DRY:
            variants = {name: run for name, run in variants.items() if "early" not in name}
        for name, run in variants.items():
            us = time_us([run], launches=1)
            records.append(
                {"section": "stack", "name": name, "B": batch, "us": us, "gbs": num_bytes / max(us, 1e-9) / 1e3}
            )
    return records


def precompile(share: int, num_workers: int) -> None:
    """Compile every product's configuration once into Triton's disk cache; worker `share` of `num_workers`."""
    x1, x2, x16 = (randn(batch, 4096) for batch in (1, 2, 16))
    weight, gain = randn(4096, 4096), randn(4096)
    wide = randn(512, 4096)
    for config in TILE_CONFIGS[share::num_workers]:
        try:
            gated_product_triton(wide, weight, config)
        except Exception as error:  # reported with its configuration by the timing pass
            print(f"compile {name_of(config)}: {error}", file=sys.stderr)
    for config in (SUM_CONFIGS + DOT_CONFIGS)[share::num_workers]:
        for x in (x1,) if config.kernel == "sum" else (x1, x2, x16):
            try:
                gemv.gemv_triton(x, weight, config=config)
                if x is not x16:
                    gemv.gemv_triton(x, weight, None, x, gain, 1e-5, config)
                if fits_gated(config):
                    gemv.gemv_silu_and_mul_triton(x, weight, config=config)
                    if x is not x16:
                        gemv.gemv_silu_and_mul_triton(x, weight, gain, 1e-5, config)
            except Exception as error:  # reported with its configuration by the timing pass
                print(f"compile {name_of(config)}: {error}", file=sys.stderr)


def print_table(records: list[Record]) -> None:
    checks = [r for r in records if r["section"] == "check"]
    if checks:
        failed = [r for r in checks if not r["ok"]]
        print(f"check: {len(checks) - len(failed)} of {len(checks)} right")
        for record in failed:
            print(f"  FAILED {record['name']}: error {record['error']:.3g}, limit {record['limit']:.3g}")
            print(f"    {record['where']}")
    for section in ("small", "sampling"):
        names = dict.fromkeys(r["name"] for r in records if r["section"] == section)
        for name in names:
            cells = [r for r in records if r["section"] == section and r["name"] == name]
            rate = [
                f"{r.get('T', r.get('B'))}: {r['us']:.1f}" + (f" ({r['gbs']:.0f})" if "gbs" in r else "") for r in cells
            ]
            print(f"{name:38s} us (GB/s) at size  " + "   ".join(rate))
    for r in records:
        if r["section"] == "masks":
            print(f"build_masks {r['states']:6d} states {r['us'] / 1e3:8.2f} ms; {r['classes']} classes found in "
                  f"{r['classes_ms']:.0f} ms; resident after {r['acquire_ms']:.0f} ms")  # fmt: skip
    groups = dict.fromkeys((r["section"], r["shape"], r["B"]) for r in records if r["section"] in ("gemv", "gate"))
    for section, shape, batch in groups:
        mine = [r for r in records if (r["section"], r.get("shape"), r.get("B")) == (section, shape, batch)]
        base = next(r for r in mine if r["name"] == "cuBLAS")
        ranked = sorted((r for r in mine if "config" in r and r["us"] is not None), key=lambda r: r["us"])[:3]
        text = "   ".join(f"{r['name']} {r['us']:.1f} ({r['gbs']:.0f})" for r in ranked)
        print(f"{shape:13s} B={batch:<3d} cuBLAS {base['us']:.1f} ({base['gbs']:.0f}) | {text}")
    for r in records:
        if r["section"] == "stack":
            print(f"stack B={r['B']} {r['name']:50s} {r['us'] / 1e3:.3f} ms  {r['gbs']:.0f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="check,small,sampling,masks,gemv,gate,stack")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no section after this time")
    parser.add_argument("--precompile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.precompile is not None:
        precompile(args.precompile, args.workers)
        return
    sections = args.sections.split(",")
    started = time.perf_counter()
    if not DRY and {"check", "gemv", "stack"} & set(sections):
        command = [sys.executable, __file__, "--workers", str(args.workers), "--precompile"]
        workers = [subprocess.Popen([*command, str(share)]) for share in range(args.workers)]
        for worker in workers:
            worker.wait()
        print(f"compiled ahead in {time.perf_counter() - started:.0f} s", flush=True)
    records: list[Record] = []
    broken: list[str] = []
    runs: dict[str, Callable[[], list[Record]]] = {
        "check": check, "small": small, "sampling": sampling_times, "masks": masks, "gemv": gemv_times,
        "gate": gate_times,
        "stack": lambda: stack(records),
    }  # fmt: skip
    device = "cpu" if DRY else torch.cuda.get_device_name()
    for section in sections:
        begun = time.perf_counter()
        if begun - started > args.seconds:
            print(f"{section}: no time left", flush=True)
            continue
        try:
            records += runs[section]()
        except Exception as error:  # the other sections still tell something
            traceback.print_exc()
            print(f"{section}: {type(error).__name__}: {error}", flush=True)
            broken.append(section)
        if args.out:  # after every section: an early end leaves what there is
            args.out.write_text(json.dumps({"benchmark": "kernels", "device": device, "records": records}))
        if not DRY:
            torch.cuda.empty_cache()
        print(f"{section} took {time.perf_counter() - begun:.0f} s", flush=True)
    print_table(records)
    result = {
        "benchmark": "kernels",
        "device": device,
        "torch": torch.__version__,
        "seed": args.seed,
        "records": records,
    }
    if args.out:
        args.out.write_text(json.dumps(result))
    failed = broken + [r["name"] for r in records if r["section"] == "check" and not r["ok"]]
    print(json.dumps({**{k: v for k, v in result.items() if k != "records"}, "failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Whether kernels whose programs or launches work together give the same bits every time; part of `bench_kernels.py`.

Two places depend on the order in which memory is seen: the last program of a row merges what the others left (decode
with parts, alone and behind a tree's shared part), and launches that begin before their predecessor ends (early
launch). Neither adds in an order that timing decides, so one differing bit is a race. On a GPU other work runs beside,
so that programs meet in many orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from kernel_cases import DEVICE, DIM, DOT_CONFIGS, DRY, DTYPE, HEADS, HIDDEN, KV_HEADS, SUM_CONFIGS, integers, randn
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.plan import tree_config
from ramet.kernels.attention.tree import SharedSegment, TreePlan, plan_tree
from ramet.kernels.attention.tree_triton import attention_tree_triton
from ramet.kernels.layers import gemv
from ramet.kernels.ops import EARLY_TRITON, TRITON

_REPEATS = 2 if DRY else 200
_CHAIN = 3 if DRY else 24
_PAGE = 16
_SHARED_PAGES = 2 if DRY else 64
_MOST_PAGES = 6 if DRY else 256

Report = Callable[[str, float, float], None]  # name, error, limit


def check_races(record: Report) -> None:
    check_merges(record)
    for num_rows in (1, 3):
        check_early_launch(record, num_rows)
        check_early_norms(record, num_rows)


def check_merges(record: Report) -> None:
    """Rows of very different lengths, whose parts end at different times; the counters must be zero after each."""
    lens = torch.randint(1, _MOST_PAGES * _PAGE, (6,))
    lens[:3] = lens[:3].clamp(min=_SHARED_PAGES * _PAGE + 1)  # those that share pages
    table = integers(_MOST_PAGES * 6, 6, _MOST_PAGES) + 1
    table[1:3, :_SHARED_PAGES] = table[0, :_SHARED_PAGES]
    caches = randn(_MOST_PAGES * 6 + 1, KV_HEADS, _PAGE, DIM), randn(_MOST_PAGES * 6 + 1, KV_HEADS, _PAGE, DIM)
    counters = torch.zeros(6 * KV_HEADS, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)
    meta = DecodeMetadata(lens.to(DEVICE, torch.int32), rows, table, 8, True, merge_counters=counters)
    q, group = randn(6, HEADS, DIM), HEADS // KV_HEADS
    config = tree_config(DIM, DTYPE, group)
    plan = TreePlan(6, config, torch.device(DEVICE))
    shared = SharedSegment(0, 0, _SHARED_PAGES * _PAGE, np.arange(3, dtype=np.int32))
    plan.load(plan_tree([shared], 6, group, KV_HEADS, config, 8 * KV_HEADS))
    runs = {
        "decode": lambda: attention_decode_triton(q, *caches, meta, DIM**-0.5),
        "tree": lambda: attention_tree_triton(q, *caches, meta, plan, DIM**-0.5),
    }
    for name, run in runs.items():
        record(f"{name}, parts merged by their last: other bits", repeated(run), 0)
        record(f"{name}, parts merged by their last: counters left", int(counters.count_nonzero()), 0)


def repeated(run: Callable[[], Tensor]) -> int:
    """How many of many runs differ from the first."""
    expected = run().clone()
    work = Beside()
    results = []
    for _ in range(_REPEATS):
        work.begin()
        results.append(run())
    return sum(not torch.equal(result, expected) for result in results)


def check_early_launch(record: Report, num_rows: int) -> None:
    """A chain whose every product reads the two before it: results of a graph against launches one by one."""
    configs = SUM_CONFIGS if num_rows == 1 else DOT_CONFIGS
    config = replace(configs[4 if num_rows == 1 and not DRY else 0], early_launch=not DRY)
    weights = [randn(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(4)]
    first, second, gain = randn(num_rows, HIDDEN), randn(num_rows, HIDDEN), randn(HIDDEN)
    kept = torch.zeros_like(first)

    def chain(after_each: Callable[[], None] = lambda: None) -> Tensor:
        before, x = first, second
        for step in range(_CHAIN):
            # What is not referred to any more is memory for the next product: reads and writes of one address follow.
            before, x = x, gemv.gemv_triton(x, weights[step % 4], None, before, gain, 1e-5, config)
            if step % 8 == 7:
                kept.copy_(x)  # in a graph a node that is no kernel, as a step has one in front of its last product
            after_each()
        return x + kept

    _compare_replays(record, f"early launch B={num_rows}: other bits", chain)


def check_early_norms(record: Report, num_rows: int) -> None:
    """A chain of norms and activations: each reads what the two before it wrote, and writes where they read."""
    ops = TRITON if DRY else EARLY_TRITON
    x, residual, gain = randn(num_rows, HIDDEN), randn(num_rows, HIDDEN), randn(HIDDEN)

    def chain(after_each: Callable[[], None] = lambda: None) -> Tensor:
        y, total = x, residual
        for _ in range(_CHAIN):
            y, total = ops.fused_add_rms_norm(y, total, gain, 1e-5, None)
            after_each()
            y = ops.silu_and_mul(torch.cat((y, total), dim=1))
            after_each()
        return y + total

    _compare_replays(record, f"early norms T={num_rows}: other bits", chain)


def _compare_replays(record: Report, what: str, chain: Callable[..., Tensor]) -> None:
    """Replay a chain of kernels as a graph, other work beside it, and count the results that differ from those of
    kernels which each ran alone. `chain`: calls its argument, if it gets one, after each kernel.
    """
    if DRY:
        record(what, int(not torch.equal(chain(), chain())), 0)
        return
    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = chain()
    work, differing = Beside(), 0
    for _ in range(_REPEATS):
        actual.fill_(torch.nan)
        work.begin()
        graph.replay()
        differing += not torch.equal(actual, expected)
    record(what, differing, 0)


class Beside:
    """Work on another stream, each time another amount, that takes processors from what is checked."""

    def __init__(self) -> None:
        self._stream = None if DRY else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._x = randn(64, 64) if DRY else randn(1024, 1024)
        self._times = 0

    def begin(self) -> None:
        self._times += 1
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                size = 128 * (1 + self._times % 8)
                torch.mm(self._x[:size], self._x)

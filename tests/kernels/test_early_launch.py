"""Kernels that are launched early give the bits of the others, and touch nothing but weights before they wait."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.plan import TileConfig
from ramet.kernels.attention.tree import SharedSegment, TreePlan, plan_tree
from ramet.kernels.attention.tree_triton import attention_tree_triton
from ramet.kernels.layers.activation import gelu_tanh_and_mul_triton, silu_and_mul_triton
from ramet.kernels.layers.norm import fused_add_rms_norm_triton, rms_norm_triton
from ramet.kernels.layers.rope import rope_and_write_kv_triton

# These tests watch Triton's interpreter, which does not run where there is a card. There, `check_early_norms` and
# `check_early_launch` of benchmarks/race_checks.py compare real launches in a graph, with other work beside them.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what waits is shown in Triton's interpreter")
MODULES = ["layers.norm", "layers.activation", "layers.rope"]
MODULES += ["attention.decode_triton", "attention.extend_triton", "attention.tree_triton"]
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)


def norm() -> tuple[Callable[[bool], Any], list[Tensor]]:
    x, weight = torch.randn(3, 40), torch.randn(40)
    return lambda early: rms_norm_triton(x, weight, 1e-5, None, early), [weight]


def added_norm() -> tuple[Callable[[bool], Any], list[Tensor]]:
    x, residual, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    return lambda early: fused_add_rms_norm_triton(x, residual, weight, 1e-5, None, early), [weight]


def silu() -> tuple[Callable[[bool], Any], list[Tensor]]:
    gate_up = torch.randn(3, 80)
    return lambda early: silu_and_mul_triton(gate_up, early), []


def gelu() -> tuple[Callable[[bool], Any], list[Tensor]]:
    gate_up = torch.randn(3, 80)
    return lambda early: gelu_tanh_and_mul_triton(gate_up, early), []


def rope() -> tuple[Callable[[bool], Any], list[Tensor]]:
    q, k, v = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    angles, places = torch.randn(50, 16), torch.tensor([4, 20, 7], dtype=torch.int32)

    def run(early: bool) -> tuple[Tensor, Tensor]:
        caches = torch.zeros(2, 4, 2, 16, 32)
        k_cache, v_cache = caches
        return rope_and_write_kv_triton(
            q, k, v, angles, angles, places, places, k_cache, v_cache, early_launch=early
        ), caches

    return run, []


def decode(cases: Any) -> Callable[[bool], Tensor]:
    lens = [5, 70, 33]
    k, v, table, rows = cases.paged_cache(lens, 2, 32)
    q, kv_lens = torch.randn(3, 4, 32), torch.tensor(lens, dtype=torch.int32)
    meta = DecodeMetadata(kv_lens, rows, table, 4, merge_counters=torch.zeros(6, dtype=torch.int32))
    return lambda early: attention_decode_triton(q, k, v, meta, 0.2, config=TILE, early_launch=early)


def extend(cases: Any) -> Callable[[bool], Tensor]:
    lens = [5, 40]
    k, v, table, rows = cases.paged_cache(lens, 2, 32)
    kv_lens, starts = torch.tensor(lens, dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)
    meta = ExtendMetadata(starts, kv_lens, rows, table, 7, 40, [5, 7], lens)
    q = torch.randn(12, 4, 32)
    return lambda early: attention_extend_triton(q, k, v, meta, 0.2, config=TILE, early_launch=early)


def tree(cases: Any) -> Callable[[bool], Tensor]:
    lens = [70, 50]
    k, v, table, rows = cases.paged_cache(lens, 2, 32)
    table[rows[1], :2] = table[rows[0], :2]
    plan = TreePlan(2, TILE, torch.device("cpu"), max_items=8, max_slots=16)
    plan.load(plan_tree([SharedSegment(0, 0, 32, torch.tensor([0, 1]).int().numpy())], 2, 2, 2, TILE, 2, 8, 16))
    q, kv_lens = torch.randn(2, 4, 32), torch.tensor(lens, dtype=torch.int32)
    meta = DecodeMetadata(kv_lens, rows, table, 4, False, plan, merge_counters=torch.zeros(4, dtype=torch.int32))
    return lambda early: attention_tree_triton(q, k, v, meta, plan, 0.2, None, TILE, early)


@pytest.mark.parametrize("make", [norm, added_norm, silu, gelu, rope, decode, extend, tree])
def test_a_kernel_waits_before_it_reads_what_others_write(
    cases: Any, launch_watch: Any, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    run, constants = (make(cases), []) if make in (decode, extend, tree) else make()
    expected = run(False)
    waits, early = 0, set[int]()

    def wait() -> None:
        nonlocal waits, early
        waits += 1
        program = launch_watch._program
        early |= {int(a) for _, number, _, _, found in launch_watch._accesses if number == program for a in found}

    for name in MODULES:
        monkeypatch.setattr(import_module(f"ramet.kernels.{name}"), "wait_for_previous", wait)
    actual = run(True)
    assert waits, "it does not wait"
    known = {address for t in constants for address in range(t.data_ptr(), t.data_ptr() + t.nbytes)}
    assert early <= known
    assert bool(early) == bool(constants)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        assert torch.equal(a, b)

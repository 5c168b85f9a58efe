"""Sharing out a GPU's memory: what is left for KV, and errors that say which knob to turn, and how far."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ramet.errors import OutOfMemory
from ramet.runtime.engine import factory
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.steps.cuda_graph import GraphKey
from ramet.runtime.steps.memory import MemoryPlan, MemoryReading, lower_fraction, plan_memory
from ramet.runtime.steps.model_runner import ModelRunner

GIB = 1 << 30
PAGE = 2 << 20
READING = MemoryReading(total=80 * GIB, free=62 * GIB, reserved=17 * GIB, allocated=16 * GIB)
STEPS = {"workspace": 2 * GIB, "graphs": 1 * GIB}


def plan(reading: MemoryReading = READING, steps: dict[str, int] = STEPS, fraction: float = 0.9) -> MemoryPlan:
    return plan_memory(reading, **steps, fraction=fraction, page_bytes=PAGE)


def test_the_pool_takes_what_the_fraction_leaves() -> None:
    made = plan()
    # 72 GiB, less 1 of others, 16 of weights, 1 of graphs and 2 of workspace
    assert made.num_pages - 1 == 52 * GIB // PAGE
    assert made.weights + made.kv + made.graphs + made.workspace + made.others <= 0.9 * 80 * GIB + PAGE
    assert str(made).startswith("weights 16.00, KV 52.00, graphs 1.00, workspace 2.00, others 1.00, unused 8.00 of 80")


def test_what_the_allocator_has_cached_is_not_counted_against_the_pool() -> None:
    more_cached = replace(READING, reserved=20 * GIB, free=59 * GIB)
    assert plan(more_cached).num_pages == plan().num_pages


def test_too_low_a_fraction_names_the_one_that_fits() -> None:
    with pytest.raises(OutOfMemory, match=r"raise --mem-fraction-static from 0\.2 to at least") as caught:
        plan(fraction=0.2)
    needed = re.search(r"at least (\d\.\d\d)", str(caught.value))
    assert needed is not None
    assert plan(fraction=float(needed[1])).num_pages > 64


def test_a_workspace_that_leaves_nothing_names_the_prefill_size() -> None:
    with pytest.raises(OutOfMemory, match="--chunked-prefill-size"):
        plan(steps={"workspace": 62 * GIB, "graphs": GIB})


def test_graphs_that_leave_nothing_name_their_flag() -> None:
    with pytest.raises(OutOfMemory, match="--no-cuda-graph"):
        plan(steps={"workspace": GIB, "graphs": 63 * GIB})


def test_weights_that_leave_nothing_need_another_card() -> None:
    full = MemoryReading(total=80 * GIB, free=GIB, reserved=78 * GIB, allocated=78 * GIB)
    with pytest.raises(OutOfMemory, match="a smaller model or a larger GPU"):
        plan(full)


def test_a_wanted_pool_is_given_or_refused_with_the_share_that_fits() -> None:
    asked = 20 * GIB // PAGE
    assert plan_memory(READING, **STEPS, fraction=0.9, page_bytes=PAGE, num_pages=asked).num_pages == asked
    with pytest.raises(OutOfMemory, match=r"lower --num-kv-tokens, of which at most \d+ % fit"):
        plan_memory(READING, **STEPS, fraction=0.9, page_bytes=PAGE, num_pages=70 * GIB // PAGE)


def test_running_out_in_spite_of_the_plan_lowers_the_fraction() -> None:
    made = plan()
    assert "lower --mem-fraction-static from 0.9 to 0.86" in lower_fraction(0.9, made)
    assert "--max-running-requests" in lower_fraction(0.11, made)


class CountedGraphs:
    """Stands in for step graphs: a capture takes memory of the driver, the first ones more, and fills a shared pool."""

    def __init__(self, used: dict[str, int]) -> None:
        self.used = used
        self.captured: list[object] = []

    def keys(self, *, with_tree: bool) -> list[GraphKey]:
        sizes: list[GraphKey] = []
        for uses_tree in (False, True) if with_tree else (False,):
            sizes += [GraphKey(4, n, uses_tree) for n in (64, 32, 16)]
            sizes += [GraphKey(n, 0, uses_tree) for n in (8, 4, 2)]
        return sizes

    def capture(self, keys: list[GraphKey]) -> None:
        for key in keys:
            self.captured.append(key)
            self.used["others"] += (3 << 20) + (0 if self.used["others"] else GIB)  # libraries' kernels come once
            size = key.num_tokens or key.num_decode
            self.used["pool"] = max(self.used["pool"], (size + 1000 * key.uses_tree) << 20)


@pytest.mark.parametrize("with_tree", [False, True])
def test_graphs_cost_their_shared_pool_and_what_each_adds(with_tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"others": 0, "pool": 0}
    graphs = CountedGraphs(used)

    def read(device: object) -> MemoryReading:
        return MemoryReading(80 * GIB, 80 * GIB - used["others"] - used["pool"], used["pool"], used["pool"])

    monkeypatch.setattr(factory, "read_cuda_memory", read)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    runner = SimpleNamespace(
        device=None, tree=object() if with_tree else None, make_graphs=lambda max_extend: SimpleNamespace(graphs=graphs)
    )
    size = factory.measure_graphs(cast(ModelRunner, runner), EngineConfig())
    largest_pool = (1064 if with_tree else 64) << 20
    assert size == largest_pool + (3 << 20) * len(graphs.keys(with_tree=with_tree))
    assert len(graphs.captured) == (8 if with_tree else 4)

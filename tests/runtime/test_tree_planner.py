"""The tree planner: plans follow membership, cover shared pages only, and are the same rows' plain attention."""

from __future__ import annotations

import numpy as np
import torch

from ramet.runtime.models.config import llama_3_1_8b
from ramet.runtime.tree_planner import TreePlanner
from ramet.runtime.types import Request, SamplingParams, ScheduledSequence, Sequence

PAGE = 16


def planner(mode: str = "on") -> TreePlanner:
    return TreePlanner(
        llama_3_1_8b(),
        PAGE,
        64,
        mode="auto" if mode == "auto" else "on",
        num_sms=132,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


def row(name: str, shared: list[int], own: list[int], length: int) -> ScheduledSequence:
    request = Request(name, np.ones(length, dtype=np.int32), SamplingParams(), 1000)
    sequence = Sequence(request, page_ids=[*shared, *own], num_shared_pages=len(shared), num_computed=length)
    return ScheduledSequence(sequence, length, 1, True, True)


def test_rows_that_share_pages_get_one_segment_and_their_suffixes_begin_behind_it() -> None:
    prefix = list(range(1, 129))
    items = tuple(row(f"r{i}", [*prefix, 500 + i], [700 + i], 129 * PAGE + 5) for i in range(6))
    made = planner()
    plan = made.update(items)
    assert plan is not None
    assert plan.kv_starts[:6].tolist() == [128 * PAGE] * 6
    keys = {(first, stop) for _, first, stop, _, _ in plan.items[: int(plan.num_items)].tolist()}
    assert min(first for first, _ in keys) == 0
    assert max(stop for _, stop in keys) == 128 * PAGE


def test_a_plan_is_kept_while_the_rows_are_the_same_and_made_anew_when_they_change() -> None:
    prefix = list(range(1, 129))
    items = [row(f"r{i}", prefix, [700 + i], 128 * PAGE + 5) for i in range(6)]
    made = planner()
    made.update(tuple(items))
    later = tuple(item._replace(start=item.start + 7) for item in items)
    made.update(later)
    assert made.num_plans == 1
    made.update(tuple(items[:4]))
    assert made.num_plans == 2
    assert made.plan.kv_starts[:6].tolist() == [128 * PAGE] * 4 + [0, 0]


def test_rows_without_anything_in_common_get_no_plan() -> None:
    items = tuple(row(f"r{i}", [10 * i + 1, 10 * i + 2], [700 + i], 2 * PAGE + 5) for i in range(4))
    assert planner().update(items) is None


def test_pages_that_sequences_own_are_never_taken_for_shared() -> None:
    items = tuple(row(f"r{i}", [], [1, 2, 3], 2 * PAGE + 5) for i in range(4))
    assert planner().update(items) is None


def test_auto_leaves_a_small_group_plain_and_takes_a_large_one() -> None:
    few = tuple(row(f"r{i}", [1, 2], [700 + i], 2 * PAGE + 5) for i in range(2))
    assert planner("auto").update(few) is None
    prefix = list(range(1, 513))
    many = tuple(row(f"r{i}", prefix, [700 + i], 512 * PAGE + 5) for i in range(64))
    assert planner("auto").update(many) is not None


def test_a_new_sequence_in_the_place_of_an_old_one_gets_a_new_plan() -> None:
    """A plan goes by the sequences, not by their ids: CPython gives a freed object's address to the next one."""
    prefix = list(range(1, 129))
    made = planner()
    items = tuple(row(f"r{i}", prefix, [700 + i], 128 * PAGE + 5) for i in range(3))
    made.update(items)
    ids = {id(item.sequence) for item in items}
    del items
    others = [row(f"s{i}", [900 + i], [800 + i], PAGE + 5) for i in range(3)]
    assert not {id(item.sequence) for item in others} & ids, "the planner must keep the rows of its plan alive"
    assert made.update(tuple(others)) is None

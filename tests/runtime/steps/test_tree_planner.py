"""The tree planner: plans follow membership, cover shared pages only, and are the same rows' plain attention."""

from __future__ import annotations

import numpy as np
import torch

from ramet.kernels.attention.plan import TreeCosts
from ramet.runtime.models.config import llama_3_1_8b
from ramet.runtime.steps.tree_planner import TreePlanner
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
    return ScheduledSequence(sequence, length, 1, 1)


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


def simulated(rng: np.random.Generator) -> list[ScheduledSequence]:
    """Rows of a random tree: some share a prefix, some of these a longer one; others stand alone."""
    next_page = 1
    rows: list[ScheduledSequence] = []

    def pages(count: int) -> list[int]:
        nonlocal next_page
        next_page += count
        return list(range(next_page - count, next_page))

    for _ in range(int(rng.integers(1, 5))):
        root = pages(int(rng.choice([0, 1, 8, 32, 128, 512])))
        for _ in range(int(rng.integers(1, 4))):
            inner = root + pages(int(rng.choice([0, 4, 64])))
            for _ in range(int(rng.choice([1, 2, 3, 8, 20]))):
                if len(rows) == 64:
                    return rows
                mine = inner + pages(int(rng.integers(0, 3)))
                own = pages(1 + int(rng.integers(0, 40)))
                length = (len(mine) + len(own)) * PAGE - int(rng.integers(1, PAGE))
                rows.append(row(f"r{len(rows)}", mine, own, length))
    return rows


def test_a_plan_is_never_predicted_slower_than_plain_attention_and_covers_what_is_shared() -> None:
    rng = np.random.default_rng(0)
    made, taken = planner("auto"), 0
    model = made._costs
    for _ in range(150):
        rows = simulated(rng)
        plan = made.update(tuple(rows))
        plain_s = sum(model.plain_s(1, item.start + 1) for item in rows)
        if plan is None:
            continue
        taken += 1
        starts = plan.kv_starts[: len(rows)].tolist()
        items = plan.items[: int(plan.num_items)].tolist()
        members = plan.members.tolist()
        spans: dict[tuple[int, ...], int] = {}  # members of a tile -> tokens
        covered = [0] * len(rows)
        for representative, first, stop, begin, count in items:
            group = members[begin : begin + count]
            assert representative in group or count < 64
            for member in group:
                covered[member] += stop - first
                pages = [rows[r].sequence.page_ids[first // PAGE : stop // PAGE] for r in (member, representative)]
                assert pages[0] == pages[1], "a member reads keys that are not its own"
            spans[tuple(group)] = spans.get(tuple(group), 0) + stop - first
        assert covered == starts
        assert all(start <= item.start for start, item in zip(starts, rows, strict=True)), "never the last token"
        suffix_s = sum(model.plain_s(1, item.start + 1 - start) for item, start in zip(rows, starts, strict=True))
        tree_s = model.tree_s([(len(group), tokens) for group, tokens in spans.items()])
        assert tree_s + suffix_s + model.costs.fixed_s < 1.02 * plain_s
    assert 30 < taken < 150


def test_groups_within_groups_are_read_once_a_level() -> None:
    root, left, right = list(range(1, 257)), list(range(300, 556)), list(range(600, 856))
    rows = [row(f"l{i}", root + left, [1000 + i], 512 * PAGE + 5) for i in range(16)]
    rows += [row(f"r{i}", root + right, [1100 + i], 512 * PAGE + 5) for i in range(16)]
    plan = planner("auto").update(tuple(rows))
    assert plan is not None
    items = plan.items[: int(plan.num_items)].tolist()
    by_count = {count: sorted({first for _, first, _, _, count2 in items if count2 == count}) for *_, count in items}
    assert by_count[32][0] == 0
    assert max(first for first in by_count[32]) < 256 * PAGE
    assert by_count[16][0] == 256 * PAGE
    assert plan.kv_starts[:32].tolist() == [512 * PAGE] * 32


def test_measured_rates_decide_instead_of_the_cautious_ones() -> None:
    prefix = list(range(1, 65))
    rows = tuple(row(f"r{i}", prefix, [700 + i], 64 * PAGE + 5) for i in range(4))
    slow = TreeCosts(fixed_s=1.0)
    fast = TreeCosts(tree_rate=1e18, tree_bandwidth=1e15, part_bandwidth=1e15, fixed_s=0.0)
    for costs, is_taken in ((slow, False), (fast, True)):
        made = TreePlanner(
            llama_3_1_8b(), PAGE, 64, mode="auto", num_sms=132, device=torch.device("cpu"), dtype=torch.bfloat16,
            costs=costs,
        )  # fmt: skip
        assert (made.update(rows) is not None) == is_taken


def test_kept_page_lists_follow_sequences_that_get_other_or_more_shared_pages() -> None:
    """The planner converts a sequence's list once; a preempted one comes back with another list of the same length."""
    items = [row(f"r{i}", list(range(1, 129)), [700 + i], 129 * PAGE + 5) for i in range(4)]
    made = planner()
    assert made.update(tuple(items)) is not None
    moved = items[3].sequence
    moved.page_ids = [*range(1001, 1129), 703]
    moved.num_shared_pages = 128
    made.update(tuple(items[1:]))
    assert made.plan.kv_starts[:3].tolist() == [128 * PAGE] * 2 + [0]
    for item in items[:2]:
        item.sequence.page_ids[128:] = [129, 700]
        item.sequence.num_shared_pages = 129
    made.update(tuple(items[:2]))
    assert made.plan.kv_starts[:2].tolist() == [129 * PAGE] * 2


def test_rows_that_come_back_with_other_pages_get_a_new_plan() -> None:
    """Both were preempted and admitted again before another decode step: the same rows in the same order."""
    items = tuple(row(f"r{i}", list(range(1, 129)), [700 + i], 129 * PAGE + 5) for i in range(2))
    made = planner()
    assert made.update(items) is not None
    for i, item in enumerate(items):
        item.sequence.page_ids = [*range(1001 + 200 * i, 1129 + 200 * i), 703 + i]
    assert made.update(items) is None


def test_pages_that_a_running_sequence_gets_do_not_make_a_new_plan() -> None:
    items = tuple(row(f"r{i}", list(range(1, 129)), [700 + i], 128 * PAGE + 15) for i in range(3))
    made = planner()
    made.update(items)
    for item in items:
        item.sequence.page_ids.append(800)
    assert made.update(tuple(item._replace(start=item.start + 1) for item in items)) is not None
    assert made.num_plans == 1

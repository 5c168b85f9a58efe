"""The state machine of a run: readiness, failures, budget, tries and events, without any runtime."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import CheckFailed, ProgramCancelled, RametError
from ramet.lang.graph import ir
from ramet.lang.graph.checks import length
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run import GraphRun, NodeRun


class Driven:
    """A run, and what it told."""

    def __init__(self, *nodes: ir.AnyNode, held: tuple[int, ...] = (), **options: Any) -> None:
        self.events: list[ir.NodeEvent] = []
        self.run = GraphRun(ProgramOptions(**options), self.events.append, is_held=lambda node: node.id in held)
        self.run.extend(ir.Graph(nodes))

    def started(self) -> list[int]:
        """Take all that is ready."""
        return [run.node.id for run in self.take()]

    def take(self) -> Iterator[NodeRun]:
        while (run := self.run.take_ready()) is not None:
            yield run

    def done(self, node: int, text: str = "", num_tokens: int = 0) -> None:
        self.run.done(self.run.nodes[node], ir.NodeResult(text, usage=ir.Usage(0, 0, num_tokens)))

    def told(self) -> list[tuple[int, str]]:
        return [(event.node, event.kind) for event in self.events]


def gens(count: int, **fields: Any) -> list[ir.AnyNode]:
    return [ir.Generate(id=i, **fields) for i in range(count)]


def test_a_node_is_ready_when_all_that_it_needs_is_done_and_not_before() -> None:
    driven = Driven(*gens(2), ir.Text(id=2, parent=0, parts=(ir.Ref(1),)))
    assert driven.started() == [0, 1]
    driven.done(1)
    assert driven.started() == []
    driven.done(0)
    assert driven.started() == [2]


def test_a_failure_fails_what_needs_it_and_cancels_the_rest_but_not_what_comes_later() -> None:
    driven = Driven(*gens(2), ir.Text(id=2, parent=0, parts=()), ir.Join(id=3, branches=(1,)))
    assert driven.started() == [0, 1]
    boom = RametError("boom")
    driven.run.failed(driven.run.nodes[0], boom)
    assert driven.told() == [(0, "error"), (2, "error"), (1, "error"), (3, "error")]
    assert [event.cause for event in driven.events[:2]] == [boom, boom]
    assert isinstance(driven.events[2].cause, ProgramCancelled)
    assert driven.events[2].cause.__cause__ is boom
    assert [run.node.id for run in driven.run.take_stopped()] == [0, 1], "these two ran, and are to be ended"
    assert driven.run.take_stopped() == []
    driven.run.extend(ir.Graph((ir.Text(id=4, parent=2, parts=()), ir.Text(id=5, parts=())), first=4))
    assert driven.started() == [5]
    assert driven.events[-1].cause is boom


def test_a_join_waits_for_the_end_of_its_branches_and_not_for_their_success() -> None:
    driven = Driven(*gens(2), ir.Join(id=2, branches=(0, 1)))
    driven.started()
    driven.run.cancel([0])
    assert driven.started() == []
    driven.done(1)
    assert driven.started() == [2]


def test_a_cancelled_program_takes_no_more_nodes_and_a_cancelled_node_is_not_started() -> None:
    driven = Driven(*gens(2))
    driven.run.cancel([1])
    assert driven.started() == [0]
    driven.run.cancel()
    driven.run.extend(ir.Graph((ir.Text(id=2, parts=()),), first=2))
    assert driven.started() == []
    assert driven.told() == [(1, "error"), (0, "error"), (2, "error")]
    assert driven.run.is_over


def test_what_is_held_starts_when_it_is_released_and_the_rest_is_there() -> None:
    driven = Driven(*gens(1), ir.Generate(id=1, parent=0), held=(1,))
    run = driven.run.nodes[1]
    assert driven.started() == [0]
    assert not run.needs_release_alone
    driven.done(0)
    assert run.needs_release_alone
    assert driven.started() == []
    driven.run.release(run)
    driven.run.release(run)
    assert driven.started() == [1]


def limit(driven: Driven, run: NodeRun, max_tokens: int | None) -> int | None:
    """Tokens that a generation may write within the budget."""
    found = driven.run.within_budget(run, ir.Sampling(max_tokens=max_tokens))
    return None if found is None else found.max_tokens


def test_a_budget_puts_generations_off_until_others_give_some_back() -> None:
    driven = Driven(*gens(3), token_budget=10)
    first, second, third = driven.take()
    assert limit(driven, first, 8) == 8
    assert limit(driven, second, 8) == 2
    assert limit(driven, third, 8) is None
    driven.done(0, num_tokens=3)
    assert driven.started() == [2]
    assert limit(driven, third, None) == 5
    driven.done(1, num_tokens=2)
    driven.done(2, num_tokens=5)
    driven.run.extend(ir.Graph((ir.Generate(id=3),), first=3))
    (last,) = driven.take()
    with pytest.raises(RametError, match="token budget of 10 is used up"):
        limit(driven, last, 1)


def test_a_budget_lowers_the_fewest_tokens_too_and_none_leaves_sampling_as_it_is() -> None:
    sampling = ir.Sampling(max_tokens=9, min_tokens=6)
    for budget, expected in ((4, ir.Sampling(max_tokens=4, min_tokens=4)), (None, sampling)):
        driven = Driven(*gens(1), token_budget=budget)
        (run,) = driven.take()
        assert driven.run.within_budget(run, sampling) == expected


def test_a_text_that_fails_its_checks_is_tried_again_and_its_tokens_count() -> None:
    driven = Driven(*gens(1, checks=(length(3),), retries=1), token_budget=10, text_events=True)
    (run,) = driven.take()
    assert limit(driven, run, 9) == 9
    assert driven.run.judge(run, ir.NodeResult("no", usage=ir.Usage(5, 0, 4))) is None
    assert driven.started() == [0]
    assert limit(driven, run, 9) == 6
    result = driven.run.judge(run, ir.NodeResult("yes", usage=ir.Usage(5, 5, 2)))
    assert result is not None
    driven.run.done(run, result)
    said, done = driven.events
    assert (said.kind, said.text) == ("text", "yes"), "held back until the checks took it"
    assert done.value == "yes"
    assert done.usage == ir.Usage(10, 5, 6)
    assert done.meta is not None
    assert [attempt["text"] for attempt in done.meta["attempts"]] == ["no"]


def test_tries_that_are_used_up_fail_the_node_with_all_its_texts() -> None:
    driven = Driven(*gens(1, checks=(length(3),)))
    (run,) = driven.take()
    assert driven.run.judge(run, ir.NodeResult("no", usage=ir.Usage(5, 0, 4))) is None
    (event,) = driven.events
    assert isinstance(event.cause, CheckFailed)
    assert event.usage == ir.Usage(5, 0, 4)
    assert event.meta == {"attempts": [event.cause.attempts[0]]}


def test_a_tools_error_fails_its_node_or_is_its_value() -> None:
    reported = ir.ToolCall(id=0, tool="t", arguments=("{}",), on_error="report")
    raised = ir.ToolCall(id=1, tool="t", arguments=("{}",))
    driven = Driven(reported, raised, ir.Text(id=2, parts=(ir.Ref(0),)))
    assert [driven.run.evaluate(run) for run in driven.take()] == [None, None]
    assert driven.events[0].value == {"tool": "t", "arguments": {}}
    driven.run.provide(0, error=ValueError("broken"))
    (text,) = driven.take()
    assert driven.run.evaluate(text) == ir.NodeResult('{"error":"ValueError: broken"}')
    driven.run.provide(1, error=ValueError("broken"))
    assert isinstance(driven.run.nodes[1].error, ValueError)


def test_a_listener_that_raises_ends_nothing() -> None:
    def listener(event: ir.NodeEvent) -> None:
        raise RuntimeError("the listener's own fault")

    run = GraphRun(ProgramOptions(), listener)
    (node,) = run.extend(ir.Graph((ir.Text(id=0, parts=()),)))
    run.done(node, ir.NodeResult())
    assert run.is_over


@given(st.data())
def test_every_node_ends_once_whatever_fails_and_in_whatever_order_nodes_end(data: st.DataObject) -> None:
    nodes: list[ir.AnyNode] = []
    for i in range(data.draw(st.integers(1, 12))):
        parent = data.draw(st.none() | st.integers(0, i - 1)) if i else None
        kind = data.draw(st.sampled_from(["gen", "join"])) if i else "gen"
        branches = tuple(data.draw(st.sets(st.integers(0, i - 1), min_size=1))) if kind == "join" else ()
        nodes.append(ir.Join(id=i, parent=parent, branches=branches) if branches else ir.Generate(id=i, parent=parent))
    driven = Driven(*nodes)
    running: list[NodeRun] = []
    while True:
        for run in driven.take():
            needs = [driven.run.nodes[used] for used in ir.dependencies(run.node)]
            assert all(used.status == "done" or isinstance(run.node, ir.Join) for used in needs)
            assert all(used.is_over for used in needs)
            running.append(run)
        if not running:
            break
        one = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if data.draw(st.integers(0, 5)) == 0:
            driven.run.failed(one, RametError("boom"))
        else:
            driven.run.done(one, ir.NodeResult())
    assert driven.run.is_over
    assert sorted(event.node for event in driven.events) == list(range(len(nodes)))


# Parts of values.


def part_user(node: int, *paths: tuple[str | int, ...], of: int = 0) -> ir.Text:
    return ir.Text(id=node, parts=tuple(ir.Ref(of, path) for path in paths))


def test_a_node_that_uses_a_field_is_ready_as_soon_as_the_field_is_written() -> None:
    driven = Driven(*gens(1, type="json"), part_user(1, ("city",)), part_user(2, ("n",), ("city",)), part_user(3, ()))
    (plan,) = driven.take()
    assert not driven.run.wrote(plan, '{"city": "Ly')
    assert driven.run.wrote(plan, 'on", "n": 12')
    (user,) = driven.take()
    assert driven.run.evaluate(user) == ir.NodeResult("Lyon")
    assert not driven.run.wrote(plan, "3")
    assert driven.run.wrote(plan, "}")
    (user,) = driven.take()
    assert driven.run.evaluate(user) == ir.NodeResult("123Lyon")
    driven.done(0, '{"city": "Lyon", "n": 123}')
    assert driven.started() == [3]


def test_items_are_parts_and_a_part_that_is_whole_when_its_user_comes_is_used_at_once() -> None:
    driven = Driven(*gens(1, type="json"))
    (plan,) = driven.take()
    driven.run.wrote(plan, '{"steps": ["a", {"b": [1')
    driven.run.extend(
        ir.Graph((part_user(1, ("steps", 0)), part_user(2, ("steps", 1, "b", 0)), part_user(3, ("steps", -1))), first=1)
    )
    (user,) = driven.take()
    assert driven.run.evaluate(user) == ir.NodeResult("a")
    assert driven.run.wrote(plan, ', 2]}, "c"')
    (user,) = driven.take()
    assert driven.run.evaluate(user) == ir.NodeResult("1")
    assert driven.run.wrote(plan, "]")
    (user,) = driven.take()
    assert driven.run.evaluate(user) == ir.NodeResult("c")


def test_nothing_is_read_early_where_the_value_is_not_sure_or_the_order_counts() -> None:
    checked = ir.Generate(id=0, type="json", checks=(length(1, 3),))
    below = ir.Text(id=1, parent=0, parts=(ir.Ref(0, ("a",)),))
    both = part_user(1, ("a",), ())
    cases: list[tuple[tuple[ir.AnyNode, ...], dict[str, Any]]] = [
        ((checked, part_user(1, ("a",))), {}),
        ((*gens(1), part_user(1, ("a",))), {}),
        ((*gens(1, type="json"), below), {}),
        ((*gens(1, type="json"), both), {}),
        ((*gens(1, type="json"), part_user(1, ("a",))), {"token_budget": 10}),
    ]
    for nodes, options in cases:
        driven = Driven(*nodes, **options)
        (plan,) = driven.take()
        assert not driven.run.wrote(plan, '{"a": "b", ')
        assert driven.started() == []


def test_a_user_of_a_part_that_never_comes_waits_for_the_whole_value_and_then_fails() -> None:
    driven = Driven(*gens(1, type="json"), part_user(1, ("b",)))
    (plan,) = driven.take()
    driven.run.wrote(plan, '{"a": 1}')
    assert driven.started() == []
    driven.run.done(plan, ir.NodeResult('{"a": 1}', value={"a": 1}))
    (user,) = driven.take()
    with pytest.raises(RametError, match="has no 'b'"):
        driven.run.evaluate(user)


def test_a_cancelled_user_of_a_part_is_not_ready_when_the_part_comes() -> None:
    driven = Driven(*gens(1, type="json"), part_user(1, ("a",)))
    (plan,) = driven.take()
    driven.run.cancel([1])
    driven.run.wrote(plan, '{"a": 1, ')
    assert driven.started() == []

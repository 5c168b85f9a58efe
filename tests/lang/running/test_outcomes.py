"""What came of a run's nodes, and who waits for it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ramet.errors import ProgramCancelled
from ramet.lang.graph.ir import NodeEvent
from ramet.lang.running.outcomes import Outcomes


def no_limit() -> None:
    return None


def test_the_first_end_of_a_node_holds_and_text_is_none() -> None:
    outcomes = Outcomes()
    outcomes.put(NodeEvent(0, "text", text="He"))
    assert 0 not in outcomes
    outcomes.put(NodeEvent(0, "error"))
    outcomes.put(NodeEvent(0, "done", text="Hello"))
    assert outcomes[0].kind == "error"
    assert len(outcomes) == 1


def test_a_thread_goes_on_when_what_it_waits_for_is_there() -> None:
    outcomes = Outcomes()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(outcomes.wait(lambda: 1 in outcomes, no_limit)))
    thread.start()
    outcomes.put(NodeEvent(0, "done"))
    assert not found
    outcomes.put(NodeEvent(1, "done"))
    thread.join(5)
    assert found == [True]


def test_waiting_ends_with_its_time_and_with_the_failure_of_the_run() -> None:
    outcomes = Outcomes()
    assert not outcomes.wait(lambda: False, lambda: 0.01)
    assert not asyncio.run(outcomes.until(lambda: False, lambda: 0.01))
    outcomes.fail(ProgramCancelled("stopped"))
    with pytest.raises(ProgramCancelled, match="stopped"):
        outcomes.wait(lambda: False, no_limit)
    assert outcomes.wait(lambda: True, no_limit)


def test_event_loops_are_woken_by_their_node_or_when_several_are_there() -> None:
    outcomes = Outcomes()

    async def run() -> list[str]:
        order: list[str] = []

        async def until(name: str, count: int, node: int | None) -> None:
            await outcomes.until(lambda: len(outcomes) >= count, no_limit, node)
            order.append(name)

        tasks = [asyncio.create_task(until("both", 2, None)), asyncio.create_task(until("first", 1, 0))]
        for node in range(2):
            await asyncio.sleep(0)
            outcomes.put(NodeEvent(node, "done"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(order) == node + 1
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == ["first", "both"]


def test_a_listener_that_comes_late_gets_what_was_kept_and_one_that_fails_keeps_nobody_waiting() -> None:
    outcomes = Outcomes(keep_events=True)
    outcomes.put(NodeEvent(0, "text", text="a"))
    seen: list[str] = []

    def listen(event: NodeEvent) -> None:
        seen.append(event.text)
        if event.kind == "done":
            raise ValueError("a listener's own fault")

    outcomes.listen(listen)
    thread = threading.Thread(target=outcomes.wait, args=(lambda: 0 in outcomes, no_limit))
    thread.start()
    with pytest.raises(ValueError, match="own fault"):
        outcomes.put(NodeEvent(0, "done", text="ab"))
    thread.join(5)
    assert not thread.is_alive()
    assert seen == ["a", "ab"]

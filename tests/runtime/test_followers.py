from __future__ import annotations

import pytest
import torch

from ramet.runtime.config import EngineConfig
from ramet.runtime.factory import scheduler_config
from ramet.runtime.followers import Followers
from ramet.runtime.simulation import make_request, make_simulation
from ramet.runtime.types import Batch, RowOutput


class Steps:
    """A scheduler whose steps take 20 ms each."""

    def __init__(self, max_hold_s: float = 0.03, max_running: int = 16) -> None:
        self.clock = [1.0]
        self.scheduler = make_simulation(
            clock=self.clock, max_hold_s=max_hold_s, max_num_tokens_per_step=64, max_running=max_running
        ).scheduler

    def add(self, names: str, max_tokens: int = 2, program_id: str | None = None) -> None:
        for name in names:
            prompt = [100 + ord(name)] * 4
            self.scheduler.add(make_request(name, prompt, max_tokens, program_id=program_id))

    def run(self) -> str:
        """One step: the names of its decode rows, and after a + those of its prompts. Empty where nothing can run."""
        batch = self.scheduler.schedule()
        if batch is None:
            return ""
        self.clock[0] += 0.02
        self.scheduler.finish_step(batch, [RowOutput((9,) if item.samples else ()) for item in batch.items])
        return "+".join(names(batch))


def names(batch: Batch) -> list[str]:
    rows, prompts = batch.items[: batch.num_decode], batch.items[batch.num_decode :]
    return ["".join(item.sequence.request.request_id for item in part) for part in (rows, prompts)]


def one_ends_a_step_before_three(steps: Steps, program_id: str | None = None) -> None:
    steps.add("a", program_id=program_id)
    assert steps.run() == "+a"
    steps.add("bcd", program_id=program_id)
    assert steps.run() == "a+bcd"
    assert steps.run() == "bcd+"
    steps.add("A", program_id=program_id)  # a's next turn, which was on its way during that step


def test_turns_that_ended_apart_begin_together() -> None:
    steps = Steps()
    one_ends_a_step_before_three(steps)
    assert steps.run() == ""
    steps.clock[0] += 0.005
    steps.add("BC")
    assert steps.run() == ""
    steps.add("D")
    assert steps.run() == "+ABCD"
    assert steps.run() == "ABCD+"


def test_without_a_hold_they_stay_apart() -> None:
    steps = Steps(max_hold_s=0.0)
    one_ends_a_step_before_three(steps)
    assert steps.run() == "+A"


@pytest.mark.parametrize(("max_hold_s", "waited_s"), [(0.03, 0.02), (0.01, 0.01)])
def test_nobody_is_waited_for_longer_than_a_step_and_than_the_limit(max_hold_s: float, waited_s: float) -> None:
    steps = Steps(max_hold_s)
    one_ends_a_step_before_three(steps)
    steps.clock[0] += waited_s - 0.001
    assert steps.run() == ""
    steps.clock[0] += 0.002
    assert steps.run() == "+A"
    steps.add("B")  # late, and nobody waits for the others any more
    assert steps.run() == "A+B"


def test_rows_that_run_go_on_meanwhile() -> None:
    steps = Steps()
    steps.add("r", 9)
    steps.add("abcd")
    assert steps.run() == "+rabcd"
    assert steps.run() == "rabcd+"
    steps.add("A")
    assert steps.run() == "r+"
    steps.add("BCD")
    assert steps.run() == "r+ABCD"


def test_few_that_ended_hold_up_nobody_beside_more_that_run() -> None:
    steps = Steps()
    steps.add("rst", 9)
    steps.add("abcd")
    steps.run()
    steps.run()
    steps.add("AB")
    assert steps.run() == "rst+AB"


def test_where_as_many_wait_nobody_is_waited_for() -> None:
    steps = Steps(max_running=4)
    steps.add("abcdefghi")
    assert [steps.run() for _ in range(4)] == ["+abcd", "abcd+", "+efgh", "efgh+"]


def test_one_that_ended_is_not_waited_for() -> None:
    steps = Steps()
    steps.add("a")
    steps.run()
    steps.run()
    steps.add("b")
    assert steps.run() == "+b"


def test_a_program_s_requests_are_there_already() -> None:
    steps = Steps()
    one_ends_a_step_before_three(steps, program_id="p")
    assert steps.run() == "+A"


def test_who_was_aborted_is_not_expected_back() -> None:
    steps = Steps()
    steps.add("abc", 9)
    steps.run()
    for name in "abc":
        steps.scheduler.abort(name)
    steps.add("d")
    assert steps.run() == "+d"


def test_old_ends_are_forgotten() -> None:
    followers = Followers(1.0)
    followers.holds(2, 0.0)
    followers.note_end(0.5)
    followers.note_end(0.5)
    assert not followers.holds(1, 5.0)
    followers.note_end(6.0)
    assert not followers.holds(1, 6.0)


def test_prompts_are_held_on_a_cpu_alone() -> None:
    assert scheduler_config(EngineConfig(), 64, torch.device("cpu")).max_hold_s > 0
    assert scheduler_config(EngineConfig(), 64, torch.device("cuda")).max_hold_s == 0

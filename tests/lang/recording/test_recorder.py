"""What a branch is written down with: its own seeds and nodes, what it shares with a fork, new descriptions."""

from __future__ import annotations

import pytest

from ramet import MockBackend, State, function, gen, use_backend
from ramet.errors import InvalidProgram
from ramet.lang.graph import ir
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.recording.recorder import Expr, Recorder
from ramet.lang.running.run import Run


def recorder(seed: int | None = None) -> Recorder:
    return Recorder(Run(None, ProgramOptions(), seed=seed))


class Twice(Expr):
    """A description that exists in this test alone."""

    def __init__(self, text: str) -> None:
        self.text = text

    def record(self, recorder: Recorder) -> None:
        recorder.append([self.text, self.text])


def test_a_new_description_is_appended_alone_in_a_sum_and_in_an_f_string() -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += Twice("a")
        s += "b" + Twice("c")
        s += f"d{Twice('e')}f"
        s += gen("x")

    with use_backend(MockBackend(["!"])):
        assert program.run().text() == "aabccdeef!"


def test_every_place_has_a_seed_of_its_own_which_another_run_repeats() -> None:
    def seeds(seed: int | None) -> list[int | None]:
        root = recorder(seed)
        left, right = root.fork(2)
        (below,) = left.fork(1)
        return [one.seed_of_place() for one in (root, root, left, right, below)]

    assert len(set(seeds(7))) == 5
    assert seeds(7) == seeds(7) != seeds(8)
    assert seeds(None) == [None] * 5


def test_a_branch_goes_on_with_what_was_written_and_changes_nothing_before_the_fork() -> None:
    root = recorder()
    root.append("text")
    root.variables["x"] = 1
    left, right = root.fork(2)
    left.variables["y"] = 2
    left.append("more")
    assert left.own_nodes() == [1, 3]
    assert right.own_nodes() == [2]
    assert left.written_since(root) == {"y": 2}
    assert root.variables == right.variables == {"x": 1}
    root.adopt(left)
    assert (root.tip, root.variables) == (3, {"x": 1, "y": 2})
    with pytest.raises(InvalidProgram, match="only from where it was forked"):
        root.adopt(right)


def test_late_text_is_recorded_once_and_before_what_reads_the_branch() -> None:
    root = recorder()
    root.hold_late("late", "late")
    root.append("text")
    (branch,) = root.fork(1)
    root.record_late()
    texts = [node for node in root.run.nodes if isinstance(node, ir.Text)]
    assert [(node.parts, node.moved) for node in texts] == [(("text",), 0), (("late",), 1)]
    assert branch.run.nodes[branch.own_nodes()[0]].parent == texts[1].id

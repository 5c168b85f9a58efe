"""What explain() says, before and after a run, as data and as text, and on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramet import MockBackend, State, function, gen, length, select
from ramet.cli.main import main
from ramet.errors import InvalidRequest
from ramet.lang.graph.ir import Constraint
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "programs"


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    with MockBackend(tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


@function(max_tokens=10, temperature=0)
def advise(s: State, place: str, question: str) -> None:
    s += "You know every place on earth. "
    s += f"Of {place}: {question} "
    for branch in s.fork(3):
        branch += "Think. " + gen("thought")
    s += gen("answer", regex="[a-z]{1,5}") + select("sure", ["yes", "no"])


def reports(found: Any) -> dict[str, Any]:
    return {one.name: one for one in found.passes}


def test_every_pass_has_its_line(backend: MockBackend) -> None:
    found = advise.explain("Rome", "What to see?")
    assert list(reports(found)) == [
        "fold constants",
        "static prefixes",
        "identical nodes",
        "liveness",
        "kv bound",
        "fork groups",
        "forced tokens",
        "argument motion",
    ]
    text = str(found)
    for one in found.passes:
        assert one.name in text
        assert one.text


def test_the_plan_says_which_masks_the_device_does_not_make(
    backend: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    @function
    def ages(s: State) -> None:
        s += gen("small", int) + " years, " + gen("large", regex="[a-z]*") + gen("free")

    asked: list[tuple[str, bytes]] = []

    def masks_on_host(model: ProgramModel, constraint: Constraint, after: bytes) -> bool:
        asked.append((constraint.source, after))
        return constraint.source == "[a-z]*"

    assert "masks" not in reports(ages.explain()), "there is no device"
    monkeypatch.setattr(ProgramModel, "masks_on_host", masks_on_host)
    found = reports(ages.explain())["masks"]
    assert found.text == (
        "1 constrained text by masks on the device; on the host, because the states are too many for tables: large"
    )
    assert found.numbers == {"device": 1, "host": 1}
    assert [after for _, after in asked] == [b" years, ", b""]


def test_a_plan_as_data_is_json_and_says_what_is_exact(backend: MockBackend) -> None:
    data = advise.explain("Rome", "What to see?").to_dict()
    assert json.loads(json.dumps(data)) == data
    first, *rest = data["nodes"]
    size = len("You know every place on earth. Of Rome: What to see? Think. ")
    # The answer's prompt is the beginning of this one; which comes first depends on when its grammar is compiled.
    assert (first["prompt"], first["written"]) == (size, [0, 10])
    assert (first["shared"], first["new"]) == ([0, size - 7], [7, size])
    assert [node["twin"] for node in data["nodes"]] == [None, first["node"], first["node"], None, None]
    assert rest[0]["new"] == 0
    assert data["is_complete"] is True
    assert data["passes"]["identical nodes"]["shared"] == 2


def test_two_of_three_equal_branches_are_taken_over(backend: MockBackend) -> None:
    plan = advise.explain("Rome", "What to see?")
    state = advise.run("Rome", "What to see?")
    assert reports(plan)["identical nodes"].text == "2 generations of 4 take over another one's text"
    assert backend.stats().num_requests == 1 + 1 + 2 * 2, (
        "a choice is scored twice: after the prompt, and after neutral text"
    )
    assert state.usage.computed_tokens <= plan.new.at_most


def test_arguments_may_be_left_out(backend: MockBackend) -> None:
    found = advise.explain()
    assert found.nodes[0].prompt.at_least == len("You know every place on earth. Of :  Think. ")
    assert not found.nodes[0].prompt.is_exact
    motion = reports(found)["argument motion"]
    assert motion.numbers == {"shared": len("You know every place on earth. Of "), "gain": len(":  Think. ")}
    assert "'place'" in motion.text


def test_the_line_that_forces_a_stage_is_named_with_its_reason(backend: MockBackend) -> None:
    @function(max_tokens=5)
    def program(s: State) -> None:
        s += "Go on? " + gen("more")
        if s["more"] == "yes":
            s += "So: " + gen("rest")

    found = program.explain()
    assert not found.is_complete
    (stage,) = found.stages
    assert (stage.value, stage.why) == ("generate 'more'", "==")
    assert "test_explain.py:" in stage.line
    assert f"stage  {stage.line} needs generate 'more': ==" in str(found)
    assert "in a body of s.map(...) or branches.each(...)" in str(found)  # the form that waits less
    assert "up to the stage below" in reports(found)["kv bound"].text


def test_a_value_that_python_needs_makes_the_plan_hold_for_it_alone(backend: MockBackend) -> None:
    @function(max_tokens=5)
    def program(s: State, n: int, name: str) -> None:
        for _ in range(n):
            s += "Again " + gen("x")

    found = program.trace(n=2)
    assert list(found.specialised) == ["n"]
    partial = program.explain(n=2)
    assert "this value of 'n' alone" in str(partial)


def test_a_batch_says_what_its_rows_share_and_a_run_measures_it(backend: MockBackend) -> None:
    @function(max_tokens=4)
    def program(s: State, word: str) -> None:
        s += f"Spell the word: {word}. " + gen("x")

    rows = ["cat", "car", "dog"]
    found = program.explain(rows=rows)
    report = reports(found)["prefixes of rows"]
    assert report.numbers["common"] == len("Spell the word: ")
    states = program.run_batch(rows)
    assert sum(state.usage.computed_tokens for state in states) == report.numbers["computed"]
    assert sum(state.usage.prompt_tokens for state in states) == report.numbers["separate"]
    assert found.num_rows == 3


def test_after_a_run_every_node_has_its_measured_tokens_and_times(backend: MockBackend) -> None:
    state = advise.run("Rome", "What to see?")
    found = state.explain()
    assert [one.name for one in found.measured] == ["thought", "thought", "thought", "answer", "sure"]
    assert found.usage == state.usage
    first = found.measured[0]
    assert first.usage.prompt_tokens == first.usage.computed_tokens > 0
    assert first.start_s is not None
    assert first.end_s is not None
    assert 0 <= first.start_s <= first.end_s
    assert f"computed {state.usage.computed_tokens:,}" in str(found)


def test_analyze_shows_the_plan_and_what_was_measured(backend: MockBackend) -> None:
    found = advise.explain("Rome", "What to see?", analyze=True)
    for cost in found.nodes:
        measured = next(one for one in found.measured if one.node == cost.node)
        assert measured.usage.prompt_tokens <= cost.prompt.at_most
    assert "first token" in str(found)


def test_a_failed_node_says_why() -> None:
    with MockBackend(failures={"Bad": ValueError("no such thing")}) as mock:

        @function
        def program(s: State) -> None:
            s += "Bad " + gen("x")

        found = program.run(failures="keep").explain()
    assert found.measured[0].error == "ValueError: no such thing"
    mock.engine.shutdown()


def test_what_was_cancelled_is_marked_otherwise_than_what_failed() -> None:
    @function
    def program(s: State) -> None:
        branches = s.fork(3)
        branches += lambda i: f"{i}: " + gen("x")

    mock = MockBackend(failures={"1:": ValueError("no such thing")}, latency_s=0.2)
    state = program.run(backend=mock, failures="keep")
    found = state.explain()
    assert sum(one.is_cancelled for one in found.measured) == len([one for one in found.measured if one.error]) - 1
    shown = str(found)
    assert shown.count("✗") == 1
    assert "⊘" in shown
    assert "ProgramCancelled" in state.graph().svg()
    mock.engine.shutdown()


def test_many_branches_are_one_line(backend: MockBackend) -> None:
    @function(max_tokens=3)
    def program(s: State) -> None:
        s += "Count: "
        for i, branch in enumerate(s.fork(500)):
            branch += f"{i} " + gen("x", stop=" ")

    text = str(program.explain())
    assert sum("generate x" in line for line in text.splitlines()) == 1
    assert " 500 " in text


def test_rows_can_not_be_analyzed(backend: MockBackend) -> None:
    with pytest.raises(InvalidRequest, match=r"explain\(rows=...\) can't analyze"):
        advise.explain(rows=[("Rome", "What?")], analyze=True)
    with pytest.raises(InvalidRequest, match="rows is empty"):
        advise.explain(rows=[])


# The command.


def test_the_command_explains_a_file_s_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(EXAMPLES / "rag_shared_documents.py")]) == 0
    out = capsys.readouterr().out
    assert "ask" in out
    assert "fork groups" in out


def test_the_command_prints_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(EXAMPLES / "few_shot_classification.py")
    assert main(["explain", file, "--json", "--arguments", '{"headline": "Rain."}']) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["program"] == "classify"
    assert data["nodes"][0]["prompt"] == data["nodes"][0]["new"]
    assert main(["explain", file, "--rows", '["One.", "Two."]', "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert main(["explain", file, "--mock", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "MockBackend"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nothing.py"], "nothing.py is no file"),
        ([f"{EXAMPLES / 'debate.py'}:x"], "has no program 'x'"),
        ([str(EXAMPLES / "debate.py"), "--arguments", "{"], "--arguments is '{', which is not JSON"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 1
    assert problem in capsys.readouterr().err


# Plans that are not the whole truth say so.


def test_the_totals_of_a_part_have_no_upper_limit(backend: MockBackend) -> None:
    @function(max_tokens=5)
    def program(s: State) -> None:
        s += "Go on? " + gen("more")
        if s["more"] == "yes":
            s += "So: " + gen("rest")

    found = program.explain()
    for total in (found.prompt, found.shared, found.new, found.written):
        assert not total.is_exact
        assert str(total).startswith("≥ ")
    data = found.to_dict()
    assert [data[name][1] for name in ("prompt", "shared", "new", "written")] == [None] * 4
    assert data["nodes"][0]["prompt"] == len("Go on? "), "what is known of one node stays known"
    assert found.money(new=1, written=2)[1] == found.seconds(prefill=100, decode=10)[1] == math.inf
    title = str(found).splitlines()[0]
    assert "up to the stage below" in title
    assert "whole program" not in str(found)


def mixed(s: State, topic: str) -> None:
    s += f"About {topic}: " + select("mood", ["good", "bad", "ugly"])
    if s["mood"] == "good":
        s += " Fine. " + gen("why", max_tokens=7)
    elif s["mood"] == "bad":
        s += " That is bad, and why is it bad? " + gen("reason", max_tokens=20)
    s += " Vote: " + gen("before", max_tokens=2)
    s.vote(3, " v " + gen("v", max_tokens=4))
    s.best_of(2, " b " + gen("b", max_tokens=4), by=lambda branch: len(branch["b"]) if topic == "len" else 1.0)
    s.first_of(" x " + gen("x", max_tokens=3), " yyy " + gen("y", max_tokens=9))
    s += " after " + gen("z", max_tokens=4)


@pytest.mark.parametrize("mood", ["good", "bad", "ugly"])
def test_a_plan_goes_on_behind_choices_votes_and_races_as_limits(mood: str) -> None:
    program = function(mixed)
    plan = program.explain("rain", backend=MockBackend())
    assert plan.is_complete
    assert len(plan.arms) == 6
    assert {node.name for node in plan.nodes} >= {"mood", "why", "reason", "before", "z"}
    script = {"About rain:": mood, " Vote: ": "ab", " v ": "vvv", " b ": "bb", " x ": "x", " yyy ": "yyyy"}
    state = program.run("rain", backend=MockBackend(script))
    assert state["mood"] == mood
    usage = state.usage
    assert plan.prompt.at_least <= usage.prompt_tokens <= plan.prompt.at_most
    assert plan.new.at_least <= usage.computed_tokens <= plan.new.at_most
    assert plan.written.at_least <= usage.completion_tokens <= plan.written.at_most
    assert usage.computed_tokens + usage.completion_tokens <= plan.kv.tokens


def test_a_program_that_goes_one_way_only_has_no_arms(backend: MockBackend) -> None:
    found = advise.explain("Rome", "What to see?")
    assert found.arms == ()
    assert found.to_dict()["arms"] == 1


def test_more_ways_than_are_followed_leave_the_plan_open(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        for name in "abcdef":
            s += f"{name}: " + select(name, ["yes", "no"])
            if s[name] == "yes":
                s += " so " + gen(f"{name}1", max_tokens=2)

    found = program.explain()
    assert len(found.arms) == 32
    assert not found.is_complete
    assert str(found.prompt).startswith("≥ ")


def test_money_and_time_follow_the_counts(backend: MockBackend) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "0123456789" + gen("a", max_tokens=5)

    found = program.explain()
    assert found.money(new=1e6, written=2e6) == (10.0, 20.0)
    assert found.seconds(prefill=10, decode=1) == (1.0, 6.0)
    after = program.explain(analyze=True)
    usage = after.usage
    assert after.money(new=1e6, written=2e6) == (10.0 + 2 * usage.completion_tokens,) * 2
    least, most = after.seconds(prefill=10, decode=1)
    assert 0 < least == most


@pytest.mark.parametrize(
    ("cue", "late", "warns"),
    [("Answer:", "Q?\n", True), ("Answer: ", "Q?\n", True), ("", "Q?\nAnswer:", False), ("Be brief.\n", "Q?\n", False)],
)
def test_a_cue_before_its_question_is_warned_of(cue: str, late: str, warns: bool, backend: MockBackend) -> None:
    @function(max_tokens=3)
    def clerk(s: State, question: str) -> None:
        s.append(f"Question: {question} {late}", prefix="late")
        s += "Rules.\n"
        s += cue + gen("answer")

    found = reports(clerk.explain("Why?"))
    assert ("warning" in found) == warns
    if warns:
        assert "'Answer:'" in found["warning"].text
        assert "write the cue into the late text" in found["warning"].text


def test_a_value_that_is_used_often_is_bounded_by_what_its_text_can_be(backend: MockBackend) -> None:
    def most_of_prompts(**options: Any) -> float:
        @function(temperature=0)
        def program(s: State) -> None:
            s += "A: " + gen("x", max_tokens=40, **options)
            for number in range(6):
                s += f"\n{number}: {s['x']} " + gen(max_tokens=4)

        plan = program.explain(backend=backend)
        state = program.run(backend=backend)
        assert state.usage.prompt_tokens <= plan.prompt.at_most
        return plan.prompt.at_most

    free, short = most_of_prompts(), most_of_prompts(where=length(0, 9))
    number = most_of_prompts(type=int)
    assert number < short < free
    own = 6 * len("\n0:  ") * 6  # more than the program's own text is read by all prompts
    read = sum(range(1, 7))  # how often the value is read: once more by each of the prompts
    assert free <= own + 6 * 40 + 6 * 6 * 4 + read * (40 * 3 + 2)
    assert number <= own + 6 * (17 + 64) + 6 * 6 * 4 + read * (17 + 2)

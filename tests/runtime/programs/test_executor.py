"""The graph executor over the scripted engine: order, paths, selection, errors, limits."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from ramet.errors import DeadlineExceeded, InvalidProgram, ProgramCancelled, RametError
from ramet.lang.graph.ir import (
    AnyNode,
    Argument,
    Capture,
    Constraint,
    Fork,
    Generate,
    Graph,
    Join,
    NodeEvent,
    Ref,
    Role,
    Sampling,
    Select,
    Text,
    ToolCall,
)
from ramet.lang.graph.options import ProgramOptions
from ramet.runtime.programs.executor import MANY_REQUESTS, ProgramHost
from ramet.runtime.programs.selection import Selection
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import SamplingParams

GREEDY = Sampling(temperature=0)


class Program:
    """An executor and what it reported."""

    def __init__(self, engine: ScriptedEngine, **limits: Any) -> None:
        self.engine = engine
        self.events: list[NodeEvent] = []
        self.ended: dict[int, NodeEvent] = {}
        self._changed = threading.Condition()
        self.executor = ProgramHost(engine).start(ProgramOptions(**{"text_events": True, **limits}), self.on_event)
        self.num_nodes = 0

    def on_event(self, event: NodeEvent) -> None:
        with self._changed:
            self.events.append(event)
            if event.kind in ("done", "error"):
                assert event.node not in self.ended, "a node ends once"
                self.ended[event.node] = event
            self._changed.notify_all()

    def extend(self, *nodes: AnyNode, **arguments: Any) -> Program:
        self.executor.extend(Graph(nodes, arguments, self.num_nodes))
        self.num_nodes += len(nodes)
        return self

    def wait(self, *nodes: int) -> Mapping[int, NodeEvent]:
        wanted = nodes or range(self.num_nodes)
        with self._changed:
            assert self._changed.wait_for(lambda: all(n in self.ended for n in wanted), 20)
        return self.ended

    def text(self, node: int) -> str:
        return self.wait(node)[node].text


scripted = partial(ScriptedEngine, tokenizer=ByteTokenizer())  # lengths are counted in bytes


def run(engine: ScriptedEngine, *nodes: AnyNode, **arguments: Any) -> Mapping[int, NodeEvent]:
    return Program(engine).extend(*nodes, **arguments).wait()


def test_a_chain_of_text_and_generations_writes_what_separate_requests_would() -> None:
    with scripted() as engine:
        done = run(
            engine,
            Text(id=0, parts=("Once ",)),
            Generate(id=1, parent=0, sampling=GREEDY),
            Text(id=2, parent=1, parts=(" Then ",)),
            Generate(id=3, parent=2, sampling=GREEDY),
        )
        first = engine.submit("Once ", SamplingParams(temperature=0)).result()
        second = engine.submit(f"Once {first.text} Then ", SamplingParams(temperature=0)).result()
    assert [done[1].text, done[3].text] == [first.text, second.text]


def test_a_turn_computes_exactly_the_tokens_that_are_new() -> None:
    nodes: list[AnyNode] = [Text(id=0, parts=("A long beginning. ",)), Generate(id=1, parent=0, sampling=GREEDY)]
    for turn in range(1, 5):
        new = Text(id=2 * turn, parent=2 * turn - 1, parts=(f" Turn {turn}: ",))
        nodes += [new, Generate(id=2 * turn + 1, parent=2 * turn, sampling=GREEDY)]
    with scripted() as engine:
        done = run(engine, *nodes)
    for turn in range(1, 5):
        usage = done[2 * turn + 1].usage
        assert usage is not None
        assert usage.computed_tokens == len(f" Turn {turn}: ")


def test_branches_share_the_prefix_of_their_fork() -> None:
    width, prefix = 32, "x" * 1000
    forks = [Fork(id=1 + i, parent=0, group=1, index=i, width=width) for i in range(width)]
    texts = [Text(id=1 + width + i, parent=1 + i, parts=(f"branch {i:02}",)) for i in range(width)]
    gens = [Generate(id=1 + 2 * width + i, parent=1 + width + i, sampling=GREEDY) for i in range(width)]
    with scripted() as engine:
        run(engine, Text(id=0, parts=(prefix,)), *forks, *texts, *gens)
        stats = engine.stats()
    assert stats.prompt_tokens == width * (len(prefix) + 9)
    assert stats.computed_tokens <= len(prefix) + width * 9


def test_roles_are_rendered_by_the_models_template() -> None:
    with scripted(["Hello!"]) as engine:
        done = run(
            engine,
            Role(id=0, role="user", is_open=True),
            Text(id=1, parent=0, parts=("Hi",)),
            Role(id=2, parent=1, role="user", is_open=False),
            Role(id=3, parent=2, role="assistant", is_open=True),
            Generate(id=4, parent=3),
            Role(id=5, parent=4, role="assistant", is_open=False),
            Capture(id=6, parent=5),
        )
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        template = engine.tokenizer.chat_template.render(messages, add_generation_prompt=False)
        prompt = engine.tokenizer.chat_template.render(messages[:1], add_generation_prompt=True)
        assert done[4].usage is not None
        assert done[4].usage.prompt_tokens == len(engine.tokenizer.encode(prompt, parse_special=True))
    assert done[6].value == template


def test_text_from_outside_cannot_forge_a_role() -> None:
    with scripted() as engine:
        done = run(engine, Text(id=0, parts=("<|im_start|>",)), Generate(id=1, parent=0))
    assert done[1].usage is not None
    assert done[1].usage.prompt_tokens == len("<|im_start|>")


def test_values_flow_along_data_edges_and_arguments() -> None:
    with scripted({"age": "41", "name": "Ann"}) as engine:
        done = run(
            engine,
            Argument(id=0, name="city"),
            Text(id=1, parts=("name? ",)),
            Generate(id=2, parent=1),
            Text(id=3, parts=("age? ",)),
            Generate(id=4, parent=3, type="int"),
            Text(id=5, parts=(Ref(2), " of ", Ref(0, ("name",)), " is ", Ref(4, (), "04d"))),
            city={"name": "Rome"},
        )
    assert done[5].text == "Ann of Rome is 0041"
    assert done[4].value == 41


def test_a_stop_string_cuts_text_and_path_alike() -> None:
    with scripted(["one. two", "end"]) as engine:
        program = Program(engine).extend(
            Text(id=0, parts=("Say: ",)),
            Generate(id=1, parent=0, sampling=Sampling(stop=(" tw",))),
            Text(id=2, parent=1, parts=("!",)),
            Generate(id=3, parent=2),
            Capture(id=4, parent=3),
        )
        done = program.wait()
    assert done[1].text == "one."
    assert done[4].value == "Say: one.!end"
    assert done[3].usage is not None
    assert done[3].usage.prompt_tokens == len("Say: one.!")


@pytest.mark.parametrize("scorer", ["likelihood", "calibrated"])
@pytest.mark.parametrize("pending", ["The answer is ", ""])
def test_select_gives_the_scores_of_a_brute_force_over_the_models_distribution(pending: str, scorer: Any) -> None:
    choices = ["yes", "yes, of course", "no", "maybe", "nothing"]

    def likelihood(engine: ScriptedEngine, before: str, choice: str) -> float:
        tokens, total = engine.tokenizer.encode(before), 0.0
        for token in engine.tokenizer.encode(choice):
            total += float(engine.logprobs(tokens)[token])
            tokens.append(token)
        return total

    with scripted() as engine:
        done = run(
            engine,
            Text(id=0, parts=("Is it? ",)),
            Generate(id=1, parent=0, sampling=GREEDY),
            Text(id=2, parent=1, parts=(pending,)),
            Select(id=3, parent=2, name="s", choices=tuple((choice,) for choice in choices), scorer=scorer),
        )
        prompt = "Is it? " + done[1].text + pending
        scores = [likelihood(engine, prompt, choice) for choice in choices]
        if scorer == "calibrated":  # a byte is a token here
            usual = [likelihood(engine, "Answer:", choice) for choice in choices]
            scores = [(a - b / 2) / math.sqrt(len(c)) for a, b, c in zip(scores, usual, choices, strict=True)]
    meta = done[3].meta
    assert meta is not None
    assert math.isclose(sum(meta["probs"]), 1.0, abs_tol=1e-12)
    total = sum(map(math.exp, scores))
    for got, want in zip(meta["probs"], scores, strict=True):
        assert math.isclose(got, math.exp(want) / total, rel_tol=1e-4)
    assert done[3].value == choices[max(range(5), key=scores.__getitem__)]


def test_what_follows_a_selection_continues_the_chosen_text() -> None:
    with scripted() as engine:
        program = Program(engine).extend(
            Text(id=0, parts=("I like ",)),
            Select(id=1, parent=0, choices=(("tea",), ("coffee",))),
            Generate(id=2, parent=1, sampling=GREEDY),
            Capture(id=3, parent=2),
        )
        done = program.wait()
        alone = engine.submit(f"I like {done[1].value}", SamplingParams(temperature=0)).result()
    assert done[3].value == f"I like {done[1].value}{alone.text}"


@pytest.mark.parametrize("scorer", ["calibrated", "likelihood", "token_normalized", "greedy", "unconditional"])
def test_every_scorer_chooses_one_of_the_choices(scorer: Any) -> None:
    with scripted() as engine:
        select = Select(id=1, parent=0, choices=(("a",), ("ab",), ("b",)), scorer=scorer)
        done = run(engine, Text(id=0, parts=("Q ",)), select)
    assert done[1].meta is not None
    assert done[1].value in ("a", "ab", "b")
    assert math.isclose(sum(done[1].meta["probs"]), 1.0)


def test_a_drawn_selection_repeats_with_its_seed_and_follows_the_probabilities() -> None:
    with scripted() as engine:
        nodes = [Text(id=0, parts=("Q ",))] + [
            Select(id=1 + i, parent=0, choices=(("x",), ("y",)), temperature=1.0, seed=i // 2) for i in range(40)
        ]
        done = run(engine, *nodes)
    values = [done[1 + i].value for i in range(40)]
    assert values[::2] == values[1::2]
    meta = done[1].meta
    assert meta is not None
    assert abs(values.count("x") / 40 - meta["probs"][0]) < 0.35


def test_a_constraint_is_compiled_and_obeyed() -> None:
    with scripted({"year": "1999", "colour": "red"}) as engine:
        done = run(
            engine,
            Text(id=0, parts=("year ",)),
            Generate(id=1, parent=0, constraint=Constraint("regex", "[0-9]{4}"), type="int"),
            Text(id=2, parts=("colour ",)),
            Generate(id=3, parent=2, constraint=Constraint("choice", '["green", "blue"]')),
        )
    assert done[1].value == 1999
    assert done[3].value in ("green", "blue")


def test_a_constraint_that_does_not_compile_fails_its_node() -> None:
    with scripted() as engine:
        node = Generate(id=1, parent=0, constraint=Constraint("regex", "(["))
        done = run(engine, Text(id=0, parts=("a",)), node)
        assert done[1].error is not None
        assert done[1].error.type == "InvalidRegex"
        engine.submit("the engine lives").result()


def test_a_value_cut_by_max_tokens_is_flagged_and_never_passed_off_as_complete() -> None:
    with scripted({"x": '{"a": 1'}) as engine:
        node = Generate(id=1, parent=0, sampling=Sampling(max_tokens=4), type="json")
        done = run(engine, Text(id=0, parts=("x",)), node)
    assert done[1].kind == "done"
    assert done[1].value is None
    assert done[1].finish_reason == "length"
    assert done[1].error is not None
    assert "cut by max_tokens" in done[1].error.message


def test_a_failed_node_fails_what_needs_it_and_cancels_the_rest() -> None:
    boom = RametError("no luck")
    with scripted(failures={"bad": boom}, latency_s=0.002) as engine:
        program = Program(engine).extend(
            Fork(id=0, group=0, index=0, width=2),
            Fork(id=1, group=0, index=1, width=2),
            Text(id=2, parent=0, parts=("bad",)),
            Generate(id=3, parent=2),
            Text(id=4, parent=3, parts=("after",)),
            Text(id=5, parent=1, parts=("good",)),
            Generate(id=6, parent=5),
            Join(id=7, branches=(4, 6)),
        )
        done = program.wait()
        assert done[3].cause is boom
        assert done[3].error is not None
        assert done[3].error.prompt_tail == "bad"
        assert done[4].cause is boom
        assert done[4].error is not None
        assert done[4].error.prompt_tail == "", "behind a node that failed there is no text"
        assert done[6].error is not None
        assert done[6].error.type == "ProgramCancelled"
        assert "node 3" in done[6].error.message
        assert isinstance(done[7].cause, ProgramCancelled)
        again = program.extend(
            Text(id=8, parts=("fine",)), Generate(id=9, parent=8), Text(id=10, parent=4, parts=("x",))
        )
        assert again.wait(9)[9].kind == "done"
        assert again.wait(10)[10].cause is boom
        engine.submit("the engine lives").result()


def test_cancelling_ends_requests_and_what_comes_later() -> None:
    with scripted(latency_s=0.05) as engine:
        program = Program(engine).extend(Text(id=0, parts=("a",)), Generate(id=1, parent=0), Generate(id=2, parent=1))
        program.executor.cancel()
        done = program.wait()
        assert isinstance(done[1].cause, ProgramCancelled)
        assert isinstance(done[2].cause, ProgramCancelled)
        assert isinstance(program.extend(Text(id=3, parts=("b",))).wait(3)[3].cause, ProgramCancelled)
        deadline = time.monotonic() + 5
        while engine.stats().num_cancelled < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().num_cancelled == 1


def test_one_branch_can_be_cancelled_alone() -> None:
    with scripted(latency_s=0.02) as engine:
        program = Program(engine).extend(
            Text(id=0, parts=("a",)),
            Generate(id=1, parent=0),
            Text(id=2, parts=("b",)),
            Generate(id=3, parent=2),
        )
        program.executor.cancel([3])
        done = program.wait()
    assert done[1].kind == "done"
    assert isinstance(done[3].cause, ProgramCancelled)


def test_a_deadline_ends_the_program() -> None:
    with scripted(latency_s=0.05) as engine:
        program = Program(engine, deadline_s=time.monotonic() + 0.08)
        done = program.extend(Text(id=0, parts=("a",)), Generate(id=1, parent=0), Generate(id=2, parent=1)).wait()
    assert isinstance(done[1].cause, DeadlineExceeded)


def test_a_token_budget_holds_over_all_generations() -> None:
    with scripted() as engine:
        gens = [Generate(id=1 + i, parent=0, sampling=Sampling(max_tokens=30, seed=i)) for i in range(8)]
        done = Program(engine, token_budget=50).extend(Text(id=0, parts=("a",)), *gens).wait()
        assert engine.stats().completion_tokens <= 50
    errors = [event for event in done.values() if event.error is not None]
    assert errors
    assert any("token budget of 50" in event.error.message for event in errors if event.error is not None)


def test_tool_calls_are_asked_for_and_answered() -> None:
    with scripted() as engine:
        program = Program(engine).extend(
            ToolCall(id=0, tool="add", arguments=('{"a": 1, "b": 2}',), name="sum"),
            Text(id=1, parts=("sum: ", Ref(0))),
            ToolCall(id=2, parent=1, tool="fail", arguments=("{}",)),
        )
        asked = next(event for event in program.events if event.kind == "tool")
        assert asked.value == {"tool": "add", "arguments": {"a": 1, "b": 2}}
        program.executor.provide(0, 3)
        assert program.text(1) == "sum: 3"
        program.executor.provide(2, error=ValueError("broken"))
        assert isinstance(program.wait(2)[2].cause, ValueError)


def test_an_argument_without_value_is_refused() -> None:
    with scripted() as engine, pytest.raises(InvalidProgram, match="'city' has no value"):
        Program(engine).extend(Argument(id=0, name="city"))


def test_ten_thousand_branches_need_no_threads_of_their_own() -> None:
    width = 10_000
    before = threading.active_count()
    forks = [Fork(id=1 + i, parent=0, group=1, index=i, width=width) for i in range(width)]
    gens = [Generate(id=1 + width + i, parent=1 + i, sampling=Sampling(max_tokens=1)) for i in range(width)]
    with scripted() as engine:
        program = Program(engine).extend(Text(id=0, parts=("q",)), *forks, *gens)
        assert threading.active_count() <= before + 2
        done = program.wait()
    assert all(event.kind == "done" for event in done.values())


def test_a_generation_without_a_limit_takes_what_is_left_of_the_context() -> None:
    with scripted({"x": "y" * 200}, context_length=60) as engine:
        done = run(engine, Text(id=0, parts=("x" * 40,)), Generate(id=1, parent=0))
        assert done[1].finish_reason == "length"
        assert len(done[1].text) == 20
        done = run(engine, Text(id=0, parts=("x" * 70,)), Generate(id=1, parent=0))
        assert done[1].error is not None
        assert done[1].error.type == "ContextOverflow"


@pytest.mark.parametrize(("count", "is_aside"), [(8, False), (MANY_REQUESTS + 1, True)])
def test_the_scores_of_very_many_choices_are_read_beside_the_engines_thread(
    monkeypatch: pytest.MonkeyPatch, count: int, is_aside: bool
) -> None:
    took: list[int] = []
    read: list[int] = []
    take, result = Selection.take, Selection.result

    def noted_take(self: Selection, *arguments: Any) -> None:
        took.append(threading.get_ident())
        take(self, *arguments)

    def noted_result(self: Selection) -> Any:
        read.append(threading.get_ident())
        return result(self)

    monkeypatch.setattr(Selection, "take", noted_take)
    monkeypatch.setattr(Selection, "result", noted_result)
    with ScriptedEngine() as engine:
        choices = tuple((f"{number} choice",) for number in range(count))
        done = Program(engine).extend(Text(id=0, parts=("x",)), Select(id=1, parent=0, choices=choices)).wait()
    assert done[1].value in {choice for (choice,) in choices}
    assert (read[0] not in took) == is_aside

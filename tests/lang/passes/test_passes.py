"""The passes, each by itself on small graphs."""

from __future__ import annotations

from typing import Any

import pytest

from ramet import Function, MockBackend, State, function, gen, select
from ramet.errors import ConfigError
from ramet.lang.graph import ir
from ramet.lang.passes.argument_motion import argument_motion
from ramet.lang.passes.constraints import tokens_at_start
from ramet.lang.passes.fold import fold_constants
from ramet.lang.passes.fork_groups import fork_groups
from ramet.lang.passes.liveness import liveness
from ramet.lang.passes.paths import Count, Opaque, Paths, interpret
from ramet.lang.passes.prefixes import batch_prefixes, static_prefixes
from ramet.lang.passes.requests import kv_bound, plan_requests, run_order
from ramet.lang.passes.target import target_of
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

TARGET = ProgramModel(ByteTokenizer())


def graph_of(program: Function, **arguments: Any) -> ir.Graph:
    return program.trace(**arguments).graph


def paths_of(program: Function, **arguments: Any) -> Paths:
    return interpret(graph_of(program, **arguments), TARGET)


@function(max_tokens=10)
def letter(s: State, name: str, topic: str) -> None:
    s += "Dear "
    s += f"{name}, "
    s += f"about {topic}: "
    s += gen("body")
    s += " Yours,"
    s += " me."
    s += gen("postscript", temperature=0)


@function(max_tokens=8)
def debate(s: State) -> None:
    s += "The question. "
    branches = s.fork(3)
    branches += [f"Side {i}: " for i in range(3)]
    branches += gen("speech", temperature=0)
    branches.join()
    s += "Verdict: " + select("verdict", ["yes", "no"], scorer="likelihood")


# Constant folding.


def test_bound_arguments_become_text_and_adjoining_texts_become_one() -> None:
    folded = fold_constants(graph_of(letter, name="Ann", topic="rain"))
    texts = [node.parts for node in folded.nodes if isinstance(node, ir.Text)]
    assert texts == [("Dear Ann, about rain: ",), (" Yours, me.",)]
    assert not any(isinstance(node, ir.Argument) for node in folded.nodes)
    assert folded.arguments == {}


def test_an_argument_without_a_value_stays() -> None:
    folded = fold_constants(graph_of(letter, name="Ann"))
    first = next(node for node in folded.nodes if isinstance(node, ir.Text))
    argument = next(node for node in folded.nodes if isinstance(node, ir.Argument))
    assert first.parts == ("Dear Ann, about ", ir.Ref(argument.id), ": ")


@pytest.mark.parametrize("program", [letter, debate])
def test_a_folded_graph_is_valid_and_writes_the_same_text(program: Function) -> None:
    arguments = {"name": "Ann", "topic": "rain"} if program is letter else {}
    graph = graph_of(program, **arguments)
    folded = fold_constants(graph)
    assert ir.Graph.from_json(folded.to_json()) == folded
    before, after = (plan_requests(interpret(g, TARGET)) for g in (graph, folded))
    assert [(r.prompt, r.shared, r.new) for r in before.requests] == [
        (r.prompt, r.shared, r.new) for r in after.requests
    ]


def test_text_is_not_merged_over_a_place_that_others_name() -> None:
    @function
    def program(s: State) -> None:
        s += "a"
        with s.var_scope("kept"):
            s += "b"
            s += "c"
        branch = s.fork(1)[0]
        s += "d"
        branch += "e"

    folded = fold_constants(graph_of(program))
    assert [n.parts for n in folded.nodes if isinstance(n, ir.Text)] == [("a",), ("bc",), ("d",), ("e",)]


def test_a_format_and_a_choice_are_folded_too() -> None:
    @function
    def program(s: State, n: int, word: str) -> None:
        s += f"{n:>4} " + select("x", [f"{word}s", "other"])

    folded = fold_constants(graph_of(program, n=7, word="cat"))
    text, choice = (n for n in folded.nodes if isinstance(n, ir.Text | ir.Select))
    assert isinstance(text, ir.Text)
    assert isinstance(choice, ir.Select)
    assert text.parts == ("   7 ",)
    assert choice.choices == (("cats",), ("other",))


# Paths.


def test_known_text_is_tokens_and_generated_text_is_bounded() -> None:
    paths = paths_of(letter, name="Ann", topic="rain")
    prompts = [paths.prompts[n.id] for n in paths.graph.nodes if isinstance(n, ir.Generate)]
    assert bytes(i for i in prompts[0].all_items() if isinstance(i, int)) == b"Dear Ann, about rain: "
    assert prompts[0].count == Count(22, 22)
    assert prompts[1].count == Count(22 + 11, 22 + 10 + 11)
    assert next(i for i in prompts[1].all_items() if isinstance(i, Opaque)).count == Count(0, 10)


def test_a_choice_is_bounded_by_the_longest() -> None:
    @function
    def program(s: State) -> None:
        s += "Is it? " + gen("x", choices=["yes", "certainly"]) + "!" + gen("y", max_tokens=1)

    paths = paths_of(program)
    assert [p.count for p in paths.prompts.values()][1] == Count(8, 8 + 9)


def test_text_with_an_unknown_value_has_a_limit_in_tokens() -> None:
    @function
    def program(s: State) -> None:
        s += "A: " + gen("x", max_tokens=4)
        s += f" [{s['x']}] " + gen("y", max_tokens=1)

    count = [p.count for p in paths_of(program).prompts.values()][1]
    assert count.at_least == 3 + len(" [] ")
    # Four bytes that are no UTF-8 are shown as four characters of three bytes.
    assert count.at_most == 3 + 4 + len(" [] ") + 3 * 4 + 2


def test_the_whole_prompt_is_never_taken_to_be_longer_than_the_context() -> None:
    small = ProgramModel(ByteTokenizer(), context_length=64)
    paths = interpret(graph_of(letter), small)
    plan = plan_requests(paths)
    assert kv_bound(plan, context_length=64).longest == 64


# Requests.


def test_branches_share_what_stands_before_their_fork() -> None:
    plan = plan_requests(paths_of(debate))
    assert [str(r.shared) for r in plan.requests[:3]] == ["0", "19", "19"]  # "The question. Side "
    assert [str(r.new) for r in plan.requests[:3]] == ["22", "3", "3"]
    # Scoring "yes" reads "ye", scoring "no" reads "n"; the last token of the one that is chosen may follow.
    assert plan.kv.at_most == 22 + 2 * 3 + 3 * 8 + len("Verdict: yen") + 1


def test_the_order_of_a_run_is_that_of_readiness() -> None:
    order = [node.id for node in run_order(graph_of(debate))]
    assert sorted(order) == list(range(len(order)))
    position = {node: i for i, node in enumerate(order)}
    for node in graph_of(debate).nodes:
        assert all(position[used] < position[node.id] for used in ir.dependencies(node))


def test_a_turn_adds_its_own_text_and_at_most_the_last_token_written() -> None:
    plan = plan_requests(paths_of(letter, name="Ann", topic="rain"))
    assert plan.requests[1].added == len(" Yours, me.")
    assert plan.requests[1].new == Count(11, 12)


# Static prefixes.


def test_the_longest_prefix_of_all_readers_is_found_with_its_line() -> None:
    paths = paths_of(debate)
    found = static_prefixes(paths)
    assert found[0].num_tokens == len("The question. ")
    assert found[0].num_readers == 3 + 2  # three speeches, and two choices
    assert found[1].num_tokens == len("The question. Side ")
    assert "test_passes.py:" in found[0].line


def test_rows_that_begin_alike_are_put_next_to_each_other() -> None:
    @function
    def program(s: State, document: str, question: str) -> None:
        s += f"Read this: {document}. {question} " + gen("answer")

    rows = [("cat", "Who?"), ("dog", "Who?"), ("cat", "Why?"), ("dog", "Why?")]
    with MockBackend() as backend:
        graphs = [program.run(*row, backend=backend).record.graph for row in rows]
    found = batch_prefixes(graphs, TARGET)
    assert found.common == len("Read this: ")
    assert found.order == (0, 2, 1, 3)
    assert found.groups == 2
    assert found.separate == sum(len(f"Read this: {d}. {q} ") for d, q in rows)
    assert found.computed == len("Read this: ") + 2 * (len("cat. Wh") + len("o? ") + len("y? "))


# Identical nodes.


def test_equal_prompts_with_greedy_or_one_seed_are_twins_and_unseeded_samples_are_not() -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "Go: "
        branches = s.fork(6)
        values: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0}, {"seed": 1}, {"seed": 1}, {}, {}]
        branches += [gen("x", **given) for given in values]
        branches += " and " + gen("y", temperature=0)

    paths = paths_of(program)
    first, again = ([n.id for n in paths.graph.nodes if isinstance(n, ir.Generate) and n.name == x] for x in "xy")
    assert paths.twins == {first[1]: first[0], first[3]: first[2], again[1]: again[0], again[3]: again[2]}
    assert paths.unseeded == [first[5]]


# Liveness.


def test_every_segment_knows_who_reads_it_and_who_reads_it_last() -> None:
    segments, order = liveness(paths_of(debate))
    question = next(s for s in segments if s.start == Count(0, 0))
    assert question.reads[:3] == tuple(order[:3])
    assert {s.count.at_least for s in segments if s.last_use == order[0]} == {len("Side 0: "), 0}


# KV bound, fork groups, forced tokens.


def test_the_bound_counts_shared_tokens_once() -> None:
    paths = paths_of(debate)
    found = kv_bound(plan_requests(paths), context_length=1 << 20)
    assert found.tokens == 22 + 6 + 24 + 12 + 1
    assert found.known == 22 + 6 + 12  # a branch may write nothing
    assert found.longest == 22 + 8


def test_fork_groups_say_how_much_is_read_once() -> None:
    @function
    def program(s: State) -> None:
        s += "0123456789"
        for branch in s.fork(2):
            branch += "ab"
            for inner in branch.fork(3):
                inner += gen("x")

    outer, *inner = fork_groups(paths_of(program))
    assert (len(outer.branches), outer.prefix, outer.depth, outer.num_decoding) == (2, Count(10, 10), 0, 6)
    assert outer.reads_saved == 50
    assert [(g.prefix, g.depth, g.num_decoding) for g in inner] == [(Count(12, 12), 1, 3)] * 2


def test_text_between_generations_is_counted_as_appended() -> None:
    paths = paths_of(letter, name="Ann", topic="rain")
    assert plan_requests(paths).appended == len(" Yours, me.")
    assert tokens_at_start(paths.graph, TARGET) == {}


def test_tokens_that_a_constraint_begins_with_are_known_before() -> None:
    @function
    def program(s: State) -> None:
        s += "Say: " + gen("x", regex="answer: [0-9]")

    assert list(tokens_at_start(graph_of(program), TARGET).values()) == [len("answer: ")]


# Argument motion.


def test_an_argument_before_constants_costs_them() -> None:
    @function
    def program(s: State, date: str, question: str) -> None:
        s += f"It is {date}. "
        s += "Answer in one sentence, without any doubt. "
        s += f"{question} " + gen("answer")

    found = argument_motion(paths_of(program), TARGET)
    assert [(m.argument, m.shared_now) for m in found] == [("date", len("It is "))]
    assert found[0].gain == len(". Answer in one sentence, without any doubt.  ")
    assert "test_passes.py:" in found[0].line


def test_without_arguments_there_is_nothing_to_move() -> None:
    assert argument_motion(paths_of(debate), TARGET) == []


def test_a_backend_that_keeps_its_tokenizer_to_itself_is_an_error() -> None:
    class Elsewhere:
        def start(self, options: Any, on_event: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Elsewhere doesn't tell how it tokenises"):
        target_of(Elsewhere())
    assert target_of(MockBackend()).name == "SubwordTokenizer"

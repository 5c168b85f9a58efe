"""`thinking=`: free text between the marks of the chat template, and only the value after it is constrained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ramet import CheckFailed, EngineBackend, MockBackend, State, assistant, function, gen, sequence, user
from ramet.errors import InvalidRequest, ProgramError
from ramet.lang.graph import ir
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.role_marks import RoleMarks

QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MAGISTRAL = QWEN.replace("<think>\n\n</think>\n\n", "[THINK][/THINK]")
SCRIPT = {
    "<think>": "41 and 1\nmake 42.\n</think>\n\nso 7",
    "[THINK]": "41 and 1\nmake 42.[/THINK]so 7",
    "</think>": "42",
    "[/THINK]": "42",
}


def reasoning(template: str, script: object = SCRIPT, context_length: int = 1 << 20) -> EngineBackend:
    """A scripted engine whose chat template has thinking."""
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = ChatTemplate(template)
    return EngineBackend(ScriptedEngine(script, context_length=context_length, tokenizer=tokenizer))  # type: ignore[arg-type]


@pytest.fixture
def backend() -> Iterator[EngineBackend]:
    with reasoning(QWEN) as found:
        yield found


@function
def answer(s: State, budget: bool | int = True) -> None:
    s += user("What is 41 + 1?")
    s += assistant(gen("n", int, thinking=budget))


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (QWEN, "<think>\n41 and 1\nmake 42.\n</think>\n\n42"),
        (DEEPSEEK, "<think>\n41 and 1\nmake 42.\n</think>\n\n42"),
        (MAGISTRAL, "[THINK]41 and 1\nmake 42.[/THINK]42"),
    ],
)
def test_a_model_thinks_between_the_marks_of_its_template_before_the_value(template: str, written: str) -> None:
    with reasoning(template) as backend:
        state = answer.run(backend=backend)
        assert state["n"] == 42
        assert state.meta("n")["thinking"] == "41 and 1\nmake 42."
        assert written in state.text()
        assert state.text().count("think>") <= 2
        assert answer.compile().run(backend=backend).meta("n")["thinking"] == "41 and 1\nmake 42."


def test_a_spent_budget_ends_the_thinking_by_the_mark(backend: EngineBackend) -> None:
    state = answer.run(budget=5, backend=backend)
    assert state["n"] == 42
    assert state.meta("n")["thinking"] == "41 an"
    assert "<think>\n41 an</think>\n\n42" in state.text()


def test_thinking_takes_no_more_than_half_of_the_context(backend: EngineBackend) -> None:
    endless = {"<think>": "hm " * 5000, "</think>": "42"}
    with reasoning(QWEN, endless, 300) as short:
        state = answer.run(budget=1000, backend=short)
    assert state["n"] == 42
    assert len(state.meta("n")["thinking"]) < 150


def test_the_graph_has_the_thinking_as_nodes_of_its_own(backend: EngineBackend) -> None:
    graph = answer.trace(budget=7).graph
    kinds = [node.kind_name for node in graph.nodes if not isinstance(node, ir.Role | ir.Text)]
    assert kinds == ["thinking", "generate", "thinking", "generate"]
    assert ir.Graph.from_json(graph.to_json()) == graph
    thought = next(node for node in graph.nodes if isinstance(node, ir.Generate))
    assert ir.is_thinking(graph.nodes, thought)
    assert (thought.sampling.max_tokens, thought.constraint) == (7, None)
    assert "generate" in str(answer.explain(backend=backend, budget=7))


def test_values_that_are_retried_are_thought_about_once(backend: EngineBackend) -> None:
    seen: list[int] = []

    def is_late(n: int) -> bool:
        seen.append(n)
        return False

    @function
    def program(s: State) -> None:
        s += user("?")
        s += assistant(gen("n", int, thinking=9, where=is_late, retries=1))

    with pytest.raises(CheckFailed):
        program.run(backend=backend)
    assert seen == [42, 42]
    assert isinstance(backend.engine, ScriptedEngine)
    assert backend.engine.stats().num_requests == 3


def test_a_grammar_can_be_thought_about(backend: EngineBackend) -> None:
    @function
    def program(s: State) -> None:
        s += user("?")
        s += assistant(gen("whole", sequence(gen("n", int)), thinking=50))

    state = program.run(backend=backend)
    assert (state["n"], state.meta("whole")["thinking"]) == (42, "41 and 1\nmake 42.")


def test_a_template_without_thinking_fails_the_node_with_its_reason() -> None:
    with MockBackend() as mock:
        state = answer.run(backend=mock, failures="keep")
        with pytest.raises(ProgramError, match="has no thinking; leave `thinking` out"):
            state["n"]


@pytest.mark.parametrize("wrong", [-1, "yes", 1.5])
def test_a_budget_that_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="must be True or a number of tokens"):
        gen("n", thinking=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="thinks inside of a grammar"):
        gen("x", sequence(gen("n", thinking=3)))


def test_a_template_that_opens_the_thinking_itself_needs_no_mark() -> None:
    marks = RoleMarks(ChatTemplate(DEEPSEEK))
    talk, text = marks.mark(None, "", ir.Role(id=0, role="user", is_open=True))
    talk, text = marks.mark(talk, text, ir.Role(id=1, role="user", is_open=False))
    talk, text = marks.mark(talk, text, ir.Role(id=2, role="assistant", is_open=True))
    assert marks.mark(talk, text, ir.Thinking(id=3, is_open=True))[1] == ""
    assert marks.mark(talk, "", ir.Thinking(id=4, is_open=True))[1] == "<think>\n", "text stands between"

"""Reasoning is told apart from the answer, however the text is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.server.openai.reasoning import Position, ReasoningCounter, ReasoningSplitter, position_after

Client = Any  # of conftest.py
PIECES = ["<think>", "</think>", "<", "</thi", "think>", " ", "\n", "a", "é", "b c"]
BYTES = [bytes([value]) for value in range(256)]


def split(text: str, cuts: list[int], position: Position) -> tuple[str, str]:
    splitter = ReasoningSplitter(position)
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [splitter.push(text[a:b]) for a, b in itertools.pairwise(borders)]
    parts.append(splitter.finish())
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.integers(0, 200), max_size=20),
    st.sampled_from(["before", "inside", "behind"]),
)
def test_every_way_of_cutting_a_text_gives_the_same_parts(text: str, cuts: list[int], position: Position) -> None:
    whole = split(text, [], position)
    assert split(text, cuts, position) == whole
    assert split(text, list(range(len(text))), position) == whole


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "before", ("hm", "Yes.")),
        ("  <think>hm</think>Yes.", "before", ("hm", "Yes.")),
        ("hm\n</think>\nYes.", "inside", ("hm", "Yes.")),
        ("<think>hm", "before", ("hm", "")),
        ("<think>hm</thi", "before", ("hm</thi", "")),
        (" Yes <think>no</think>", "before", ("", " Yes <think>no</think>")),
        ("<thin", "before", ("", "<thin")),
        ("<think>a</think>b</think>c", "before", ("a", "b</think>c")),
        ("<think>\n\n</think>\n\nYes", "before", ("", "Yes")),
        ("<think>x</think>", "behind", ("", "<think>x</think>")),
    ],
)
def test_the_parts_of_a_text(text: str, position: Position, expected: tuple[str, str]) -> None:
    assert split(text, [], position) == expected


@pytest.mark.parametrize(
    ("prompt", "position"),
    [("...assistant\n", "before"), ("...\n<think>\n", "inside"), ("...<think>\n\n</think>\n\n", "behind")],
)
def test_the_prompt_says_where_the_answer_begins(prompt: str, position: str) -> None:
    assert position_after(prompt) == position


@given(st.lists(st.integers(0, 100), max_size=10))
def test_tokens_of_reasoning_are_counted_with_their_tags_however_they_come(cuts: list[int]) -> None:
    text = b" <think>\nhm \xc3\xa9</think>\n\nYes."
    counter = ReasoningCounter(BYTES, "before")
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for a, b in itertools.pairwise(borders):
        counter.push(list(text[a:b]))
    assert counter.count == text.index(b"</think>") + len(b"</think>")
    plain = ReasoningCounter(BYTES, "before")
    plain.push(list(b"  <thin air"))
    assert plain.count == 0


def test_reasoning_is_a_field_of_its_own_in_answers_and_streams(client: Client, merge_deltas: Any) -> None:
    text = "<think>\nhm\n</think>\n\nYes."
    for cuts in ([], list(range(len(text)))):
        client.engine.says(text, cuts=cuts)
        answer = client.chat()
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")
        num = len("<think>\nhm\n</think>")
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num}
        streamed = merge_deltas(client.chunks())
        assert (streamed["reasoning_content"], streamed["content"]) == ("hm", "Yes.")


def test_reasoning_can_be_left_in_the_content(client: Client) -> None:
    client.engine.says("<think>hm</think>Yes.")
    message = client.chat(separate_reasoning=False)["choices"][0]["message"]
    assert message["content"] == "<think>hm</think>Yes."
    assert "reasoning_content" not in message


HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


MAGISTRAL = HYBRID.replace("<think>\n\n</think>\n\n", "[THINK][/THINK]")


@pytest.mark.parametrize(("template", "end"), [(HYBRID, "</think>\n\n"), (MAGISTRAL, "[/THINK]")])
@pytest.mark.parametrize("is_constrained", [True, False])
def test_reasoning_past_its_budget_is_ended_in_the_words_of_the_template(
    make_client: Any, replay: Any, template: str, end: str, is_constrained: bool
) -> None:
    client = make_client(template)

    def script(command: Any) -> Any:
        if bytes(token for token in command.prompt_ids if token < 256).endswith(end.encode()):
            return replay(command, '{"a":1}')
        return replay(command, "hm, hm, hm", finish="length")

    client.engine.script = script
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    form = {"response_format": schema} if is_constrained else {}
    answer = client.chat(max_tokens=100, max_thinking_tokens=10, **form)
    free, rest = client.engine.submitted
    assert free.sampling.max_tokens == 10
    assert free.constraint is None
    assert (rest.constraint is not None) == is_constrained
    thought = b"hm, hm, hm" + end.encode()
    assert bytes(rest.prompt_ids[len(free.prompt_ids) :]) == thought
    assert rest.sampling.max_tokens == 100 - len(thought)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, hm, hm", '{"a":1}')
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_budget_as_large_as_the_answer_ends_the_answer(make_client: Any, replay: Any) -> None:
    client = make_client(HYBRID)

    def script(command: Any) -> Any:
        return replay(command, "hm, hm, hm", finish="length")

    client.engine.script = script
    answer = client.chat(max_tokens=10, max_thinking_tokens=20)
    assert len(client.engine.submitted) == 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_model_that_does_not_reason_refuses_a_budget(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_thinking_tokens": 10}
    error = client.refusal("/v1/chat/completions", body)
    assert error["param"] == "max_thinking_tokens"
    assert "has no thinking" in error["message"]


def test_a_constrained_answer_may_reason_first(make_client: Any, replay: Any) -> None:
    client = make_client(HYBRID)

    def script(command: Any) -> Any:
        if command.constraint is not None:
            return replay(command, '{"a":1}', cuts=[3])
        said = replay(command, "hm, hm\n</think>", cuts=[7, 10], stop="</think>")
        said[1].text = said[2].text = ""  # a stop string is no text, but its tokens are tokens
        return said

    client.engine.script = script
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    answer = client.chat(response_format=schema, max_tokens=100)
    free, constrained = client.engine.submitted
    assert (free.constraint, free.sampling.stop) == (None, ("</think>",))
    assert bytes(free.prompt_ids[-8:]) == b"<think>\n"
    assert constrained.constraint.kind == "json_schema"
    thought = b"hm, hm\n</think>\n\n"
    assert bytes(constrained.prompt_ids[len(free.prompt_ids) :]) == thought
    assert constrained.prompt_ids[: len(free.prompt_ids)] == free.prompt_ids
    assert constrained.sampling.max_tokens == 100 - len(thought) - 1  # and the end token
    message = answer["choices"][0]["message"]
    assert message["content"] == '{"a":1}'
    assert message["reasoning_content"] == "hm, hm"
    assert answer["usage"]["prompt_tokens"] == len(free.prompt_ids)
    assert answer["usage"]["completion_tokens"] == len(thought) + 1 + len('{"a":1}') + 1

    client.chat(response_format=schema, chat_template_kwargs={"enable_thinking": False})
    assert client.engine.submitted[-1].constraint is not None
    assert len(client.engine.submitted) == 3
    client.chat(response_format=schema, reasoning_effort="none")
    assert len(client.engine.submitted) == 4


def test_an_effort_that_the_template_does_not_know_is_a_hint(client: Any) -> None:
    client.engine.says("ok")
    plain = client.chat()
    hinted = client.chat(reasoning_effort="high")
    assert hinted["choices"][0]["message"] == plain["choices"][0]["message"]
    first, second = client.engine.submitted
    assert first.prompt_ids == second.prompt_ids

"""Tool calls: the model's own format, the same calls however the stream is cut, never a cut call as a whole one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet.grammar.tools.events import ToolCallReader
from ramet.grammar.tools.formats import FORMATS
from ramet.runtime.server.openai.reasoning import ReasoningSplitter
from ramet.runtime.server.openai.tool_calls import AnswerReader
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tool_style import tool_style

Client = Any  # of conftest.py
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("add", "find")
]
TWO_CALLS = (
    "Let me see.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": "é }"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
)
_BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


def shows(before: str, after: str, inside: str = "'arguments'") -> str:
    """A template that writes calls as these texts around the JSON of name and arguments."""
    return (
        f"{_TOOLS}{_BODY}{{% for c in m.tool_calls or [] %}}{before}"
        '{"name": "{{ c.function.name }}", '
        f"{{{{ {inside} | tojson }}}}: {{{{ c.function.arguments | tojson }}}}}}{after}{{% endfor %}}{_END}"
    )


TEMPLATES = {
    "hermes": shows("<tool_call>\n", "\n</tool_call>"),
    "llama3": shows("", "", "'parameters'"),
    "mistral": shows("[TOOL_CALLS] [", "]"),
    "smollm2": shows("<tool_call>[", "]</tool_call>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_is_that_of_the_template_and_reads_what_it_writes(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name])
    style = tool_style(template)
    known = FORMATS[name]
    assert style.format.begin.replace(" ", "") == known.begin  # white space is the template's own
    assert (style.format.before_name, style.format.end) == (known.before_name, known.end)
    assert style.shows_tools
    assert style.shows_calls
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, "é"]}'}}
    history: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    opened = template.render(history[:1], add_generation_prompt=True, tools=TOOLS)
    text = template.render(history, add_generation_prompt=False, tools=TOOLS)[len(opened) :]
    reader = AnswerReader(None, style)
    reader.push(text.removesuffix("<|im_end|>\n"))
    reader.finish()
    assert [(c.name, json.loads(c.arguments), c.is_complete) for c in reader.calls] == [("add", {"a": [1, "é"]}, True)]


def test_an_unknown_format_is_made_from_what_the_template_writes() -> None:
    style = tool_style(ChatTemplate(shows("<<call>>", "<</call>>")))
    assert (style.format.marker, style.format.after_arguments) == ("<<call>>", "}<</call>>")
    text = style.written([("add", '{"a": 1}')])
    events = ToolCallReader(style.format)
    assert len(events.push(text.encode()) + events.finish()) == 3


def test_a_template_without_tools_gets_them_as_text(client: Client) -> None:
    client.engine.says("ok")
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    client.chat(messages=messages, tools=TOOLS)
    prompt = client.prompt_text()
    assert '"name":"add"' in prompt
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in prompt
    assert prompt.index("</tool_call><|im_end|>") < prompt.index("2<|im_end|>")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 300), max_size=40))
def test_every_way_of_cutting_the_stream_gives_the_same_calls(
    client: Client, merge_deltas: Any, cuts: list[int]
) -> None:
    client.engine.says(TWO_CALLS, cuts=cuts)
    message = merge_deltas(client.chunks(tools=TOOLS))
    assert message["content"] == "Let me see."
    assert [(c["name"], c["arguments"]) for c in message["tool_calls"]] == [("add", '{"a": "é }"}'), ("find", "{}")]
    assert message["finish_reason"] == "tool_calls"


def test_the_whole_answer_has_the_calls_of_the_stream(client: Client) -> None:
    client.engine.says(TWO_CALLS)
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["add", "find"]
    assert not any("incomplete" in call for call in choice["message"]["tool_calls"])


@pytest.mark.parametrize("end", range(len("Let me see."), len(TWO_CALLS.encode()), 7))
def test_a_cut_answer_is_never_a_tool_call_to_run(client: Client, merge_deltas: Any, end: int) -> None:
    client.engine.says(TWO_CALLS.encode()[:end], finish="length")
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "length"
    for call in choice["message"].get("tool_calls", []):
        if not call.get("incomplete"):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    streamed = merge_deltas(client.chunks(tools=TOOLS))
    assert [c["incomplete"] for c in streamed["tool_calls"]] == [
        call.get("incomplete", False) for call in choice["message"].get("tool_calls", [])
    ]


NAMED = '<tool_call>\n{"name": "add", "arguments": '


@pytest.mark.parametrize("end", range(NAMED.index("add") + 1, len(NAMED), 5))
def test_a_call_cut_behind_the_beginning_of_its_name_is_flagged_and_no_content(
    client: Client, merge_deltas: Any, end: int
) -> None:
    client.engine.says(NAMED[:end], finish="length")
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["incomplete"] is True
    assert call["function"]["name"]
    assert "add".startswith(call["function"]["name"])
    streamed = merge_deltas(client.chunks(tools=TOOLS))
    assert streamed["content"] == ""
    assert [c["incomplete"] for c in streamed["tool_calls"]] == [True]


@pytest.mark.parametrize("end", range(1, NAMED.index("add") + 1, 3))
@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_a_call_cut_before_its_name_is_neither_a_call_nor_content(
    client: Client, merge_deltas: Any, before: str, end: int
) -> None:
    client.engine.says(before + NAMED[:end], finish="length")
    choice = client.chat(tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"] or "").strip() == before.strip()
    assert "tool_calls" not in choice["message"]
    streamed = merge_deltas(client.chunks(tools=TOOLS))
    assert (streamed["content"].strip(), streamed["tool_calls"]) == (before.strip(), [])


def test_an_answer_that_ends_with_half_a_marker_by_itself_is_text(client: Client) -> None:
    client.engine.says("Type <tool", finish="stop")
    assert client.chat(tools=TOOLS)["choices"][0]["message"]["content"] == "Type <tool"


def test_a_conversation_does_not_go_on_from_an_answer_of_which_something_was_left_out(client: Client) -> None:
    client.engine.says("Let me see. <tool", finish="length")
    said = client.chat(tools=TOOLS)["choices"][0]["message"]["content"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    client.engine.says("ok")
    body = {"messages": [*messages, {"role": "user", "content": "Go on."}], "tools": TOOLS}
    history = client.request("/v1/chat/completions", body).json()["usage"]["history"]
    assert history["reused_tokens"] == 0


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "function": {"name": "find"}}, {"name": "find"}),
    ],
)
def test_each_choice_of_tools_becomes_a_constraint_and_may_be_joined_with_a_schema(
    client: Client, choice: Any, expected: Any
) -> None:
    client.engine.says("ok")
    client.chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    constraint = client.engine.submitted[-1].constraint
    source = json.loads(constraint.source)
    assert (constraint.kind, source["choice"], source["parallel"]) == ("tools", expected, False)
    client.chat(tools=TOOLS, tool_choice=choice, response_format={"type": "json_object"})
    constraint = client.engine.submitted[-1].constraint
    if choice == "none":
        assert constraint.kind == "json_schema"
    else:
        assert json.loads(constraint.source)["answer"] == {"type": "object"}


def test_a_tool_that_does_not_exist_and_a_constraint_that_excludes_calls_are_refused(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    named = {"type": "function", "function": {"name": "gone"}}
    assert client.refusal("/v1/chat/completions", {**body, "tool_choice": named})["param"] == "tool_choice"
    assert client.refusal("/v1/chat/completions", {**body, "regex": "a"})["param"] == "regex"


def test_calls_behind_reasoning_are_read() -> None:
    reader = AnswerReader(ReasoningSplitter(), tool_style(ChatTemplate(TEMPLATES["hermes"])))
    for character in "<think>hm</think>\n" + TWO_CALLS:
        reader.push(character)
    reader.finish()
    assert (reader.reasoning, reader.content, len(reader.calls)) == ("hm", "Let me see.", 2)


@given(
    cuts=st.lists(st.integers(0, 400), max_size=8),
    stops=st.sampled_from([["}"], ["add"], ["\n<"], ['"'], ["tool", "é"]]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stop_string_does_not_cut_a_call(
    client: Client, merge_deltas: Any, cuts: list[int], stops: list[str]
) -> None:
    client.engine.says(TWO_CALLS, cuts=cuts)
    choice = client.chat(tools=TOOLS, stop=stops, stop_regex='a": .')["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": "é }"}', "{}"]
    assert merge_deltas(client.chunks(tools=TOOLS, stop=stops))["finish_reason"] == "tool_calls"
    assert all(not command.sampling.has_stops for command in client.engine.submitted[-2:])


@given(cuts=st.lists(st.integers(0, 400), max_size=8), fields=st.sampled_from([{"stop": "me"}, {"stop_regex": "m."}]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stop_before_the_calls_ends_the_answer_there(
    client: Client, merge_deltas: Any, cuts: list[int], fields: dict[str, str]
) -> None:
    client.engine.says(TWO_CALLS, cuts=cuts, finish="length")
    answer = client.chat(tools=TOOLS, return_token_ids=True, **fields)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "Let ")
    assert choice["matched_stop"] == next(iter(fields.values()))
    assert "tool_calls" not in choice["message"]
    assert bytes(choice["token_ids"]) == b"Let me"
    assert answer["usage"]["completion_tokens"] == len("Let me")
    assert client.engine.streams[-1].was_aborted
    streamed = merge_deltas(client.chunks(tools=TOOLS, **fields))
    assert (streamed["content"], streamed["finish_reason"]) == ("Let ", "stop")


def test_a_stop_that_only_begins_before_a_cut_call_is_text(client: Client) -> None:
    client.engine.says('Go.\n<tool_call>\n{"name": "a', finish="length")
    choice = client.chat(tools=TOOLS, stop=["\n<x", "tool"])["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "Go.")
    assert choice["message"]["tool_calls"][0]["incomplete"] is True
    client.engine.says("Go <to", finish="length")
    assert client.chat(tools=TOOLS, stop=["tool"])["choices"][0]["message"]["content"] == "Go "

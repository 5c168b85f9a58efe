"""Anthropic's Messages API: blocks in and out, streams, errors, and what Claude Code sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

Json = dict[str, Any]
PATH = "/v1/messages"
TOOL = {
    "name": "look",
    "description": "Look at a file",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "a.txt"}}\n</tool_call>'
ASK: Json = {"model": "claude-any", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


def answered(client: Any, **body: Any) -> Json:
    response = client.request(PATH, {**ASK, **body})
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


def rebuilt(events: list[Json]) -> Json:
    """The message that a stream's events add up to, as the official client does it."""
    message: Json = {}
    texts: dict[int, str] = {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], message["content"][event["index"]]
            if delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            else:
                texts[event["index"]] += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
        elif event["type"] == "content_block_stop":
            block, text = message["content"][event["index"]], texts[event["index"]]
            if block["type"] == "tool_use":
                block["input"] = json.loads(text)
            else:
                block[block["type"]] = text
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    assert events[-1] == {"type": "message_stop"}
    return message


def test_a_stream_adds_up_to_the_whole_message(client: Any) -> None:
    client.engine.says(f"<think>Hm</think>Look: {CALL}", cuts=[3, 9, 30])
    whole = answered(client, tools=[TOOL])
    streamed = rebuilt(client.named_events(client.request(PATH, {**ASK, "tools": [TOOL], "stream": True})))
    thinking, text, call = whole["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm", "signature": "ramet"}
    assert text == {"type": "text", "text": "Look:"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "look", {"path": "a.txt"})
    assert whole["stop_reason"] == "tool_use"
    for message in (whole, streamed):
        message["id"] = message["content"][2]["id"] = ""
    assert streamed == whole


def test_an_answer_and_results_come_back_in_the_prompt(client: Any) -> None:
    client.engine.says(CALL)
    first = answered(
        client, tools=[TOOL], system=[{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]
    )
    (call,) = first["content"]
    results = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "HI!"}]},
        {"type": "text", "text": "Go on"},
    ]
    client.engine.says("ok")
    messages = [*ASK["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": results}]
    answered(client, tools=[TOOL], messages=messages, system="Be brief")
    prompt = client.prompt_text()
    assert prompt.index("Be brief") < prompt.index("a.txt") < prompt.index("HI!") < prompt.index("Go on")


def test_the_cached_part_of_the_prompt_is_counted_apart(client: Any) -> None:
    client.engine.cached_tokens = 5
    client.engine.says("ok")
    usage = answered(client)["usage"]
    counted = client.request(f"{PATH}/count_tokens", {k: v for k, v in ASK.items() if k != "max_tokens"}).json()
    assert usage["cache_read_input_tokens"] == 5
    assert usage["input_tokens"] + 5 == counted["input_tokens"]


def test_max_tokens_beyond_the_context_is_the_rest_of_the_context(client: Any) -> None:
    client.engine.says("ok")
    answered(client, max_tokens=64_000)
    submitted = client.engine.submitted[-1]
    assert submitted.sampling.max_tokens == 4096 - len(submitted.prompt_ids)


@pytest.mark.parametrize(
    ("finish", "stop", "reason", "sequence"),
    [("stop", 257, "end_turn", None), ("stop", "END", "stop_sequence", "END"), ("length", None, "max_tokens", None)],
)
def test_the_stop_reason_says_what_ended_the_message(
    client: Any, finish: str, stop: Any, reason: str, sequence: str | None
) -> None:
    client.engine.says("ok", finish=finish, stop=stop)
    message = answered(client, stop_sequences=["END"])
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_fields_of_coding_agents_are_taken(client: Any) -> None:
    client.engine.says("ok")
    answered(
        client,
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        metadata={"user_id": "x", "other": 1},
        messages=[*ASK["messages"], {"role": "system", "content": "Agents: none"}],
        tools=[TOOL, {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}],
    )
    assert "Agents: none" in client.prompt_text()
    assert "web_search" not in client.prompt_text()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tool_choice": {"type": "tool", "name": "other"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "gpt-5"}, "model"),
    ],
)
def test_a_wrong_request_names_its_field(client: Any, fields: Json, param: str) -> None:
    client.engine.says("ok")
    response = client.request(PATH, {**ASK, **fields})
    assert response.status_code == (404 if param == "model" else 400)
    body = response.json()
    assert body["type"] == "error"
    assert str(body["error"]["param"]).startswith(param), body
    assert not client.engine.submitted


def test_a_budget_of_thinking_ends_it(make_client: Any, replay: Any) -> None:
    client = make_client(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )

    def script(command: Any) -> Any:
        if bytes(token for token in command.prompt_ids if token < 256).endswith(b"</think>\n\n"):
            return replay(command, "four")
        return replay(command, "hm, hm, hm", finish="length")

    client.engine.script = script
    message = answered(client, thinking={"type": "enabled", "budget_tokens": 10})
    assert [free.sampling.max_tokens for free in client.engine.submitted[:1]] == [10]
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm, hm, hm", "signature": "ramet"},
        {"type": "text", "text": "four"},
    ]


def test_a_budget_of_thinking_means_nothing_to_a_model_that_does_not_think(client: Any) -> None:
    client.engine.says("ok")
    message = answered(client, thinking={"type": "enabled", "budget_tokens": 10})
    assert message["content"] == [{"type": "text", "text": "ok"}]


@pytest.mark.parametrize(("choice", "constrains"), [("any", True), ("auto", True), ("none", False)])
def test_tool_choice_decides_the_constraint(client: Any, choice: str, constrains: bool) -> None:
    client.engine.says(CALL if constrains else "no")
    message = answered(client, tools=[TOOL], tool_choice={"type": choice})
    assert (message["content"][0]["type"] == "tool_use") is constrains


def test_a_schema_constrains_the_text(client: Any) -> None:
    client.engine.says('{"n": 1}')
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answered(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert client.engine.submitted[-1].constraint.kind == "json_schema"


def test_an_answer_and_an_error_have_their_id_in_the_header_that_the_clients_read(client: Any) -> None:
    client.engine.says("ok")
    for body in (ASK, {}):
        headers = client.request(PATH, body).headers
        assert headers["request-id"] == headers["x-request-id"]
    assert "request-id" not in client.request("/v1/chat/completions", {}).headers


def test_a_call_that_no_tool_can_answer_is_refused_with_the_kinds_of_the_tools(client: Any) -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    error = client.refusal(PATH, {**ASK, "tools": [search], "tool_choice": {"type": "any"}})
    assert "web_search_20250305" in error["message"]
    body = {"input": "Hi", "tools": [{"type": "web_search"}], "tool_choice": "required"}
    assert "web_search" in client.refusal("/v1/responses", body)["message"]
    assert (
        "there are no tools" in client.refusal("/v1/responses", {"input": "Hi", "tool_choice": "required"})["message"]
    )

"""The Responses API: items in and out, streams, stored and background responses, and what coding agents send."""

from __future__ import annotations

import json
from typing import Any

import pytest

Json = dict[str, Any]
PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "look",
    "description": "Look at a file",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
LARK_TOOL = {"type": "custom", "name": "p", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "a.txt"}}\n</tool_call>'
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.reasoning_content %}[{{ m.reasoning_content }}]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def answered(client: Any, **body: Any) -> Json:
    response = client.request(PATH, {"input": "Hi", **body})
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


def events_of(client: Any, **body: Any) -> list[Json]:
    found: list[Json] = client.named_events(client.request(PATH, {"input": "Hi", "stream": True, **body}))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_text_is_a_message_item_and_the_request_is_echoed(client: Any) -> None:
    client.engine.says("Hello", cuts=[2])
    body = answered(client, instructions="Be brief", metadata={"a": "b"}, temperature=0.5, max_output_tokens=50)
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "annotations": [], "logprobs": [], "text": "Hello"}]
    assert body["object"] == "response"
    assert (body["status"], body["temperature"], body["metadata"]) == ("completed", 0.5, {"a": "b"})
    assert body["usage"]["output_tokens"] == 6
    assert "Be brief" in client.prompt_text()


@pytest.mark.parametrize("call", [False, True])
def test_a_stream_ends_with_the_response_that_a_whole_answer_is(client: Any, call: bool) -> None:
    client.engine.says(f"<think>Hm</think>Look: {CALL}" if call else "Hello there", cuts=[3, 9, 30])
    fields: Json = {"tools": [TOOL]} if call else {}
    whole = answered(client, **fields)
    events = events_of(client, **fields)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.completed"

    def plain(response: Json) -> Json:
        output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
        return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}

    assert plain(last["response"]) == plain(whole)
    assert [item["type"] for item in whole["output"]] == (
        ["reasoning", "message", "function_call"] if call else ["message"]
    )
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["response"]["output"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == ("Look:" if call else "Hello there")


def test_a_call_and_its_result_come_back_in_the_prompt(client: Any) -> None:
    client.engine.says(CALL)
    first = answered(client, tools=[TOOL])
    (call,) = first["output"]
    assert (call["name"], json.loads(call["arguments"])) == ("look", {"path": "a.txt"})
    client.engine.says("It says hi")
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": [{"type": "input_text", "text": "HI!"}],
    }
    again = answered(client, input=[{"role": "user", "content": "Hi"}, call, result], tools=[TOOL])
    assert again["output"][0]["content"][0]["text"] == "It says hi"
    assert "HI!" in client.prompt_text()
    assert "a.txt" in client.prompt_text()
    stored = answered(client, input=[result], tools=[TOOL], previous_response_id=first["id"])
    assert stored["previous_response_id"] == first["id"]
    assert client.engine.submitted[-1].prompt_ids == client.engine.submitted[-2].prompt_ids


def test_a_namespace_and_a_custom_tool_are_called_by_the_clients_names(client: Any) -> None:
    tools = [
        {
            "type": "namespace",
            "name": "agents",
            "description": "x",
            "tools": [{**TOOL, "name": "close", "strict": False}],
        },
        {"type": "custom", "name": "patch", "description": "Change files"},
        {"type": "web_search", "external_web_access": False},
    ]
    client.engine.says('<tool_call>\n{"name": "agents.close", "arguments": {"path": "1"}}\n</tool_call>')
    (call,) = answered(client, tools=tools)["output"]
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "close", "agents")
    assert "web_search" not in client.prompt_text()
    client.engine.says('<tool_call>\n{"name": "patch", "arguments": {"input": "*** a\\nb"}}\n</tool_call>')
    (patch,) = answered(client, tools=tools)["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "*** a\nb")
    history = [{"role": "user", "content": "Hi"}, call, patch]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "closed"},
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "done"},
    ]
    client.engine.says("ok")
    answered(client, input=[*history, *results], tools=tools)
    assert "agents.close" in client.prompt_text()


def test_reasoning_is_carried_by_the_client_and_taken_back(make_client: Any) -> None:
    client = make_client(THINKS)
    client.engine.says("<think>secret plan</think>Done")
    include = ["reasoning.encrypted_content"]
    first = answered(client, store=False, include=include, reasoning={"effort": "high", "summary": "auto"})
    reasoning, message = first["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "secret plan"}]
    del reasoning["content"], reasoning["summary"]
    message["content"][0]["text"] = "Edited"  # so the prompt is rendered anew
    answered(client, input=[{"role": "user", "content": "Hi"}, reasoning, message, {"role": "user", "content": "On"}])
    assert "[secret plan]" in client.prompt_text()
    reasoning["encrypted_content"] = "gAAAA-of-another-server"
    error = client.refusal(PATH, {"input": [reasoning, message]})
    assert error["param"] == "input[0].encrypted_content"


def test_leading_instructions_are_one_message(client: Any) -> None:
    client.engine.says("ok")
    items = [
        {"role": "developer", "content": "B"},
        {"role": "system", "content": "C"},
        {"role": "user", "content": "D"},
    ]
    answered(client, instructions="A", input=items)
    assert "A\n\nB\n\nC" in client.prompt_text()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "input_image", "image_url": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools[1]"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [LARK_TOOL]}, "tools[0].format"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "rs_unknown"}]}, "input[0].id"),
        ({"background": True, "store": False}, "background"),
        ({"input": [], "instructions": ""}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "gpt-5"}, "model"),
    ],
)  # fmt: skip
def test_a_wrong_request_names_its_field(client: Any, fields: Json, param: str) -> None:
    client.engine.says("ok")
    error = client.refusal(PATH, {"input": "Hi", **fields}, 404 if param == "model" else 400)
    assert str(error["param"]).startswith(param), error
    assert not client.engine.submitted


def test_allowed_tools_leave_the_prompt_as_it_is(client: Any) -> None:
    client.engine.says("ok")
    other = {**TOOL, "name": "other"}
    answered(client, tools=[TOOL, other])
    chosen = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    answered(client, tools=[TOOL, other], tool_choice=chosen)
    first, second = client.engine.submitted
    assert first.prompt_ids == second.prompt_ids
    assert '"look"' in first.constraint.source
    assert '"look"' not in second.constraint.source


def test_a_schema_constrains_the_text(client: Any) -> None:
    client.engine.says('{"n": 1}')
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answered(client, text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})
    assert client.engine.submitted[-1].constraint.kind == "json_schema"


def test_a_cut_answer_is_incomplete(client: Any) -> None:
    client.engine.says("Hello", finish="length")
    body = answered(client)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_cut_call_is_incomplete_and_keeps_its_part(client: Any) -> None:
    client.engine.says('<tool_call>\n{"name": "look", "arguments": {"pa', finish="length")
    (call,) = answered(client, tools=[TOOL])["output"]
    assert (call["status"], call["name"]) == ("incomplete", "look")


def test_stored_responses_are_fetched_listed_and_deleted(client: Any) -> None:
    client.engine.says("Hello")
    first = answered(client, input=[{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}])
    one = f"{PATH}/{first['id']}"
    assert client.request(one, None, "GET").json() == first
    page = client.request(f"{one}/input_items?limit=1&order=asc", None, "GET").json()
    assert (page["data"][0]["content"], page["has_more"]) == ("One", True)
    rest = client.request(f"{one}/input_items?order=asc&after={page['last_id']}", None, "GET").json()
    assert [item["content"] for item in rest["data"]] == ["Two"]
    answered(client, input=[{"type": "item_reference", "id": first["output"][0]["id"]}])
    assert client.request(one, None, "DELETE").json() == {"id": first["id"], "object": "response", "deleted": True}
    assert client.request(one, None, "GET").status_code == 404
    assert client.request(one, None, "DELETE").status_code == 404


def test_what_is_not_stored_cannot_be_continued(client: Any) -> None:
    client.engine.says("Hello")
    first = answered(client, store=False)
    assert client.refusal(PATH, {"input": "On", "previous_response_id": first["id"]})["param"] == "previous_response_id"


def test_truncation_leaves_out_the_oldest_items_and_keeps_the_instructions(client: Any) -> None:
    client.engine.says("ok")
    client.engine.hello.context_length = 600
    items = [{"role": "user", "content": f"Question {index} " + "x" * 100} for index in range(20)]
    answered(client, instructions="Be brief", input=items, truncation="auto")
    prompt = client.prompt_text()
    assert len(client.engine.submitted[-1].prompt_ids) < 600
    assert "Be brief" in prompt
    assert "Question 19" in prompt
    assert "Question 0" not in prompt


def test_the_prompt_is_counted_without_an_answer(client: Any) -> None:
    client.engine.says("ok")
    counted = client.request(f"{PATH}/input_tokens", {"input": "Hi"}).json()
    assert answered(client)["usage"]["input_tokens"] == counted["input_tokens"]
    assert len(client.engine.submitted) == 1


def test_an_error_of_the_engine_ends_a_stream_with_a_message(client: Any) -> None:
    client.engine.script = lambda command: []
    response = client.request(PATH, {"input": "Hi", "stream": True, "max_output_tokens": 0})
    assert response.status_code == 400
    assert response.json()["type"] == "error"

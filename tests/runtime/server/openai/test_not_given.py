"""What asks for nothing is not given: neutral values of known fields, and what clients add to answers."""

from __future__ import annotations

from typing import Any

import pytest

from ramet.runtime.server.validation import DEFAULTS, REFUSED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, Any] = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, COMPLETIONS: {"prompt": "Hi"}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_neutral_value_of_a_known_field_is_not_given(client: Any, path: str, name: str) -> None:
    client.engine.says("ok")
    values = [None, False, "", [], {}] + ([DEFAULTS[name]] if name in DEFAULTS else [])
    for value in values:
        body = {**BODIES[path], name: value}
        response = client.request(path, body)
        declared = response.status_code == 400 and response.json()["error"]["code"] == "invalid_value"
        assert response.status_code == 200 or declared, (value, response.text)
    assert client.engine.submitted


def test_what_is_asked_beside_neutral_values_is_still_refused_by_name(client: Any) -> None:
    error = client.refusal(CHAT, {**BODIES[CHAT], "lora_path": None, "functions": [], "web_search_options": {"a": 1}})
    assert error["param"] == "web_search_options"


def test_an_answer_is_taken_back_with_everything_that_clients_add(client: Any) -> None:
    client.engine.says("ok")
    answer = {
        "role": "assistant",
        "content": "Hello",
        "parsed": {"a": 1},
        "provider_specific_fields": {"x": [1]},
        "id": "msg_1",
        "refusal": None,
        "reasoning": "Hm",
        "thinking_blocks": [],
        "annotations": [],
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}},
                "custom": 1,
            }
        ],
    }
    messages = [
        {"role": "user", "content": "Hi"},
        answer,
        {"role": "tool", "content": "1", "tool_call_id": "call_1"},
    ]
    client.chat(messages=messages)
    assert "Hello" in client.prompt_text()
    wrong = [{"role": "user", "content": "Hi", "parsed": 1}]
    assert client.refusal(CHAT, {"messages": wrong})["param"] == "messages[0].parsed"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 0, "logprobs": False},
        {"stream_options": {}, "stream": False},
        {"verbosity": "low"},
        {"tools": [], "tool_choice": "auto"},
        {"stop": [], "logit_bias": {}},
    ],
)
def test_declared_fields_take_neutral_values(client: Any, fields: Any) -> None:
    client.engine.says("ok")
    client.chat(**fields)

"""Sessions of agents with tools, turn by turn: everything before the new message comes from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

Json = dict[str, Any]
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
TURNS = 10


def system(api: str) -> str:
    """Instructions of their own, so that no session finds those of another in the cache."""
    return f"You are an agent of {api} that looks at files. " * 40


def call(number: int) -> str:
    return f'⟦call look {{"path": "file {number}.txt"}}⟧'


def chats(http: httpx.Client) -> Iterator[Json]:
    function = {"name": "look", "description": "Look at a file", "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    messages: list[Json] = [{"role": "system", "content": system("chats")}]
    messages.append({"role": "user", "content": f"Begin. {call(0)}"})
    for number in range(1, TURNS + 1):
        answer = http.post("/v1/chat/completions", json={"messages": messages, "tools": tools}).json()
        yield answer["usage"]
        message = answer["choices"][0]["message"]
        (called,) = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": called["id"], "content": f"It says hi. {call(number)}"}
        messages += [message, result]


def responses(http: httpx.Client) -> Iterator[Json]:
    tools = [{"type": "function", "name": "look", "description": "Look at a file", "parameters": PARAMETERS}]
    items: list[Json] = [{"role": "user", "content": f"Begin. {call(0)}"}]
    body: Json = {"instructions": system("responses"), "tools": tools, "store": False}
    for number in range(1, TURNS + 1):
        answer = http.post("/v1/responses", json={**body, "input": items}).json()
        usage = answer["usage"]
        yield {
            "prompt_tokens": usage["input_tokens"],
            "completion_tokens": usage["output_tokens"],
            "prompt_tokens_details": usage["input_tokens_details"],
        }
        (called,) = answer["output"]
        output = f"It says hi. {call(number)}"
        items += [called, {"type": "function_call_output", "call_id": called["call_id"], "output": output}]


def messages(http: httpx.Client) -> Iterator[Json]:
    tools = [{"name": "look", "description": "Look at a file", "input_schema": PARAMETERS}]
    said: list[Json] = [{"role": "user", "content": f"Begin. {call(0)}"}]
    body: Json = {"model": "claude-any", "max_tokens": 500, "system": system("messages"), "tools": tools}
    for number in range(1, TURNS + 1):
        answer = http.post("/v1/messages", json={**body, "messages": said}).json()
        usage = answer["usage"]
        cached = usage["cache_read_input_tokens"]
        yield {
            "prompt_tokens": usage["input_tokens"] + cached,
            "completion_tokens": usage["output_tokens"],
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        result = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": f"Hi. {call(number)}"}
        said += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]


@pytest.mark.parametrize("session", [chats, responses, messages])
def test_in_every_turn_everything_before_the_new_message_is_cached(
    http: httpx.Client, session: Callable[[httpx.Client], Iterator[Json]]
) -> None:
    usages = list(session(http))
    assert len(usages) == TURNS
    for before, usage in pairwise(usages):
        known = before["prompt_tokens"] + before["completion_tokens"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        # The answer's end token is computed with what follows it, and so is the token before it.
        assert known - 2 <= cached <= known, json.dumps([before, usage])

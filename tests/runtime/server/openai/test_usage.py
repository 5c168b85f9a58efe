"""What `usage` says beyond counts of tokens: the same in every API, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Json = dict[str, Any]
Client = Any  # of conftest.py
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"messages": MESSAGES, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "Hi", "stream_options": {"include_usage": True}},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "claude-any", "max_tokens": 9, "messages": MESSAGES},
}


def usage_of(client: Client, path: str, *, stream: bool) -> Json:
    """The usage of an answer; of a stream, that of its last event with one."""
    body = {**BODIES[path], "stream": stream}
    if not stream:
        body.pop("stream_options", None)
    response = client.request(path, body)
    assert response.status_code == 200, response.text
    if not stream:
        found: Json = response.json()["usage"]
        return found
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    usages = [(event.get("response") or event).get("usage") for event in events]
    last: Json = [usage for usage in usages if usage][-1]
    return last


@pytest.fixture
def closed(replay: Callable[..., Any]) -> Callable[[Any], Any]:
    def script(command: Any) -> Any:
        outputs = replay(command, "{}")
        outputs[-1].was_closed = True
        return outputs

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_usage_says_that_the_budget_made_an_answer_end(
    client: Client, closed: Callable[[Any], Any], path: str, stream: bool
) -> None:
    client.engine.says("{}")
    assert "closed_by_budget" not in usage_of(client, path, stream=stream)
    client.engine.script = closed
    assert usage_of(client, path, stream=stream)["closed_by_budget"] is True

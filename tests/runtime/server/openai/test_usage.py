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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(BODIES)[:3])
def test_usage_says_how_many_drafted_tokens_were_right(
    client: Client, replay: Callable[..., Any], path: str, stream: bool
) -> None:
    def script(command: Any) -> Any:
        outputs = replay(command, "four")
        outputs[-1].drafted_tokens, outputs[-1].accepted_tokens = 7, 3
        return outputs

    name = "output_tokens_details" if path == "/v1/responses" else "completion_tokens_details"
    client.engine.says("four")
    assert set(usage_of(client, path, stream=stream)[name]) == {"reasoning_tokens"}
    client.engine.script = script
    details = usage_of(client, path, stream=stream)[name]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (3, 4)


CHATS = [path for path in BODIES if path != "/v1/completions"]
FIRST = "You are a friendly helper. Today is 2026-11-{day}. Be short, and say when you do not know."


def with_day(path: str, day: int) -> Json:
    """A conversation whose instructions hold a date."""
    said = FIRST.format(day=day)
    if path == "/v1/responses":
        return {"input": "Hi", "instructions": said}
    if path == "/v1/messages":
        return {**BODIES[path], "system": said}
    return {"messages": [{"role": "system", "content": said}, *MESSAGES]}


@pytest.mark.parametrize("path", CHATS)
def test_usage_says_where_a_prompt_left_what_is_cached(client: Client, path: str) -> None:
    client.engine.says("ok")
    misses = []
    for day in (29, 30, 30):
        usage = client.request(path, with_day(path, day)).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
        misses.append(details.get("ramet"))
    assert misses[0] is None
    assert misses[2] is None, "a prompt that was sent before leaves nothing"
    found = misses[1]["first_difference"]
    assert (found["message"], found["kind"]) == (0, "a date")
    assert found["before"].endswith("Today is 2026-11-")
    assert found["text"].startswith("30. Be short")
    assert misses[1]["hit"] == 0
    assert client.served.tenants.requests.misses == {"a date": 1}


def test_a_conversation_that_goes_on_leaves_nothing(client: Client) -> None:
    client.engine.says("ok")
    messages = [*MESSAGES]
    for number in range(3):
        answer = client.request("/v1/chat/completions", {"messages": messages}).json()
        assert "ramet" not in answer["usage"]["prompt_tokens_details"]
        messages += [answer["choices"][0]["message"], {"role": "user", "content": f"And {number}?"}]


@pytest.mark.parametrize(
    ("first", "second", "message", "kind"),
    [
        (
            ["Look at 8f14e45f-ceea-467f-a0e6-0123456789ab"],
            ["Look at 8f24e45f-ceea-467f-a0e6-0123456789ab"],
            0,
            "an id (UUID)",
        ),
        (['{"a": 1, "b": 2}'], ['{"b": 2, "a": 1}'], 0, "a reordered key"),
        (["Same", "One"], ["Same", "Two"], 1, None),
        (["é" * 40 + "x"], ["é" * 40 + "y"], 0, None),
    ],
)
def test_the_difference_is_named_by_its_message_and_kind(
    client: Client, first: list[str], second: list[str], message: int, kind: str | None
) -> None:
    client.engine.says("ok")
    for contents in (first, second):
        body = {"messages": [{"role": "user", "content": content} for content in contents]}
        usage = client.request("/v1/chat/completions", body).json()["usage"]
    found = usage["prompt_tokens_details"]["ramet"]["first_difference"]
    assert (found["message"], found["kind"]) == (message, kind)
    assert (found["before"] + found["text"]).replace("\n", " ").count("<|im_start|>") <= 4
    assert "\ufffd" not in found["before"] + found["text"]


def test_prompts_of_another_salt_are_not_compared_and_their_text_is_not_told(client: Client) -> None:
    client.engine.says("ok")
    for salt, secret in (("a", "My secret is 2026-11-29"), ("b", "My secret is 2026-11-30")):
        body = {"messages": [{"role": "user", "content": secret}], "cache_salt": salt}
        assert "ramet" not in client.request("/v1/chat/completions", body).json()["usage"]["prompt_tokens_details"]
    again = {"messages": [{"role": "user", "content": "My secret is 2026-12-01"}], "cache_salt": "b"}
    answer = client.request("/v1/chat/completions", again)
    assert answer.json()["usage"]["prompt_tokens_details"]["ramet"]["first_difference"]["kind"] == "a date"
    assert "11-30" not in answer.text


def test_the_log_of_prompts_is_bounded(client: Client) -> None:
    from ramet.runtime.server import prompt_log

    log = client.served.prompts
    for number in range(3 * prompt_log.MAX_PROMPTS):
        log.nearest([1, 2, number], "")
    assert len(log._prompts) == prompt_log.MAX_PROMPTS
    assert log.nearest([1, 2, 3], "") is not None
    log.nearest([5] * (prompt_log.MAX_TOKENS + 1), "")
    assert log._num_tokens == len(log._prompts) == 0
    assert log.nearest([], "") is None

"""A tour of `ramet serve` with SmolLM2, by OpenAI's own clients: the Python package here, the npm package's script
beside those of other clients."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

MODEL = "smollm2-135m"
TOURS = Path(__file__).parents[3] / "clients" / "tours"
# What tours/smollm2.mjs visits, in its order. The Python tests below visit the same.
STOPS = (
    "models",
    "chat",
    "stream",
    "conversation",
    "tools_none",
    "tools_auto",
    "tools_required",
    "tools_named",
    "parallel_calls",
    "tool_result",
    "json_schema",
    "json_object",
    "logprobs",
    "several_choices",
    "stop",
    "completions",
    "errors",
    "abort",
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]
Answer = Any  # openai's ChatCompletion; its extra fields (usage.history, incomplete) are not declared there


@pytest.fixture(scope="module")
def served(serve_command: Callable[..., Any], smollm2_path: Path) -> Any:
    server = serve_command("--num-kv-tokens", "16384", model=MODEL)
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def api(served: Any) -> Iterator[openai.OpenAI]:
    http: Any = httpx.Client(trust_env=False, timeout=60)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(api: openai.OpenAI, messages: list[Any], extra: dict[str, Any] | None = None, **fields: Any) -> Answer:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 24, **fields}
    return api.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **given)


def check_call(call: Any) -> None:
    assert call.type == "function"
    assert call.function.name == "get_weather"
    given = json.loads(call.function.arguments)
    assert given["city"] in ("Paris", "Rome")
    assert 1 <= given["days"] <= 7


def wait_at_rest(served: Any) -> None:
    """Nothing runs, and every page is free or cached."""
    with served.client() as client:
        for _ in range(200):
            info = client.get("/get_server_info").json()
            stats = info["stats"]
            if not info["in_flight"] and not stats["num_running"] and not stats["num_waiting"]:
                assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]
                return
            time.sleep(0.05)
    raise AssertionError("the engine does not come to rest")


# ---- the npm package ----


@pytest.fixture(scope="module")
def npm_tour(served: Any) -> dict[str, str | None]:
    """Stop -> what went wrong there, or None."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (TOURS / "node_modules").is_dir():
        pytest.skip("the npm clients are not installed: `make test` does that where npm is")
    done = subprocess.run(
        [node, str(TOURS / "smollm2.mjs"), served.url, MODEL], capture_output=True, text=True, timeout=200, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("stop", STOPS)
def test_npm_client(npm_tour: dict[str, str | None], stop: str) -> None:
    assert npm_tour[stop] is None, npm_tour[stop]


def test_the_npm_tour_has_these_stops_and_no_other(npm_tour: dict[str, str | None]) -> None:
    assert tuple(npm_tour) == STOPS


# ---- the Python package ----


def test_models(api: openai.OpenAI) -> None:
    assert [card.id for card in api.models.list().data] == [MODEL]
    assert api.models.retrieve(MODEL).id == MODEL


def test_chat(api: openai.OpenAI) -> None:
    answer = chat(api, user("Name a river."))
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content) > 5
    assert isinstance(answer.usage.prompt_tokens_details.cached_tokens, int)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_stream(api: openai.OpenAI) -> None:
    chat(api, user("Name a river."))  # near a tie, a cached prompt may be answered otherwise
    whole = chat(api, user("Name a river."))
    chunks = list(chat(api, user("Name a river."), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_conversation(api: openai.OpenAI) -> None:
    messages = user("Name a river in Asia.")
    first = chat(api, messages)
    second = chat(api, [*messages, first.choices[0].message, *user("How long is it?")])
    history = second.usage.history
    assert history["reason"] is None
    assert history["reused_tokens"] >= first.usage.total_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens >= history["reused_tokens"] - 1


def test_tools_none(api: openai.OpenAI) -> None:
    message = chat(api, user("Hi"), tools=[WEATHER], tool_choice="none").choices[0].message
    assert message.tool_calls is None
    assert message.content


def test_tools_auto(api: openai.OpenAI) -> None:
    (choice,) = chat(api, user("What is the weather in Paris?"), tools=[WEATHER], max_tokens=80).choices
    if choice.finish_reason == "tool_calls":
        for call in choice.message.tool_calls:
            check_call(call)
    else:
        assert choice.message.content


def test_tools_required(api: openai.OpenAI) -> None:
    answer = chat(
        api,
        user("The weather in Rome?"),
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    check_call(call)


def test_tools_named(api: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    fields: Any = {"tools": [TIME, WEATHER], "tool_choice": named, "max_tokens": 80}
    chat(api, user("What time is it?"), **fields)
    (call,) = chat(api, user("What time is it?"), **fields).choices[0].message.tool_calls
    check_call(call)
    with api.chat.completions.stream(model=MODEL, messages=user("What time is it?"), temperature=0, **fields) as events:
        pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        final = events.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (streamed,) = list(final.choices[0].message.tool_calls or [])
    assert streamed.function.arguments == call.function.arguments
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
    assert len(pieces) > 1


def test_parallel_calls(api: openai.OpenAI, served: Any) -> None:
    with served.client() as client:  # a model this small rarely goes on: what ends the list is made unlikely
        ends = client.post("/v1/tokenize", json={"prompt": "]", "add_special_tokens": False}).json()["tokens"]
    answer = chat(
        api,
        user("The weather in Paris and in Rome?"),
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=120,
        logit_bias={str(token): -100 for token in ends},
    )
    calls = answer.choices[0].message.tool_calls
    assert len(calls) >= 2
    assert len({call.id for call in calls}) == len(calls)
    cut = [call for call in calls if (call.model_extra or {}).get("incomplete")]
    assert not cut or answer.choices[0].finish_reason == "length"
    for call in calls:
        if call not in cut:
            check_call(call)


def test_tool_result(api: openai.OpenAI) -> None:
    given = {"name": "get_weather", "arguments": '{"city":"Rome","days":1}'}
    messages = [
        *user("The weather in Rome?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": given}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(api, messages, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_json_schema(api: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "length_km": {"type": "integer"}},
        "required": ["name", "length_km"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema, "strict": True}}
    (choice,) = chat(api, user("Describe a river."), response_format=form, max_tokens=80).choices
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert list(value) == ["name", "length_km"]
    assert isinstance(value["length_km"], int)


def test_json_object(api: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = chat(api, user("Describe a river as JSON."), response_format=form, max_tokens=60)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_logprobs(api: openai.OpenAI) -> None:
    answer = chat(api, user("Hi"), max_tokens=5, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token  # greedy


def test_several_choices(api: openai.OpenAI) -> None:
    answer = chat(api, user("Say a word."), n=3, seed=1, temperature=1.2, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = chat(api, user("Say a word."), seed=2, temperature=1.2, max_tokens=8)
    assert again.choices[0].message.content == answer.choices[1].message.content


def test_stop(api: openai.OpenAI) -> None:
    messages = user("Count: one, two, three, four, five.")
    chat(api, messages)
    text = chat(api, messages).choices[0].message.content
    stop = text[6:9]
    (choice,) = chat(api, messages, stop=stop).choices
    assert choice.message.content == text[: text.index(stop)]
    assert (choice.finish_reason, choice.model_extra["matched_stop"]) == ("stop", stop)


def test_completions(api: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    api.completions.create(**fields)
    text = api.completions.create(**fields).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in api.completions.create(**fields, stream=True)) == text
    assert "Paris" in text


def test_errors(api: openai.OpenAI) -> None:
    for fields, extra, kind, param in (
        ({"top_p": 7}, None, openai.BadRequestError, "top_p"),
        ({}, {"foo": 1}, openai.BadRequestError, "foo"),
    ):
        with pytest.raises(kind) as caught:
            chat(api, user("Hi"), extra, **fields)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-9")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(api, user("x " * 9000), stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_abort(api: openai.OpenAI, served: Any) -> None:
    endless = {"ignore_eos": True}
    stream = chat(api, user("Tell a long story."), endless, stream=True, max_tokens=4000)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        chat(api, user("Tell a long story."), endless, max_tokens=4000, timeout=0.3)
    wait_at_rest(served)

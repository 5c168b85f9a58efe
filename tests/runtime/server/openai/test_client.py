"""A tour with the official `openai` package against a real server and a tiny model of random weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

Server = Any  # RunningServer of conftest.py one folder up
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"kind": {"enum": ["a", "b"]}, "is_new": {"type": "boolean"}},
                "required": ["kind", "is_new"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("find", "drop")
]


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[openai.OpenAI]:
    http: Any = httpx.Client(trust_env=False, timeout=60)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


def settled(server: Server) -> None:
    """Wait until nothing runs and every page is free or cached."""
    for _ in range(400):
        info = server.client.get("/get_server_info").json()
        stats = info["stats"]
        if not info["in_flight"] and stats and not stats["num_running"] and not stats["num_waiting"]:
            assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]
            return
        time.sleep(0.05)
    raise AssertionError("the engine does not come to rest")


def test_models_are_listed_and_found(api: openai.OpenAI) -> None:
    (model,) = api.models.list().data
    assert model.id == api.models.retrieve(model.id).id == "tiny-random"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_chat_and_the_same_as_a_stream(api: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny-random", "messages": MESSAGES, "max_tokens": 12, "seed": 3, "temperature": 0.8}
    whole = api.chat.completions.create(**fields)
    stream = api.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_several_choices_differ_by_seed_and_share_one_prefill(api: openai.OpenAI, server: Server) -> None:
    text = f"Something that nobody said before: {time.time()}"
    messages: Any = [{"role": "user", "content": text}]
    before = server.client.get("/get_server_info").json()["stats"]
    many = api.chat.completions.create(model="tiny-random", messages=messages, n=3, seed=5, max_tokens=8)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    third = api.chat.completions.create(model="tiny-random", messages=messages, seed=7, max_tokens=8)
    assert third.choices[0].message.content == many.choices[2].message.content
    assert len({choice.message.content for choice in many.choices}) == 3
    assert many.usage is not None
    assert many.usage.completion_tokens == 24
    assert many.usage.prompt_tokens_details is not None
    assert many.usage.prompt_tokens_details.cached_tokens is not None
    assert many.usage.prompt_tokens_details.cached_tokens < many.usage.prompt_tokens // 2
    time.sleep(1.1)  # heartbeats bring the figures
    after = server.client.get("/get_server_info").json()["stats"]
    assert after["num_computed_tokens"] - before.get("num_computed_tokens", 0) < 2 * many.usage.prompt_tokens


def test_logprobs_have_their_shape(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny-random", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.bytes is not None
    completion = api.completions.create(model="tiny-random", prompt="Hello", max_tokens=4, echo=True, logprobs=0)
    scores = completion.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.tokens[:5] == list("Hello")
    assert scores.token_logprobs[0] is None  # the first token has no score
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert len(scores.tokens) == 9


def test_completions_of_several_prompts_as_a_stream(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="tiny-random", prompt=["ab", "cd"], n=2, seed=1, max_tokens=6)
    texts = [""] * 4
    for chunk in api.completions.create(
        model="tiny-random", prompt=["ab", "cd"], n=2, seed=1, max_tokens=6, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    ids = api.completions.create(model="tiny-random", prompt=[[97, 98]], seed=1, max_tokens=6)
    assert ids.choices[0].text == whole.choices[0].text


def test_a_schema_holds_and_a_wrong_one_is_refused(api: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = api.chat.completions.create(model="tiny-random", messages=MESSAGES, response_format=form, max_tokens=60)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)
    assert answer.choices[0].finish_reason == "stop"
    fields: Any = {"model": "tiny-random", "messages": MESSAGES, "response_format": form, "max_tokens": 4}
    cut = api.chat.completions.create(**fields)
    *_, last = api.chat.completions.create(**fields, stream=True)
    raw = api.completions.create(model="tiny-random", prompt="x", max_tokens=4, extra_body={"json_schema": schema})
    for choice in (cut.choices[0], last.choices[0], raw.choices[0]):
        assert choice.finish_reason == "length"
        assert "12 tokens" in (choice.model_extra or {})["incomplete"], 'a token a byte: {"ok": true}'
    assert "incomplete" not in (answer.choices[0].model_extra or {})
    form["json_schema"]["schema"] = {"type": "nonsense"}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(model="tiny-random", messages=MESSAGES, response_format=form, stream=stream)
        assert caught.value.param == "response_format"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "drop"}}, "none", "auto"])
def test_all_choices_of_tools(api: openai.OpenAI, choice: Any, stream: bool) -> None:
    fields: Any = {
        "model": "tiny-random",
        "messages": [{"role": "user", "content": "x"}],
        "tools": TOOLS[-1:],
        "tool_choice": choice,
        "max_tokens": 200,
        "parallel_tool_calls": False,
        "seed": 1,
    }
    if stream:
        with api.chat.completions.stream(**fields) as events:
            for _ in events:
                pass
            answer: Any = events.get_final_completion()
    else:
        answer = api.chat.completions.create(**fields)
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    if choice in ("none", "auto"):
        assert not message.tool_calls or choice == "auto"
        assert reason in ("length", "stop", "tool_calls")
        return
    (call,) = message.tool_calls
    assert reason == "tool_calls"
    assert call.function.name == "drop"
    arguments = json.loads(call.function.arguments)
    assert arguments["kind"] in ("a", "b")
    assert isinstance(arguments["is_new"], bool)


def test_parallel_calls(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny-random",
        messages=[{"role": "user", "content": "x"}],
        tools=TOOLS[-1:],
        tool_choice="required",
        max_tokens=200,
        seed=2,
        logit_bias={str(ord("\n")): 30},  # so that a further call follows
    )
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) >= 2
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        assert (
            set(json.loads(call.function.arguments)) == {"kind", "is_new"}
            or answer.choices[0].finish_reason == "length"
        )


def test_stop_strings_end_the_answer(api: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny-random", "messages": MESSAGES, "seed": 9, "temperature": 1.0, "max_tokens": 30}
    text = api.chat.completions.create(**fields).choices[0].message.content or ""
    plain = [index for index, character in enumerate(text) if character.isascii() and index > 2]
    stop = text[plain[0]]
    stopped = api.chat.completions.create(**fields, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].to_dict()["matched_stop"] == stop


def test_errors_are_the_clients_own_classes(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p") as caught:
        api.chat.completions.create(model="tiny-random", messages=MESSAGES, top_p=7)
    assert caught.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="foo"):
        api.chat.completions.create(model="tiny-random", messages=MESSAGES, extra_body={"foo": 1})
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="gpt-9", messages=MESSAGES)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context") as caught:
            api.chat.completions.create(
                model="tiny-random", messages=[{"role": "user", "content": "x" * 3000}], stream=stream
            )
        assert caught.value.code == "context_length_exceeded"


def test_closing_a_stream_ends_the_request(api: openai.OpenAI, server: Server) -> None:
    extra: Any
    for extra in ({}, {"n": 3}):
        aborted = server.served.proxy.num_aborts
        stream = api.chat.completions.create(
            model="tiny-random",
            messages=MESSAGES,
            stream=True,
            max_tokens=400,
            extra_body={"ignore_eos": True},
            **extra,
        )
        next(iter(stream))
        stream.close()
        settled(server)
        assert server.served.proxy.num_aborts == aborted + extra.get("n", 1)


def test_a_client_that_leaves_before_the_whole_answer_ends_the_request(server: Server) -> None:
    aborted = server.served.proxy.num_aborts
    body = {"messages": MESSAGES, "max_tokens": 420, "ignore_eos": True, "n": 4}
    with pytest.raises(httpx.TimeoutException):
        server.client.post("/v1/chat/completions", json=body, timeout=0.05)
    settled(server)
    assert server.served.proxy.num_aborts == aborted + 4


def test_a_conversation_computes_only_what_is_new(api: openai.OpenAI, server: Server) -> None:
    messages: Any = [{"role": "user", "content": f"Begin {time.time()}"}]
    known = 0
    for turn in range(4):
        answer = api.chat.completions.create(
            model="tiny-random", messages=messages, max_tokens=20, extra_body={"ignore_eos": True}
        )
        usage: Any = answer.to_dict()["usage"]
        if turn:
            assert usage["history"] == {"reused_tokens": known, "reason": None}
            assert usage["prompt_tokens_details"]["cached_tokens"] == known - 1
        known = usage["prompt_tokens"] + 20
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "And on?"},
        ]


def test_tokenize_and_back(server: Server) -> None:
    answer = server.client.post("/v1/tokenize", json={"prompt": "hé"}).json()
    assert answer == {"tokens": list("hé".encode()), "count": 3, "max_model_len": 2048}
    assert server.client.post("/v1/detokenize", json={"tokens": answer["tokens"]}).json() == {"text": "hé"}
    chat = server.client.post("/v1/tokenize", json={"messages": MESSAGES}).json()
    usage = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert server.client.post("/v1/detokenize", json={"tokens": [9999]}).status_code == 400
    assert server.client.post("/v1/tokenize", json={}).status_code == 400

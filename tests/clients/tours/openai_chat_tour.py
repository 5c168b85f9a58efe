# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=1.99,<4"]
# ///
"""OpenAI's Python client, chats."""

import json

import openai
from pydantic import BaseModel
from tour import SCHEMA, call, run, says

TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}


def client(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


def user(*answers):
    return {"role": "user", "content": says(*answers)}


def text(url):
    answer = client(url).chat.completions.create(model="default", messages=[user("Hello")])
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"


def stream(url):
    with client(url).chat.completions.stream(model="default", messages=[user("one two three")]) as events:
        pieces = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(pieces) == "one two three"
    assert len(pieces) > 1


def tools(url):
    api, messages = client(url), [user("Let me see." + "\n" + call("look", path="a.txt"), "It says hi")]
    message = api.chat.completions.create(model="default", messages=messages, tools=[TOOL]).choices[0].message
    (called,) = message.tool_calls
    assert json.loads(called.function.arguments) == {"path": "a.txt"}
    messages += [message, {"role": "tool", "tool_call_id": called.id, "content": "hi"}]
    answer = api.chat.completions.create(model="default", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "It says hi"


def tools_streamed(url):
    messages = [user(call("look", path="a b c"))]
    with client(url).chat.completions.stream(model="default", messages=messages, tools=[TOOL]) as events:
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert json.loads(done[0].arguments) == {"path": "a b c"}


def typed(url):
    class Person(BaseModel):
        name: str

    messages = [user('{"name": "Ada"}')]
    parsed = client(url).chat.completions.parse(model="default", messages=messages, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada")


def conversation(url):
    api, messages = client(url), [user("One")]
    for answer in ("Two", "Three"):
        message = api.chat.completions.create(model="default", messages=messages).choices[0].message
        messages += [message, user(answer)]
    usage = api.chat.completions.create(model="default", messages=messages).usage
    assert usage.prompt_tokens_details.cached_tokens > 0.4 * usage.prompt_tokens


def logprobs(url):
    answer = client(url).chat.completions.create(model="default", messages=[user("Hi")], logprobs=True)
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["H", "i"]


def errors(url):
    for fields, kind in (({"model": "other"}, openai.NotFoundError), ({"top_p": 7.0}, openai.BadRequestError)):
        try:
            client(url).chat.completions.create(**{"model": "default", "messages": [user("Hi")], **fields})
        except kind as error:
            assert error.param in ("model", "top_p")
        else:
            raise AssertionError("no error")


run()

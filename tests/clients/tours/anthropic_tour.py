# /// script
# requires-python = ">=3.11"
# dependencies = ["anthropic>=0.60,<3"]
# ///
"""Anthropic's Python client."""

import anthropic
from tour import SCHEMA, call, run, says

TOOL = {"name": "look", "input_schema": SCHEMA}
ASK = {"model": "claude-any", "max_tokens": 100}


def client(base):
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)


def user(*answers):
    return {"role": "user", "content": says(*answers)}


def text(url):
    answer = client(url).messages.create(messages=[user("Hello")], system="Be short.", **ASK)
    assert (answer.content[0].text, answer.stop_reason) == ("Hello", "end_turn")


def stream(url):
    with client(url).messages.stream(messages=[user("one two three")], **ASK) as events:
        pieces = list(events.text_stream)
    assert "".join(pieces) == "one two three"
    assert len(pieces) > 1


def tools(url):
    api, messages = client(url), [user(call("look", path="a.txt"), "It says hi")]
    first = api.messages.create(messages=messages, tools=[TOOL], **ASK)
    called = first.content[-1]
    assert (first.stop_reason, called.input) == ("tool_use", {"path": "a.txt"})
    results = [{"type": "tool_result", "tool_use_id": called.id, "content": "hi"}]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    assert api.messages.create(messages=messages, tools=[TOOL], **ASK).content[0].text == "It says hi"


def tools_streamed(url):
    messages = [user("Look:\n" + call("look", path="a b c"))]
    with client(url).messages.stream(messages=messages, tools=[TOOL], **ASK) as events:
        final = events.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"path": "a b c"}


def typed(url):
    messages, choice = [user(call("look", path="a.txt"))], {"type": "tool", "name": "look"}
    answer = client(url).messages.create(messages=messages, tools=[TOOL], tool_choice=choice, **ASK)
    assert answer.content[0].input == {"path": "a.txt"}


def conversation(url):
    api, messages = client(url), [user("One")]
    first = api.messages.create(messages=messages, **ASK)
    messages += [{"role": "assistant", "content": first.content}, user("Two")]
    usage = api.messages.create(messages=messages, **ASK).usage
    assert usage.cache_read_input_tokens >= first.usage.input_tokens + first.usage.output_tokens - 2


def reasoning(url):
    answer = client(url).messages.create(messages=[user("<think>Hm, well</think>Done")], **ASK)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "Hm, well"


def count(url):
    api, messages = client(url), [user("Hello")]
    counted = api.messages.count_tokens(model="claude-any", messages=messages)
    usage = api.messages.create(messages=messages, **ASK).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def errors(url):
    try:
        client(url).messages.create(model="other", max_tokens=1, messages=[user("Hi")])
    except anthropic.NotFoundError as error:
        assert "does not exist here" in error.message
    else:
        raise AssertionError("no error")


run()

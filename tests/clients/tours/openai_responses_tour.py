# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=1.99,<4"]
# ///
"""OpenAI's Python client, responses."""

import json

import openai
from pydantic import BaseModel
from tour import SCHEMA, call, run, says

TOOL = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}


def client(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


def text(url):
    assert client(url).responses.create(model="default", input=says("Hello")).output_text == "Hello"


def stream(url):
    with client(url).responses.stream(model="default", input=says("one two three")) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == "one two three"
    assert kinds[-1] == "response.completed"


def tools(url):
    api = client(url)
    first = api.responses.create(model="default", input=says(call("look", path="a.txt"), "It says hi"), tools=[TOOL])
    (called,) = first.output
    assert json.loads(called.arguments) == {"path": "a.txt"}
    output = [{"type": "function_call_output", "call_id": called.call_id, "output": "hi"}]
    second = api.responses.create(model="default", input=output, tools=[TOOL], previous_response_id=first.id)
    assert second.output_text == "It says hi"


def tools_streamed(url):
    asked = says(call("look", path="a b c"))
    with client(url).responses.stream(model="default", input=asked, tools=[TOOL]) as events:
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done[0].arguments) == {"path": "a b c"}


def typed(url):
    class Person(BaseModel):
        name: str

    asked = says('{"name": "Ada"}')
    parsed = client(url).responses.parse(model="default", input=asked, text_format=Person)
    assert parsed.output_parsed == Person(name="Ada")


def conversation(url):
    api = client(url)
    first = api.responses.create(model="default", input=says("One"))
    second = api.responses.create(model="default", input=says("Two"), previous_response_id=first.id)
    usage = second.usage
    assert usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 2


def reasoning(url):
    asked = says("<think>Hm, well</think>Done")
    answer = client(url).responses.create(model="default", input=asked, reasoning={"summary": "auto"})
    assert answer.output[0].summary[0].text == "Hm, well"
    assert answer.output_text == "Done"


def logprobs(url):
    include = ["message.output_text.logprobs"]
    answer = client(url).responses.create(model="default", input=says("Hi"), include=include)
    assert [entry.token for entry in answer.output[0].content[0].logprobs] == ["H", "i"]


def stored(url):
    api = client(url)
    made = api.responses.create(model="default", input=says("Hello"))
    assert api.responses.retrieve(made.id).output_text == "Hello"
    assert api.responses.input_items.list(made.id).data[0].type == "message"
    api.responses.delete(made.id)
    try:
        api.responses.retrieve(made.id)
    except openai.NotFoundError:
        return
    raise AssertionError("it is still there")


def background(url):
    api = client(url)
    events = list(api.responses.create(model="default", input=says("Hello"), background=True, stream=True))
    assert events[-1].type == "response.completed"
    again = list(api.responses.retrieve(events[-1].response.id, stream=True, starting_after=3))
    assert [event.sequence_number for event in again] == [event.sequence_number for event in events[4:]]


def cancel(url):
    api = client(url)
    made = api.responses.create(model="default", input=says("word " * 20_000), background=True)
    assert api.responses.cancel(made.id).status == "cancelled"


def count(url):
    counted = client(url).responses.input_tokens.count(model="default", input="Hello")
    assert counted.input_tokens > 5


def errors(url):
    try:
        client(url).responses.create(model="other", input="Hi")
    except openai.NotFoundError as error:
        assert error.param == "model"
    else:
        raise AssertionError("no error")


run()

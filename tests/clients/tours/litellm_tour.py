# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm>=1.80,<2"]
# ///
"""litellm through each of the three APIs."""

import json

import litellm
from pydantic import BaseModel
from tour import SCHEMA, call, run, says

litellm.suppress_debug_info = True
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def user(*answers):
    return {"role": "user", "content": says(*answers)}


def ask(base, messages, model="openai/default", **options):
    where = base if model.startswith("anthropic/") else f"{base}/v1"
    return litellm.completion(model=model, messages=messages, api_base=where, api_key="none", num_retries=0, **options)


def text(url):
    for model in ("openai/default", "text-completion-openai/default", "anthropic/claude-any"):
        answer = ask(url, [user("Hello")], model, max_tokens=50)
        assert answer.choices[0].message.content == "Hello", (model, answer)
    made = litellm.responses(model="openai/default", input=says("Hello"), api_base=f"{url}/v1", api_key="none")
    assert made.output[0].content[0].text == "Hello"


def stream(url):
    for model in ("openai/default", "anthropic/claude-any"):
        chunks = ask(url, [user("one two three")], model, stream=True, max_tokens=50)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"


def tools(url):
    for model in ("openai/default", "anthropic/claude-any"):
        messages = [user(call("look", path="a.txt"), "It says hi")]
        message = ask(url, messages, model, tools=[TOOL], max_tokens=200).choices[0].message
        (called,) = message.tool_calls
        assert json.loads(called.function.arguments) == {"path": "a.txt"}
        messages += [message.model_dump(), {"role": "tool", "tool_call_id": called.id, "content": "hi"}]
        answer = ask(url, messages, model, tools=[TOOL], max_tokens=200)
        assert answer.choices[0].message.content == "It says hi"


def tools_streamed(url):
    chunks = ask(url, [user(call("look", path="a b c"))], tools=[TOOL], stream=True)
    whole = litellm.stream_chunk_builder(list(chunks))
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"path": "a b c"}


def typed(url):
    class Person(BaseModel):
        name: str

    answer = ask(url, [user('{"name": "Ada"}')], response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == Person(name="Ada")


def conversation(url):
    messages = [user("One")]
    messages += [ask(url, messages).choices[0].message.model_dump(), user("Two")]
    usage = ask(url, messages).usage
    assert usage.prompt_tokens_details.cached_tokens > 0.4 * usage.prompt_tokens


def reasoning(url):
    message = ask(url, [user("<think>Hm</think>Done")]).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm", "Done")


def errors(url):
    try:
        ask(url, [user("Hi")], "openai/other")
    except litellm.NotFoundError as error:
        assert "does not exist here" in str(error)
    else:
        raise AssertionError("no error")


run()

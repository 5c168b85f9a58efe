# /// script
# requires-python = ">=3.11"
# dependencies = ["openai-agents>=0.3,<1"]
# ///
"""OpenAI's Agents SDK with its default model, which speaks the Responses API."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    Runner,
    SQLiteSession,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI, NotFoundError
from openai.types.shared import Reasoning
from pydantic import BaseModel
from tour import call, run, says

set_tracing_disabled(True)


@function_tool
def look(path: str) -> str:
    """Look at a file."""
    return f"{path} says hi"


def agent(base, **options):
    set_default_openai_client(AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0))
    return Agent(name="helper", instructions="Be short.", **{"model": "default", **options})


def text(url):
    assert asyncio.run(Runner.run(agent(url), says("Hello"))).final_output == "Hello"


def stream(url):
    async def deltas():
        result = Runner.run_streamed(agent(url), says("one two three"))
        raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        return [event.delta for event in raw if event.type == "response.output_text.delta"]

    assert "".join(asyncio.run(deltas())) == "one two three"


def tools(url):
    asked = says(call("look", path="a.txt"), "It says hi")
    assert asyncio.run(Runner.run(agent(url, tools=[look]), asked)).final_output == "It says hi"


def typed(url):
    class Person(BaseModel):
        name: str

    found = asyncio.run(Runner.run(agent(url, output_type=Person), says('{"name": "Ada"}'))).final_output
    assert found == Person(name="Ada")


def conversation(url):
    session = SQLiteSession("tour")
    asyncio.run(Runner.run(agent(url), says("One"), session=session))
    result = asyncio.run(Runner.run(agent(url), says("Two"), session=session))
    usage = result.context_wrapper.usage
    assert result.final_output == "Two"
    assert usage.input_tokens_details.cached_tokens > 0.6 * usage.input_tokens


def reasoning(url):
    settings = ModelSettings(reasoning=Reasoning(effort="low", summary="auto"))
    result = asyncio.run(Runner.run(agent(url, model_settings=settings), says("<think>Hm</think>Done")))
    assert [item.type for item in result.new_items] == ["reasoning_item", "message_output_item"]
    assert result.final_output == "Done"


def errors(url):
    try:
        asyncio.run(Runner.run(agent(url, model="other"), "Hi"))
    except NotFoundError as error:
        assert error.param == "model"
    else:
        raise AssertionError("no error")


run()

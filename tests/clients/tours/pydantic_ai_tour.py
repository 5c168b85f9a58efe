# /// script
# requires-python = ">=3.11"
# dependencies = ["pydantic-ai-slim[openai,anthropic]>=1,<3"]
# ///
"""pydantic-ai with its models for chats, responses and Anthropic's messages."""

import asyncio

from anthropic import AsyncAnthropic
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tour import call, run, says


class Person(BaseModel):
    name: str


def models(base, name="default"):
    provider = OpenAIProvider(base_url=f"{base}/v1", api_key="none")
    client = AsyncAnthropic(base_url=base, api_key="none", max_retries=0)
    claude = "claude-any" if name == "default" else name
    anthropic = AnthropicModel(claude, provider=AnthropicProvider(anthropic_client=client))
    return [OpenAIChatModel(name, provider=provider), OpenAIResponsesModel(name, provider=provider), anthropic]


def look(path: str) -> str:
    """Look at a file."""
    return f"{path} says hi"


def text(url):
    for model in models(url):
        assert Agent(model).run_sync(says("Hello")).output == "Hello", model


def stream(url):
    async def streamed(model):
        async with Agent(model).run_stream(says("one two three")) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    for model in models(url):
        assert "".join(asyncio.run(streamed(model))) == "one two three", model


def tools(url):
    for model in models(url):
        result = Agent(model, tools=[look]).run_sync(says(call("look", path="a.txt"), "It says hi"))
        assert result.output == "It says hi", model


def typed(url):
    for model in models(url):
        result = Agent(model, output_type=Person).run_sync(says(call("final_result", name="Ada")))
        assert result.output == Person(name="Ada"), model


def conversation(url):
    for model in models(url):
        agent = Agent(model)
        first = agent.run_sync(says("One"))
        usage = agent.run_sync(says("Two"), message_history=first.all_messages()).usage
        usage = usage() if callable(usage) else usage
        assert usage.cache_read_tokens > 0.4 * usage.input_tokens, model


def reasoning(url):
    for model in models(url):
        settings = {"openai_reasoning_summary": "auto"} if isinstance(model, OpenAIResponsesModel) else {}
        parts = Agent(model, model_settings=settings).run_sync(says("<think>Hm</think>Done")).all_messages()[-1].parts
        assert any(isinstance(part, ThinkingPart) and part.content == "Hm" for part in parts), model


def errors(url):
    for model in models(url, "other"):
        try:
            Agent(model).run_sync("Hi")
        except ModelHTTPError as error:
            assert error.status_code == 404
        else:
            raise AssertionError("no error")


run()

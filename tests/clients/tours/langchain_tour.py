# /// script
# requires-python = ">=3.11"
# dependencies = ["langchain-openai>=0.3,<2", "langgraph>=0.6,<2", "langchain>=1,<2"]
# ///
"""LangChain's chat model, and an agent of LangGraph around it."""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from openai import NotFoundError
from pydantic import BaseModel
from tour import call, run, says


@tool
def look(path: str) -> str:
    """Look at a file."""
    return f"{path} says hi"


class Person(BaseModel):
    name: str


def model(base, **options):
    return ChatOpenAI(**{"model": "default", "base_url": f"{base}/v1", "api_key": "none", "max_retries": 0, **options})


def text(url):
    assert model(url).invoke(says("Hello")).content == "Hello"


def stream(url):
    assert "".join(chunk.content for chunk in model(url).stream(says("one two three"))) == "one two three"


def tools(url):
    agent = create_agent(model(url), [look])
    asked = says(call("look", path="a.txt"), "It says hi")
    messages = agent.invoke({"messages": [("user", asked)]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[-1].content == "It says hi"


def tools_streamed(url):
    chunks = list(model(url).bind_tools([look]).stream(says(call("look", path="a b c"))))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls[0]["args"] == {"path": "a b c"}


def typed(url):
    for method in ("json_schema", "function_calling"):
        answer = '{"name": "Ada"}' if method == "json_schema" else call("Person", name="Ada")
        assert model(url).with_structured_output(Person, method=method).invoke(says(answer)) == Person(name="Ada")


def conversation(url):
    agent = create_agent(model(url), [], checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "tour"}}
    agent.invoke({"messages": [("user", says("One"))]}, thread)
    last = agent.invoke({"messages": [("user", says("Two"))]}, thread)["messages"][-1]
    usage = last.usage_metadata
    assert usage["input_token_details"]["cache_read"] > 0.4 * usage["input_tokens"]


def reasoning(url):
    asked = model(url, use_responses_api=True, reasoning={"summary": "auto"}, output_version="responses/v1")
    answer = asked.invoke(says("<think>Hm</think>Done"))
    assert answer.text == "Done"
    assert any(block["type"] == "reasoning" for block in answer.content)


def logprobs(url):
    answer = model(url).bind(logprobs=True).invoke(says("Hi"))
    assert [entry["token"] for entry in answer.response_metadata["logprobs"]["content"]] == ["H", "i"]


def errors(url):
    try:
        model(url, model="other").invoke("Hi")
    except NotFoundError as error:
        assert error.param == "model"
    else:
        raise AssertionError("no error")


run()

# /// script
# requires-python = ">=3.11"
# dependencies = ["smolagents[openai]>=1.20,<2"]
# ///
"""smolagents: an agent of tool calls, and one that writes code."""

from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool
from tour import call, run, says


@tool
def look(path: str) -> str:
    """Look at a file.

    Args:
        path: the file
    """
    return f"{path} says hi"


def model(base, name="default"):
    return OpenAIServerModel(model_id=name, api_base=f"{base}/v1", api_key="none", client_kwargs={"max_retries": 0})


def text(url):
    answer = model(url)([{"role": "user", "content": [{"type": "text", "text": says("Hello")}]}])
    assert answer.content == "Hello"


def stream(url):
    messages = [{"role": "user", "content": [{"type": "text", "text": says("one two three")}]}]
    assert "".join(d.content or "" for d in model(url).generate_stream(messages)) == "one two three"


def tools(url):
    agent = ToolCallingAgent(tools=[look], model=model(url), verbosity_level=0)
    asked = says(call("look", path="a.txt"), call("final_answer", answer="It says hi"))
    assert agent.run(asked) == "It says hi"


def typed(url):
    agent = CodeAgent(tools=[], model=model(url), verbosity_level=0)
    assert agent.run(says("Thoughts: add.\n<code>\nfinal_answer(1 + 2)\n</code>")) == 3


run()

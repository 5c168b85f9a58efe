"""The official clients of the Responses and Messages APIs, and two coding agents, against a real socket."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

Json = dict[str, Any]
# The agents are npm packages, and npm is no requirement of Ramet: the npm client's tour is skipped without it, too.
needs_npx = pytest.mark.skipif(shutil.which("npx") is None, reason="npm is not installed")
PARAMETERS: Json = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
def openai_client(live: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0)


@pytest.fixture
def anthropic_client(live: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=live, api_key="none", max_retries=0)


def says_in_turn(client: Any, replay: Any, *answers: str) -> None:
    """The engine gives one answer after the other, the last one again and again."""
    left = list(answers)

    def script(command: Any) -> Any:
        return replay(command, left.pop(0) if len(left) > 1 else left[0], [3, 9, 30])

    client.engine.script = script


def test_openai_streams_and_continues_responses(client: Any, replay: Any, openai_client: openai.OpenAI) -> None:
    says_in_turn(client, replay, call("look", path="a.txt"), "It says hi")
    tool: Any = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": True}
    with openai_client.responses.stream(model="default", input="Look", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    (called,) = first.output
    assert called.type == "function_call"
    assert json.loads(called.arguments) == {"path": "a.txt"}
    output: Any = [{"type": "function_call_output", "call_id": called.call_id, "output": "hi"}]
    second = openai_client.responses.create(model="default", input=output, tools=[tool], previous_response_id=first.id)
    assert second.output_text == "It says hi"
    assert openai_client.responses.retrieve(second.id).output_text == "It says hi"
    assert openai_client.responses.input_items.list(second.id).data[0].type == "function_call_output"
    openai_client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(second.id)


def test_openai_parses_a_typed_response(client: Any, openai_client: openai.OpenAI) -> None:
    class Person(BaseModel):
        name: str

    client.engine.says('{"name": "Ada"}')
    parsed = openai_client.responses.parse(model="default", input="Who?", text_format=Person)
    assert parsed.output_parsed == Person(name="Ada")


def test_openai_reads_a_response_of_the_background(client: Any, openai_client: openai.OpenAI) -> None:
    client.engine.says("Hello", cuts=[2])
    events = list(openai_client.responses.create(model="default", input="Hi", background=True, stream=True))
    assert events[-1].type == "response.completed"
    done = openai_client.responses.retrieve(events[-1].response.id)
    assert (done.status, done.output_text) == ("completed", "Hello")
    again = list(openai_client.responses.retrieve(done.id, stream=True, starting_after=3))
    assert [event.sequence_number for event in again] == [event.sequence_number for event in events[4:]]
    client.engine.script = lambda command: []  # never ends
    running = openai_client.responses.create(model="default", input="Hi", background=True)
    assert openai_client.responses.cancel(running.id).status == "cancelled"
    assert client.engine.streams[-1].was_aborted


def test_anthropic_streams_a_call_and_its_answer(
    client: Any, replay: Any, anthropic_client: anthropic.Anthropic
) -> None:
    says_in_turn(client, replay, f"<think>Hm</think>Look:{call('look', path='a.txt')}", "It says hi")
    tools: Any = [{"name": "look", "input_schema": PARAMETERS}]
    messages: Any = [{"role": "user", "content": "Look"}]
    with anthropic_client.messages.stream(model="claude-any", max_tokens=100, messages=messages, tools=tools) as stream:
        first = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    called: Any = first.content[2]
    assert called.input == {"path": "a.txt"}
    results = [{"type": "tool_result", "tool_use_id": called.id, "content": "hi"}]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second: Any = anthropic_client.messages.create(model="claude-any", max_tokens=100, messages=messages, tools=tools)
    assert (second.content[0].text, second.stop_reason) == ("It says hi", "end_turn")
    counted = anthropic_client.messages.count_tokens(model="claude-any", messages=messages, tools=tools)
    assert counted.input_tokens == second.usage.input_tokens
    with pytest.raises(anthropic.NotFoundError, match="does not exist here"):
        anthropic_client.messages.create(model="other", max_tokens=1, messages=messages)


def run_agent(command: list[str], folder: Path, **variables: str) -> str:
    home = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, cwd=folder, env={**home, **variables}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shared_part(client: Any) -> float:
    """The part of the last prompt that the one before it begins with."""
    before, after = (client.engine.submitted[index].prompt_ids for index in (-2, -1))
    shared = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return shared / len(after)


@pytest.mark.slow  # installs the agent
@needs_npx
def test_codex_runs_a_tool_and_answers(client: Any, replay: Any, live: str, tmp_path: Path) -> None:
    client.engine.hello.context_length = 300_000
    says_in_turn(client, replay, call("exec_command", cmd="ls"), "There is one file.")
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "config.toml").write_text(
        f'model = "default"\nmodel_provider = "here"\n[model_providers.here]\nname = "here"\nbase_url = "{live}/v1"\n'
        'wire_api = "responses"\nrequest_max_retries = 0\nstream_max_retries = 0\n'
    )
    command = ["npx", "--yes", "@openai/codex", "exec", "--skip-git-repo-check", "List the files"]
    assert "There is one file." in run_agent(command, tmp_path)
    assert shared_part(client) > 0.95


@pytest.mark.slow  # installs the agent
@needs_npx
def test_claude_code_runs_a_tool_and_answers(client: Any, replay: Any, live: str, tmp_path: Path) -> None:
    client.engine.hello.context_length = 300_000
    says_in_turn(client, replay, call("Bash", command="ls", description="List files"), "There is one file.")
    command = ["npx", "--yes", "@anthropic-ai/claude-code", "-p", "List the files", "--allowedTools", "Bash"]
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_TELEMETRY": "1"}
    answer = run_agent(command, tmp_path, ANTHROPIC_BASE_URL=live, ANTHROPIC_API_KEY="none", **quiet)
    assert "There is one file." in answer
    assert shared_part(client) > 0.95

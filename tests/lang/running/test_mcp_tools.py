"""MCP: a program uses a server of the official SDK, and a client of the official SDK uses programs (`ramet mcp`)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from ramet import MockBackend, State, function, mcp, mcp_url, tool
from ramet.errors import InvalidRequest, ProgramError, RametError, RemoteError
from ramet.lang.running.mcp_tools import McpServer

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")

SERVER = """
import os
from mcp.server.mcpserver import MCPServer

server = MCPServer("demo", log_level="CRITICAL")

@server.tool()
def add(a: int, b: int) -> int:
    "Add two integers."
    return a + b

@server.tool()
def where(city: str, name: str = "nowhere", self: str = "") -> str:
    return f"{city} is in {name}"

@server.tool()
def place(city: str) -> dict[str, str]:
    return {"city": city, "secret": os.environ.get("SECRET", "none")}

@server.tool()
def broken() -> str:
    from mcp.server.mcpserver.exceptions import ToolError
    raise ToolError("no such thing")

server.run()
"""

PROGRAMS = """
from ramet import State, function, gen

SCRIPT = {"Name a town": "Lyon", "Twice": "ab"}
print("this must not reach the protocol")

@function(max_tokens=8)
def town(s: State, country: str, count: int = 1) -> dict[str, object]:
    "Name a town of a country."
    print("nor this")
    s += f"Name a town of {country}: " + gen("town", stop=".")
    return {"town": s["town"], "count": count + 1}

@function(max_tokens=8)
def twice(s: State, word: str) -> None:
    s += f"Twice {word}: " + gen("a")

@function
def fails(s: State) -> None:
    raise ValueError("it is broken")

@function
def _own(s: State) -> None: ...
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpServer]:
    folder = tmp_path_factory.mktemp("mcp")
    (folder / "server.py").write_text(SERVER)
    with mcp([sys.executable, "server.py"], env={"SECRET": "s3"}, cwd=folder) as found:
        yield found


def call(name: str, **arguments: Any) -> str:
    return '<tool_call>\n{"name": "' + name + '", "arguments": ' + json.dumps(arguments) + "}\n</tool_call>"


def test_the_tools_of_a_server_are_tools_with_its_names_descriptions_and_schemas(server: McpServer) -> None:
    assert [one.name for one in server] == ["add", "where", "place", "broken"]
    assert server[0].description == "Add two integers."
    assert set(server[0].parameters["properties"]) == {"a", "b"}


def test_a_program_calls_the_tools_of_a_server_beside_its_own(server: McpServer) -> None:
    @tool
    def double(n: int) -> int:
        """Double it."""
        return 2 * n

    script = [call("add", a=2, b=40) + "\n" + call("where", city="Lyon", self="x") + "\n" + call("double", n=4), "done"]

    @function(tools=[double, *server])
    def ask(s: State) -> None:
        s.user("What is 2 + 40?")
        s.call_tools()

    state = ask.run(backend=MockBackend(script))
    assert [use.result for use in state["calls"]] == [42, "Lyon is in nowhere", 8]
    assert state["answer"] == "done"


def test_structured_results_are_values_and_a_server_gets_its_environment(server: McpServer) -> None:
    assert asyncio.run(server[2](city="Lyon")) == {"city": "Lyon", "secret": "s3"}


def test_a_tools_failure_is_told_with_its_message(server: McpServer) -> None:
    @function(tools=server)
    def ask(s: State, on_error: Literal["raise", "report"]) -> None:
        s.user("Try.")
        s.call_tools(on_error=on_error)

    told = ask.run("report", backend=MockBackend([call("broken"), "sorry"]))
    assert "no such thing" in told["calls"][0].result["error"]
    with pytest.raises(ProgramError, match="no such thing"):
        ask.run("raise", backend=MockBackend([call("broken"), "sorry"]))


def test_a_closed_connection_and_a_server_that_is_none_are_errors() -> None:
    with pytest.raises(RemoteError, match="no-such-command"):
        mcp("no-such-command")
    with pytest.raises(RemoteError, match="can't be used"):
        mcp([sys.executable, "-c", ""])
    with pytest.raises(RemoteError, match="can't be used"):
        mcp_url("http://127.0.0.1:9/mcp")
    with pytest.raises(InvalidRequest, match="empty"):
        mcp("")
    with pytest.raises(InvalidRequest, match="http://"):
        mcp_url("127.0.0.1:9")
    with pytest.raises(InvalidRequest, match="above 0"):
        mcp("x", timeout_s=0)


def test_a_client_of_the_sdk_uses_programs_as_tools(tmp_path: Path) -> None:
    (tmp_path / "programs.py").write_text(PROGRAMS)
    ours = ["-m", "ramet.cli", "mcp", "programs.py", "--mock"]

    async def talk() -> None:
        from mcp import Client, StdioServerParameters

        async with Client(StdioServerParameters(command=sys.executable, args=ours, cwd=tmp_path)) as client:
            listed = {one.name: one for one in (await client.list_tools()).tools}
            assert set(listed) == {"town", "twice", "fails"}
            assert listed["town"].description == "Name a town of a country."
            assert listed["town"].input_schema["properties"]["count"]["type"] == "integer"
            assert listed["town"].input_schema["required"] == ["country"]
            answers = await asyncio.gather(
                *(client.call_tool("town", {"country": "France", "count": n}) for n in range(4))
            )
            assert [one.structured_content for one in answers] == [{"town": "Lyon", "count": n + 1} for n in range(4)]
            variables = await client.call_tool("twice", {"word": "b"})
            assert variables.structured_content == {"a": "ab"}
            for name, arguments, problem in (
                ("fails", {}, "it is broken"),
                ("town", {"country": 3}, "country"),
                ("town", {}, "country"),
                ("town", {"country": "France", "colour": "red"}, "colour"),
                ("_own", {}, "no tool"),
            ):
                failed = await client.call_tool(name, arguments)
                assert failed.is_error, name
                assert problem in failed.content[0].text  # type: ignore[union-attr]

    asyncio.run(talk())


def test_a_program_uses_a_program_and_a_closed_connection_says_so(tmp_path: Path) -> None:
    (tmp_path / "programs.py").write_text(PROGRAMS)
    with mcp([sys.executable, "-m", "ramet.cli", "mcp", "programs.py:twice", "--mock"], cwd=tmp_path) as found:
        assert asyncio.run(found[0](word="x")) == {"a": "ab"}
    with pytest.raises(RemoteError, match="closed"):
        asyncio.run(found[0](word="x"))


def test_a_file_without_programs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(RametError):
        mcp([sys.executable, "-m", "ramet.cli", "mcp", "none.py", "--mock"], cwd=tmp_path)

"""`ramet mcp program.py`: offer a file's programs as the tools of an MCP server.

A program's tool has the name, the docstring and the parameters of its function. Its answer is what the function
returns; of a program that returns nothing, its variables. The official SDK speaks the protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import sys
import typing
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ramet
from ramet.cli.program import choose_program, load_file, split_name
from ramet.cli.run import add_place, backend_of
from ramet.errors import InvalidRequest
from ramet.lang.running.tools import Tool, to_json, tool

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server
    from mcp.types import CallToolResult

    from ramet.lang.program.function import Function


def add_mcp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE[:PROGRAM]", help="a Python file, and which of its programs; default: all")
    add_place(parser)
    parser.add_argument("--port", type=int, help="serve http://HOST:PORT/mcp; default: standard input and output")
    parser.add_argument("--host", default="127.0.0.1", help="the address for --port")


def run_mcp(arguments: argparse.Namespace) -> int:
    """Serve until the client leaves, or an interrupt."""
    with ExitStack() as stack:
        with redirect_stdout(sys.stderr):  # standard output is the protocol's
            server = _server(arguments, stack)
        if arguments.port is None:
            asyncio.run(_serve_stdio(server))
        else:
            import uvicorn

            app = server.streamable_http_app(host=arguments.host)
            uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
    return 0


async def _serve_stdio(server: Server[Any]) -> None:
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write):
        with redirect_stdout(sys.stderr):
            await server.run(read, write, server.create_initialization_options())


def _server(arguments: argparse.Namespace, stack: ExitStack) -> Server[Any]:
    """Return the server of the file's programs. `stack`: closes their backend."""
    from mcp.server.lowlevel import Server
    from mcp.types import CallToolResult, ListToolsResult, TextContent
    from mcp.types import Tool as Listed

    path, wanted = split_name(arguments.file)
    names = load_file(Path(path))
    programs = _programs(names, wanted, path)
    backend = backend_of(arguments, names)
    options = {} if backend is None else {"backend": stack.enter_context(backend)}
    tools = {name: _tool_of(name, program) for name, program in programs.items()}

    def failed(problem: str) -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text=problem)], is_error=True)

    async def list_tools(_: object, __: object) -> ListToolsResult:
        listed = [
            Listed(name=name, description=one.description, input_schema=dict(one.parameters))
            for name, one in tools.items()
        ]
        return ListToolsResult(tools=listed)

    async def call_tool(_: object, asked: Any) -> CallToolResult:
        if asked.name not in tools:
            return failed(f"there is no tool {asked.name!r}; there are {', '.join(tools)}")
        try:
            given = tools[asked.name].read(asked.arguments or {})
            answer = await _answer(programs[asked.name], given, options)
        except Exception as error:  # of the program: the model that called it reads it
            return failed(str(error) or type(error).__name__)
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        structured = answer if isinstance(answer, dict) else None
        return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured)

    return Server(Path(path).stem, version=ramet.__version__, on_list_tools=list_tools, on_call_tool=call_tool)


def _programs(names: Mapping[str, Any], wanted: str, path: str) -> dict[str, Function]:
    """Return the programs to offer, by the names of their tools. Raises InvalidRequest."""
    from ramet.lang.program.function import Function

    if wanted:
        return {wanted: choose_program(dict(names), wanted, path)}
    found = {name: one for name, one in names.items() if isinstance(one, Function) and not name.startswith("_")}
    if not found:
        raise InvalidRequest(f"{path} has no program; mark a function with @function", param="file")
    return found


def _tool_of(name: str, program: Function) -> Tool:
    """Return the tool of a program's parameters. Raises InvalidRequest if one has no type, or none with a schema."""

    def described() -> None:
        """Stand for the program: a function without the state."""

    hints = typing.get_type_hints(program.body, include_extras=True)
    described.__annotations__ = {one.name: hints[one.name] for one in program.parameters if one.name in hints}
    described.__signature__ = inspect.Signature(program.parameters)  # type: ignore[attr-defined]
    described.__doc__ = inspect.getdoc(program.body) or ""
    return tool(name=name)(described)


async def _answer(program: Function, given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:  # Any: JSON
    state = await program.arun(**given, **options)
    result = state.result
    return to_json(state.variables if result is None else result, program.name)

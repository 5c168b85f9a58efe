"""The tools of MCP servers: `tools=mcp("command ...")`, `tools=mcp_url("http://...")`.

The official SDK speaks the protocol (https://modelcontextprotocol.io), on an event loop with its own thread. Not here:
programs as tools of others (ramet/cli/mcp.py).
"""

from __future__ import annotations

import asyncio
import shlex
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from ramet.errors import InvalidRequest, RametError, RemoteError, explained
from ramet.lang.running.tools import Tool

if TYPE_CHECKING:
    from os import PathLike

    from mcp import Client
    from mcp.types import CallToolResult

_PATIENCE_S = 5.0  # for a server to end


class McpServer(Sequence[Tool]):
    """The tools of an MCP server. The connection lasts until `close`, the end of a `with` block, or of the process."""

    def __init__(self, name: str, connect: Callable[[], Client], timeout_s: float) -> None:
        """`connect` returns the client, on the loop. `timeout_s`: of connecting, and of each call."""
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise InvalidRequest(f"timeout_s of {name} is {timeout_s!r}, but must be above 0", param="timeout_s")
        self.name = name
        ended = asyncio.Event()
        found: Future[tuple[asyncio.AbstractEventLoop, Client, Sequence[Any]]] = Future()
        work = _connected(connect, found, ended, timeout_s)
        thread = threading.Thread(target=asyncio.run, args=(work,), name="ramet-mcp", daemon=True)
        thread.start()
        try:
            self._loop, self._client, tools = found.result()
        except ModuleNotFoundError as error:
            raise explained(error) from None
        except Exception as error:
            raise RemoteError(f"{name} can't be used: {_cause(error)}") from error
        finally:
            found.cancel()  # an interrupt: the connection ends as soon as it is there
        self._end = weakref.finalize(self, _stop, self._loop, ended, thread)  # at the latest when the process ends
        self._tools = tuple(
            Tool(partial(self._call, one.name), one.name, one.description or "", one.input_schema, timeout_s, True)
            for one in tools
        )

    async def _call(self, tool: str, /, **arguments: Any) -> Any:  # Any: JSON
        if not self._end.alive:
            raise RemoteError(f"tool {tool!r} is called, but the connection to {self.name} is closed")
        asked = asyncio.run_coroutine_threadsafe(self._client.call_tool(tool, arguments), self._loop)
        try:
            found = await asyncio.wrap_future(asked)
        except Exception as error:  # the SDK's own, and those of its transports
            raise RemoteError(f"tool {tool!r} of {self.name} failed: {_cause(error)}") from error
        if found.is_error:
            raise RametError(f"tool {tool!r} of {self.name} failed: {_value(found)}")
        return _value(found)

    def close(self) -> None:
        """End the connection, and the server's process if `mcp` started it. Its tools can't be called any more."""
        self._end()

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._tools)

    @overload
    def __getitem__(self, index: int) -> Tool: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tool]: ...
    def __getitem__(self, index: int | slice) -> Tool | Sequence[Tool]:
        return self._tools[index]

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(tool.name for tool in self._tools)}>"


def mcp(
    command: str | Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | PathLike[str] | None = None,
    timeout_s: float = 60.0,
) -> McpServer:
    """Start an MCP server as a process, and return its tools: `tools=mcp("uvx mcp-server-time")`.

    `env`: further environment variables; of this process's own, the server gets only a few such as PATH. `timeout_s`:
    for connecting, and for each call. Needs `pip install 'ramet[mcp]'`.

    Raises:
        RemoteError: the server does not start, or is no MCP server. InvalidRequest: a tool has no name that models use.
    """
    words = shlex.split(command) if isinstance(command, str) else list(command)
    if not words:
        raise InvalidRequest("the command of an MCP server is empty", param="command")

    def connect() -> Client:
        from mcp import Client, StdioServerParameters

        where = None if cwd is None else str(cwd)
        return Client(StdioServerParameters(command=words[0], args=words[1:], env=dict(env or {}), cwd=where))

    return McpServer(f"the MCP server `{shlex.join(words)}`", connect, timeout_s)


def mcp_url(url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> McpServer:
    """Connect to an MCP server (Streamable HTTP), and return its tools. `headers`: such as an authorization.

    `timeout_s`: for connecting, and for each call. Needs `pip install 'ramet[mcp]'`.

    Raises:
        RemoteError: the server can't be reached, or is no MCP server.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"url is {url!r}, but must begin with http:// or https://", param="url")

    def connect() -> Client:
        import mcp  # first, because it brings the other one
        from httpx2 import AsyncClient
        from mcp.client.streamable_http import streamable_http_client

        client = AsyncClient(headers=dict(headers or {}), timeout=timeout_s)
        return mcp.Client(streamable_http_client(url, http_client=client))

    return McpServer(f"the MCP server {url}", connect, timeout_s)


async def _connected(
    connect: Callable[[], Client],
    found: Future[tuple[asyncio.AbstractEventLoop, Client, Sequence[Any]]],
    ended: asyncio.Event,
    limit_s: float,
) -> None:
    """Hold the connection until `ended`. `found` receives the loop, the client and the tools, or the error."""
    limit = asyncio.timeout(limit_s)
    try:
        async with limit, connect() as client:
            page = await client.list_tools()
            tools = [*page.tools]
            while page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor)
                tools += page.tools
            limit.reschedule(None)
            found.set_result((asyncio.get_running_loop(), client, tools))
            await ended.wait()
    except Exception as error:
        if not found.done():
            found.set_exception(TimeoutError(f"no answer within {limit_s:g} s") if limit.expired() else error)


def _stop(loop: asyncio.AbstractEventLoop, ended: asyncio.Event, thread: threading.Thread) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(ended.set)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_S)


def _value(result: CallToolResult) -> Any:  # Any: JSON
    """Return a tool's result: the structured one if there is one, else the text; blocks of other kinds as JSON."""
    if result.structured_content is not None:
        found = result.structured_content
        # A server wraps what is no object so, because an object is what the protocol asks for.
        return found["result"] if isinstance(found, dict) and found.keys() == {"result"} else found
    blocks: list[Any] = [
        block.text if block.type == "text" else block.model_dump(mode="json", by_alias=True, exclude_none=True)
        for block in result.content
    ]
    return "\n".join(blocks) if all(isinstance(block, str) for block in blocks) else blocks


def _cause(error: BaseException) -> str:
    """Return the message of an error, or of the first one in a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__

"""Where the processes of an engine run: on this machine (`LocalLauncher`), or on a node that Ray chooses (`on_ray`).

A launcher has at most one process at a time. The process connects to sockets of its parent, which the launcher binds
where that process, and nobody else, can reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from ramet.runtime.server.link.protocol import Settings

_END_S = 10.0  # for an engine to end on SIGTERM; then it is killed


class Launcher(Protocol):
    """Starts the processes of one engine, one after the other. One event loop owns it."""

    def listen(self, kind: int, name: str) -> tuple[zmq.Socket[bytes], str]:
        """Make a socket of the parent, and return it with the address for the process to connect to."""

    async def start(self, settings: Settings) -> None:
        """Start a process. Raises RametError if none can be started."""

    async def wait(self) -> str:
        """Wait until the process has ended. Returns its end in words."""

    async def end(self) -> None:
        """Tell the process to end, and wait until it has ended. It is killed if it takes too long."""

    def kill(self) -> None:
        """End the process at once. For signal handlers."""

    async def close(self) -> None:
        """Close the sockets, and free all else. No process runs any more."""


class LocalLauncher:
    """Processes of this machine. They reach their parent through sockets in a folder that only this user can read."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._folder = tempfile.TemporaryDirectory(prefix="ramet-")
        self._process: asyncio.subprocess.Process | None = None

    def listen(self, kind: int, name: str) -> tuple[zmq.Socket[bytes], str]:
        socket, address = unbounded_socket(self._context, kind), f"ipc://{Path(self._folder.name) / name}"
        socket.bind(address)
        return socket, address

    async def start(self, settings: Settings) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ramet.runtime.server.link.process",
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C goes to the server alone, which then ends its engine
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(msgspec.structs.replace(settings, parent_pid=os.getpid())) + b"\n")
        with contextlib.suppress(ConnectionError):  # it died at once: `wait` reports it
            await process.stdin.drain()

    async def wait(self) -> str:
        assert self._process is not None, "a process was started"
        return _spelled(await self._process.wait())

    async def end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            self.kill()
            await process.wait()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        self._context.destroy(linger=0)
        self._folder.cleanup()


def unbounded_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket without a limit of messages: what waits is bounded by the requests in flight."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


def _spelled(status: int) -> str:
    """An exit status in words: a negative one is the signal that ended the process."""
    if status >= 0:
        return f"it ended with status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"it ended with {name}{why}"
    return f"it ended with signal {-status}"

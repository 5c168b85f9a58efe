"""The processes of a tensor-parallel engine. The first rank starts the others, tells them each step, and notices ends.

`torch.multiprocessing` starts the processes. They find each other by a file in a folder that only this user can read,
and a step is one message through a pipe. Every rank that ends takes the engine with it; a rank whose first rank is gone
ends itself.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.multiprocessing.spawn import start_processes

from ramet.errors import EngineStopped, RametError, from_name
from ramet.kernels.attention.tree import TreeWork
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.messages import RankMessage, decoder, encoder
from ramet.runtime.steps.inputs import LastToken, Step
from ramet.runtime.steps.tree_planner import TreePlanner

logger = logging.getLogger(__name__)

_LOADED, _END = b"loaded", b""  # what a rank says before its last words, and what it is told at the end
_KNOWN_AFTER_S = 2.0  # the system reports a rank's end this long after its connections broke, at most
_END_S = 5.0


class FirstRank:
    """The first rank's view of the others. Used by one thread at a time, except `when_failed`."""

    def __init__(self, entry: Callable[..., None], arguments: tuple[Any, ...], size: int) -> None:
        """Start `entry(index, pipes, folder, *arguments)` in size - 1 processes; index 0 is rank 1.

        pipes: their ends, by index. folder: where all ranks meet.
        """
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ramet-ranks-")
        pairs = [get_context("spawn").Pipe() for _ in range(size - 1)]
        self._pipes = [own for own, _ in pairs]
        self._group: Group | None = None
        self._num_plans = 0
        self._num_loaded = 0
        self._failure: RametError | None = None
        self._on_failure: Callable[[Exception], None] | None = None
        self._is_closing = False
        self._changed = threading.Condition()
        pipes = [other for _, other in pairs]
        context = start_processes(  # type: ignore[no-untyped-call]
            entry,
            (pipes, self._folder.name, *arguments),
            nprocs=size - 1,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        self._processes: list[Any] = context.processes  # Any: the spawn context's processes
        for pipe in pipes:
            pipe.close()
        self._watcher = threading.Thread(target=self._watch, name="ramet-ranks", daemon=True)
        self._watcher.start()

    # -- the start

    def join(self, device: torch.device) -> Group:
        """Wait until all ranks have loaded their parts, and make the group. Raises the error of a rank that has not."""
        with self._changed:
            while self._failure is None and self._num_loaded < self.size - 1:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
        self._group = Group(0, self.size, device, Path(self._folder.name))
        return self._group

    def when_failed(self, on_failure: Callable[[Exception], None]) -> None:
        """Call this on a thread of its own once a rank has ended."""
        with self._changed:
            self._on_failure = on_failure
            failure = self._failure
        if failure is not None:
            on_failure(failure)

    # -- steps (`model_runner.Peers`)

    def send_step(self, step: Step, tree: TreePlanner | None) -> None:
        work: TreeWork | None = None
        if tree is not None and tree.num_plans != self._num_plans:
            self._num_plans, work = tree.num_plans, tree.work
        self._send(RankMessage.of(step, work))

    def send_last(self, rows: Sequence[LastToken]) -> None:
        self._send(RankMessage(last=list(rows)))

    def fail(self, error: Exception) -> None:
        self._wait_for_cause()
        self._note(EngineStopped(f"rank 0 failed within a step that the other ranks ran: {error!r}"))

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_for_cause(self) -> None:
        """Wait a moment after an error of this rank: if another one has ended, its end is the cause."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, _KNOWN_AFTER_S)

    def _send(self, message: RankMessage) -> None:
        data = encoder.encode(message)
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except OSError as error:
                self.fail(error)
                self.check()

    # -- the end

    def close(self, patience_s: float = _END_S) -> None:
        """End the other ranks. Those that do not end by themselves within this time are killed."""
        with self._changed:
            self._is_closing = True
        if self._failure is None and patience_s:
            for pipe in self._pipes:
                try:
                    pipe.send_bytes(_END)
                except OSError:
                    logger.debug("a rank has ended before it was told to")
        self._end_processes(patience_s if self._failure is None else 0.0)
        self._watcher.join(_END_S)
        if self._group is not None:
            self._group.close()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def close_after(self, error: BaseException) -> None:
        """Kill the other ranks after an error at the start. Raises the error of the rank that caused it, if one did."""
        if isinstance(error, Exception) and not isinstance(error, RametError):
            self._wait_for_cause()
        failure = self._failure
        self.close(0.0)
        if failure is not None and failure is not error:
            raise failure from error

    def _end_processes(self, patience_s: float) -> None:
        deadline_s = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(deadline_s - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()

    def _watch(self) -> None:
        """Wait for what ranks say, and for their ends."""
        ranks = {*self._pipes}
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        while sentinels:
            for ready in sorted(wait([*ranks, *sentinels]), key=lambda found: isinstance(found, int)):  # words first
                if isinstance(ready, Connection):
                    try:
                        said = ready.recv_bytes()
                    except (EOFError, OSError):
                        ranks.remove(ready)
                        continue
                    if said == _LOADED:
                        with self._changed:
                            self._num_loaded += 1
                            self._changed.notify_all()
                    else:
                        self._note(from_name(*msgspec.msgpack.decode(said, type=tuple[str, str])))
                else:
                    assert isinstance(ready, int)
                    self._note(self._end_of(sentinels.pop(ready)))

    def _end_of(self, rank: int) -> EngineStopped:
        process = self._processes[rank - 1]
        process.join(1.0)  # its status is known a moment after its end
        status = process.exitcode or 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = ""
        if status == 1 and self._group is None:
            hint = (
                "; its error stands above. A script that makes an engine with tp > 1 is imported by the ranks: "
                'what it runs must stand under `if __name__ == "__main__":`'
            )
        return EngineStopped(f"rank {rank} (process {process.pid}) {how}{hint}")

    def _note(self, error: RametError) -> None:
        """Record the first failure, end the other ranks, and tell the engine."""
        with self._changed:
            if self._is_closing or self._failure is not None:
                return
            self._failure = error
            on_failure = self._on_failure
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        if self._group is not None:
            self._group.abort()
        if on_failure is not None:
            on_failure(error)


class OtherRank:
    """One of the other ranks, in its own process."""

    def __init__(self, index: int, pipes: Sequence[Connection], folder: str) -> None:
        """Prepare the process. It ignores the terminal's Ctrl-C, and ends when the first rank's process is gone.

        pipes, folder: see `FirstRank`.
        """
        self.rank = index + 1
        self._size, self._folder = len(pipes) + 1, Path(folder)
        self._pipe = pipes[index]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def join(self, device: torch.device) -> Group:
        """Say that this rank has loaded its part, and make the group."""
        self._pipe.send_bytes(_LOADED)
        return Group(self.rank, self._size, device, self._folder)

    def receive(self) -> RankMessage | None:
        """Wait for the next message of the first rank. None: the end."""
        said = self._pipe.recv_bytes()
        return None if said == _END else decoder.decode(said)

    def fail(self, error: Exception) -> None:
        """Tell the first rank what ends this one. If that was the end of another one, this one is killed meanwhile."""
        if not isinstance(error, RametError):
            time.sleep(_KNOWN_AFTER_S / 2)
        name = type(error).__name__ if isinstance(error, RametError) else "EngineStopped"
        message = str(error) if isinstance(error, RametError) else f"{error!r}"
        self._pipe.send_bytes(msgspec.msgpack.encode((name, f"rank {self.rank}: {message}")))


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

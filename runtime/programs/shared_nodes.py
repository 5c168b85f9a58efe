"""Runs identical requests of one program once: the same prompt, the same values, and greedy or the same seed.

It replaces the engine's `submit`. A request that must give the same text as an earlier one of the program receives the
earlier one's outputs, starting with those already there. A request that samples without a seed goes to the engine
unchanged. Not here: nodes that are always equal (lang/passes/paths.py finds them before a run).
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from ramet.lang.graph.sampling import is_repeatable
from ramet.runtime.programs.engine import Handle, ProgramEngine
from ramet.runtime.types import FinishReason, Grammar, RequestOptions, RequestOutput, SamplingParams

OnOutput = Callable[[RequestOutput], None]


class SharedRequests:
    """`submit` of an engine, for one program. Keeps the outputs of repeatable requests as long as the program lives."""

    def __init__(self, engine: ProgramEngine) -> None:
        self._engine = engine
        self._known: dict[object, _Shared] = {}
        self._lock = threading.Lock()

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        options: RequestOptions,
        *,
        grammar: Grammar | None = None,
        on_output: OnOutput,
    ) -> Handle:
        """See ProgramEngine.submit. In one program, `options` differ in deadline, `score_from` and adapter alone."""

        def send(deliver: OnOutput) -> Handle:
            return self._engine.submit(prompt, sampling, options, grammar=grammar, on_output=deliver)

        score_from = options.score_from
        if score_from is None and not is_repeatable(sampling):
            return send(on_output)
        key = request_key(prompt, sampling, grammar, score_from, options.adapter)
        with self._lock:
            shared = self._known.get(key)
            is_first = shared is None or shared.is_lost
            if shared is None or is_first:
                shared = self._known[key] = _Shared()
            reader = _Reader(shared, on_output, is_first=is_first)
            with shared.lock:
                shared.readers[reader] = None
                shared.behind.append(reader)
        if is_first:
            try:
                handle = send(shared.push)
            except BaseException:
                with shared.lock:
                    shared.is_lost = True
                raise
            shared.began(handle)
        else:
            shared.deliver()
        return reader


def request_key(
    prompt: list[int], sampling: SamplingParams, grammar: Grammar | None, score_from: int | None, adapter: str = ""
) -> object:
    """Return a key; equal keys mean equal outputs. A greedy request's seed doesn't matter."""
    tokens = hashlib.blake2b(np.asarray(prompt, dtype=np.int32).tobytes(), digest_size=16).digest()
    values = msgspec.structs.replace(sampling, seed=None) if sampling.is_greedy or score_from is not None else sampling
    return tokens, repr(values), grammar, score_from, adapter


@dataclass(slots=True, eq=False)
class _Shared:
    """One request of the engine and its readers. Owner: SharedRequests; the lock guards the fields.

    Every output reaches the readers in the order in which they joined, on whatever threads they do: what a reader
    starts when it has its last output is then asked for in the same order as without other threads. `readers`: those
    that have not left, nor had their last output. `num_told`: outputs that all of them have, but for those `behind`.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    outputs: list[RequestOutput] = field(default_factory=list)
    readers: dict[_Reader, None] = field(default_factory=dict)
    behind: deque[_Reader] = field(default_factory=deque)
    num_told: int = 0
    is_busy: bool = False
    handle: Handle | None = None
    is_lost: bool = False  # it failed, or its last reader left: no other reader may join

    def push(self, output: RequestOutput) -> None:
        with self.lock:
            self.outputs.append(output)
            if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                self.is_lost = True
        self.deliver()

    def began(self, handle: Handle) -> None:
        with self.lock:
            self.handle = handle
            is_unwanted = self.is_lost
        if is_unwanted:
            handle.cancel()

    @property
    def _is_over(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    def leave(self, reader: _Reader) -> None:
        with self.lock:
            if reader not in self.readers:
                return
            del self.readers[reader]
            if self.readers or self._is_over:
                return
            self.is_lost = True
            handle = self.handle
        if handle is not None:
            handle.cancel()

    def deliver(self) -> None:
        """Deliver what readers do not have yet, on one thread at a time and not under the lock."""
        with self.lock:
            if self.is_busy:
                return  # that thread delivers it
            self.is_busy = True
        while True:
            with self.lock:
                readers, outputs = self._next()
                if not readers:
                    self.is_busy = False
                    return
            try:
                for reader in readers:
                    for output in outputs:
                        if reader in self.readers:
                            reader.take(output)
            except BaseException:
                self.is_busy = False
                raise
            if outputs[-1].finish_reason is not None:
                with self.lock:
                    for reader in readers:
                        self.readers.pop(reader, None)

    def _next(self) -> tuple[list[_Reader], list[RequestOutput]]:
        """Return whom to tell what next: first those that are behind, then all of them one more output."""
        if self.behind and self.num_told:
            return [self.behind.popleft()], self.outputs[: self.num_told]
        if self.num_told == len(self.outputs):
            return [], []
        self.behind.clear()
        self.num_told += 1
        return list(self.readers), [self.outputs[self.num_told - 1]]


class _Reader:
    """A reader of a shared request. `cancel` leaves it; the request ends with its last reader."""

    __slots__ = ("_is_first", "_on_output", "_shared")

    def __init__(self, shared: _Shared, on_output: OnOutput, *, is_first: bool) -> None:
        self._shared, self._on_output, self._is_first = shared, on_output, is_first

    def cancel(self) -> None:
        self._shared.leave(self)

    def take(self, output: RequestOutput) -> None:
        self._on_output(output if self._is_first else _for_free(output))


def _for_free(output: RequestOutput) -> RequestOutput:
    """Return the output with the same text and tokens, but no computed tokens."""
    usage = output.usage
    return replace(output, usage=msgspec.structs.replace(usage, cached_tokens=usage.prompt_tokens, completion_tokens=0))

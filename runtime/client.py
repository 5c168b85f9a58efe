"""`Engine`: the runtime in this process. One thread runs steps; callers submit from any thread or event loop.

Tokens become text here, incrementally, and stop strings are found here. Not here: programs (programs.py), HTTP.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from ramet.errors import ContextOverflow, EngineStopped, InvalidRequest, InvalidSampling, RametError, RequestCancelled
from ramet.runtime.cache_probe import Difference, differences
from ramet.runtime.compiled_code import OnStage, prepare_compiled_code
from ramet.runtime.config import EngineConfig
from ramet.runtime.detokenizer import Detokenizer, StopStringScanner
from ramet.runtime.engine import EngineCore, SequenceUpdate
from ramet.runtime.factory import build_core, load
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.types import (
    FinishReason,
    Grammar,
    Request,
    RequestOutput,
    SamplingParams,
    Sequence,
    TokenIds,
    Usage,
)

logger = logging.getLogger(__name__)

OnOutput = Callable[[RequestOutput], None]
_LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A finished request. `logprobs` and `top_logprobs` are as long as `token_ids` where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_match: str | int | None
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    timings: dict[str, float] = field(default_factory=dict)


class RequestHandle:
    """One request's output as it comes: iterate it (`for`, `async for`), or wait for all of it (`result`, `await`)."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._outputs: list[RequestOutput] = []
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def push(self, output: RequestOutput) -> None:
        """Called by the engine for every increment."""
        with self._changed:
            self._outputs.append(output)
            waiters, self._waiters = self._waiters, []
            self._changed.notify_all()
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)

    def cancel(self) -> None:
        """Abort the request; its pages are free within one step. Nothing happens when it is finished already."""
        self._cancel(self.request_id)

    def __iter__(self) -> Iterator[RequestOutput]:
        for index in itertools.count():
            with self._changed:
                while len(self._outputs) <= index:
                    self._changed.wait()
                output = self._outputs[index]
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for index in itertools.count():
            while True:
                with self._changed:
                    if len(self._outputs) > index:
                        output = self._outputs[index]
                        break
                    loop = asyncio.get_running_loop()
                    future = loop.create_future()
                    self._waiters.append((loop, future))
                await future
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    def result(self, timeout_s: float | None = None) -> RequestResult:
        """Wait for the end. Raises the request's error, RequestCancelled, or TimeoutError (the request goes on)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._outputs or self._outputs[-1].finish_reason is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id} did not finish within {timeout_s} s; it goes on")
                self._changed.wait(left)
        return self._collect()

    def __await__(self) -> Generator[Any, None, RequestResult]:  # Any: what asyncio yields to its loop
        async def wait() -> RequestResult:
            async for _ in self:
                pass
            return self._collect()

        return wait().__await__()

    def _collect(self) -> RequestResult:
        outputs = self._outputs
        last = _raise_error(outputs[-1])
        assert last.finish_reason is not None
        logprobs = [p for o in outputs if o.logprobs is not None for p in o.logprobs]
        tops = [t for o in outputs if o.top_logprobs is not None for t in o.top_logprobs]
        scores = [float(p) for o in outputs if o.prompt_logprobs is not None for p in o.prompt_logprobs]
        return RequestResult(
            text="".join(o.text for o in outputs),
            token_ids=tuple(t for o in outputs for t in o.token_ids),
            finish_reason=last.finish_reason,
            stop_match=last.stop_match,
            usage=last.usage,
            logprobs=tuple(logprobs) if logprobs else None,
            top_logprobs=tuple(tops) if tops else None,
            prompt_logprobs=tuple(scores) if scores else None,
            timings=dict(last.timings or {}),
        )


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _raise_error(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise output.error
    return output


@dataclass(slots=True, eq=False)
class _Stream:
    """One request on its way out. Owner: the engine's thread."""

    request: Request
    on_output: OnOutput
    detokenizer: Detokenizer | None
    scanner: StopStringScanner | None
    submitted_s: float
    num_reported: int = 0
    first_token_s: float | None = None
    num_cached: int | None = None


class Engine:
    """A model with its cache and scheduler, in this process.

    `model`: a catalogue name, a directory, a .gguf file, a hub id, or a LoadedModel. `overrides` are fields of
    EngineConfig. `on_stage` is told where starting takes long for another reason than usual (it compiles, once per
    machine); without it, the log is. Use it as a context manager, or call `shutdown`.

    Raises:
        ModelError, ConfigError, OutOfMemory: the model or its cache cannot be made.
    """

    def __init__(
        self,
        model: str | LoadedModel | None = None,
        config: EngineConfig | None = None,
        *,
        on_stage: OnStage | None = None,
        **overrides: Any,  # fields of EngineConfig, which checks them
    ) -> None:
        config = (config or EngineConfig()).changed(overrides)
        self.config = config
        self.model = load(model, config)
        prepare_compiled_code(self.model.decoder.device, on_stage)
        self.tokenizer = self.model.tokenizer
        self.chat_template = self.tokenizer.chat_template
        self._core: EngineCore = build_core(self.model, config)
        self.context_length = self._core.context_length
        self.device_grammars = self._core.runner.device_grammars  # for whoever compiles grammars; None: host masks
        self._streams: dict[Sequence, _Stream] = {}
        self._by_id: dict[str, Sequence] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)
        self._seed_lock = threading.Lock()
        if self.model.decoder.device.type == "cpu":
            from ramet.kernels.cpu_threads import release_threads  # compiles CPU code: not needed for a GPU

            release_threads()  # the engine's thread alone computes from here on
        self._thread = threading.Thread(target=self._run, name="ramet-engine", daemon=True)
        atexit.register(self.shutdown)  # a thread that the interpreter kills inside a step aborts the process
        self._thread.start()

    # -- callers' side -------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | list[int] | TokenIds,
        sampling: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        cache_salt: str = "",
        program_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        score_from: int | None = None,
        request_id: str | None = None,
        on_output: OnOutput | None = None,
        detokenize: bool = True,
    ) -> RequestHandle:
        """Queue a request; thread-safe, returns at once.

        deadline_s: seconds from now. score_from: see Request. on_output: called on the engine's thread for every
        increment, instead of collecting them in the handle. detokenize False: outputs have tokens and no text.

        Raises:
            InvalidRequest, ContextOverflow, EmptyPrompt, Overloaded, EngineStopped.
        """
        request = self.make_request(
            prompt,
            sampling or SamplingParams(),
            grammar=grammar,
            cache_salt=cache_salt,
            program_id=program_id,
            priority=priority,
            deadline_s=deadline_s,
            score_from=score_from,
            request_id=request_id,
        )
        handle = RequestHandle(request.request_id, self.abort)
        stops = request.sampling.stop
        detokenizer = Detokenizer(self.tokenizer.token_bytes) if detokenize or stops else None
        stream = _Stream(
            request,
            on_output or handle.push,
            detokenizer,
            StopStringScanner(stops) if stops else None,
            request.arrival_s,
        )
        if threading.current_thread() is self._thread:
            self._add(stream)
        else:
            self._send(lambda: self._add(stream))
        return handle

    def generate(
        self, prompt: str | list[int], sampling: SamplingParams | None = None, **options: Any
    ) -> RequestResult:
        """Submit one request and wait for its result. `options` are those of `submit`."""
        return self.submit(prompt, sampling, **options).result()

    def make_request(
        self,
        prompt: str | list[int] | TokenIds,
        sampling: SamplingParams,
        *,
        grammar: Grammar | None = None,
        cache_salt: str = "",
        program_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        score_from: int | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Check a request at the border. Raises what `submit` raises."""
        ids = self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
        vocab = self.model.config.vocab_size
        try:
            prompt_ids = np.asarray(ids)
        except ValueError as error:  # lists of several lengths
            raise InvalidRequest(f"the prompt must be text or a list of token ids: {error}", param="prompt") from error
        if prompt_ids.ndim != 1 or (prompt_ids.size and prompt_ids.dtype.kind not in "iu"):
            raise InvalidRequest("the prompt must be text or one list of token ids (integers)", param="prompt")
        if prompt_ids.size and not (prompt_ids.min() >= 0 and prompt_ids.max() < vocab):
            wrong = prompt_ids[(prompt_ids < 0) | (prompt_ids >= vocab)][0]
            raise InvalidRequest(f"prompt token {wrong} is outside the vocabulary of {vocab:,} tokens", param="prompt")
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise InvalidSampling(f"{name} names token {token}, but the vocabulary has {vocab:,}", param=name)
        num_prompt = len(prompt_ids)
        if score_from is not None and not 1 <= score_from <= num_prompt:
            raise InvalidRequest(f"score_from is {score_from} but must be in [1, {num_prompt}]", param="score_from")
        room = self.context_length - num_prompt
        wanted = sampling.max_tokens
        if score_from is not None:
            wanted = 0
        elif wanted is None:
            wanted = min(self.config.default_max_tokens, max(room, 1))
        if wanted > room:
            raise ContextOverflow(
                f"prompt has {num_prompt:,} tokens and max_tokens is {wanted:,}, but the context is "
                f"{self.context_length:,}; shorten the prompt, lower max_tokens, or raise --context-length",
                param="max_tokens" if num_prompt < self.context_length else "prompt",
            )
        seed = sampling.seed
        if seed is None:
            with self._seed_lock:
                seed = self._seeds.getrandbits(63)
        eos = frozenset() if sampling.ignore_eos else self.tokenizer.eos_ids
        now_s = time.monotonic()
        return Request(
            request_id=request_id or f"request-{next(self._ids)}",
            prompt_ids=prompt_ids.astype(np.int32),
            sampling=sampling,
            max_tokens=wanted,
            stop_ids=eos | frozenset(sampling.stop_token_ids),
            grammar=grammar,
            cache_salt=cache_salt,
            program_id=program_id,
            priority=priority,
            arrival_s=now_s,
            deadline_s=None if deadline_s is None else now_s + deadline_s,
            score_from=score_from,
            seed=seed,
        )

    def abort(self, request_id: str) -> None:
        """Abort a request by its exact id; thread-safe. Its pages are free within one step."""
        self._send(lambda: self._abort(request_id), quietly=True)

    def mark_dead(self, tokens: list[int], cache_salt: str = "", num_live: int = 0) -> None:
        """Say that nobody will read `tokens[num_live:]` again: the cache gives up first what only they use.

        Thread-safe, returns at once. A hint: a request that has them all the same finds what is still there.
        """
        ids = np.asarray(tokens, dtype=np.int32)

        def mark() -> None:
            self._core.scheduler.cache.mark_dead(ids, cache_salt, num_live)

        self._send(mark, quietly=True)

    def set_next_use(self, tokens: list[int], next_use: float, cache_salt: str = "") -> None:
        """Say when `tokens` will be read next, in a unit of the caller's own; infinity takes that back.

        Thread-safe, returns at once. A hint: prefixes without a next use are given up first, then the farthest ones.
        """
        ids = np.asarray(tokens, dtype=np.int32)

        def note() -> None:
            self._core.scheduler.cache.set_next_use(ids, next_use, cache_salt)

        self._send(note, quietly=True)

    def differences(self, tokens: list[int], cache_salt: str = "") -> list[Difference]:
        """Where cached paths leave `tokens`, the one with the most in common first. For diagnosis (why_miss)."""
        found: list[Difference] = self._ask(lambda: differences(self._core.scheduler.cache, tokens, cache_salt))
        return found

    def flush_cache(self) -> int:
        """Forget every cached prefix that nobody is using; returns how many pages became free."""
        return int(self._ask(self._core.scheduler.cache.flush))

    def stats(self) -> dict[str, float]:
        """Counters and gauges: running, waiting, tokens cached and computed, pages free and cached, preemptions."""
        answer: dict[str, float] = self._ask(self._core.stats)
        return answer

    def check_integrity(self) -> None:
        """Compare the page accounting with the tree. Raises CacheIntegrityError: a bug in Ramet."""
        self._ask(self._core.check_integrity)

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Stop the engine's thread; what is in flight gets EngineStopped. Calling it again does nothing."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        atexit.unregister(self.shutdown)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _send(self, command: Callable[[], None], *, quietly: bool = False) -> None:
        with self._wake:
            if self._is_stopping or self._failure is not None:
                if quietly:
                    return
                raise EngineStopped(
                    f"the engine is stopped{f': {self._failure}' if self._failure else ''}; make a new one"
                )
            self._commands.append(command)
            self._wake.notify_all()

    def _ask(self, question: Callable[[], Any]) -> Any:  # Any: whatever the question returns
        if threading.current_thread() is self._thread:
            return question()
        done = threading.Event()
        answer: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(question())
            except RametError as error:
                errors.append(error)
            finally:
                done.set()

        self._send(run)
        while not done.wait(1.0):
            if not self._thread.is_alive():
                raise EngineStopped("the engine stopped before it answered")
        if errors:
            raise errors[0]
        return answer[0]

    def _run(self) -> None:
        try:
            while self._run_once():
                pass
        except Exception as error:  # whatever broke the loop reaches everybody who waits, and the log
            logger.exception("the engine's loop failed")
            with self._wake:
                self._failure = error
        finally:
            self._fail_all()

    def _run_once(self) -> bool:
        """Take in commands, run a step, hand out what it gave. Waits while there is nothing to do; False: stop."""
        with self._wake:
            while not (self._commands or self._core.has_work or self._is_stopping):
                self._wake.wait()
            if self._is_stopping:
                return False
        while self._commands:
            self._commands.popleft()()
        if self._core.has_work:
            updates = self._core.step()
            for update in updates:
                self._deliver(update)
            if not updates and not self._core.is_stepping:
                with self._wake:  # waiting requests that cannot run yet: look again when something comes, or soon
                    if not self._commands:
                        self._wake.wait(0.002)
        return True

    def _add(self, stream: _Stream) -> None:
        request = stream.request
        try:
            if request.request_id in self._by_id:
                raise InvalidRequest(f"request id {request.request_id!r} is in use; choose another", param="request_id")
            sequence = self._core.add(request)
        except RametError as error:
            usage = Usage(request.num_prompt, 0, 0)
            self._emit(stream, RequestOutput(request.request_id, "", (), usage, FinishReason.ERROR, error=error))
            return
        self._streams[sequence] = stream
        self._by_id[request.request_id] = sequence

    def _abort(self, request_id: str) -> None:
        sequence = self._by_id.get(request_id)
        if sequence is not None and self._core.abort(request_id):
            self._end(
                sequence, self._streams[sequence], "", (), None, RequestCancelled(f"request {request_id} was cancelled")
            )

    def _deliver(self, update: SequenceUpdate) -> None:
        """Turn one sequence's new tokens into text and hand it to the caller."""
        sequence, output = update.sequence, update.output
        stream = self._streams.get(sequence)
        if stream is None:
            return
        if stream.num_cached is None:
            stream.num_cached = sequence.num_cached
        if stream.first_token_s is None and (output.token_ids or sequence.is_finished):
            stream.first_token_s = time.monotonic()
        tokens: tuple[int, ...] = output.token_ids
        stop_match: str | int | None = None
        if sequence.is_finished:
            tokens, stop_match = self._without_stop_token(sequence, tokens)
        text = "" if stream.detokenizer is None else stream.detokenizer.push(tokens)
        if stream.scanner is not None:
            text, matched = stream.scanner.push(text)
            if matched is not None:
                self._core.finish(sequence, FinishReason.STOP)
                stop_match = matched
        if sequence.is_finished:
            error: Exception | None = None
            if sequence.finish_reason is FinishReason.ABORT:
                error = RequestCancelled(f"request {stream.request.request_id} passed its deadline")
            elif sequence.finish_reason is FinishReason.ERROR:
                cause = self._core.errors.pop(sequence, None)
                error = (
                    cause if isinstance(cause, RametError) else EngineStopped(f"the request's step failed: {cause!r}")
                )
                error.__cause__ = None if error is cause else cause
            if stream.detokenizer is not None and not isinstance(stop_match, str):
                rest = stream.detokenizer.flush()
                text += rest if stream.scanner is None else stream.scanner.flush(rest)
            self._end(sequence, stream, text, tokens, stop_match, error, update)
            return
        if text or tokens or output.prompt_logprobs is not None:
            increment = RequestOutput(
                stream.request.request_id,
                text,
                tokens,
                self._usage(sequence, stream),
                logprobs=output.logprobs,
                top_logprobs=output.top_logprobs,
                prompt_logprobs=output.prompt_logprobs,
            )
            if not self._emit(stream, increment):
                self._core.finish(sequence, FinishReason.ABORT)
                del self._streams[sequence]
                del self._by_id[stream.request.request_id]

    def _end(
        self,
        sequence: Sequence,
        stream: _Stream,
        text: str,
        tokens: tuple[int, ...],
        stop_match: str | int | None,
        error: Exception | None,
        update: SequenceUpdate | None = None,
    ) -> None:
        del self._streams[sequence]
        del self._by_id[stream.request.request_id]
        now_s = time.monotonic()
        first_s = stream.first_token_s if stream.first_token_s is not None else now_s
        started_s = sequence.first_scheduled_s if sequence.first_scheduled_s is not None else now_s
        output = update.output if update is not None else None
        num = len(tokens)
        self._emit(
            stream,
            RequestOutput(
                stream.request.request_id,
                text,
                tokens,
                self._usage(sequence, stream),
                finish_reason=sequence.finish_reason,
                stop_match=stop_match,
                logprobs=None if output is None or output.logprobs is None else output.logprobs[:num],
                top_logprobs=None if output is None or output.top_logprobs is None else output.top_logprobs[:num],
                prompt_logprobs=None if output is None else output.prompt_logprobs,
                error=error,
                timings={
                    "queue_s": max(started_s - stream.submitted_s, 0.0),
                    "first_token_s": first_s - stream.submitted_s,
                    "total_s": now_s - stream.submitted_s,
                },
            ),
        )

    def _without_stop_token(
        self, sequence: Sequence, tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], str | int | None]:
        if sequence.finish_reason is FinishReason.STOP and tokens and tokens[-1] in sequence.request.stop_ids:
            return tokens[:-1], tokens[-1]
        return tokens, None

    def _emit(self, stream: _Stream, output: RequestOutput) -> bool:
        """Hand an increment to its caller. False where the callback raised: its request ends, nobody else's does."""
        try:
            stream.on_output(output)
        except Exception:  # a caller's code may raise anything; it must not end the loop that serves all
            logger.exception("on_output of request %s raised; the request is aborted", output.request_id)
            return False
        return True

    def _usage(self, sequence: Sequence, stream: _Stream) -> Usage:
        cached = stream.num_cached if stream.num_cached is not None else 0
        return Usage(stream.request.num_prompt, cached, len(sequence.output_ids))

    def _fail_all(self) -> None:
        """Tell everybody who still waits that the engine is gone."""
        cause = f": {self._failure}" if self._failure is not None else ""
        error = EngineStopped(f"the engine stopped while the request was in flight{cause}")
        error.__cause__ = self._failure
        with self._wake:
            self._is_stopping = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:  # requests that came too late are refused like the others; questions are answered
            command()
        for sequence, stream in list(self._streams.items()):
            usage = self._usage(sequence, stream)
            self._emit(stream, RequestOutput(stream.request.request_id, "", (), usage, FinishReason.ERROR, error=error))
        self._streams.clear()
        self._by_id.clear()

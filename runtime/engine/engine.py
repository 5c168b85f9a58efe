"""`Engine`: the runtime in this process. One thread runs steps; callers submit from any thread or event loop.

This module decodes tokens to text incrementally and finds stop strings. Not here: programs (programs/executor.py),
HTTP.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ramet.errors import ConfigError, EngineStopped, InvalidRequest, RametError, RequestCancelled
from ramet.kernels.cpu.threads import release_threads
from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.cache.probe import Difference, TreeNode, differences, latest_paths, segments
from ramet.runtime.cache.radix_cache import PrefixMatch
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.engine.factory import build_core
from ramet.runtime.engine.loading import OnStage, load, prepare_compiled_code
from ramet.runtime.engine.validation import RequestBorder
from ramet.runtime.handle import RequestHandle, RequestResult
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.parallel.sharded import SharedModel
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.text.stops import StopScanner
from ramet.runtime.types import (
    NO_OPTIONS,
    FinishReason,
    Grammar,
    Pooling,
    Request,
    RequestOptions,
    RequestOutput,
    RowOutput,
    SamplingParams,
    Sequence,
    TokenIds,
    Usage,
    wrong_option,
)

logger = logging.getLogger(__name__)

OnOutput = Callable[[RequestOutput], None]
_WALKED_NODES = 512  # of the tree between two steps: about a millisecond
_TOLD_SEGMENTS = 256  # of the tree, with their first tokens
_IDLE_S = 0.01  # without work, until the threads that compute end
_MOVE_S = 0.004  # between two steps, for copies of pages; one part may take longer
_PART_BYTES = 4 << 20  # of pages that are taken in
Vector = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class _Stream:
    """The output side of one request. Owner: the engine's thread.

    `num_again`: 1 if the first output token writes the prompt's last one again; it counts as a token of the prompt.
    """

    request: Request
    on_output: OnOutput
    detokenizer: Detokenizer | None
    scanner: StopScanner | None
    submitted_s: float
    num_again: int = 0
    first_token_s: float | None = None
    num_cached: int | None = None
    pooled: NDArray[np.float32] | None = None  # the sum so far


class Engine:
    """A model with its cache and scheduler, in this process.

    `model`: a catalogue name, a directory, a .gguf file, a hub id, a LoadedModel, or a causal language model of
    transformers in memory, which the engine takes over; `tokenizer` is then its tokenizer (None: that of the folder it
    was loaded from). `overrides` are fields of EngineConfig. `on_stage` is told how much of large files is read
    and that code is compiled (once per machine); without it, these are log lines. Use the engine as a context manager,
    or call `shutdown`.

    Raises:
        ModelError, ConfigError, OutOfMemory: the model or its cache cannot be made.
    """

    def __init__(
        self,
        model: Any = None,  # str, LoadedModel, None or a model of transformers
        config: EngineConfig | None = None,
        *,
        tokenizer: Any = None,  # of transformers or of Ramet
        on_stage: OnStage | None = None,
        **overrides: Any,  # fields of EngineConfig, which checks them
    ) -> None:
        config = (config or EngineConfig()).changed(overrides)
        self.config = config
        self.model = load(model, config, tokenizer, on_stage)
        self._peers = self.model.peers if isinstance(self.model, SharedModel) else None  # of the other ranks
        try:
            self._make(on_stage)
        except Exception as error:
            if self._peers is not None:
                self._peers.close_after(error)
            raise

    def _make(self, on_stage: OnStage | None) -> None:
        config = self.config
        prepare_compiled_code(self.model.decoder.device, on_stage)
        self.tokenizer = self.model.tokenizer
        self.chat_template = self.tokenizer.chat_template
        self._core: EngineCore = build_core(self.model, config)
        self.context_length = self._core.context_length
        self.page_size, self.json_form = self._core.runner.kv_cache.page_size, config.json_form
        wanted = config.context_length or self.model.config.max_position_embeddings
        self.device_grammars = self._core.grammars.device  # for callers that compile grammars; None: the host masks
        self._streams: dict[Sequence, _Stream] = {}
        self._by_id: dict[str, Sequence] = {}
        self._commands: deque[Callable[[], object]] = deque()
        self._moves: deque[Callable[[], object]] = deque()  # take in pages: a few between two steps
        self._wake = threading.Condition()
        self._is_stopping = False
        self._pid = os.getpid()  # a forked child has a copy of this object, and no thread that runs steps
        self._failure: BaseException | None = None
        self._tell_cache: Callable[[], None] = lambda: None
        self._border = RequestBorder(
            self.tokenizer,
            self.model.config.vocab_size,
            self.context_length,
            context_limit="--context-length" if self.context_length == wanted else "--num-kv-tokens",
            default_max_tokens=config.default_max_tokens,
            seed=config.seed,
            drafts=self._core.speculation is not None,
            model_pooling=self.model.generation.pooling,
            find_adapter=None if self._core.runner.adapters is None else self._core.runner.adapters.find,
        )
        for name, _, path in (entry.partition("=") for entry in config.lora):
            self._load_adapter(name, path, lambda work: work())
        self._rest: Callable[[], None] = lambda: None
        if self.model.decoder.device.type == "cpu":
            self._rest = release_threads
        self._rest()  # the engine's thread alone computes from here on
        self._thread = threading.Thread(target=self._run, name="ramet-engine", daemon=True)
        atexit.register(self.shutdown)  # a thread that the interpreter kills inside a step aborts the process
        self._thread.start()
        if self._peers is not None:
            self._peers.when_failed(self._stop_after)

    # -- callers' side -------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | list[int] | TokenIds,
        sampling: SamplingParams | None = None,
        options: RequestOptions = NO_OPTIONS,
        *,
        grammar: Grammar | None = None,
        request_id: str | None = None,
        on_output: OnOutput | None = None,
        detokenize: bool = True,
        **changes: Any,  # fields of RequestOptions, which checks them
    ) -> RequestHandle:
        """Queue a request. Thread-safe; returns at once.

        The fields of `options` may be given by name: `submit(prompt, deadline_s=2)`. on_output: called on the engine's
        thread for every increment; the handle then collects none. Without on_output, the request is cancelled once
        nobody has its handle any more. detokenize=False: outputs have tokens and no text.

        Raises:
            InvalidRequest, ContextOverflow, Overloaded, EngineStopped.
        """
        if on_output is not None and not callable(on_output):
            raise wrong_option("on_output", on_output, "a function of one output, or None")
        submitted_s = time.monotonic()
        request = self._border.make(
            prompt,
            sampling or SamplingParams(),
            options.changed(changes),
            grammar=grammar,
            request_id=request_id,
        )
        handle = RequestHandle(request.request_id, self.abort, collects=on_output is None)
        params = request.sampling
        again = b"" if grammar is None else grammar.before
        detokenizer = Detokenizer(self.tokenizer.token_bytes, len(again)) if detokenize or params.has_stops else None
        stream = _Stream(
            request,
            on_output or self._push_to(handle),
            detokenizer,
            StopScanner(params.stop, params.stop_regex) if params.has_stops else None,
            submitted_s,
            num_again=1 if again else 0,
        )
        if threading.current_thread() is self._thread:
            self._add(stream)
        else:
            self._send(lambda: self._add(stream))
        return handle

    def generate(
        self, prompt: str | list[int], sampling: SamplingParams | None = None, **options: Any
    ) -> RequestResult:
        """Submit one request and wait for its result. `options` are those of `submit`.

        If the wait is interrupted (Ctrl-C), the request is cancelled.
        """
        handle = self.submit(prompt, sampling, **options)
        try:
            return handle.result()
        except BaseException:
            handle.cancel()
            raise

    def score(self, text: str | list[int], **options: Any) -> tuple[float, ...]:
        """Return the natural log-probability of each token of a text given those before it, from the second one on.

        For perplexity and evaluation; it is computed beside whatever else runs. `options` are those of `submit`.
        """
        ids = self.tokenizer.encode(text) if isinstance(text, str) else text
        if len(ids) < 2:
            return ()
        return self.generate(ids, score_from=1, **options).prompt_logprobs or ()

    def embed(self, text: str | list[int], pooling: Pooling | Literal["model"] = "model", **options: Any) -> Vector:
        """Return the vector of a text, fp32 [hidden], of length 1.

        pooling: which hidden states after the final norm make it: the last, their mean, the first (cls); "model": as
        the model's files say, else the last. `options` are those of `submit`. It is computed beside whatever else runs.
        """
        ids = self.tokenizer.encode(text, add_special=True, parse_special=True) if isinstance(text, str) else text
        vector = self.generate(ids, pooling=pooling, **options).vector
        assert vector is not None
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), dtype=np.float32)

    def _push_to(self, handle: RequestHandle) -> OnOutput:
        """Return a function that pushes outputs to a handle without keeping it alive.

        The request is aborted when the handle is collected. Once the request has ended, the function and with it the
        weak reference are gone, so nothing is done then.
        """
        request_id = handle.request_id
        reference = weakref.ref(handle, lambda _: self.abort(request_id))

        def push(output: RequestOutput) -> None:
            found = reference()
            if found is not None:
                found.push(output)

        return push

    def abort(self, request_id: str) -> None:
        """Abort the request with this exact id. Thread-safe. Its pages are free within one step."""
        self._send(lambda: self._abort(request_id), quietly=True)

    def before_next_step(self, work: Callable[[], object]) -> None:
        """Call `work` on the engine's thread, after the outputs of this step are delivered. Thread-safe."""
        self._send(work, quietly=True)

    def mark_dead(self, tokens: list[int], cache_salt: str = "", num_live: int = 0) -> None:
        """Mark `tokens[num_live:]` as dead: the cache evicts the pages that only this path uses first.

        Thread-safe; returns at once. This is a hint: a later request with these tokens uses the pages not yet evicted.
        """
        ids = np.asarray(tokens, dtype=np.int32)

        def mark() -> None:
            self._core.scheduler.cache.mark_dead(ids, cache_salt, num_live)

        self._send(mark, quietly=True)

    def set_next_use(self, tokens: list[int], next_use: float, cache_salt: str = "") -> None:
        """Set the time of the next use of `tokens`, in a unit of the caller's choice; infinity means unknown.

        Thread-safe; returns at once. This is a hint: prefixes without a next use are evicted first, then the farthest.
        """
        ids = np.asarray(tokens, dtype=np.int32)

        def note() -> None:
            self._core.scheduler.cache.set_next_use(ids, next_use, cache_salt)

        self._send(note, quietly=True)

    def differences(self, tokens: list[int], cache_salt: str = "") -> list[Difference]:
        """Cached paths that differ from `tokens`, the longest common prefix first. For diagnosis (why_miss)."""
        found: list[Difference] = self._ask(lambda: differences(self._core.scheduler.cache, tokens, cache_salt))
        return found

    def flush_cache(self) -> int:
        """Drop every cached prefix that is not in use. Returns the number of pages freed."""
        return int(self._ask(self._core.scheduler.cache.flush))

    def watch_cache(self, listener: Callable[[CacheChanges], None]) -> None:
        """Tell `listener` from now on which cached prefixes come and go, on the engine's thread, before outputs.

        The cache must not be in use: it is emptied first.
        """

        def watch() -> None:
            self._core.scheduler.cache.flush()
            log = self._core.scheduler.cache.start_log()
            self._tell_cache = lambda: listener(changes) if (changes := log.take()) is not None else None

        self._ask(watch)

    def whole_cache(self) -> CacheChanges:
        """Return all that a listener of `watch_cache` should know, for one that has missed something."""
        log = self._core.scheduler.cache.log
        assert log is not None, "nobody watches the cache"
        whole: CacheChanges = self._ask(log.whole)
        return whole

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        adapters = self._core.runner.adapters
        return [] if adapters is None else adapters.names

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load an adapter (LoRA) from a PEFT folder, so that requests can choose it by `adapter=name`. Thread-safe.

        Raises:
            ConfigError: the engine has no room for adapters, or the adapter needs what Ramet cannot do.
            InvalidRequest: the name is in use, or as many adapters as --max-loras are.
            BrokenModelFile: the files are damaged, or belong to another model.
        """
        self._load_adapter(name, path, self._ask)

    def unload_adapter(self, name: str) -> None:
        """Let no new request choose this adapter; requests that run keep it. Thread-safe. Raises InvalidRequest."""
        self._ask(partial(self._room_for_adapters().remove, name))

    def _load_adapter(
        self, name: str, path: str | os.PathLike[str], on_thread: Callable[[Callable[[], Any]], Any]
    ) -> None:  # Any: whatever the function returns
        adapters = self._room_for_adapters()
        on_thread(partial(adapters.check_name, name))
        matrices = adapters.read(Path(path))
        on_thread(partial(adapters.add, name, matrices))
        logger.info("loaded the adapter %s from %s", name, path)

    def _room_for_adapters(self) -> Adapters:
        adapters = self._core.runner.adapters
        if adapters is None:
            raise ConfigError("this engine has no room for adapters; start it with --lora or --max-loras")
        return adapters

    def export_pages(self, tokens: TokenIds, cache_salt: str, first: int, most: int) -> Tensor:
        """Copy up to `most` pages of a cached prefix, from page `first` on. Thread-safe.

        Returns uint8 `[n * page_bytes]` on the CPU. n is 0 where these pages are not cached, or not computed yet. The
        engine's thread only keeps them meanwhile; this thread copies.
        """
        held: PrefixMatch | None = self._ask(lambda: self._core.hold_pages(tokens, cache_salt, first + most))
        page_ids = [] if held is None else held.page_ids[first:]
        try:
            return self._core.runner.kv_cache.read(page_ids).cpu()
        finally:
            if held is not None:
                self._send(lambda: self._core.let_go(held), quietly=True)

    def import_pages(self, tokens: TokenIds, cache_salt: str, first: int, pages: Tensor) -> int:
        """Take in pages of a prefix that another engine of the same model has exported, from page `first` on.

        They are used like those that this engine has computed. Thread-safe. They are copied in parts between steps.
        Returns how many pages of the prefix are cached now: fewer than those given if the ones before them are missing,
        or if there is no room.
        Raises: InvalidRequest, if their size is wrong, and nothing was taken in.
        """
        page_bytes, given = self.page_bytes, pages.to(self.model.decoder.device)
        num_given, rest = divmod(pages.numel(), page_bytes)
        if rest or (first + num_given) * self.page_size > len(tokens):
            raise InvalidRequest(
                f"{pages.numel():,} bytes were given for the pages from {first} on of {len(tokens):,} tokens, but "
                f"a page has {page_bytes:,} bytes for {self.page_size} tokens; nothing was taken in"
            )
        size = max(_PART_BYTES // page_bytes, 1)
        cached = 0
        for start in range(0, max(num_given, 1), size):
            part = given[start * page_bytes : (start + size) * page_bytes]
            write = partial(self._core.write_pages, tokens, cache_salt, first + start, part)
            cached = int(self._ask(write, self._moves))
            if cached < first + min(start + size, num_given):
                break
        return cached

    def latest_prefixes(self, most_tokens: int) -> list[tuple[str, TokenIds]]:
        """Return about `most_tokens` tokens of cached prefixes with their cache salts, the last used first."""
        found: list[tuple[str, TokenIds]] = self._ask(lambda: latest_paths(self._core.scheduler.cache, most_tokens))
        return found

    @property
    def page_bytes(self) -> int:
        """Bytes of a KV page."""
        return self._core.runner.kv_cache.page_bytes

    def stats(self) -> dict[str, float]:
        """Counters and gauges: running, waiting, tokens cached and computed, pages free and cached, preemptions."""
        answer: dict[str, float] = self._ask(self._core.stats)
        return answer

    def take_activity(self) -> dict[str, Any]:  # Any: JSON
        """The last steps and evictions that were not taken yet, and the running sequences. For drawings.

        `now_s`: the clock of the steps. `readers`: of each running sequence its program's or its own id, its tokens
        that are computed and known, and the id of the page up to which it reads the tree, or None.
        """

        def take() -> dict[str, Any]:
            scheduler = self._core.scheduler
            evictions = [(start, num, tokens.tolist()) for start, num, tokens in scheduler.cache.evictions]
            scheduler.cache.evictions.clear()
            readers = [
                (
                    s.request.program_id or s.request.request_id,
                    s.num_computed,
                    s.num_tokens,
                    s.page_ids[s.num_shared_pages - 1] if s.num_shared_pages else None,
                )
                for s in scheduler.running()
            ]
            steps = self._core.watch.take_steps()
            return {"now_s": time.monotonic(), "steps": steps, "evictions": evictions, "readers": readers}

        activity: dict[str, Any] = self._ask(take)
        return activity

    def segments(self, most: int = 20_000) -> list[TreeNode]:
        """The tree of cached prefixes, at most so many of its nodes; the largest with tokens. Steps run meanwhile."""
        walk, found = segments(self._core.scheduler.cache), list[TreeNode]()
        while len(found) < most and (some := self._ask(lambda: list(islice(walk, _WALKED_NODES)))):
            found += some
        for small in sorted(found, key=lambda one: -one.num_tokens)[_TOLD_SEGMENTS:]:
            small.tokens = []
        return found[:most]

    def check_integrity(self) -> None:
        """Compare the page accounting with the tree. Raises CacheIntegrityError, which means a bug in Ramet."""
        self._ask(self._core.scheduler.check_integrity)

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Stop the engine's thread. Requests in flight end with EngineStopped. Calling it again does nothing."""
        if os.getpid() != self._pid:
            return
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        atexit.unregister(self.shutdown)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def wait_stopped(self, timeout_s: float) -> bool:
        """Wait for the end of the engine's thread, up to `timeout_s` seconds. Returns True if it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _send(
        self, command: Callable[[], object], queue: deque[Callable[[], object]] | None = None, *, quietly: bool = False
    ) -> None:
        if os.getpid() != self._pid:  # nobody would carry the command out, and the lock may be held for ever
            if quietly:
                return
            raise EngineStopped(
                f"this process was forked from process {self._pid}, whose engine this is; make one here"
            )
        with self._wake:
            if self._is_stopping or self._failure is not None:
                if quietly:
                    return
                raise EngineStopped(
                    f"the engine is stopped{f': {self._failure}' if self._failure else ''}; make a new one"
                )
            (self._commands if queue is None else queue).append(command)
            self._wake.notify_all()

    def _ask(
        self, question: Callable[[], Any], queue: deque[Callable[[], object]] | None = None
    ) -> Any:  # Any: whatever the question returns
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

        self._send(run, queue)
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
        except Exception as error:  # any error of the loop is reported to all waiting callers and to the log
            logger.exception("the engine's loop failed")
            with self._wake:
                self._failure = error
        finally:
            self._fail_all()
            self._core.grammars.close()
            if self._peers is not None:
                self._peers.close()

    def _stop_after(self, error: Exception) -> None:
        """End the loop, because a rank has ended. From any thread."""
        with self._wake:
            self._failure = self._failure or error
            self._is_stopping = True
            self._wake.notify_all()

    def _run_once(self) -> bool:
        """Run pending commands and one step, and deliver its outputs. Waits if there is no work. False: stop."""
        with self._wake:
            if not self._wake.wait_for(self._has_something, _IDLE_S):
                self._rest()  # another engine of this process may have all cores
                self._wake.wait_for(self._has_something)
            if self._is_stopping:
                return False
        watch = self._core.watch
        watch.begin()
        while self._commands:
            self._commands.popleft()()
        self._copy_pages()
        watch.lap("commands")
        if not self._core.has_work:
            self._tell_cache()  # of pages that came from elsewhere
        else:
            updates = self._core.step()
            self._tell_cache()
            for sequence, output in updates:
                self._deliver(sequence, output)
            self._tell_cache()  # a sequence may end in its text, and an abort may free pages
            watch.lap("deliver")
            watch.end(f"{self._core.scheduler.num_running} rows, {len(updates)} outputs")
            if not updates and not self._core.is_stepping:
                with self._wake:  # waiting requests cannot run yet: try again at the next command, or soon
                    if not self._commands and not self._moves:
                        self._wake.wait(0.002)
        return True

    def _has_something(self) -> bool:
        return bool(self._commands or self._moves or self._core.has_work or self._is_stopping)

    def _copy_pages(self) -> None:
        """Take in pages of other engines: one part, or more while that takes no time worth noticing."""
        end_s = time.monotonic() + _MOVE_S
        while self._moves:
            self._moves.popleft()()
            if time.monotonic() > end_s:
                break

    def _add(self, stream: _Stream) -> None:
        request = stream.request
        try:
            if request.request_id in self._by_id:
                raise InvalidRequest(f"request id {request.request_id!r} is in use; choose another", param="request_id")
            sequence = self._core.add(request)
        except Exception as error:
            is_refused = isinstance(error, RametError)
            told = error if is_refused else EngineStopped(f"the engine could not take in the request: {error!r}")
            usage = Usage(request.num_prompt, 0, 0)
            self._emit(stream, RequestOutput(request.request_id, "", (), usage, FinishReason.ERROR, error=told))
            if not is_refused:
                raise  # a bug: the loop ends and fails all other requests
            return
        self._streams[sequence] = stream
        self._by_id[request.request_id] = sequence

    def _abort(self, request_id: str) -> None:
        sequence = self._by_id.get(request_id)
        if sequence is not None and self._core.abort(request_id):
            self._end(
                sequence, self._streams[sequence], "", (), None, RequestCancelled(f"request {request_id} was cancelled")
            )

    def _deliver(self, sequence: Sequence, output: RowOutput) -> None:
        """Decode one sequence's new tokens to text and pass it to the caller."""
        stream = self._streams.get(sequence)
        if stream is None:
            return
        if stream.num_cached is None:
            stream.num_cached = sequence.num_cached
        if stream.first_token_s is None and (output.token_ids or sequence.is_finished):
            stream.first_token_s = time.monotonic()
        tokens: tuple[int, ...] = output.token_ids
        stop_match: str | int | None = None
        if output.pooled is not None:
            stream.pooled = output.pooled if stream.pooled is None else stream.pooled + output.pooled
        if sequence.is_finished:
            tokens, stop_match = self._without_stop_token(sequence, tokens)
        if stream.scanner is None:
            text = "" if stream.detokenizer is None else stream.detokenizer.push(tokens, output.num_held)
        else:
            text, matched, num_tokens = self._scan(stream, tokens, output.num_held, is_finished=sequence.is_finished)
            if matched is not None:
                if num_tokens < len(output.token_ids):
                    tokens, output = tokens[:num_tokens], replace(output, incomplete=None, was_closed=False)
                num_before = len(sequence.output_ids) - len(output.token_ids)
                self._core.finish(sequence, FinishReason.STOP, num_before + num_tokens if tokens else None)
                stop_match = matched
        if sequence.is_finished:
            error: Exception | None = None
            if sequence.finish_reason is FinishReason.ABORT:
                error = RequestCancelled(f"request {stream.request.request_id} passed its deadline")
            elif sequence.finish_reason is FinishReason.ERROR:
                cause = sequence.error
                error = (
                    cause if isinstance(cause, RametError) else EngineStopped(f"the request's step failed: {cause!r}")
                )
                error.__cause__ = None if error is cause else cause
            if stream.detokenizer is not None and not isinstance(stop_match, str):
                rest = stream.detokenizer.flush(output.num_after)
                text += rest if stream.scanner is None else stream.scanner.flush(rest)
            self._end(sequence, stream, text, tokens, stop_match, error, output)
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
                prompt_tops=output.prompt_tops,
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
        row: RowOutput | None = None,
    ) -> None:
        del self._streams[sequence]
        del self._by_id[stream.request.request_id]
        now_s = time.monotonic()
        first_s = stream.first_token_s if stream.first_token_s is not None else now_s
        started_s = sequence.first_scheduled_s if sequence.first_scheduled_s is not None else now_s
        row = row or RowOutput()
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
                logprobs=None if row.logprobs is None else row.logprobs[:num],
                top_logprobs=None if row.top_logprobs is None else row.top_logprobs[:num],
                prompt_logprobs=row.prompt_logprobs,
                prompt_tops=row.prompt_tops,
                vector=self._vector(stream) if error is None else None,
                error=error,
                timings={
                    "queue_s": max(started_s - stream.submitted_s, 0.0),
                    "first_token_s": first_s - stream.submitted_s,
                    "total_s": now_s - stream.submitted_s,
                },
                incomplete=row.incomplete,
                was_closed=row.was_closed,
            ),
        )

    @staticmethod
    def _vector(stream: _Stream) -> NDArray[np.float32] | None:
        """The vector of a pooling request."""
        if stream.pooled is None or stream.request.pooling != "mean":
            return stream.pooled
        return stream.pooled / np.float32(stream.request.num_prompt)

    def _scan(
        self, stream: _Stream, tokens: tuple[int, ...], num_held: int, *, is_finished: bool
    ) -> tuple[str, str | None, int]:
        """Decode new tokens up to the one whose text completes a stop.

        Each is read as if it had come by itself. Returns the text, the stop, and the number of tokens up to it.
        """
        detokenizer, scanner, text = stream.detokenizer, stream.scanner, ""
        assert detokenizer is not None
        assert scanner is not None
        for count, part in enumerate([(token,) for token in tokens] or [()], 1):
            is_last = count >= len(tokens)
            new = detokenizer.push(part, num_held if is_last else 0)
            held = "" if is_last and is_finished else detokenizer.held
            if held and scanner.ends_with(new, held):
                new += detokenizer.flush()  # the text ends here, whether what is held belongs to it or not
            released, matched = scanner.push(new)
            text += released
            if matched is not None:
                return text, matched, min(count, len(tokens))
        return text, None, len(tokens)

    def _without_stop_token(
        self, sequence: Sequence, tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], str | int | None]:
        if sequence.finish_reason is FinishReason.STOP and tokens and tokens[-1] in sequence.request.stop_ids:
            return tokens[:-1], tokens[-1]
        return tokens, None

    def _emit(self, stream: _Stream, output: RequestOutput) -> bool:
        """Pass an increment to its caller. Returns False if the callback raised: then only its own request ends."""
        try:
            stream.on_output(output)
        except Exception:  # a caller's code may raise anything; it must not end the loop that serves all
            logger.exception("on_output of request %s raised; the request is aborted", output.request_id)
            return False
        return True

    def _usage(self, sequence: Sequence, stream: _Stream) -> Usage:
        cached = stream.num_cached if stream.num_cached is not None else 0
        again = min(stream.num_again, len(sequence.output_ids))
        counts = stream.request.num_prompt + stream.num_again, cached, len(sequence.output_ids) - again
        return Usage(*counts, sequence.num_drafted, sequence.num_accepted)

    def _fail_all(self) -> None:
        """End all remaining requests: the engine has stopped."""
        cause = f": {self._failure}" if self._failure is not None else ""
        error = EngineStopped(f"the engine stopped while the request was in flight{cause}")
        error.__cause__ = self._failure
        with self._wake:
            self._is_stopping = True
            commands = [*self._commands, *self._moves]
            self._commands.clear()
            self._moves.clear()
        for command in commands:  # late requests are refused like the others; questions are answered
            try:
                command()
            except Exception:  # perhaps the command that broke the loop; the others must still be told
                logger.exception("a command failed while the engine stopped")
        for sequence, stream in list(self._streams.items()):
            usage = self._usage(sequence, stream)
            self._emit(stream, RequestOutput(stream.request.request_id, "", (), usage, FinishReason.ERROR, error=error))
        self._streams.clear()
        self._by_id.clear()

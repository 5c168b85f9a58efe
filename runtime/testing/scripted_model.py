"""An engine without a model, for tests of programs. It has the real engine's interface; a script or a hash answers.

An answer depends only on the prompt, the sampling values and the script. Cached prefixes are counted as in the real
engine (a trie of all tokens seen, in order of arrival). Grammars, stop strings and deadlines work. Without a script the
log-probabilities are a true distribution, a function of the context.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_jsonable_python

from ramet.errors import ConfigError, ContextOverflow, EngineStopped, InvalidRequest
from ramet.lang.graph.json_form import AS_CONFIGURED
from ramet.runtime.cache.probe import Difference, trie_differences
from ramet.runtime.handle import RequestHandle
from ramet.runtime.testing.byte_tokenizer import small_subword_tokenizer
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.text.stops import StopScanner
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import (
    NO_OPTIONS,
    FinishReason,
    Grammar,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    TopTokens,
    Usage,
)

# An answer is a text, or a value that stands for its JSON text.
Script = Mapping[str, object] | Sequence[object] | Callable[[str], object] | None

_TEXT = (
    "the river light stone garden evening small boat across water quiet bread market old tower green hill walk "
    "morning music door street window rain bright glass paper summer bridge north harbour slow train open field"
)
WORDS = tuple(_TEXT.split())
MAX_FREE_TOKENS = 24  # length at which an unscripted constrained text is brought to its end


@dataclass(frozen=True, slots=True)
class ScriptedStats:
    """Counters since the start."""

    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(slots=True, eq=False)
class _Job:
    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    options: RequestOptions
    grammar: Grammar | None
    deadline_s: float | None  # of time.monotonic()
    on_output: Callable[[RequestOutput], None]
    is_cancelled: bool = False
    num_cached: int = 0
    outputs: Iterator[RequestOutput] | None = None
    arrival_s: float = field(default_factory=time.monotonic)


class ScriptedEngine:
    """The scripted engine.

    `script` is one of three: a mapping from a text in the prompt to the answer (the text that occurs last counts; each
    answer of a list is used once, and the last one repeats), a list of answers in the order of requests, or a function
    of the prompt. The texts of a mapping are looked for in what was written, not in the chat template's marks. An
    answer is a text, or any other value, which is written as JSON. Without a scripted answer, a hash of the prompt
    draws words. `strict`: a prompt without an answer, an answer too few, an answer that its constraint refuses or
    `max_tokens` cuts, and one that is none of a select's choices are errors of their requests. `failures`: maps a text
    in the prompt to the error of its request. `latency_s`: time of one step, in which every running request writes one
    word. `tokenizer`: None for the small one that comes with the package. Raises ConfigError for a script that cannot
    be one.
    """

    def __init__(
        self,
        script: Script = None,
        *,
        strict: bool = False,
        failures: Mapping[str, Exception] | None = None,
        latency_s: float = 0.0,
        context_length: int = 1 << 20,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        _check_script(script)
        if not isinstance(tokenizer, Tokenizer | None):
            raise ConfigError(f"the tokenizer is {tokenizer!r}, but must be a model's name, or an engine's tokenizer")
        self.tokenizer: Tokenizer = small_subword_tokenizer() if tokenizer is None else tokenizer
        single = [(token, piece) for token, piece in enumerate(self.tokenizer.token_bytes) if len(piece) == 1]
        self._of_byte = {piece[0]: token for token, piece in single}
        self.page_size, self.json_form, self.device_grammars = 1, AS_CONFIGURED, None
        self._script, self._is_strict = script, strict
        self._failures = dict(failures or {})
        self._latency_s = latency_s
        self.context_length = context_length
        self._stats = ScriptedStats()
        self._trie: dict[tuple[int, int], int] = {}
        self._roots: dict[str, int] = {}
        self._uses: dict[object, int] = {}
        self._ids = itertools.count()
        self._jobs: dict[str, _Job] = {}  # that have not ended
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._commands: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions = NO_OPTIONS,
        *,
        grammar: Grammar | None = None,
        request_id: str | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
        **changes: Any,  # fields of RequestOptions, which checks them
    ) -> RequestHandle:
        """Queue a request, as `Engine.submit`. Raises InvalidRequest, ContextOverflow, EngineStopped."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
        if len(tokens) >= self.context_length:
            raise ContextOverflow(f"the prompt has {len(tokens)} tokens but the context is {self.context_length}")
        handle = RequestHandle(request_id or f"scripted-{next(self._ids)}", self.abort)
        params, options = sampling or SamplingParams(), options.changed(changes)
        with self._changed:
            if self._is_stopped:
                raise EngineStopped("the scripted engine was shut down")
            end_s = None if options.deadline_s is None else time.monotonic() + options.deadline_s
            job = _Job(handle.request_id, tokens, params, options, grammar, end_s, on_output or handle.push)
            self._jobs[job.request_id] = job
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="ramet-scripted", daemon=True)
                self._thread.start()
            self._changed.notify()
        return handle

    def abort(self, request_id: str) -> None:
        """End the request with this id."""
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].is_cancelled = True
                self._changed.notify()

    def stats(self) -> ScriptedStats:
        with self._changed:
            return self._stats

    @property
    def num_waiting(self) -> int:
        """Number of requests that have not ended."""
        with self._changed:
            return len(self._jobs)

    def before_next_step(self, work: Callable[[], object]) -> None:
        """Call `work` on the engine's thread, before its next step."""
        with self._changed:
            self._commands.append(work)

    def set_next_use(self, tokens: Sequence[int], next_use: float, cache_salt: str = "") -> None:
        """Do nothing: this cache forgets nothing."""

    def mark_dead(self, tokens: Sequence[int], cache_salt: str = "", num_live: int = 0) -> None:
        """As `set_next_use`."""

    def differences(self, tokens: Sequence[int], cache_salt: str = "") -> list[Difference]:
        """Cached paths that differ from `tokens`, the longest common prefix first."""
        return trie_differences(self._trie, self._roots.get(cache_salt), tokens)

    def shutdown(self) -> None:
        """Stop the engine. Running requests end with EngineStopped."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def logprobs(self, context: Sequence[int]) -> NDArray[np.float64]:
        """log P(next token | context) [V] of the model without a script."""
        seed = int.from_bytes(_digest(context, 0)[:8], "little")
        logits = np.random.default_rng(seed).standard_normal(self.tokenizer.vocab_size) * 2
        return np.asarray(logits - np.logaddexp.reduce(logits))

    # The step loop, on its own thread.

    def _loop(self) -> None:
        while True:
            while self._commands:
                self._commands.popleft()()
            with self._changed:
                while not (self._waiting or self._running or self._is_stopped):
                    self._changed.wait()
                if self._is_stopped:
                    jobs = [*self._running, *self._waiting]
                    self._running, self._waiting = [], deque()
                else:
                    jobs = []
                    self._running.extend(self._waiting)
                    self._waiting.clear()
            if self._is_stopped:
                for job in jobs:
                    self._end(job, FinishReason.ERROR, EngineStopped("the scripted engine was shut down"))
                return
            self._step()

    def _step(self) -> None:
        for job in self._running:
            if job.outputs is None:
                self._admit(job)
        if self._latency_s:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped, self._latency_s)
        running, self._running = self._running, []
        for job in running:
            assert job.outputs is not None
            if job.is_cancelled or (job.deadline_s is not None and time.monotonic() >= job.deadline_s):
                self._end(job, FinishReason.ABORT, None)
                continue
            try:
                output = next(job.outputs)
            except Exception as error:  # a script may be a function: if it raises, only its request fails
                self._end(job, FinishReason.ERROR, error)
                continue
            if output.finish_reason is None:
                self._running.append(job)
            else:
                self._count(job, output)
            job.on_output(output)

    def _admit(self, job: _Job) -> None:
        limit = len(job.prompt) - 1 if job.options.score_from is None else job.options.score_from - 1
        job.num_cached = self._match(job.options.cache_salt, job.prompt, max(limit, 0))
        # Nothing is predicted from the last token of a text that is scored.
        self._insert(job.options.cache_salt, job.prompt if job.options.score_from is None else job.prompt[:-1])
        job.outputs = self._produce(job)
        with self._changed:
            self._stats = replace(
                self._stats,
                num_requests=self._stats.num_requests + 1,
                prompt_tokens=self._stats.prompt_tokens + len(job.prompt) + bool(_before(job)),
                cached_tokens=self._stats.cached_tokens + job.num_cached,
            )

    def _end(self, job: _Job, reason: FinishReason, error: Exception | None) -> None:
        usage = Usage(len(job.prompt), job.num_cached, 0)
        output = RequestOutput(job.request_id, "", (), usage, reason, error=error)
        self._count(job, output)
        job.on_output(output)

    def _count(self, job: _Job, output: RequestOutput) -> None:
        with self._changed:
            self._jobs.pop(job.request_id, None)
            self._stats = replace(
                self._stats,
                num_finished=self._stats.num_finished + 1,
                num_cancelled=self._stats.num_cancelled + (output.finish_reason is FinishReason.ABORT),
                completion_tokens=self._stats.completion_tokens + output.usage.completion_tokens,
            )

    # What a request says.

    def _produce(self, job: _Job) -> Iterator[RequestOutput]:
        before = _before(job).decode()  # the first token writes it again, and counts as one of the prompt
        prompt_text = self.tokenizer.decode(job.prompt) + before
        usage = Usage(len(job.prompt) + bool(before), job.num_cached, 0)
        name = job.request_id
        for needle, error in self._failures.items():
            if needle in prompt_text:
                yield RequestOutput(name, "", (), usage, FinishReason.ERROR, error=error)
                return
        if job.options.score_from is not None:
            scored = self._score(job.prompt, job.options.score_from)
            tops = self._tops(job, job.prompt, scored.tolist())
            yield RequestOutput(name, "", (), usage, FinishReason.LENGTH, prompt_logprobs=scored, prompt_tops=tops)
            return
        tokens, text, reason, match = self._write(job, prompt_text)
        self._insert(job.options.cache_salt, [*job.prompt, *(tokens if isinstance(match, int) else tokens[:-1])])
        first_s = time.monotonic() - job.arrival_s
        sent = sent_text = 0
        for end in _word_ends(self.tokenizer.token_bytes, tokens):
            is_last = end == len(tokens)
            chunk = self.tokenizer.decode(tokens[:end])[len(before) :][: len(text)] if not is_last else text
            logprobs = self._chosen(job, tokens, sent, end) if job.sampling.logprobs is not None else None
            tops = self._tops(job, [*job.prompt, *tokens[:end]], logprobs or ())
            yield RequestOutput(
                name,
                chunk[sent_text:],
                tuple(tokens[sent:end]),
                msgspec.structs.replace(usage, completion_tokens=max(end - bool(before), 0)),
                reason if is_last else None,
                stop_match=match if is_last else None,
                logprobs=logprobs,
                top_logprobs=tops,
                timings={"queue_s": 0.0, "first_token_s": first_s, "total_s": time.monotonic() - job.arrival_s},
            )
            sent, sent_text = end, len(chunk)

    def _write(self, job: _Job, prompt_text: str) -> tuple[list[int], str, FinishReason, str | int | None]:
        """Tokens, text, finish reason, and the stop string or token that ended the text."""
        sampling = job.sampling
        limit = sampling.max_tokens or 1 << 16
        limit = max(1, min(limit, self.context_length - len(job.prompt)))
        answer = self._answer(prompt_text)
        wanted = None if answer is None else self.tokenizer.encode(answer, continues=True)
        if _before(job):
            words = wanted if wanted is not None or not self._is_free(job) else self._words(job)
            wanted = None if words is None else self._again(_before(job), words)
        if job.grammar is not None:
            source = self._constrained(job.grammar, wanted, limit, _digest(job.prompt, self._seed(job)))
        else:
            source = iter(wanted or self._words(job))
        stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else set(self.tokenizer.eos_ids))
        eos = min(self.tokenizer.eos_ids)
        tokens: list[int] = []
        for token in itertools.chain(source, itertools.repeat(eos)):
            if token in stops and len(tokens) < sampling.min_tokens:
                token = self.tokenizer.encode(".", continues=True)[-1]
            tokens.append(token)
            if token in stops:
                return tokens[:-1], self._text(job, tokens[:-1]), FinishReason.STOP, token
            if sampling.has_stops and len(tokens) >= sampling.min_tokens:
                text, matched = StopScanner(sampling.stop, sampling.stop_regex).push(self._text(job, tokens))
                if matched is not None:
                    return tokens, text, FinishReason.STOP, matched
            if len(tokens) == limit:
                break
        if self._is_strict and wanted is not None and wanted[:limit] == tokens != wanted:
            text, num_again = self._text(job, tokens)[-40:], bool(_before(job))
            raise InvalidRequest(
                f"the scripted answer has {len(wanted) - num_again} tokens, but {limit - num_again} may be written: it "
                f"is cut after {text!r}; give a shorter answer, or a larger max_tokens or budget"
            )
        state = self._state(job, tokens)
        is_complete = job.grammar is not None and state is not None and job.grammar.is_complete(state)
        return tokens, self._text(job, tokens), FinishReason.STOP if is_complete else FinishReason.LENGTH, None

    def _is_free(self, job: _Job) -> bool:
        """Return whether any text may follow the prompt's last token, which the model writes again."""
        state = self._state(job, [self.tokenizer.token_bytes.index(_before(job))])
        return job.grammar is not None and state is not None and job.grammar.is_free(state)

    def _again(self, before: bytes, words: Sequence[int]) -> list[int]:
        """Return the tokens of `before` and the words. The first one begins with `before`."""
        whole = self.tokenizer.encode(before.decode() + self.tokenizer.decode(words))
        token_bytes = self.tokenizer.token_bytes
        return whole if token_bytes[whole[0]].startswith(before) else [token_bytes.index(before), *words]

    def _text(self, job: _Job, tokens: list[int]) -> str:
        state = self._state(job, tokens)
        num_after = 0 if job.grammar is None or state is None else job.grammar.num_after(state, is_last=True)
        decoder = Detokenizer(self.tokenizer.token_bytes, len(_before(job)))
        return decoder.push(tokens, num_after) + decoder.flush(num_after)

    def _state(self, job: _Job, tokens: list[int]) -> int | None:
        """Return the state of a constrained text; None if it is not constrained, or past its end."""
        state: int | None = None if job.grammar is None else 0
        for token in tokens:
            state = None if job.grammar is None or state is None else job.grammar.advance(state, token)
        return state

    def _answer(self, prompt_text: str) -> str | None:
        """Use the next scripted answer. Raises InvalidRequest in strict mode if there is none."""
        found = self._answers(prompt_text)
        if found is None:
            if self._is_strict and self._script is not None:
                end = self._marks.sub("\n", prompt_text)[-80:]
                raise InvalidRequest(f"the script has no answer to the prompt, which ends with {end!r}")
            return None
        key, answers = found
        use = self._uses[key] = self._uses.get(key, 0) + 1
        if self._is_strict and 1 < len(answers) < use:
            where = f" for {key!r}" if key else ""
            raise InvalidRequest(f"the script has {len(answers)} answers{where}, and this is request {use}")
        return _written(answers[min(use, len(answers)) - 1])

    def _answers(self, prompt_text: str) -> tuple[str, Sequence[object]] | None:
        """The script's answers to a prompt, in the order of their requests, with the text by which they were found."""
        script = self._script
        if callable(script):
            answer = script(prompt_text)
            return None if answer is None else ("", (answer,))
        if not isinstance(script, Mapping):
            return ("", script) if script else None
        written = self._marks.sub("\n", prompt_text)
        at, _, key = max(((written.rfind(key), len(key), key) for key in script), default=(-1, 0, ""))
        answers = script.get(key)
        return None if at < 0 else (key, answers if isinstance(answers, list | tuple) else (answers,))

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """The texts that the chat template writes around messages, up to the mark that opens thinking."""
        found, thinking = set[str](), self.tokenizer.chat_template.thinking
        for roles in (), ("user",), ("user", "assistant"), ("system",):
            for role in ("system", "user", "assistant"):
                with suppress(InvalidRequest):  # a template without such a message
                    text = self.tokenizer.chat_template.role_text([{"role": r, "content": "x"} for r in roles], role)
                    before = text.before if thinking is None else text.before.partition(thinking.open)[0]
                    found |= {before, text.after}
        marks = sorted((text for text in found if text.strip()), key=len, reverse=True)
        return re.compile(f"(?:{'|'.join(map(re.escape, marks))})+" if marks else r"(?!)")

    def _seed(self, job: _Job) -> int:
        """0 for greedy sampling. Otherwise the request's seed + 1, or the number of requests with this prompt."""
        sampling = job.sampling
        if sampling.is_greedy:
            return 0
        if sampling.seed is not None:
            return sampling.seed + 1
        key = _digest(job.prompt, 0)
        self._uses[key] = self._uses.get(key, 0) + 1
        return self._uses[key]

    def _words(self, job: _Job) -> list[int]:
        digest = _digest(job.prompt, self._seed(job))
        words = [WORDS[byte % len(WORDS)] for byte in digest[1 : 4 + digest[0] % 6]]
        return self.tokenizer.encode(" ".join(words) + ".")

    def _constrained(self, grammar: Grammar, wanted: Sequence[int] | None, limit: int, digest: bytes) -> Iterator[int]:
        """Tokens that the grammar allows: the wanted ones while it allows them, then drawn ones; ends in time."""
        row = np.zeros((self.tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        token_bytes = self.tokenizer.token_bytes
        state: int | None = 0
        drawn = iter(int(byte) for byte in itertools.cycle(digest))
        plan, written = deque(wanted or ()), list[int]()
        while True:
            assert state is not None
            if grammar.is_complete(state):
                if plan and self._is_strict:
                    raise self._refused(grammar.before, wanted or (), written)
                return
            grammar.fill_mask(state, row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: self.tokenizer.vocab_size]
            rest = grammar.shortest_completion(state)
            num_left = limit - len(written)
            if plan and not bits[plan[0]] and len(token_bytes[plan[0]]) > 1:  # its beginning may be allowed
                plan.extendleft(self._of_byte[byte] for byte in reversed(token_bytes[plan.popleft()]))
            if plan and bits[plan[0]] and len(rest) < num_left:
                token = plan.popleft()
            elif self._is_strict and wanted is not None and (plan or not grammar.is_accepting(state)):
                raise self._refused(grammar.before, wanted, written)
            elif rest and (plan or wanted is not None or len(written) >= MAX_FREE_TOKENS or len(rest) >= num_left - 1):
                plan.clear()
                token = rest[0]
            else:
                ends = wanted is not None or len(written) >= MAX_FREE_TOKENS or next(drawn) % 2
                if grammar.is_accepting(state) and ends:
                    return
                plan.clear()
                allowed = [token for byte, token in self._of_byte.items() if 32 <= byte < 127 and bits[token]]
                allowed = allowed or [int(t) for t in np.flatnonzero(bits) if t not in self.tokenizer.eos_ids]
                if not allowed:
                    return
                token = allowed[next(drawn) * 7919 % len(allowed)]
            yield token
            written.append(token)
            state = grammar.advance(state, token)

    def _refused(self, before: bytes, wanted: Sequence[int], written: Sequence[int]) -> InvalidRequest:
        """`before`: what the first token begins with, and the prompt has already."""
        text, taken = (self.tokenizer.decode(tokens).removeprefix(before.decode()) for tokens in (wanted, written))
        why = "is no whole value" if taken == text else f"is refused after {taken!r}"
        return InvalidRequest(f"the scripted answer {text!r} {why}, by its type, constraint or max_tokens")

    def _score(self, prompt: Sequence[int], score_from: int) -> NDArray[np.float32]:
        """log P of prompt[score_from:]. With a script, only tokens that continue its answer are likely.

        In strict mode other tokens cannot be, if the answer was given to nothing else: then it is this selection's.
        """
        plain = [float(self.logprobs(prompt[:i])[prompt[i]]) for i in range(score_from, len(prompt))]
        before, tail = self.tokenizer.decode(prompt[:score_from]), self.tokenizer.decode(prompt[score_from:])
        found = None if isinstance(self._script, Sequence) else self._answers(before)
        if found is not None and tail.strip():
            key, answers = found
            num_used = self._uses.get(key, 0)
            wanted = _written(answers[min(num_used, len(answers) - 1)])
            begun = next((k for k in range(len(wanted), 0, -1) if before.endswith(wanted[:k])), 0)
            rest = wanted[begun:].strip()
            if rest and (rest.startswith(tail.strip()) or tail.strip().startswith(rest)):
                plain = [-0.05] * len(plain)
            elif self._is_strict and num_used < len(answers):
                plain = [-math.inf] * len(plain)
        return np.asarray(plain, dtype=np.float32)

    def _tops(self, job: _Job, tokens: Sequence[int], scores: Sequence[float]) -> tuple[TopTokens, ...] | None:
        """The likeliest tokens in the place of each scored one at the end of `tokens`; it may be among them."""
        count, found = job.sampling.logprobs or 0, list[TopTokens]()
        if not count:
            return None
        for place, score in enumerate(scores, len(tokens) - len(scores)):
            values = self.logprobs(tokens[:place])
            values[tokens[place]] = score
            found.append(tuple((int(token), float(values[token])) for token in np.argsort(-values)[:count]))
        return tuple(found)

    def _chosen(self, job: _Job, tokens: list[int], start: int, end: int) -> tuple[float, ...]:
        return tuple(float(self.logprobs([*job.prompt, *tokens[:i]])[tokens[i]]) for i in range(start, end))

    # The prefix trie: (node, token) -> node.

    def _match(self, salt: str, tokens: Sequence[int], limit: int) -> int:
        at: int | None = self._roots.get(salt)
        for depth, token in enumerate(tokens[:limit]):
            at = self._trie.get((at, token)) if at is not None else None
            if at is None:
                return depth
        return min(limit, len(tokens))

    def _insert(self, salt: str, tokens: Sequence[int]) -> None:
        at = self._roots.setdefault(salt, -1 - len(self._roots))
        for token in tokens:
            at = self._trie.setdefault((at, token), len(self._trie))


def _check_script(script: object) -> None:
    """Raise ConfigError unless this is a script, and all its answers can be written."""
    if script is None or callable(script):
        return
    if isinstance(script, str | bytes) or not isinstance(script, Mapping | Sequence):
        raise ConfigError(
            f"the script is {script!r}, but must be a dict from texts in the prompt to answers, a list of answers, or "
            "a function of the prompt"
        )
    for key, answers in script.items() if isinstance(script, Mapping) else [(None, script)]:
        if key is not None and not (isinstance(key, str) and key):
            raise ConfigError(f"the script has the key {key!r}, but a key is text that occurs in a prompt")
        where = "the script" if key is None else f"the script's answer to {key!r}"
        if key is not None and isinstance(answers, list | tuple) and not answers:
            raise ConfigError(f"{where} is an empty list; give at least one answer")
        for answer in answers if isinstance(answers, list | tuple) else [answers]:
            try:
                _written(answer).encode()
            except ValueError as error:  # of pydantic, for what JSON cannot write; of half a character
                raise ConfigError(
                    f"{where} has {answer!r}, which cannot be written as text or JSON: {error}"
                ) from error


def _written(answer: object) -> str:
    """Return a scripted answer as the model writes it."""
    return answer if isinstance(answer, str) else json.dumps(to_jsonable_python(answer), ensure_ascii=False)


def _before(job: _Job) -> bytes:
    """Return the prompt's last token if the model writes it again, else b""."""
    return b"" if job.grammar is None else job.grammar.before


def _digest(tokens: Sequence[int], seed: int) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), key=str(seed).encode()).digest()


def _word_ends(token_bytes: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
    """Positions where increments end: before each space and at the end, never inside a UTF-8 character."""
    ends = [i for i, token in enumerate(tokens) if i and token_bytes[token][:1] in (b" ", b"\n")]
    return [*ends, len(tokens)]

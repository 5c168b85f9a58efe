"""The choices of one answer: one or two engine requests for each choice, and the merge of their increments.

A choice with reasoning and a constraint, or a budget of reasoning, takes two requests: unconstrained text up to the end
of the reasoning, then the rest, which continues from the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ramet.errors import GrammarError, InvalidRequest
from ramet.grammar.tools.events import CallStart, ToolCallReader
from ramet.grammar.tools.formats import ToolFormat
from ramet.lang.graph.ir import Constraint
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.server.link.streams import ReportStream
from ramet.runtime.server.sampling_fields import seed_of_choice
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.text.stops import StopScanner
from ramet.runtime.types import NO_OPTIONS, RequestOptions, SamplingParams

MAX_SCORED_TOGETHER = 16  # prompts of one request: the others of a long list must not use up the requests in flight


@dataclass(frozen=True, slots=True)
class FreeReasoning:
    """Reasoning before an answer, which may be constrained. The prompt has opened it.

    `end`: the text that ends it. `end_id`: this text as one token, if there is one. `after_ids`: tokens appended to it.
    `budget`: the most tokens of it; past them it is ended by `end_ids`, the tokens of `end`.
    """

    end: str
    end_id: int | None
    after_ids: tuple[int, ...]
    budget: int | None = None
    end_ids: tuple[int, ...] = ()

    def is_ended_by(self, output: Output, max_tokens: int | None) -> bool:
        """Return whether the reasoning ended with this output, and the answer follows."""
        if output.stop_match in (self.end, self.end_id) and output.stop_match is not None:
            return True
        is_cut = output.finish_reason == "length" and output.completion_tokens == self.budget
        return is_cut and (max_tokens is None or max_tokens > output.completion_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """The parts of a request that all choices of an answer share.

    `constraint_field`: the body's field with the constraint. `shown_bytes`: the bytes of each token, if special tokens
    (markers of tool calls) must appear in the text; None if the engine's own text suffices. `calls`: how calls are
    written in the answer, if it may have some; stop strings and patterns do not look into calls, so they are looked for
    here and not in the engine. `is_whole`: the reader wants only the complete output. `prompt_field`: the body's field
    with the prompt. `client`: who asks. `heals`: as in Submit.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    constraint: Constraint | None = None
    constraint_field: str | None = None
    options: RequestOptions = NO_OPTIONS
    reasoning: FreeReasoning | None = None
    shown_bytes: Sequence[bytes] | None = None
    calls: ToolFormat | None = None
    is_whole: bool = False
    prompt_field: str = "prompt"
    heals: bool = False
    client: tuple[str, ...] = ()

    @property
    def has_outer_stops(self) -> bool:
        """True if stop strings and patterns are looked for outside the engine."""
        return self.calls is not None and self.sampling.has_stops


def heals(wanted: bool | None, constraint: Constraint | None, *, is_text: bool, has_logprobs: bool) -> bool:
    """Return whether the model may write a prompt's last token again.

    `wanted` None: it may if the prompt is text, and a constraint says how the answer begins.
    """
    return is_text and constraint is not None and not has_logprobs if wanted is None else wanted


@contextlib.contextmanager
def prompts_named(field: str) -> Iterator[None]:
    """Errors about prompts within have the body's name for them."""
    try:
        yield
    except InvalidRequest as error:
        raise name_prompt(error, field) from None


def name_prompt(error: InvalidRequest, field: str) -> InvalidRequest:
    """The error with the body's name for the prompt."""
    if error.param == "prompt":
        error.param = field
    return error


class ChoiceStream:
    """One choice's increments. Iterate over it once; `close` aborts its requests in flight.

    The constructor sends the first request and raises Overloaded or EngineStopped. Iteration raises HttpError or
    RametError.
    """

    def __init__(self, proxy: EngineProxy | Replicas, request_id: str, job: Job, index: int = 0) -> None:
        self._proxy = proxy
        self._job = job
        self._id = request_id
        self._sampling = job.sampling
        if index:  # a changed copy is checked anew, which takes 5 us
            self._sampling = replace(job.sampling, seed=seed_of_choice(job.sampling.seed, index))
        if job.has_outer_stops:
            self._sampling = replace(self._sampling, stop=(), stop_regex=())
        self._text = None if job.shown_bytes is None else _ShownText(job, job.shown_bytes)
        if job.reasoning is None:
            self._stream = self._submit(self._id, job.prompt_ids, self._sampling, job.constraint)
        else:
            self._stream = self._submit(self._id, job.prompt_ids, _free(self._sampling, job.reasoning), None)

    def _submit(
        self, request_id: str, ids: Sequence[int], sampling: SamplingParams, constraint: Constraint | None
    ) -> AsyncIterator[Output]:
        job = self._job
        stream = self._proxy.submit(
            Submit(request_id, list(ids), sampling, constraint, job.options, job.client, job.heals),
            is_whole=job.is_whole and not job.has_outer_stops,
        )
        self._end = stream.close
        return aiter(stream)

    def close(self) -> None:
        """Abort this choice's requests in flight."""
        self._end()

    async def __aiter__(self) -> AsyncGenerator[Output, None]:
        try:
            if self._job.reasoning is None:
                outputs = self._stream
            else:
                outputs = self._in_two_parts(self._job.reasoning)
            async for output in outputs:
                yield self._shown(output)
                if output.finish_reason is not None:
                    return
        except GrammarError as error:
            field = self._job.constraint_field
            raise HttpError(400, f"{field}: {error}", param=field, code="invalid_grammar") from None
        except InvalidRequest as error:
            raise name_prompt(error, self._job.prompt_field) from None
        finally:
            self.close()

    def _shown(self, output: Output) -> Output:
        if self._text is not None:
            output.text = self._text.push(output)
        return output

    async def _in_two_parts(self, reasoning: FreeReasoning) -> AsyncGenerator[Output, None]:
        ids: list[int] = []
        output: Output | None = None
        async for output in self._stream:
            ids += output.token_ids
            if output.finish_reason is not None and reasoning.is_ended_by(output, self._sampling.max_tokens):
                break
            yield output
        assert output is not None
        if output.finish_reason is None or not reasoning.is_ended_by(output, self._sampling.max_tokens):
            return
        if output.finish_reason == "length":
            after = [*reasoning.end_ids, *reasoning.after_ids]
            used = output.completion_tokens + len(after)
        else:
            after = [*([] if reasoning.end_id is None else [reasoning.end_id]), *reasoning.after_ids]
            used = output.completion_tokens + len(reasoning.after_ids)
        left = self._sampling.max_tokens
        output.finish_reason = output.stop_match = None
        yield output
        between = Output(self._id, output.prompt_tokens, output.cached_tokens, used, reasoning.end, after)
        if left is not None and left <= used:
            between.finish_reason = "length"
        yield between
        if between.finish_reason is None:
            sampling = replace(
                self._sampling,
                max_tokens=None if left is None else left - used,
                min_tokens=max(self._sampling.min_tokens - used, 0),
            )
            prompt = [*self._job.prompt_ids, *ids, *after]
            self._stream = self._submit(f"{self._id}-answer", prompt, sampling, self._job.constraint)
            async for later in self._stream:
                later.prompt_tokens, later.cached_tokens = output.prompt_tokens, output.cached_tokens
                later.completion_tokens += used
                yield later


def _free(sampling: SamplingParams, reasoning: FreeReasoning) -> SamplingParams:
    """Sampling parameters that also stop at the end of the reasoning, and at its budget."""
    if reasoning.budget is not None:
        most = reasoning.budget if sampling.max_tokens is None else min(sampling.max_tokens, reasoning.budget)
        sampling = replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
    if reasoning.end_id is None:
        return replace(sampling, stop=(*sampling.stop, reasoning.end))
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, reasoning.end_id))


class _ShownText:
    """The text of increments with some special tokens spelled out. Stop strings are cut off as in the engine.

    Where the answer may have calls, stop strings and patterns are looked for in the text before them alone, and end the
    answer here.
    """

    def __init__(self, job: Job, shown_bytes: Sequence[bytes]) -> None:
        params = job.sampling
        self._detokenizer = Detokenizer(shown_bytes)
        self._scanner = StopScanner(params.stop, params.stop_regex) if params.has_stops else None
        self._calls = ToolCallReader(job.calls) if job.calls is not None and job.has_outer_stops else None
        self._unread = ""  # text of which the reader of calls does not know yet whether it begins one

    def push(self, output: Output) -> str:
        if self._calls is not None:
            return self._before_calls(output, self._calls)
        text = self._detokenizer.push(output.token_ids)
        is_last = output.finish_reason is not None
        if is_last and not isinstance(output.stop_match, str):
            text += self._detokenizer.flush()
        if self._scanner is None:
            return text
        return self._scanner.flush(text) if is_last else self._scanner.push(text)[0]

    def _before_calls(self, output: Output, calls: ToolCallReader) -> str:
        """Return the text of an increment. Where a stop matches, the increment becomes the last one, and ends there."""
        text, scanner, count = "", self._scanner, len(output.token_ids)
        assert scanner is not None
        for index, token in enumerate(output.token_ids):
            text += self._read(self._detokenizer.push([token]), calls, scanner)
            if scanner.matched is not None:
                count = index + 1
                break
        else:
            if output.finish_reason is None:
                return text
            text += self._read(self._detokenizer.flush(), calls, scanner)
            if self._calls is not None and any(isinstance(event, CallStart) for event in calls.finish()):
                text += scanner.flush() + self._unread  # a call that was cut off
            elif self._calls is not None:
                text += scanner.flush(self._unread)
        if scanner.matched is not None:
            _end_after(output, count, scanner.matched)
        return text

    def _read(self, text: str, calls: ToolCallReader, scanner: StopScanner) -> str:
        found = ""
        for character in text:
            if scanner.matched is not None:
                break
            if self._calls is None:
                found += character
                continue
            self._unread += character
            for event in calls.push(character.encode("utf-8", "replace")):
                if isinstance(event, str):
                    found += scanner.push(event)[0]
                    self._unread = self._unread[len(event) :]
                elif isinstance(event, CallStart) and scanner.matched is None:  # only calls follow
                    found += scanner.flush() + self._unread
                    self._calls = self._scanner = None
        return found


def _end_after(output: Output, count: int, stop: str) -> None:
    """Make an increment the last one: a stop matched in its token number `count`."""
    output.completion_tokens -= len(output.token_ids) - count
    output.finish_reason, output.stop_match, output.incomplete = "stop", stop, None
    for values in (output.token_ids, output.logprobs, output.top_logprobs):
        if values is not None:
            del values[count:]


async def merged(choices: Sequence[ChoiceStream]) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield (index, increment) of all choices as they arrive. Closes all choices at the end, or if one of them fails.

    For a slow reader at most a few increments wait here; the others are merged in their streams.
    """
    tasks: list[asyncio.Task[None]] = []
    try:
        if len(choices) == 1:
            async with contextlib.aclosing(aiter(choices[0])) as outputs:
                async for output in outputs:
                    yield 0, output
            return
        queue: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue(len(choices))
        tasks = [asyncio.create_task(_pump(index, choice, queue)) for index, choice in enumerate(choices)]
        num_left = len(choices)
        while num_left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_left -= item.finish_reason is not None
            yield index, item
    finally:
        close_all(choices)
        for task in tasks:
            task.cancel()


async def _pump(index: int, choice: ChoiceStream, queue: asyncio.Queue[tuple[int, Output | Exception]]) -> None:
    try:
        async with contextlib.aclosing(aiter(choice)) as outputs:
            async for output in outputs:
                await queue.put((index, output))
    except Exception as error:  # whatever it is, `merged` raises it: without it the answer would wait for ever
        await queue.put((index, error))


def submit_all(proxy: EngineProxy | Replicas, jobs: Sequence[tuple[Job, int]], answer_id: str) -> list[ChoiceStream]:
    """Send one request for each (job, seed offset). Raises: as `EngineProxy.submit`, with nothing left in flight."""
    choices: list[ChoiceStream] = []
    try:
        for number, (job, index) in enumerate(jobs):
            choices.append(ChoiceStream(proxy, choice_id(answer_id, number), job, index))
    except BaseException:
        close_all(choices)
        raise
    return choices


def close_all(choices: Sequence[ChoiceStream]) -> None:
    """Abort all requests in flight of these choices."""
    for choice in choices:
        choice.close()


def choice_id(answer_id: str, number: int) -> str:
    """The engine's id of an answer's choice. The first choice has the answer's own id."""
    return answer_id if number == 0 else f"{answer_id}-{number}"


def scoring(request_id: str, job: Job, first: int) -> Submit:
    """The request that scores a job's prompt, from its token `first` >= 1 on. Nothing is generated."""
    params = SamplingParams(max_tokens=1, logprobs=job.sampling.logprobs)
    options = replace(job.options, score_from=first)
    return Submit(request_id, list(job.prompt_ids), params, None, options, job.client)


async def scored(proxy: EngineProxy | Replicas, wanted: Sequence[Submit]) -> list[Output]:
    """Compute prompts by requests of `scoring`. Afterwards the prompts are in the cache.

    Raises: as `EngineProxy.submit`, and the error of the first that fails.
    """
    outputs: list[Output] = []
    for start in range(0, len(wanted), MAX_SCORED_TOGETHER):
        streams: list[ReportStream[Output]] = []
        try:
            for command in wanted[start : start + MAX_SCORED_TOGETHER]:
                streams.append(proxy.submit(command, is_whole=True))
            outputs += [await stream.collect() for stream in streams]
        finally:
            for stream in streams:
                stream.close()
    return outputs

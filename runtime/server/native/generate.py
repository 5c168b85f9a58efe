"""`POST /generate`: continue texts or token ids, and return log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ramet.runtime.server.choices import Job, choice_id, close_all, heals, merged, scored, scoring, submit_all
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.server.native.bodies import GenerateBody
from ramet.runtime.server.openai.answers import ClosedByBudget, finite, token_text
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import DONE, AnswerStruct, EventStream, LastEvent, collected, event
from ramet.runtime.server.served_model import ServedModel, client_of
from ramet.runtime.text.captures import captured_values
from ramet.runtime.types import RequestOptions

FinishType = Literal["stop", "length", "abort", "error"]
Scored = tuple[float | None, int, str | None]  # log-probability, token, its text if requested


class GeneratedFinish(AnswerStruct):
    type: FinishType
    matched: str | int | UnsetType = UNSET
    incomplete: str | UnsetType = UNSET
    closed_by_budget: ClosedByBudget = UNSET


class GeneratedMeta(AnswerStruct):
    """Times are in seconds. `input_token_logprobs`: of the prompt's tokens from `logprob_start_len` on, if any."""

    id: str
    finish_reason: GeneratedFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float | UnsetType = UNSET
    queue_time: float | UnsetType = UNSET
    output_token_logprobs: list[Scored] | UnsetType = UNSET
    output_top_logprobs: list[list[Scored]] | UnsetType = UNSET
    input_token_logprobs: list[Scored] | UnsetType = UNSET
    input_top_logprobs: list[list[Scored] | None] | UnsetType = UNSET


class Generated(AnswerStruct, kw_only=True):
    """`index`: the number of the answer that this stream event belongs to, if there are several.

    `captures`: of a finished text under a composed grammar, the values of its named parts; null if it was cut off.
    """

    index: int | UnsetType = UNSET
    text: str
    output_ids: list[int]
    meta_info: GeneratedMeta
    captures: dict[str, Any] | UnsetType | None = UNSET  # Any: JSON


def generate_endpoints(served: ServedModel) -> list[Endpoint]:
    """The endpoint /generate, and the same under its second name."""
    post = Endpoint(
        "POST",
        "/generate",
        GenerateEndpoint(served).answer,
        body=GenerateBody,
        answer=Generated | list[Generated],
        errors=(404, 429, 499, 503),
        has_stream=True,
        tag="native",
    )
    return [post, replace(post, method="PUT", is_listed=False)]


class GenerateEndpoint:
    """Answers /generate for one server."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def answer(self, request: Request, body: GenerateBody) -> Response | Generated | list[Generated]:
        """Continue texts or token ids."""
        proxy, salt = self._served.proxy, self._served.cache_salt(request, body.cache_salt)
        jobs = await self._served.compute(len(await request.body()), self._jobs, body, salt, client_of(request))
        answer_id = body.rid or proxy.new_id("generate")
        given = body.sampling_params
        is_generated = all(sampling.max_new_tokens != 0 for sampling in (given if isinstance(given, list) else [given]))
        start = body.logprob_start_len if body.logprob_start_len is not None else -1
        if not is_generated:
            start = max(start, 0)
        ids = [choice_id(answer_id, n) for n in range(len(jobs))]
        prompts = await self._computed(body, [job for job, _ in jobs], ids, start, is_generated)
        answer = GenerateAnswer(self._served, body, [job for job, _ in jobs], prompts, start)
        if is_generated:
            choices = submit_all(proxy, jobs, answer_id)
            outputs = merged(choices)
        else:
            choices = []
            outputs = _each(prompts)
        if body.stream:
            return EventStream(answer.events(outputs), lambda: close_all(choices), DONE)
        for index, output in await collected(request, outputs):
            await answer.take(index, output)
        results = [answer.result(index, is_whole=True) for index in range(len(jobs))]
        return results if answer.is_list else results[0]

    def _jobs(self, body: GenerateBody, salt: str, client: tuple[str, ...]) -> list[tuple[Job, int]]:
        """(job, seed offset) of every requested answer."""
        prompts = self._prompts(body)
        given = body.sampling_params
        if isinstance(given, list) and len(given) != len(prompts):
            raise HttpError(
                400,
                f"sampling_params has {len(given)} entries for {len(prompts)} prompts",
                param="sampling_params",
            )
        all_sampling = given if isinstance(given, list) else [given] * len(prompts)
        adapter = self._served.adapter_of(body.lora_path or None, "lora_path")
        options = RequestOptions(cache_salt=salt, priority=body.priority, deadline_s=body.timeout_s, adapter=adapter)
        jobs: list[tuple[Job, int]] = []
        for ids, sampling in zip(prompts, all_sampling, strict=True):
            params = sampling.params(body.top_logprobs_num or 0 if body.return_logprob else None)
            field, constraint = sampling.constraint(self._served.config.max_schema_bytes) or (None, None)
            is_healed = heals(
                body.token_healing, constraint, is_text=body.text is not None, has_logprobs=bool(body.return_logprob)
            )
            job = Job(ids, params, constraint, field, options, is_whole=not body.stream, client=client, heals=is_healed)
            jobs += [(job, index) for index in range(sampling.n)]
        if len(jobs) > self._served.config.max_in_flight:
            raise HttpError(400, f"{len(jobs)} answers are too many for one request", param="sampling_params.n")
        return jobs

    def _prompts(self, body: GenerateBody) -> list[Sequence[int]]:
        tokenizer = self._served.tokenizer
        name = "text" if body.text is not None else "input_ids"
        given: list[Any]  # texts, or lists of token ids
        if body.text is not None:
            given = [body.text] if isinstance(body.text, str) else list(body.text)
        else:
            given = body.input_ids or []
            given = given if given and isinstance(given[0], list) else [given]
        size = tokenizer.vocab_size
        prompts = []
        for item in given:
            ids = tokenizer.encode(item, add_special=True) if isinstance(item, str) else item
            wrong = next((token for token in ids if token >= size), None)
            if wrong is not None:
                raise HttpError(400, f"input_ids has token {wrong}, but the vocabulary has {size:,}", param="input_ids")
            if not ids:
                raise HttpError(400, f"{name} has no tokens; give at least one", param=name)
            prompts.append(self._served.one_of_many(ids))
        return prompts

    async def _computed(
        self, body: GenerateBody, jobs: Sequence[Job], ids: Sequence[str], start: int, is_generated: bool
    ) -> list[Output]:
        """Answers without generated text. They have the scores of the prompts' tokens from `start` on, if asked.

        The first token of a prompt has none.
        """
        outputs = [
            Output(name, len(job.prompt_ids), 0, 0, finish_reason="length") for name, job in zip(ids, jobs, strict=True)
        ]
        wants_scores, first = bool(body.return_logprob) and start >= 0, max(start, 1)
        wanted: dict[int, Submit] = {}
        for index, job in enumerate(jobs):
            count = len(job.prompt_ids)
            if (wants_scores and first < count) or (not is_generated and count > 1):
                wanted[index] = scoring(f"{ids[index]}-score", job, min(first, count - 1))
        for index, output in zip(wanted, await scored(self._served.proxy, list(wanted.values())), strict=True):
            output.id, output.text, output.token_ids, output.finish_reason = ids[index], "", [], "length"
            if not wants_scores or first >= len(jobs[index].prompt_ids):
                output.prompt_logprobs = output.prompt_tops = None
            outputs[index] = output
        return outputs


async def _each(outputs: Sequence[Output]) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield (index, output)."""
    for item in enumerate(outputs):
        yield item


class GenerateAnswer:
    """The answers of one request, whole or in events. Owner: the request's coroutine."""

    def __init__(
        self,
        served: ServedModel,
        body: GenerateBody,
        jobs: Sequence[Job],
        computed: Sequence[Output],
        logprob_start: int,
    ) -> None:
        """`jobs` and `computed`: one entry for each answer. `computed` has the scores of its prompt, if requested.

        `logprob_start`: the first token of a prompt that has a score; -1: none.
        """
        self._served = served
        self._body = body
        self._jobs = jobs
        self._computed = computed
        self._logprob_start = logprob_start
        self._sums: list[Output | None] = [None] * len(jobs)
        self._composed = [
            job.constraint.source if job.constraint is not None and job.constraint.kind == "grammar" else None
            for job in jobs
        ]
        self._texts = [""] * len(jobs)  # of those under a composed grammar
        self._captures: dict[int, dict[str, Any] | None] = {}  # Any: JSON; of ended ones
        self._is_cumulative = body.cumulative or not body.stream

    @property
    def is_list(self) -> bool:
        several = isinstance(self._body.text, list) or bool(
            self._body.input_ids and isinstance(self._body.input_ids[0], list)
        )
        return several or len(self._jobs) > 1

    async def take(self, index: int, output: Output) -> None:
        """Take an increment of an answer. With the last one, the named parts of its text are read."""
        source = self._composed[index]
        if source is not None:
            self._texts[index] += output.text
            if output.finish_reason is not None:
                self._captures[index] = await self._served.off_loop(_captures, source, self._texts[index])
        known = self._sums[index]
        if known is None or not self._is_cumulative:
            self._sums[index] = output
        else:
            known.absorb(output)

    async def events(self, outputs: AsyncGenerator[tuple[int, Output], None]) -> AsyncGenerator[bytes, None]:
        """The answers as server-sent events."""
        num_open = len(self._sums)
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                is_first = self._sums[index] is None
                await self.take(index, output)
                if not (output.text or output.token_ids or output.finish_reason):
                    continue
                result = self.result(index, is_whole=is_first or self._is_cumulative)
                if self.is_list:
                    result.index = index
                data = event(result)
                num_open -= output.finish_reason is not None
                yield data if num_open else LastEvent(data)

    def result(self, index: int, *, is_whole: bool) -> Generated:
        """An answer in SGLang's form. `is_whole`: include the fields about its prompt."""
        output = self._sums[index]
        assert output is not None
        meta = GeneratedMeta(
            id=output.id,
            finish_reason=_finish(output),
            prompt_tokens=output.prompt_tokens,
            completion_tokens=output.completion_tokens,
            cached_tokens=output.cached_tokens,
        )
        if output.timings is not None:
            meta.e2e_latency, meta.queue_time = output.timings["total_s"], output.timings["queue_s"]
        if self._body.return_logprob:
            self._add_logprobs(meta, index, output, is_whole=is_whole)
        captures = self._captures.get(index, UNSET)
        return Generated(text=output.text, output_ids=output.token_ids, meta_info=meta, captures=captures)

    def _add_logprobs(self, meta: GeneratedMeta, index: int, output: Output, *, is_whole: bool) -> None:
        values, ids = output.logprobs or [], output.token_ids
        meta.output_token_logprobs = [self._entry(p, t) for p, t in zip(values, ids, strict=False)]
        meta.output_top_logprobs = [[self._entry(p, t) for t, p in top] for top in output.top_logprobs or []]
        if is_whole:
            computed, start = self._computed[index], self._logprob_start
            tokens = self._jobs[index].prompt_ids[start:] if start >= 0 else []
            has_first = start == 0 and bool(tokens)
            scores = [*([None] if has_first else []), *(computed.prompt_logprobs or ())]
            meta.input_token_logprobs = [self._entry(p, t) for p, t in zip(scores, tokens, strict=True)]
            tops = [[self._entry(p, t) for t, p in top] for top in computed.prompt_tops or ()]
            meta.input_top_logprobs = [*([None] if has_first else []), *tops] if self._body.top_logprobs_num else []

    def _entry(self, logprob: float | None, token: int) -> Scored:
        text = token_text(self._served.tokenizer, token) if self._body.return_text_in_logprobs else None
        return None if logprob is None else finite(logprob), token, text


def _captures(source: str, text: str) -> dict[str, Any] | None:  # Any: JSON
    """The values of a text's parts that its composed grammar names; None if it was cut. Takes long for a long text."""
    try:
        return captured_values(source, text)
    except ValueError:  # as its finish reason says
        return None


def _finish(output: Output) -> GeneratedFinish | None:
    if output.finish_reason is None:
        return None
    return GeneratedFinish(
        type=cast(FinishType, output.finish_reason),
        matched=UNSET if output.stop_match is None else output.stop_match,
        incomplete=UNSET if output.incomplete is None else output.incomplete,
        closed_by_budget=True if output.was_closed else UNSET,
    )

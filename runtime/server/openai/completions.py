"""`POST /v1/completions`: continue one prompt or several, with echo and scores of the prompt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ramet.runtime.server.choices import Job, close_all, heals, merged, scored, scoring, submit_all
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.openai.answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenUsage,
    chunk_usage,
    finite,
    token_bytes,
    token_text,
    usage_of,
)
from ramet.runtime.server.openai.bodies import CompletionBody
from ramet.runtime.server.sampling_fields import (
    CONSTRAINTS,
    asked_constraint,
    constraint_of,
    json_form_of,
    sampling_params,
)
from ramet.runtime.server.sending import DONE, EventStream, Json, LastEvent, collected, event
from ramet.runtime.server.served_model import ServedModel, client_of
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import RequestOptions

DEFAULT_MAX_TOKENS = 16


@dataclass(slots=True)
class LogprobLists:
    """The four lists of `logprobs`. `length`: characters of the answer so far, the offset of the next token."""

    tokenizer: Tokenizer
    length: int = 0
    entries: list[tuple[str, float | None, dict[str, float] | None, int]] = field(default_factory=list)
    _detokenizer: Detokenizer | None = None

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Sequence[tuple[int, float]] | None] | None,
    ) -> None:
        self._detokenizer = self._detokenizer or Detokenizer(self.tokenizer.token_bytes)
        for index, (token, value) in enumerate(zip(token_ids, logprobs, strict=False)):
            top = None
            alternatives = None if tops is None else tops[index]
            if alternatives is not None:
                # Tokens whose bytes are no text may be written alike: the likeliest of them is kept.
                top = {token_text(self.tokenizer, other): finite(p) for other, p in reversed(alternatives)}
            shown = None if value is None else finite(value)
            self.entries.append((token_text(self.tokenizer, token), shown, top, self.length))
            special = "" if self.tokenizer.token_bytes[token] else token_bytes(self.tokenizer, token).decode()
            self.length += len(self._detokenizer.push([token])) + len(special)

    def take(self) -> CompletionLogprobs:
        """Return the entries added since the last call."""
        entries, self.entries = self.entries, []
        return CompletionLogprobs(
            tokens=[entry[0] for entry in entries],
            token_logprobs=[entry[1] for entry in entries],
            top_logprobs=[entry[2] for entry in entries],
            text_offset=[entry[3] for entry in entries],
        )


class CompletionEndpoint:
    """Answers text completions for one server."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def answer(self, request: Request, body: CompletionBody) -> Response | Completion:
        """Continue one text or several."""
        served = self._served
        adapter = served.adapter_of(body.model)
        _check_fields(body)
        num = body.n or 1
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = sampling_params(body, max_tokens=max_tokens or 1, logprobs=body.logprobs)
        size = len(await request.body())
        source, most = asked_constraint(body, CONSTRAINTS), served.config.max_schema_bytes
        source_size = 0 if source is None else size
        asked = await served.compute(source_size, constraint_of, source, most, body.tokenization, json_form_of(body))
        given = _given_prompts(body)
        if len(given) * num > served.config.max_in_flight:
            wanted, limit = len(given) * num, served.config.max_in_flight
            message = f"{len(given):,} prompts with n={num} want {wanted:,} answers; the limit is {limit:,}"
            raise HttpError(400, message, param="prompt")
        prompts = await served.compute(0 if _has_ids(body) else size, _prompts, served, body, given)
        salt = served.cache_salt(request, body.cache_salt or "")
        field_name, constraint = asked or (None, None)
        options = RequestOptions(cache_salt=salt, priority=body.priority or 0, adapter=adapter)
        client = client_of(request)
        shared = Job([], sampling, constraint, field_name, options, is_whole=not body.stream, client=client)
        is_healed = heals(
            body.token_healing, constraint, is_text=not _is_ids(body), has_logprobs=body.logprobs is not None
        )
        jobs = [replace(shared, prompt_ids=ids, heals=is_healed) for ids, _ in prompts]
        texts = [text for _, text in prompts]
        answer = CompletionAnswer(served, body, jobs, texts, num, is_generated=max_tokens > 0)
        if body.stream:
            return EventStream(answer.events(answer.outputs()), answer.close, DONE)
        for index, output in await collected(request, answer.outputs()):
            answer.take(index, output)
        return answer.whole()


def _check_fields(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise HttpError(
            400, f"best_of is {body.best_of}, but only the value of n ({body.n or 1}) is supported", param="best_of"
        )


def _has_ids(body: CompletionBody) -> bool:
    """True if the prompt is token ids whose text is not needed."""
    return not body.echo and _is_ids(body)


def _is_ids(body: CompletionBody) -> bool:
    return isinstance(body.prompt, list) and not any(isinstance(p, str) for p in body.prompt[:1])


def _given_prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    """The prompts, of which the body may hold one alone."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    return cast(Sequence[str | list[int]], [given] if isinstance(given[0], int) else given)


def _prompts(
    served: ServedModel, body: CompletionBody, given: Sequence[str | list[int]]
) -> list[tuple[Sequence[int], str]]:
    """The tokens of each prompt, and the text that `echo` returns: the caller's own if the prompt was text."""
    tokenizer = served.tokenizer
    prompts = []
    for item in given:
        if isinstance(item, str):
            ids = tokenizer.encode(item, add_special=body.add_special_tokens is not False, parse_special=True)
            prompts.append((served.one_of_many(ids), item))
        else:
            size = tokenizer.vocab_size
            if item and not 0 <= min(item) <= max(item) < size:
                wrong = next(token for token in item if not 0 <= token < size)
                raise HttpError(400, f"prompt has token {wrong}, but the vocabulary has {size:,}", param="prompt")
            prompts.append((served.one_of_many(item), tokenizer.decode(item) if body.echo else ""))
    return prompts


class CompletionAnswer:
    """One answer. Choice i belongs to prompt i // n."""

    def __init__(
        self,
        served: ServedModel,
        body: CompletionBody,
        jobs: Sequence[Job],
        texts: Sequence[str],
        num: int,
        *,
        is_generated: bool,
    ) -> None:
        """`jobs`, `texts`: of each prompt, and what `echo` returns of it. `num`: answers to each."""
        self._served = served
        self._body = body
        self._prompts = jobs
        self._prompt_texts = texts
        self._num = num
        self._created = int(time.time())
        self._model = jobs[0].options.adapter or served.name
        self._jobs = [(job, index) for job in jobs for index in range(num)]
        self._is_generated = is_generated
        self._id = served.proxy.new_id("cmpl")
        self._choices = submit_all(served.proxy, self._jobs, self._id) if is_generated else []
        count = len(self._jobs)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._lasts: list[Output | None] = [None] * count
        self._logprobs = [LogprobLists(served.tokenizer) if body.logprobs is not None else None for _ in range(count)]

    def close(self) -> None:
        close_all(self._choices)

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Yield increments. With echo each choice starts with its prompt, scored if log-probabilities are requested."""
        try:
            if self._body.echo:
                for number, echoed in enumerate(await self._echoed()):
                    for index in range(number * self._num, (number + 1) * self._num):
                        yield index, echoed
            if self._is_generated:
                async with contextlib.aclosing(merged(self._choices)) as outputs:
                    async for item in outputs:
                        yield item
                return
            for index, (job, _) in enumerate(self._jobs):
                yield index, Output(self._id, len(job.prompt_ids), 0, 0, finish_reason="length")
        finally:
            self.close()

    async def _echoed(self) -> list[Output]:
        """The prompts as increments. The first token of each has no score."""
        outputs = [
            Output(self._id, len(job.prompt_ids), 0, 0, text=text, token_ids=list(job.prompt_ids))
            for job, text in zip(self._prompts, self._prompt_texts, strict=True)
        ]
        if self._body.logprobs is not None:
            long = [number for number, job in enumerate(self._prompts) if len(job.prompt_ids) > 1]
            wanted = [scoring(f"{self._id}-score-{number}", self._prompts[number], 1) for number in long]
            for number, found in zip(long, await scored(self._served.proxy, wanted), strict=True):
                outputs[number].prompt_logprobs = found.prompt_logprobs
                outputs[number].prompt_tops = found.prompt_tops
        return outputs

    def take(self, index: int, output: Output) -> None:
        """Add an increment of a choice."""
        self._texts[index].append(output.text)
        logprobs = self._logprobs[index]
        is_echo = self._body.echo and self._lasts[index] is None
        if logprobs is not None and is_echo:
            tops = None if output.prompt_tops is None else [None, *output.prompt_tops]
            logprobs.add(output.token_ids, [None, *(output.prompt_logprobs or ())], tops)
            logprobs.length = len(output.text)
        elif logprobs is not None:
            logprobs.add(output.token_ids, output.logprobs or (), output.top_logprobs)
        if not is_echo:
            self._ids[index] += output.token_ids
        self._lasts[index] = output

    def whole(self) -> Completion:
        """The whole answer."""
        metadata = self._body.metadata
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=[
                CompletionChoice(**self._choice(index, "".join(texts))) for index, texts in enumerate(self._texts)
            ],
            usage=self._usage(),
            metadata=UNSET if metadata is None else metadata,
        )

    async def events(self, outputs: AsyncGenerator[tuple[int, Output], None]) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        begun, num_open = set[int](), len(self._lasts)
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                self.take(index, output)
                if not (output.text or output.token_ids or output.finish_reason):
                    continue
                data = event(self._chunk(index, output.text, is_first=index not in begun))
                begun.add(index)
                num_open -= output.finish_reason is not None
                yield data if num_open else LastEvent(data + self._usage_event())

    def _chunk(self, index: int, text: str, *, is_first: bool) -> Json:
        """One event of the stream."""
        choice = self._choice(index, text, has_prompt=is_first)
        self._ids[index] = []
        return self._event([choice], chunk_usage(self._body.stream_options, self._usage))

    def _usage_event(self) -> bytes:
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return b""
        return event(self._event([], {"usage": self._usage()}))

    def _event(self, choices: list[Json], usage: Json) -> Json:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        return {**head, "choices": choices, **usage}

    def _choice(self, index: int, text: str, *, has_prompt: bool = True) -> Json:
        """The fields of a CompletionChoice. In a chunk that is not the last one, those of the end are missing."""
        last, logprobs = self._lasts[index], self._logprobs[index]
        assert last is not None
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.take(),
            "finish_reason": last.finish_reason,
        }
        if last.finish_reason is not None:
            choice["matched_stop"] = last.stop_match
        if last.incomplete is not None:
            choice["incomplete"] = last.incomplete
        if self._body.return_token_ids:
            choice["token_ids"] = self._ids[index]
            if has_prompt:
                choice["prompt_token_ids"] = list(self._prompts[index // self._num].prompt_ids)
        return choice

    def _usage(self) -> TokenUsage:
        outputs = [last for last in self._lasts if last is not None]
        groups = [
            [last for last in self._lasts[start : start + self._num] if last is not None]
            for start in range(0, len(self._lasts), self._num)
        ]
        firsts = [min(group, key=lambda output: output.cached_tokens) for group in groups if group]
        return usage_of(outputs, firsts)

"""`POST /v1/chat/completions`: turn a body into engine requests, and their increments into an answer or a stream."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ramet.errors import InvalidRequest
from ramet.lang.graph.ir import Constraint
from ramet.runtime.server.choices import ChoiceStream, FreeReasoning, Job, close_all, merged, name_prompt, submit_all
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.openai.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    FinishName,
    HistoryUsage,
    PromptMiss,
    TokenUsage,
    chat_logprobs,
    chunk_usage,
    usage_of,
)
from ramet.runtime.server.openai.bodies import (
    AllowedTools,
    ChatBody,
    JsonSchemaFormat,
    NamedTool,
    StructuralTagFormat,
)
from ramet.runtime.server.openai.conversations import ChatPrompt, Conversations
from ramet.runtime.server.openai.reasoning import (
    Position,
    ReasoningCounter,
    ReasoningSplitter,
    position_after,
)
from ramet.runtime.server.openai.tool_calls import AnswerReader
from ramet.runtime.server.prompt_log import FirstDifference, Nearest
from ramet.runtime.server.sampling_fields import (
    CONSTRAINTS,
    Asked,
    asked_constraint,
    check_size,
    compact_json,
    constraint_of,
    json_form_of,
    sampling_params,
)
from ramet.runtime.server.sending import DONE, EventStream, Json, LastEvent, collected, event
from ramet.runtime.server.served_model import LITTLE_BYTES, ServedModel, client_of
from ramet.runtime.text.chat_template import THINK, ThinkingMarks
from ramet.runtime.text.detokenizer import count_kept_tokens
from ramet.runtime.text.stops import check_pattern
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.text.tool_style import ToolStyle, tool_style
from ramet.runtime.types import RequestOptions


@dataclass(frozen=True, slots=True)
class Plan:
    """The engine requests of a body, ready to run. `style`: the tool call format; None if the answer has no calls."""

    body: ChatBody
    prompt: ChatPrompt
    job: Job
    style: ToolStyle | None
    position: Position
    marks: ThinkingMarks


@dataclass(slots=True)
class Progress:
    """The state of one choice. Owner: the answer's coroutine."""

    reader: AnswerReader
    counter: ReasoningCounter
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)  # in a stream: those not sent yet
    last: Output | None = None

    @property
    def finish_reason(self) -> FinishName:
        """`length` takes precedence over calls, because an incomplete call must not be run."""
        assert self.last is not None
        if self.last.finish_reason == "stop" and self.reader.calls and not self.reader.is_cut:
            return "tool_calls"
        return cast(FinishName, self.last.finish_reason or "stop")


class ChatEndpoint:
    """Answers chat completions for one server."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._tokenizer = served.tokenizer
        self.conversations = Conversations(served.tokenizer)

    @cached_property
    def style(self) -> ToolStyle:
        """This model's tool call format. It is derived from the chat template once."""
        return tool_style(self._tokenizer.chat_template)

    async def answer(self, request: Request, body: ChatBody) -> Response | ChatCompletion:
        """Answer a conversation; with `stream` as server-sent events."""
        self._served.adapter_of(body.model)
        answer = await self.begin(request, body, "chatcmpl")
        if body.stream:
            return EventStream(answer.events(), answer.close, DONE)
        for index, output in await collected(request, answer.outputs()):
            answer.take(index, output)
        return await answer.whole()

    async def begin(
        self, request: Request, body: ChatBody, prefix: str, *, field: str = "messages", clamps: bool = False
    ) -> ChatAnswer:
        """Send a body's requests to the engine, and return the answer that collects their increments.

        prefix: of the answer's id. field: the name that errors give to the conversation. clamps: if `max_tokens` does
        not fit into the context, the rest of the context is the limit. Raises: HttpError, and the errors of the engine.
        """
        salt = self._served.cache_salt(request, body.cache_salt or "")
        try:
            size = len(await request.body())
            if "stop_regex" in body.model_fields_set:  # compiling may take a while
                size += LITTLE_BYTES
            plan = await self._served.compute(size, self._plan, body, salt, clamps)
        except InvalidRequest as error:
            raise name_prompt(error, field) from None
        plan = replace(plan, job=replace(plan.job, prompt_field=field, client=client_of(request)))
        owner = self._served.prompt_owner(request, salt)
        ids = plan.job.prompt_ids
        nearest = await self._served.compute(len(ids), self._served.prompts.nearest, ids, owner)
        answer_id = self._served.proxy.new_id(prefix)
        choices = submit_all(self._served.proxy, [(plan.job, index) for index in range(body.n or 1)], answer_id)
        return ChatAnswer(self._served, plan, answer_id, choices, self.remember, nearest)

    async def count_prompt(self, request: Request, body: ChatBody) -> int:
        """Return the number of tokens of a conversation's prompt."""
        salt = self._served.cache_salt(request, body.cache_salt or "")
        plan = await self._served.compute(len(await request.body()), self._plan, body, salt)
        return len(plan.job.prompt_ids)

    def remember(self, prompt: ChatPrompt, message: Json, ids: Sequence[int]) -> None:
        """Keep the tokens of an answer, so the conversation can continue from them. Runs on the pool."""
        adapted, _ = self.style.adapt([message], None)
        self.conversations.remember(prompt, adapted[0], ids)

    # -- from a body to requests, on the pool's threads ----------------------------------------------------------

    def _plan(self, body: ChatBody, salt: str, clamps: bool = False) -> Plan:
        max_tokens = _max_tokens(body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)
        for pattern in sampling.stop_regex:
            check_pattern(pattern)
        template_stops = self._tokenizer.chat_template.stop_strings
        if template_stops:
            sampling = msgspec.structs.replace(sampling, stop=(*sampling.stop, *template_stops))
        variables = self._variables(body)
        tools = [tool.plain() for tool in body.tools or ()]
        asked, style = self._constraint(body, tools)
        prompt = self._prompt(body, tools, variables, salt, max_tokens)
        ids, position = prompt.ids, _position(prompt, self._marks)
        reasoning = None
        budget, marks = body.max_thinking_tokens, self._marks
        if budget is not None and not self.thinks:
            raise HttpError(
                400,
                "max_thinking_tokens is given, but the model's chat template has no thinking",
                param="max_thinking_tokens",
            )
        is_wanted = asked is not None or budget is not None
        if is_wanted and position == "before" and (budget is not None or self._thinks_by_default(variables)):
            ids = [*ids, *self._tokenizer.encode(marks.opening, parse_special=True, continues=True)]
            position = "inside"
            prompt.ids = ids
        if is_wanted and position == "inside":
            reasoning = self._free_reasoning(budget)
        context = self._served.context_length
        if clamps and context is not None and max_tokens is not None and 0 < context - len(ids) < max_tokens:
            sampling = msgspec.structs.replace(sampling, max_tokens=context - len(ids))
        field_name, constraint = asked or (None, None)
        shown: Sequence[bytes] | None = self._shown_bytes if style is not None else self._shown_reasoning_bytes
        if style is not None and shown is None and sampling.has_stops:
            shown = self._tokenizer.token_bytes
        job = Job(
            ids,
            sampling,
            constraint,
            field_name,
            RequestOptions(
                cache_salt=salt,
                adapter=self._served.adapter_of(body.model),
                priority=body.priority or 0,
                draft="" if body.prediction is None else body.prediction.text,
            ),
            reasoning,
            shown,
            None if style is None else style.format,
            is_whole=not body.stream,
        )
        return Plan(body, prompt, job, style, position, marks)

    def _prompt(
        self, body: ChatBody, tools: list[Json], variables: Mapping[str, Any], salt: str, max_tokens: int | None
    ) -> ChatPrompt:  # Any: JSON
        messages = [message.plain() for message in body.messages]
        adapted, shown_tools = self.style.adapt(messages, tools)
        is_continued = bool(body.continue_final_message)
        is_open = body.add_generation_prompt if body.add_generation_prompt is not None else not is_continued
        context = self._served.context_length
        room = None if context is None else context - (max_tokens or 1)
        return self.conversations.prompt(
            adapted,
            shown_tools,
            variables,
            add_generation_prompt=is_open,
            continue_final_message=is_continued,
            salt=salt,
            appends=body.history != "render",
            max_prompt_tokens=room,
        )

    def _variables(self, body: ChatBody) -> Json:
        variables = dict(body.chat_template_kwargs or {})
        effort, source = body.reasoning_effort, self._tokenizer.chat_template.source
        if effort is None:
            return variables
        if "reasoning_effort" in source:
            variables.setdefault("reasoning_effort", effort)
        elif effort == "none" and "enable_thinking" in source:
            variables.setdefault("enable_thinking", False)
        return variables

    @cached_property
    def _marks(self) -> ThinkingMarks:
        """How this model marks its reasoning. Models without such a template may write the usual marks, too."""
        return self._tokenizer.chat_template.thinking or THINK

    @cached_property
    def thinks(self) -> bool:
        """Whether the model's chat template marks reasoning."""
        return self._tokenizer.chat_template.thinking is not None

    def _free_reasoning(self, budget: int | None) -> FreeReasoning:
        """Return the reasoning that the prompt has opened. `budget`: its most tokens."""
        close, tokenizer = self._marks.close, self._tokenizer
        after = tokenizer.encode(self._marks.closing.removeprefix(close), continues=True)
        end = tokenizer.encode(close, parse_special=True, continues=True)
        return FreeReasoning(close, tokenizer.token_id(close), tuple(after), budget, tuple(end))

    def _thinks_by_default(self, variables: Mapping[str, Any]) -> bool:  # Any: JSON
        """True if the template lets the model open its reasoning and the request does not turn reasoning off."""
        return self._opens_reasoning and variables.get("enable_thinking", True) is not False

    @cached_property
    def _opens_reasoning(self) -> bool:
        template = self._tokenizer.chat_template
        if "enable_thinking" not in template.source:
            return False
        with contextlib.suppress(InvalidRequest):
            unset, on, off = (
                template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True, variables=variables)
                for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False})
            )
            return unset == on != off
        return False

    @cached_property
    def _shown_bytes(self) -> list[bytes] | None:
        return self._bytes_with(self.style.shown_specials(self._tokenizer.special_tokens))

    @cached_property
    def _shown_reasoning_bytes(self) -> list[bytes] | None:
        return self._bytes_with({})

    def _bytes_with(self, shown: dict[int, str]) -> list[bytes] | None:
        """Every token's bytes. Special tokens that separate the parts of an answer are spelled out."""
        shown |= {
            token: text
            for text, token in self._tokenizer.special_tokens.items()
            if text in (self._marks.open, self._marks.close)
        }
        if not shown:
            return None
        return [
            shown[token].encode() if token in shown else data for token, data in enumerate(self._tokenizer.token_bytes)
        ]

    def _constraint(
        self, body: ChatBody, tools: Sequence[Json]
    ) -> tuple[tuple[str, Constraint] | None, ToolStyle | None]:
        """(field and constraint, the tool call format if the answer may have calls)."""
        limit = self._served.config.max_schema_bytes
        choice = body.tool_choice or ("auto" if tools else "none")
        given = body.response_format
        form = json_form_of(body, given.json_schema if isinstance(given, JsonSchemaFormat) else None)
        wanted = _format_constraint(body) or asked_constraint(body, CONSTRAINTS)
        asked = constraint_of(wanted, limit, body.tokenization, form)
        if not tools or (choice == "none" and asked is not None):
            return asked, None
        answer = None if asked is None else _decoded(asked)
        if isinstance(choice, AllowedTools):
            allowed = {_named(tool, tools) for tool in choice.allowed_tools.tools}
            tools = [tool for tool in tools if tool["function"]["name"] in allowed]
            choice = choice.allowed_tools.mode
        name: str | Json = choice if isinstance(choice, str) else {"name": _named(choice, tools)}
        parallel = body.parallel_tool_calls is not False
        written = self.style.tool_set(tools, name, parallel=parallel, answer=answer)
        source = compact_json(written)
        check_size(source, "tools", limit)
        constraint = Constraint("tools", source, body.tokenization or "canonical", form)
        return ("tools", constraint), None if choice == "none" else self.style


def _max_tokens(body: ChatBody) -> int | None:
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise HttpError(
            400, f"max_tokens is {older} and max_completion_tokens {newer}; give one of them", param="max_tokens"
        )
    return newer if newer is not None else older


def _format_constraint(body: ChatBody) -> Asked | None:
    """The constraint that response_format asks for."""
    given = body.response_format
    if isinstance(given, JsonSchemaFormat):
        return "response_format", "json_schema", given.json_schema.json_schema
    if isinstance(given, StructuralTagFormat):
        return "response_format", "structural_tag", given.model_dump(exclude_none=True)
    if given is not None and given.type == "json_object":
        return "response_format", "json_schema", {"type": "object"}
    return None


def _decoded(asked: tuple[str, Constraint]) -> object:
    try:
        value: object = json.loads(asked[1].source)
    except ValueError as error:
        raise HttpError(400, f"{asked[0]} is not JSON: {error}", param=asked[0]) from None
    return value


def _named(choice: NamedTool, tools: Sequence[Json]) -> str:
    name = choice.function.name
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise HttpError(400, f"tool_choice names {name!r}; the tools are {', '.join(names)}", param="tool_choice")
    return name


def _position(prompt: ChatPrompt, marks: ThinkingMarks) -> Position:
    """The answer's start relative to the reasoning. A continued answer resumes at its old position."""
    if not prompt.is_continued:
        return position_after(prompt.end, marks)
    said = str(prompt.messages[-1]["content"])
    return "inside" if said.rfind(marks.open) > said.rfind(marks.close) else "behind"


class ChatAnswer:
    """One answer of one or more choices, whole or in chunks."""

    def __init__(
        self,
        served: ServedModel,
        plan: Plan,
        answer_id: str,
        choices: Sequence[ChoiceStream],
        remember: Callable[[ChatPrompt, Json, Sequence[int]], None],
        nearest: Nearest | None,
    ) -> None:
        """`remember`: keeps an answer's message and tokens, so the conversation can continue from them. `nearest`: the
        recent prompt that this one left.
        """
        self._served = served
        self._plan = plan
        self.id = answer_id
        self._choices = choices
        self._keep = remember
        self._nearest = nearest
        self._miss: FirstDifference | None = None
        self.created_s = int(time.time())
        self.model = plan.job.options.adapter or served.name
        is_separate = plan.body.separate_reasoning is not False
        shown = plan.job.shown_bytes or served.tokenizer.token_bytes
        tools = [tool.plain() for tool in plan.body.tools or ()]
        self.progress = [
            Progress(
                AnswerReader(ReasoningSplitter(plan.position, plan.marks) if is_separate else None, plan.style, tools),
                ReasoningCounter(shown, plan.position, plan.marks),
            )
            for _ in choices
        ]

    def close(self) -> None:
        close_all(self._choices)

    def take(self, index: int, output: Output) -> list[Json]:
        """Add an increment. Returns the deltas that are certain now."""
        progress = self.progress[index]
        progress.counter.push(output.token_ids)
        progress.text += output.text
        progress.token_ids += output.token_ids
        if output.logprobs is not None:
            progress.logprobs += chat_logprobs(self._served.tokenizer, output)
        progress.last = output
        deltas = progress.reader.push(output.text) if output.text else []
        if output.finish_reason is None:
            return deltas
        return deltas + progress.reader.finish(is_cut=output.finish_reason == "length")

    async def whole(self) -> ChatCompletion:
        """The whole answer."""
        await self.remember(range(len(self.progress)))
        body = self._plan.body
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created_s,
            model=self.model,
            choices=[self._whole_choice(index, progress) for index, progress in enumerate(self.progress)],
            usage=self.usage(),
            prompt_token_ids=list(self._plan.job.prompt_ids) if body.return_token_ids else UNSET,
            metadata=UNSET if body.metadata is None else body.metadata,
        )

    def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """The increments of all choices, each with its choice's index. Give each to `take`."""
        return merged(self._choices)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        role = {"role": "assistant", "content": ""}
        chunks = [self._chunk(index, role, is_first=True) for index in range(len(self.progress))]
        async with contextlib.aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                chunks += self._chunks(index, output)
                if chunks:
                    yield b"".join(map(event, chunks))
                    chunks = []
                if output.finish_reason is not None:
                    await self.remember([index])
        options = self._plan.body.stream_options
        if options is not None and options.include_usage:
            yield LastEvent(event(self._event([], {"usage": self.usage()})))

    def _chunks(self, index: int, output: Output) -> list[Json]:
        """The chunks that an increment adds to a stream. Its tokens belong to the first delta that they complete."""
        ids: list[int] | None = output.token_ids
        chunks = []
        for delta in self.take(index, output):
            chunks.append(self._chunk(index, delta, ids))
            ids = None
        if output.finish_reason is not None:
            chunks.append(self._chunk(index, {}, ids, is_last=True))
        elif ids and self._plan.body.return_token_ids:
            chunks.append(self._chunk(index, {}, ids))
        return chunks

    def _event(self, choices: list[Json], more: Json) -> Json:
        """One event of the stream."""
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created_s, "model": self.model}
        return {**head, "choices": choices, **more}

    def _chunk(
        self,
        index: int,
        delta: Json,
        token_ids: list[int] | None = None,
        *,
        is_first: bool = False,
        is_last: bool = False,
    ) -> Json:
        progress, body = self.progress[index], self._plan.body
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if progress.logprobs and not is_first:
            choice["logprobs"] = ChatLogprobs(content=progress.logprobs, refusal=None)
            progress.logprobs = []
        if is_last and progress.last is not None:
            choice["finish_reason"] = progress.finish_reason
            choice["matched_stop"] = progress.last.stop_match
            if progress.last.incomplete is not None:
                choice["incomplete"] = progress.last.incomplete
        more = chunk_usage(body.stream_options, self.usage)
        if body.return_token_ids and is_first:
            more["prompt_token_ids"] = list(self._plan.job.prompt_ids)
        elif body.return_token_ids:
            choice["token_ids"] = token_ids or []
        return self._event([choice], more)

    def _whole_choice(self, index: int, progress: Progress) -> ChatChoice:
        reader, body = progress.reader, self._plan.body
        assert progress.last is not None
        message = AnswerMessage(
            role="assistant",
            content=reader.content if reader.content or not reader.calls else None,
            refusal=None,
            reasoning_content=reader.reasoning or UNSET,
            tool_calls=[call.answered() for call in reader.calls] or UNSET,
        )
        return ChatChoice(
            index=index,
            message=message,
            logprobs=ChatLogprobs(content=progress.logprobs, refusal=None) if body.logprobs else None,
            finish_reason=progress.finish_reason,
            matched_stop=progress.last.stop_match,
            incomplete=UNSET if progress.last.incomplete is None else progress.last.incomplete,
            token_ids=progress.token_ids if body.return_token_ids else UNSET,
        )

    def usage(self) -> TokenUsage:
        """The tokens so far, of all choices."""
        outputs = [progress.last for progress in self.progress if progress.last is not None]
        if not outputs:  # the first chunk of a stream that reports its usage in every one
            outputs = [Output(self.id, len(self._plan.job.prompt_ids), 0, 0)]
        shared = min(outputs, key=lambda output: output.cached_tokens)  # the others may find what this one computed
        usage = usage_of(outputs, [shared], sum(progress.counter.count for progress in self.progress))
        if self._miss is not None:
            usage.prompt_tokens_details.ramet = PromptMiss(hit=shared.cached_tokens, first_difference=self._miss)
        prompt = self._plan.prompt
        if prompt.has_earlier_answer:
            reason = prompt.miss
            if reason is None and shared.cached_tokens < prompt.num_reused - 1:
                reason = "the rest of what was generated is no longer in the cache"
            usage.history = HistoryUsage(reused_tokens=prompt.num_reused, reason=reason)
        return usage

    async def remember(self, indices: Sequence[int]) -> None:
        """Keep the tokens of these choices, so that the conversation can continue from them, and explain the miss."""
        nearest, self._nearest = self._nearest, None
        if nearest is not None:
            prompts, ids = self._served.prompts, self._plan.job.prompt_ids
            messages = [message.plain() for message in self._plan.body.messages]
            self._miss = await self._served.compute(len(ids), prompts.explain, ids, nearest, messages)
            self._served.tenants.requests.misses[self._miss.kind or "other"] += 1
            prompts.misses.append((time.time(), self._plan.job.client[0], self._miss))
        for index in indices:
            progress = self.progress[index]
            reader = progress.reader
            if not reader.is_cut and (reader.content or reader.calls):
                await self._served.off_loop(self._remember_one, progress)

    def _remember_one(self, progress: Progress) -> None:
        reader, tokenizer = progress.reader, self._served.tokenizer
        answer: Json = {"role": "assistant", "content": reader.content}
        if reader.calls:
            answer["tool_calls"] = [call.plain() for call in reader.calls]
        ids = progress.token_ids
        if progress.last is not None and isinstance(progress.last.stop_match, str):
            ids = kept_tokens(tokenizer, self._plan.job.shown_bytes or tokenizer.token_bytes, ids, progress.text)
        self._keep(self._plan.prompt, answer, ids)


def kept_tokens(tokenizer: Tokenizer, data: Sequence[bytes], token_ids: Sequence[int], text: str) -> list[int]:
    """The tokens of `text`, a prefix of the text of `token_ids`: a stop string may have cut off the last ones.

    `data`: the bytes of each token.
    """
    num_kept = count_kept_tokens(data, token_ids, text)
    kept = list(token_ids[:num_kept])
    said = b"".join(data[token] for token in kept)
    rest = text.encode()[len(said) :].decode("utf-8", "ignore")
    return kept + (tokenizer.encode(rest, continues=True) if rest else [])

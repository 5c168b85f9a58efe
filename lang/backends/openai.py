"""Programs on any endpoint with OpenAI's API: `OpenAI(base_url, api_key, model)`.

Messages go to /chat/completions, plain text to /completions. Each generation is a request with all text before it. A
feature that such an endpoint lacks raises an error, which names the feature and an alternative. Nothing is left out
silently.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ramet.errors import InvalidRequest, NotSupported, RametError, RemoteError
from ramet.lang.backends.http_loop import HttpLoop, retry_pause
from ramet.lang.backends.protocol import BlockBackend
from ramet.lang.backends.sse import DONE
from ramet.lang.backends.text_program import OnCall, OnText, Prompt, TextSession
from ramet.lang.graph import choice_scores, ir
from ramet.lang.graph.events import NodeResult, OnEvent
from ramet.lang.graph.options import Deadline, ProgramOptions
from ramet.lang.graph.sampling import FIELDS

_OTHER_FORM = frozenset({"max_tokens", "stop", "logit_bias", "logprobs"})  # all other fields are sent unchanged
_MAX_STOPS = 4  # of OpenAI's own API
_WRAPPING_TOKENS = 16  # of {"value": ...} around a value that is no object
_OURS = "; use Engine or Remote"
_CONTINUES = (
    "the endpoint would begin a new message; begin the assistant's message with gen, or say extensions=True where the "
    "server continues messages, as Ramet, vLLM and SGLang do"
)


class OpenAI(BlockBackend):
    """An endpoint with OpenAI's API. As a context manager it is the default backend of the block.

    `extensions`: the server accepts fields beyond OpenAI's (top_k, regex, continue_final_message, ...) under the names
    that Ramet, vLLM and SGLang share. `select`: the method of selection. `logprobs` compares the log-probabilities of
    the choices (exact; plain text only). `sample` samples an answer constrained to the choices (no probabilities).
    `auto` uses the one that is possible for the prompt.
    """

    def __init__(
        self,
        base_url: str = "https://api.openai.com/v1",
        api_key: str | None = None,
        model: str = "default",
        *,
        extensions: bool = False,
        select: Literal["auto", "logprobs", "sample"] = "auto",
        max_tokens_field: str = "max_tokens",
        max_connections: int = 64,
        max_retries: int = 4,
        timeout_s: float = 120.0,
        verify: bool = True,
    ) -> None:
        super().__init__()
        if select not in ("auto", "logprobs", "sample"):
            raise InvalidRequest(f"select is {select!r}, but must be auto, logprobs or sample", param="select")
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = HttpLoop(
            base_url,
            headers,
            silence_s=timeout_s,
            max_retries=max_retries,
            verify=verify,
            server="a server with OpenAI's API",
        )
        self.model = model
        self._extensions = extensions
        self._select = select
        self._max_tokens_field = max_tokens_field
        self._max_connections = max_connections
        self._gate: asyncio.Semaphore | None = None  # made on the loop

    def start(self, options: ProgramOptions, on_event: OnEvent) -> TextSession:
        return TextSession(self.http, self.write, self.choose, options, on_event)

    def close(self) -> None:
        """End the connections and abandon running requests. The backend may be used again."""
        self.http.close()
        self._gate = None

    def __repr__(self) -> str:
        return f"OpenAI({self.http.url!r}, model={self.model!r})"

    # Generations.

    async def write(
        self,
        prompt: Prompt,
        node: ir.Generate,
        deadline: Deadline,
        on_text: OnText | None,
        on_call: OnCall | None = None,
    ) -> NodeResult:
        """One request. Raises NotSupported, and what the server's answer means."""
        path, body = self._place(prompt)
        max_tokens = node.sampling.max_tokens
        body |= self._sampling(node.sampling, is_chat=prompt.is_chat)
        form = _Form()
        if prompt.tools:
            body |= _tool_fields(prompt, node)
        if node.constraint is not None and node.type != "tools":
            form = self._constrain(body, node.constraint, is_chat=prompt.is_chat)
        stops = node.sampling.stop or ()
        # A number ends by its pattern. The text after it is cut off here, because servers accept few stop strings.
        is_cut_here = form.is_wrapped or (form.pattern is not None and len(stops) > _MAX_STOPS)
        if form.is_wrapped and max_tokens is not None:
            body[self._max_tokens_field] = max_tokens + _WRAPPING_TOKENS
        if stops and not is_cut_here:
            body["stop"] = list(stops)
        streams = (on_text is not None or on_call is not None) and not is_cut_here
        async with self._place_free():
            written = await (
                self._stream(path, body, deadline, on_text, on_call) if streams else self._ask(path, body, deadline)
            )
        if node.type == "tools":
            return _with_text_of_calls(written)
        return form.read(written, stops if is_cut_here else ())

    def _place(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """Return the URL path, and the prompt fields of the body."""
        if not prompt.is_chat:
            return "/completions", {"model": self.model, "prompt": prompt.text}
        messages, role = [dict(message) for message in prompt.messages], prompt.messages[-1]["role"]
        if not prompt.is_open:
            raise NotSupported(f"a generation stands outside of the messages; write it in s.assistant(){_OURS}")
        if role != "assistant":
            raise NotSupported(f"an endpoint writes assistant messages only, not a {role} message{_OURS}")
        is_loose = any(one["role"] == "tool" and "tool_call_id" not in one for one in messages)
        if is_loose and not self._extensions:
            raise NotSupported("tool messages need the ids of calls, which call_tools alone writes" + _OURS)
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if not messages[-1]["content"] and "tool_calls" not in messages[-1]:
            messages.pop()
            if not messages:
                raise NotSupported("a chat needs a message before the assistant's; write s.user(...) first")
        elif self._extensions:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            begun = messages[-1]["content"]
            raise NotSupported(f"the assistant's message has begun with {begun[-40:]!r}, but {_CONTINUES}")
        return "/chat/completions", body

    def _sampling(self, sampling: ir.Sampling, *, is_chat: bool) -> dict[str, Any]:
        found = {name: value for name, value in sampling.said().items() if name not in _OTHER_FORM}
        more = [name for name in found if not FIELDS[name].is_openai]
        if more and not self._extensions:
            raise NotSupported(
                f"{more[0]} is not in OpenAI's API; say extensions=True where the server takes it{_OURS}"
            )
        if sampling.logit_bias:
            found["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if sampling.logprobs is not None:
            found |= {"logprobs": True, "top_logprobs": sampling.logprobs} if is_chat else {"logprobs": 0}
        if sampling.max_tokens is not None:
            found[self._max_tokens_field if is_chat else "max_tokens"] = sampling.max_tokens
        return found

    def _constrain(self, body: dict[str, Any], constraint: ir.Constraint, *, is_chat: bool) -> _Form:
        """Put the constraint into the body, and return the form in which the answer must be read."""
        kind, source, form = constraint.kind, constraint.source, constraint.form.said()
        if form and not self._extensions:
            raise NotSupported(
                f"{next(iter(form))} is not in OpenAI's API; say extensions=True where the server takes it{_OURS}"
            )
        body |= form
        if kind in ("substring", "grammar"):
            raise NotSupported(f"an endpoint can't hold text to a constraint of kind {kind!r}{_OURS}")
        pattern = source if kind == "regex" else None
        if self._extensions:
            if kind == "json_schema":
                if is_chat:
                    body["response_format"] = _format(json.loads(source))
                else:
                    body["json_schema"] = source
            else:
                field = {"regex": "regex", "choice": "guided_choice", "cfg": "ebnf"}[kind]
                body[field] = json.loads(source) if kind == "choice" else source
            return _Form(pattern=pattern)
        if kind == "cfg":
            raise NotSupported(
                "OpenAI's API takes no grammar; say extensions=True where the server takes `ebnf`" + _OURS
            )
        if not is_chat:
            raise NotSupported(
                "/completions holds text to nothing; write the generation in s.assistant(), or say extensions=True "
                f"where the server does{_OURS}"
            )
        if kind == "json_schema":
            schema = json.loads(source)
            if isinstance(schema, dict) and schema.get("type") == "object":
                body["response_format"] = _format(schema)
                return _Form()
            body["response_format"] = _format(_wrapped(schema))
            return _Form(is_wrapped=True, is_json=True)
        if kind == "choice":
            choices = json.loads(source)
            body["response_format"] = _format(_wrapped({"type": "string", "enum": choices}))
            return _Form(is_wrapped=True, choices=tuple(choices))
        body["response_format"] = _format(_wrapped({"type": "string", "pattern": f"^(?:{source})$"}))
        return _Form(is_wrapped=True, pattern=pattern)

    # Selections.

    async def choose(self, prompt: Prompt, node: ir.Select, choices: Sequence[str], deadline: Deadline) -> NodeResult:
        if self._select == "logprobs" and prompt.is_chat:
            raise NotSupported("an endpoint gives no log-probabilities of a chat's choices; select='sample' takes one")
        if self._select == "sample" or prompt.is_chat:
            return await self._sample(prompt, node, choices, deadline)
        return await self._score(prompt, node, choices, deadline)

    async def _sample(self, prompt: Prompt, node: ir.Select, choices: Sequence[str], deadline: Deadline) -> NodeResult:
        """Let the model write one of the choices."""
        constraint: ir.Constraint | None = ir.Constraint("choice", json.dumps(list(choices), ensure_ascii=False))
        if not prompt.is_chat and not self._extensions:
            constraint = None  # the endpoint can't constrain the answer, so the answer is compared with the choices
        # No token is shorter than a byte of UTF-8.
        limit = max(len(choice.encode()) for choice in choices)
        sampling = ir.Sampling(temperature=node.temperature, seed=node.seed, max_tokens=limit)
        asked = ir.Generate(id=node.id, sampling=sampling, constraint=constraint)
        written = await self.write(prompt, asked, deadline, None)
        text = written.text.strip()
        fitting = [c for c in choices if text == c.strip()] or [c for c in choices if text.startswith(c.strip())]
        if not fitting:
            raise RemoteError(f"the endpoint was to write one of {list(choices)!r}, but wrote {text[:100]!r}")
        index = choices.index(max(fitting, key=len))
        meta = {"index": index, "is_sampled": True}
        return msgspec.structs.replace(written, text=choices[index], meta=meta)

    async def _score(self, prompt: Prompt, node: ir.Select, choices: Sequence[str], deadline: Deadline) -> NodeResult:
        """Compare the choices' log-probabilities, in one request, and one more if the scorer has a neutral text."""
        if node.scorer == "unconditional":
            raise NotSupported("the scorer 'unconditional' needs token ids, which an endpoint keeps to itself" + _OURS)
        prompts = [prompt.text + choice for choice in choices]
        found, usage = await self._echoed(prompts, deadline)
        shared = choice_scores.num_shared([names for names, _ in found])
        tails = [names[shared:] for names, _ in found]
        neutral_text, beside = choice_scores.NEUTRAL_TEXT.get(node.scorer), list[list[float]]()
        if neutral_text is not None:
            start = len("".join(found[0][0][:shared]))
            again, used = await self._echoed([neutral_text + text[start:] for text in prompts], deadline)
            usage, both = usage + used, choice_scores.num_shared([names for names, _ in again])
            beside = [values[both:] for _, values in again]
        scores = choice_scores.scores(node.scorer, tails, [values[shared:] for _, values in found], beside)
        index = choice_scores.choose(scores, node.temperature, node.seed)
        meta = {"index": index, "scores": scores, "probs": choice_scores.probabilities(scores)}
        return NodeResult(choices[index], usage=usage, meta=meta)

    async def _echoed(
        self, prompts: Sequence[str], deadline: Deadline
    ) -> tuple[list[tuple[list[str], list[float]]], ir.Usage]:
        """Return the tokens of each prompt and their log-probabilities, 0 for the first token, which has none."""
        body = {"model": self.model, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        async with self._place_free():
            answer = await self.http.request("POST", "/completions", body, deadline=deadline)
        try:
            found = sorted(answer["choices"], key=lambda choice: choice["index"])
            rows = [(list(row["logprobs"]["tokens"]), row["logprobs"]["token_logprobs"]) for row in found]
            if len(rows) != len(prompts):
                raise ValueError(f"{len(rows)} answers to {len(prompts)} prompts")
            return [(names, [0.0, *map(float, values[1:])]) for names, values in rows], _usage(answer)
        except (LookupError, TypeError, ValueError) as error:
            raise NotSupported(
                f"the endpoint returns no log-probabilities of a prompt (echo with logprobs): {error}; "
                "OpenAI(..., select='sample') takes a sampled choice"
            ) from error

    # Requests. On the loop.

    def _place_free(self) -> asyncio.Semaphore:
        if self._gate is None:
            self._gate = asyncio.Semaphore(self._max_connections)
        return self._gate

    async def _ask(self, path: str, body: Mapping[str, Any], deadline: Deadline) -> NodeResult:
        answer = await self.http.request("POST", path, body, deadline=deadline)
        try:
            choice = answer["choices"][0]
            if "message" in choice:
                refusal = choice["message"].get("refusal")
                if refusal:
                    raise RemoteError(f"the endpoint refused: {refusal}")
            written, calls = _written(choice), list[dict[str, str]]()
            _take_calls(calls, choice)
            reason = written.finish_reason or "stop"
            value = {"text": written.text, "calls": calls}
            return msgspec.structs.replace(written, value=value, usage=_usage(answer), finish_reason=reason)
        except (AttributeError, LookupError, TypeError) as error:
            raise RemoteError(f"{self.http.url}{path} answered {str(answer)[:200]}") from error

    async def _stream(
        self, path: str, body: Mapping[str, Any], deadline: Deadline, on_text: OnText | None, on_call: OnCall | None
    ) -> NodeResult:
        """`_ask` with the text as it comes. Begun anew only while none has come."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        attempt = 0
        while True:
            pieces, usage, first_s = list[NodeResult](), ir.Usage(), None
            calls, num_closed = list[dict[str, str]](), 0
            try:
                async with asyncio.timeout(deadline.left_s()), self.http.stream("POST", path, asked) as events:
                    async for event in events:
                        if event.data == DONE:
                            break
                        chunk = json.loads(event.data)
                        usage = _usage(chunk) if chunk.get("usage") else usage
                        for piece in _pieces(chunk):
                            pieces.append(piece)
                            if piece.text:
                                first_s = first_s or time.monotonic()
                                if on_text is not None:
                                    on_text(piece.text)
                        for choice in chunk.get("choices", ())[:1]:
                            if _take_calls(calls, choice):
                                first_s = first_s or time.monotonic()
                        while on_call is not None and num_closed < len(calls) and _is_closed(calls[num_closed]):
                            call = calls[num_closed]
                            on_call(num_closed, {"name": call["name"], "arguments": json.loads(call["arguments"])})
                            num_closed += 1
                whole = _whole(pieces, usage, first_s)
                return msgspec.structs.replace(whole, value={"text": whole.text, "calls": calls})
            except TimeoutError as error:
                raise Deadline.error() from error
            except RametError as error:
                pause_s = retry_pause(error, attempt)
                if (
                    pause_s is None
                    or first_s is not None
                    or attempt == self.http.max_retries
                    or not deadline.allows(pause_s)
                ):
                    raise
                attempt += 1
                await asyncio.sleep(pause_s)


class _Form:
    """The form of an answer: the text itself, or the value in {"value": ...}."""

    def __init__(
        self,
        *,
        is_wrapped: bool = False,
        is_json: bool = False,
        pattern: str | None = None,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.is_wrapped = is_wrapped
        self._is_json, self.pattern, self._choices = is_json, pattern, choices

    def read(self, written: NodeResult, stops: Sequence[str]) -> NodeResult:
        """Read an answer. Raises RemoteError if the endpoint violated the constraint."""
        text = written.text
        if self.is_wrapped:
            try:
                value = json.loads(text)["value"]
            except (ValueError, LookupError, TypeError) as error:
                if written.finish_reason == "length":
                    return written  # cut off: it has no value, and reading it raises an error
                raise RemoteError(
                    f"the endpoint was to write an object with `value`, but wrote {text[:100]!r}"
                ) from error
            text = value if isinstance(value, str) and not self._is_json else ir.value_text(value)
            if self._is_json and isinstance(value, str):
                text = json.dumps(value, ensure_ascii=False)
        if self._choices and text not in self._choices:
            raise RemoteError(f"the endpoint was to write one of {list(self._choices)!r}, but wrote {text[:100]!r}")
        if self.is_wrapped and self.pattern is not None and re.fullmatch(self.pattern, text) is None:
            raise RemoteError(f"the endpoint was to write what matches {self.pattern!r}, but wrote {text[:100]!r}")
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        text = text[: min(cuts)] if cuts else text
        return msgspec.structs.replace(written, text=text)


def _written(choice: Mapping[str, Any]) -> NodeResult:
    """Return what one choice of an answer, or of a piece of a streamed one, has written. Raises LookupError."""
    message = choice.get("message") or choice.get("delta")
    text = choice["text"] if message is None else message.get("content")
    return NodeResult(text or "", finish_reason=choice.get("finish_reason"), meta=_logprobs(choice))


def _tool_fields(prompt: Prompt, node: ir.Generate) -> dict[str, Any]:
    """Return the fields of a body for the tools that a branch declares."""
    if node.type != "tools" or node.constraint is None:
        return {"tools": prompt.tools, "tool_choice": "none"}
    source = json.loads(node.constraint.source)
    choice = source["choice"]
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    return {"tools": prompt.tools, "tool_choice": choice, "parallel_tool_calls": source["parallel"]}


def _take_calls(calls: list[dict[str, str]], choice: Mapping[str, Any]) -> bool:
    """Add what one choice of an answer, or a piece of a streamed one, says of tool calls. Return whether it does."""
    found = (choice.get("message") or choice.get("delta") or {}).get("tool_calls") or ()
    for place, said in enumerate(found):
        index, function = said.get("index", place), said.get("function") or {}
        if not 0 <= index <= len(calls):
            raise RemoteError(f"the endpoint wrote call {index} of tools, after {len(calls)} calls")
        if index == len(calls):
            calls.append({"name": "", "arguments": ""})
        calls[index]["name"] = calls[index]["name"] or function.get("name") or ""
        calls[index]["arguments"] += function.get("arguments") or ""
    return bool(found)


def _is_closed(call: Mapping[str, str]) -> bool:
    """Return whether the arguments of a call are a whole JSON object, which nothing can follow."""
    if not call["arguments"].rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(call["arguments"]), dict)
    except ValueError:
        return False


def _with_text_of_calls(written: NodeResult) -> NodeResult:
    """Return an answer whose text also has its calls, one a line: a program's text shows what was asked."""
    lines = [f'{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"]}}}' for c in written.value["calls"]]
    return msgspec.structs.replace(written, text="\n".join([written.text] * bool(written.text) + lines))


def _pieces(chunk: Mapping[str, Any]) -> list[NodeResult]:
    """Return the pieces in one event of a streamed answer. Raises RemoteError for the message of an error."""
    if "error" in chunk:
        error = chunk["error"]
        raise RemoteError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return [_written({"text": "", **choice}) for choice in chunk.get("choices", ())[:1]]


def _whole(pieces: Sequence[NodeResult], usage: ir.Usage, first_s: float | None) -> NodeResult:
    """Return a streamed answer. Raises RemoteError if its end did not come."""
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
    if not reasons:
        raise RemoteError("the answer ended before its last event")
    logprobs = [value for piece in pieces for value in (piece.meta or {}).get("logprobs", ())]
    meta = {"logprobs": logprobs} if logprobs else None
    text = "".join(piece.text for piece in pieces)
    return NodeResult(text, usage=usage, finish_reason=reasons[-1], meta=meta, first_token_s=first_s)


def _usage(answer: Mapping[str, Any]) -> ir.Usage:
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return ir.Usage(usage.get("prompt_tokens") or 0, cached, usage.get("completion_tokens") or 0)


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    found = choice.get("logprobs")
    if not found:
        return None
    if "content" in found:
        return {"logprobs": [token["logprob"] for token in found["content"] or ()]}
    return {"logprobs": [value for value in found.get("token_logprobs") or () if value is not None]}


def _format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "value", "schema": schema, "strict": True}}


def _wrapped(schema: Any) -> dict[str, Any]:
    """Wrap a schema in an object. Definitions stay at the root, because references point there."""
    inner = dict(schema) if isinstance(schema, dict) else schema
    found = {"type": "object", "properties": {"value": inner}, "required": ["value"], "additionalProperties": False}
    for name in ("$defs", "definitions"):
        if isinstance(inner, dict) and name in inner:
            found[name] = inner.pop(name)
    return found

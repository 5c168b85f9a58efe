"""The work of a Generate node: makes a request from its branch's tokens, and extends the branch by the outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ramet.grammar.tools.events import ArgumentsDelta, CallEnd, CallStart, ToolCallReader
from ramet.lang.graph import ir
from ramet.runtime.programs.engine import EngineRequest
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.programs.path import Path, keep_text
from ramet.runtime.text.captures import captured_values
from ramet.runtime.text.tool_style import schemas_of
from ramet.runtime.types import RequestOutput, SamplingParams, TopTokens


def with_one_more(sampling: SamplingParams) -> SamplingParams:
    """Return the sampling of a request whose first token writes the prompt's last one again: it may be one longer."""
    most, least = sampling.max_tokens, sampling.min_tokens
    return msgspec.structs.replace(
        sampling, max_tokens=None if most is None else most + 1, min_tokens=least + 1 if least else least
    )


class Generation:
    """One try of a generation: one request.

    `requests`: submitted at once; without any, the result is known at once.
    """

    def __init__(
        self,
        node: ir.Generate,
        attempt: int,
        model: ProgramModel,
        before: Path,
        *,
        again: bytes,
        after: bytes,
        lead: bytes,
        is_in_message: bool,
        is_thinking: bool,
        on_call: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:
        """`attempt` counts from 0. `again`: the last token of `before`, if the model writes it again. `after`: the
        literal text that follows a constrained value, and ends it. `lead`: what the model may write before the value;
        it belongs to the branch, and a text that uses the value does not repeat it. `on_call` receives each tool call,
        with its index, as soon as it is closed.

        Inside of a message, the chat template's end of a message also ends the text. Thinking ends at the template's
        end of thinking, and takes at most half of what is left of the context.
        """
        self._node, self._model = node, model
        self._start_s = time.monotonic()
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[TopTokens] = []
        self._last: RequestOutput | None = None
        prompt = before.flush(model.encode_pieces)
        if prompt.length == 0 and model.tokenizer.bos_id is not None:
            prompt = prompt.extend([model.tokenizer.bos_id])
        if again:
            prompt = prompt.without_last()
        self._prompt, self._again = prompt, again
        self._on_call, self._num_to_skip = on_call, len(again)
        self._reader = None if on_call is None else ToolCallReader(model.marks.style.format, schemas_of(self._tools()))
        self._begun: list[dict[str, str]] = []  # calls: name, and arguments as JSON so far
        sampling = ir.retry_sampling(node.sampling, attempt).params()
        room = model.context_length - prompt.length - bool(again)
        if node.sampling.max_tokens is None and 0 < room < (sampling.max_tokens or 0):
            # The program did not ask for this many tokens, so near the end of the context the rest is enough.
            sampling = msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        if is_in_message and model.marks.stop_strings:
            sampling = msgspec.structs.replace(sampling, stop=(*sampling.stop, *model.marks.stop_strings))
        if is_thinking and model.marks.thinking is not None:
            sampling = _until(model.marks.thinking.close, sampling, model, max(1, room // 2))
        self.requests = [EngineRequest(prompt.token_ids(), sampling, before=again, after=after, lead=lead)]

    def take(self, index: int, output: RequestOutput) -> None:
        """Take an output of request `index`. The outputs of one request come in order."""
        self._texts.append(output.text)
        self._tokens.extend(output.token_ids)
        self._logprobs.extend(output.logprobs or ())
        self._tops.extend(output.top_logprobs or ())
        self._last = output
        if self._reader is not None and self._on_call is not None:
            self._tell_calls(self._reader, self._on_call, self._spelled(output.token_ids))

    def _tell_calls(
        self, reader: ToolCallReader, on_call: Callable[[int, dict[str, Any]], None], written: bytes
    ) -> None:
        """Report the calls that end in the next bytes of the text."""
        own = written[self._num_to_skip :]
        self._num_to_skip -= len(written) - len(own)
        for event in reader.push(own):
            if isinstance(event, CallStart):
                self._begun.append({"name": event.name, "arguments": ""})
            elif isinstance(event, ArgumentsDelta):
                self._begun[event.index]["arguments"] += event.text
            elif isinstance(event, CallEnd) and event.is_complete:
                arguments = json.loads(self._begun[event.index]["arguments"])
                on_call(event.index, {"name": self._begun[event.index]["name"], "arguments": arguments})

    def result(self) -> ir.NodeResult:
        """Return the node's result, once the last output of every request is there."""
        output = self._last
        assert output is not None
        assert output.finish_reason is not None
        meta: dict[str, object] = {}
        if self._node.sampling.logprobs is not None:
            meta = self._likelihoods(self._own_tokens())
        if output.incomplete is not None:
            meta["incomplete"] = output.incomplete
        if output.was_closed:
            meta["closed_by_budget"] = True
        timings = output.timings or {}
        first_token_s, queue_s = timings.get("first_token_s"), timings.get("queue_s")
        text, lead = "".join(self._texts), self.requests[0].lead.decode()
        return ir.NodeResult(
            text,
            value_text=text[len(lead) :] if lead and text.startswith(lead) else None,
            usage=output.usage,
            finish_reason=output.finish_reason.value,
            meta=meta or None,
            first_token_s=None if first_token_s is None else self._start_s + float(first_token_s),
            queue_s=None if queue_s is None else float(queue_s),
        )

    def path(self) -> Path:
        """Return the branch with the generated tokens, cut off where a stop string, or what follows, cut the text."""
        return self._prompt.extend(*self._kept())

    def _kept(self) -> tuple[list[int], str]:
        """Return the tokens that lie in the prompt's end and the text, and what the next token holds of the text."""
        token_bytes, text = self._model.token_bytes, self._again.decode() + "".join(self._texts)
        is_cut = self._last is not None and isinstance(self._last.stop_match, str)
        if self.requests[0].after:
            whole = b"".join(token_bytes[token] for token in self._tokens)
            is_cut = is_cut or whole.decode("utf-8", "replace") != text
        return keep_text(token_bytes, self._tokens, text) if is_cut else (self._tokens, "")

    def _likelihoods(self, own: slice) -> dict[str, object]:
        """Return the tokens of the text with their log-probabilities, and the likeliest at each place, if asked for."""
        texts = self._model.token_bytes

        def shown(token: int) -> str:
            return texts[token].decode("utf-8", "replace")

        tokens = self._tokens[own]
        found: dict[str, object] = {"logprobs": self._logprobs[own], "token_ids": tokens}
        found["tokens"] = [shown(token) for token in tokens]
        if self._node.sampling.logprobs:
            found["top_logprobs"] = [
                [{"id": token, "token": shown(token), "logprob": value} for token, value in top]
                for top in self._tops[own]
            ]
        return found

    def _own_tokens(self) -> slice:
        """Return which tokens hold a part of the text: neither the prompt's end alone, nor what follows the text."""
        first = self._again and self._tokens and self._model.token_bytes[self._tokens[0]] == self._again
        if not self.requests[0].after:
            return slice(int(bool(first)), None)
        tokens, rest = self._kept()
        return slice(int(bool(first)), len(tokens) + bool(rest))

    def read(self, text: str) -> ir.JsonValue:
        """Return the value of the node's text. Raises ValueError if it has none."""
        if self._node.type == "captures":
            assert self._node.constraint is not None
            return {"text": text, "captures": captured_values(self._node.constraint.source, text)}
        return self._tool_calls() if self._node.type == "tools" else ir.parse_value(self._node.type, text)

    def _tools(self) -> list[dict[str, Any]]:
        """Return the tools that the text may call."""
        assert self._node.constraint is not None
        found: list[dict[str, Any]] = json.loads(self._node.constraint.source)["tools"]
        return found

    def _tool_calls(self) -> dict[str, object]:
        """Return the model's text and its tool calls."""
        return self._model.marks.style.read_calls(self._spelled(self._tokens)[len(self._again) :], self._tools())

    def _spelled(self, tokens: Sequence[int]) -> bytes:
        """Return the text of tokens. Special tokens that write parts of calls count as spelled."""
        tokenizer = self._model.tokenizer
        shown = self._model.marks.style.shown_specials(tokenizer.special_tokens)
        return b"".join(shown[t].encode() if t in shown else tokenizer.token_bytes[t] for t in tokens)


def _until(end: str, sampling: SamplingParams, model: ProgramModel, limit: int) -> SamplingParams:
    """Return sampling values that also stop at a text, which may be one special token, and after `limit` tokens."""
    token = model.tokenizer.special_tokens.get(end)
    return msgspec.structs.replace(
        sampling,
        stop=(*sampling.stop, end),
        stop_token_ids=sampling.stop_token_ids if token is None else (*sampling.stop_token_ids, token),
        max_tokens=min(sampling.max_tokens or limit, limit),
    )

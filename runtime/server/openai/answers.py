"""The answers of OpenAI's API as structs: whole answers, stream events, and their common parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.prompt_log import FirstDifference
from ramet.runtime.server.sampling_fields import StreamOptions
from ramet.runtime.server.sending import AnswerStruct, Json
from ramet.runtime.text.tokenizer import Tokenizer

Count = Annotated[int, Meta(ge=0)]
_CLOSED = (
    "a constrained answer is whole and ended because max_tokens left no room for more: the model may have wanted more"
)
# A field of every API's usage; of several answers, one is enough.
ClosedByBudget = Annotated[Literal[True], Meta(description=_CLOSED)] | UnsetType
FinishName = Literal["stop", "length", "tool_calls", "abort", "error"]
_LOWEST = -9999.0  # OpenAI's value for a probability of zero; JSON has no infinity


class PromptMiss(AnswerStruct):
    """Why no more of a prompt came from the cache. `hit`: the tokens that did."""

    hit: Count
    first_difference: FirstDifference


class PromptTokensDetails(AnswerStruct):
    """`ramet`: present if a recent prompt of the same key began alike and went on differently."""

    cached_tokens: Annotated[
        int, Meta(ge=0, description="tokens of the prompt that were not computed again; 0 means none")
    ]
    ramet: PromptMiss | UnsetType = UNSET


class CompletionTokensDetails(AnswerStruct):
    """The last two: drafted tokens that were verified, if any were, by `prediction` or otherwise."""

    reasoning_tokens: Count
    accepted_prediction_tokens: Count | UnsetType = UNSET
    rejected_prediction_tokens: Count | UnsetType = UNSET


class HistoryUsage(AnswerStruct):
    """The part of a conversation that continued from generated tokens. `reason`: why it was not longer."""

    reused_tokens: Count
    reason: str | None


class TokenUsage(AnswerStruct):
    """`history`: present if the conversation contains earlier answers. `closed_by_budget`: see ClosedByBudget."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    history: HistoryUsage | UnsetType = UNSET
    closed_by_budget: ClosedByBudget = UNSET


class TokenLogprob(AnswerStruct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(AnswerStruct):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(AnswerStruct):
    name: str
    arguments: Annotated[str, Meta(description="JSON text; not to be used where the call is incomplete")]


class AnsweredCall(AnswerStruct):
    """`incomplete`: the answer was cut off inside this call, so the call must not be run."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    incomplete: Literal[True] | UnsetType = UNSET


class AnswerMessage(AnswerStruct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(AnswerStruct):
    """`matched_stop`: the stop string or stop token that ended the answer. `incomplete`: what is missing from a
    constrained answer that `max_tokens` cut off.
    """

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName
    matched_stop: str | int | None
    incomplete: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(AnswerStruct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_token_ids: list[int] | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET


class CompletionLogprobs(AnswerStruct):
    """Each list has one entry for each token. `text_offset`: the token's offset in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerStruct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName
    matched_stop: str | int | None
    incomplete: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(AnswerStruct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    metadata: dict[str, str] | UnsetType = UNSET


def usage_of(outputs: Iterable[Output], prompts: Iterable[Output], reasoning_tokens: int = 0) -> TokenUsage:
    """Token counts. `outputs`: the last increment of every choice. `prompts`: that of one choice for each prompt.

    The choices of a prompt share it, so its tokens count once.
    """
    firsts, answers = list(prompts), list(outputs)
    num_prompt = sum(output.prompt_tokens for output in firsts)
    num_completion = sum(output.completion_tokens for output in answers)
    num_drafted = sum(output.drafted_tokens for output in answers)
    num_accepted = sum(output.accepted_tokens for output in answers)
    return TokenUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(output.cached_tokens for output in firsts)),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=reasoning_tokens,
            accepted_prediction_tokens=num_accepted if num_drafted else UNSET,
            rejected_prediction_tokens=num_drafted - num_accepted if num_drafted else UNSET,
        ),
        closed_by_budget=True if any(output.was_closed for output in answers) else UNSET,
    )


def chunk_usage(options: StreamOptions | None, usage: Callable[[], TokenUsage]) -> Json:
    """The field `usage` of a chunk before the last one, if it has one. `usage`: makes that of the answer so far."""
    if options is not None and options.continuous_usage_stats:
        return {"usage": usage()}
    return {"usage": None} if options is not None and options.include_usage else {}


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """A token's bytes; for a special token, its spelling."""
    return tokenizer.token_bytes[token] or tokenizer.decode([token]).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text. Bytes that are not valid text are written in OpenAI's form: `bytes:\xe2\x82`."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, output: Output) -> list[ChatLogprob]:
    """An increment's entries of `logprobs.content`: one for each token with a log-probability."""
    tops = output.top_logprobs or [[]] * len(output.token_ids)
    return [
        ChatLogprob(
            token=token_text(tokenizer, token),
            logprob=finite(value),
            bytes=list(token_bytes(tokenizer, token)),
            top_logprobs=[_token_logprob(tokenizer, other, p) for other, p in top],
        )
        for token, value, top in zip(output.token_ids, output.logprobs or (), tops, strict=False)
    ]


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogprob:
    return TokenLogprob(
        token=token_text(tokenizer, token), logprob=finite(logprob), bytes=list(token_bytes(tokenizer, token))
    )

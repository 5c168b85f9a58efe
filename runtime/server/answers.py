"""The shapes of answers, for the OpenAPI document. Answers are written as plain JSON; tests compare them with these.

Not here: the bodies of requests (`openai.types`, `native.types`, `programs.routes`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]  # Any: JSON


class Shape(BaseModel):
    """Base of every answer: what is not declared does not occur. A default means that a field may be absent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorFields(Shape):
    """`param`: the request's field that is wrong, where there is one. `code`: for programs to tell errors apart."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shape):
    error: ErrorFields


class PromptTokensDetails(Shape):
    cached_tokens: int = Field(ge=0, description="tokens of the prompt that were not computed again; 0 means none")


class CompletionTokensDetails(Shape):
    reasoning_tokens: int = Field(ge=0)


class History(Shape):
    """How much of a conversation went on from the tokens that were generated; `reason`: why not more."""

    reused_tokens: int = Field(ge=0)
    reason: str | None


class Usage(Shape):
    """`history` is there where the conversation holds earlier answers."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    history: History | None = None


class TokenLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(Shape):
    name: str
    arguments: str = Field(description="JSON text; not to be used where the call is incomplete")


class Call(Shape):
    """`incomplete`: the answer was cut inside this call, so that it must not be run."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    incomplete: Literal[True] = True


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[Call] = []


FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class ChatChoice(Shape):
    """`matched_stop`: the stop string or stop token that ended the answer. `incomplete`: what a constrained answer that
    `max_tokens` cut would have needed.
    """

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None
    incomplete: str | None = None
    token_ids: list[int] = []


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []
    metadata: dict[str, str] = {}


class CompletionLogprobs(Shape):
    """One entry a token in each list. `text_offset`: where the token begins in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    incomplete: str | None = None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metadata: dict[str, str] = {}


class ModelCard(Shape):
    """`max_model_len`: the context in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Shape):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(Shape):
    text: str


class GeneratedFinish(Shape):
    type: Literal["stop", "length", "abort", "error"]
    matched: str | int | None = None
    incomplete: str | None = None


Scored = tuple[float | None, int, str | None]  # log-probability, token, its text where that is asked for


class GeneratedMeta(Shape):
    """Times in seconds. `input_token_logprobs`: of the prompt from `logprob_start_len` on."""

    id: str
    finish_reason: GeneratedFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float = 0.0
    queue_time: float = 0.0
    output_token_logprobs: list[Scored] = []
    output_top_logprobs: list[list[Scored]] = []
    input_token_logprobs: list[Scored] = []


class Generated(Shape):
    text: str
    output_ids: list[int]
    meta_info: GeneratedMeta


class Health(Shape):
    status: Literal["ok", "unhealthy"]
    reason: str | None


class Ready(Shape):
    """`stage`: what the engine does until it is ready, `seconds` so far; `reason`: why the process before it ended."""

    ready: bool
    stage: str
    attempt: int
    reason: str | None
    seconds: float = 0.0


class HealthGenerate(Shape):
    status: Literal["ok"]
    seconds: float


class ModelInfo(Shape):
    model_path: str
    served_model_name: str
    context_length: int
    vocab_size: int
    is_generation: Literal[True]
    has_chat_template: bool


class ServerInfo(Shape):
    """`server`: its configuration, without keys. `engine`: null while it starts. `stats`: the engine's counters."""

    version: str
    server: Json
    engine: Json | None
    stats: dict[str, float]
    in_flight: int
    uptime_s: float


class FlushedCache(Shape):
    freed_pages: int


class Aborted(Shape):
    aborted: list[str] = Field(description="ids of the requests that were ended")


class ProgramStatus(BaseModel):
    """More is there once rows have ended: what each has generated, by name and by node."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: str


class Plan(BaseModel):
    """What the program will cost: as `ramet explain --json` prints it."""

    model_config = ConfigDict(extra="allow")

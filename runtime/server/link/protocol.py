"""The messages between the HTTP process and the engine process: msgspec structs, msgpack on the wire.

Not here: the sockets (`process`, `proxy`), the types of HTTP bodies (OpenAI's: `openai.bodies`, `openai.answers`).
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias, TypeVar

import msgspec

from ramet import errors
from ramet.errors import InvalidRequest, Overloaded, RametError
from ramet.lang.graph.ir import Constraint, NodeEvent
from ramet.lang.graph.json_form import AS_CONFIGURED, JsonForm
from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.server.link.logs import LogFormat
from ramet.runtime.types import NO_OPTIONS, RequestOptions, SamplingParams

T = TypeVar("T")
_BYTES_A_TOKEN = 4  # of a program's JSON


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of an engine process: the addresses of its parent's sockets, the model, fields of EngineConfig."""

    commands: str
    reports: str
    model: str | None
    config: dict[str, Any]  # Any: checked by EngineConfig
    log_level: str = "INFO"
    log_format: LogFormat = "text"
    replica: int | None = None  # the number of this engine among several; it then tells what its cache holds
    parent_pid: int | None = None  # this process ends with its parent, which may be gone before it has started
    fingerprint: str | None = None  # of the parent's model, which this process must have, too
    keys: tuple[str, str, str] | None = None  # CURVE: the parent's public key; this process's public and secret ones


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    """A request. Its deadline counts from its arrival at the engine. `client`: whose request it is, for fairness.

    `heals`: the model may write the prompt's last token again, as a part of a longer one.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    constraint: Constraint | None = None
    options: RequestOptions = NO_OPTIONS
    client: tuple[str, ...] = ()
    heals: bool = False


class Abort(msgspec.Struct, frozen=True, tag="abort", omit_defaults=True):
    """End a request or program, by its exact id. `nodes`: only these nodes of a program, and all that need them."""

    id: str
    nodes: list[int] | None = None


class StartProgram(msgspec.Struct, frozen=True, tag="program", omit_defaults=True):
    """Run a graph (its JSON form), once for each of `rows`: its arguments, as JSON.

    Row i is a program of its own, with the id `row_id(id, i)`. `is_open`: more parts may come. `client`: as in
    `Submit`. `numbers`: the rows' numbers, where they are only some of a program's rows.
    """

    id: str
    graph: bytes
    rows: tuple[bytes, ...] = (b"{}",)
    cache_salt: str = ""
    adapter: str = ""
    priority: int = 0
    deadline_s: float | None = None
    token_budget: int | None = None
    is_open: bool = False
    text_events: bool = True
    client: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None

    def num_tokens(self) -> list[int]:
        """The tokens of each row's prompts, roughly: one for four bytes of the graph's JSON and of its arguments."""
        return [(len(self.graph) + len(row)) // _BYTES_A_TOKEN + 1 for row in self.rows]

    def row_ids(self) -> list[str]:
        """The id of each of these rows."""
        return [row_id(self.id, row) for row in (range(len(self.rows)) if self.numbers is None else self.numbers)]


def row_id(program_id: str, row: int) -> str:
    """The id of one row of a program."""
    return f"{program_id}/{row}"


def new_id(prefix: str) -> str:
    """Return an id that no other process will make, either."""
    return f"{prefix}-{os.getpid():x}-{os.urandom(9).hex()}"


class ExtendProgram(msgspec.Struct, frozen=True, tag="extend", omit_defaults=True):
    """The next part of an open program (its JSON form), and whether it is the last one. Ignored by an ended program."""

    id: str
    graph: bytes | None = None
    is_last: bool = False


class ProvideTool(msgspec.Struct, frozen=True, tag="tool", omit_defaults=True):
    """The answer to a tool call of a program's node. `value`: JSON. `error`: the message of a failed call instead."""

    id: str
    node: int
    value: bytes = b"null"
    error: str | None = None


class Ask(msgspec.Struct, frozen=True, tag="ask", omit_defaults=True):
    """A question to the engine, or something that it is to do; the reply is an `Answer`.

    `what`: a key of `EngineServer.questions`. `arguments`: those of the function there, by name.
    """

    id: str
    what: str
    arguments: dict[str, Any] = {}  # Any: of what msgpack has


Command: TypeAlias = Submit | Abort | StartProgram | ExtendProgram | ProvideTool | Ask


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in a message. `kind`: its class in ramet.errors."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        kind = type(error).__name__ if isinstance(error, RametError) else "EngineStopped"
        param = error.param if isinstance(error, InvalidRequest) else None
        retry_s = error.retry_after_s if isinstance(error, Overloaded) else None
        return cls(kind, str(error) or repr(error), param, retry_s)

    def to_exception(self) -> RametError:
        """Return the error as an exception of its class."""
        return errors.from_name(self.kind, self.message, param=self.param, retry_after_s=self.retry_after_s)


class Output(msgspec.Struct, tag="output", omit_defaults=True):
    """One increment of a request. The last one has `finish_reason`. `stop_match`: the string or token that ended it.

    `logprobs`, `top_logprobs`: one entry for each of `token_ids`. `prompt_logprobs`, `prompt_tops`: one for each scored
    token of the prompt. `incomplete`: why a constrained text is incomplete.
    `vector`: of a pooling request. `was_closed`: it is whole, and ended because `max_tokens` left no room for more.
    `drafted_tokens`, `accepted_tokens`: as in Usage.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_match: str | int | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_tops: list[list[tuple[int, float]]] | None = None
    vector: list[float] | None = None
    error: ErrorInfo | None = None
    timings: dict[str, float] | None = None
    incomplete: str | None = None
    was_closed: bool = False
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None

    def absorb(self, later: Output) -> bool:
        """Merge the next increment into this one, so a slow reader holds only one object. Returns True."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs = _joined(self.logprobs, later.logprobs)
        self.top_logprobs = _joined(self.top_logprobs, later.top_logprobs)
        self.prompt_logprobs = _joined(self.prompt_logprobs, later.prompt_logprobs)
        self.prompt_tops = _joined(self.prompt_tops, later.prompt_tops)
        self.prompt_tokens, self.cached_tokens = later.prompt_tokens, later.cached_tokens
        self.completion_tokens = later.completion_tokens
        self.drafted_tokens, self.accepted_tokens = later.drafted_tokens, later.accepted_tokens
        self.finish_reason, self.stop_match, self.error = later.finish_reason, later.stop_match, later.error
        self.incomplete, self.was_closed = later.incomplete, later.was_closed
        self.vector = later.vector
        self.timings = later.timings if later.timings is not None else self.timings
        return True


def _joined(mine: list[T] | None, more: list[T] | None) -> list[T] | None:
    if mine is None or more is None:
        return more if mine is None else mine
    mine += more
    return mine


class ProgramEvent(msgspec.Struct, tag="event", omit_defaults=True):
    """One node's event; without one: the program has ended. `error`: why it could not be started.

    `value`: of the event, which comes without it, as JSON: a model may write integers that msgpack does not have.
    """

    id: str
    event: NodeEvent | None = None
    error: ErrorInfo | None = None
    value: bytes = b"null"

    @classmethod
    def of(cls, program_id: str, event: NodeEvent) -> ProgramEvent:
        bare = msgspec.structs.replace(event, cause=None, value=None)
        return cls(program_id, bare, value=msgspec.json.encode(event.value))

    def whole(self) -> NodeEvent | None:
        """The event with its value."""
        if self.event is None:
            return None
        return msgspec.structs.replace(self.event, value=msgspec.json.decode(self.value))

    @property
    def is_last(self) -> bool:
        return self.event is None

    def absorb(self, later: ProgramEvent) -> bool:
        """Merge the next event into this one, if both are text of one node. Returns whether it did."""
        mine, more = self.event, later.event
        if mine is None or more is None or not mine.kind == more.kind == "text" or mine.node != more.node:
            return False
        self.event = msgspec.structs.replace(more, text=mine.text + more.text)
        return True


class Answer(msgspec.Struct, frozen=True, tag="answer", omit_defaults=True):
    """The answer to an `Ask`, or an error."""

    id: str
    value: Any = None  # Any: of what msgpack has
    error: ErrorInfo | None = None


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The engine is ready.

    `identity`: equal for engines whose KV pages are alike, so that they may move from one to the other; empty where
    pages cannot move. `page_bytes`: of one of them.
    """

    pid: int
    model: str
    context_length: int
    vocab_size: int
    device: str
    dtype: str
    num_kv_tokens: int
    start_s: float
    page_size: int = 1
    json_form: JsonForm = AS_CONFIGURED
    adapters: list[str] = []
    identity: str = ""
    page_bytes: int = 0


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent every half second if the engine's thread answers. `stats`: those of `Engine.stats()`."""

    stats: dict[str, float]


class Starting(msgspec.Struct, frozen=True, tag="starting"):
    """The current stage of the process before it sends Hello."""

    stage: str


class EngineFailed(msgspec.Struct, frozen=True, tag="engine_failed"):
    """The engine could not be made, or it has stopped by itself. The process ends."""

    error: ErrorInfo


# CacheChanges: of one engine among several, sent before the outputs of the same step.
Report: TypeAlias = Output | ProgramEvent | Answer | Hello | Heartbeat | CacheChanges | Starting | EngineFailed

command_decoder = msgspec.msgpack.Decoder(list[Command])
report_decoder = msgspec.msgpack.Decoder(list[Report])

__all__ = [
    "Abort",
    "Answer",
    "Ask",
    "Command",
    "EngineFailed",
    "ErrorInfo",
    "ExtendProgram",
    "Heartbeat",
    "Hello",
    "Output",
    "ProgramEvent",
    "ProvideTool",
    "Report",
    "Settings",
    "StartProgram",
    "Starting",
    "Submit",
    "command_decoder",
    "new_id",
    "report_decoder",
    "row_id",
]

"""The events of a running program, one for each thing that happens to a node, and the results of nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The token counts of one request, or of all requests of a node.

    `cached_tokens`: the prompt tokens that came from the cache. `completion_tokens`: generated tokens.
    `drafted_tokens`: drafted tokens that were verified; `accepted_tokens`: those of them that were right, each of which
    saved a step.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """The number of prompt tokens whose keys and values were computed."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.drafted_tokens + other.drafted_tokens,
            self.accepted_tokens + other.accepted_tokens,
        )


class NodeError(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reason why a node has no value. `type`: the name of an error class of ramet.errors, or of the cause."""

    type: str
    message: str
    prompt_tail: str = ""

    @property
    def is_cancelled(self) -> bool:
        """True if the node did not fail itself: another one did, or the program was cancelled."""
        return self.type == "ProgramCancelled"


class NodeEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened to one node of a running program.

    `text`: the next piece of generated text (`kind` text), or all text that the node added to its branch (`kind` done).
    A Role adds the marks of the chat template. `value`: set when done. Kind `tool`: a ToolCall waits for the caller's
    answer. Kind `call`: a generation has closed a tool call, whose `value` is {"index": ..., "tool": ...,
    "arguments": {...}}. `timings`: seconds since the program's start (`start_s`, `first_token_s`, `end_s`). `cause`:
    the exception, within one process only; it is never encoded.
    """

    node: int
    kind: Literal["text", "done", "error", "tool", "call"]
    name: str | None = None
    text: str = ""
    value: Any = None
    usage: Usage | None = None
    finish_reason: str | None = None
    meta: dict[str, Any] | None = None
    timings: dict[str, float] | None = None
    error: NodeError | None = None
    cause: Any = None

    def to_json(self) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self, cause=None))


# It may return the event that is set once the program's function rests, if the function goes on because of this one.
OnEvent: TypeAlias = Callable[[NodeEvent], threading.Event | None]


class NodeResult(msgspec.Struct, frozen=True):
    """The result of a node: the `text` that it adds to its branch, its JSON `value`, and further fields of its event.

    `value_text`: the text that a template inserts for the value; None: `text`. `first_token_s`: by time.monotonic().
    """

    text: str = ""
    value: Any = None  # JSON
    value_text: str | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    meta: dict[str, Any] | None = None  # Any: JSON
    error: NodeError | None = None  # why the text has no value, though the node is done
    first_token_s: float | None = None
    queue_s: float | None = None  # seconds that the request waited

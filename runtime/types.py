"""The types of the runtime: requests, sequences, batches and outputs. Plain Python and numpy, no torch.

A `Request` never changes. Only the scheduler changes a `Sequence`. A `Batch` is frozen: the scheduler makes it, the
model runner reads it, and the scheduler gets it back with its outputs.

One sequence's tokens, with `num_prompt = len(request.prompt_ids)`:

    [0, num_cached)                 KV was found in the radix tree at the (last) admission
    [num_cached, num_computed)      KV computed, or launched: counted from the moment the step is launched, because
                                    everything on the device runs in launch order
    [num_computed, num_tokens)      known tokens whose KV is still to be computed
    num_in_flight more              sampled on the device by launched steps, not yet read by the host
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidRequest
from ramet.grammar.machine.grammar import Grammar as Grammar
from ramet.lang.graph.events import Usage as Usage
from ramet.lang.graph.sampling import MAX_INT32 as MAX_INT32
from ramet.lang.graph.sampling import SamplingParams as SamplingParams

TokenIds = NDArray[np.int32]
Pooling = Literal[
    "last", "mean", "cls"
]  # hidden states of a prompt that make its vector: the last, the mean, the first
TopTokens = tuple[tuple[int, float], ...]  # the most likely tokens at a position: (token, log-probability)


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token, a stop token, a stop string, or what follows a constrained value
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # cancelled by its owner, or its deadline passed
    ERROR = "error"  # the request failed; siblings and the engine did not


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A loaded adapter (LoRA). `index`: its place in the tables, from 1. `namespace`: precedes its requests' salts."""

    name: str
    index: int
    namespace: str


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Options of a request, besides prompt and sampling. A wrong value raises InvalidRequest naming the field.

    `cache_salt`: requests share cached prefixes only with requests of the same salt. `program_id`: the program that the
    request belongs to. `owner`: whose request it is; owners share the engine's time fairly. `task`: what the owner
    asked for at once, and the request is part of; the tasks of one owner share its time. Empty: the request alone is
    one. Of one task's requests, lower `priority` values run first, and of one owner's tasks the requests of lower ones.
    `deadline_s`: seconds from submission until the request is aborted. `score_from`: generate nothing, and return the
    log-probabilities of `prompt_ids[score_from:]`, with the `logprobs` most likely tokens of each position, if the
    sampling parameters ask for some. `draft`: text that the answer is expected to be like, such as a file that it
    changes a little; only its speed depends on it (EngineConfig.speculative). `adapter`: the name of a loaded adapter;
    empty: the model alone. `pooling`: generate nothing, and return one vector of the prompt; "model": as the model's
    files say.
    """

    cache_salt: str = ""
    program_id: str | None = None
    owner: str = ""
    task: str = ""
    priority: int = 0
    deadline_s: float | None = None
    score_from: int | None = None
    draft: str = ""
    adapter: str = ""
    pooling: Pooling | Literal["model"] | None = None

    def __post_init__(self) -> None:
        # The scheduler uses these values on the engine's thread, where an error would end all requests.
        if not _is_text(self.cache_salt):
            raise wrong_option("cache_salt", self.cache_salt, "text that UTF-8 can write")
        if not _is_text(self.draft):
            raise wrong_option("draft", self.draft, "text that UTF-8 can write")
        if not _is_text(self.adapter):
            raise wrong_option("adapter", self.adapter, "the name of an adapter, or empty")
        if self.pooling not in (None, "model", *get_args(Pooling)):
            raise wrong_option("pooling", self.pooling, f"model, {', '.join(get_args(Pooling))}, or None")
        if self.pooling is not None and self.score_from is not None:
            raise wrong_option("score_from", self.score_from, "None with pooling")
        if self.program_id is not None and not isinstance(self.program_id, str):
            raise wrong_option("program_id", self.program_id, "text, or None")
        if not isinstance(self.owner, str):
            raise wrong_option("owner", self.owner, "text")
        if not isinstance(self.task, str):
            raise wrong_option("task", self.task, "text")
        if type(self.priority) is not int or abs(self.priority) > MAX_INT32:
            raise wrong_option("priority", self.priority, f"an integer up to {MAX_INT32}")
        if self.deadline_s is not None and not _is_seconds(self.deadline_s):
            raise wrong_option("deadline_s", self.deadline_s, "a finite number of seconds, or None")
        if self.score_from is not None and type(self.score_from) is not int:
            raise wrong_option("score_from", self.score_from, "an integer, or None")

    def changed(self, values: dict[str, Any]) -> RequestOptions:  # Any: checked as at birth
        """Return a copy with other values. Raises InvalidRequest, and TypeError for an unknown field."""
        return msgspec.structs.replace(self, **values) if values else self


def wrong_option(name: str, value: object, limit: str) -> InvalidRequest:
    """Return the error for an option with a wrong value."""
    return InvalidRequest(f"{name} is {value!r}, but must be {limit}", param=name)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    """True for text that UTF-8 can encode: it has no lone surrogate."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


NO_OPTIONS = RequestOptions()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A checked request. It never changes.

    `stop_ids`: tokens that end the sequence (end of text unless ignored, and `stop_token_ids`).
    `cache_salt`: requests share cached prefixes only with requests of the same salt.
    `score_from`: if set, nothing is generated; the log-probabilities of `prompt_ids[score_from:]` are returned, with
    the `sampling.logprobs` most likely tokens of each position. `expected_ids`: the draft that the
    client gave; only the answer's speed depends on it. `adapter`: its cached prefixes are its own.
    `pooling`: with `score_from`, before which prefixes may come from the cache; hidden states are pooled, not scored.
    `deadline_s`: of time.monotonic(). `owner`, `task`, `priority`: as in RequestOptions.
    `num_prompt + max_tokens` never exceeds the context: `engine/validation.py`, which makes requests, checks it.
    """

    request_id: str
    prompt_ids: TokenIds
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    cache_salt: str = ""
    program_id: str | None = None
    owner: str = ""
    task: str = ""
    priority: int = 0
    deadline_s: float | None = None
    score_from: int | None = None
    seed: int = 0
    expected_ids: TokenIds | None = None
    adapter: Adapter | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise InvalidRequest(
                "the prompt has no tokens; give at least one (a begin-of-text token will do)", param="prompt"
            )
        assert self.prompt_ids.dtype == np.int32, self.prompt_ids.dtype
        assert self.score_from is None or 1 <= self.score_from <= len(self.prompt_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def end_token(self) -> int | None:
        """The token that ends a constrained text: end of text, or a stop token if that is ignored. None without any."""
        ends_text = self.stop_ids.difference(self.sampling.stop_token_ids)
        return min(ends_text or self.stop_ids, default=None)


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request and its progress. Owner: the scheduler; all others only read.

    `page_ids`: pages in path order. The first `num_shared_pages` belong to the radix tree, where a lock keeps them from
    eviction; the others belong to this sequence. `draft_ids`: drafted tokens that a launched step verifies, until it is
    read; they would follow the known ones. `num_drafted`, `num_accepted`: tokens that steps verified, and those that
    saved one. `error`: the cause of FinishReason.ERROR.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_in_flight: int = 0
    draft_ids: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    page_ids: list[int] = field(default_factory=list)
    num_shared_pages: int = 0
    slot: int | None = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_preemptions: int = 0
    first_scheduled_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens known to the host: the prompt, and the output tokens read so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def tokens(self, start: int, stop: int) -> TokenIds:
        """Token ids [start, stop) of prompt, output and draft together."""
        num_prompt = len(self.request.prompt_ids)
        if stop <= num_prompt:
            return self.request.prompt_ids[start:stop]
        ids = [*self.output_ids, *self.draft_ids] if stop > self.num_tokens else self.output_ids
        output = np.asarray(ids[max(start - num_prompt, 0) : stop - num_prompt], dtype=np.int32)
        return output if start >= num_prompt else np.concatenate([self.request.prompt_ids[start:], output])


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: compute KV for positions [start, start + num_tokens).

    A named tuple, because every row of every step makes one: it takes 0.14 µs, a frozen dataclass 0.64 µs.

    num_samples: the row's last so many positions yield a token each. 0: the chunk ends within a prompt, or is scored.
    1: also for a decode row, of which possibly only the device knows its token. More: the row verifies drafted tokens
    (`Sequence.draft_ids`), one fewer than these.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `num_tokens` token positions of page `source` to page `target`, before the step runs."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Items: decode rows first, then extend rows. Every sequence in it has a slot."""

    step_id: int
    items: tuple[ScheduledSequence, ...]
    num_decode: int
    num_tokens: int
    page_copies: tuple[PageCopy, ...] = ()


# Three types have one instance for each token of each row: RowOutput, Usage and RequestOutput. They are not frozen: a
# frozen dataclass sets each field by a call, which took 0.5 of the host's 1.4 ms in a step of 256 rows.
@dataclass(slots=True)
class RowOutput:
    """A step's output for one item: the sampled tokens that follow from each other (none if the item does not sample).

    `logprobs[i]` is the log-probability of `token_ids[i]`; `top_logprobs[i]` has the most likely tokens as pairs
    (token, log-probability).
    For a scoring request `prompt_logprobs` holds one value for each scored position of this chunk, and
    `prompt_tops` the most likely tokens there, if the request asks for them. `pooled`: fp32 [hidden], what this chunk
    adds to the vector of a pooling request.
    `is_complete`: a constrained text ends here, after these tokens, without an end token. `num_held`: the bytes at the
    text's end that may belong to what follows the value; `num_after`: those that do, if the text ends here.
    `incomplete`, `was_closed`: as in RequestOutput; the engine's loop sets them when the sequence ends.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopTokens, ...] | None = None
    prompt_logprobs: NDArray[np.float32] | None = None
    prompt_tops: tuple[TopTokens, ...] | None = None
    pooled: NDArray[np.float32] | None = None
    is_complete: bool = False
    num_held: int = 0
    num_after: int = 0
    incomplete: str | None = None
    was_closed: bool = False


@dataclass(slots=True)
class RequestOutput:
    """One increment of a request's output. The last one has `finish_reason`; `usage` counts all tokens so far.

    `stop_match`: the stop string or stop token that ended the request. `error`: set with FinishReason.ERROR or ABORT.
    `incomplete`: with FinishReason.LENGTH, the reason why a constrained text is incomplete; otherwise the strings in it
    that `string_tokens` ended. None if nothing is missing.
    `vector`: fp32 [hidden], of a pooling request's last increment.
    `was_closed`: with FinishReason.STOP, True if a constrained text ended because `max_tokens` left no room for more.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopTokens, ...] | None = None
    prompt_logprobs: NDArray[np.float32] | None = None
    prompt_tops: tuple[TopTokens, ...] | None = None
    vector: NDArray[np.float32] | None = None
    error: Exception | None = None
    timings: Mapping[str, Any] | None = None  # seconds: queue_s, first_token_s, total_s; values are floats
    incomplete: str | None = None
    was_closed: bool = False

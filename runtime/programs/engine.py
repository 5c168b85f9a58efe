"""What a program needs of an engine, and what holds for a whole program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ramet.lang.graph import ir
from ramet.runtime.programs.path import PathTokenizer
from ramet.runtime.types import Grammar, RequestOutput, SamplingParams


class ProgramTokenizer(PathTokenizer, Protocol):
    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...


class Handle(Protocol):
    def cancel(self) -> object: ...


class ProgramEngine(Protocol):
    """The part of an engine that programs use."""

    @property
    def context_length(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...  # ProgramTokenizer; an attribute of a narrower type doesn't match a property

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        grammar: Grammar | None = None,
        cache_salt: str = "",
        program_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        score_from: int | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Handle: ...


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What holds for a whole program. `deadline_s`: seconds of time.monotonic(). Lower `priority` runs first.

    `token_budget`: all its generations together write no more tokens than this. `text_events`: report text as it is
    generated, and not only when a node is done; costs some microseconds a token on the engine's thread.
    """

    program_id: str | None = None
    cache_salt: str = ""
    priority: int = 0
    deadline_s: float | None = None
    token_budget: int | None = None
    text_events: bool = True


def usage_of(output: RequestOutput) -> ir.Usage:
    usage = output.usage
    return ir.Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

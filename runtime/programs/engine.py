"""The interface of programs to an engine, and the requests of one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ramet.lang.graph.json_form import JsonForm
from ramet.runtime.cache.probe import Difference
from ramet.runtime.types import Grammar, RequestOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ramet.runtime.constraints.device_grammars import DeviceGrammars  # loads torch


class Handle(Protocol):
    def cancel(self) -> object: ...


@runtime_checkable
class ProgramEngine(Protocol):
    """The part of an engine that programs use.

    `json_form`: of JSON, where a constraint does not say. `device_grammars`: for automata that run on the engine's
    device; None: they run on the host. `before_next_step`: calls `work` on the engine's thread, once the outputs of
    the last step are delivered.
    `set_next_use`, `mark_dead`: hints to the cache, of which no result depends.
    """

    @property
    def context_length(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def json_form(self) -> JsonForm: ...

    @property
    def tokenizer(self) -> Any: ...  # Tokenizer; an attribute of a narrower type doesn't match a property

    @property
    def device_grammars(self) -> DeviceGrammars | None: ...

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        options: RequestOptions,
        *,
        grammar: Grammar | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Handle: ...

    def before_next_step(self, work: Callable[[], object]) -> None: ...

    def set_next_use(self, tokens: list[int], next_use: float, cache_salt: str = "") -> None: ...

    def mark_dead(self, tokens: list[int], cache_salt: str = "", num_live: int = 0) -> None: ...

    def differences(self, tokens: list[int], cache_salt: str = "") -> list[Difference]: ...


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request of a node, or of a text that stands in no program.

    With `score_from`, the prompt's tokens from there on are scored; nothing is generated.
    `before`: the prompt's last token, which was given back: the output's first token begins with it. `after`: the
    literal text that follows a constrained value, and ends it. `lead`: what the model may write before the value.
    """

    prompt: list[int]
    sampling: SamplingParams
    score_from: int | None = None
    before: bytes = b""
    after: bytes = b""
    lead: bytes = b""

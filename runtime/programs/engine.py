"""What programs need of an engine, and what one node asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ramet.lang.graph import ir
from ramet.runtime.programs.path import Path, PathTokenizer, PieceEncoder
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.types import Grammar, RequestOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ramet.runtime.constraints.device_grammars import DeviceGrammars  # loads torch


class ProgramTokenizer(PathTokenizer, Protocol):
    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chat_template(self) -> ChatTemplate: ...


class Handle(Protocol):
    def cancel(self) -> object: ...


@runtime_checkable
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
        options: RequestOptions,
        *,
        grammar: Grammar | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> Handle: ...


@runtime_checkable
class HasDeviceGrammars(Protocol):
    """An engine whose automata may run on its device; None: they run on the host."""

    @property
    def device_grammars(self) -> DeviceGrammars | None: ...


@dataclass(frozen=True, slots=True)
class ProgramModel:
    """What nodes must know of an engine's model. `marks`: what its chat template writes around messages."""

    tokenizer: ProgramTokenizer
    encoder: PieceEncoder
    marks: RoleMarks
    context_length: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request of a node. With `score_from`, the prompt's tokens from there on are scored; nothing is written."""

    prompt: list[int]
    sampling: SamplingParams
    score_from: int | None = None


class Work(Protocol):
    """What a node asks of the engine, and what comes of the answers. Made anew for each try of the node."""

    @property
    def requests(self) -> Sequence[EngineRequest]:
        """Submitted all at once; of a node without any, the result is known."""

    def take(self, index: int, output: RequestOutput) -> None:
        """Take in an output of request `index`; those of one request come in order."""

    def result(self) -> ir.NodeResult:
        """What the node wrote, when the last output of every request is there."""

    def path(self) -> Path:
        """The branch with what the node wrote."""

    def read(self, text: str) -> ir.JsonValue:
        """The value of what the node wrote. Raises ValueError where it has none."""

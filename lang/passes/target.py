"""What the passes must know of a runtime: how it makes tokens of text, and a few limits.

Not here: running anything. `target_of` is one of the places where the language reaches the in-process runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ramet.errors import ConfigError
from ramet.lang.backends.default import choose_backend
from ramet.lang.backends.in_process import EngineBackend

if TYPE_CHECKING:
    from ramet.lang.graph.ir import AnyNode, Constraint, Role, Tools


class Target(Protocol):
    """A tokenizer with its chat template, and limits. Passes ask nothing else of a runtime.

    `default_max_tokens`: of a generation that says nothing. `max_token_bytes`: of the longest token. `opening_tokens`:
    how many tokens stand before a choice that is scored without its prompt. `page_size`: the fewest tokens that a
    request waits for while another one computes them.
    """

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def default_max_tokens(self) -> int: ...
    @property
    def max_token_bytes(self) -> int: ...
    @property
    def stop_strings(self) -> tuple[str, ...]: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...

    def encode(self, text: str, *, add_special: bool, continues: bool) -> list[int]: ...

    def mark(self, before: Sequence[AnyNode], node: Role | Tools) -> str: ...

    def forced_tokens(self, constraint: Constraint) -> list[int] | None: ...


class TokenizerTarget:
    """A target made of a tokenizer alone: no weights, no engine."""

    def __init__(
        self,
        tokenizer: Any,  # Any: a Tokenizer
        *,
        name: str = "",
        context_length: int = 1 << 20,
        page_size: int = 1,
    ) -> None:
        from ramet.runtime.programs.grammars import ProgramGrammars
        from ramet.runtime.text.role_marks import RoleMarks
        from ramet.runtime.types import SamplingParams

        self.name = name or type(tokenizer).__name__
        self.context_length = context_length
        self.page_size = page_size
        self.default_max_tokens = SamplingParams().max_tokens or context_length
        self.token_bytes: Sequence[bytes] = tokenizer.token_bytes
        self.max_token_bytes = max(len(token) for token in self.token_bytes)
        self.special_tokens: Mapping[str, int] = tokenizer.special_tokens
        self._tokenizer = tokenizer
        self._marks = RoleMarks(tokenizer.chat_template)
        self.stop_strings = self._marks.stop_strings
        self._grammars = ProgramGrammars(tokenizer, self._marks)

    def encode(self, text: str, *, add_special: bool, continues: bool) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special=add_special, continues=continues)
        return found

    def mark(self, before: Sequence[AnyNode], node: Role | Tools) -> str:
        """What the template writes at the border of a message, or of tools, behind the nodes `before`."""
        return self._marks.text(before, node)

    def forced_tokens(self, constraint: Constraint) -> list[int] | None:
        """Tokens that every text of this constraint begins with. Compiles it; raises what that raises."""
        return self._grammars.get(constraint).result().forced_tokens(0)


def target_of(backend: object | None = None) -> Target:
    """The target of a backend (None: the default one). Raises ConfigError where it keeps its tokenizer to itself."""
    found = choose_backend(backend)
    if not isinstance(found, EngineBackend):
        raise ConfigError(
            f"{type(found).__name__} doesn't tell how it tokenises; explain with an engine of this process"
        )
    engine: Any = found.engine
    config = getattr(engine, "config", None)  # the scripted engine has none, and no pages
    return TokenizerTarget(
        engine.tokenizer,
        context_length=getattr(engine, "context_length", 1 << 20),
        page_size=getattr(config, "page_size", 1),
    )

"""What the passes must know of a runtime: how it makes tokens of text, and a few limits.

Not here: running anything, and the target that a runtime makes of its tokenizer (runtime/programs/target.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ramet.errors import ConfigError
from ramet.lang.backends.default import choose_backend
from ramet.lang.backends.in_process import EngineBackend
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

    def mark(self, before: Sequence[AnyNode], node: Role | Tools) -> str:
        """What the chat template writes at the border of a message, or of tools, behind the nodes `before`."""

    def forced_tokens(self, constraint: Constraint) -> list[int] | None:
        """Tokens that every text of this constraint begins with. Compiles it; raises what that raises."""


def target_of(backend: object | None = None) -> Target:
    """The target of a backend (None: the default one). Raises ConfigError where it keeps its tokenizer to itself."""
    found = choose_backend(backend)
    if not isinstance(found, EngineBackend):
        raise ConfigError(
            f"{type(found).__name__} doesn't tell how it tokenises; explain with an engine of this process"
        )
    return found.target()

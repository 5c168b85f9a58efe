"""The passes' interface to a runtime: its tokenizer, and a few limits.

Not here: running anything, and a runtime's target (runtime/programs/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ramet.errors import ConfigError
from ramet.lang.backends.default import choose_backend
from ramet.lang.backends.in_process import EngineBackend
from ramet.lang.backends.models import Models
from ramet.lang.graph.ir import Constraint, Marked


class Target(Protocol):
    """A tokenizer with its chat template, and limits. Passes need nothing else of a runtime.

    `default_max_tokens`: the limit of a generation that sets none. `max_token_bytes`: the length of the longest token;
    `max_text_bytes`: of the longest text of a token, whose invalid bytes are three in U+FFFD.
    `opening_tokens`: the number of tokens before a choice that is scored without its prompt. `page_size`: the fewest
    tokens for which a request waits while another request computes them.
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
    def max_text_bytes(self) -> int: ...
    @property
    def stop_strings(self) -> tuple[str, ...]: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...

    def encode(self, text: str, *, add_special: bool, continues: bool) -> list[int]: ...

    def mark(self, talk: object, opening: str, node: Marked) -> tuple[object, str]:
        """Give the chat template's text at the border of a message, or of tools; see lang/graph/run.py, `Mark`."""

    def goes_on(self, constraint: Constraint | None, before: bytes) -> bool:
        """Return whether tokens begin with `before` and go on as texts of the constraint begin.

        Compiles the constraint, and raises the errors of that.
        """

    def masks_on_host(self, constraint: Constraint, after: bytes) -> bool | None:
        """Return whether the host makes the masks of a value that ends where `after` begins, and not the device.

        None without a device. Compiles the constraint, and raises the errors of that.
        """

    def forced_tokens(self, constraint: Constraint) -> list[int] | None:
        """Return the tokens that every text of this constraint begins with. Compiles it; raises those errors."""


def target_of(backend: object | None = None) -> Target:
    """Return the target of a backend (None: the default one). Raises ConfigError if it offers no tokenizer."""
    found = choose_backend(backend)
    if isinstance(found, Models):
        raise ConfigError(
            f"models {', '.join(found.backends)} tokenise in their own ways; name one of their backends, which then "
            "counts everything as if its model wrote it all"
        )
    if not isinstance(found, EngineBackend):
        raise ConfigError(
            f"{type(found).__name__} doesn't tell how it tokenises; explain with an engine of this process"
        )
    return found.target()

"""Backends of this process: an engine, or a script in its place. The runtime is loaded at first use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from ramet.lang.backends.protocol import BlockBackend, Session
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.options import ProgramOptions

if TYPE_CHECKING:
    from ramet.runtime.programs.engine import ProgramEngine
    from ramet.runtime.programs.model import ProgramModel
    from ramet.runtime.testing.scripted_model import Script, ScriptedEngine, ScriptedStats
    from ramet.runtime.text.tokenizer import Tokenizer


class EngineBackend(BlockBackend):
    """An engine of this process. As a context manager it is the default backend of the block."""

    def __init__(self, engine: ProgramEngine) -> None:
        from ramet.runtime.programs.executor import ProgramHost  # programs on servers need no runtime

        super().__init__()
        self.engine = engine
        self._host = ProgramHost(engine)

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session:
        return self._host.start(options, on_event)

    def target(self) -> ProgramModel:
        """The engine's tokenizer and limits, which passes use before a run."""
        return self._host.model


class MockBackend(EngineBackend):
    """A backend without a model, for tests. It answers from a script, in milliseconds.

    `script`: a dict from a text in the prompt to an answer or a list of answers; or a list of answers in the order of
    the requests; or a function of the prompt. An answer that is no text is written as JSON. Without a script, words are
    drawn by a hash of the prompt. `strict`: a prompt for which the script has no answer (any more), an answer that does
    not fit its type or constraint or is cut by `max_tokens`, and an answer that is none of a `select`'s choices, are
    errors. A `select` needs no answer. `tokenizer`: whose tokens are counted, and whose chat template is used: a
    model's name or folder, or the tokenizer of an engine; None: a small one, which writes a fifth more tokens than
    those of models. Raises ConfigError for a script that cannot be one.
    """

    engine: ScriptedEngine

    def __init__(
        self,
        script: Script = None,
        *,
        strict: bool = False,
        failures: Mapping[str, Exception] | None = None,
        latency_s: float = 0.0,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    ) -> None:
        from ramet.runtime.testing.scripted_model import ScriptedEngine  # as above

        if isinstance(tokenizer, str | os.PathLike):
            from ramet.runtime.models.catalog import resolve_model
            from ramet.runtime.models.description import describe_model

            tokenizer = describe_model(resolve_model(tokenizer)).tokenizer
        super().__init__(
            ScriptedEngine(script, strict=strict, failures=failures, latency_s=latency_s, tokenizer=tokenizer)
        )

    def stats(self) -> ScriptedStats:
        """Return the engine's counters."""
        return self.engine.stats()


def is_engine(given: object) -> TypeGuard[ProgramEngine]:
    """Return whether programs can run directly on the object."""
    from ramet.runtime.programs.engine import ProgramEngine  # as above

    return isinstance(given, ProgramEngine)


def default_model() -> EngineBackend:
    """Return a backend with a new engine of the default model."""
    import ramet  # `ramet.Engine` loads torch, and says what to install where it is missing

    return EngineBackend(ramet.Engine())

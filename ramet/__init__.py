"""Ramet: a language for LLM programs, a compiler that makes them prefix-sharing request graphs, and their runtime.

    from ramet import Engine, function, gen, select

    @function
    def answer(s, question):
        with s.user():
            s += question
        with s.assistant():
            s += gen("answer", max_tokens=64)

    print(answer.run(question="Why is the sky blue?")["answer"])

Importing the package loads no model code; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.errors import CheckFailed as CheckFailed
    from ramet.errors import ProgramError as ProgramError
    from ramet.errors import RametError as RametError
    from ramet.lang.backends.backend import Backend as Backend
    from ramet.lang.backends.backend import EngineBackend as EngineBackend
    from ramet.lang.backends.backend import MockBackend as MockBackend
    from ramet.lang.backends.backend import set_default_backend as set_default_backend
    from ramet.lang.backends.backend import use_backend as use_backend
    from ramet.lang.backends.openai import OpenAI as OpenAI
    from ramet.lang.backends.remote import Remote as Remote
    from ramet.lang.graph.checks import between as between
    from ramet.lang.graph.checks import contains as contains
    from ramet.lang.graph.checks import ends_with as ends_with
    from ramet.lang.graph.checks import is_in as is_in
    from ramet.lang.graph.checks import length as length
    from ramet.lang.graph.checks import starts_with as starts_with
    from ramet.lang.program.function import Function as Function
    from ramet.lang.program.function import function as function
    from ramet.lang.recording.primitives import assistant as assistant
    from ramet.lang.recording.primitives import gen as gen
    from ramet.lang.recording.primitives import select as select
    from ramet.lang.recording.primitives import system as system
    from ramet.lang.recording.primitives import user as user
    from ramet.lang.recording.state import State as State
    from ramet.lang.recording.tools import Tool as Tool
    from ramet.lang.recording.tools import tool as tool
    from ramet.lang.recording.values import ToolUse as ToolUse
    from ramet.runtime.engine.config import EngineConfig as EngineConfig
    from ramet.runtime.engine.engine import Engine as Engine
    from ramet.runtime.types import SamplingParams as SamplingParams

_HOMES = {
    "Backend": "ramet.lang.backends.backend",
    "CheckFailed": "ramet.errors",
    "Engine": "ramet.runtime.engine.engine",
    "EngineBackend": "ramet.lang.backends.backend",
    "EngineConfig": "ramet.runtime.engine.config",
    "Function": "ramet.lang.program.function",
    "MockBackend": "ramet.lang.backends.backend",
    "OpenAI": "ramet.lang.backends.openai",
    "ProgramError": "ramet.errors",
    "RametError": "ramet.errors",
    "Remote": "ramet.lang.backends.remote",
    "SamplingParams": "ramet.runtime.types",
    "State": "ramet.lang.recording.state",
    "Tool": "ramet.lang.recording.tools",
    "ToolUse": "ramet.lang.recording.values",
    "assistant": "ramet.lang.recording.primitives",
    "between": "ramet.lang.graph.checks",
    "contains": "ramet.lang.graph.checks",
    "ends_with": "ramet.lang.graph.checks",
    "function": "ramet.lang.program.function",
    "gen": "ramet.lang.recording.primitives",
    "is_in": "ramet.lang.graph.checks",
    "length": "ramet.lang.graph.checks",
    "select": "ramet.lang.recording.primitives",
    "set_default_backend": "ramet.lang.backends.backend",
    "starts_with": "ramet.lang.graph.checks",
    "system": "ramet.lang.recording.primitives",
    "tool": "ramet.lang.recording.tools",
    "use_backend": "ramet.lang.backends.backend",
    "user": "ramet.lang.recording.primitives",
}

__all__ = [
    "Backend",
    "CheckFailed",
    "Engine",
    "EngineBackend",
    "EngineConfig",
    "Function",
    "MockBackend",
    "OpenAI",
    "ProgramError",
    "RametError",
    "Remote",
    "SamplingParams",
    "State",
    "Tool",
    "ToolUse",
    "assistant",
    "between",
    "contains",
    "ends_with",
    "function",
    "gen",
    "is_in",
    "length",
    "select",
    "set_default_backend",
    "starts_with",
    "system",
    "tool",
    "use_backend",
    "user",
]


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for; type checkers see the imports above
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ramet' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

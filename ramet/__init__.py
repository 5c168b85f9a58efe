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
    from ramet.lang.backend import Backend as Backend
    from ramet.lang.backend import EngineBackend as EngineBackend
    from ramet.lang.backend import MockBackend as MockBackend
    from ramet.lang.backend import set_default_backend as set_default_backend
    from ramet.lang.backend import use_backend as use_backend
    from ramet.lang.checks import between as between
    from ramet.lang.checks import contains as contains
    from ramet.lang.checks import ends_with as ends_with
    from ramet.lang.checks import is_in as is_in
    from ramet.lang.checks import length as length
    from ramet.lang.checks import starts_with as starts_with
    from ramet.lang.function import Function as Function
    from ramet.lang.function import function as function
    from ramet.lang.openai import OpenAI as OpenAI
    from ramet.lang.primitives import assistant as assistant
    from ramet.lang.primitives import gen as gen
    from ramet.lang.primitives import select as select
    from ramet.lang.primitives import system as system
    from ramet.lang.primitives import user as user
    from ramet.lang.remote import Remote as Remote
    from ramet.lang.state import State as State
    from ramet.lang.tools import Tool as Tool
    from ramet.lang.tools import tool as tool
    from ramet.lang.values import ToolUse as ToolUse
    from ramet.runtime.client import Engine as Engine
    from ramet.runtime.config import EngineConfig as EngineConfig
    from ramet.runtime.types import SamplingParams as SamplingParams

_HOMES = {
    "Backend": "ramet.lang.backend",
    "CheckFailed": "ramet.errors",
    "Engine": "ramet.runtime.client",
    "EngineBackend": "ramet.lang.backend",
    "EngineConfig": "ramet.runtime.config",
    "Function": "ramet.lang.function",
    "MockBackend": "ramet.lang.backend",
    "OpenAI": "ramet.lang.openai",
    "ProgramError": "ramet.errors",
    "RametError": "ramet.errors",
    "Remote": "ramet.lang.remote",
    "SamplingParams": "ramet.runtime.types",
    "State": "ramet.lang.state",
    "Tool": "ramet.lang.tools",
    "ToolUse": "ramet.lang.values",
    "assistant": "ramet.lang.primitives",
    "between": "ramet.lang.checks",
    "contains": "ramet.lang.checks",
    "ends_with": "ramet.lang.checks",
    "function": "ramet.lang.function",
    "gen": "ramet.lang.primitives",
    "is_in": "ramet.lang.checks",
    "length": "ramet.lang.checks",
    "select": "ramet.lang.primitives",
    "set_default_backend": "ramet.lang.backend",
    "starts_with": "ramet.lang.checks",
    "system": "ramet.lang.primitives",
    "tool": "ramet.lang.tools",
    "use_backend": "ramet.lang.backend",
    "user": "ramet.lang.primitives",
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

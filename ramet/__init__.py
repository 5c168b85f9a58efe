"""Ramet: a language for LLM programs, a compiler that makes them prefix-sharing request graphs, and their runtime.

    from ramet import Engine, function, gen, select

    @function
    def answer(s, question):
        with s.user():
            s += question
        with s.assistant():
            s += gen("answer", max_tokens=64)

    print(answer.run(question="Why is the sky blue?")["answer"])

Importing the package loads no model code; the names of `__init__.pyi` are loaded when they are first used.
"""

import os as _os
from importlib import metadata as _metadata

import lazy_loader as _lazy_loader

from ramet.errors import explained as _explained
from ramet.openmp_waits import limit_spinning as _limit_spinning

_limit_spinning(_os.environ)  # before anything here loads torch
_load, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _metadata.version("ramet")
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        raise _explained(error) from error

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

import gc as _gc
import os as _os
from importlib import metadata as _metadata

import lazy_loader as _lazy_loader

from ramet.errors import explained as _explained

# How often a CPU thread looks whether the other threads are done before it sleeps; OpenMP reads it when torch loads it.
# GNU's OpenMP looks 300,000 times, which is tens of milliseconds: where other processes need the cores, it keeps the
# awaited thread from running. 1,000 is some tens of microseconds. A user who sets one of the two has chosen.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & _os.environ.keys():
    _os.environ["GOMP_SPINCOUNT"] = "1000"
_load, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _metadata.version("ramet")
    collects = _gc.isenabled()
    _gc.disable()  # torch and numba make half a million objects that stay: looking through them takes 0.3 s
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        raise _explained(error) from error
    finally:
        if collects:
            _gc.freeze()
            _gc.unfreeze()  # they are old now
            _gc.enable()

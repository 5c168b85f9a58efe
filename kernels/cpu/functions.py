"""Every compiled function of the CPU that Python calls: what a process loads before its first request.

Loading all takes 0.3 s; a machine that has none on disk compiles them once, in about 8 s (2 cores of an AMD EPYC).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from numba import types

from ramet.kernels.cpu.amx import has_tiles
from ramet.kernels.cpu.int8 import has_int8_products
from ramet.kernels.cpu.threads import MODULES, Kernel

# What an annotation of a `compiled` function means where Python calls it.
_TYPES = {
    "int": types.int64,
    "float": types.float64,
    "bool": types.boolean,
    "NDArray[np.int64]": types.int64[::1],
}


def load_functions(on_compile: Callable[[], None]) -> None:
    """Load all; what is not on disk is compiled, and `on_compile` is called after each of these."""
    for function in functions():
        if load(function):
            on_compile()


def functions() -> Iterator[Any]:  # Any: kernels, and what `compiled` returned
    """What this CPU can run, module by module."""
    for name in MODULES:
        if (name == "block_int8" and not has_int8_products()) or (name == "attention_extend_amx" and not has_tiles()):
            continue  # its instructions are unknown here
        for value in vars(importlib.import_module(f"ramet.kernels.cpu.{name}")).values():
            options = getattr(value, "targetoptions", None)  # numba's; no_cpython_wrapper: an inner function
            if isinstance(value, Kernel) or (options is not None and "no_cpython_wrapper" not in options):
                yield value


def load(function: Any) -> bool:  # Any: as above
    """Make a function ready to be called. True if it had to be compiled."""
    if isinstance(function, Kernel):
        return not function.is_loaded and bool(function.address) and not function.was_on_disk
    misses = sum(function.stats.cache_misses.values())
    parameters = inspect.signature(function.py_func).parameters.values()
    function.compile(tuple(_TYPES[str(parameter.annotation)] for parameter in parameters))
    return bool(sum(function.stats.cache_misses.values()) > misses)

"""All compiled CPU functions that Python calls. A process loads them before its first request.

Loading all takes 0.3 s. A machine without them on disk compiles them once, in about 8 s (2 cores of an AMD EPYC).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from numba import types
from numba.core.registry import CPUDispatcher

from ramet.kernels.cpu.amx import has_tiles
from ramet.kernels.cpu.int8 import has_int8_products
from ramet.kernels.cpu.threads import MODULES, Kernel

# The argument types that Python passes for each annotation of a `compiled` function.
_TYPES = {
    "int": types.int64,
    "float": types.float64,
    "bool": types.boolean,
    "NDArray[np.int64]": types.int64[::1],
}


def load_functions(on_compile: Callable[[int, int], None]) -> None:
    """Load all functions, and compile those that are not on disk.

    `on_compile` is called after each of these, with the number of functions that are loaded, and that of all.
    """
    every = list(functions())
    for number, function in enumerate(every, 1):
        if load(function):
            on_compile(number, len(every))


def functions() -> Iterator[Any]:  # Any: kernels, and what `compiled` returned
    """The functions that this CPU can run, module by module."""
    for name in MODULES:
        if (name == "block_int8" and not has_int8_products()) or (name == "attention_extend_amx" and not has_tiles()):
            continue  # this CPU lacks its instructions
        for value in vars(importlib.import_module(f"ramet.kernels.cpu.{name}")).values():
            is_inner = isinstance(value, CPUDispatcher) and "no_cpython_wrapper" in value.targetoptions
            if isinstance(value, Kernel | CPUDispatcher) and not is_inner:
                yield value


def load(function: Any) -> bool:  # Any: as above
    """Load a function. Returns True if it had to be compiled."""
    if isinstance(function, Kernel):
        return not function.is_loaded and bool(function.address) and not function.was_on_disk
    misses = sum(function.stats.cache_misses.values())
    parameters = inspect.signature(function.py_func).parameters.values()
    function.compile(tuple(_TYPES[str(parameter.annotation)] for parameter in parameters))
    return bool(sum(function.stats.cache_misses.values()) > misses)

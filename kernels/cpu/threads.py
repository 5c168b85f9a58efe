"""Run compiled CPU kernels on torch's own OpenMP threads, so two thread pools never compete for the same cores.

A kernel takes a pointer to int64 arguments and computes its share from `thread_index()` and `num_threads()`. `parallel`
runs it through GOMP_parallel, an entry point of GNU's, LLVM's and Intel's OpenMP runtimes. If torch uses none of them
(macOS, Windows), the kernel runs only on the calling thread.

Numba keeps compiled code on disk. `functions` loads or compiles all of it before its first use, never at import.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, njit, types
from numpy.typing import NDArray

from ramet.loops import drop_damaged, folder_of

Function = TypeVar("Function", bound=Callable[..., Any])  # any compiled function keeps its Python signature

# Numba resolves these names when it links a kernel, also one that was compiled by an earlier process.
_PARALLEL, _INDEX, _COUNT = "ramet_parallel", "ramet_thread_index", "ramet_num_threads"
_BARRIER = "ramet_barrier"

_parallel = types.ExternalFunction(_PARALLEL, types.void(types.intp, types.intp, types.int32, types.int32))
thread_index = types.ExternalFunction(_INDEX, types.int32())
num_threads = types.ExternalFunction(_COUNT, types.int32())
barrier = types.ExternalFunction(_BARRIER, types.void())  # all threads of a kernel meet here
# Sums may be reordered, because vectorising them requires it; infinities and NaN keep their meaning. Division by zero
# gives infinity (error_model numpy): a check for it would also prevent vectorisation.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}


# Modules that contain the sources of compiled code. The quickest to compile come first.
MODULES = (
    "threads",
    "vectors",
    "int8",
    "bf16",
    "amx",
    "program",
    "pointwise",
    "greedy",
    "block_linear",
    "block_int8",
    "attention",
    "attention_extend_amx",
)


def _digest() -> str:
    """Return a digest of the sources above. Numba itself notices only changes of the function's own file."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in MODULES)).hexdigest()[:12]


_DIGEST = _digest()


def _named(function: Function) -> Function:
    """Put the digest into the name under which numba keeps the code on disk."""
    function.__qualname__ += "_" + _DIGEST
    return function


def compiled(function: Function) -> Function:
    """Compile at the first call, without the interpreter lock. Annotations give the types of Python's arguments."""
    made: Function = njit(nogil=True, cache=True, fastmath=_REORDER, error_model="numpy")(_named(function))
    drop_damaged(folder_of(made))
    return made


def inner(function: Function) -> Function:
    """Compile a function that only compiled code calls. It is always inlined into its callers, also on disk.

    Without inlining, a process that compiles a caller would use the separately compiled function, and a process that
    loads the caller would use the copy inside it. They are optimised differently, so their results could round
    differently.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return njit(nogil=True, fastmath=_REORDER, error_model="numpy", **options)(function)  # type: ignore[no-any-return]


class Kernel:
    """A function int64* -> None that runs on many threads. It is compiled at the first call."""

    __slots__ = ("_address", "_compiled", "_function")

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = _named(function)
        self._address: int | None = None

    def __call__(self, *arguments: int, threads: int) -> None:
        """Run on `threads` threads at once, all with the same arguments (addresses, sizes, `float_bits`)."""
        parallel(self.address, np.array(arguments, np.int64), threads)

    @property
    def address(self) -> int:
        if self._address is None:
            kind = types.void(types.CPointer(types.int64))
            self._compiled = cfunc(kind, cache=True, fastmath=_REORDER, error_model="numpy")(
                self._function
            )  # kept: it owns the code
            self._address = int(self._compiled.address)
        return self._address

    @property
    def is_loaded(self) -> bool:
        """True once `address` was read."""
        return self._address is not None

    @property
    def was_on_disk(self) -> bool:
        """True if an earlier process had compiled it. Valid after `address` was read."""
        return bool(self._compiled.cache_hits)


def float_bits(value: float) -> int:
    """A float32 as an integer argument; `bits_float` turns it back inside a kernel."""
    return int(np.float32(value).view(np.int32))


@inner
def bits_float(bits: Any) -> Any:  # np.int64 -> np.float32
    """The float32 of `float_bits`, in compiled code."""
    return np.int32(bits).view(np.float32)


_SYMBOLS = {
    _PARALLEL: "GOMP_parallel",
    _INDEX: "omp_get_thread_num",
    _COUNT: "omp_get_num_threads",
    _BARRIER: "GOMP_barrier",
}


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch itself uses, or None where it is older than OpenMP 5.0."""
    bundled = sorted(Path(torch.__file__).parent.joinpath("lib").glob("lib*omp*.so*"))
    bundled += sorted(Path(torch.__file__).parent.parent.joinpath("torch.libs").glob("lib*omp*.so*"))
    for name in [*map(str, bundled), None]:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if all(hasattr(library, symbol) for symbol in (*_SYMBOLS.values(), "omp_pause_resource_all")):
            return library
    return None


def release_threads() -> None:
    """End the OpenMP workers of the calling thread. They start again when the thread next needs them.

    Each thread that runs parallel regions has its own workers. If all workers together outnumber the cores, GNU's
    OpenMP lets them sleep between regions instead of spinning: after a model was loaded on one thread, decode steps on
    another took 14.5 ms instead of 8.6 (SmolLM2 at batch 1, 2 cores), and beside an idle engine in the same process,
    another one wrote 100 tokens a second instead of 240. A thread without parallel work must release its workers.
    """
    if _LIBRARY is not None:
        _LIBRARY.omp_pause_resource_all(_PAUSE_SOFT)


def _register() -> bool:
    """Bind the names above. Returns True if kernels can run in parallel."""
    library = _LIBRARY
    if library is not None:
        for name, symbol in _SYMBOLS.items():
            address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
            llvm.add_symbol(name, address)
        return True
    for name, function in ((_PARALLEL, _CALL), (_INDEX, _ZERO), (_COUNT, _ONE), (_BARRIER, _NOTHING)):
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return False


# Stand-ins without OpenMP: one thread, the caller's.
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)(
    lambda kernel, arguments, count, flags: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)(arguments)
)
_ZERO = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 0)
_ONE = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 1)
_NOTHING = ctypes.CFUNCTYPE(None)(lambda: None)

_PAUSE_SOFT = 1  # omp_pause_soft: settings such as the number of threads stay
_LIBRARY = _openmp()
IS_PARALLEL = _register()


@compiled
def parallel(kernel: int, arguments: NDArray[np.int64], count: int) -> None:
    """Call `kernel` (its address) on `count` threads, each with the same int64 `arguments`."""
    _parallel(kernel, arguments.ctypes.data, count, 0)


def thread_count() -> int:
    """Number of threads that a kernel should use: torch's setting."""
    return torch.get_num_threads() if IS_PARALLEL else 1

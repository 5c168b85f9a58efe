"""Triton if it is installed, otherwise a stand-in, so kernels can be defined beside their references.

The CPU path needs no Triton. Without Triton a kernel can be defined but not launched. With `TRITON_INTERPRET=1`, set
before the first kernel module is imported, launches on CPU tensors run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any  # kernels are compiled by Triton, which has no types of its own

import torch

__all__ = [
    "HAS_TRITON",
    "IS_INTERPRETED",
    "cdiv",
    "compiling",
    "jit",
    "jit_any_value",
    "next_power_of_two",
    "tl",
    "use_device",
    "wait_for_previous",
]

_is_compiling: ContextVar[bool] = ContextVar("ramet_is_compiling", default=False)

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # Triton's interpreter has no assembler

    class _Kernel(triton.JITFunction):  # type: ignore[misc]  # Triton has no types
        """A kernel that is launched, or within `compiling` only compiled."""

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return super().run(*args, grid=grid, warmup=warmup or _is_compiling.get(), **options)

except ImportError:  # not Linux, or a CPU-only installation
    HAS_TRITON = False
    tl = IS_INTERPRETED = None


def jit(kernel: Callable[..., None]) -> Any:
    """Decorate a kernel: `kernel[grid](...)` launches it."""
    return jit_any_value()(kernel)


class _MissingKernel:
    """Raises at launch: kernels need Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Any:
        raise ImportError(f"the kernel {self._name} needs Triton: pip install 'ramet[gpu]' (Linux with an NVIDIA GPU)")


def jit_any_value(*names: str) -> Callable[[Callable[..., None]], Any]:
    """Decorate a kernel as `jit` does, but compile one binary for all values of its arguments `names`.

    For integers and addresses that change between launches: Triton otherwise compiles again for 1 and for multiples
    of 16.
    """
    if not HAS_TRITON:
        return lambda kernel: _MissingKernel(kernel.__name__)
    make = triton.jit if triton.knobs.runtime.interpret else _Kernel
    return lambda kernel: make(kernel, do_not_specialize=names)


@jit
def wait_for_previous():  # type: ignore[no-untyped-def]
    """In a kernel that is launched early (programmatic dependent launch, Hopper and later): let the next kernel start,
    and wait until the one before has ended and its results are visible. Only constants may be read earlier, and nothing
    may be written.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@contextmanager
def compiling(num_threads: int) -> Iterator[None]:
    """Within it, a kernel's launch from this thread starts to compile it on one of `num_threads` others, unless it is
    compiled, and launches nothing. All kernels are ready at the end. Raises what the compiler raises.
    """
    with ThreadPoolExecutor(num_threads) as threads, triton.AsyncCompileMode(threads):
        before = _is_compiling.set(True)
        try:
            yield
        finally:
            _is_compiling.reset(before)


def use_device(device: torch.device) -> None:
    """Make a GPU the current device of this thread: Triton launches on the current one, wherever its tensors are."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two >= value (at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def cdiv(value: int, divisor: int) -> int:
    """Return value / divisor rounded up."""
    return -(-value // divisor)

"""Triton if it is installed, otherwise a stand-in, so kernels can be defined beside their references.

The CPU path needs no Triton. Without Triton a kernel can be defined but not launched. With `TRITON_INTERPRET=1`, set
before the first kernel module is imported, launches on CPU tensors run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any  # kernels are compiled by Triton, which has no types of its own

__all__ = ["HAS_TRITON", "cdiv", "jit", "jit_any_value", "next_power_of_two", "tl"]

try:
    import triton
    import triton.language as tl

    jit: Callable[[Callable[..., None]], Any] = triton.jit
    HAS_TRITON = True
except ImportError:  # not Linux, or a CPU-only installation
    HAS_TRITON = False
    tl = None

    def jit(kernel: Callable[..., None]) -> Any:
        return _MissingKernel(kernel.__name__)


class _MissingKernel:
    """Raises at launch: kernels need Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Any:
        raise ImportError(f"the kernel {self._name} needs Triton: pip install 'ramet[gpu]' (Linux with an NVIDIA GPU)")


def jit_any_value(*names: str) -> Callable[[Callable[..., None]], Any]:
    """Decorate a kernel as `jit` does, but compile one binary for all values of its integer arguments `names`.

    For arguments that change between launches: Triton otherwise compiles again for 1 and for multiples of 16.
    """
    if not HAS_TRITON:
        return jit
    return lambda kernel: triton.jit(kernel, do_not_specialize=names)


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two >= value (at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def cdiv(value: int, divisor: int) -> int:
    """Return value / divisor rounded up."""
    return -(-value // divisor)

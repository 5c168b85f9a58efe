"""Divide a GPU's memory at start: weights, graphs and workspace first, the rest for KV pages.

This is arithmetic on numbers that a `MemoryReader` read or that were measured, so tests need no GPU. Not here:
measuring a step's peak (`factory.py`), the KV pages themselves (`kv_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ramet.errors import OutOfMemory

_LARGEST_FRACTION = 0.98
_MIN_PAGES = 64
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes of a device: total, free, reserved by torch's allocator, and allocated by it."""

    total: int
    free: int
    reserved: int
    allocated: int

    @property
    def used_by_others(self) -> int:
        """Bytes used by other processes and by the driver."""
        return self.total - self.free - self.reserved


MemoryReader = Callable[[torch.device], MemoryReading]


def read_cuda_memory(device: torch.device) -> MemoryReading:
    """Read a GPU's memory now."""
    free, total = torch.cuda.mem_get_info(device)
    return MemoryReading(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts of `total`, in bytes."""

    total: int
    weights: int
    kv: int
    graphs: int
    workspace: int
    others: int
    num_pages: int  # page 0 included

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "KV": self.kv,
            "graphs": self.graphs,
            "workspace": self.workspace,
            "others": self.others,
        }
        used = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items())
        unused = self.total - sum(parts.values())
        return f"{used}, unused {unused / _GIB:.2f} of {self.total / _GIB:.2f} GiB"


def plan_memory(
    reading: MemoryReading,
    *,
    workspace: int,
    graphs: int,
    fraction: float,
    page_bytes: int,
    num_pages: int | None = None,
) -> MemoryPlan:
    """Divide the memory of a device whose only tensors are the weights.

    workspace, graphs: bytes that steps need besides weights and KV, the peak of an eager one and all CUDA graphs.
    fraction: the part of the whole memory for weights, KV, graphs, workspace and other processes together.
    num_pages: the requested number, page 0 included; None takes as many as fit.
    Raises:
        OutOfMemory: the plan does not fit. The message names the flag and a value that fits.
    """
    fixed = reading.used_by_others + reading.allocated + graphs + workspace
    parts = (
        f"weights take {reading.allocated / _GIB:.1f} GiB of {reading.total / _GIB:.1f}, a step's workspace "
        f"{workspace / _GIB:.1f}, graphs {graphs / _GIB:.1f}, others {reading.used_by_others / _GIB:.1f}"
    )

    def way_out(fraction: float) -> str:
        needed = (fixed + _MIN_PAGES * page_bytes) / reading.total + 0.005
        if fraction < needed <= _LARGEST_FRACTION:
            return f"raise --mem-fraction-static from {fraction} to at least {needed:.2f}"
        if needed - workspace / 2 / reading.total <= _LARGEST_FRACTION:
            return "halve --chunked-prefill-size, which the workspace grows with"
        if needed - graphs / reading.total <= _LARGEST_FRACTION:
            return "leave out the graphs with --no-cuda-graph"
        return "take a smaller model or a larger GPU"

    if num_pages is None:
        fits = (int(reading.total * fraction) - fixed) // page_bytes
        if fits < _MIN_PAGES:
            raise OutOfMemory(f"no room for the KV pool: {parts}; {way_out(fraction)}")
        num_pages = fits + 1
    else:
        fits = (int(reading.total * _LARGEST_FRACTION) - fixed) // page_bytes
        if num_pages > fits:
            raise OutOfMemory(
                f"a KV pool of {num_pages * page_bytes / _GIB:.1f} GiB does not fit: {parts}; "
                + (
                    f"lower --num-kv-tokens, of which at most {100 * max(fits - 1, 0) / (num_pages - 1):.0f} % fit"
                    if fits > _MIN_PAGES
                    else way_out(_LARGEST_FRACTION)
                )
            )
    return MemoryPlan(
        total=reading.total,
        weights=reading.allocated,
        kv=num_pages * page_bytes,
        graphs=graphs,
        workspace=workspace,
        others=reading.used_by_others,
        num_pages=num_pages,
    )


def logits_bytes(max_running: int, vocab_size: int) -> int:
    """Bytes of sampling in the step that needs most, one that the host edits: every slot's logits in fp32, twice."""
    return 2 * 4 * max_running * vocab_size


def lower_fraction(fraction: float, plan: MemoryPlan) -> str:
    """The advice when a device ran out of memory at start despite the plan: leave twice the steps' share free."""
    lower = fraction - max((plan.graphs + plan.workspace) / plan.total, 0.02)
    if lower < 0.1:
        return f"the plan was: {plan}; free memory on the GPU, or lower --max-running-requests"
    return f"the plan was: {plan}; lower --mem-fraction-static from {fraction} to {lower:.2f}"

"""Many kernels as one parallel region: what a CUDA graph is to a GPU.

At small batches a decode step of a small model is some hundred kernels of a few microseconds, and calling each from
Python costs as much again. `Program.record` runs a function in which kernels only note their arguments, `run` then
walks that list on all threads, with a barrier between two kernels. As with a CUDA graph, addresses and shapes are those
of the recording: inputs are static tensors that the caller writes before each run. A torch operation that computes
anything cannot be recorded, and is refused rather than lost.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ramet.kernels.cpu.threads import Kernel, barrier, parallel, recording, thread_count
from ramet.kernels.cpu.vectors import intrinsic


class NotRecordableError(Exception):
    """A function computes something outside kernels, so it has to run as it is."""


class Pool:
    """Memory of recorded tensors, shared by programs of which no two run at once.

    A block is free again when the tensors in it are gone: a recording frees and reuses memory as its function did.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float32]] = []

    def empty(self, shape: Sequence[int]) -> Tensor:
        """An fp32 tensor of this shape."""
        size = int(np.prod(shape))
        block = None
        for candidate in self._blocks:
            # Referred to by the list, by `candidate` and by the count's own argument, but by no tensor.
            if size <= candidate.size <= 2 * size and sys.getrefcount(candidate) == 3:
                block = candidate
                break
        if block is None:
            block = np.empty(1 << max(size - 1, 0).bit_length(), np.float32)
            self._blocks.append(block)
        return torch.from_numpy(block)[:size].view(*shape)


class Program:
    """Recorded kernel calls."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool  # whose memory the calls use
        self._calls: list[tuple[Kernel, NDArray[np.int64]]] = []
        self._table = np.zeros(0, np.int64)
        self._arguments = np.zeros(2, np.int64)

    @classmethod
    def record(cls, function: Callable[[], Tensor], pool: Pool) -> tuple[Program, Tensor]:
        """Run `function` without its kernels; returns the program and the tensor that it fills.

        What the calls read and write must outlive the program, except what `empty` gave. The result holds until the
        next run of any program of this pool. Raises: NotRecordableError.
        """
        program = cls(pool)
        with _recording(program, pool), _ViewsOnly():  # type: ignore[no-untyped-call]
            result = function()
        table = [(kernel.address, arguments.ctypes.data) for kernel, arguments in program._calls]
        program._table = np.array(table, np.int64).reshape(-1)
        program._arguments = np.array([program._table.ctypes.data, len(table)], np.int64)
        return program, _unowned(result)

    def run(self) -> None:
        """Make the calls, on torch's threads."""
        parallel(_walk.address, self._arguments, thread_count())


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU for a kernel's result: in fp32, from the pool while a program is being recorded."""
    pool: Pool | None = getattr(recording, "pool", None)
    return torch.empty(shape, dtype=dtype) if pool is None or dtype is not torch.float32 else pool.empty(shape)


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory, which stays free for others: the largest result would be kept once a program."""
    values = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return torch.from_numpy(np.ctypeslib.as_array(values)).view(tensor.shape)


@contextmanager
def _recording(program: Program, pool: Pool) -> Iterator[None]:
    recording.record, recording.pool = lambda *call: program._calls.append(call), pool
    try:
        yield
    finally:
        recording.record = recording.pool = None


class _ViewsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses torch operations whose results are not views of their arguments."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes a second, in the middle of a step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable or any(leaf.untyped_storage().data_ptr() not in sources for leaf in results):
            raise NotRecordableError(str(func))
        return result


# ---- Compiled part ----


@intrinsic
def _call(typing_context: Any, kernel: Any, arguments: Any) -> Any:
    """Call a kernel by its address."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.IntType(64).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(values[0], kind), [builder.inttoptr(values[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _int64_at(typing_context: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), emit


@Kernel
def _walk(pointer: Any) -> None:  # Any: int64*
    """Pairs of a kernel's address and its arguments', one after another."""
    a = carray(pointer, 2)
    calls = carray(_int64_at(a[0]), (2 * a[1],))
    for i in range(a[1]):
        _call(calls[2 * i], calls[2 * i + 1])
        barrier()

"""Run many kernels as one parallel region: the CPU's counterpart of a CUDA graph.

At small batches a decode step of a small model is some hundred kernels of a few microseconds each, and calling them
from Python takes as long again. A model's kernels go through its `KernelStream`. Its `record` runs a function in which
kernels only store their arguments, and returns a `Program`. The program runs this list on all threads, with a barrier
after each kernel. As in a CUDA graph, addresses and shapes are fixed: inputs are static tensors that the caller writes
before each run. A torch operation that computes a value cannot be recorded; it raises an error.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ramet.kernels.cpu.threads import Kernel, barrier, parallel, thread_count
from ramet.kernels.cpu.vectors import intrinsic
from ramet.kernels.ops import NotRecordableError


class Pool:
    """Memory of recorded tensors, shared by programs that never run at the same time.

    A block is free again when its tensors are deleted, so a recording frees and reuses memory as its function did.
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
    """Recorded kernel calls. `result`: the recorded function's return value. It is valid until a program of the same
    pool runs."""

    def __init__(self, calls: Sequence[tuple[Kernel, NDArray[np.int64]]], result: Tensor, pool: Pool) -> None:
        self.result = _unowned(result)
        self._kept = calls, pool  # the arguments, and the memory that they point to
        self._table = np.array([(kernel.address, a.ctypes.data) for kernel, a in calls], np.int64).reshape(-1)
        self._arguments = np.array([self._table.ctypes.data, len(calls)], np.int64)

    def run(self) -> None:
        """Run the calls on torch's threads."""
        parallel(_walk.address, self._arguments, thread_count())


class KernelStream(threading.local):
    """Launches a model's kernels on the CPU: at once, or into a recording if the calling thread records.

    Each thread has its own state, so two engines may share a model.
    """

    _calls: list[tuple[Kernel, NDArray[np.int64]]] | None = None
    _pool: Pool | None = None

    def launch(self, kernel: Kernel, *arguments: int, threads: int) -> None:
        """Call a kernel, or record the call."""
        if self._calls is None:
            kernel(*arguments, threads=threads)
        else:
            self._calls.append((kernel, np.array(arguments, np.int64)))

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor for a kernel's result. While the calling thread records, it is fp32 and from the pool."""
        if self._pool is None or dtype is not torch.float32:
            return torch.empty(shape, dtype=dtype)
        return self._pool.empty(shape)

    def record(self, function: Callable[[], Tensor], pool: Pool) -> Program:
        """Run `function` without running its kernels, and return them as a program.

        Memory that the calls read and write must outlive the program, except tensors from `empty`. Raises:
        NotRecordableError.
        """
        calls = self._calls = []
        self._pool = pool
        try:
            with _ViewsOnly():  # type: ignore[no-untyped-call]
                result = function()
        finally:
            self._calls = self._pool = None
        return Program(calls, result, pool)


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory without ownership, so it stays free: otherwise every program would keep its largest result."""
    values = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return torch.from_numpy(np.ctypeslib.as_array(values)).view(tensor.shape)


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
    """Run a list of pairs: a kernel's address and the address of its arguments."""
    a = carray(pointer, 2)
    calls = carray(_int64_at(a[0]), (2 * a[1],))
    for i in range(a[1]):
        _call(calls[2 * i], calls[2 * i + 1])
        barrier()

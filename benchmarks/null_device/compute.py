"""Computes what kernels of the null device would, slowly: torch's operations on the CPU, on the device's memory, and
Triton's kernels in its interpreter.

Imported before torch is used (`run --compute` sees to it). A captured graph keeps its operations with their addresses
and Python values, as a real one keeps its kernels, and a replay runs them. So a graph that reads memory of somebody
else, or that holds a value of the step in which it was captured, gives wrong results here, too. Not here: what runs at
the same time as something else; every operation ends before the next begins.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any  # torch's and Triton's own arguments

import torch
from rehearsal import interpret
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

# These compute nothing.
_NO_VALUES = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "record_stream", "set_", "resize_",
        "_pin_memory", "is_pinned",
    )
)  # fmt: skip
# The host waits for these; the others of a step do not depend on values.
_READ_BY_HOST = frozenset(("aten::_local_scalar_dense", "aten::equal"))
_SIZED_BY_VALUES = frozenset(("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"))

_lock = threading.RLock()  # the interpreter computes for one thread at a time
_capture = threading.local()


def on_cpu(value: Any) -> Any:
    """A CPU tensor on a device tensor's memory; other values as they are."""
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage, result = value.untyped_storage(), torch.empty(0, dtype=value.dtype)
    if not storage.nbytes():
        return result.reshape(value.shape)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return result.set_(same, value.storage_offset(), value.shape, value.stride())


def run_or_record(operation: Callable[[], object]) -> None:
    recorded = getattr(_capture, "operations", None)
    if recorded is not None:
        recorded.append(operation)
        return
    with _lock, _disable_current_modes():
        operation()


class OnCpu(TorchDispatchMode):
    """Runs each operation on the device, which allocates its results, and then again on the CPU, on the same memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        is_here = device is not None and torch.device(device).type == "cuda"
        if not is_here and all(tensor.device.type != "cuda" for tensor in tensors):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if name in _NO_VALUES or func.is_view:
            return func(*args, **kwargs)
        is_sized = name in _SIZED_BY_VALUES or (
            name == "aten::index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        )
        if name in _READ_BY_HOST or is_sized:
            if getattr(_capture, "operations", None) is not None:
                raise RuntimeError(f"{name} makes the host wait for the device, which no graph can hold")
            return (
                tree_map(_on_device, func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)))
                if is_sized
                else func(*tree_map(on_cpu, args))
            )
        result = func(*args, **kwargs)
        cpu_args, cpu_kwargs = tree_map(on_cpu, (args, kwargs))
        if device is not None:
            cpu_kwargs["device"] = torch.device("cpu")
        cpu_kwargs.pop("pin_memory", None)
        targets = [on_cpu(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

        def compute() -> None:
            computed = func(*cpu_args, **cpu_kwargs)
            if not func._schema.is_mutable:  # otherwise it wrote to its arguments
                leaves = (leaf for leaf in tree_leaves(computed) if isinstance(leaf, Tensor))
                for target, leaf in zip(targets, leaves, strict=True):
                    target.copy_(leaf)

        run_or_record(compute)
        return result


def _on_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    result = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    on_cpu(result).copy_(value)
    return result


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph. The real one is captured, too, and checks what a capture forbids."""

    def __init__(self) -> None:
        self._real = _REAL_GRAPH()
        self._operations: list[Callable[[], object]] = []

    def capture_begin(self, **options: Any) -> None:
        self._real.capture_begin(**options)
        _capture.operations = self._operations

    def capture_end(self) -> None:
        _capture.operations = None
        self._real.capture_end()

    def replay(self) -> None:
        self._real.replay()
        with _lock, _disable_current_modes():
            for operation in self._operations:
                operation()


_REAL_GRAPH = torch.cuda.CUDAGraph
_interpret = interpreter.GridExecutor.__call__
_run_thread = threading.Thread.run


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    support = sys.modules.get("ramet.kernels.triton_support")
    if support is not None and support._is_compiling.get():
        return  # within `compiling` kernels are not launched
    with _disable_current_modes():
        args, kwargs = tuple(map(on_cpu, args)), {name: on_cpu(value) for name, value in kwargs.items()}
    run_or_record(lambda: _interpret(self, *args, **kwargs))


def _run_computing(self: threading.Thread) -> None:
    with OnCpu():
        _run_thread(self)


def install() -> None:
    """Compute from now on, in this thread and in those that begin later."""
    interpret()
    interpreter.GridExecutor.__call__ = _launch
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)  # they are on the host
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    torch.cuda.CUDAGraph = RecordedGraph  # type: ignore[assignment, misc]
    threading.Thread.run = _run_computing  # type: ignore[method-assign]
    OnCpu().__enter__()

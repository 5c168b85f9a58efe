"""A GPU that computes nothing, for walking through the engine's GPU path on a machine without one.

Tensors on it are torch's fake ones: they have a device, a shape and a dtype, and no values. So what a card refuses is
refused here, too: operands on two devices, reading a value back to the host (DataDependentOutputException), an array of
the host given to a kernel. Triton's launches are compiled for the card, or only noted. Besides, it notes what a card
would do silently and slowly: copies that the host waits for, and kernel variants first met after the start. Its memory
is counted as torch's allocator does it, but without fragments: an allocation beyond it fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import jit

from ramet.runtime.engine import core
from ramet.runtime.engine.sizing import ASSUMED_BYTES, CARDS

DEVICE = torch.device("cuda", 1)  # not the one that is current at first
TOTAL_BYTES = CARDS["h100"].total
GRAPH_BYTES = 8 << 20  # the driver's part of a CUDA graph; assumed
GRAMMARS = "ramet-grammar"  # the name of the threads that bring grammars to the device
READ_BACK = "values that are read back"
_CUDA, _META = 1, 14  # of c10::DeviceType


@dataclass
class Pointer:
    """What Triton asks of a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Memory:
    """The device's memory in bytes: held by tensors, reserved by torch's allocator, and the largest of both so far."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = self.high_water = 0
        self._graphs: dict[int, int] = {}  # what each live CUDA graph took; they share a pool, where the largest fits
        self._num_driver = 0
        self._seen: set[int] = set()
        self._before_capture = 0

    @property
    def free(self) -> int:
        return TOTAL_BYTES - ASSUMED_BYTES["driver"] - self.reserved - self._num_driver * GRAPH_BYTES

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed. Raises torch.OutOfMemoryError."""
        key = storage._cdata
        if key in self._seen:
            return
        num_bytes = -(-storage.nbytes() // 512) * 512
        if num_bytes - (self.reserved - self.allocated) > self.free:
            raise torch.OutOfMemoryError(f"{num_bytes:,} bytes asked for, {self.free:,} are free, {self}")
        self._seen.add(key)
        self.allocated += num_bytes
        self._note()
        weakref.finalize(storage, self._release, key, num_bytes)

    def _release(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.allocated -= num_bytes

    def _note(self) -> None:
        self.reserved = max(self.reserved, self.allocated)
        self.peak, self.high_water = max(self.peak, self.allocated), max(self.high_water, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def begin_capture(self) -> None:
        self._before_capture, self.peak = self.allocated, self.allocated

    def end_capture(self, graph: Graph) -> None:
        """Keep what the steps of a graph had in use: no tensor frees it."""
        pool = max(self._graphs.values(), default=0)
        self._graphs[id(graph)] = max(self.peak - self._before_capture, 0)
        self.allocated += max(self._graphs.values()) - pool
        self._num_driver += 1
        self._note()
        weakref.finalize(graph, self._drop, id(graph))

    def _drop(self, graph: int) -> None:
        pool = max(self._graphs.values())
        del self._graphs[graph]
        self.allocated += max(self._graphs.values(), default=0) - pool
        self._num_driver -= 1

    def __str__(self) -> str:
        parts = {"allocated": self.allocated, "reserved": self.reserved, "at most": self.high_water}
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + " GiB"


@dataclass
class FakeDevice:
    """What was launched and what was found, by phase: "start" until somebody says otherwise."""

    compiles: bool
    phase: str = "start"
    is_capturing: bool = False
    pinned: set[int] = field(default_factory=set)
    variants: dict[tuple[Any, ...], str] = field(default_factory=dict)  # -> phase of its first launch
    alone: list[str] = field(default_factory=list)  # kernels of variants that a launch compiled while it waited
    launches: dict[str, int] = field(default_factory=dict)  # by phase; not those of replays
    replays: int = 0
    waits: dict[tuple[str, str], int] = field(default_factory=dict)  # (phase, what the host waits for)
    kernels: dict[str, Any] = field(default_factory=dict)  # compiled, by hash
    memory: Memory = field(default_factory=lambda: Memory())
    current: threading.local = field(default_factory=threading.local)  # index: of this thread's current device

    def note_wait(self, what: str) -> None:
        assert not self.is_capturing, f"{what} inside a capture"
        if threading.current_thread().name == GRAMMARS:  # no step waits for it
            return
        key = self.phase, what
        self.waits[key] = self.waits.get(key, 0) + 1

    def current_device(self) -> int:
        return getattr(self.current, "index", 0)

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        """Use a stream of the device, and with it the device, in this thread."""
        before, self.current.index = self.current_device(), DEVICE.index
        yield
        self.current.index = before

    def late_variants(self) -> list[tuple[str, str]]:
        """Phases and kernels that were first launched after the start: they compile while requests wait."""
        return sorted({(phase, key[0]) for key, phase in self.variants.items() if phase != "start"})

    def launch(self, run: Callable[..., Any], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.launches[self.phase] = self.launches.get(self.phase, 0) + 1
        assert self.current_device() == DEVICE.index, f"{kernel.fn.__name__}: launched on another device"
        assert all(size > 0 for size in options["grid"]), f"{kernel.fn.__name__}: an empty grid"
        assert all(size < 65_536 for size in options["grid"][1:]), f"{kernel.fn.__name__}: a grid too large"
        replaced = [self.pointer(kernel, value) for value in args]
        named = {name: self.pointer(kernel, value) for name, value in options.items()}
        key = self.key_of(kernel, replaced, named)
        if key not in self.variants:
            self.variants[key] = self.phase
            if not options["warmup"]:
                self.alone.append(kernel.fn.__name__)
            if self.compiles:
                named.pop("warmup", None)
                compiled = run(kernel, *replaced, warmup=True, **named)
                compiled = compiled.result() if hasattr(compiled, "result") else compiled
                self.kernels[compiled.hash] = (kernel.fn.__name__, compiled)
        return None

    def pointer(self, kernel: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert value.device == DEVICE, f"{kernel.fn.__name__}: a tensor on {value.device}"
        return Pointer(value.dtype, 512 + value.storage_offset() * value.element_size())

    def key_of(self, kernel: Any, args: list[Any], options: dict[str, Any]) -> tuple[str, str, str]:
        """What Triton itself compiles anew for: types, alignment, special integers, constants, options."""
        bind = kernel.device_caches[0][-1]
        _, specialization, rest = bind(*args, **{name: options[name] for name in options.keys() - {"grid", "warmup"}})
        return kernel.fn.__name__, str(specialization), str(sorted(rest.items()))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the copies that a host would wait for."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.device == DEVICE:
                self.device.memory.hold(made.untyped_storage())
        if name in ("aten::_to_copy", "aten::to", "aten::copy_"):
            target, source = (result, args[0]) if name != "aten::copy_" else args[:2]
            if source.device != target.device:
                if not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])):
                    self.device.note_wait(f"a copy {source.device.type} -> {target.device.type}")
                host = source if source.device.type == "cpu" else target
                if host.untyped_storage()._cdata not in self.device.pinned and host.dim():
                    self.device.note_wait(f"a copy {source.device.type} -> {target.device.type}, not pinned")
        return result


class Valueless(FakeTensorMode):
    """Fake tensors whose constants, which the host may read back, do not travel to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_to_copy", "aten::to") and isinstance(args[0], FakeTensor):
            args[0].constant = None
        return super().__torch_dispatch__(func, types, args, kwargs)


class Graph:
    """A CUDA graph; a replay computes nothing."""

    device: FakeDevice

    def capture_begin(self, **options: Any) -> None:
        assert not self.device.is_capturing
        assert self.device.phase == "start", "a capture while requests run"
        self.device.is_capturing = True
        self.device.memory.begin_capture()

    def capture_end(self) -> None:
        self.device.is_capturing = False
        self.device.memory.end_capture(self)

    def replay(self) -> None:
        self.device.replays += 1


class Event:
    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def fake_device(*, compiles: bool, capability: int = 90) -> Iterator[FakeDevice]:
    """While it is entered, `DEVICE` exists, Triton compiles for `capability`, and every tensor is a fake one."""
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[_CUDA] is None, "this torch has CUDA: use it"
    guards[_CUDA] = guards[_META]  # a guard that does nothing: indexing asks for one
    device = FakeDevice(compiles)
    graph = type("Graph", (Graph,), {"device": device})
    launch_for_real = jit.JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        return device.launch(launch_for_real, self, args, options)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        device.pinned.add(copy.untyped_storage()._cdata)
        return copy

    empty, zeros = torch.empty, torch.zeros

    def pinnable(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_pinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            if pin_memory:
                device.pinned.add(tensor.untyped_storage()._cdata)
            return tensor

        return make_pinned

    def numpy(tensor: torch.Tensor) -> NDArray[Any]:
        assert tensor.device.type == "cpu", "numpy() of what is on the device"
        return np.zeros(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "cpu":
            device.note_wait(READ_BACK)
        return np.arange(tensor.numel()).reshape(tensor.shape).tolist()

    tensor = torch.tensor

    def make_tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    nothing = lambda *args, **options: None  # noqa: E731
    stream = SimpleNamespace(synchronize=lambda: device.note_wait("a stream"), wait_stream=nothing, cuda_stream=0)
    cuda = {
        "is_available": lambda: True,
        "set_device": lambda chosen: setattr(device.current, "index", torch.device(chosen).index),
        "current_device": device.current_device,
        "synchronize": lambda *args: device.note_wait("the device"),
        "Stream": lambda *args, **options: stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": device.stream,
        "Event": Event,
        "CUDAGraph": graph,
        "graph_pool_handle": lambda: (0, 0),
        "mem_get_info": lambda *args: (device.memory.free, TOTAL_BYTES),
        "memory_allocated": lambda *args: device.memory.allocated,
        "memory_reserved": lambda *args: device.memory.reserved,
        "max_memory_allocated": lambda *args: device.memory.peak,
        "reset_peak_memory_stats": lambda *args: setattr(device.memory, "peak", device.memory.allocated),
        "empty_cache": device.memory.empty_cache,
        "get_device_properties": lambda *args: SimpleNamespace(
            multi_processor_count=132, name="NVIDIA H100", total_memory=TOTAL_BYTES
        ),
        "get_device_name": lambda *args: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda *args: divmod(capability, 10),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: guards.__setitem__(_CUDA, None))
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", numpy))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(mock.patch.object(torch, "tensor", make_tensor))
        stack.enter_context(mock.patch.object(torch, "empty", pinnable(empty)))
        stack.enter_context(mock.patch.object(torch, "zeros", pinnable(zeros)))
        modes = Valueless(allow_non_fake_inputs=False), Watch(device)
        for mode in modes:
            stack.enter_context(mode)
        work = threading.Thread.run

        def run_with_device(thread: threading.Thread) -> None:
            with contextlib.ExitStack() as entered:
                for mode in modes if thread.name == GRAMMARS else ():  # a mode is its thread's
                    entered.enter_context(mode)
                work(thread)

        stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_device))
        for name in ("_BESIDE_S", "_ALONE_S"):  # fake tensors are for one thread at a time: steps wait for the others
            stack.enter_context(mock.patch.object(core, name, 60.0))
        yield device


__all__ = ["DEVICE", "FakeDevice", "FakeTensor", "fake_device"]

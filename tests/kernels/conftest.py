"""Shared by the kernel tests: random paged caches, attention position by position, a watch over launches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.triton_support import HAS_TRITON


class AttentionCases:
    """What the attention tests share; the methods keep no state."""

    @staticmethod
    def paged_cache(
        kv_lens: list[int], num_kv_heads: int, head_dim: int, page_size: int = 16, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `k_cache, v_cache, page_table, rows`: pages in random order, page 0 spare, slots reversed."""
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-n // page_size) for n in kv_lens]
        num_pages = 1 + sum(counts)
        order = (1 + torch.randperm(num_pages - 1, generator=generator)).to(torch.int32)
        slots = len(kv_lens) + 1
        page_table = torch.zeros(slots, max(counts, default=1) + 2, dtype=torch.int32)
        rows = torch.arange(len(kv_lens), 0, -1, dtype=torch.int32)
        start = 0
        for b, count in enumerate(counts):
            page_table[int(rows[b]), :count] = order[start : start + count]
            start += count
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        k_cache, v_cache = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        return k_cache, v_cache, page_table, rows

    @staticmethod
    def poison_unused(k_cache: Tensor, v_cache: Tensor, page_table: Tensor, rows: Tensor, kv_lens: list[int]) -> None:
        """Write NaN wherever no sequence has a token: a kernel that reads it shows it."""
        unused = torch.ones(k_cache.shape[0], k_cache.shape[2], dtype=torch.bool)
        for row, kv_len in zip(rows.tolist(), kv_lens, strict=True):
            for j in range(kv_len):
                unused[page_table[row, j // k_cache.shape[2]], j % k_cache.shape[2]] = False
        for cache in (k_cache, v_cache):
            cache.transpose(1, 2)[unused] = torch.nan

    @staticmethod
    def naive_attention(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, position: int, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one token `q [H, D]` at `position`, in fp64, one head and one key at a time."""
        page_size = k_cache.shape[2]
        group = q.shape[0] // k_cache.shape[1]
        first = 0 if window is None else max(0, position - window + 1)
        seen = range(first, position + 1)
        out = torch.empty(q.shape, dtype=torch.float64)
        for head in range(q.shape[0]):
            at = [(int(pages[j // page_size]), head // group, j % page_size) for j in seen]
            keys = torch.stack([k_cache[a] for a in at]).double()
            values = torch.stack([v_cache[a] for a in at]).double()
            out[head] = torch.softmax(scale * (keys @ q[head].double()), 0) @ values
        return out


@pytest.fixture(scope="session")
def cases() -> AttentionCases:
    return AttentionCases()


class LaunchWatch:
    """Finds in Triton's interpreter what it hides by running a launch's programs one after the other.

    They run in a shuffled order, and what they access is noted. Wrong is an address outside of the arguments; one that
    two programs write; one that a program reads and another writes, unless that one writes it before an atomic
    operation and the other reads it after one; and one that a program reads again after a store without a barrier.
    """

    def __init__(self, builder: Any) -> None:  # Any: Triton has no types
        self.faults: list[str] = []
        self._builder = builder
        self._spans: list[tuple[int, int]] = []
        self._accesses: list[
            tuple[bool, int, int, int, NDArray[np.uint64]]
        ] = []  # is_store, program, barriers, atomics
        self._program = self._barriers = self._atomics = 0

    def patch(self, patch: pytest.MonkeyPatch, executor: Any) -> None:
        """Stand between the interpreter and its memory; `executor`: its class that runs a grid."""
        kind = type(self._builder)
        load, store, atomic = kind.create_masked_load, kind.create_masked_store, kind.create_atomic_rmw
        barrier, run, set_program = kind.create_barrier, executor.__call__, kind.set_grid_idx
        order: dict[tuple[int, ...], tuple[int, ...]] = {}

        def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(False, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(True, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def watched_atomic(builder: Any, *arguments: Any) -> Any:
            self._atomics += 1
            return atomic(builder, *arguments)

        def watched_barrier(builder: Any) -> Any:
            self._barriers += 1
            return barrier(builder)

        def shuffled(builder: Any, *program: int) -> None:
            if not order:
                programs = list(np.ndindex(*builder.grid_dim))
                order.update(zip(programs, random.Random(0).sample(programs, len(programs)), strict=True))
            self._program, self._barriers, self._atomics = self._program + 1, 0, 0
            set_program(builder, *order[program])

        def watched_run(launch: Any, *arguments: Any, **keywords: Any) -> None:
            order.clear()
            self._accesses = []
            given = [t for t in [*arguments, *keywords.values()] if isinstance(t, Tensor) and t.numel()]
            self._spans = [(t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()) for t in given]
            run(launch, *arguments, **keywords)
            self._check(launch.fn.__name__)

        patch.setattr(kind, "create_masked_load", watched_load)
        patch.setattr(kind, "create_masked_store", watched_store)
        patch.setattr(kind, "create_atomic_rmw", watched_atomic)
        patch.setattr(kind, "create_barrier", watched_barrier)
        patch.setattr(kind, "set_grid_idx", shuffled)
        patch.setattr(executor, "__call__", watched_run)

    def _note(self, is_store: bool, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.broadcast_to(mask.data, pointers.data.shape)].ravel()
        if addresses.size:
            self._accesses.append((is_store, self._program, self._barriers, self._atomics, np.unique(addresses)))

    def _check(self, kernel: str) -> None:
        stores: dict[int, tuple[int, int, int, int]] = {}  # by address: when, program, barriers, atomics
        for when, (is_store, program, barriers, atomics, addresses) in enumerate(self._accesses):
            inside = np.zeros(addresses.shape, dtype=np.bool_)
            for first, last in self._spans:
                inside |= (addresses >= first) & (addresses <= last)
            if not inside.all():
                self.faults.append(f"{kernel}: an address outside of the arguments")
            for address in addresses.tolist() if is_store else ():
                if address in stores and stores[address][1] != program:
                    self.faults.append(f"{kernel}: two programs write one address")
                stores[address] = when, program, barriers, atomics
        stored = np.sort(np.fromiter(stores, dtype=np.uint64, count=len(stores)))
        for when, (is_store, program, barriers, atomics, addresses) in enumerate(self._accesses):
            for address in [] if is_store else np.intersect1d(addresses, stored, assume_unique=True).tolist():
                store_when, writer, barriers_then, atomics_then = stores[address]
                if writer != program and not (atomics_then == 0 and atomics > 0):
                    self.faults.append(f"{kernel}: a program reads what another one writes")
                if writer == program and store_when < when and barriers_then == barriers:
                    self.faults.append(f"{kernel}: a program reads what it wrote without a barrier between")


def extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@pytest.fixture(autouse=True)
def launch_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[LaunchWatch | None]:
    """Fails a test at whose end a launch has broken a rule of `LaunchWatch`; None where kernels run on a GPU."""
    if not HAS_TRITON or torch.cuda.is_available():
        yield None
        return
    from triton.runtime import interpreter

    watch = LaunchWatch(interpreter.interpreter_builder)
    watch.patch(monkeypatch, interpreter.GridExecutor)
    yield watch
    assert not watch.faults, sorted(set(watch.faults))


@pytest.fixture
def dots_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's `tl.dot` add each element's products in one order, as a card's does.

    It is a product of numpy otherwise, and some BLAS kernels add in another order for the last rows of a matrix.
    """
    if not HAS_TRITON or torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    class Numpy:
        """numpy, but for matrix products."""

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def matmul(a: NDArray[Any], b: NDArray[Any], dtype: Any = None) -> NDArray[Any]:
            products: NDArray[Any] = a[..., :, :, None] * b[..., None, :, :]
            return np.sum(products, axis=-2, dtype=dtype)  # type: ignore[no-any-return]

    monkeypatch.setattr(interpreter, "np", Numpy())

"""Steps as CUDA graphs: one for each batch bucket of decode steps, one for each pair of buckets with short prompts.

A decode graph covers everything from the embedding to the sampled token and the new lengths. A replay costs the host
one copy of `[2, bucket]` integers (slots, new pages) and one launch. A mixed graph holds a bucket of tokens: those of
its decode rows, directly followed by the new ones. Its integers are copied as one block. Buffers are static. The graphs
share one memory pool, because no two of them run at once. Not here: long prompts and rows that the host must edit;
these run eagerly.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.slots.tables import DecodeInputs
from ramet.runtime.steps.inputs import ExtendArrays

# Token buckets of mixed graphs. Products also compute the padding, and larger steps take longer than their launches, so
# they gain nothing from a graph. A turn of 128 tokens has 129 new ones: the last generated token is computed with them.
MIXED_TOKENS = (16, 32, 64, 96, 144, 192, 256, 320, 384, 512)
MIXED_ROWS = (0, 8, 32, 64, 128, 256)  # decode rows, for which only attention is launched: empty programs cost little
_MAX_EXTENDS = 64  # sequences that have new tokens in a mixed graph


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: dense for small batches, and padding large ones by at most an eighth."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, max_batch + 1, 64)]
    return [*(size for size in sizes if size < max_batch), max_batch]


class GraphCapture(Protocol):
    """Records the kernels that a function launches. The result launches them again, on the same addresses."""

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]: ...


def run_once(body: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a capture where a body is only to run now."""
    body()
    return body


class CudaCapture:
    """Captures CUDA graphs into one memory pool, on one side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Not torch.cuda.graph: it collects garbage and empties the allocator's cache each time.
        with torch.cuda.stream(self._stream), no_garbage_collection():
            body()  # compiles kernels, and makes this stream's library handles and workspaces: a capture must not
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(self._device)
        return graph.replay


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection inside: it may destroy another engine's graphs, which is an error during a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class DecodeBuffers:
    """Static tensors of one bucket: `step_input` int32 [2, B] (slots, new pages), and the step's outputs."""

    step_input: Tensor
    inputs: DecodeInputs
    tokens: Tensor  # int32 [B]

    @property
    def rows(self) -> Tensor:
        return self.step_input[0]

    @property
    def new_pages(self) -> Tensor:
        return self.step_input[1]


@dataclass(frozen=True, slots=True)
class GraphKey:
    bucket: int
    uses_tree: bool


@dataclass(frozen=True, slots=True)
class MixedKey:
    num_decode: int  # decode rows, padded; no more than tokens
    num_tokens: int  # all tokens, padded
    uses_tree: bool

    @property
    def num_extends(self) -> int:
        """Maximum number of sequences with new tokens."""
        return min(self.num_tokens, _MAX_EXTENDS)

    @property
    def num_samples(self) -> int:
        return min(self.num_decode + self.num_extends, self.num_tokens)


class MixedBuffers:
    """Static tensors of one mixed graph, int32, in one block; `sections` names the parts and their sizes.

    rows, new_pages [B]; token_ids, positions, kv_slots [T]; cu_seqlens [E + 1]; kv_lens, extend_rows [E];
    sample_index, sample_rows, sample_positions [S]. Padding is harmless: the dummy slot, page 0, no tokens.

        tokens    [0, n) decode rows, filled in by the step    [n, n + new) prompts    [n + new, T) padding

    Decode attention runs on the first B tokens, and its results in [n, B) are meaningless. The attention of prompts
    then runs on tokens from cu_seqlens[0] = n on, and overwrites these results.
    """

    def __init__(self, key: MixedKey, dummy_slot: int, device: torch.device) -> None:
        self.key = key
        batch, num_tokens, extends, samples = key.num_decode, key.num_tokens, key.num_extends, key.num_samples
        sizes = {
            "rows": batch, "new_pages": batch, "token_ids": num_tokens, "positions": num_tokens,
            "kv_slots": num_tokens, "cu_seqlens": extends + 1, "kv_lens": extends, "extend_rows": extends,
            "sample_index": samples, "sample_rows": samples, "sample_positions": samples,
        }  # fmt: skip
        self._padding = {"rows": dummy_slot, "sample_rows": dummy_slot, "extend_rows": dummy_slot}
        self.sections: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.sections[name] = slice(end, end + size)
            end += -(-size // 32) * 32  # 128 bytes: kernels compiled for aligned pointers serve every section
        self.block = torch.zeros(end, dtype=torch.int32, device=device)
        kv_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.inputs = DecodeInputs(self.part("token_ids"), self.part("positions"), self.part("kv_slots"), kv_lens)
        self.tokens = torch.zeros(samples, dtype=torch.int32, device=device)
        self.block.copy_(torch.from_numpy(self.pack({})))

    def part(self, name: str) -> Tensor:
        return self.block[self.sections[name]]

    def pack(self, values: dict[str, NDArray[np.int32]], num_decode: int = 0) -> NDArray[np.int32]:
        """Return the block with `values` at the start of their sections; those of new tokens start at `num_decode`.

        cu_seqlens is padded with its last value.
        """
        packed = np.zeros(self.block.shape[0], dtype=np.int32)
        for name, filler in self._padding.items():
            packed[self.sections[name]] = filler
        for name, value in values.items():
            start, stop = self.sections[name].start, self.sections[name].stop
            if name in ("token_ids", "positions", "kv_slots"):
                start += num_decode
            assert len(value) <= stop - start, (name, len(value))
            packed[start : start + len(value)] = value
            if name == "cu_seqlens":
                packed[start + len(value) : stop] = value[-1]
        return packed


DecodeBody = Callable[[GraphKey, DecodeBuffers], None]
MixedBody = Callable[[MixedKey, MixedBuffers], None]


class StepGraphs:
    """Captures the graph of each key when it is first needed, or ahead of time by `capture`."""

    def __init__(
        self,
        decode_body: DecodeBody,
        mixed_body: MixedBody,
        max_batch: int,
        dummy_slot: int,
        device: torch.device,
        *,
        max_extend: int,
        capture: GraphCapture | None = None,
    ) -> None:
        """max_extend: maximum tokens of a captured step with prompts; 0 captures decode graphs only."""
        self.buckets = decode_buckets(max_batch)
        self.mixed_rows = [*(n for n in MIXED_ROWS if n < max_batch), max_batch]
        self.mixed_tokens = [n for n in MIXED_TOKENS if n <= max_extend]
        self._decode_body, self._mixed_body = decode_body, mixed_body
        self._dummy_slot = dummy_slot
        self._device = device
        self._capture = CudaCapture(device) if capture is None else capture
        self._decode: dict[GraphKey, tuple[Callable[[], None], DecodeBuffers]] = {}
        self._mixed: dict[MixedKey, tuple[Callable[[], None], MixedBuffers]] = {}

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a graph, padding included."""
        return max(self.buckets[-1], *self.mixed_tokens, 0)

    def keys(self, *, with_tree: bool) -> list[GraphKey | MixedKey]:
        """Every graph of overlapped steps, the largest first: the smaller ones reuse its memory."""
        keys: list[GraphKey | MixedKey] = []
        for uses_tree in (False, True) if with_tree else (False,):
            for num_tokens in reversed(self.mixed_tokens):
                rows = sorted({min(n, num_tokens) for n in self.mixed_rows}, reverse=True)
                keys += [MixedKey(n, num_tokens, uses_tree) for n in rows if n > 1 or not uses_tree]
            keys += [GraphKey(n, uses_tree) for n in reversed(self.buckets) if n > 1 or not uses_tree]
        return keys

    def capture(self, keys: Sequence[GraphKey | MixedKey]) -> None:
        """Capture these graphs now."""
        for key in keys:
            if isinstance(key, MixedKey):
                self._mixed_graph(key)
            else:
                self._decode_graph(key)

    def replay(self, rows: NDArray[np.int32], new_pages: NDArray[np.int32], *, uses_tree: bool) -> Tensor:
        """Run the decode step of these rows. Returns the sampled tokens, int32 [B]."""
        count = len(rows)
        key = GraphKey(self.buckets[bisect.bisect_left(self.buckets, count)], uses_tree)
        run, buffers = self._decode_graph(key)
        packed = np.zeros((2, key.bucket), dtype=np.int32)
        packed[0, :count] = rows
        packed[0, count:] = self._dummy_slot
        packed[1, :count] = new_pages
        self._send(packed, buffers.step_input)
        run()
        return buffers.tokens[:count]

    def mixed_key(self, num_decode: int, num_new: int, num_extends: int, *, uses_tree: bool) -> MixedKey | None:
        """The graph for `num_decode` rows and `num_new` tokens of `num_extends` prompts; None: run the step eagerly."""
        num_tokens = num_decode + num_new
        if not self.mixed_tokens or num_tokens > self.mixed_tokens[-1]:
            return None
        num_tokens = self.mixed_tokens[bisect.bisect_left(self.mixed_tokens, num_tokens)]
        rows = min(self.mixed_rows[bisect.bisect_left(self.mixed_rows, num_decode)], num_tokens)
        key = MixedKey(rows, num_tokens, uses_tree)
        return key if num_extends <= key.num_extends else None

    def replay_mixed(
        self, key: MixedKey, rows: NDArray[np.int32], new_pages: NDArray[np.int32], arrays: ExtendArrays
    ) -> Tensor:
        """Run a mixed step whose slot-table updates were already sent. Returns the sampled tokens, int32 [R]."""
        run, buffers = self._mixed_graph(key)
        packed = buffers.pack(
            {
                "rows": rows,
                "new_pages": new_pages,
                "token_ids": arrays.token_ids,
                "positions": arrays.positions,
                "kv_slots": arrays.kv_slots,
                "cu_seqlens": arrays.cu_seqlens + np.int32(len(rows)),
                "kv_lens": arrays.kv_lens,
                "extend_rows": arrays.rows,
                "sample_index": arrays.sample_index,
                "sample_rows": arrays.sample_rows,
                "sample_positions": arrays.sample_positions,
            },
            len(rows),
        )
        self._send(packed, buffers.block)
        run()
        return buffers.tokens[: len(arrays.sample_index)]

    def _send(self, packed: NDArray[np.int32], target: Tensor) -> None:
        """Copy to a static buffer in stream order. Torch keeps the pinned source until the copy is done."""
        source = torch.from_numpy(packed)
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    def _decode_graph(self, key: GraphKey) -> tuple[Callable[[], None], DecodeBuffers]:
        if key not in self._decode:
            step_input = torch.zeros((2, key.bucket), dtype=torch.int32, device=self._device)
            step_input[0] = self._dummy_slot
            tokens = torch.zeros(key.bucket, dtype=torch.int32, device=self._device)
            buffers = DecodeBuffers(step_input, DecodeInputs.create(key.bucket, self._device), tokens)
            self._decode[key] = (self._capture(lambda: self._decode_body(key, buffers)), buffers)
        return self._decode[key]

    def _mixed_graph(self, key: MixedKey) -> tuple[Callable[[], None], MixedBuffers]:
        if key not in self._mixed:
            buffers = MixedBuffers(key, self._dummy_slot, self._device)
            self._mixed[key] = (self._capture(lambda: self._mixed_body(key, buffers)), buffers)
        return self._mixed[key]

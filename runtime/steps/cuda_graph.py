"""Steps as CUDA graphs: one for each batch bucket of decode steps, one for each pair of buckets with short prompts, and
some for steps that verify drafts.

A graph covers everything from the embedding to the sampled token and the new lengths. It holds a bucket of decode
rows; a mixed one, a bucket of tokens: those of its decode rows, directly followed by the new ones. A replay costs the
host one copy of a block of integers and one launch. Buffers are static. The graphs share one memory pool, because no
two of them run at once. Not here: long prompts and rows that the host must edit; these run eagerly.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

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
# Tokens of a graph that verifies drafts, decode rows included, and the most drafted tokens of a sequence in it. The
# positions of a sequence are sampled one after the other, so a graph has as many turns as its longest row has tokens.
VERIFIED_TOKENS = (2, 4, 8, 16, 32)
VERIFIED_DRAFTS = (2, 4, 8)


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: dense for small batches, and padding large ones by at most an eighth."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, max_batch + 1, 64)]
    return [*(size for size in sizes if size < max_batch), max_batch]


# Records the kernels that a function launches. The result launches them again, on the same addresses.
GraphCapture = Callable[[Callable[[], None]], Callable[[], None]]


def run_once(body: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a capture where a body is only to run now."""
    body()
    return body


def cuda_capture(device: torch.device) -> GraphCapture:
    """Return what captures CUDA graphs, into one memory pool and on one side stream."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # Not torch.cuda.graph: it collects garbage and empties the allocator's cache each time.
        with torch.cuda.stream(stream), no_garbage_collection():
            body()  # compiles kernels, and makes this stream's library handles and workspaces: a capture must not
            stream.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:  # of a capture that has failed, the end fails too, for no reason worth telling
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize(device)
        return graph.replay

    return capture


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


@dataclass(frozen=True, slots=True)
class GraphKey:
    """The size of a graph. num_tokens: all tokens, decode rows among them; 0: the step has no new tokens.

    num_drafted: the most drafted tokens of a sequence in a graph that verifies some; each of its tokens is sampled.
    """

    num_decode: int  # padded
    num_tokens: int  # padded
    uses_tree: bool
    num_drafted: int = 0

    @property
    def num_extends(self) -> int:
        """Maximum number of sequences with new tokens."""
        return min(self.num_tokens, _MAX_EXTENDS)

    @property
    def turn_sizes(self) -> list[int]:
        """Positions that are sampled in each turn: a sequence that has one in turn `t` has t + 1 tokens at least."""
        return [self.num_tokens // turn for turn in range(1, self.num_drafted + 2)]

    @property
    def num_samples(self) -> int:
        return min(self.num_decode + self.num_extends, self.num_tokens or self.num_decode)


class GraphBuffers:
    """Static tensors of one graph, int32, in one block; `sections` names the parts and their sizes.

    rows, new_pages [B]; token_ids, positions, kv_slots [T]; cu_seqlens [E + 1]; kv_lens, extend_rows [E];
    sample_index, sample_rows, sample_positions [S]. Padding is harmless: the dummy slot, page 0, no tokens. The block
    of a step without new tokens has the first two alone: all of its rows are sampled. A graph that verifies drafts has
    token_rows [T], the slots of all tokens, and its turns (`turns`) instead of the last six.

        tokens    [0, n) decode rows, filled in by the step    [n, n + new) prompts    [n + new, T) padding

    Decode attention runs on the first B tokens, and its results in [n, B) are meaningless. The attention of prompts
    then runs on tokens from cu_seqlens[0] = n on, and overwrites these results.
    """

    def __init__(self, key: GraphKey, dummy_slot: int, device: torch.device) -> None:
        self.key = key
        batch, num_tokens, extends, samples = key.num_decode, key.num_tokens, key.num_extends, key.num_samples
        sizes = {"rows": batch, "new_pages": batch}
        if key.num_drafted:
            samples = num_tokens + 1  # the last one stands for none
            sizes |= dict.fromkeys(("token_ids", "positions", "kv_slots", "token_rows"), num_tokens)
            sizes |= {f"turn {number}": 3 * size for number, size in enumerate(key.turn_sizes)}
        elif num_tokens:
            sizes |= {
                "token_ids": num_tokens, "positions": num_tokens, "kv_slots": num_tokens, "cu_seqlens": extends + 1,
                "kv_lens": extends, "extend_rows": extends, "sample_index": samples, "sample_rows": samples,
                "sample_positions": samples,
            }  # fmt: skip
        self._dummy_slot = dummy_slot
        self.sections: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.sections[name] = slice(end, end + size)
            end += -(-size // 32) * 32  # 128 bytes: kernels compiled for aligned pointers serve every section
        self.block = torch.zeros(end, dtype=torch.int32, device=device)
        self.inputs = DecodeInputs.create(batch, device)
        if num_tokens:
            parts = self.part("token_ids"), self.part("positions"), self.part("kv_slots")
            self.inputs = DecodeInputs(*parts, self.inputs.kv_lens)
        self.tokens = torch.zeros(samples, dtype=torch.int32, device=device)
        self.block.copy_(torch.from_numpy(self.pack({})))

    def part(self, name: str) -> Tensor:
        return self.block[self.sections[name]]

    def turns(self) -> list[Tensor]:
        """The turns of a graph that verifies drafts, as `ExtendArrays.turns`, with padding."""
        return [self.part(f"turn {number}").view(3, size) for number, size in enumerate(self.key.turn_sizes)]

    def pack(self, values: dict[str, NDArray[np.int32]], num_decode: int = 0) -> NDArray[np.int32]:
        """Return the block with `values` at the start of their sections; those of new tokens start at `num_decode`.

        cu_seqlens is padded with its last value.
        """
        packed = np.zeros(self.block.shape[0], dtype=np.int32)
        for part in self.sections.keys() & {"rows", "sample_rows", "extend_rows", "token_rows"}:
            packed[self.sections[part]] = self._dummy_slot
        for number, size in enumerate(self.key.turn_sizes if self.key.num_drafted else ()):
            slots, index, _ = packed[self.sections[f"turn {number}"]].reshape(3, size)
            slots[:], index[:] = self._dummy_slot, self.key.num_tokens
        for name, value in values.items():
            start, stop = self.sections[name].start, self.sections[name].stop
            if name in ("token_ids", "positions", "kv_slots"):
                start += num_decode
            if value.ndim == 2:  # of a turn
                packed[start:stop].reshape(3, -1)[:, : value.shape[1]] = value
                continue
            assert len(value) <= stop - start, (name, len(value))
            packed[start : start + len(value)] = value
            if name == "cu_seqlens":
                packed[start + len(value) : stop] = value[-1]
        return packed


GraphBody = Callable[[GraphKey, GraphBuffers], None]


class StepGraphs:
    """Captures the graph of each key when it is first needed, or ahead of time by `capture`."""

    def __init__(
        self,
        body: GraphBody,
        max_batch: int,
        dummy_slot: int,
        device: torch.device,
        *,
        max_extend: int,
        verifies: bool = False,
        capture: GraphCapture | None = None,
    ) -> None:
        """max_extend: maximum tokens of a captured step with prompts; 0 captures none. verifies: drafts, in some."""
        self.buckets = decode_buckets(max_batch)
        self.mixed_rows = [*(n for n in MIXED_ROWS if n < max_batch), max_batch]
        self.mixed_tokens = [n for n in MIXED_TOKENS if n <= max_extend]
        self.verified_tokens = VERIFIED_TOKENS if verifies else ()
        self._body = body
        self._dummy_slot = dummy_slot
        self._device = device
        self._capture = cuda_capture(device) if capture is None else capture
        self._graphs: dict[GraphKey, tuple[Callable[[], None], GraphBuffers]] = {}

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a graph, padding included."""
        return max(self.buckets[-1], *self.mixed_tokens, *self.verified_tokens, 0)

    def keys(self, *, with_tree: bool) -> list[GraphKey]:
        """Every graph of overlapped steps, the largest first: the smaller ones reuse its memory."""
        keys: list[GraphKey] = []
        for uses_tree in (False, True) if with_tree else (False,):
            for num_tokens in reversed(self.mixed_tokens):
                rows = sorted({min(n, num_tokens) for n in self.mixed_rows}, reverse=True)
                keys += [GraphKey(n, num_tokens, uses_tree) for n in rows if n > 1 or not uses_tree]
            keys += [GraphKey(n, 0, uses_tree) for n in reversed(self.buckets) if n > 1 or not uses_tree]
        for n in reversed(self.verified_tokens):
            drafted = sorted({min(most, n - 1) for most in VERIFIED_DRAFTS}, reverse=True)
            keys += [GraphKey(n, n, uses_tree=False, num_drafted=most) for most in drafted]
        return keys

    def capture(self, keys: Sequence[GraphKey]) -> None:
        """Capture these graphs now."""
        for key in keys:
            self._graph(key)

    def verifying_key(self, num_tokens: int, num_drafted: int) -> GraphKey | None:
        """The graph for so many tokens, decode rows among them; a row has `num_drafted` drafted ones at most."""
        if not self.verified_tokens or num_tokens > self.verified_tokens[-1] or num_drafted > VERIFIED_DRAFTS[-1]:
            return None
        tokens = self.verified_tokens[bisect.bisect_left(self.verified_tokens, num_tokens)]
        most = VERIFIED_DRAFTS[bisect.bisect_left(VERIFIED_DRAFTS, num_drafted)]
        return GraphKey(tokens, tokens, uses_tree=False, num_drafted=min(most, tokens - 1))

    def key(self, num_decode: int, num_new: int, num_extends: int, *, uses_tree: bool) -> GraphKey | None:
        """The graph for `num_decode` rows and `num_new` tokens of `num_extends` prompts; None: run the step eagerly."""
        if not num_new:
            return GraphKey(self.buckets[bisect.bisect_left(self.buckets, num_decode)], 0, uses_tree)
        num_tokens = num_decode + num_new
        if not self.mixed_tokens or num_tokens > self.mixed_tokens[-1]:
            return None
        num_tokens = self.mixed_tokens[bisect.bisect_left(self.mixed_tokens, num_tokens)]
        rows = min(self.mixed_rows[bisect.bisect_left(self.mixed_rows, num_decode)], num_tokens)
        key = GraphKey(rows, num_tokens, uses_tree)
        return key if num_extends <= key.num_extends else None

    def replay(
        self, key: GraphKey, rows: NDArray[np.int32], new_pages: NDArray[np.int32], arrays: ExtendArrays | None
    ) -> Tensor:
        """Run the step of these rows and new tokens, whose slot-table updates were already sent.

        Returns the sampled tokens, int32 [R].
        """
        run, buffers = self._graph(key)
        values, count = {"rows": rows, "new_pages": new_pages}, len(rows)
        if arrays is not None:
            count = len(arrays.sample_index)
            values |= {
                "token_ids": arrays.token_ids,
                "positions": arrays.positions,
                "kv_slots": arrays.kv_slots,
            }
        if arrays is not None and key.num_drafted:
            values["token_rows"] = arrays.sample_rows  # each token is sampled
            values |= {f"turn {number}": turn for number, turn in enumerate(arrays.turns())}
        elif arrays is not None:
            values |= {
                "cu_seqlens": arrays.cu_seqlens + np.int32(len(rows)),
                "kv_lens": arrays.kv_lens,
                "extend_rows": arrays.rows,
                "sample_index": arrays.sample_index,
                "sample_rows": arrays.sample_rows,
                "sample_positions": arrays.sample_positions,
            }
        # Copied in stream order. Torch keeps the pinned source until the copy is done.
        source = torch.from_numpy(buffers.pack(values, len(rows)))
        buffers.block.copy_(source.pin_memory() if buffers.block.is_cuda else source, non_blocking=True)
        run()
        return buffers.tokens[:count]

    def _graph(self, key: GraphKey) -> tuple[Callable[[], None], GraphBuffers]:
        if key not in self._graphs:
            buffers = GraphBuffers(key, self._dummy_slot, self._device)
            self._graphs[key] = (self._capture(lambda: self._body(key, buffers)), buffers)
        return self._graphs[key]

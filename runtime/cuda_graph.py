"""Decode steps as CUDA graphs: one a batch bucket, from the embedding to the sampled token and the new lengths.

A replay costs the host one copy of `[2, bucket]` integers (slots, pages begun) and one launch. Buffers are static; the
graphs share one memory pool, as no two of them run at once. Not here: steps with extend rows, which run eagerly.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.step_inputs import DecodeInputs

logger = logging.getLogger(__name__)


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: dense where steps are cheap, never more than an eighth too large."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, max_batch + 1, 64)]
    return [*(size for size in sizes if size < max_batch), max_batch]


@dataclass(slots=True)
class DecodeBuffers:
    """Static tensors of one bucket: `step_input` int32 [2, B] (slots, pages begun), and what the step writes."""

    step_input: Tensor
    inputs: DecodeInputs
    tokens: Tensor  # int32 [B]
    logits: Tensor | None = None  # [B, V], of a graph that stops before sampling

    @property
    def rows(self) -> Tensor:
        return self.step_input[0]

    @property
    def new_pages(self) -> Tensor:
        return self.step_input[1]


@dataclass(frozen=True, slots=True)
class GraphKey:
    bucket: int
    samples: bool  # False: the graph ends with the logits
    uses_tree: bool


Body = Callable[[GraphKey, DecodeBuffers], None]


class DecodeGraphs:
    """Captures `body` for each key when it is first needed, or ahead of time by `capture_all`."""

    def __init__(self, body: Body, max_batch: int, dummy_slot: int, device: torch.device) -> None:
        self.buckets = decode_buckets(max_batch)
        self._body = body
        self._dummy_slot = dummy_slot
        self._device = device
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, DecodeBuffers]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture_all(self) -> None:
        """Capture the common graph of every bucket, the largest first, so that the smaller ones reuse its memory."""
        start_s = time.monotonic()
        for bucket in reversed(self.buckets):
            self._capture(GraphKey(bucket, samples=True, uses_tree=False))
        logger.info("captured %d decode graphs in %.1f s", len(self.buckets), time.monotonic() - start_s)

    def replay(
        self, rows: NDArray[np.int32], new_pages: NDArray[np.int32], *, samples: bool, uses_tree: bool
    ) -> DecodeBuffers:
        """Run the step of these rows; results lie in the first len(rows) entries of the returned buffers."""
        count = len(rows)
        key = GraphKey(self.buckets[bisect.bisect_left(self.buckets, count)], samples, uses_tree)
        if key not in self._graphs:
            self._capture(key)
        graph, buffers = self._graphs[key]
        packed = np.zeros((2, key.bucket), dtype=np.int32)
        packed[0, :count] = rows
        packed[0, count:] = self._dummy_slot
        packed[1, :count] = new_pages
        buffers.step_input.copy_(torch.from_numpy(packed).pin_memory(), non_blocking=True)
        graph.replay()
        return buffers

    def _capture(self, key: GraphKey) -> None:
        step_input = torch.zeros((2, key.bucket), dtype=torch.int32, device=self._device)
        step_input[0] = self._dummy_slot
        tokens = torch.zeros(key.bucket, dtype=torch.int32, device=self._device)
        buffers = DecodeBuffers(step_input, DecodeInputs.create(key.bucket, self._device), tokens)
        self._body(key, buffers)  # compiles kernels and makes library handles, which a capture must not do
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._body(key, buffers)
        self._graphs[key] = (graph, buffers)

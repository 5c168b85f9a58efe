"""`BareCache`: a paged cache laid out by hand, to drive a decoder without an engine (tests, benchmarks, a debugger).

Rows have a fixed number of pages and only grow. Not here: sharing, eviction, scheduling, sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.runtime.models.decoder import Decoder, ForwardContext
from ramet.runtime.steps.kv_cache import KVCache


class BareCache:
    """A cache of `num_rows` sequences of at most `max_tokens`. Page 0 is the dummy page; the others are shuffled.

    `kv_lens[row]` counts the row's cached positions. Set it to a lower value to go back.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_rows: int,
        max_tokens: int,
        page_size: int = 16,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """kv_dtype: None for the decoder's."""
        self.page_size = page_size
        pages_per_row = -(-max_tokens // page_size)
        num_pages = 1 + num_rows * pages_per_row
        dtype = kv_dtype or decoder.dtype
        self.kv_caches = KVCache(decoder.config, num_pages, page_size, device=decoder.device, dtype=dtype).layers
        # Shuffled, so no code can rely on a sequence's pages being adjacent.
        order = 1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(0))
        self.page_table = order.view(num_rows, pages_per_row).to(torch.int32)
        self.kv_lens = [0] * num_rows
        self.decoder = decoder

    def context(self, decode_rows: list[int], extend: list[tuple[int, int]]) -> ForwardContext:
        """The context of a step: one token for each decode row, then n tokens for each (row, n). Advances the rows."""
        positions: list[int] = []
        slots: list[int] = []
        for row, num_tokens in [(row, 1) for row in decode_rows] + extend:
            for position in range(self.kv_lens[row], self.kv_lens[row] + num_tokens):
                page = int(self.page_table[row, position // self.page_size])
                positions.append(position)
                slots.append(page * self.page_size + position % self.page_size)
            self.kv_lens[row] += num_tokens
        device = self.decoder.device

        def int32(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        table = self.page_table.to(device)
        decode = extend_metadata = None
        if decode_rows:
            kv_lens = [self.kv_lens[row] for row in decode_rows]
            decode = DecodeMetadata(int32(kv_lens), int32(decode_rows), table, kv_lens_host=kv_lens)
        if extend:
            rows = [row for row, _ in extend]
            q_lens = [n for _, n in extend]
            kv_lens = [self.kv_lens[row] for row in rows]
            starts = [sum(q_lens[:i]) for i in range(len(q_lens) + 1)]
            extend_metadata = ExtendMetadata(
                int32(starts), int32(kv_lens), int32(rows), table, max(q_lens), max(kv_lens), q_lens, kv_lens
            )
        num_decode = len(decode_rows)
        return ForwardContext(
            int32(positions), int32(slots), num_decode, decode, extend_metadata, self.kv_caches, num_decode
        )

    def step(self, decode: list[tuple[int, int]], extend: list[tuple[int, list[int]]]) -> Tensor:
        """Run one step and return the logits of all its tokens. decode: pairs (row, token). extend: (row, tokens)."""
        tokens = [token for _, token in decode] + [token for _, chunk in extend for token in chunk]
        context = self.context([row for row, _ in decode], [(row, len(chunk)) for row, chunk in extend])
        token_ids = torch.tensor(tokens, dtype=torch.int32, device=self.decoder.device)
        return self.decoder.logits(self.decoder.forward(token_ids, context))

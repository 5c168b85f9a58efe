"""What --deterministic rests on: with fixed tiles and splits a row's attention has the same bits in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.plan import FIXED_PARTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("dots_in_one_order"),
]
ANY_LENGTH = 1 << 20


def extend(
    q: Tensor, caches: tuple[Tensor, Tensor], table: Tensor, rows: list[int], lens: list[tuple[int, int]]
) -> Tensor:
    starts = torch.tensor([0, *(n for n, _ in lens)]).cumsum(0).to(torch.int32).to(DEVICE)
    kv_lens = torch.tensor([n for _, n in lens], dtype=torch.int32, device=DEVICE)
    index = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    meta = ExtendMetadata(starts, kv_lens, index, table, ANY_LENGTH, ANY_LENGTH)
    return attention_extend_triton(q, *caches, meta, 0.25)


def test_prompts_in_chunks_and_beside_others_give_the_bits_of_one_alone(cases: Any) -> None:
    torch.manual_seed(0)
    k_cache, v_cache, table, rows = (t.to(DEVICE) for t in cases.paged_cache([40, 23], 2, 16))
    first, second = rows.tolist()
    caches = (k_cache, v_cache)
    q = torch.randn(12, 4, 16, device=DEVICE)
    alone = extend(q[:9], caches, table, [first], [(9, 40)])
    beside = extend(q, caches, table, [first, second], [(9, 40), (3, 23)])
    assert torch.equal(beside[:9], alone)
    chunks = [extend(q[:4], caches, table, [first], [(4, 35)]), extend(q[4:9], caches, table, [first], [(5, 40)])]
    assert torch.equal(torch.cat(chunks), alone)


def test_decode_rows_give_the_same_bits_in_any_batch(cases: Any) -> None:
    torch.manual_seed(1)
    lens = [70, 5, 33]
    k_cache, v_cache, table, rows = (t.to(DEVICE) for t in cases.paged_cache(lens, 2, 16))
    q = torch.randn(3, 4, 16, device=DEVICE)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    def decode(which: slice) -> Tensor:
        meta = DecodeMetadata(kv_lens[which], rows[which], table, FIXED_PARTS, True)
        return attention_decode_triton(q[which], k_cache, v_cache, meta, 0.25)

    together = decode(slice(0, 3))
    for row in range(3):
        assert torch.equal(decode(slice(row, row + 1))[0], together[row])

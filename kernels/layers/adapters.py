# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Low-rank adapters (LoRA) of a linear layer, of which each token of a batch chooses one or none.

    out[t, n] += sum_r B[c, n, r] * (sum_k A[c, p, r, k] * x[t, k])        c = chosen[t], p = the part that holds n

A layer may be several stacked matrices, its parts, each with its own A. Entry 0 of the tables is no adapter.

Kernels: `_shrink_kernel`, one program per token and part: its R sums over k. `_expand_kernel`, one per token and block
of outputs. A token without an adapter reads and writes nothing, so a batch costs what its adapted tokens cost.
Both accumulate in fp32; each token reads its adapter by itself, which suits decode rows better than long prompts.
Source: S-LoRA (arXiv:2311.03285), Punica (arXiv:2310.18547).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.triton_support import jit, next_power_of_two, tl

MAX_PARTS = 3
_BLOCK_K = 256
_BLOCK_N = 64


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTable:
    """The adapters of one layer. a: [S, P, R, K]; b: [S, N, R], scaled. Ranks below R are filled up with zeros.

    bounds: part p has the outputs [bounds[p], bounds[p + 1]). ranks: int32 [S, P], on the host; 0 where an adapter has
    none.
    """

    a: Tensor
    b: Tensor
    bounds: tuple[int, ...]
    ranks: Tensor

    @property
    def num_parts(self) -> int:
        return len(self.bounds) - 1


def add_adapters_reference(out: Tensor, x: Tensor, table: AdapterTable, chosen: Tensor) -> Tensor:
    """Add the adapters' products to out [T, N], in place, for x [T, K] and chosen int32 [T]. Returns out."""
    for adapter in sorted(set(chosen.tolist()) - {0}):
        where = (chosen == adapter).nonzero()[:, 0]
        rows = x[where].float()
        for part, rank in enumerate(table.ranks[adapter].tolist()):
            if not rank:
                continue
            first, stop = table.bounds[part : part + 2]
            low = rows @ table.a[adapter, part, :rank].float().T
            change = low @ table.b[adapter, first:stop, :rank].float().T
            out[where, first:stop] += change.to(out.dtype)
    return out


def add_adapters_triton(out: Tensor, x: Tensor, table: AdapterTable, chosen: Tensor) -> Tensor:
    """Launch the kernels of `add_adapters_reference`. x and out may have row strides; last axes are contiguous."""
    num_tokens, width = x.shape
    num_parts, rank, num_outputs = table.num_parts, table.a.shape[2], table.b.shape[1]
    if not num_tokens:
        return out
    low = torch.empty((num_tokens, num_parts, rank), dtype=torch.float32, device=x.device)
    block_r = max(next_power_of_two(rank), 16)
    block_k = max(_BLOCK_K * 16 // block_r, 32)
    sizes = {"R": rank, "BLOCK_R": block_r, "num_warps": 4}
    _shrink_kernel[(num_tokens, num_parts)](
        x,
        table.a,
        low,
        chosen,
        x.stride(0),
        width,
        num_parts,
        BLOCK_K=block_k,
        **sizes,
    )
    inner = (*table.bounds[1:-1], num_outputs, num_outputs)
    _expand_kernel[(num_tokens, -(-num_outputs // _BLOCK_N))](
        out, table.b, low, chosen, out.stride(0), num_outputs, num_parts, *inner[:2], BLOCK_N=_BLOCK_N, **sizes
    )
    return out


@jit
def _shrink_kernel(
    x_ptr, a_ptr, low_ptr, chosen_ptr, x_stride, width, num_parts, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    adapter = tl.load(chosen_ptr + token)
    if adapter == 0:
        return
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + ((adapter.to(tl.int64) * num_parts + part) * R + r[:, None]) * width
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        inside = start + k < width
        x = tl.load(x_ptr + token * x_stride + start + k, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_rows + start + k[None, :], mask=(r < R)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += a * x[None, :]
    tl.store(low_ptr + (token * num_parts + part) * R + r, tl.sum(total, axis=1), mask=r < R)


@jit
def _expand_kernel(
    out_ptr, b_ptr, low_ptr, chosen_ptr, out_stride, num_outputs, num_parts, bound1, bound2, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(chosen_ptr + token)
    if adapter == 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    part = (n >= bound1).to(tl.int32) + (n >= bound2).to(tl.int32)
    inside = n < num_outputs
    both = inside[:, None] & (r < R)[None, :]
    low = tl.load(low_ptr + (token * num_parts + part[:, None]) * R + r[None, :], mask=both, other=0.0)
    rows = adapter.to(tl.int64) * num_outputs + n
    b = tl.load(b_ptr + rows[:, None] * R + r[None, :], mask=both, other=0.0).to(tl.float32)
    where = out_ptr + token * out_stride + n
    before = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, (before + tl.sum(low * b, axis=1)).to(out_ptr.dtype.element_ty), mask=inside)

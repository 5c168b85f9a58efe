# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Copy the first tokens of a KV page to another page, in every layer: what makes a partly shared page usable.

Kernel: one launch for all layers. Programs are (copy, layer's k or v, head); a table of addresses finds the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.triton_support import jit, next_power_of_two, tl


def copy_pages(caches: list[tuple[Tensor, Tensor]], source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Copy token positions [0, num_tokens[c]) of page source[c] to page target[c], keys and values of all layers.

    caches: per layer (k, v), each [N, K, P, D]. source, target, num_tokens: int32 [C] on the caches' device.
    Targets are distinct and no page is both a source and a target. Positions past num_tokens are left as they are.
    """
    run = copy_pages_triton if source.is_cuda else copy_pages_reference
    run(caches, source, target, num_tokens)


def copy_pages_reference(
    caches: list[tuple[Tensor, Tensor]], source: Tensor, target: Tensor, num_tokens: Tensor
) -> None:
    """Specification of `copy_pages` and its CPU path."""
    copies = list(zip(source.tolist(), target.tolist(), num_tokens.tolist(), strict=True))
    for layer in caches:
        for cache in layer:
            for from_page, to_page, count in copies:
                cache[to_page, :, :count] = cache[from_page, :, :count]


def copy_pages_triton(caches: list[tuple[Tensor, Tensor]], source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Launch the kernel of `copy_pages`. Uploads the caches' addresses, so it is not for CUDA graphs."""
    tensors = [cache for layer in caches for cache in layer]
    first = tensors[0]
    assert all(t.stride() == first.stride() and t.dtype == first.dtype for t in tensors)
    if len(source) == 0:
        return
    addresses = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64).to(source.device, non_blocking=True)
    _, num_heads, page_size, head_dim = first.shape
    # Bits are copied, not numbers, so any dtype of the same width will do.
    bits = {1: tl.int8, 2: tl.int16, 4: tl.int32}[first.element_size()]
    _copy_kernel[(len(source), len(tensors), num_heads)](
        addresses,
        source,
        target,
        num_tokens,
        first.stride(0),
        first.stride(1),
        first.stride(2),
        head_dim,
        ELEMENT=bits,
        P=next_power_of_two(page_size),
        D=next_power_of_two(head_dim),
        num_warps=4,
    )


@jit
def _copy_kernel(
    addresses_ptr,
    source_ptr,
    target_ptr,
    counts_ptr,
    page_stride,
    head_stride,
    token_stride,
    head_dim,
    ELEMENT: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    copy = tl.program_id(0)
    cache_ptr = tl.load(addresses_ptr + tl.program_id(1)).to(tl.pointer_type(ELEMENT))
    source = tl.load(source_ptr + copy).to(tl.int64)
    target = tl.load(target_ptr + copy).to(tl.int64)
    count = tl.load(counts_ptr + copy)
    token = tl.arange(0, P)[:, None]
    column = tl.arange(0, D)[None, :]
    cell = tl.program_id(2) * head_stride + token * token_stride + column
    inside = (token < count) & (column < head_dim)
    value = tl.load(cache_ptr + source * page_stride + cell, mask=inside, other=0)
    tl.store(cache_ptr + target * page_stride + cell, value, mask=inside)

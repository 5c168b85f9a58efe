# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Copy the first tokens of a KV page to another page, in every layer, so a sequence can continue a partly shared page.

Kernel: one launch for all layers; programs are (copy, layer's k or v, head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.triton_support import jit_any_value, next_power_of_two, tl


def copy_pages(caches: Tensor, source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Copy token positions [0, num_tokens[c]) of page source[c] to page target[c], keys and values of all layers.

    caches: [L, 2, N, K, P, D]. source, target, num_tokens: int32 [C] on the caches' device.
    Targets are distinct and no page is both a source and a target. Positions past num_tokens are left as they are.
    """
    run = copy_pages_triton if source.is_cuda else copy_pages_reference
    run(caches, source, target, num_tokens)


def copy_pages_reference(caches: Tensor, source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Specification of `copy_pages` and its CPU path."""
    for from_page, to_page, count in zip(source.tolist(), target.tolist(), num_tokens.tolist(), strict=True):
        caches[:, :, to_page, :, :count] = caches[:, :, from_page, :, :count]


def copy_pages_triton(caches: Tensor, source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Launch the kernel of `copy_pages`."""
    if len(source) == 0:
        return
    num_layers, _, num_pages, num_heads, page_size, head_dim = caches.shape
    assert caches.is_contiguous(), caches.stride()
    # Bits are copied, not numbers, so any dtype of the same width will do.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[caches.element_size()]
    _copy_kernel[(len(source), 2 * num_layers, num_heads)](
        caches.view(bits),
        source,
        target,
        num_tokens,
        num_pages,
        caches.stride(2),
        head_dim,
        PAGE=page_size,
        P=next_power_of_two(page_size),
        D=next_power_of_two(head_dim),
        num_warps=4,
    )


@jit_any_value("num_pages")
def _copy_kernel(
    caches_ptr,
    source_ptr,
    target_ptr,
    counts_ptr,
    num_pages,
    page_stride,
    head_dim,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    copy = tl.program_id(0)
    source = tl.load(source_ptr + copy).to(tl.int64)
    target = tl.load(target_ptr + copy).to(tl.int64)
    count = tl.load(counts_ptr + copy)
    token = tl.arange(0, P)[:, None]
    column = tl.arange(0, D)[None, :]
    # Multiples of the page's stride, of which the compiler knows that 16 divides it: accesses are 16 bytes wide.
    cache_ptr = caches_ptr + tl.program_id(1).to(tl.int64) * num_pages * page_stride
    head_ptr = cache_ptr + tl.program_id(2) * (PAGE * head_dim)
    cell = token * head_dim + column
    inside = (token < count) & (column < head_dim)
    value = tl.load(head_ptr + source * page_stride + cell, mask=inside, other=0)
    tl.store(head_ptr + target * page_stride + cell, value, mask=inside)

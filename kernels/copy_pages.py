"""Copy the first tokens of a KV page to another page, in every layer: what makes a partly shared page usable."""

from __future__ import annotations

from torch import Tensor


def copy_pages(caches: list[tuple[Tensor, Tensor]], source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
    """Copy token positions [0, num_tokens[c]) of page source[c] to page target[c], keys and values of all layers.

    caches: per layer (k, v), each [N, K, P, D]. source, target, num_tokens: int32 [C] on the caches' device.
    Targets are distinct and no page is both a source and a target. Positions past num_tokens are left as they are.
    """
    copy_pages_reference(caches, source, target, num_tokens)


def copy_pages_reference(
    caches: list[tuple[Tensor, Tensor]], source: Tensor, target: Tensor, num_tokens: Tensor
) -> None:
    """Specification of `copy_pages` and its CPU path."""
    copies = list(zip(source.tolist(), target.tolist(), num_tokens.tolist(), strict=True))
    for layer in caches:
        for cache in layer:
            for from_page, to_page, count in copies:
                cache[to_page, :, :count] = cache[from_page, :, :count]

"""`Ops`: the device operations of a decoder and its steps, chosen once when the model is loaded.

Every op has a torch reference, which is its specification. `REFERENCE` holds the references, `TRITON` the GPU kernels,
`EARLY_TRITON` those kernels launched early.
`cpu/ops.py` makes the ops that are compiled for the CPU. It is not imported here, because it imports numba, which a
process on a GPU does not need.
Not here: ops without a compiled form for the CPU, which choose by their tensors' device (`slots/`, `grammar/`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.tree_triton import attention_tree_triton
from ramet.kernels.layers.activation import (
    gelu_tanh_and_mul_reference,
    gelu_tanh_and_mul_triton,
    silu_and_mul_reference,
    silu_and_mul_triton,
)
from ramet.kernels.layers.adapters import AdapterTable, add_adapters_reference, add_adapters_triton
from ramet.kernels.layers.norm import (
    fused_add_rms_norm_reference,
    fused_add_rms_norm_triton,
    rms_norm_reference,
    rms_norm_triton,
)
from ramet.kernels.layers.rope import rope_and_write_kv_reference, rope_and_write_kv_triton
from ramet.kernels.sampling.sample import SamplingTables, sample_reference
from ramet.kernels.sampling.sample_triton import sample_triton


class NotRecordableError(Exception):
    """A function computes something outside the recorded kernels, so it must run eagerly."""


class Recording(Protocol):
    """The recorded kernels of a function. `run` launches them again on the same memory and writes `result`."""

    @property
    def result(self) -> Tensor: ...

    def run(self) -> None: ...


# Records the kernels of a function without running them. Raises: NotRecordableError.
Record = Callable[[Callable[[], Tensor]], Recording]

DecodeAttention = Callable[[Tensor, Tensor, Tensor, DecodeMetadata, float, int | None, Tensor | None], Tensor]
ExtendAttention = Callable[[Tensor, Tensor, Tensor, ExtendMetadata, float, int | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Ops:
    """The ops of one device and dtype. Arguments and results are those of each op's reference (`REFERENCE`).

    rms_norm, fused_add_rms_norm: the last argument is the dtype of the result, None for the input's.
    make_record: makes a recorder of steps with its own memory; None if steps are not recorded.
    """

    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype | None], Tensor]
    fused_add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype | None], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_tanh_and_mul: Callable[[Tensor], Tensor]
    rope_and_write_kv: Callable[
        [
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor | None,
            Tensor | None,
            float,
        ],
        Tensor,
    ]
    attention_decode: DecodeAttention
    attention_extend: ExtendAttention
    add_adapters: Callable[[Tensor, Tensor, AdapterTable, Tensor], Tensor]
    sample: Callable[[Tensor, SamplingTables, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    make_record: Callable[[], Record] | None = None


def _attention_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    scale: float,
    window: int | None,
    out: Tensor | None,
    early_launch: bool = False,
) -> Tensor:
    """Read shared prefixes once per group if there is a tree plan and no window."""
    if meta.tree is not None and window is None:
        return attention_tree_triton(q, k_cache, v_cache, meta, meta.tree, scale, out, early_launch=early_launch)
    return attention_decode_triton(q, k_cache, v_cache, meta, scale, window, out, early_launch=early_launch)


REFERENCE = Ops(
    rms_norm_reference,
    fused_add_rms_norm_reference,
    silu_and_mul_reference,
    gelu_tanh_and_mul_reference,
    rope_and_write_kv_reference,
    attention_decode_reference,
    attention_extend_reference,
    add_adapters_reference,
    sample_reference,
)
TRITON = Ops(
    rms_norm_triton,
    fused_add_rms_norm_triton,
    silu_and_mul_triton,
    gelu_tanh_and_mul_triton,
    rope_and_write_kv_triton,
    _attention_decode_triton,
    attention_extend_triton,
    add_adapters_triton,
    sample_triton,
)
# The kernels of a layer start while the one before ends, and wait for it (programmatic dependent launch, Hopper).
EARLY_TRITON = dataclasses.replace(
    TRITON,
    rms_norm=partial(rms_norm_triton, early_launch=True),
    fused_add_rms_norm=partial(fused_add_rms_norm_triton, early_launch=True),
    silu_and_mul=partial(silu_and_mul_triton, early_launch=True),
    gelu_tanh_and_mul=partial(gelu_tanh_and_mul_triton, early_launch=True),
    rope_and_write_kv=partial(rope_and_write_kv_triton, early_launch=True),
    attention_decode=partial(_attention_decode_triton, early_launch=True),
    attention_extend=partial(attention_extend_triton, early_launch=True),
)

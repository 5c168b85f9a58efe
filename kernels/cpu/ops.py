"""`cpu_ops`: the compiled ops of a model on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference
from ramet.kernels.cpu.attention import attention_decode, attention_extend
from ramet.kernels.cpu.greedy import sample
from ramet.kernels.cpu.pointwise import add_adapters, fused_add_rms_norm, gated_activation, rms_norm, rope_and_write_kv
from ramet.kernels.cpu.program import KernelStream, Pool, Program
from ramet.kernels.cpu.vectors import LANES
from ramet.kernels.ops import REFERENCE, Ops, Record


def cpu_ops(stream: KernelStream, dtype: torch.dtype, head_dim: int) -> Ops:
    """The ops of a model with weights, residual and caches in `dtype`. An op without compiled form is the reference.

    fp32 ops are compiled, attention if the head dim is whole vectors, and also activations in bfloat16. Products of the
    same model must use the same `stream` to be recorded.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return dataclasses.replace(REFERENCE, sample=sample)
    ops = dataclasses.replace(
        REFERENCE,
        silu_and_mul=partial(gated_activation, stream, is_gelu=False),
        gelu_tanh_and_mul=partial(gated_activation, stream, is_gelu=True),
        sample=sample,
    )
    if dtype is not torch.float32:
        return ops
    ops = dataclasses.replace(
        ops,
        rms_norm=partial(rms_norm, stream),
        fused_add_rms_norm=partial(fused_add_rms_norm, stream),
        rope_and_write_kv=partial(rope_and_write_kv, stream),
        add_adapters=partial(add_adapters, stream),
        make_record=lambda: _record_into(stream, Pool()),
    )
    if head_dim % LANES:
        return ops
    return dataclasses.replace(
        ops, attention_decode=partial(attention_decode, stream), attention_extend=_attention_extend
    )


def _record_into(stream: KernelStream, pool: Pool) -> Record:
    def record(function: Callable[[], Tensor]) -> Program:
        return stream.record(function, pool)

    return record


def _attention_extend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: ExtendMetadata,
    scale: float,
    window: int | None,
    out: Tensor | None,
) -> Tensor:
    """The compiled op. Inside a graph, which has no lengths on the host, the reference."""
    is_known = meta.q_lens_host is not None and meta.kv_lens_host is not None
    return (attention_extend if is_known else attention_extend_reference)(q, k_cache, v_cache, meta, scale, window, out)

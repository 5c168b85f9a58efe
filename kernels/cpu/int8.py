"""Building blocks of CPU kernels that multiply bytes (AVX512-VNNI), as LLVM IR through numba's intrinsics.

16 weight rows lie in the lanes of a vector. Not here: loops over tiles and threads (`block_int8`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ramet.kernels.cpu.vectors import (
    BLOCK,
    LANES,
    Builder,
    Value,
    fma,
    intrinsic,
    load,
    prefetch_line,
    splat,
    splat_load,
    store,
)

_F32, _F16, _I8, _I32, _I64 = ir.FloatType(), ir.HalfType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VF, _VI32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VI8 = ir.VectorType(_I8, 4 * LANES)


def has_int8_products() -> bool:
    """True where the CPU adds four products of bytes into each int32 lane (AVX512-VNNI)."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni", False))


def _dot_bytes(builder: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
    """total[i] + sum of unsigned[4 i + j] * signed[4 i + j] over j < 4; all int32 lanes.

    Written as an instruction: LLVM's intrinsic changed its types between versions.
    """
    kind = ir.FunctionType(_VI32, [_VI32] * 3)
    return builder.asm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v", [total, unsigned, signed], False)


def _splat_int(builder: Builder, address: Value, offset: int) -> Value:
    undefined = ir.Constant(_VI32, ir.Undefined)
    vector = builder.insert_element(undefined, load(builder, address, _I32, offset), _I32(0))
    return builder.shuffle_vector(vector, undefined, ir.Constant(_VI32, [0] * LANES))


def _make_dot(bits: int, num_tokens: int) -> Any:
    """Make `dot(weights, x, num_blocks, out, out_stride)`: 16 rows times `num_tokens` vectors.

    weights: blocks as `block_int8.pack` lays them out. x: for each block 32 int8 codes of every token, then every
    token's float32 pair (scale, scale * sum of codes), so that offsets are constants: with an address a token, the
    compiler runs out of registers. out_stride in bytes.
    """
    block_bytes = 64 + 64 * bits
    group_bytes = num_tokens * TOKEN_BLOCK_BYTES

    @intrinsic
    def dot(typing_context: Any, weights: Any, x: Any, num_blocks: Any, out: Any, out_stride: Any) -> Any:
        def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            weights, x, num_blocks, out, out_stride = arguments
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_VF, None)) for _ in range(num_tokens)]
            half = ir.VectorType(_F16, LANES)
            with cgutils.for_range(builder, num_blocks) as loop:
                block = builder.add(weights, builder.mul(loop.index, _I64(block_bytes)))
                group = builder.add(x, builder.mul(loop.index, _I64(group_bytes)))
                scale = builder.fpext(load(builder, block, half), _VF)
                minimum = builder.fpext(load(builder, block, half, 32), _VF)
                for line in range(0, block_bytes, 64):
                    prefetch_line(builder, builder.add(block, _I64(_BLOCKS_AHEAD * block_bytes + line)))
                # Token by token for each weight: one token's products wait for each other, five cycles each.
                totals = [ir.Constant(_VI32, None)] * num_tokens
                for i, codes in _codes(builder, builder.add(block, _I64(64)), bits):
                    for token in range(num_tokens):
                        value = _splat_int(builder, group, BLOCK * token + 4 * i)
                        totals[token] = _dot_bytes(builder, totals[token], codes, value)
                for token, (total, pointer) in enumerate(zip(totals, sums, strict=True)):
                    where = BLOCK * num_tokens + 8 * token
                    both = builder.fmul(scale, splat_load(builder, group, where))
                    value = fma(builder, minimum, splat_load(builder, group, where + 4), builder.load(pointer))
                    builder.store(fma(builder, builder.sitofp(total, _VF), both, value), pointer)
            for token, pointer in enumerate(sums):
                store(builder, builder.load(pointer), builder.add(out, builder.mul(out_stride, _I64(token))))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), emit

    return dot


def _codes(builder: Builder, address: Value, bits: int) -> Iterator[tuple[int, Value]]:
    """(i, codes of columns 4 i to 4 i + 3 of 16 rows) of a packed block."""
    mask = builder.bitcast(ir.Constant(_VI8, [15] * 64), _VI32)
    shift = ir.Constant(_VI32, [4] * LANES)
    for i in range(bits):
        loaded = load(builder, address, _VI32, 64 * i)
        if bits == 4:
            yield i, builder.and_(loaded, mask)
            yield i + 4, builder.and_(builder.lshr(loaded, shift), mask)
        else:
            yield i, loaded


TOKEN_BLOCK_BYTES = BLOCK + 8  # of 32 rounded activations, with scale and sum
_BLOCKS_AHEAD = 12  # what is fetched while a block is used: a tenth faster than the CPU's own guess
TOKENS = (1, 2, 4, 8)  # tokens of the variants: of more, products and sums would not fit in the registers
dots = {bits: [_make_dot(bits, num_tokens) for num_tokens in TOKENS] for bits in (4, 8)}


@intrinsic
def quantize_block(typing_context: Any, x: Any, codes: Any, scales: Any) -> Any:
    """Round 32 float32 values to int8 `codes`; scales gets (scale, scale * sum of codes)."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        x, codes, scales = arguments

        def call(name: str, kind: Value, *values: Value) -> Value:
            function_type = ir.FunctionType(kind, [value.type for value in values])
            return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)

        parts = [load(builder, x, _VF, 64 * i) for i in range(2)]
        sizes = [call("llvm.fabs.v16f32", _VF, part) for part in parts]
        larger = builder.select(builder.fcmp_ordered(">", sizes[0], sizes[1]), sizes[0], sizes[1])
        largest = call("llvm.vector.reduce.fmax.v16f32", _F32, larger)
        inverse = builder.fdiv(_F32(127.0), largest)
        inverse = builder.select(builder.fcmp_ordered(">", largest, _F32(1e-30)), inverse, _F32(0.0))
        scale = builder.fmul(largest, _F32(1.0 / 127.0))
        factor, total = splat(builder, inverse), ir.Constant(_VI32, None)
        for i, part in enumerate(parts):
            rounded = builder.fptosi(call("llvm.rint.v16f32", _VF, builder.fmul(part, factor)), _VI32)
            total = builder.add(total, rounded)
            store(builder, builder.trunc(rounded, ir.VectorType(_I8, LANES)), codes, LANES * i)
        count = builder.sitofp(call("llvm.vector.reduce.add.v16i32", _I32, total), _F32)
        store(builder, scale, scales)
        store(builder, builder.fmul(scale, count), scales, 4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), emit

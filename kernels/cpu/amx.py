"""Building blocks of CPU kernels that multiply bfloat16 tiles (AMX), as LLVM IR through numba's intrinsics.

A tile register holds 16 rows of 64 bytes. Of A [M, K] in rows and B [K, N] in pairs of rows (B[2 i], B[2 i + 1] side by
side: "packed"), one instruction adds a 16 x 16 part of A B over 32 of K, in fp32. `multiply` does that for 32 x 32
results, in four registers, which is what loads of A and B allow without waiting.
Not here: loops over tiles and threads, which are ordinary numba code in the modules of the ops.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ramet.kernels.cpu.vectors import LANES, Builder, Value, fma, intrinsic, load, splat, store, sum_lanes

TILE = 32  # rows and columns of a product's result, and the part of K that one instruction takes
TILE_BYTES = 1024  # of a register: 16 x 32 of A, or 32 x 16 of packed B
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VF = ir.VectorType(_F32, LANES)


@cache
def has_tiles() -> bool:
    """True where the CPU multiplies tiles of bfloat16 and the system lets this process do so."""
    features = llvm.get_host_cpu_features()
    return all(features.get(name, False) for name in ("amx-bf16", "avx512bf16")) and bool(torch.cpu._init_amx())


def _instruction(builder: Builder, name: str, *arguments: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _load_tile(builder: Builder, register: int, address: Value, stride: Value) -> None:
    _instruction(builder, "tileloadd64", _I8(register), builder.inttoptr(address, _I8.as_pointer()), stride)


def _store_tile(builder: Builder, register: int, address: Value, stride: Value) -> None:
    _instruction(builder, "tilestored64", _I8(register), builder.inttoptr(address, _I8.as_pointer()), stride)


@intrinsic
def configure(typing_context: Any) -> Any:
    """Make all eight registers of the calling thread 16 rows of 64 bytes; `release` when done."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        layout = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8  # palette, bytes a row, rows
        kind = ir.ArrayType(_I8, len(layout))
        where = cgutils.alloca_once_value(builder, ir.Constant(kind, layout))
        _instruction(builder, "ldtilecfg", builder.bitcast(where, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def release(typing_context: Any) -> Any:
    """Give the registers back, which the system would save at every switch of threads."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        _instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


def _make_multiply(*, adds: bool) -> Any:
    """Make `multiply(a, a_stride, b, b_step, steps, c, c_stride)`: C = A B, or C += A B where `adds`.

    A [32, 32 * steps] in bfloat16, C [32, 32] in fp32; of B, step k's two tiles (columns 0-15, 16-31) lie at
    b + k * b_step, one after the other. Strides are between rows, in bytes. Tiles should begin at a cache line: others
    take five times as long to load.
    """

    @intrinsic
    def multiply(
        typing_context: Any, a: Any, a_stride: Any, b: Any, b_step: Any, steps: Any, c: Any, c_stride: Any
    ) -> Any:
        def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            a, a_stride, b, b_step, steps, c, c_stride = arguments
            lower = builder.add(c, builder.mul(c_stride, _I64(LANES)))
            results = [c, builder.add(c, _I64(64)), lower, builder.add(lower, _I64(64))]  # registers 0 to 3
            for register, address in enumerate(results):
                if adds:
                    _load_tile(builder, register, address, c_stride)
                else:
                    _instruction(builder, "tilezero", _I8(register))
            with cgutils.for_range(builder, steps) as loop:
                left = builder.add(a, builder.mul(loop.index, _I64(64)))
                right = builder.add(b, builder.mul(loop.index, b_step))
                _load_tile(builder, 4, left, a_stride)
                _load_tile(builder, 6, right, _I64(64))
                _load_tile(builder, 7, builder.add(right, _I64(TILE_BYTES)), _I64(64))
                _load_tile(builder, 5, builder.add(left, builder.mul(a_stride, _I64(LANES))), a_stride)
                for register in range(4):
                    numbers = register, 4 + register // 2, 6 + register % 2
                    _instruction(builder, "tdpbf16ps", *map(_I8, numbers))
            for register, address in enumerate(results):
                _store_tile(builder, register, address, c_stride)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), emit

    return multiply


multiply, multiply_add = _make_multiply(adds=False), _make_multiply(adds=True)


def _round(builder: Builder, value: Value) -> Value:
    """Sixteen fp32 values as bfloat16, to the nearest, ties to even."""
    kind = ir.FunctionType(ir.VectorType(_I16, LANES), [_VF])
    return builder.asm(kind, "vcvtneps2bf16 $1, $0", "=v,v", [value], False)


@intrinsic
def round_16(typing_context: Any, x: Any, out: Any) -> Any:
    """Round 16 fp32 values at x to bfloat16."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        x, out = arguments
        store(builder, _round(builder, load(builder, x, _VF)), out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 2), emit


@intrinsic
def pair_16(typing_context: Any, x: Any, y: Any, out: Any) -> Any:
    """Round 16 fp32 values at x and 16 at y to bfloat16, side by side: one row of a packed tile."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        x, y, out = arguments
        kind = ir.VectorType(_I32, LANES)
        low, high = (builder.zext(_round(builder, load(builder, where, _VF)), kind) for where in (x, y))
        store(builder, builder.or_(low, builder.shl(high, ir.Constant(kind, [16] * LANES))), out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), emit


# Of 2^x on [0, 1]: exact at 0, so that a largest score that stays scales nothing; elsewhere within 9e-5 of it, where
# bfloat16 rounds by 3.9e-3.
_POWERS = (1.0, 0.69511682, 0.22764491, 0.07706709)


def _power_of_2(builder: Builder, exponent: Value) -> Value:
    """2^exponent in 16 lanes, for exponents that are not positive.

    Two instructions do what takes six others: x - floor(x), and p * 2^floor(x), which is 0 where that is too small.
    """
    fraction = builder.asm(ir.FunctionType(_VF, [_VF]), "vreduceps $$9, $1, $0", "=v,v", [exponent], False)
    power = ir.Constant(_VF, [_POWERS[-1]] * LANES)
    for coefficient in reversed(_POWERS[:-1]):
        power = fma(builder, power, fraction, ir.Constant(_VF, [coefficient] * LANES))
    scale = ir.FunctionType(_VF, [_VF, _VF])
    return builder.asm(scale, "vscalefps $2, $1, $0", "=v,v,v", [power, exponent], False)


@intrinsic
def soften(
    typing_context: Any, scores: Any, num_vectors: Any, factor: Any, state: Any, sums: Any, size: Any, weights: Any
) -> Any:
    """A row's running softmax over 16 * num_vectors more scores: weights = 2^((score - largest) * factor) in bfloat16.

    state: the largest score so far. sums: fp32 vectors that were summed with weights so far, which are scaled down to
    the new largest: the sum of the weights themselves in 16 parts, then `size` more vectors.
    """

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        scores, num_vectors, factor, state, sums, size, weights = arguments
        best = cgutils.alloca_once_value(builder, load(builder, scores, _VF))
        with cgutils.for_range(builder, num_vectors) as loop:
            value = load(builder, builder.add(scores, builder.mul(loop.index, _I64(64))), _VF)
            current = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", value, current), value, current), best)
        kind = ir.FunctionType(_F32, [_VF])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v16f32")
        largest, before = builder.call(reduce, [builder.load(best)], fastmath=("nnan",)), load(builder, state, _F32)
        largest = builder.select(builder.fcmp_ordered(">", largest, before), largest, before)
        store(builder, largest, state)
        down = _power_of_2(builder, splat(builder, builder.fmul(builder.fsub(before, largest), factor)))
        with cgutils.for_range(builder, builder.add(size, _I64(1))) as loop:
            where = builder.add(sums, builder.mul(loop.index, _I64(64)))
            store(builder, builder.fmul(load(builder, where, _VF), down), where)
        total = cgutils.alloca_once_value(builder, ir.Constant(_VF, None))
        factors, offsets = splat(builder, factor), splat(builder, builder.fneg(builder.fmul(largest, factor)))
        with cgutils.for_range(builder, num_vectors) as loop:
            value = load(builder, builder.add(scores, builder.mul(loop.index, _I64(64))), _VF)
            power = _power_of_2(builder, fma(builder, value, factors, offsets))
            builder.store(builder.fadd(builder.load(total), power), total)
            store(builder, _round(builder, power), builder.add(weights, builder.mul(loop.index, _I64(32))))
        store(builder, builder.fadd(load(builder, sums, _VF), builder.load(total)), sums)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, *[types.intp] * 4), emit


@intrinsic
def divide(typing_context: Any, sums: Any, size: Any, out: Any) -> Any:
    """out = the last `size` vectors of `sums` (see `soften`), divided by the sum of weights, in bfloat16."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        sums, size, out = arguments
        total = sum_lanes(builder, load(builder, sums, _VF))
        inverse = splat(builder, builder.fdiv(_F32(1.0), total))
        with cgutils.for_range(builder, size) as loop:
            value = load(builder, builder.add(sums, builder.mul(builder.add(loop.index, _I64(1)), _I64(64))), _VF)
            rounded = _round(builder, builder.fmul(value, inverse))
            store(builder, rounded, builder.add(out, builder.mul(loop.index, _I64(32))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), emit

"""Vector building blocks of the CPU kernels, written as LLVM IR through numba's intrinsics.

Numba's own loops don't keep several vector accumulators in registers, which is what a matrix product is. These emit
generic 16-lane vectors; LLVM lowers them to AVX-512, two AVX2 or four NEON registers. Addresses are plain integers.
Not here: loops over rows and threads, which are ordinary numba code in the modules of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

llvm.initialize_native_asmparser()  # modules on top of this one write some instructions as assembly

LANES = 16
BLOCK = 32  # weights that share a scale
_F32, _F16, _I8, _I16, _I32, _I64 = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
_VF = ir.VectorType(_F32, LANES)
_VI32 = ir.VectorType(_I32, LANES)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator, with a type."""
    return cast(Callable[..., Any], _numba_intrinsic(function))


Builder = Any  # llvmlite's IRBuilder; llvmlite has no types
Value = Any  # an llvmlite value


def load(builder: Builder, address: Value, kind: Value, offset: int = 0) -> Value:
    """A value of LLVM type `kind` at an integer address."""
    where = builder.add(address, _I64(offset)) if offset else address
    return builder.load(builder.inttoptr(where, kind.as_pointer()), align=1)


def store(builder: Builder, value: Value, address: Value, offset: int = 0) -> None:
    """Put a value at an integer address."""
    where = builder.add(address, _I64(offset)) if offset else address
    builder.store(value, builder.inttoptr(where, value.type.as_pointer()), align=1)


def prefetch_line(builder: Builder, address: Value) -> None:
    """Ask for the cache line at `address`, which need not exist."""
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.inttoptr(address, pointer), _I32(0), _I32(3), _I32(1)])


def splat(builder: Builder, scalar: Value) -> Value:
    """A float32 in all lanes."""
    undefined = ir.Constant(_VF, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, scalar, _I32(0)), undefined, ir.Constant(_VI32, [0] * LANES)
    )


def splat_load(builder: Builder, address: Value, offset: int) -> Value:
    """The float32 at an address, in all lanes."""
    return splat(builder, load(builder, address, _F32, offset))


def fma(builder: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z in all lanes."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VF, [_VF] * 3), "llvm.fma.v16f32")
    return builder.call(function, [x, y, z])


def sum_lanes(builder: Builder, vector: Value) -> Value:
    """The sum of a vector's lanes, in any order."""
    kind = ir.FunctionType(_F32, [_F32, _VF])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(function, [_F32(0.0), vector], fastmath=("reassoc",))


# ---- Blocks of 32 weights as two vectors ----


def _halves(builder: Builder, address: Value) -> tuple[Value, Value]:
    """The two fp16 values at `address`, each in all lanes.

    Both are loaded at once, also where the second is no number: a 16-bit load into a vector register would keep the
    register's upper part, and so wait for whatever computed it (measured: twice the time of the whole kernel).
    """
    pair = builder.fpext(load(builder, address, ir.VectorType(_F16, 2)), ir.VectorType(_F32, 2))
    undefined = ir.Constant(ir.VectorType(_F32, 2), ir.Undefined)
    lanes = [ir.Constant(_VI32, [i] * LANES) for i in range(2)]
    return builder.shuffle_vector(pair, undefined, lanes[0]), builder.shuffle_vector(pair, undefined, lanes[1])


def _from_nibbles(builder: Builder, address: Value, offset: int, scale: Value, minimum: Value) -> list[Value]:
    """32 nibbles n (0-15 in the low halves of 16 bytes, 16-31 in the high ones) as n * scale + minimum."""
    packed = builder.zext(load(builder, address, ir.VectorType(_I8, LANES), offset), _VI32)
    high = builder.lshr(packed, ir.Constant(_VI32, [4] * LANES))
    if _has_avx512():
        # A block has 16 different weights: compute them once, then look them up; vpermps ignores the index's high bits.
        codes = ir.Constant(_VF, [float(i) for i in range(LANES)])
        table = fma(builder, codes, scale, minimum)
        kind = ir.FunctionType(_VF, [_VF, _VI32])
        look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
        return [builder.call(look_up, [table, part]) for part in (packed, high)]
    low = builder.and_(packed, ir.Constant(_VI32, [15] * LANES))
    return [fma(builder, builder.sitofp(part, _VF), scale, minimum) for part in (low, high)]


def _has_avx512() -> bool:
    return bool(llvm.get_host_cpu_features().get("avx512f", False))


def _weights_q4_1(builder: Builder, address: Value) -> list[Value]:
    """GGML's Q4_1: fp16 scale, fp16 minimum, 32 nibbles (weights 0-15 low, 16-31 high)."""
    scale, minimum = _halves(builder, address)
    return _from_nibbles(builder, address, 4, scale, minimum)


def _weights_q4_0(builder: Builder, address: Value) -> list[Value]:
    """GGML's Q4_0: fp16 scale, 32 nibbles that count from -8."""
    scale, _ = _halves(builder, address)
    minimum = builder.fmul(scale, ir.Constant(_VF, [-8.0] * LANES))
    return _from_nibbles(builder, address, 2, scale, minimum)


def _weights_q8_0(builder: Builder, address: Value) -> list[Value]:
    """GGML's Q8_0: fp16 scale, 32 signed bytes."""
    scale, _ = _halves(builder, address)
    parts = [load(builder, address, ir.VectorType(_I8, LANES), 2 + LANES * i) for i in range(2)]
    return [builder.fmul(builder.sitofp(builder.sext(part, _VI32), _VF), scale) for part in parts]


def _weights_bf16(builder: Builder, address: Value) -> list[Value]:
    """32 bfloat16 values: the upper halves of float32."""
    parts = [load(builder, address, ir.VectorType(_I16, LANES), 2 * LANES * i) for i in range(2)]
    shift = ir.Constant(_VI32, [16] * LANES)
    return [builder.bitcast(builder.shl(builder.zext(part, _VI32), shift), _VF) for part in parts]


def _weights_f32(builder: Builder, address: Value) -> list[Value]:
    """32 float32 values."""
    return [load(builder, address, _VF, 4 * LANES * i) for i in range(2)]


def _make_dot(
    weights: Callable[[Builder, Value], list[Value]], block_bytes: int, num_rows: int, num_tokens: int
) -> Any:
    """Make `dot(row, x, x_stride, num_blocks, out, out_stride)`: `num_rows` weight rows times `num_tokens` vectors.

    Addresses and strides in bytes, x in fp32; rows lie one after another, and so do results. Sums stay in registers.
    Each is one chain of multiply-adds over the columns in every variant, so a token has the same bits in any group.
    """

    @intrinsic
    def dot(typing_context: Any, row: Any, x: Any, x_stride: Any, num_blocks: Any, out: Any, out_stride: Any) -> Any:
        def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            row, x, x_stride, num_blocks, out, out_stride = arguments
            zero = ir.Constant(_VF, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(num_rows)] for _ in range(num_tokens)]
            row_bytes = builder.mul(num_blocks, _I64(block_bytes))
            with cgutils.for_range(builder, num_blocks) as loop:
                block = builder.add(row, builder.mul(loop.index, _I64(block_bytes)))
                parts = [weights(builder, builder.add(block, builder.mul(row_bytes, _I64(r)))) for r in range(num_rows)]
                first = builder.add(x, builder.mul(loop.index, _I64(4 * BLOCK)))
                if num_tokens > 1 and block_bytes >= 64:  # the next rows: 8 fp32 products take 0.6 of the time
                    ahead = builder.add(row, builder.mul(row_bytes, _I64(num_rows)))
                    ahead = builder.add(ahead, builder.mul(loop.index, _I64(num_rows * block_bytes)))
                    for line in range(0, num_rows * block_bytes, 64):
                        prefetch_line(builder, builder.add(ahead, _I64(line)))
                for token, pointers in enumerate(sums):
                    address = builder.add(first, builder.mul(x_stride, _I64(token)))
                    for half in range(2):
                        value = load(builder, address, _VF, 4 * LANES * half)
                        for r, pointer in enumerate(pointers):
                            builder.store(fma(builder, parts[r][half], value, builder.load(pointer)), pointer)
            for token, pointers in enumerate(sums):
                target = builder.add(out, builder.mul(out_stride, _I64(token)))
                for r, pointer in enumerate(pointers):
                    store(builder, sum_lanes(builder, builder.load(pointer)), target, 4 * r)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), emit

    return dot


# (weight rows, tokens) of the variants that a format has: enough sums to hide the latency of the multiply-add, and few
# enough for the registers.
SHAPES = ((1, 1), (4, 1), (4, 2), (2, 4), (2, 8))


def _make_dots(weights: Callable[[Builder, Value], list[Value]], block_bytes: int) -> list[Any]:
    return [_make_dot(weights, block_bytes, num_rows, num_tokens) for num_rows, num_tokens in SHAPES]


dots_q4_1 = _make_dots(_weights_q4_1, 20)
dots_q4_0 = _make_dots(_weights_q4_0, 18)
dots_q8_0 = _make_dots(_weights_q8_0, 34)
dots_bf16 = _make_dots(_weights_bf16, 64)
dots_f32 = _make_dots(_weights_f32, 128)


# ---- Attention: some query rows at once over blocks of keys ----
#
# A score is a chain of multiply-adds over the dimensions, an output one over the positions, in every variant: so a row
# has the same bits with whichever others it is computed.

ROWS = (8, 4, 3, 2, 1)  # query rows of the variants
KEYS = 2 * LANES  # keys of a packed block


@intrinsic
def transpose_keys(
    typing_context: Any, first: Any, second: Any, next_first: Any, next_second: Any, head_dim: Any, target: Any
) -> Any:
    """target[d, j] = key j, for 16 keys: 8 rows one after another at `first`, and 8 at `second`. target: [D, KEYS].

    Meanwhile asks for as many bytes at two other addresses, which need not exist.
    """

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        first, second, next_first, next_second, head_dim, target = arguments
        four, eight = ir.VectorType(_F32, 4), ir.VectorType(_F32, 8)

        def pick(x: Value, y: Value, lanes: Sequence[int]) -> Value:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))

        def by_quads(low: Sequence[int], x: Value, y: Value) -> Value:
            """Of each four lanes the same ones: of x below 4 and of y above."""
            return pick(x, y, [4 * q + i % 4 + i // 4 * LANES for q in range(4) for i in low])

        stride = builder.mul(head_dim, _I64(4))
        with cgutils.for_range(builder, builder.lshr(head_dim, _I64(2))) as loop:
            column = builder.mul(loop.index, _I64(16))
            ahead = builder.mul(loop.index, _I64(128))
            for start in (next_first, next_second):
                where = builder.add(start, ahead)
                prefetch_line(builder, where)
                prefetch_line(builder, builder.add(where, _I64(64)))
            parts = []
            for start in (first, second):
                where = builder.add(start, column)
                for j in range(8):
                    parts.append(load(builder, builder.add(where, builder.mul(stride, _I64(j))), four))
            rows = []  # row j: four dimensions of keys j, j + 4, j + 8, j + 12
            for j in range(4):
                halves = [pick(parts[j + 8 * i], parts[j + 4 + 8 * i], range(8)) for i in range(2)]
                assert halves[0].type == eight
                rows.append(pick(halves[0], halves[1], range(16)))
            low = [by_quads((0, 4, 1, 5), rows[i], rows[i + 1]) for i in (0, 2)]
            high = [by_quads((2, 6, 3, 7), rows[i], rows[i + 1]) for i in (0, 2)]
            turned = [by_quads(lanes, *pair) for pair in (low, high) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]
            where = builder.add(target, builder.mul(loop.index, _I64(16 * KEYS)))
            for d, keys in enumerate(turned):
                store(builder, keys, where, 4 * KEYS * d)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), emit


def _make_scores(num_rows: int) -> Any:
    """Make `scores(queries, keys, head_dim, out, out_stride)`: out[r, j] = sum_d queries[d, r] * keys[d, j].

    num_rows queries and KEYS keys, both stored dimension by dimension.
    """

    @intrinsic
    def scores(typing_context: Any, queries: Any, keys: Any, head_dim: Any, out: Any, out_stride: Any) -> Any:
        def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            queries, keys, head_dim, out, out_stride = arguments
            zero = ir.Constant(_VF, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(num_rows)]
            with cgutils.for_range(builder, head_dim) as loop:
                key = builder.add(keys, builder.mul(loop.index, _I64(4 * KEYS)))
                query = builder.add(queries, builder.mul(loop.index, _I64(4 * num_rows)))
                halves = [load(builder, key, _VF, 4 * LANES * half) for half in range(2)]
                for row, pointers in enumerate(sums):
                    value = splat_load(builder, query, 4 * row)
                    for half, pointer in zip(halves, pointers, strict=True):
                        builder.store(fma(builder, value, half, builder.load(pointer)), pointer)
            for row, pointers in enumerate(sums):
                target = builder.add(out, builder.mul(out_stride, _I64(row)))
                for half, pointer in enumerate(pointers):
                    store(builder, builder.load(pointer), target, 4 * LANES * half)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), emit

    return scores


def _make_weighted_sums(num_rows: int, num_vectors: int) -> Any:
    """Make `weighted_sums(p, p_stride, values, count, stride, out, out_stride)`: out[r] += sum_j p[r, j] * values[j].

    num_rows rows of 16 * num_vectors dimensions; strides in bytes.
    """

    @intrinsic
    def weighted_sums(
        typing_context: Any, p: Any, p_stride: Any, values: Any, count: Any, stride: Any, out: Any, out_stride: Any
    ) -> Any:
        def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            p, p_stride, values, count, stride, out, out_stride = arguments
            targets = [builder.add(out, builder.mul(out_stride, _I64(row))) for row in range(num_rows)]
            sources = [builder.add(p, builder.mul(p_stride, _I64(row))) for row in range(num_rows)]
            sums = [[cgutils.alloca_once(builder, _VF) for _ in range(num_vectors)] for _ in range(num_rows)]
            for target, pointers in zip(targets, sums, strict=True):
                for i, pointer in enumerate(pointers):
                    builder.store(load(builder, target, _VF, 64 * i), pointer)
            with cgutils.for_range(builder, count) as loop:
                value = builder.add(values, builder.mul(loop.index, stride))
                parts = [load(builder, value, _VF, 64 * i) for i in range(num_vectors)]
                offset = builder.mul(loop.index, _I64(4))
                for source, pointers in zip(sources, sums, strict=True):
                    weight = splat_load(builder, builder.add(source, offset), 0)
                    for part, pointer in zip(parts, pointers, strict=True):
                        builder.store(fma(builder, weight, part, builder.load(pointer)), pointer)
            for target, pointers in zip(targets, sums, strict=True):
                for i, pointer in enumerate(pointers):
                    store(builder, builder.load(pointer), target, 64 * i)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), emit

    return weighted_sums


scores_8, scores_4, scores_3, scores_2, scores_1 = (_make_scores(num_rows) for num_rows in ROWS)
sums_8_16, sums_4_16, sums_3_16, sums_2_16, sums_1_16 = (_make_weighted_sums(num_rows, 1) for num_rows in ROWS)
sums_8_32 = _make_weighted_sums(8, 2)  # as many dimensions as fit in the registers
sums_4_64, sums_3_64, sums_2_64, sums_1_64 = (_make_weighted_sums(num_rows, 4) for num_rows in ROWS[1:])


@intrinsic
def exp_sum(typing_context: Any, address: Any, num_vectors: Any, largest: Any) -> Any:
    """Replace 16 * num_vectors values x by exp(x - largest), at most 1, and return their sum. exp(-87) counts as 0.

    In vectors, whose lanes are added last: values of 0 at either end change no bit of the sum. As `pointwise.exp32`.
    """

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        address, num_vectors, largest = arguments

        def constant(value: float) -> Value:
            return ir.Constant(_VF, [value] * LANES)

        total = cgutils.alloca_once_value(builder, ir.Constant(_VF, None))
        most = splat(builder, largest)
        # A compiler may reorder plain sums (see `threads`), by the number of vectors. It keeps multiply-adds.
        one = builder.fadd(builder.fsub(most, most), constant(1.0))
        with cgutils.for_range(builder, num_vectors) as loop:
            where = builder.add(address, builder.mul(loop.index, _I64(64)))
            x = builder.fsub(load(builder, where, _VF), most)
            counts = builder.fcmp_ordered(">", x, constant(-87.0))
            x = builder.select(counts, x, constant(0.0))
            shifted = builder.fptosi(fma(builder, x, constant(1.44269504), constant(128.5)), _VI32)
            n = builder.sub(shifted, ir.Constant(_VI32, [128] * LANES))  # the nearest: what is cut off is positive
            r = fma(builder, builder.sitofp(n, _VF), constant(-0.693147181), x)
            p = constant(1.9875691500e-4)
            for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
                p = fma(builder, p, r, constant(factor))
            p = builder.fadd(fma(builder, builder.fmul(p, r), r, r), constant(1.0))
            bias, bits = ir.Constant(_VI32, [127] * LANES), ir.Constant(_VI32, [23] * LANES)
            power = builder.bitcast(builder.shl(builder.add(n, bias), bits), _VF)
            weight = builder.select(counts, builder.fmul(p, power), constant(0.0))
            store(builder, weight, where)
            builder.store(fma(builder, weight, one, builder.load(total)), total)
        return sum_lanes(builder, builder.load(total))

    return types.float32(types.intp, types.intp, types.float32), emit


@intrinsic
def largest_of(typing_context: Any, address: Any, num_vectors: Any) -> Any:
    """The largest of 16 * num_vectors float32 values, none of them NaN; an even number of vectors, at least two."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        address, num_vectors = arguments

        def larger(x: Value, y: Value) -> Value:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        best = [cgutils.alloca_once_value(builder, load(builder, address, _VF, 64 * half)) for half in range(2)]
        with cgutils.for_range(builder, builder.lshr(num_vectors, _I64(1))) as loop:
            pair = builder.add(address, builder.mul(loop.index, _I64(128)))
            for half, pointer in enumerate(best):  # two, because each waits for the one before
                builder.store(larger(load(builder, pair, _VF, 64 * half), builder.load(pointer)), pointer)
        kind = ir.FunctionType(_F32, [_VF])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v16f32")
        return builder.call(function, [larger(*(builder.load(pointer) for pointer in best))])

    return types.float32(types.intp, types.intp), emit


@intrinsic
def prefetch(typing_context: Any, address: Any, num_lines: Any) -> Any:
    """Ask for cache lines from `address` on, which need not exist."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        address, num_lines = arguments
        with cgutils.for_range(builder, num_lines) as loop:
            prefetch_line(builder, builder.add(address, builder.mul(loop.index, _I64(64))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 2), emit


@intrinsic
def float32_at(typing_context: Any, address: Any) -> Any:
    """A float32 pointer (for `numba.carray`) from an integer address."""
    return pointer_to(types.float32)


@intrinsic
def int32_at(typing_context: Any, address: Any) -> Any:
    """An int32 pointer (for `numba.carray`) from an integer address."""
    return pointer_to(types.int32)


def pointer_to(kind: Any) -> Any:
    """What an intrinsic returns that turns an integer address into a pointer to `kind`."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.intp), emit

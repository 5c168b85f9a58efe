"""bfloat16 scalars in compiled CPU code. Numba has no such type, so a scalar is a uint16, the upper half of an fp32.

Loops over `widen` and `narrow` are vectorised. The same loop also works on float32 arrays. Not here: tiles (`amx`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ramet.kernels.cpu.vectors import Builder, Value, intrinsic, pointer_to

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def uint16_at(typing_context: Any, address: Any) -> Any:
    """A uint16 pointer (for `numba.carray`) from an integer address."""
    return pointer_to(types.uint16)


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """Return an array's value, a float32 or a bfloat16 in a uint16, as float32."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        if value == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), _F32)

    return types.float32(value), emit


@intrinsic
def narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """Convert a float32 to the type of `like`: unchanged, or rounded to the nearest bfloat16, ties to even."""

    def emit(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        if like == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _I32)
        is_odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(builder.add(bits, _I32(0x7FFF)), is_odd)
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    return like(types.float32, like), emit

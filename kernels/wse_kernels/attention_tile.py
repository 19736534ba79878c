"""A register tile for attention: a few rows (keys, or elements of a head) by sixteen queries, held in the CPU's registers while a sum runs.

A tile is an opaque Numba value. Each operation is a plain function on NumPy blocks (its definition, and what runs as plain Python) and,
compiled, the same arithmetic on LLVM vectors, one vector a row; LLVM splits vectors wider than the machine's. A lane is one query: no
operation adds two lanes. Rows are `stride` apart in flat memory; a stride of 0 does one row in place of `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, models, register_model, type_callable
from numpy.typing import NDArray

from wse_kernels.fma import fma

WIDTH = 16
"""Queries in a tile: one AVX-512 register, two of AVX2, four of NEON."""

ROWS = 8 if llvm.get_host_cpu_features().get("avx512f") else 4
"""Independent sums in a tile: enough to hide the latency of the multiply-add, few enough for the registers."""

ALL_LANES = (1 << WIDTH) - 1
"""Bits of all lanes of a tile."""

F32 = NDArray[np.float32]

# Numba's own annotations stop here.
_lower_builtin: Any = lower_builtin
_get_or_insert_function: Any = cgutils.get_or_insert_function


def fill_tile(x: np.float32) -> F32:
    """Tile of `ROWS` x `WIDTH` times `x`."""
    return np.full((ROWS, WIDTH), x, np.float32)


def load_tile(array: F32, offset: int, stride: int) -> F32:
    """Tile whose row r is ``array[offset + r * stride :]``."""
    return np.stack([array[offset + r * stride :][:WIDTH] for r in range(ROWS)])


def store_tile(tile: F32, array: F32, offset: int, stride: int) -> None:
    """Write row r of a tile to ``array[offset + r * stride :]``."""
    for r in range(ROWS):
        at = offset + r * stride
        array[at : at + WIDTH] = tile[r]


def add_tiles(total: F32, p: F32) -> F32:
    """``total + p``, each element rounded to float32."""
    return total + p


def scale_tile(p: F32, x: np.float32) -> F32:
    """``p * x``, each element rounded to float32."""
    return p * x


def divide_tile(p: F32, b: F32, j: int) -> F32:
    """``p[r, n] / b[j + n]``; lanes without a query may hold anything, also 0 / 0."""
    with np.errstate(all="ignore"):
        return p / b[j : j + WIDTH]


def raise_max(m: F32, j: int, x: F32) -> None:
    """``m[j + n] = x[r, n]`` where that is higher or NaN, for every row r from the first to the last."""
    for r in range(ROWS):
        for n in range(WIDTH):
            if x[r, n] > m[j + n] or x[r, n] != x[r, n]:
                m[j + n] = x[r, n]


def fma_step(p: F32, a: F32, i: int, stride: int, b: F32, j: int) -> F32:
    """One step of every sum: ``p[r, n] = fma(a[i + r * stride], b[j + n], p[r, n])``."""
    return fma_step_where(ALL_LANES, p, a, i, stride, b, j)


def fma_step_where(lanes: int, p: F32, a: F32, i: int, stride: int, b: F32, j: int) -> F32:
    """`fma_step` for the lanes whose bit is set in `lanes` (int32); the others skip the step and keep their sum."""
    out = p.copy()
    for r in range(ROWS):
        x = a[i + r * stride]
        for n in range(WIDTH):
            if (int(lanes) >> n) & 1:
                out[r, n] = fma(x, b[j + n], p[r, n])
    return out


class _TileType(types.Type):
    """Numba type of a tile."""

    def __init__(self) -> None:
        super().__init__(name=f"AttentionTile({ROWS}, {WIDTH})")


_TILE = _TileType()
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)


@register_model(_TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: _TileType) -> None:
        super().__init__(manager, tile, ir.ArrayType(_VECTOR, ROWS))  # type: ignore[no-untyped-call]


def _type_fill(context: Any) -> Callable[..., Any]:
    return lambda x: _TILE


def _type_load(context: Any) -> Callable[..., Any]:
    return lambda array, offset, stride: _TILE


def _type_store(context: Any) -> Callable[..., Any]:
    return lambda tile, array, offset, stride: types.void


def _type_add(context: Any) -> Callable[..., Any]:
    return lambda total, p: _TILE


def _type_scale(context: Any) -> Callable[..., Any]:
    return lambda p, x: _TILE


def _type_divide(context: Any) -> Callable[..., Any]:
    return lambda p, b, j: _TILE


def _type_raise_max(context: Any) -> Callable[..., Any]:
    return lambda m, j, x: types.void


def _type_step(context: Any) -> Callable[..., Any]:
    return lambda p, a, i, stride, b, j: _TILE


def _type_step_where(context: Any) -> Callable[..., Any]:
    return lambda lanes, p, a, i, stride, b, j: _TILE


def _splat(builder: Any, vector: Any, x: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), None))


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _row(builder: Any, offset: Any, stride: Any, r: int) -> Any:
    return builder.add(offset, builder.mul(stride, stride.type(r)))


def _vector_address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.bitcast(_address(context, builder, array_type, array, offset), _VECTOR.as_pointer())


def _lower_fill(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    row = _splat(builder, _VECTOR, args[0])
    out = ir.Constant(context.get_value_type(_TILE), ir.Undefined)
    for r in range(ROWS):
        out = builder.insert_value(out, row, r)
    return out


def _lower_load(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array, offset, stride = args
    out = ir.Constant(context.get_value_type(_TILE), ir.Undefined)
    for r in range(ROWS):
        at = _vector_address(context, builder, signature.args[0], array, _row(builder, offset, stride, r))
        out = builder.insert_value(out, builder.load(at, align=4), r)
    return out


def _lower_store(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    tile, array, offset, stride = args
    for r in range(ROWS):
        at = _vector_address(context, builder, signature.args[1], array, _row(builder, offset, stride, r))
        builder.store(builder.extract_value(tile, r), at, align=4)
    return context.get_dummy_value()


def _lower_add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    total, p = args
    for r in range(ROWS):
        total = builder.insert_value(total, builder.fadd(builder.extract_value(total, r), builder.extract_value(p, r)), r)
    return total


def _lower_scale(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    p, x = args
    factor = _splat(builder, _VECTOR, x)
    for r in range(ROWS):
        p = builder.insert_value(p, builder.fmul(builder.extract_value(p, r), factor), r)
    return p


def _lower_divide(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    p, b, j = args
    lanes = builder.load(_vector_address(context, builder, signature.args[1], b, j), align=4)
    for r in range(ROWS):
        p = builder.insert_value(p, builder.fdiv(builder.extract_value(p, r), lanes), r)
    return p


def _lower_raise_max(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    m, j, x = args
    at = _vector_address(context, builder, signature.args[0], m, j)
    top = builder.load(at, align=4)
    for r in range(ROWS):
        row = builder.extract_value(x, r)
        # Higher, or not a number; where the maximum is NaN already, only another NaN takes its place.
        takes = builder.or_(builder.fcmp_ordered(">", row, top), builder.fcmp_unordered("uno", row, row))
        top = builder.select(takes, row, top)
    builder.store(top, at, align=4)
    return context.get_dummy_value()


def _step(context: Any, builder: Any, arg_types: Any, args: Any, admitted: Any) -> Any:
    p, a, i, stride, b, j = args
    a_type, b_type = arg_types[1], arg_types[4]
    fma_of_vectors = _get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{WIDTH}f32")
    lanes = builder.load(_vector_address(context, builder, b_type, b, j), align=4)
    for r in range(ROWS):
        one = builder.load(_address(context, builder, a_type, a, _row(builder, i, stride, r)))
        old = builder.extract_value(p, r)
        new = builder.call(fma_of_vectors, [_splat(builder, _VECTOR, one), lanes, old])
        if admitted is not None:
            new = builder.select(admitted, new, old)
        p = builder.insert_value(p, new, r)
    return p


def _lower_step(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return _step(context, builder, signature.args, args, None)


def _lower_step_where(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    bits = builder.trunc(args[0], ir.IntType(WIDTH))
    return _step(context, builder, signature.args[1:], args[1:], builder.bitcast(bits, ir.VectorType(ir.IntType(1), WIDTH)))


_ARRAY = types.Array
_INT = types.int64
type_callable(fill_tile)(_type_fill)
type_callable(load_tile)(_type_load)
type_callable(store_tile)(_type_store)
type_callable(add_tiles)(_type_add)
type_callable(scale_tile)(_type_scale)
type_callable(divide_tile)(_type_divide)
type_callable(raise_max)(_type_raise_max)
type_callable(fma_step)(_type_step)
type_callable(fma_step_where)(_type_step_where)
_lower_builtin(fill_tile, types.float32)(_lower_fill)
_lower_builtin(load_tile, _ARRAY, _INT, _INT)(_lower_load)
_lower_builtin(store_tile, _TileType, _ARRAY, _INT, _INT)(_lower_store)
_lower_builtin(add_tiles, _TileType, _TileType)(_lower_add)
_lower_builtin(scale_tile, _TileType, types.float32)(_lower_scale)
_lower_builtin(divide_tile, _TileType, _ARRAY, _INT)(_lower_divide)
_lower_builtin(raise_max, _ARRAY, _INT, _TileType)(_lower_raise_max)
_lower_builtin(fma_step, _TileType, _ARRAY, _INT, _INT, _ARRAY, _INT)(_lower_step)
_lower_builtin(fma_step_where, types.int32, _TileType, _ARRAY, _INT, _INT, _ARRAY, _INT)(_lower_step_where)

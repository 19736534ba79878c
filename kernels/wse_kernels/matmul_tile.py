"""Register tiles: a few rows by a few vectors of float32 held in the CPU's registers while a core's sum runs.

A tile is an opaque Numba value; what can be done with it is load, store, zero, one multiply-add step and an elementwise addition. Each
operation is a plain function on NumPy blocks (its definition, and what runs as plain Python) and, compiled, the same arithmetic on LLVM
vectors. A lane is one output: no operation adds two lanes, so a tile's height and width never change a bit.

LLVM splits vectors wider than the machine's, so every tile compiles everywhere; the sizes below only decide how fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, imputils
from numba.extending import lower_builtin, models, register_model, type_callable
from numpy.typing import NDArray

from wse_kernels.fma import fma

_HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f"))

LANES = 16 if _HAS_AVX512 else 8
"""Outputs per vector: one AVX-512 register, one AVX2 register or two NEON registers."""

ROWS = 3 if _HAS_AVX512 else 5
COLS = 4 * LANES if _HAS_AVX512 else 2 * LANES
"""Shape of a tile. Of the 32 registers of AVX-512 a partial and a running total of 12 vectors each take nearly all, and a row of weights is
four vectors long, which memory delivers at twice the rate of two. Of the 16 of AVX2 a partial of 10, a row of weights and one element of x
take 13, and the total waits on the stack while a core's k runs."""

THIN_ROWS = 0 if _HAS_AVX512 else 6
"""Products of so few rows, which only wait for their weights, go row by row in thin tiles: one of 5 x 2 vectors would compute five rows and
read 64 bytes at a time."""

THIN_COLS = 8 * LANES
"""Columns of a thin tile, which has one row."""

F32 = NDArray[np.float32]

# Numba's own annotations stop here.
_lower_builtin: Any = lower_builtin
_primitive_model: Any = models.PrimitiveModel.__init__
_get_function: Any = cgutils.get_or_insert_function
_borrowed: Any = imputils.impl_ret_borrowed


class _TileType(types.Type):
    """Numba type of a tile."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__(name=f"RegisterTile({rows}, {cols})")
        self.rows, self.n_vectors = rows, cols // LANES


_TILE = _TileType(ROWS, COLS)
_THIN = _TileType(1, THIN_COLS)
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def load_tile(array: F32, offset: int) -> F32:
    """Tile of the C-contiguous block that starts at element `offset` of `array`."""
    return array.reshape(-1)[offset : offset + ROWS * COLS].reshape(ROWS, COLS).copy()


def load_thin(array: F32, offset: int) -> F32:
    """Thin tile of the elements from `offset` of `array` on."""
    return array.reshape(-1)[offset : offset + THIN_COLS].reshape(1, THIN_COLS).copy()


def store_tile(tile: F32, array: F32, offset: int) -> None:
    """Write `tile` as a C-contiguous block from element `offset` of `array` on."""
    array.reshape(-1)[offset : offset + tile.size] = tile.ravel()


def zero_tile() -> F32:
    """Tile of +0.0."""
    return np.zeros((ROWS, COLS), np.float32)


def add_tiles(total: F32, p: F32) -> F32:
    """``total + p``, each output rounded to float32."""
    return total + p


def fma_step(p: F32, a: F32, i: int, w: F32, j: int) -> F32:
    """One k of a core's sum: ``p[r, n] = fma(a[i + r], w[j + n], p[r, n])`` for every output of the tile."""
    out = np.empty_like(p)
    for r in range(p.shape[0]):
        for n in range(p.shape[1]):
            out[r, n] = fma(a[i + r], w[j + n], p[r, n])
    return out


def read_only(array: F32) -> F32:
    """View of `array` that cannot be written: the type that weights have, so that a copy of them needs no code of its own."""
    view = array.view()
    view.flags.writeable = False
    return view


@register_model(_TileType)
class _TileModel(models.PrimitiveModel):
    """A tile is an array of vectors to LLVM, which keeps each in a register of its own."""

    def __init__(self, manager: Any, tile: _TileType) -> None:
        _primitive_model(self, manager, tile, ir.ArrayType(_VECTOR, tile.rows * tile.n_vectors))


def _type_load_tile(context: Any) -> Callable[..., Any]:
    return lambda array, offset: _TILE


def _type_load_thin(context: Any) -> Callable[..., Any]:
    return lambda array, offset: _THIN


def _type_store_tile(context: Any) -> Callable[..., Any]:
    return lambda tile, array, offset: types.void


def _type_zero_tile(context: Any) -> Callable[..., Any]:
    return lambda: _TILE


def _type_add_tiles(context: Any) -> Callable[..., Any]:
    return lambda total, p: total


def _type_fma_step(context: Any) -> Callable[..., Any]:
    return lambda p, a, i, w, j: p


def _type_read_only(context: Any) -> Callable[..., Any]:
    return lambda array: array.copy(readonly=True)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, lane: int) -> Any:
    """Return the address of element ``offset + lane``; no index wraps around."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [builder.add(offset, offset.type(lane))])


def _load_vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, lane: int) -> Any:
    address = _address(context, builder, array_type, array, offset, lane)
    return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)


def _lower_load_tile(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array, offset = args
    kind = signature.return_type
    tile = ir.Constant(context.get_value_type(kind), ir.Undefined)
    for v in range(kind.rows * kind.n_vectors):
        tile = builder.insert_value(tile, _load_vector(context, builder, signature.args[0], array, offset, v * LANES), v)
    return tile


def _lower_store_tile(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    tile, array, offset = args
    for v in range(signature.args[0].rows * signature.args[0].n_vectors):
        address = _address(context, builder, signature.args[1], array, offset, v * LANES)
        builder.store(builder.extract_value(tile, v), builder.bitcast(address, _VECTOR.as_pointer()), align=4)
    return context.get_dummy_value()


def _lower_zero_tile(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return ir.Constant(context.get_value_type(signature.return_type), None)


def _lower_add_tiles(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    total, p = args
    for v in range(signature.return_type.rows * signature.return_type.n_vectors):
        total = builder.insert_value(total, builder.fadd(builder.extract_value(total, v), builder.extract_value(p, v)), v)
    return total


def _lower_fma_step(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kind, a_type, _, w_type, _ = signature.args
    p, a, i, w, j = args
    vector_fma = _get_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    lane_zero = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    weights = [_load_vector(context, builder, w_type, w, j, v * LANES) for v in range(kind.n_vectors)]
    for r in range(kind.rows):
        one = builder.load(_address(context, builder, a_type, a, i, r))
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), one, ir.IntType(32)(0))
        row = builder.shuffle_vector(first, first, lane_zero)
        for v in range(kind.n_vectors):
            slot = r * kind.n_vectors + v
            step = builder.call(vector_fma, [row, weights[v], builder.extract_value(p, slot)])
            p = builder.insert_value(p, step, slot)
    return p


def _lower_read_only(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return _borrowed(context, builder, signature.return_type, args[0])


_ARRAY = types.Array
_INT = types.int64
type_callable(load_tile)(_type_load_tile)
type_callable(load_thin)(_type_load_thin)
type_callable(store_tile)(_type_store_tile)
type_callable(zero_tile)(_type_zero_tile)
type_callable(add_tiles)(_type_add_tiles)
type_callable(fma_step)(_type_fma_step)
type_callable(read_only)(_type_read_only)
_lower_builtin(load_tile, _ARRAY, _INT)(_lower_load_tile)
_lower_builtin(load_thin, _ARRAY, _INT)(_lower_load_tile)
_lower_builtin(store_tile, _TileType, _ARRAY, _INT)(_lower_store_tile)
_lower_builtin(zero_tile)(_lower_zero_tile)
_lower_builtin(add_tiles, _TileType, _TileType)(_lower_add_tiles)
_lower_builtin(fma_step, _TileType, _ARRAY, _INT, _ARRAY, _INT)(_lower_fma_step)
_lower_builtin(read_only, _ARRAY)(_lower_read_only)

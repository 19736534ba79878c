"""Rounding where memory is written: float32 numbers to the nearest that a format of 16 bits has, in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32
from wse_kernels.formats import (
    bf16_of_f32,
    cb16_of_f32,
    f16_of_f32,
    f32_of_bf16,
    f32_of_cb16,
    f32_of_f16,
)

F32 = NDArray[np.float32]

TO_BF16, TO_F16, TO_CB16 = 0, 1, 2
"""Formats by number, for `round_to`."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_NONE = np.int32(0)


@helper
def finite_size(x: np.float32) -> np.int32:
    """Bits of ``|x|``, which order as the numbers do; 0 for an infinity and for NaN."""
    size = np.int32(bits_of_f32(x) & _MAGNITUDE)
    return size if size < _INFINITY else _NONE


@kernel()
def round_bf16(x: F32) -> np.int32:
    """Round `x`, (n,) float32, to bfloat16 as `wse_kernels.formats.encode` defines it; returns the bits of its largest finite magnitude."""
    largest = _NONE
    for i in range(x.shape[0]):
        largest = max(largest, finite_size(x[i]))
        x[i] = f32_of_bf16(bf16_of_f32(x[i]))
    return largest


@kernel()
def round_f16(x: F32) -> np.int32:
    """Round `x`, (n,) float32, to float16; as `round_bf16`."""
    largest = _NONE
    for i in range(x.shape[0]):
        largest = max(largest, finite_size(x[i]))
        x[i] = f32_of_f16(f16_of_f32(x[i]))
    return largest


@kernel()
def round_cb16(x: F32) -> np.int32:
    """Round `x`, (n,) float32, to cb16; as `round_bf16`."""
    largest = _NONE
    for i in range(x.shape[0]):
        largest = max(largest, finite_size(x[i]))
        x[i] = f32_of_cb16(cb16_of_f32(x[i]))
    return largest


@helper
def nearest_to(x: np.float32, fmt: int) -> np.float32:
    """Return the number nearest to `x` in one of `TO_BF16`, `TO_F16` and `TO_CB16`."""
    if fmt == TO_BF16:
        return f32_of_bf16(bf16_of_f32(x))
    if fmt == TO_F16:
        return f32_of_f16(f16_of_f32(x))
    return f32_of_cb16(cb16_of_f32(x))


@helper
def round_to(x: F32, fmt: int) -> np.int32:
    """Round `x`, (n,) float32, to one of `TO_BF16`, `TO_F16` and `TO_CB16`; as `round_bf16`."""
    if fmt == TO_BF16:
        return round_bf16(x)
    if fmt == TO_F16:
        return round_f16(x)
    return round_cb16(x)


@kernel()
def copy_to(x: F32, out: F32) -> None:
    """Copy `x`, (m, n) float32, to `out`."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j]

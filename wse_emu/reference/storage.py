"""Formats of 16 bits by value: their numbers, and how far rounding to them goes."""

from __future__ import annotations

import numpy as np

from wse_emu.foundation.precision import DType
from wse_emu.reference.formulas import Floats

_MANTISSA_AND_LEAST_EXPONENT = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14), "cb16": (9, -30)}


def rounded(x: Floats, dtype: str) -> Floats:
    """`x` to the nearest number of a 16-bit format, ties to even; beyond its largest, infinity is not considered."""
    if dtype == "float32":
        return x
    mantissa, least = _MANTISSA_AND_LEAST_EXPONENT[dtype]
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    step = np.ldexp(np.ones_like(x), exponent - mantissa)
    out: Floats = np.rint(x / step) * step
    return out


def unit_roundoff(dtype: DType) -> float:
    """Largest relative error of rounding a number of normal size to nearest."""
    return 2.0 ** -(_MANTISSA_AND_LEAST_EXPONENT[dtype][0] + 1)


def smallest(dtype: DType) -> float:
    """Smallest positive number."""
    mantissa, least = _MANTISSA_AND_LEAST_EXPONENT[dtype]
    return 2.0 ** (least - mantissa)

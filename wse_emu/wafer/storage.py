"""Numbers of 16 bits in SRAM: how they are rounded, and what is refused.

NumPy has no bfloat16 and no cb16, and Numba no float16: such a number is held at the host as the float32 of equal value. On the wafer it
takes two bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import NumberOverflowError
from wse_emu.foundation.precision import HalfType
from wse_kernels.formats import BF16, CB16, F16, FloatFormat, decode, encode
from wse_kernels.storage import TO_BF16, TO_CB16, TO_F16, round_bf16, round_cb16, round_f16

FORMATS: Final[dict[HalfType, FloatFormat]] = {"bfloat16": BF16, "float16": F16, "cb16": CB16}
_IN_PLACE: Final[dict[HalfType, Callable[..., Any]]] = {"bfloat16": round_bf16, "float16": round_f16, "cb16": round_cb16}
ROUNDINGS: Final[dict[HalfType, int]] = {"bfloat16": TO_BF16, "float16": TO_F16, "cb16": TO_CB16}
"""Formats as kernels number them."""
HALF_BYTES: Final = 2


def nearest(x: NDArray[np.float32], stored: HalfType, where: str) -> NDArray[np.float32]:
    """The nearest numbers of a format: the definition.

    Parameters
    ----------
    x : ndarray, any shape, float32
    stored : {"bfloat16", "float16", "cb16"}
    where : str
        What is written, and where it lies, for the error.

    Raises
    ------
    NumberOverflowError
        If a finite number is beyond the format's largest.
    """
    rounded = decode(encode(x, FORMATS[stored]), FORMATS[stored])
    beyond = np.isinf(rounded) & np.isfinite(x)
    if beyond.any():
        raise overflow(where, float(np.abs(x[beyond]).max()), stored)
    return rounded


def round_in_place(x: NDArray[np.float32], stored: HalfType) -> float | None:
    """The same for contiguous numbers (n,), compiled; returns the largest number that has become infinite, None if there is none."""
    return beyond_largest(_IN_PLACE[stored](x), stored)


def beyond_largest(size: int, stored: HalfType) -> float | None:
    """The number of these bits, the largest finite magnitude that was rounded, if it has become infinite."""
    largest, fmt = np.int32(size).view(np.float32), FORMATS[stored]
    half_step = 2.0 ** (fmt.bias - fmt.mantissa_bits - 1)
    return float(largest) if largest >= fmt.max_finite + half_step else None


def overflow(where: str, value: float, stored: HalfType) -> NumberOverflowError:
    """What a number beyond a format's largest comes to."""
    return NumberOverflowError(
        f"{where}: {value:.6g} is beyond the largest number of {stored}, {FORMATS[stored].max_finite:.6g}; use 'bfloat16' or 'float32'"
    )

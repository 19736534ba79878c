"""Natural logarithm in float32 from fma alone, the same bits in plain Python and compiled, and what is built on it.

``log(m) = 2 artanh((m - 1) / (m + 1))``, the series of artanh summed to where float32 ends.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32, f32_of_bits
from wse_kernels.exp import exp32
from wse_kernels.fma import fma_uncounted as fma

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_INF = np.float32(np.inf)
_NAN = np.float32(np.nan)
# ln(2) in two parts: the high one has so few bits that its product with an exponent is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_MANTISSA = np.int32(0x007FFFFF)
_SHIFT = np.int32(23)
_SMALLEST_NORMAL = np.float32(2.0**-126)
_LIFT = np.float32(2.0**24)
_LIFTED = np.float32(-24.0)
_C = tuple(np.float32(1 / (2 * k + 1)) for k in range(10))
_C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9 = _C[1:]


@helper
def _artanh_rest(s: np.float32) -> np.float32:
    """``artanh(s) - s`` for ``abs(s) <= 1/3``."""
    z = s * s
    p = fma(_C9, z, _C8)
    p = fma(p, z, _C7)
    p = fma(p, z, _C6)
    p = fma(p, z, _C5)
    p = fma(p, z, _C4)
    p = fma(p, z, _C3)
    p = fma(p, z, _C2)
    p = fma(p, z, _C1)
    return (s * z) * p


@helper
def log32(x: np.float32) -> np.float32:
    """Return the natural logarithm, within 1 ulp (0.963 measured).

    Parameters
    ----------
    x : float32
        Any value.

    Returns
    -------
    float32
        -inf at 0, NaN below and for NaN, +inf for +inf; exactly 0 at 1.
    """
    small = x < _SMALLEST_NORMAL
    y = x * _LIFT if small else x
    bits = bits_of_f32(y)
    # The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)).
    shifted = np.int32(bits - _SQRT_HALF_BITS)
    n = np.int32(shifted >> _SHIFT)
    m = f32_of_bits(np.int32(np.int32(shifted & _MANTISSA) + _SQRT_HALF_BITS))
    k = np.float32(n) + (_LIFTED if small else _ZERO)
    f = m - _ONE
    s = f / (_TWO + f)
    # log(m) = f - f s + 2 (artanh(s) - s): the first term is exact, so that little is lost near 1.
    rest = fma(_TWO, _artanh_rest(s), fma(k, _LN2_LOW, -(f * s)))
    v = fma(k, _LN2_HIGH, f + rest)
    v = v if x < _INF else x
    v = v if x > _ZERO else (-_INF if x == _ZERO else _NAN)
    return v if x == x else x


@helper
def log1p_of_fraction(t: np.float32) -> np.float32:
    """Return ``log(1 + t)`` for t in 0..1, within 2 ulp; NaN for NaN."""
    s = t / (_TWO + t)
    # log(1 + t) = t - t s + 2 (artanh(s) - s)
    return t + fma(_TWO, _artanh_rest(s), -(t * s))


@helper
def softplus32(x: np.float32) -> np.float32:
    """Return ``log(1 + e**x)``, within 2.5 ulp; no overflow for any x."""
    tail = log1p_of_fraction(exp32(-abs(x)))
    v = x + tail if x > _ZERO else tail
    return v if x == x else x


@kernel()
def log_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `log32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = log32(x[i])


@kernel()
def softplus_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `softplus32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = softplus32(x[i])

"""exp, logistic function, SiLU, tanh and GELU in float32, built on `fma`: the same bits in any loop, on any machine, compiled or plain.

The argument is reduced with n = nearest integer of x / ln 2 to r = x - n ln 2, abs(r) <= 0.3466. ln 2 has two parts; x less n times the
upper one is exact in one fma. exp(r) is a polynomial, and n is added to the exponent bits of its value. No table and no branch, so the
loops that call these functions vectorise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32, f32_of_bits
from wse_kernels.fma import fma_uncounted as fma

EXP_LOWEST = np.float32(-87.33654)
"""Smallest argument whose exponential is not 0: the result there is the smallest normal number, 2**-126."""
EXP_HIGHEST = np.float32(88.72283)
"""Largest argument whose exponential is finite."""

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_INF = np.float32(np.inf)
_LOG2_E = np.float32(1.4426950408889634)
_NEG_LN2_HIGH = np.float32(-0.6931471805599453)
_NEG_LN2_LOW = np.float32(-0.6931471805599453 - float(_NEG_LN2_HIGH))
# 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the sum.
_ROUND = np.float32(12582912.0)
# Minimax polynomial of (exp(r) - 1 - r) / r**2 on abs(r) <= ln(2)/2 (Cephes expf).
_C0 = np.float32(1.9875691500e-4)
_C1 = np.float32(1.3981999507e-3)
_C2 = np.float32(8.3334519073e-3)
_C3 = np.float32(4.1665795894e-2)
_C4 = np.float32(1.6666665459e-1)
_C5 = np.float32(5.0000001201e-1)
_EXPONENT_SHIFT = np.int32(23)
_MINUS_TWO = np.float32(-2.0)
_T_LIMIT = np.float32(0.625)
_T0 = np.float32(-5.70498872745e-3)
_T1 = np.float32(2.06390887954e-2)
_T2 = np.float32(-5.37397155531e-2)
_T3 = np.float32(1.33314422036e-1)
_T4 = np.float32(-3.33332819422e-1)
GELU_CUBE = np.float32(0.044715)
GELU_SCALE = np.float32(1.5957691216057308)
"""``2 sqrt(2 / pi)``."""


@helper
def exp32(x: np.float32) -> np.float32:
    """Return e**x, within 1 ulp (0.694 ulp at most, measured over all 2,237,668,968 float32 arguments with a normal result).

    Parameters
    ----------
    x : float32
        Any value.

    Returns
    -------
    float32
        0 below `EXP_LOWEST` (results that would be subnormal, and -inf), +inf above `EXP_HIGHEST`, NaN for NaN; exactly 1 at 0.
    """
    y = x if x > EXP_LOWEST else EXP_LOWEST
    y = y if y < EXP_HIGHEST else EXP_HIGHEST
    t = fma(y, _LOG2_E, _ROUND)
    n = t - _ROUND
    high = fma(n, _NEG_LN2_HIGH, y)
    r = fma(n, _NEG_LN2_LOW, high)
    p = fma(_C0, r, _C1)
    p = fma(p, r, _C2)
    p = fma(p, r, _C3)
    p = fma(p, r, _C4)
    p = fma(p, r, _C5)
    # 1 + r in two parts, so that only the last addition rounds by half an ulp of the result.
    s = _ONE + high
    rest = fma(n, _NEG_LN2_LOW, high - (s - _ONE))
    q = s + fma(p * r, r, rest)
    # The low bits of t are n: shifted up, they are n in the exponent field, and the rest falls off.
    v = f32_of_bits(np.int32(bits_of_f32(q) + np.int32(bits_of_f32(t) << _EXPONENT_SHIFT)))
    v = v if x >= EXP_LOWEST else _ZERO
    v = v if x <= EXP_HIGHEST else _INF
    return v if x == x else x


@helper
def sigmoid32(x: np.float32) -> np.float32:
    """Return the logistic function 1 / (1 + e**-x), within 2.5 ulp; no overflow for any x, NaN for NaN.

    Computed from e**-abs(x), which never exceeds 1; 0 below `EXP_LOWEST`, where the true value is subnormal.
    """
    e = exp32(-abs(x))
    s = (_ONE if x >= _ZERO else e) / (_ONE + e)
    return s if x == x else x


@helper
def silu32(x: np.float32) -> np.float32:
    """Return x * sigmoid(x) (SiLU, also called swish), within 3.1 ulp.

    Finite for finite x; -0 below `EXP_LOWEST`, where the true value lies within 1.1e-36 of it. NaN for NaN and for -inf (-inf * 0).
    """
    return x * sigmoid32(x)


@helper
def tanh32(x: np.float32) -> np.float32:
    """Return tanh(x), within 2.5 ulp; plus or minus 1 from 9.1 on, NaN for NaN.

    Below 0.625 an odd polynomial (Cephes tanhf), above it ``(1 - e**-2x) / (1 + e**-2x)``.
    """
    a = abs(x)
    z = x * x
    p = fma(_T0, z, _T1)
    p = fma(p, z, _T2)
    p = fma(p, z, _T3)
    p = fma(p, z, _T4)
    small = fma(x * z, p, x)
    e = exp32(_MINUS_TWO * a)
    large = (_ONE - e) / (_ONE + e)
    large = large if x >= _ZERO else -large
    return (small if a < _T_LIMIT else large) if x == x else x


@helper
def gelu_tanh32(x: np.float32) -> np.float32:
    """Return x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3))), GELU in its tanh form, as ``x sigmoid(z)``.

    ``z = 2 sqrt(2/pi) (x + 0.044715 x**3)`` has a relative error of five roundings, which the exponential magnifies where the value is
    small: within ``6 + 5 abs(z) (1 - sigmoid(z))`` roundings of 2**-24. NaN for NaN and for -inf.
    """
    z = x * fma(x * x, GELU_CUBE, _ONE) * GELU_SCALE
    return x * sigmoid32(z)


@kernel()
def exp_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `exp32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = exp32(x[i])


@kernel()
def sigmoid_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `sigmoid32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = sigmoid32(x[i])


@kernel()
def silu_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `silu32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = silu32(x[i])


@kernel()
def tanh_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `tanh32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = tanh32(x[i])


@kernel()
def gelu_tanh_array(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write `gelu_tanh32` of every element of `x`, (n,) float32, to `out`, (n,) float32; they may be the same array."""
    for i in range(x.shape[0]):
        out[i] = gelu_tanh32(x[i])

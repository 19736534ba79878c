"""exp, logistic function and SiLU: error in ulp against float64, range ends, the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from numba import config

from wse_kernels._jit import plain
from wse_kernels.exp import EXP_HIGHEST, EXP_LOWEST, exp32, exp_array, sigmoid32, sigmoid_array, silu32, silu_array

F = np.float32
NOJIT = bool(config.DISABLE_JIT)

pytestmark = pytest.mark.nojit


def every(step: int) -> np.ndarray:
    """Every `step`-th of the 2**32 float32 numbers, NaN and infinities left out."""
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    x = bits.view(F)
    return x[np.isfinite(x)]


def binades(n: int) -> np.ndarray:
    """`n` random numbers of every binade, both signs, subnormal ones included."""
    rng = np.random.default_rng(11)
    exponent = np.repeat(np.arange(255, dtype=np.uint32), n)
    mantissa = rng.integers(0, 1 << 23, exponent.size, dtype=np.uint32)
    sign = rng.integers(0, 2, exponent.size, dtype=np.uint32)
    return (sign << 31 | exponent << 23 | mantissa).view(F)


def sample() -> np.ndarray:
    if NOJIT:
        return np.concatenate([every(1 << 22), binades(4)])
    rng = np.random.default_rng(12)
    return np.concatenate([every(1 << 12), binades(1 << 12), rng.uniform(-88, 89, 1 << 19).astype(F)])


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Error of `got` in units of the last float32 place of `want` (float64; normal float32 range)."""
    return np.abs(got - want) / np.ldexp(1.0, np.frexp(want)[1] - 24)


def applied(function, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    function(x, out)
    return out


def bits(x) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, F)).view(np.int32)


def test_exp32_is_within_one_ulp_on_all_binades():
    x = sample()
    x = x[(x >= EXP_LOWEST) & (x <= EXP_HIGHEST)]
    error = ulps(applied(exp_array, x), np.exp(x.astype(np.float64)))
    assert x.size > (1_000 if NOJIT else 1_000_000)
    assert error.max() < 0.7, x[error.argmax()]


def test_exp32_is_zero_below_its_range_and_infinite_above():
    x = sample()
    y = applied(exp_array, x)
    assert np.all(bits(y[x < EXP_LOWEST]) == 0)
    assert np.all(y[x > EXP_HIGHEST] == np.inf)
    inside = (x >= EXP_LOWEST) & (x <= EXP_HIGHEST)
    assert np.all((y[inside] >= F(2.0**-126)) & (y[inside] < np.inf))


@pytest.mark.parametrize("exp", [exp32, lambda x: applied(exp_array, np.array([x]))[0]], ids=["plain", "array"])
def test_exp32_at_the_ends_of_its_range(exp):
    below, above = np.nextafter(EXP_LOWEST, F(-np.inf)), np.nextafter(EXP_HIGHEST, F(np.inf))
    assert 2.0**-126 <= np.exp(np.float64(EXP_LOWEST))
    assert np.exp(np.float64(below)) < 2.0**-126
    assert np.exp(np.float64(EXP_HIGHEST)) < 2.0**128 - 2.0**103 <= np.exp(np.float64(above))
    assert 2.0**-126 <= exp(EXP_LOWEST) < 1.001 * 2.0**-126
    assert bits(exp(below)) == 0
    assert 0.999 * 2.0**128 < float(exp(EXP_HIGHEST)) < np.inf
    assert exp(above) == np.inf
    assert exp(F(np.inf)) == np.inf
    assert bits(exp(F(-np.inf))) == 0
    assert np.isnan(exp(F(np.nan)))
    assert exp(F(0.0)) == 1
    assert exp(F(-0.0)) == 1
    assert exp(F(2.0**-149)) == 1
    assert exp(F(-(2.0**-149))) == 1


@pytest.mark.parametrize(
    ("array", "scalar"), [(exp_array, exp32), (sigmoid_array, sigmoid32), (silu_array, silu32)], ids=["exp", "sigmoid", "silu"]
)
def test_compiled_and_plain_have_the_same_bits(array, scalar):
    x = np.concatenate([binades(4), np.linspace(-90, 90, 1001, dtype=F), np.array([0.0, -0.0, np.inf, np.nan, EXP_LOWEST, EXP_HIGHEST], F)])
    y = applied(array, x)
    z = [scalar(v) for v in x]
    assert all(type(v) is np.float32 for v in z)
    assert np.array_equal(bits(y), bits(z))


@pytest.mark.parametrize("array", [exp_array, sigmoid_array, silu_array], ids=["exp", "sigmoid", "silu"])
def test_same_bits_in_any_piece_at_any_offset(array):
    x = np.random.default_rng(3).uniform(-95, 95, 300 if not NOJIT else 60).astype(F)
    whole = applied(array, x)
    for start in range(17):
        for n in (1, 2, 3, 5, 8, 13, 16, 21, 32, 40):
            piece = np.full(n + 9, 7, F)
            array(x[start : start + n], piece[start % 9 : start % 9 + n])
            assert np.array_equal(bits(piece[start % 9 : start % 9 + n]), bits(whole[start : start + n]))


def test_arrays_may_be_written_in_place():
    x = np.linspace(-20, 20, 101, dtype=F)
    want = applied(silu_array, x)
    silu_array(x, x)
    assert np.array_equal(bits(x), bits(want))


def test_sigmoid32_is_within_its_error_for_all_finite_arguments():
    x = sample()
    y = applied(sigmoid_array, x)
    assert np.all((y >= 0) & (y <= 1))
    assert np.all(bits(y[x < EXP_LOWEST]) == 0)
    inside = x >= EXP_LOWEST
    wide = x[inside].astype(np.float64)
    assert ulps(y[inside], np.where(wide < 0, np.exp(np.minimum(wide, 0)), 1) / (1 + np.exp(-np.abs(wide)))).max() < 2.5


def test_silu32_is_within_its_error_for_all_finite_arguments():
    x = sample()
    y = applied(silu_array, x)
    assert np.all(np.isfinite(y))
    assert np.all(y[x < EXP_LOWEST] == 0)
    wide = x.astype(np.float64)
    want = wide * (np.where(wide < 0, np.exp(np.minimum(wide, 0)), 1) / (1 + np.exp(-np.abs(wide))))
    normal = (np.abs(want) >= 2.0**-126) & (x >= EXP_LOWEST)
    assert ulps(y[normal], want[normal]).max() < 3.1


def test_sigmoid32_and_silu32_at_infinity_and_nan():
    assert (sigmoid32(F(np.inf)), sigmoid32(F(-np.inf))) == (1, 0)
    assert np.isnan(sigmoid32(F(np.nan)))
    assert np.isnan(silu32(F(np.nan)))
    assert silu32(F(np.inf)) == np.inf


def test_plain_functions_of_the_array_kernels_have_the_same_bits():
    x = np.linspace(-100, 100, 257, dtype=F)
    for array in (exp_array, sigmoid_array, silu_array):
        assert np.array_equal(bits(applied(array, x)), bits(applied(plain(array), x)))

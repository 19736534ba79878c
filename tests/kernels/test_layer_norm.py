"""LayerNorm's three steps: bits against a scalar definition, values against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.equivalence.tolerance import layer_norm_bound
from wse_kernels._jit import plain
from wse_kernels.fma import fma
from wse_kernels.layer_norm import layer_scale, sum_features, sum_squared_deviations

F = np.float32


@pytest.mark.nojit
@given(st.integers(0, 5), st.integers(1, 33), st.integers(0, 99), st.sampled_from([0.0, 3.0]))
def test_steps_have_the_stated_bits_and_the_value_of_the_formula(t: int, n: int, seed: int, middle: float) -> None:
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal((t, n)) + middle).astype(F), rng.standard_normal((1, n)).astype(F)
    total, squares, out = np.full((t, 1), np.nan, F), np.full((t, 1), np.nan, F), np.full((t, n), np.nan, F)
    sum_features(x, total)
    sum_squared_deviations(x, total, F(n), squares)
    layer_scale(x, total, squares, weight, F(n), F(1e-5), out)
    for i, row in enumerate(x):
        s, ss = F(0.0), F(0.0)
        for a in row:
            s = s + a
        mean = s / F(n)
        for a in row:
            ss = fma(a - mean, a - mean, ss)
        assert (total[i, 0], squares[i, 0]) == (s, ss)
        np.testing.assert_array_equal(out[i], (row - mean) * (F(1.0) / np.sqrt(ss / F(n) + F(1e-5))) * weight[0])
    again = [np.full_like(a, np.nan) for a in (total, squares, out)]
    plain(sum_features)(x, again[0])
    plain(sum_squared_deviations)(x, total, F(n), again[1])
    plain(layer_scale)(x, total, squares, weight, F(n), F(1e-5), again[2])
    for a, b in zip((total, squares, out), again, strict=True):
        np.testing.assert_array_equal(a, b)
    wide, w = x.astype(np.float64), weight.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * w
    assert (np.abs(out - exact) <= layer_norm_bound(wide, w, 1e-5)).all()


@pytest.mark.nojit
def test_a_constant_row_is_zero() -> None:
    x, total, squares, out = np.full((1, 4), 3, F), np.empty((1, 1), F), np.empty((1, 1), F), np.empty((1, 4), F)
    sum_features(x, total)
    sum_squared_deviations(x, total, F(4), squares)
    layer_scale(x, total, squares, np.ones((1, 4), F), F(4), F(1e-6), out)
    assert not out.any()

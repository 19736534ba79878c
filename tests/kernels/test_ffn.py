"""Gating and combining: values against float64, bits against a scalar definition, and nothing else written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_kernels._jit import plain
from wse_kernels.ffn import clamped_glu, combine_into, swiglu_into
from wse_kernels.fma import fma

F = np.float32
U = 2.0**-24


@pytest.mark.nojit
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_swiglu_of_a_chunk_is_the_formula_in_float64(m: int, n: int, first: int, seed: int) -> None:
    y = (np.random.default_rng(seed).standard_normal((m, 2 * n)) * 4).astype(F)
    h = np.full((m + 1, first + n + 2), 7, F)
    swiglu_into(y, first, h)
    wide = y.astype(np.float64)
    exact = wide[:, ::2] / (1 + np.exp(-wide[:, ::2])) * wide[:, 1::2]
    # silu32 is within 3.04 ulp (6.1 u); one product more.
    assert (np.abs(h[:m, first : first + n] - exact) <= 8 * U * np.abs(exact) + 1e-37).all()
    again = np.full_like(h, 7)
    plain(swiglu_into)(y, first, again)
    np.testing.assert_array_equal(h, again)
    untouched = np.ones(h.shape, np.bool_)
    untouched[:m, first : first + n] = False
    assert (h[untouched] == 7).all()


@pytest.mark.nojit
@given(st.integers(0, 5), st.integers(1, 9), st.sampled_from([0.5, 7.0]), st.integers(0, 99))
def test_the_clamped_gate_is_the_formula_in_float64(m: int, n: int, limit: float, seed: int) -> None:
    y, alpha = (np.random.default_rng(seed).standard_normal((m, 2 * n)) * 4).astype(F), F(1.702)
    h = np.full((m, n), np.nan, F)
    clamped_glu(y, alpha, F(limit), h)
    gate, up = np.minimum(y[:, ::2].astype(np.float64), limit), np.clip(y[:, 1::2].astype(np.float64), -limit, limit)
    z = float(alpha) * gate
    exact = (up + 1) * gate / (1 + np.exp(-z))
    # Two roundings of z, which the exponential magnifies; the sigmoid (5 u), two products and the sum.
    assert (np.abs(h - exact) <= (10 + 2 * np.abs(z)) * U * np.abs(exact) + 1e-37).all()
    again = np.full_like(h, np.nan)
    plain(clamped_glu)(y, alpha, F(limit), again)
    np.testing.assert_array_equal(h, again)


@pytest.mark.nojit
def test_the_clamped_gate_keeps_what_is_not_a_number_and_holds_infinities() -> None:
    y, h = np.array([[np.nan, 1, 1, np.nan, np.inf, np.inf, 1, -np.inf]], F), np.zeros((1, 4), F)
    clamped_glu(y, F(1), F(2), h)
    assert np.isnan(h[0, :2]).all()
    np.testing.assert_allclose(h[0, 2:], [3 * 2 / (1 + np.exp(-2)), -1 / (1 + np.exp(-1))], rtol=1e-6)


@pytest.mark.nojit
def test_combining_adds_the_weighted_output_to_its_tokens_with_one_rounding() -> None:
    rng = np.random.default_rng(3)
    y, scale = rng.standard_normal((2, 3)).astype(F), rng.random(2).astype(F)
    out = rng.standard_normal((4, 6)).astype(F)
    rows = np.array([3, 0], np.int64)
    expected = out.copy()
    for i, row in enumerate(rows):
        for j in range(3):
            expected[row, 2 + j] = fma(scale[i], y[i, j], out[row, 2 + j])
    combine_into(y, rows, scale, 2, out)
    np.testing.assert_array_equal(out, expected)

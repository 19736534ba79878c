"""Gating and combining: values against float64, bits against a scalar definition, and nothing else written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_kernels._jit import plain
from wse_kernels.ffn import combine_into, swiglu_into
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

"""RMSNorm, residual sum and chains: bits against a scalar definition, values against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_kernels._jit import plain
from wse_kernels.fma import fma
from wse_kernels.norm import add_to, chain_max, chain_panels, fill_zero, rms_scale, sum_squares

F = np.float32
U = 2.0**-24
SHAPES = st.tuples(st.integers(0, 9), st.integers(1, 33))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def squares(row: np.ndarray) -> np.float32:
    total = F(0.0)
    for x in row:
        total = fma(x, x, total)
    return total


@pytest.mark.nojit
@given(SHAPES, st.integers(0, 99))
def test_sum_of_squares_has_the_stated_bits(shape: tuple[int, int], seed: int) -> None:
    x = normal(seed, *shape)
    ss = np.full((shape[0], 1), np.nan, F)
    sum_squares(x, ss)
    assert ss[:, 0].tolist() == [squares(row) for row in x]
    again = np.full_like(ss, np.nan)
    plain(sum_squares)(x, again)
    np.testing.assert_array_equal(ss, again)


@pytest.mark.nojit
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_rms_norm_is_the_formula_in_float64(t: int, n: int, seed: int) -> None:
    x, weight = normal(seed, t, n), normal(seed + 1, 1, n)
    total, out = np.empty((t, 1), F), np.empty((t, n), F)
    sum_squares(x, total)
    rms_scale(x, total, weight, F(n), F(1e-5), out)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + float(F(1e-5))) * weight
    # The sum of squares loses at most n u of itself (all terms are positive), halved by the square root; then a division, a sum, the root,
    # its reciprocal and two products lose u each, the first two halved too.
    assert (np.abs(out - exact) <= (n / 2 + 1 + 4 + 1) * U * np.abs(exact) + 1e-45).all()
    again = np.empty_like(out)
    plain(rms_scale)(x, total, weight, F(n), F(1e-5), again)
    np.testing.assert_array_equal(out, again)


@pytest.mark.nojit
def test_a_row_of_zeros_stays_zero() -> None:
    out = np.empty((1, 3), F)
    rms_scale(np.zeros((1, 3), F), np.zeros((1, 1), F), np.ones((1, 3), F), F(3), F(1e-6), out)
    assert (out == 0).all()


@pytest.mark.nojit
@given(SHAPES, st.integers(0, 99))
def test_residual_sum_is_one_addition(shape: tuple[int, int], seed: int) -> None:
    x, y = normal(seed, *shape), normal(seed + 1, *shape)
    expected = x + y
    add_to(x, y)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.nojit
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_chain_adds_the_chosen_panels_west_to_east(n_cols: int, size: int, data: st.DataObject) -> None:
    cols = np.array(sorted(data.draw(st.sets(st.integers(0, n_cols - 1), min_size=1))), np.int64)
    partials = normal(data.draw(st.integers(0, 99)), n_cols, size)
    expected = partials[cols[0]].copy()
    for col in cols[1:]:
        expected = expected + partials[col]
    out = np.full(size, np.nan, F)
    chain_panels(partials.reshape(-1), size, cols, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.nojit
def test_chained_maximum_is_exact_and_keeps_nan() -> None:
    acc = np.array([[1, -0.0, np.nan, -np.inf, 3]], F)
    chain_max(acc, np.array([[2, -1, 5, np.nan, 3]], F))
    np.testing.assert_array_equal(acc, np.array([[2, -0.0, np.nan, np.nan, 3]], F))


@pytest.mark.nojit
def test_fill_zero_is_plus_zero() -> None:
    x = np.full((2, 3), -1, F)
    fill_zero(x)
    assert not np.signbit(x).any()
    assert not x.any()

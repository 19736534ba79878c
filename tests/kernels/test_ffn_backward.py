"""Backward forms of gates and products: values against float64, bits against scalar definitions, sums that go on where they stood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.equivalence.gradient_bounds import glu_gradient_bound
from wse_emu.equivalence.tolerance import proven_sum_bound
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.reference.ffn_gradients import glu_slopes
from wse_kernels._jit import plain
from wse_kernels.ffn_backward import (
    add_bias_products,
    add_column_sums,
    add_weight_gradient,
    clamped_glu_backward,
    geglu_backward,
    keep_rows,
    put_in_slots,
    put_row_products,
    row_products,
    sigmoid_backward,
    swiglu_backward,
)
from wse_kernels.fma import fma

F = np.float32
CLAMPED = ClampedExperts(alpha=float(F(1.702)), limit=2.0)


def gate_backward(kind: str, y: np.ndarray, dh: np.ndarray, *, interpreted: bool = False) -> np.ndarray:
    body = {"silu": swiglu_backward, "gelu_tanh": geglu_backward, "clamped": clamped_glu_backward}[kind]
    out = np.full_like(y, np.nan)
    constants = (F(CLAMPED.alpha), F(CLAMPED.limit)) if kind == "clamped" else ()
    with np.errstate(all="ignore"):
        (plain(body) if interpreted else body)(y, *constants, dh, out)
    return out


@pytest.mark.nojit
@given(
    st.sampled_from(["silu", "gelu_tanh", "clamped"]), st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.1, 3.0, 30.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_gates_send_back_the_formula_in_float64(kind: str, m: int, n: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, dh = (rng.standard_normal((m, 2 * n)) * scale).astype(F), rng.standard_normal((m, n)).astype(F)
    if kind == "clamped":
        y = np.where(rng.random(y.shape) < 0.2, np.copysign(F(2), y), y)  # exactly at the limit gradients pass
    found = gate_backward(kind, y, dh)
    gate, up, d, none = y[:, ::2].astype(np.float64), y[:, 1::2].astype(np.float64), dh.astype(np.float64), np.zeros((m, n))
    clamped = CLAMPED if kind == "clamped" else None
    slopes = glu_slopes(gate, up, kind, clamped)
    bounds = glu_gradient_bound(gate, up, d, none, none, none, kind, clamped)
    for part, slope, bound in zip((found[:, ::2], found[:, 1::2]), slopes, bounds, strict=True):
        # No error of its own may flip what lies at a limit, so the bound may not excuse it.
        allowed = np.where(np.abs(d * slope) > 0, np.minimum(bound, 1e-3 * (1 + np.abs(d * slope))), bound)
        assert (np.abs(part - d * slope) <= allowed).all()
    np.testing.assert_array_equal(found, gate_backward(kind, y, dh, interpreted=True))


@pytest.mark.nojit
def test_gates_have_no_slope_far_out_on_one_side_and_one_on_the_other() -> None:
    y = np.array([[3e38, 1, -3e38, 1, np.nan, 1]], F)
    dh = np.full((1, 3), 2, F)
    for kind in ("silu", "gelu_tanh"):
        found = gate_backward(kind, y, dh)
        assert found[0, [0, 2]].tolist() == [2, 0]
        assert np.isnan(found[0, 4:]).all()
    found = gate_backward("clamped", y, dh)
    assert found[0, [0, 2]].tolist() == [0, 0]
    assert np.isnan(found[0, 4:]).all()
    # The up projection beyond its limits.
    assert gate_backward("clamped", np.array([[1, 9, 1, -9]], F), dh[:, :2])[0, [1, 3]].tolist() == [0, 0]


@pytest.mark.nojit
@given(st.integers(0, 11), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_gradients_of_weights_are_summed_token_by_token_in_any_number_of_pieces(m: int, k: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy, before = (rng.standard_normal(shape).astype(F) for shape in ((m + 2, k), (m, n), (k, n)))
    rows = np.sort(rng.permutation(m + 2)[:m])
    expected = before.copy()
    for i, row in enumerate(rows):
        for a in range(k):
            for j in range(n):
                expected[a, j] = fma(x[row, a], dy[i, j], expected[a, j])
    for body in (add_weight_gradient, plain(add_weight_gradient)):
        whole, parts = before.copy(), before.copy()
        body(x, rows, dy, whole)
        np.testing.assert_array_equal(whole, expected)
        cut = int(rng.integers(m + 1))
        for piece in (slice(cut), slice(cut, m)):
            body(x, rows[piece], dy[piece], parts)
        np.testing.assert_array_equal(parts, expected)
    exact = before + x.astype(np.float64)[rows].T @ dy
    size = np.abs(before) + np.abs(x.astype(np.float64)[rows]).T @ np.abs(dy)
    assert (np.abs(expected - exact) <= proven_sum_bound(m + 1, size)).all()


@pytest.mark.nojit
@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 99))
def test_sums_along_rows_and_columns_are_in_order(m: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, bias, start = (rng.standard_normal(shape).astype(F) for shape in ((m, n), (m, n), (1, n), (1, n)))
    products, sums = np.zeros(m, F), start[0].copy()
    for i in range(m):
        for j in range(n):
            products[i] = fma(a[i, j], b[i, j], products[i])
            sums[j] = sums[j] + a[i, j]
    more = products.copy()
    for i in range(m):
        for j in range(n):
            more[i] = fma(a[i, j], bias[0, j], more[i])
    for as_is in (False, True):
        out, total = np.full(m, np.nan, F), start.copy()
        (plain(row_products) if as_is else row_products)(a, b, out)
        np.testing.assert_array_equal(out, products)
        (plain(add_bias_products) if as_is else add_bias_products)(a, bias, out)
        np.testing.assert_array_equal(out, more)
        (plain(add_column_sums) if as_is else add_column_sums)(a, total)
        np.testing.assert_array_equal(total[0], sums)


@pytest.mark.nojit
def test_the_gate_of_shared_experts_sends_back_its_slope() -> None:
    rng = np.random.default_rng(0)
    x, d = (rng.standard_normal((50, 1)) * 8).astype(F), rng.standard_normal(50).astype(F)
    wide = x[:, 0].astype(np.float64)
    exact = d / (1 + np.exp(wide)) / (1 + np.exp(-wide))
    for body in (sigmoid_backward, plain(sigmoid_backward)):
        out = np.empty_like(x)
        body(x, d, out)
        np.testing.assert_allclose(out[:, 0], exact, rtol=13 * 2.0**-24)


@pytest.mark.nojit
def test_only_listed_rows_are_kept() -> None:
    x = np.array([[1, 2], [np.inf, np.nan], [3, 4], [5, 6]], F)
    keep_rows(np.array([0, 2]), x)
    np.testing.assert_array_equal(x, [[1, 2], [0, 0], [3, 4], [0, 0]])
    keep_rows(np.zeros(0, np.int64), x)
    assert (x == 0).all()


@pytest.mark.nojit
def test_values_of_an_expert_go_to_its_slots() -> None:
    ids, out = np.array([[1, 2], [0, 1], [2, -1]]), np.zeros((3, 2), F)
    put_in_slots(np.array([7, 8], F), np.array([0, 1]), 1, ids, out)
    assert out.tolist() == [[7, 0], [0, 8], [0, 0]]


@pytest.mark.nojit
def test_products_of_rows_go_there_at_once() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((2, 5)).astype(F) for _ in range(2))
    ids, rows = np.array([[1, 2], [0, 1], [2, -1]]), np.array([0, 1])
    products, expected = np.zeros(2, F), np.zeros((3, 2), F)
    row_products(a, b, products)
    put_in_slots(products, rows, 1, ids, expected)
    for body in (put_row_products, plain(put_row_products)):
        out = np.zeros((3, 2), F)
        body(a, b, rows, 1, ids, out)
        np.testing.assert_array_equal(out, expected)

"""Rotary embedding: its definition, one element at a time; float64; what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_kernels._jit import plain
from wse_kernels.fma import fma
from wse_kernels.rope import rotate_qk

F = np.float32
U = 2.0**-24

pytestmark = pytest.mark.nojit


def block(t: int, n_units: int, q: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((t, n_units * (q + 2) * 2)).astype(F)
    pos = rng.integers(0, 4096, t)
    angle = pos[:, None] * 10000.0 ** (-2 * rng.integers(0, 32, n_units) / 64)
    return qkv, np.cos(angle).astype(F), np.sin(angle).astype(F)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5), st.integers(0, 999))
def test_rotation_is_one_rounded_product_and_one_fma(t: int, n_units: int, q: int, seed: int) -> None:
    qkv, cos, sin = block(t, n_units, q, seed)
    expected = qkv.copy().reshape(t, n_units, q + 2, 2)
    for i, u, s in np.ndindex(t, n_units, q + 1):
        a, b = expected[i, u, s]
        expected[i, u, s] = fma(a, cos[i, u], -(b * sin[i, u])), fma(b, cos[i, u], a * sin[i, u])
    for body in (rotate_qk, plain(rotate_qk)):
        got = qkv.copy()
        body(got, cos, sin, q)
        assert np.array_equal(got.view(np.int32), expected.reshape(qkv.shape).view(np.int32))


def test_rotation_agrees_with_float64_and_leaves_values_alone() -> None:
    t, n_units, q = 40, 8, 3
    qkv, cos, sin = block(t, n_units, q, 1)
    got = qkv.copy()
    rotate_qk(got, cos, sin, q)
    x = qkv.astype(np.float64).reshape(t, n_units, q + 2, 2)
    y = got.reshape(t, n_units, q + 2, 2)
    assert np.array_equal(x[:, :, q + 1], y[:, :, q + 1])
    c, s = cos.astype(np.float64)[:, :, None], sin.astype(np.float64)[:, :, None]
    a, b = x[:, :, : q + 1, 0], x[:, :, : q + 1, 1]
    for e, (main, cross) in enumerate([(a * c, -b * s), (b * c, a * s)]):
        # One rounding of the product with the sine, one of the sum.
        bound = U * np.abs(cross) * (1 + U) + U * np.abs(main + cross)
        assert np.all(np.abs(y[:, :, : q + 1, e] - (main + cross)) <= bound)


def test_rotation_by_nothing_changes_no_bit() -> None:
    qkv, cos, sin = block(5, 3, 2, 2)
    got = qkv.copy()
    rotate_qk(got, np.ones_like(cos), np.zeros_like(sin), 2)
    assert np.array_equal(got, qkv)


def test_any_piece_of_rows_gives_the_same_bits() -> None:
    qkv, cos, sin = block(11, 7, 4, 3)
    whole = qkv.copy()
    rotate_qk(whole, cos, sin, 4)
    pieces = qkv.copy()
    for i0, i1 in ((0, 1), (1, 6), (6, 6), (6, 11)):
        rotate_qk(pieces[i0:i1], cos[i0:i1], sin[i0:i1], 4)
    assert np.array_equal(whole.view(np.int32), pieces.view(np.int32))

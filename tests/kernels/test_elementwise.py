"""tanh and GELU against float64, and what a core does to single elements against the formula written again."""

from __future__ import annotations

import numpy as np
import pytest
from numba import config
from numpy.typing import NDArray
from scipy.special import expit

from wse_kernels._jit import plain
from wse_kernels.elementwise import add_bias, add_scaled, clip_to, scale_by_sigmoid, soft_cap
from wse_kernels.exp import gelu_tanh32, gelu_tanh_array, tanh32, tanh_array
from wse_kernels.ffn import geglu_into
from wse_kernels.qk_norm import qk_scale, qk_squares
from wse_kernels.query_temperature import tune_queries

F = np.float32
U = 2.0**-24
F32 = NDArray[np.float32]

pytestmark = pytest.mark.nojit


def sample() -> F32:
    """Arguments from all magnitudes that matter, both signs."""
    rng = np.random.default_rng(5)
    n = 200 if config.DISABLE_JIT else 1 << 17
    magnitude = np.exp(rng.uniform(np.log(1e-30), np.log(30), n))
    return np.concatenate([magnitude, -magnitude, rng.uniform(-12, 12, n), [0.0, -0.0, 0.625, -0.625]]).astype(F)


def applied(function, x: F32) -> F32:
    out = np.empty_like(x)
    function(x, out)
    return out


def test_tanh_is_within_two_and_a_half_ulp() -> None:
    x = sample()
    got, want = applied(tanh_array, x).astype(np.float64), np.tanh(x.astype(np.float64))
    usual = np.abs(want) > 2.0**-120
    error = np.abs(got - want)[usual] / np.ldexp(1.0, np.frexp(want[usual])[1] - 24)
    assert 0.5 < error.max() <= 2.5
    np.testing.assert_array_equal(applied(tanh_array, np.array([20, -20, np.inf, -np.inf, np.nan], F)), np.array([1, -1, 1, -1, np.nan], F))
    np.testing.assert_array_equal(applied(tanh_array, -x), -applied(tanh_array, x))


def test_gelu_is_within_its_stated_error() -> None:
    x = sample()
    got, g = applied(gelu_tanh_array, x).astype(np.float64), x.astype(np.float64)
    z = 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    want = g * expit(z)
    usual = (np.abs(want) > 2.0**-120) & (z > -80)
    allowed = (6 + 5 * np.abs(z) * (1 - expit(z))) * U * np.abs(want)
    ratio = np.abs(got - want)[usual] / allowed[usual]
    assert 0.2 < ratio.max() <= 1
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("array", "one"), [(tanh_array, tanh32), (gelu_tanh_array, gelu_tanh32)])
def test_an_array_in_any_piece_and_plain_python_give_the_same_bits(array, one) -> None:
    x = sample()[::997]
    whole = applied(array, x)
    np.testing.assert_array_equal(np.concatenate([applied(array, x[:3]), applied(array, x[3:])]), whole)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(np.array([plain(one)(v) for v in x], F), whole)


def test_single_elements_follow_their_formulas() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 5, 7)).astype(F)
    bias, gate = rng.standard_normal((1, 7)).astype(F), (4 * rng.standard_normal((5, 1))).astype(F)
    cases = [
        (add_bias, (bias,), x + bias),
        (add_scaled, (y, F(0.3)), x + y * F(0.3)),
        (clip_to, (F(0.5),), np.clip(x, F(-0.5), F(0.5))),
    ]
    for body, args, expected in cases:
        out = x.copy()
        body(out, *args)
        np.testing.assert_array_equal(out, expected, err_msg=body.__name__)
    out = x.copy()
    soft_cap(out, F(0.7))
    exact = 0.7 * np.tanh(x.astype(np.float64) / 0.7)
    np.testing.assert_allclose(out, exact, rtol=8 * U + 1e-7)
    out = x.copy()
    scale_by_sigmoid(out, gate)
    np.testing.assert_allclose(out, x * expit(gate.astype(np.float64)), rtol=6 * U)
    held = np.array([[np.nan, 9, -9]], F)
    clip_to(held, F(2))
    np.testing.assert_array_equal(held, np.array([[np.nan, 2, -2]], F))


@pytest.mark.parametrize("q", [1, 3])
def test_queries_alone_take_the_factor_of_their_token(q: int) -> None:
    rng = np.random.default_rng(q)
    qkv, factor = rng.standard_normal((4, 5 * (q + 2) * 2)).astype(F), rng.uniform(1, 2, (4, 1)).astype(F)
    expected = qkv.reshape(4, 5, q + 2, 2).copy()
    expected[:, :, :q] *= factor[:, :, None, None]
    for body in (tune_queries, plain(tune_queries)):
        out = qkv.copy()
        body(out, factor, q)
        np.testing.assert_array_equal(out, expected.reshape(4, -1))


def test_geglu_writes_its_columns_only() -> None:
    rng = np.random.default_rng(2)
    y, h = rng.standard_normal((3, 8)).astype(F), np.full((4, 9), F(7))
    geglu_into(y, 2, h)
    g, up = y[:, ::2], y[:, 1::2]
    np.testing.assert_array_equal(h[:3, 2:6], applied(gelu_tanh_array, g.reshape(-1)).reshape(3, 4) * up)
    assert (h[3] == 7).all()
    assert (h[:, :2] == 7).all()
    assert (h[:, 6:] == 7).all()


@pytest.mark.parametrize("q", [1, 3])
def test_queries_and_keys_are_normalised_over_the_row(q: int) -> None:
    rng = np.random.default_rng(q)
    units, t = 5, 4
    qkv = rng.standard_normal((t, units * (q + 2) * 2)).astype(F)
    before = qkv.reshape(t, units, q + 2, 2).astype(np.float64)
    ss = np.empty((t, 2), F)
    qk_squares(qkv, q, ss)
    np.testing.assert_allclose(ss[:, 0], (before[:, :, :q] ** 2).sum((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(ss[:, 1], (before[:, :, q] ** 2).sum((1, 2)), rtol=1e-6)
    w_q, w_k = rng.standard_normal((1, units * q * 2)).astype(F), rng.standard_normal((1, units * 2)).astype(F)
    qk_scale(qkv, ss, w_q, w_k, q, F(units * q * 2), F(units * 2), F(1e-3))
    after = qkv.reshape(t, units, q + 2, 2)
    for part, slots, weight in ((slice(0, q), q, w_q.reshape(units, q, 2)), (slice(q, q + 1), 1, w_k.reshape(units, 1, 2))):
        x = before[:, :, part]
        expected = x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) / (units * slots * 2) + 1e-3) * weight
        np.testing.assert_allclose(after[:, :, part], expected, rtol=2e-6)
    np.testing.assert_array_equal(after[:, :, q + 1], before[:, :, q + 1].astype(F))

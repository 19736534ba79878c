"""The bounds hold for straightforward float32 arithmetic of every kind of data, and are not so wide that they hold for anything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.routing_bounds import expert_weights_bound
from wse_emu.equivalence.tolerance import U
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import formulas, routing

RNG = np.random.default_rng(0)


def chained(x, w):
    """``x @ w.T`` in float32, k ascending, product and sum rounded apart: the least accurate order in use."""
    acc = np.zeros((len(x), len(w)), np.float32)
    for k in range(x.shape[1]):
        acc = acc + x[:, k, None] * w[None, :, k]
    return acc


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 1000])
@pytest.mark.parametrize("kind", ["normal", "positive", "wide"])
def test_products_of_random_data_keep_the_rule(n, kind):
    x, w = (RNG.standard_normal((40, n)).astype(np.float32) for _ in range(2))
    if kind == "positive":
        x, w = np.abs(x), np.abs(w)
    if kind == "wide":
        x *= np.float32(10) ** RNG.integers(-6, 6, x.shape).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    ratio = np.abs(chained(x, w) - exact) / tolerance.linear_bound(x, w)
    assert ratio.max() <= 1
    assert ratio.max() > 0.002, "a bound this wide finds nothing"


@settings(max_examples=60)
@given(arrays(np.float32, (2, 50), elements=st.floats(-1e6, 1e6, width=32)))
def test_any_data_keep_the_proven_bound(xw):
    x, w = xw[:1], xw[1:]
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    bound = tolerance.proven_sum_bound(50, tolerance.magnitude_product(x, w)) * (1 + 50 * U)  # the magnitude is a float32 sum itself
    assert (np.abs(chained(x, w) - exact) <= bound).all()


def test_constant_data_may_break_the_rule_but_not_the_proven_bound():
    x, w = np.full((1, 1 << 16), np.float32(0.1)), np.ones((1, 1 << 16), np.float32)
    error = abs(float(chained(x, w)[0, 0]) - x.astype(np.float64).sum())
    assert error > tolerance.linear_bound(x, w)[0, 0]
    assert error < tolerance.proven_sum_bound(1 << 16, tolerance.magnitude_product(x, w))[0, 0]


def test_magnitudes_too_large_for_float32_are_still_bounded():
    x = np.full((1, 4), np.float32(1e20))
    assert tolerance.magnitude_product(x, x)[0, 0] == pytest.approx(4e40)


def test_sums_that_underflow_are_allowed_the_smallest_numbers():
    x = np.full((1, 3), np.float32(1e-30))
    assert np.abs(chained(x, x) - x.astype(np.float64) @ x.astype(np.float64).T) <= tolerance.linear_bound(x, x)


@pytest.mark.parametrize("n", [2, 32, 4096])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm(n, size):
    x, w = (size * RNG.standard_normal((64, n))).astype(np.float32), (1 + 0.1 * RNG.standard_normal(n)).astype(np.float32)
    total = np.zeros(64, np.float32)
    for k in range(n):
        total = total + x[:, k] * x[:, k]
    ours = x * (np.float32(1) / np.sqrt(total / np.float32(n) + np.float32(1e-5)))[:, None] * w
    exact = formulas.rms_norm(x.astype(np.float64), w.astype(np.float64), 1e-5)
    ratio = np.abs(ours - exact) / tolerance.rms_norm_bound(exact)
    assert 0.005 < ratio.max() <= 1


@pytest.mark.parametrize("n", [2, 32, 4096])
@pytest.mark.parametrize(("size", "middle"), [(1e-4, 0.0), (1.0, 0.3), (1e4, 0.0), (1.0, 100.0)])
def test_layer_norm(n, size, middle):
    x, w = (size * RNG.standard_normal((64, n)) + middle).astype(np.float32), (1 + 0.1 * RNG.standard_normal(n)).astype(np.float32)
    b = RNG.standard_normal(n).astype(np.float32)
    total, squares = np.zeros((2, 64, 1), np.float32)
    for k in range(n):
        total = total + x[:, [k]]
    deviation = x - total / np.float32(n)
    for k in range(n):
        squares = squares + deviation[:, [k]] * deviation[:, [k]]
    ours = deviation * (np.float32(1) / np.sqrt(squares / np.float32(n) + np.float32(1e-5))) * w
    wide, w64, b64 = (a.astype(np.float64) for a in (x, w, b))
    for value, bias in ((ours, None), (ours + b, b64)):
        ratio = np.abs(value - formulas.layer_norm(wide, w64, bias, 1e-5)) / tolerance.layer_norm_bound(wide, w64, 1e-5, bias)
        assert 0.005 < ratio.max() <= 1


def test_rotary():
    x, pos = RNG.standard_normal((3000, 2, 16)).astype(np.float32), RNG.integers(0, 100_000, 3000)
    angles = pos[:, None] * 10000.0 ** -(np.arange(8) / 8)
    for factor in (1.0, 1.3, 1 + RNG.random((3000, 1))):
        exact = formulas.rotate(x.astype(np.float64), angles, factor)
        ratio = np.abs(formulas.rotate(x, angles, factor) - exact) / tolerance.rotary_bound(x.astype(np.float64), angles, factor)
        assert 0.3 < ratio.max() <= 1


@pytest.mark.parametrize("size", [0.1, 1.0, 6.0])
def test_attention(size):
    t, d = 200, 16
    q, k, v = (size * RNG.standard_normal((t, d)), size * RNG.standard_normal((t, d)), RNG.standard_normal((t, d)))
    q, k, v = (a.astype(np.float32) for a in (q, k, v))
    mask = np.tri(t, dtype=bool)
    n = mask.sum(axis=1)
    s32 = np.where(mask, chained(q, k) * np.float32(d**-0.5), np.float32(-np.inf))
    m32 = s32.max(axis=1)
    p32 = np.exp(s32 - m32[:, None])
    den32 = np.zeros(t, np.float32)
    for j in range(t):
        den32 = den32 + p32[:, j]
    context32 = chained(p32, v.T.copy()) / den32[:, None]

    q, k, v, m, den = (a.astype(np.float64) for a in (q, k, v, m32, den32))
    e = np.where(mask, tolerance.score_bound(q, k, d**-0.5), 0)
    s = np.where(mask, q @ k.T / np.sqrt(d), -np.inf)
    p, e_p = np.exp(s - m[:, None]), tolerance.softmax_term_error(s, m, e)
    checks = {
        "max": (m32, s.max(axis=1), tolerance.maximum_bound(s, e)),
        "denominator": (den32, p.sum(axis=1), tolerance.denominator_bound(p, e_p, n)),
        "context": (context32, p @ v / den[:, None], tolerance.context_bound(p, e_p, v, den, n)),
    }
    for name, (ours, exact, bound) in checks.items():
        ratio = np.abs(ours - exact) / bound
        assert 0.01 < ratio.max() <= 1, name


def test_maximum_bound_is_that_of_the_scores_that_can_be_the_maximum():
    scores, e = np.array([[0.0, 1.0, -np.inf]]), np.array([[5.0, 0.25, 0.0]])
    assert tolerance.maximum_bound(scores, e)[0] == pytest.approx(4.0)  # the first may really be 5
    assert tolerance.maximum_bound(scores, e / 10)[0] == pytest.approx(0.025)


def test_scores_of_which_nothing_is_known_allow_whole_terms_and_no_more():
    scores, e_scores = np.array([[0.0, -2e9, 22.0]]), np.full((1, 3), 1e9)
    m, n, v = np.zeros(1), np.array([3]), np.array([[1.0], [2.0], [4.0]])
    whole = np.array([1.0, 1.0, np.exp(22.0)])
    with np.errstate(all="ignore"):
        p, e_p = np.exp(scores), tolerance.softmax_term_error(scores, m, e_scores)
        np.testing.assert_allclose(tolerance.denominator_bound(p, e_p, n), whole.sum(), rtol=1e-6)
        np.testing.assert_allclose(tolerance.context_bound(p, e_p, v, np.ones(1), n), (whole @ v)[None], rtol=1e-6)


def gated(gate, activation):
    """Ours, in float32: ``x sigmoid(z)`` with the z of the activation."""
    z = gate
    if activation == "gelu_tanh":
        z = gate * (gate * gate * np.float32(0.044715) + np.float32(1)) * np.float32(2 * np.sqrt(2 / np.pi))
    return gate / (np.float32(1) + np.exp(-z))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu(activation):
    gate = np.concatenate([RNG.standard_normal(5000) * 5, np.linspace(-120, 120, 5001)]).astype(np.float32)
    up = RNG.standard_normal(10001).astype(np.float32)
    zero = np.zeros(10001)
    with np.errstate(over="ignore"):
        ours = gated(gate, activation) * up
    g, w = gate.astype(np.float64), up.astype(np.float64)
    ratio = np.abs(ours - formulas.glu(g, w, activation)) / tolerance.glu_bound(g, w, zero, zero, activation)
    assert 0.1 < ratio.max() <= 1


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_carries_the_errors_of_its_factors(activation):
    g, w = RNG.standard_normal((2, 1000)) * 4
    e_g, e_w = np.abs(RNG.standard_normal((2, 1000))) * 1e-3
    bound = tolerance.glu_bound(g, w, e_g, e_w, activation)
    for a in (-1, 1):
        for b in (-1, 1):
            moved = np.abs(formulas.glu(g + a * e_g, w + b * e_w, activation) - formulas.glu(g, w, activation))
            assert (moved <= bound).all()
            assert (moved / bound).max() > 0.5


def test_the_clamped_gate_carries_the_errors_of_its_factors():
    g, w = RNG.standard_normal((2, 1000)) * 4
    e_g, e_w = np.abs(RNG.standard_normal((2, 1000))) * 1e-3
    bound, none = tolerance.clamped_glu_bound(g, w, e_g, e_w, 1.702, 3.0), np.zeros(1000)
    exact = formulas.clamped_glu(g, w, 1.702, 3.0)
    for a in (-1, 1):
        for b in (-1, 1):
            moved = np.abs(formulas.clamped_glu(g + a * e_g, w + b * e_w, 1.702, 3.0) - exact)
            assert (moved <= bound).all()
            assert (moved / bound).max() > 0.5
    g32, w32 = g.astype(np.float32), w.astype(np.float32)
    wide_g, wide_w = g32.astype(np.float64), w32.astype(np.float64)
    ours = formulas.clamped_glu(g32, w32, 1.702, 3.0)
    error = np.abs(ours - formulas.clamped_glu(wide_g, wide_w, 1.702, 3.0))
    ratio = error / tolerance.clamped_glu_bound(wide_g, wide_w, none, none, 1.702, 3.0)
    assert 0.05 < ratio.max() <= 1


@pytest.mark.parametrize("renormalize", [True, False])
def test_expert_weights(renormalize):
    logits = (4 * RNG.standard_normal((500, 16))).astype(np.float32)
    rule = RoutingRule(expert_weighting_normalization=renormalize)
    ids = routing.highest(logits, 4, "lowest_id")
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = np.zeros(500, np.float32)
    for e in range(16):
        total = total + p[:, e]
    ours = np.take_along_axis(p / total[:, None], ids, axis=1)
    if renormalize:
        ours = ours / (ours[:, 0] + ours[:, 1] + ours[:, 2] + ours[:, 3])[:, None]
    wide = logits.astype(np.float64)
    ratio = np.abs(ours - routing.weights(wide, ids, rule)) / expert_weights_bound(wide, ids, rule)
    assert 0.05 < ratio.max() <= 1


def test_combination_and_addition():
    w, outs = RNG.random((300, 3)).astype(np.float32), RNG.standard_normal((300, 3, 20)).astype(np.float32)
    ours = np.zeros((300, 20), np.float32)
    for slot in range(3):
        ours = ours + w[:, slot, None] * outs[:, slot]
    exact = np.einsum("tk,tkh->th", w.astype(np.float64), outs.astype(np.float64))
    assert 0.1 < (np.abs(ours - exact) / tolerance.combine_bound(w.astype(np.float64), outs.astype(np.float64))).max() <= 1
    a, b = RNG.standard_normal((2, 20000)).astype(np.float32)
    exact = a.astype(np.float64) + b
    assert 0.9 < (np.abs((a + b) - exact) / tolerance.add_bound(exact)).max() <= 1

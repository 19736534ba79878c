"""Gradients of every routing rule on one core: against full matrices of derivatives in float64, and the bits of plain Python."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.equivalence.gradient_bounds import logits_gradient_bound
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.router import router_code
from wse_emu.reference import routing
from wse_emu.reference.load_balance import load_balancing_gradient
from wse_emu.reference.routing_gradients import logits_gradient, scores_jacobian
from wse_emu.testing.routing_rules import random_rule, random_rule_together
from wse_kernels import routing as codes
from wse_kernels._jit import plain
from wse_kernels.routing_backward import BACKWARD_ROWS, add_balance_backward, count_visits, route_tokens_backward

F = np.float32


def backward(logits, ids, d_weights, rule: RoutingRule, body=route_tokens_backward) -> np.ndarray:
    out, work = np.full(logits.shape, np.nan, F), np.full((BACKWARD_ROWS, logits.shape[1]), np.nan, F)
    with np.errstate(all="ignore"):
        body(logits, ids, d_weights, router_code(rule), work, out)
    return out


def drawn(seed: int, t: int, meet: bool):
    """A rule, logits, a decision by the plain definition, and a gradient of its weights."""
    rng = np.random.default_rng(seed)
    rule, n, top_k = (random_rule_together if meet else random_rule)(rng)
    logits = (rng.standard_normal((t, n)) * rng.choice([0.3, 2.0, 6.0])).astype(F)
    correction = rng.standard_normal(n) if rule.e_score_correction_bias else None
    wide = logits.astype(np.float64)
    if meet:
        together = np.zeros(t, np.int64)
        ids = routing.choose_together(routing.compared_together(wide, together, rule, correction), together, top_k, rule)
    else:
        ids = routing.choose(routing.compared(wide, rule, correction), top_k, rule)
    return rule, logits, ids, rng.standard_normal(ids.shape).astype(F)


@pytest.mark.nojit
@given(st.integers(0, 1 << 31), st.integers(1, 5), st.booleans())
def test_any_rule_sends_back_what_its_derivatives_say(seed: int, t: int, meet: bool) -> None:
    rule, logits, ids, d_weights = drawn(seed, t, meet)
    wide, d = logits.astype(np.float64), d_weights.astype(np.float64)
    exact = logits_gradient(wide, ids, rule, d)
    bound = logits_gradient_bound(wide, ids, rule, d, np.zeros(d.shape))
    found = backward(logits, ids, d_weights, rule)
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.nojit
@given(st.integers(0, 1 << 31), st.booleans())
def test_plain_python_gives_the_same_bits(seed: int, meet: bool) -> None:
    rule, logits, ids, d_weights = drawn(seed, 3, meet)
    compiled, interpreted = (backward(logits, ids, d_weights, rule, body) for body in (route_tokens_backward, plain(route_tokens_backward)))
    np.testing.assert_array_equal(compiled, interpreted)


@pytest.mark.nojit
def test_one_expert_whose_weight_is_always_one_sends_back_exactly_nothing() -> None:
    rng = np.random.default_rng(0)
    logits, d_weights = (rng.standard_normal((50, 8)) * 4).astype(F), rng.standard_normal((50, 1)).astype(F) * F(1e6)
    for kind in ("softmax", "sigmoid", "sqrtsoftplus"):
        rule = RoutingRule(router_selection_nonlinearity=kind, expert_weighting_nonlinearity=kind)
        ids = logits.argmax(axis=1)[:, None]
        assert (backward(logits, ids, d_weights, rule) == 0).all()
        for other in (replace(rule, null_expert_bias=1.1), replace(rule, expert_weighting_normalization=False)):
            assert (backward(logits, ids, d_weights, other) != 0).any(axis=1).all()
        two = np.argsort(-logits, axis=1)[:, :2].copy()
        assert (backward(logits, two, np.repeat(d_weights, 2, axis=1) * np.array([1, -1], F), rule) != 0).any(axis=1).all()


@pytest.mark.nojit
def test_a_divisor_at_its_least_value_is_a_constant() -> None:
    logits, ids, d_weights = np.array([[0, 0.5, 1, 0]], F), np.array([[2]]), np.array([[3]], F)
    rule = RoutingRule(norm_min=0.9)
    p = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    exact = 3 / 0.9 * p[2] * (np.eye(4)[2] - p)
    np.testing.assert_allclose(backward(logits, ids, d_weights, rule)[0], exact, rtol=1e-6)
    assert (backward(logits, ids, d_weights, replace(rule, norm_min=0.4)) == 0).all()  # the sum is above that


@pytest.mark.nojit
def test_weights_are_divided_as_they_were_rounded_and_roundings_have_slope_one() -> None:
    logits, ids, d_weights = np.array([[0.3, 0.7, 1, 0]], F), np.array([[2, 1]]), np.array([[3, -1]], F)
    p = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    q = p[[2, 1]].astype(np.float32).view(np.uint32)
    q = ((q + 0x8000) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)  # bfloat16, to nearest
    assert abs(q - p[[2, 1]]).max() > 1e-4
    w = q / q.sum()
    d = (d_weights[0] - w @ d_weights[0]) / q.sum()
    exact = d[0] * p[2] * (np.eye(4)[2] - p) + d[1] * p[1] * (np.eye(4)[1] - p)
    np.testing.assert_allclose(backward(logits, ids, d_weights, RoutingRule(selection_dtype="bfloat16"))[0], exact, atol=1e-6)


@pytest.mark.nojit
def test_what_a_token_does_not_visit_gets_nothing() -> None:
    logits, ids = np.array([[0.5, 2, 1], [1, 2, 3], [3, 2, 1]], F), np.array([[1], [-1], [0]])
    d_weights = np.array([[1], [np.nan], [2]], F)  # a slot of nobody is not read
    for rule in (ROUTING_PRESETS["switch"], RoutingRule(null_expert_bias=0.5, capacity_factor=1.0)):
        found = backward(logits, ids, d_weights, rule)
        assert (found[1] == 0).all()
        assert (found[[0, 2]] != 0).all()


@pytest.mark.nojit
def test_no_gradient_is_taken_of_weights_that_are_sinkhorns() -> None:
    rng = np.random.default_rng(0)
    logits, d_weights = rng.standard_normal((5, 4)).astype(F), rng.standard_normal((5, 2)).astype(F)
    ids = np.argsort(-logits, axis=1)[:, :2].copy()
    for selection in ("softmax", "sinkhorn"):
        rule = RoutingRule(router_selection_nonlinearity=selection, expert_weighting_nonlinearity="sinkhorn")
        assert (backward(logits, ids, d_weights, rule) == 0).all()
        assert (logits_gradient(logits.astype(np.float64), ids, rule, d_weights.astype(np.float64)) == 0).all()


@pytest.mark.nojit
def test_sinkhorn_chooses_and_sends_nothing_back() -> None:
    """The scores that choose are detached: whatever they are, the gradient is that of the scores that weigh."""
    rng = np.random.default_rng(1)
    logits, d_weights = rng.standard_normal((4, 5)).astype(F), rng.standard_normal((4, 2)).astype(F)
    ids = np.argsort(rng.random((4, 5)), axis=1)[:, :2].copy()
    rule = RoutingRule(expert_weighting_nonlinearity="sigmoid", router_selection_nonlinearity="sinkhorn")
    same = backward(logits, ids, d_weights, replace(rule, router_selection_nonlinearity="softmax"))
    np.testing.assert_array_equal(backward(logits, ids, d_weights, rule), same)
    assert (same != 0).any()


@pytest.mark.nojit
def test_a_correction_of_the_choice_gets_nothing_and_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    logits, d_weights = rng.standard_normal((4, 8)).astype(F), rng.standard_normal((4, 3)).astype(F)
    ids = np.argsort(rng.random((4, 8)), axis=1)[:, :3].copy()
    rule = replace(ROUTING_PRESETS["deepseek_v3"], n_group=4, topk_group=2)
    free = replace(rule, e_score_correction_bias=False, n_group=1, topk_group=1, group_score="max")
    np.testing.assert_array_equal(backward(logits, ids, d_weights, rule), backward(logits, ids, d_weights, free))


@pytest.mark.nojit
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrtsoftplus", "none"])
def test_a_loss_of_all_scores_adds_its_gradient_to_tokens_that_count(kind: str) -> None:
    rng = np.random.default_rng(3)
    logits, before = (rng.standard_normal((6, 5)) * 3).astype(F), rng.standard_normal((6, 5)).astype(F)
    sequence, d_scores = np.array([0, 1, -1, 1, 0, -1]), rng.standard_normal((2, 5)).astype(F)
    code = {"softmax": codes.SOFTMAX, "sigmoid": codes.SIGMOID, "sqrtsoftplus": codes.SQRTSOFTPLUS, "none": codes.LOGITS}[kind]
    found, again = before.copy(), before.copy()
    for body, out in ((add_balance_backward, found), (plain(add_balance_backward), again)):
        body(logits, sequence, d_scores, code, router_code(RoutingRule()), np.empty((BACKWARD_ROWS, 5), F), out)
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(found[[2, 5]], before[[2, 5]])
    jacobian = scores_jacobian(logits.astype(np.float64), kind)
    exact = before + np.where((sequence >= 0)[:, None], np.einsum("ta,tae->te", d_scores.astype(np.float64)[sequence], jacobian), 0)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


@pytest.mark.nojit
def test_visits_are_counted_by_sequence_where_tokens_count() -> None:
    rng = np.random.default_rng(4)
    ids = np.argsort(rng.random((2, 7, 5)), axis=2)[:, :, :2].copy()
    ids[0, 3, 1] = -1
    mask = np.ones((2, 7), np.bool_)
    mask[1, :3] = False
    sequence = np.where(mask, np.arange(2)[:, None], -1).ravel()
    counts = np.zeros((2, 5), np.int64)
    count_visits(ids.reshape(14, 2), sequence, counts)
    expected = [[(ids[b][mask[b]] == e).sum() for e in range(5)] for b in range(2)]
    assert counts.tolist() == expected
    # What the loss's gradient makes of the counts: one layer, E / B * visits / tokens^2.
    wide = load_balancing_gradient(ids[None], 5, mask)
    for b in range(2):
        np.testing.assert_allclose(wide[0, b][mask[b]], np.tile(5 / 2 * counts[b] / mask[b].sum() ** 2, (mask[b].sum(), 1)), rtol=1e-14)
    assert (wide[0, 1, :3] == 0).all()

"""Every routing rule on one core: held against the plain NumPy definition in float64, and the bits of plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.equivalence.routing import judge_routing
from wse_emu.equivalence.routing_bounds import expert_weights_bound
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.foundation.taps import TapRecord
from wse_emu.layers.router import router_code
from wse_emu.reference import routing
from wse_emu.testing.routing_rules import random_rule
from wse_kernels._jit import plain
from wse_kernels.routing import TIED, WORK_ROWS, assign_experts, route_tokens, softmax_topk

F = np.float32


def decide(logits: np.ndarray, rule: RoutingRule, top_k: int, bias=None, correction=None, body=route_tokens):
    """Logits with their bias, ids, weights."""
    t, n = logits.shape
    logits, ids, weights = logits.copy(), np.full((t, top_k), -7, np.int64), np.full((t, top_k), np.nan, F)
    none = np.zeros((1, 1), F)
    given_bias, given_correction = (none if b is None else b.reshape(1, -1) for b in (bias, correction))
    with np.errstate(all="ignore"):
        body(logits, given_bias, given_correction, router_code(rule), np.full((WORK_ROWS, n), np.nan, F), ids, weights)
    return logits, ids, weights


def drawn(seed: int, t: int):
    """A rule with logits and biases; some of the logits equal, some apart."""
    rng = np.random.default_rng(seed)
    rule, n, top_k = random_rule(rng)
    logits = (rng.standard_normal((t, n)) * rng.choice([0.3, 3.0, 30.0])).astype(F)
    if rng.random() < 0.3:
        logits = np.round(logits)  # ties
    bias = np.round(rng.standard_normal(n), 1).astype(F) if rule.router_use_bias else None
    correction = np.round(rng.standard_normal(n) * 0.3, 1).astype(F) if rule.e_score_correction_bias else None
    return rule, top_k, logits, bias, correction


@pytest.mark.nojit
@given(st.integers(0, 1 << 31), st.integers(1, 6))
def test_any_rule_is_its_definition_in_float64(seed: int, t: int) -> None:
    rule, top_k, raw, bias, correction = drawn(seed, t)
    logits, ids, weights = decide(raw, rule, top_k, bias, correction)
    np.testing.assert_array_equal(logits, raw if bias is None else raw + bias)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    wide = logits.astype(np.float64)
    zero = np.zeros(t, np.int64)
    record = TapRecord(zero, np.arange(t), zero)
    wide_correction = None if correction is None else correction.astype(np.float64)
    found = judge_routing(record, 0, ids, logits, wide, np.zeros_like(wide), rule=rule, correction=wide_correction)
    assert found.fault is None, found.fault
    exact = routing.weights(wide, ids, rule)
    assert (np.abs(weights - exact) <= expert_weights_bound(wide, ids, rule)).all()


@pytest.mark.nojit
@given(st.integers(0, 1 << 31))
def test_plain_python_gives_the_same_bits(seed: int) -> None:
    rule, top_k, raw, bias, correction = drawn(seed, 2)
    compiled, interpreted = (decide(raw, rule, top_k, bias, correction, body) for body in (route_tokens, plain(route_tokens)))
    for ours, theirs in zip(compiled, interpreted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.nojit
@given(st.integers(0, 1 << 31), st.integers(1, 9), st.booleans())
def test_the_plainest_rule_has_the_bits_of_its_own_kernel(seed: int, n: int, normalizes: bool) -> None:
    rng = np.random.default_rng(seed)
    logits, top_k = (rng.standard_normal((4, n)) * 3).astype(F), int(rng.integers(1, n + 1))
    logits[rng.random(logits.shape) < 0.2] = rng.choice([0.0, np.inf, -np.inf, np.nan])
    _, ids, weights = decide(logits, RoutingRule(expert_weighting_normalization=normalizes), top_k)
    expected = np.zeros_like(ids), np.zeros_like(weights)
    with np.errstate(all="ignore"):
        softmax_topk(logits, normalizes, np.empty_like(logits), *expected)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(weights, expected[1])


@pytest.mark.nojit
@pytest.mark.parametrize(("policy", "expected"), [("lowest_id", [1, 2]), ("highest_id", [4, 2]), ("reject", [TIED, 2])])
def test_ties_go_as_the_policy_says(policy: str, expected: list[int]) -> None:
    _, ids, _ = decide(np.array([[1, 5, 5, 0, 5]], F), RoutingRule(tie_policy=policy), 2)
    assert ids[0].tolist() == expected


@pytest.mark.nojit
def test_a_tie_that_leaves_the_set_as_it_is_is_not_rejected() -> None:
    _, ids, _ = decide(np.array([[1, 5, 5, 0, 4]], F), RoutingRule(tie_policy="reject"), 2)
    assert ids[0].tolist() == [1, 2]


@pytest.mark.nojit
@pytest.mark.parametrize(("policy", "expected"), [("lowest_id", [1, 0]), ("highest_id", [3, 2]), ("reject", [TIED, 0])])
def test_ties_of_groups_go_as_the_policy_says(policy: str, expected: list[int]) -> None:
    rule = RoutingRule(n_group=2, topk_group=1, tie_policy=policy)
    _, ids, _ = decide(np.array([[1, 5, 1, 5]], F), rule, 2)
    assert ids[0].tolist() == expected


@pytest.mark.nojit
@pytest.mark.parametrize(("score", "expected"), [("max", [2, 3]), ("top2_sum", [0, 1])])
def test_a_group_of_one_high_expert_or_of_two_good_ones(score: str, expected: list[int]) -> None:
    rule = RoutingRule(router_selection_nonlinearity="none", n_group=2, topk_group=1, group_score=score)
    _, ids, _ = decide(np.array([[3, 3, 5, 0]], F), rule, 2)
    assert sorted(ids[0].tolist()) == expected


@pytest.mark.nojit
def test_the_correction_chooses_but_does_not_weigh() -> None:
    rule = RoutingRule(
        router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True,
        expert_weighting_normalization=False,
    )  # fmt: skip
    _, ids, weights = decide(np.array([[0, 2, -2]], F), rule, 1, correction=np.array([0, 0, 1], F))
    assert ids.tolist() == [[2]]
    assert weights[0, 0] == pytest.approx(1 / (1 + np.exp(2)), rel=1e-6)


@pytest.mark.nojit
def test_probabilities_of_16_bits_tie_where_those_of_32_do_not() -> None:
    logits = np.array([[1.0, 1.0 + 2e-4, 0.0]], F)
    assert decide(logits, RoutingRule(), 1)[1].tolist() == [[1]]
    assert decide(logits, RoutingRule(selection_dtype="bfloat16"), 1)[1].tolist() == [[0]]


@pytest.mark.nojit
def test_numbers_name_experts() -> None:
    ids, weights = np.zeros((3, 2), np.int64), np.zeros((3, 2), F)
    assign_experts(np.array([0, 4, 13]), 5, F(0.5), ids, weights)
    assert ids.tolist() == [[0, 1], [4, 0], [3, 4]]
    assert (weights == 0.5).all()

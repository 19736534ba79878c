"""Routers under which the tokens of a sequence meet: every executor, every cut over rows, the plain definition, and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

import wse_emu as wse
from wse_emu.equivalence.routing import judge_together
from wse_emu.equivalence.routing_bounds import expert_weights_bound, shares_error, together_scores
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers import router_together
from wse_emu.layers.router import route, router_code
from wse_emu.reference import routing
from wse_emu.testing.routing_rules import random_rule_together
from wse_emu.wafer.placement import TokenBands

from .definitions import normal
from .programs import agree, assert_same_bits, look, tokens
from .test_routing_rules import weights_of

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 3))


def by_scores(logits: F32, rule: RoutingRule, top_k: int, groups: list[int], bias: F32 | None = None, correction: F32 | None = None):
    """Ids, weights and scores of sequences of so many tokens each, in one piece."""
    slots = rule.slots(logits.shape[1], top_k)
    ids, weights = np.full((len(logits), slots), -9, np.int64), np.full((len(logits), slots), np.nan, np.float32)
    scores, none = np.empty_like(logits), np.zeros((1, 1), np.float32)
    given = {"logits": logits, "bias": none if bias is None else bias[None], "correction": none if correction is None else correction[None]}
    with np.errstate(all="ignore"):
        router_together.decide(rule, router_code(rule), groups, given, ids, weights, scores, top_k)
    return ids, weights, scores


def drawn(seed: int, groups: list[int]):
    rng = np.random.default_rng(seed)
    rule, n_experts, top_k = random_rule_together(rng, weights=True)
    logits = (rng.standard_normal((sum(groups), n_experts)) * rng.choice([0.3, 3.0])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)  # ties
    bias = normal(seed + 2, n_experts) if rule.router_use_bias else None
    correction = normal(seed + 3, n_experts) if rule.e_score_correction_bias else None
    return rule, top_k, logits, bias, correction


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 1 << 31), GRIDS, st.lists(st.integers(1, 6), min_size=1, max_size=4))
@example(3, (4, 3), [6, 1])
def test_they_decide_alike_on_every_executor_and_wherever_rows_are_cut(seed: int, grid: tuple[int, int], groups: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rule, n_experts, top_k = random_rule_together(rng, weights=True)
    x, gate = normal(seed, sum(groups), 3), normal(seed + 1, 3, n_experts)
    bias = normal(seed + 2, n_experts) if rule.router_use_bias else None
    correction = normal(seed + 3, n_experts) if rule.e_score_correction_bias else None

    def program(wafer: wse.Wafer, replay: NDArray[np.int64] | None = None) -> list[NDArray]:
        bands = TokenBands(len(x), wafer.rows)
        with (
            tokens(wafer, x, bands) as placed,
            route(
                wafer, placed, weights_of(wafer, gate, bias, correction), bands, top_k, rule, groups=tuple(groups), chunk=3, probe=True,
                replay=expected[0],
            ) as found,
        ):  # fmt: skip
            return [found.topk_ids, found.topk_weights, found.logits, found.scores, look(found.ids), look(found.weights)]

    one = wse.Wafer(rows=1, cols=grid[1])
    expected = [np.zeros((len(x), rule.slots(n_experts, top_k)), np.int64)]
    expected = program(one)
    values, _ = agree(program, *grid)
    for ours, theirs in zip(values, expected, strict=True):
        assert_same_bits(ours, theirs)
    first = 0
    for n in groups:  # a sequence alone
        logits = np.ascontiguousarray(values[2][first : first + n])
        alone = by_scores(logits, replace_bias(rule), top_k, [n], None, correction)
        for ours, theirs in zip(alone, (values[0], values[1], values[3]), strict=True):
            assert_same_bits(ours, theirs[first : first + n])
        first += n


def replace_bias(rule: RoutingRule) -> RoutingRule:
    """The same rule for logits that hold the gate's bias already."""
    return replace(rule, router_use_bias=False)


@settings(max_examples=60)
@given(st.integers(0, 1 << 31), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_any_of_them_is_its_definition_in_float64(seed: int, groups: list[int]) -> None:
    rule, top_k, raw, bias, correction = drawn(seed, groups)
    logits = raw.copy()
    ids, weights, scores = by_scores(logits, rule, top_k, groups, bias, correction)
    assert_same_bits(logits, raw if bias is None else raw + bias)
    together = np.repeat(np.arange(len(groups)), groups)
    wide = logits.astype(np.float64)
    exact, bound = together_scores(wide, together, rule, None if correction is None else correction.astype(np.float64))
    assert (np.abs(scores - exact) <= bound).all()
    found = judge_together(ids, scores, together, top_k, rule)
    assert found.fault is None, found.fault
    of, error = routing.shares(wide, together, rule), shares_error(wide, together, rule)
    assert (np.abs(weights - routing.weights(of, ids, rule)) <= expert_weights_bound(of, ids, rule, error)).all()


@given(st.integers(0, 1 << 31), st.integers(1, 12), st.integers(1, 6), st.integers(1, 3))
def test_sinkhorn_takes_experts_first_and_then_tokens(seed: int, n: int, n_experts: int, n_iters: int) -> None:
    """MOE-7: ``r -= lse(r, experts); r -= lse(r, tokens)``, then exp: over the tokens every expert's scores sum to 1."""
    logits = normal(seed, n, n_experts) * np.float32(2)
    rule = RoutingRule(router_selection_nonlinearity="sinkhorn", sinkhorn_n_iters=n_iters)
    ids, _, scores = by_scores(logits.copy(), rule, 1, [n])
    r = logits.astype(np.float64)
    for _ in range(n_iters):
        r = r - logsumexp(r, axis=1, keepdims=True)
        r = r - logsumexp(r, axis=0, keepdims=True)
    np.testing.assert_allclose(scores, np.exp(r), rtol=3e-5)
    np.testing.assert_allclose(scores.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(ids[:, 0], scores.argmax(axis=1))


@pytest.mark.nojit
def test_sinkhorn_of_one_token_is_no_choice() -> None:
    """Among itself alone every score is 1, and ties go to the lowest id: a step with a cache is not what the sequence would give."""
    rule = RoutingRule(router_selection_nonlinearity="sinkhorn")
    ids, _, scores = by_scores(np.array([[0.3, 2.0, -1.0]], np.float32), rule, 1, [1])
    np.testing.assert_allclose(scores, 1, rtol=1e-6)
    assert ids.shape == (1, 1)


@pytest.mark.nojit
def test_switch_drops_the_later_tokens_of_a_full_expert() -> None:
    """Capacity ceil(1.25 * 4 / 2) = 3: of four tokens for expert 0 the last goes nowhere."""
    logits = np.tile(np.array([[2.0, 1.0]], np.float32), (4, 1))
    rule = wse.ROUTING_PRESETS["switch"]
    ids, weights, _ = by_scores(logits.copy(), rule, 1, [4])
    assert ids[:, 0].tolist() == [0, 0, 0, -1]
    assert weights[3, 0] == 0
    assert weights[0, 0] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)
    assert by_scores(logits.copy(), rule, 1, [2, 2])[0][:, 0].tolist() == [0, 0, 0, 0]  # two sequences: room for two each


@pytest.mark.nojit
def test_no_token_is_left_behind_where_they_try_the_next_best() -> None:
    logits = np.tile(np.array([[2.0, 1.0, 0.0]], np.float32), (6, 1))
    rule = RoutingRule(capacity_factor=1.0, overflow="reroute", expert_weighting_normalization=False)
    ids, weights, _ = by_scores(logits.copy(), rule, 1, [6])
    assert ids[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert (np.diff(weights[:, 0]) <= 0).all()
    both = by_scores(logits.copy(), RoutingRule(capacity_factor=1.0, overflow="reroute"), 2, [6])[0]
    assert both.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [2, -1], [2, -1]]


@pytest.mark.nojit
def test_first_choices_come_before_second_ones() -> None:
    """Token 0's second choice finds expert 1 full: token 1 named it first."""
    rule = RoutingRule(capacity_factor=0.5)
    ids, weights, _ = by_scores(np.array([[2, 1, -9, -9], [-9, 3, 1, -9]], np.float32), rule, 2, [2])
    assert ids.tolist() == [[0, -1], [1, 2]]
    np.testing.assert_allclose(weights[0], [1, 0])  # of those that it visits


@given(st.integers(0, 1 << 31), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.5, 1.0, 1.25]))
def test_every_expert_that_chooses_has_its_number_of_tokens_and_none_better_left(seed: int, n: int, n_experts: int, factor: float) -> None:
    logits = np.round(normal(seed, n, n_experts) * 2) / 2
    rule = RoutingRule(chooser="expert", capacity_factor=factor, expert_weighting_normalization=False)
    ids, weights, scores = by_scores(logits.copy(), rule, 1, [n])
    room = min(n, math.ceil(factor * n / n_experts))
    for expert in range(n_experts):
        mine = (ids == expert).any(axis=1)
        assert mine.sum() == room
        order = sorted(range(n), key=lambda t: (-scores[t, expert], t))
        assert np.flatnonzero(mine).tolist() == sorted(order[:room])
    for row, share in zip(ids, weights, strict=True):
        chosen = row[row >= 0]
        assert all(a < b for a, b in pairwise(chosen.tolist()))
        assert (row[len(chosen) :] == -1).all()
        assert (share[len(chosen) :] == 0).all()


@pytest.mark.nojit
def test_room_for_everybody_is_the_rule_without_a_capacity() -> None:
    """MOE-5: nobody is dropped."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((40, 6)).astype(np.float32)
    plain = RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid")
    wide = RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", capacity_factor=3.0)
    ids, weights, _ = by_scores(logits.copy(), wide, 2, [40])
    assert (ids >= 0).all()
    exact = routing.choose(routing.compared(logits.astype(np.float64), plain, None), 2, plain)
    np.testing.assert_array_equal(ids, exact)
    np.testing.assert_allclose(weights, routing.weights(logits.astype(np.float64), exact, plain), rtol=1e-6)


@pytest.mark.nojit
def test_scores_that_are_no_numbers_come_last_and_harm_nobody() -> None:
    logits = np.array([[np.nan, 1], [0, np.inf], [2, -np.inf], [1, 0]], np.float32)
    rule = RoutingRule(
        router_selection_nonlinearity="none", chooser="expert", expert_weighting_normalization=False, capacity_factor=1.0,
        expert_weighting_nonlinearity="sigmoid",
    )  # fmt: skip
    ids, _, _ = by_scores(logits, rule, 1, [4])
    assert ids.tolist() == [[1, -1], [1, -1], [0, -1], [0, -1]]

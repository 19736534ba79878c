"""What every mixture must be: one expert is the network itself, equal experts too, all experts unweighted the whole softmax."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.tolerance import U
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.ffn import FfnWeights, dense_ffn, experts_ffn
from wse_emu.layers.router import RouterWeights, report_chosen, route
from wse_emu.testing.routing_rules import random_rule, random_rule_together
from wse_emu.wafer.placement import Split, TokenBands

from .definitions import normal
from .programs import assert_same_bits, look, room, streamed, tokens
from .test_routing_rules import weights_of

F32 = NDArray[np.float32]
X, WIDTH = normal(0, 7, 6), 5
IMPLEMENTATIONS = ("functional", "experimental", "optimized")


def net(seed: int) -> tuple[F32, F32]:
    return normal(seed, 6, 2 * WIDTH), normal(seed + 50, WIDTH, 6)


def dense(weights: tuple[F32, F32]) -> F32:
    wafer = wse.Wafer(rows=3, cols=2)
    bands = TokenBands(len(X), 3)
    with tokens(wafer, X, bands) as x, room(wafer, bands, Split.balanced(6, 2)) as out:
        dense_ffn(wafer, x, FfnWeights(*(streamed(wafer, w) for w in weights)), out, bands)
        return look(out)


def mixture(experts: list[tuple[F32, F32]], top_k: int, rule: RoutingRule, implementation: str) -> tuple[F32, F32, F32]:
    """Output, logits, and every token's weight of every expert."""
    wafer = wse.Wafer(rows=3, cols=2)
    bands, n = TokenBands(len(X), 3), len(experts)
    with tokens(wafer, X, bands) as x, room(wafer, bands, Split.balanced(6, 2)) as out:
        gate = RouterWeights(streamed(wafer, normal(9, 6, n), "router"))
        with route(wafer, x, gate, bands, top_k, rule, probe=True) as routing:
            on_wafer = [(e, FfnWeights(*(streamed(wafer, w) for w in weights))) for e, weights in enumerate(experts)]
            experts_ffn(wafer, x, routing, [on_wafer], WIDTH, out, bands, n_experts=n, implementation=implementation)
        weights = np.zeros((len(X), n), np.float32)
        np.put_along_axis(weights, routing.topk_ids, routing.topk_weights, axis=1)
        assert routing.logits is not None
        assert routing.topk_ids.size == len(X) * top_k  # no token is dropped
        assert np.bincount(routing.topk_ids.ravel(), minlength=n).sum() == len(X) * top_k
        return look(out), routing.logits, weights


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_expert_is_the_dense_network(implementation: str) -> None:
    out, _, weights = mixture([net(1)], 1, RoutingRule(), implementation)
    assert (weights == 1).all()
    assert_same_bits(out, dense(net(1)) + np.float32(0))  # experts are added to +0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_experts_are_the_dense_network(implementation: str, top_k: int) -> None:
    out, _, _ = mixture([net(1)] * 4, top_k, RoutingRule(), implementation)
    exact = dense(net(1)).astype(np.float64)
    assert (np.abs(out - exact) <= (3 * top_k + 2) * U * np.abs(exact)).all()  # k weights of two roundings each, k fma


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_experts_unweighted_are_the_whole_softmax(implementation: str) -> None:
    experts = [net(e) for e in range(1, 5)]
    out, logits, _ = mixture(experts, 4, RoutingRule(expert_weighting_normalization=False), implementation)
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    each = np.stack([dense(weights).astype(np.float64) for weights in experts], axis=1)
    terms = p[:, :, None] * each
    assert (np.abs(out - terms.sum(axis=1)) <= 40 * U * np.abs(terms).sum(axis=1)).all()


@settings(max_examples=15)
@given(st.integers(0, 1 << 31), st.booleans(), st.integers(1, 3))
@example(0, True, 1)
@example(1, True, 2)
@example(4, False, 3)
def test_implementations_agree_to_the_bit_under_any_rule(seed: int, meet: bool, rows: int) -> None:
    """MOE-2, rules under which tokens meet and refused ties too: the output is also the weighted sum of the chosen experts' outputs."""
    rng = np.random.default_rng(seed)
    rule, n, top_k = random_rule_together(rng, weights=True) if meet else random_rule(rng)
    if rule.chooser == "token" and rule.capacity_factor is None and rng.integers(3) == 0:
        rule = replace(rule, tie_policy="reject")
    x, gate = X * np.float32(1 + rng.integers(3)), normal(seed, 6, n)
    if rng.integers(4) == 0:
        gate[:] = gate[:, :1]  # every expert scores alike
    bias, correction = (normal(seed + i, n) if has else None for i, has in ((1, rule.router_use_bias), (2, rule.e_score_correction_bias)))
    outs: list[F32 | str] = []
    for way in IMPLEMENTATIONS[rule.probability_before_ffn :]:  # the first computes every token, which has no weight beforehand
        wafer = wse.Wafer(rows=rows, cols=2)
        bands = TokenBands(len(x), rows)
        with tokens(wafer, x, bands) as placed, room(wafer, bands, Split.balanced(6, 2)) as out:
            given_weights = weights_of(wafer, gate, bias, correction)
            try:
                with route(wafer, placed, given_weights, bands, top_k, rule, groups=(3, len(x) - 3)) as routing:
                    each = [(e, FfnWeights(*(streamed(wafer, w) for w in net(e)))) for e in range(n)]
                    before = rule.probability_before_ffn
                    experts_ffn(wafer, placed, routing, [each], WIDTH, out, bands, n_experts=n, implementation=way, before=before)
                outs.append(look(out))
                ids, weights = routing.topk_ids, routing.topk_weights
            except wse.TieError as error:
                outs.append(str(error))
    if isinstance(outs[0], str):
        assert rule.tie_policy == "reject"
        assert outs == outs[:1] * len(outs)
        return
    for out in outs[1:]:
        assert_same_bits(out, outs[0])
    total, size = np.zeros(x.shape), np.zeros(x.shape)
    for token, slot in np.argwhere(ids >= 0).tolist():
        w, (gate_up, down) = float(weights[token, slot]), (m.astype(np.float64) for m in net(ids[token, slot]))
        g, u = np.split((x[token] * (w if rule.probability_before_ffn else 1)) @ gate_up.reshape(6, WIDTH, 2).transpose(2, 0, 1), 2)
        y = (g / (1 + np.exp(-g)) * u)[0] @ down * (1 if rule.probability_before_ffn else w)
        total[token] += y
        size[token] += np.abs(y).max() + np.abs(g * u).max() * np.abs(down).max() * WIDTH * (1 if rule.probability_before_ffn else w)
    assert (np.abs(outs[0] - total) <= 60 * U * size).all()


@pytest.mark.parametrize(("n_experts", "top_k", "n_tokens"), [(32, 2, 12), (8, 2, 3), (16, 1, 16)])
def test_random_routers_choose_as_many_experts_as_uniform_choice_expects(n_experts: int, top_k: int, n_tokens: int) -> None:
    """MOE-9: E experts, T tokens, k each: ``E (1 - (1 - k / E)**T)`` in the mean over routers, as MemoryX is told.

    The tokens are orthogonal, so that under a gate of independent normal numbers their choices are independent, and uniform.
    """
    rng, bands, wafer, seen = np.random.default_rng(0), TokenBands(n_tokens, 2), wse.Wafer(rows=2, cols=2), []
    orthogonal = 4 * np.linalg.qr(rng.standard_normal((n_tokens, n_tokens)))[0]
    with tokens(wafer, orthogonal.astype(np.float32), bands) as x:
        for _ in range(120):
            gate = RouterWeights(streamed(wafer, rng.standard_normal((n_tokens, n_experts), np.float32), "router"))
            with route(wafer, x, gate, bands, top_k, RoutingRule()) as routing:
                seen.append(report_chosen(wafer, routing, bands, n_experts).size)
                assert seen[-1] == np.unique(routing.topk_ids).size
    expected = n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)
    assert abs(np.mean(seen) - expected) < 4 * np.std(seen) / np.sqrt(len(seen))

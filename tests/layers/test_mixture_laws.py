"""What every mixture must be: one expert is the network itself, equal experts too, all experts unweighted the whole softmax."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.tolerance import U
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.ffn import FfnWeights, dense_ffn, experts_ffn
from wse_emu.layers.router import RouterWeights, route
from wse_emu.wafer.placement import Split, TokenBands

from .definitions import normal
from .programs import assert_same_bits, look, room, streamed, tokens

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


def test_implementations_agree_to_the_bit() -> None:
    experts = [net(e) for e in range(1, 6)]
    outs = [mixture(experts, 2, RoutingRule(), name)[0] for name in IMPLEMENTATIONS]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])

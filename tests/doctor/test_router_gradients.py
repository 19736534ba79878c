"""A router that the model's loss does not train is told from one that it does, whatever the loss for even use says."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.doctor.router_gradients import RouterGradients, router_gradients
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.mixture_gradients import Balance, Decision, Mixture, Network, Rules, balance_gradient
from wse_emu.reference import routing

F = np.float32


def split(rule: RoutingRule, top_k: int, coef: float = 0.01) -> RouterGradients:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, F)

    weights = Mixture(tuple(Network(normal(8, 12), normal(6, 8)) for _ in range(4)), normal(8, 4) if rule.is_learned else None)
    x, d_out = normal(64, 8), normal(64, 8) / 64
    if not rule.is_learned:
        decision = Decision(routing.assigned(np.arange(64), 4, top_k), np.full((64, top_k), 1 / top_k, F))
        return router_gradients(x, weights, Rules(routing=rule), decision, d_out, Balance(np.zeros(64, np.int64), np.zeros((1, 4), F)))
    logits = x @ weights.router
    ids = routing.choose(routing.compared(logits, rule, None), top_k, rule)
    visits = np.bincount(ids.ravel(), minlength=4)[None, None]
    balance = Balance(np.zeros(64, np.int64), balance_gradient(visits, np.array([64]), coef)[0])
    return router_gradients(x, weights, Rules(routing=rule), Decision(ids, routing.weights(logits, ids, rule), logits), d_out, balance)


def test_one_expert_with_weights_that_are_divided_is_a_dead_router() -> None:
    found = split(RoutingRule(), 1)
    assert found.ce == 0
    assert found.aux > 1e-4
    assert found.is_dead


@pytest.mark.parametrize(
    ("rule", "top_k"),
    [
        (RoutingRule(null_expert_bias=1.1), 1),
        (RoutingRule(null_expert_bias=10.0), 1),
        (RoutingRule(expert_weighting_normalization=False), 1),
        (RoutingRule(), 2),
    ],
)
def test_each_remedy_brings_it_to_life(rule: RoutingRule, top_k: int) -> None:
    found, dead = split(rule, top_k), split(RoutingRule(), 1)
    assert found.ce > 1e-2
    assert not found.is_dead
    if top_k == 1:
        assert found.aux == pytest.approx(dead.aux)  # the same logits and choices: the loss for even use sees no difference


def test_the_part_of_even_use_grows_with_its_coefficient_and_the_other_does_not() -> None:
    one, ten = (split(RoutingRule(), 2, coef) for coef in (0.01, 0.1))
    assert ten.aux == pytest.approx(10 * one.aux, rel=1e-5)
    assert ten.ce == one.ce


def test_experts_by_number_have_no_router() -> None:
    with pytest.raises(wse.InputError, match="'hash' has no router"):
        split(RoutingRule(routing_algorithm="hash"), 1)

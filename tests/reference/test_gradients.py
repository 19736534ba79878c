"""The dense gradients against central differences of the dense forward pass: what shares no formula shares no mistake."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import routing
from wse_emu.reference.ffn_gradients import mixture_gradients
from wse_emu.reference.load_balance import (
    batch_load_balancing_gradient,
    batch_load_balancing_loss,
    load_balancing_gradient,
    load_balancing_loss,
)
from wse_emu.reference.routing_gradients import scores_jacobian

from .blocks import Block, block_of, drawn, spec_of

STEP = 1e-5


def without_jumps(block: Block) -> Block:
    """The block with scores that are not rounded; sparsemixer's band stays, no difference crosses its edge but by ill luck."""
    rule = replace(block.spec.routing, selection_dtype="float32", router_fp32=True)
    return Block(replace(block.spec, routing=rule), block.tensors)


@settings(max_examples=25)
@given(st.integers(0, 1 << 31), st.integers(1, 4))
def test_any_mixture_has_the_slope_of_its_differences(seed: int, tokens: int) -> None:
    """One random direction through the input, one through every tensor."""
    block, x, numbers = drawn(seed, tokens)
    block, rng = without_jumps(block), np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        stages = block.forward(x, numbers)
        ids, d_out = stages["topk_ids"], rng.standard_normal(x.shape)
        found = mixture_gradients(block, 0, x, ids, stages["topk_weights"], d_out, stages.get("router_logits"))
        learned = {key: value for key, value in block.tensors.items() if key[0] != "e_score_correction_bias"}
        assert set(found.weights) == set(learned)
        for name in ("x", *learned):
            at = x if name == "x" else learned[name]
            along = rng.standard_normal(at.shape)
            if name == "x":
                ends = [block.forward(x + s * along, numbers, ids)["ffn_out"] for s in (STEP, -STEP)]
            else:
                ends = [block.moved(s, {name: along}).forward(x, numbers, ids)["ffn_out"] for s in (STEP, -STEP)]
            up, down = ((end - stages["ffn_out"]) * d_out for end in ends)
            gradient = found.x if name == "x" else found.weights[name]
            size = np.abs(gradient * along).sum() + np.abs(d_out).sum()
            # At a kink (a limit, the edge of a band) the slopes of the two sides differ, which the forward pass alone tells.
            bend = abs((up + down).sum()) / STEP
            assert abs((gradient * along).sum() - (up - down).sum() / (2 * STEP)) <= 1e-8 * size + bend, name


@given(st.integers(0, 1 << 31))
def test_weights_of_experts_and_logits_have_the_slope_of_their_differences(seed: int) -> None:
    block, x, numbers = drawn(seed, 3)
    block, rng = without_jumps(block), np.random.default_rng(seed)
    rule = block.spec.routing
    if not rule.is_learned:
        return
    stages = block.forward(x, numbers)
    ids, logits, d_out = stages["topk_ids"], stages["router_logits"], rng.standard_normal(x.shape)
    found = mixture_gradients(block, 0, x, ids, stages["topk_weights"], d_out, logits)
    along = rng.standard_normal(logits.shape)
    ends = [routing.weights(logits + s * along, ids, rule) for s in (STEP, -STEP)]
    assert abs(((ends[0] - ends[1]) / (2 * STEP) * found.topk_weights).sum() - (found.logits * along).sum()) <= 1e-7 * (
        1 + np.abs(found.topk_weights).sum() * rule.routed_scaling_factor
    )


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrtsoftplus", "none"])
def test_scores_have_the_slope_of_their_differences(kind: str) -> None:
    rng = np.random.default_rng(0)
    logits, along = 3 * rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    difference = (routing.scores(logits + STEP * along, kind) - routing.scores(logits - STEP * along, kind)) / (2 * STEP)
    np.testing.assert_allclose(np.einsum("tae,te->ta", scores_jacobian(logits, kind), along), difference, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [(load_balancing_loss, load_balancing_gradient), (batch_load_balancing_loss, batch_load_balancing_gradient)],
)
def test_losses_of_balance_have_the_slope_of_their_differences(loss, gradient) -> None:
    rng = np.random.default_rng(1)
    p, along = rng.random((3, 4, 10, 6)), rng.standard_normal((3, 4, 10, 6))
    ids = np.argsort(rng.random(p.shape), axis=3)[..., :2].copy()
    ids[0, 1, 2, 1] = -1
    mask = np.ones((4, 10), np.bool_)
    mask[1, :4], mask[2, 7:] = False, False
    for given_mask in (None, mask):
        found = gradient(ids, 6, given_mask)
        difference = (loss(p + STEP * along, ids, given_mask) - loss(p - STEP * along, ids, given_mask)) / (2 * STEP)
        assert (found * along).sum() == pytest.approx(difference, rel=1e-8)
        assert given_mask is None or (found[:, ~mask] == 0).all()


def cross_entropy_gradient(block: Block, x: np.ndarray, head: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss of a toy model, the block and a head on top, and the gradient of its router."""
    stages = block.forward(x, np.zeros(len(x), np.int64))
    z = stages["ffn_out"] @ head
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    d_out = (p - np.eye(p.shape[1])[targets]) @ head.T / len(x)
    found = mixture_gradients(block, 0, x, stages["topk_ids"], stages["topk_weights"], d_out, stages["router_logits"])
    return float(-np.log(p[rows, targets]).mean()), found.weights["router", None]


def toy(rule: RoutingRule, top_k: int) -> tuple[Block, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    block = block_of(spec_of(rule, 4, top_k, hidden=8, width=16), rng)
    return block, rng.standard_normal((64, 8)), rng.standard_normal((8, 10)), rng.integers(0, 10, 64)


@pytest.mark.parametrize(
    ("rule", "top_k", "dead"),
    [
        (RoutingRule(), 1, True),
        (RoutingRule(null_expert_bias=1.1), 1, False),
        (RoutingRule(null_expert_bias=10.0), 1, False),
        (RoutingRule(expert_weighting_normalization=False), 1, False),
        (RoutingRule(), 2, False),
    ],
)
def test_a_router_of_one_expert_whose_weight_is_always_one_is_dead(rule: RoutingRule, top_k: int, dead: bool) -> None:
    """And comes to life by any of the remedies; the whole model's loss says the same, by its differences."""
    block, *data = toy(rule, top_k)
    _, gradient = cross_entropy_gradient(block, *data)
    size = np.linalg.norm(gradient)
    assert size == 0 if dead else size > 1e-3
    along = np.random.default_rng(6).standard_normal(gradient.shape)
    ends = [cross_entropy_gradient(block.moved(s, {("router", None): along}), *data)[0] for s in (1e-6, -1e-6)]
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * along).sum(), abs=1e-8)

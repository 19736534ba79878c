"""Gradients of transformers' mixtures by automatic differentiation, live, against the dense definition and the kernels."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.mixture_gradients import Balance, Decision, balance_gradient, logits_gradient
from wse_emu.layers.router import router_code
from wse_emu.reference.ffn_gradients import mixture_gradients
from wse_emu.reference.routing_gradients import logits_gradient as dense_logits_gradient
from wse_emu.testing.routing_rules import random_rule
from wse_kernels.routing import WORK_ROWS, route_tokens
from wse_kernels.routing_backward import count_visits

from ..layers.test_mixture_gradients import IMPLEMENTATIONS, gradients, mixture
from ..reference.blocks import Block, spec_of

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")
F = np.float32


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    oracle = importlib.import_module("golden_gradients")
    assert set(oracle.CASES) == set(NAMES)
    case = oracle.CASES[name]
    given, expected = oracle.consult(name, 64, 17)
    x, d_out = given.pop(("x", None)), given.pop(("d_out", None))
    d_x = expected.pop(("x", None))
    spec = spec_of(oracle.rule_of(name), oracle.E, case.top_k, oracle.H, oracle.F, case.shared, case.clamped)
    block = Block(spec, given)
    stages = block.forward(x, np.arange(64))
    found = mixture_gradients(block, 0, x, stages["topk_ids"], stages["topk_weights"], d_out, stages["router_logits"])
    assert set(found.weights) == set(expected)
    np.testing.assert_allclose(found.x, d_x, atol=1e-6 * np.abs(d_x).max())
    for key, value in found.weights.items():
        np.testing.assert_allclose(value, expected[key], atol=1e-6 * np.abs(expected[key]).max(), err_msg=str(key))
    decision = Decision(stages["topk_ids"], stages["topk_weights"].astype(F), stages["router_logits"].astype(F))
    right = mixture(expected, oracle.E).arrays()
    for way in IMPLEMENTATIONS:
        ours = gradients(block, x, decision, d_out.astype(F), implementation=way)
        np.testing.assert_allclose(ours.x, d_x, atol=4e-6 * np.abs(d_x).max())
        for key, value in ours.weights.arrays().items():
            np.testing.assert_allclose(value, right[key], atol=4e-6 * np.abs(right[key]).max(), err_msg=key)


def by_torch(logits: object, ids: object, rule: RoutingRule) -> object:
    """Weights of chosen experts, written in torch."""
    t, kind = torch, rule.expert_weighting_nonlinearity

    def scored(x: object, kind: str) -> object:
        softplus = t.nn.functional.softplus
        return {"softmax": lambda: t.softmax(x, 1), "sigmoid": lambda: t.sigmoid(x), "sqrtsoftplus": lambda: softplus(x).sqrt()}[kind]()

    if kind == "softmax_topk":
        w = t.softmax(logits.gather(1, ids), 1)
    elif kind == "sparsemixer":
        left, parts = t.ones_like(logits, dtype=t.bool), []
        for slot in range(ids.shape[1]):
            best = logits.gather(1, ids[:, slot : slot + 1])
            far = (best - logits) / t.maximum(logits.abs(), best) > 2 * rule.router_jitter_noise
            p = t.softmax(logits.masked_fill(far.detach() | ~left, -t.inf), 1)
            parts.append(p.gather(1, ids[:, slot : slot + 1]))
            left = left.scatter(1, ids[:, slot : slot + 1], False)
        w = t.cat(parts, 1)
    else:
        w = scored(logits, kind).gather(1, ids)
    if rule.expert_weighting_normalization:
        w = w / (w.sum(1, keepdim=True) + rule.null_expert_bias + rule.norm_epsilon).clamp(min=rule.norm_min)
    return w * rule.routed_scaling_factor


@pytest.mark.parametrize("seed", range(60))
def test_any_rule_in_float32_numbers_has_torchs_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rule, n, top_k = random_rule(rng)
    if rule.selection_dtype != "float32":
        rule = RoutingRule(null_expert_bias=0.5)
    logits = (2 * rng.standard_normal((5, n))).astype(F)
    ids, weights, none = np.zeros((5, top_k), np.int64), np.zeros((5, top_k), F), np.zeros((1, n), F)
    code = router_code(rule)._replace(has_bias=0)
    route_tokens(logits.copy(), none, none, code, np.empty((WORK_ROWS, n), F), ids, weights)
    v, d = torch.from_numpy(logits).double().requires_grad_(True), rng.standard_normal(ids.shape).astype(F)
    w = by_torch(v, torch.from_numpy(ids), rule)
    np.testing.assert_allclose(weights, w.detach().numpy(), rtol=2e-6, atol=1e-12)
    w.backward(torch.from_numpy(d).double())
    size = np.abs(v.grad.numpy()).max() + 1e-3 * rule.routed_scaling_factor
    np.testing.assert_allclose(dense_logits_gradient(logits.astype(np.float64), ids, rule, d.astype(np.float64)), v.grad, atol=1e-12 * size)
    np.testing.assert_allclose(logits_gradient(Decision(ids, weights, logits), rule, d), v.grad, atol=2e-5 * size)


def test_probabilities_cast_to_16_bits_have_torchs_gradient() -> None:
    """Torch casts the gradient, too, so its numbers are good to 16 bits."""
    rng = np.random.default_rng(0)
    logits, d = (2 * rng.standard_normal((50, 8))).astype(F), rng.standard_normal((50, 2)).astype(F)
    v = torch.from_numpy(logits).requires_grad_(True)
    p = torch.softmax(v, 1).bfloat16()
    chosen, ids = p.topk(2, 1)
    (chosen.float() / (chosen.float().sum(1, keepdim=True) + 1.1)).backward(torch.from_numpy(d))
    rule = RoutingRule(selection_dtype="bfloat16", null_expert_bias=1.1)
    found = logits_gradient(Decision(ids.numpy(), np.zeros((50, 2), F), logits), rule, d)
    np.testing.assert_allclose(found, v.grad, atol=2.0**-7 * np.abs(v.grad.numpy()).max())


def test_transformers_loss_for_even_use_is_the_one_over_a_batch_times_top_k() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2 * 7, 6)).astype(F)
    v = torch.from_numpy(logits).double().requires_grad_(True)
    load_balancing_loss_func((v,), num_experts=6, top_k=2).backward()
    ids = np.argsort(-logits, axis=1)[:, :2].copy()
    sequence, counts = np.repeat([0, 1], 7), np.zeros((1, 2, 6), np.int64)
    count_visits(ids, sequence, counts[0])
    balance = Balance(sequence, balance_gradient(counts, np.array([7, 7]), 2.0, over="batch")[0])
    found = logits_gradient(Decision(ids, np.zeros((14, 2), F), logits), RoutingRule(), np.zeros((14, 2), F), balance)
    np.testing.assert_allclose(found, v.grad, atol=1e-6 * np.abs(v.grad.numpy()).max() + 1e-9)

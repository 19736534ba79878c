"""Gradients of transformers' mixtures, recorded (tools/golden_gradients.py): the dense definition and the kernels, in all three ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wse_emu.checkpoint import Checkpoint, open_checkpoint
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.foundation.shared_experts import SharedExperts
from wse_emu.layers.mixture_gradients import Decision, Rules
from wse_emu.layers.mixture_gradients import mixture_gradients as on_kernels
from wse_emu.reference.ffn import experts_ffn
from wse_emu.reference.ffn_gradients import mixture_gradients
from wse_emu.reference.tensors import Expert
from wse_emu.reference.weights import PublishedWeights

from ..reference.blocks import Block, spec_of
from .test_mixture_gradients import IMPLEMENTATIONS, gradients, mixture

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gradients.npz"
E, H, WIDTH = 8, 6, 5
RULES: dict[str, tuple[RoutingRule, int, SharedExperts | None, ClampedExperts | None]] = {
    "mixtral": (RoutingRule(), 2, None, None),
    "qwen3_moe": (RoutingRule(expert_weighting_normalization=False), 3, None, None),
    "qwen2_moe": (RoutingRule(), 2, SharedExperts(intermediate_size=7, gated=True), None),
    "deepseek_v3": (replace(ROUTING_PRESETS["deepseek_v3"], n_group=4, topk_group=2), 3, SharedExperts(intermediate_size=10), None),
    "gpt_oss": (ROUTING_PRESETS["gpt_oss"], 2, None, ClampedExperts(alpha=1.702, limit=1.0)),
}


def recorded(name: str) -> tuple[Block, np.ndarray, np.ndarray, dict[tuple[str, Expert], np.ndarray], np.ndarray]:
    """Block, x, d_out, gradients of tensors and of x."""
    rule, top_k, shared, clamped = RULES[name]
    sides: list[dict[tuple[str, Expert], np.ndarray]] = []
    with np.load(GOLDEN) as golden:
        for mark in ("", "d:"):
            tensors = {}
            for key in golden:
                if key.startswith(f"{mark}{name}."):
                    role, value = key[len(mark) + len(name) + 1 :], golden[key].astype(np.float64)
                    if role.startswith("shared."):
                        tensors[role[7:], "shared"] = value
                    elif value.ndim == 3 or role in ("b_gate", "b_up", "b_down"):
                        tensors |= {(role, e): value[e] for e in range(E)}
                    else:
                        tensors[role, None] = value
            sides.append(tensors)
    x, d_out, d_x = (sides[i].pop((role, None)) for i, role in ((0, "x"), (0, "d_out"), (1, "x")))
    spec = spec_of(rule, E, top_k, H, WIDTH, shared, clamped)
    return Block(spec, sides[0]), x, d_out, sides[1], d_x


def against(name: str, rule: RoutingRule | None = None) -> float:
    """Largest difference of the dense gradients from those recorded, as a part of the largest of each tensor."""
    block, x, d_out, expected, d_x = recorded(name)
    if rule is not None:
        block = Block(replace(block.spec, routing=rule), block.tensors)
    stages = block.forward(x, np.arange(len(x)))
    found = mixture_gradients(block, 0, x, stages["topk_ids"], stages["topk_weights"], d_out, stages["router_logits"])
    assert set(found.weights) == set(expected)
    pairs = [(found.x, d_x), *((found.weights[key], expected[key]) for key in expected)]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in pairs)


@pytest.mark.parametrize("name", RULES)
def test_dense_gradients_are_those_of_transformers(name: str) -> None:
    assert against(name) <= 1e-6  # transformers' routers take their scores in float32


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", RULES)
def test_gradients_on_the_kernels_are_those_of_transformers(name: str, way: str) -> None:
    block, x, d_out, expected, d_x = recorded(name)
    stages = block.forward(x, np.arange(len(x)))
    decision = Decision(stages["topk_ids"], stages["topk_weights"].astype(np.float32), stages["router_logits"].astype(np.float32))
    found = gradients(block, x, decision, d_out.astype(np.float32), implementation=way)
    np.testing.assert_allclose(found.x, d_x, atol=2e-6 * np.abs(d_x).max())
    right = mixture(expected, E).arrays()
    for key, value in found.weights.arrays().items():
        np.testing.assert_allclose(value, right[key], atol=2e-6 * np.abs(right[key]).max(), err_msg=key)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("mixtral", {"expert_weighting_normalization": False}),
        ("mixtral", {"null_expert_bias": 0.01}),
        ("qwen3_moe", {"expert_weighting_normalization": True}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"expert_weighting_nonlinearity": "softmax"}),
        ("gpt_oss", {"expert_weighting_nonlinearity": "softmax"}),
    ],
)
def test_the_golden_file_tells_mistakes_apart(name: str, mistake: dict[str, object]) -> None:
    assert against(name, replace(RULES[name][0], **mistake)) > 1e-3


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "dbrx", "ernie4_5_moe", "phimoe", "minimax_m2"],
)
def test_layers_of_checkpoints_have_gradients_as_their_tensors_are_published(family: str) -> None:
    """A layer of a checkpoint of each family, some tokens: the kernels against the dense gradients, and those against differences."""
    with open_checkpoint(GOLDEN.parent / f"{family}-float32") as source:
        gradients_of(source)


def gradients_of(source: Checkpoint) -> None:
    weights, rng = PublishedWeights(source.spec, source.tensors.read, np.dtype(np.float64)), np.random.default_rng(0)
    spec, layer = source.spec, source.spec.moe_layers[-1]
    x, d_out, along = (rng.standard_normal((9, spec.hidden_size)).astype(np.float32).astype(np.float64) for _ in range(3))

    def forward(x: np.ndarray, replay: np.ndarray | None) -> dict[str, np.ndarray]:
        return dict(experts_ffn(weights, layer, x, np.arange(9), replay, together=np.zeros(9, np.int64)))

    stages = forward(x, None)
    ids, share, logits = (stages[name] for name in ("topk_ids", "topk_weights", "router_logits"))
    exact = mixture_gradients(weights, layer, x, ids, share, d_out, logits)
    ends = [forward(x + s * along, ids)["ffn_out"] for s in (1e-6, -1e-6)]
    difference = ((ends[0] - ends[1]) * d_out).sum() / 2e-6
    assert (exact.x * along).sum() == pytest.approx(difference, rel=1e-6, abs=1e-6 * np.abs(exact.x).max())
    tensors = {key: weights.layer(layer, *key) for key in exact.weights}
    assert all(exact.weights[key].shape == value.shape for key, value in tensors.items())
    rules = Rules(routing=spec.routing, activation=spec.activation, clamped=spec.clamped_experts)
    decision = Decision(ids, share.astype(np.float32), logits.astype(np.float32))
    ours = on_kernels(x.astype(np.float32), mixture(tensors, spec.num_experts), rules, decision, d_out.astype(np.float32))
    np.testing.assert_allclose(ours.x, exact.x, atol=4e-6 * np.abs(exact.x).max())
    right = mixture(exact.weights, spec.num_experts).arrays()
    for name, value in ours.weights.arrays().items():
        np.testing.assert_allclose(value, right[name], atol=4e-6 * np.abs(right[name]).max(), err_msg=name)

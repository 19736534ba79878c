"""Routers of transformers, recorded (tools/golden_routers.py), against the routing rule of each family: kernel and plain definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.router import router_code
from wse_emu.reference import routing
from wse_kernels.routing import WORK_ROWS, route_tokens

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "routers.npz"
V2, V3 = (replace(ROUTING_PRESETS[name], n_group=4, topk_group=2) for name in ("deepseek_v2", "deepseek_v3"))
UNWEIGHTED = RoutingRule(expert_weighting_normalization=False)
RULES: dict[str, tuple[RoutingRule, int]] = {
    "mixtral": (RoutingRule(), 3),
    "qwen3_moe normalised": (RoutingRule(), 4),
    "qwen3_moe": (UNWEIGHTED, 4),
    "deepseek_v2 greedy": (replace(UNWEIGHTED, routed_scaling_factor=16.0), 3),
    "deepseek_v2 group_limited_greedy": (V2, 5),
    "deepseek_v3": (V3, 5),
    "glm4_moe": (V3, 5),
    "dots1": (V3, 5),
    "gpt_oss": (ROUTING_PRESETS["gpt_oss"], 4),
    "granitemoe": (replace(ROUTING_PRESETS["gpt_oss"], router_use_bias=False), 4),
    "phimoe": (
        replace(
            UNWEIGHTED, router_selection_nonlinearity="none", expert_weighting_nonlinearity="sparsemixer", router_jitter_noise=0.2
        ),
        2,
    ),
    "ernie4_5_moe": (RoutingRule(e_score_correction_bias=True, norm_min=0.7), 3),
    "minimax_m2": (
        RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True), 3,
    ),
    "llama4": (replace(UNWEIGHTED, router_selection_nonlinearity="none", expert_weighting_nonlinearity="sigmoid"), 2),
}  # fmt: skip


def recorded(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    with np.load(GOLDEN) as golden:
        return golden[f"{name}.logits"], golden[f"{name}.weights"], golden.get(f"{name}.correction")


def dense(ids: np.ndarray, weights: np.ndarray, like: np.ndarray) -> np.ndarray:
    out = np.zeros(like.shape)
    np.put_along_axis(out, ids, weights.astype(np.float64), axis=1)
    return out


@pytest.mark.nojit
@pytest.mark.parametrize("name", RULES)
def test_recorded_experts_and_weights(name: str) -> None:
    (rule, top_k), (logits, expected, correction) = RULES[name], recorded(name)
    assert (correction is not None) == rule.e_score_correction_bias
    tolerance = 5e-7 * rule.routed_scaling_factor
    ids, weights = np.zeros((len(logits), top_k), np.int64), np.zeros((len(logits), top_k), np.float32)
    none = np.zeros((1, 1), np.float32)
    code, work = router_code(rule)._replace(has_bias=0), np.empty((WORK_ROWS, logits.shape[1]), np.float32)
    route_tokens(logits.copy(), none, none if correction is None else correction[None], code, work, ids, weights)
    np.testing.assert_allclose(dense(ids, weights, expected), expected, atol=tolerance)
    wide, added = logits.astype(np.float64), None if correction is None else correction.astype(np.float64)
    chosen = routing.choose(routing.compared(wide, rule, added), top_k, rule)
    np.testing.assert_allclose(dense(chosen, routing.weights(wide, chosen, rule), expected), expected, atol=tolerance)


@pytest.mark.nojit
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("ernie4_5_moe", {"norm_min": 0.0}),
        ("ernie4_5_moe", {"e_score_correction_bias": False}),
        ("minimax_m2", {"e_score_correction_bias": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"group_score": "max"}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}),
        ("deepseek_v2 group_limited_greedy", {"n_group": 1, "topk_group": 1}),
        ("phimoe", {"router_jitter_noise": 0.1}),
        ("gpt_oss", {"expert_weighting_nonlinearity": "softmax"}),
        ("llama4", {"expert_weighting_nonlinearity": "softmax"}),
        ("qwen3_moe", {"expert_weighting_normalization": True}),
    ],
)
def test_the_golden_file_tells_mistakes_apart(name: str, mistake: dict[str, object]) -> None:
    (rule, top_k), (logits, expected, correction) = RULES[name], recorded(name)
    wrong, wide = replace(rule, **mistake), logits.astype(np.float64)
    added = correction.astype(np.float64) if correction is not None and wrong.e_score_correction_bias else None
    chosen = routing.choose(routing.compared(wide, wrong, added), top_k, wrong)
    assert np.abs(dense(chosen, routing.weights(wide, chosen, wrong), expected) - expected).max() > 1e-3

"""Routers of transformers, live, against the routing rule of each family: the same experts and weights from the same hidden states."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.router import router_code
from wse_emu.reference import routing
from wse_kernels.routing import WORK_ROWS, route_tokens

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

E, H, T = 16, 24, 200
SIZES = {"hidden_size": H, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SOFTMAX_AFTER = replace(ROUTING_PRESETS["gpt_oss"], router_use_bias=False)
V3 = replace(ROUTING_PRESETS["deepseek_v3"], n_group=4, topk_group=2)
CASES: dict[str, tuple[str, str, str, dict[str, Any], RoutingRule, int]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": E, "num_experts_per_tok": 3}, RoutingRule(), 3),
    "qwen3_moe normalised": (
        "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": E, "num_experts_per_tok": 4, "norm_topk_prob": True},
        RoutingRule(), 4,
    ),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": E, "num_experts_per_tok": 4, "norm_topk_prob": False},
        RoutingRule(expert_weighting_normalization=False), 4,
    ),
    "deepseek_v2 greedy": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {
            "n_routed_experts": E, "num_experts_per_tok": 3, "topk_method": "greedy", "routed_scaling_factor": 16.0, "n_group": 1,
            "topk_group": 1,
        },
        RoutingRule(expert_weighting_normalization=False, routed_scaling_factor=16.0), 3,
    ),
    "deepseek_v2 group_limited_greedy": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {
            "n_routed_experts": E, "num_experts_per_tok": 5, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
            "n_group": 4, "topk_group": 2,
        },
        replace(ROUTING_PRESETS["deepseek_v2"], n_group=4, topk_group=2), 5,
    ),
    **{
        family: (
            family, f"{name}TopkRouter", f"{name}Config",
            {
                "n_routed_experts": E, "num_local_experts": E, "num_experts_per_tok": 5, "n_group": 4, "topk_group": 2,
                "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            },
            V3, 5,
        )
        for family, name in (("deepseek_v3", "DeepseekV3"), ("glm4_moe", "Glm4Moe"), ("dots1", "Dots1"))
    },
    "gpt_oss": (
        "gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": E, "num_experts_per_tok": 4}, ROUTING_PRESETS["gpt_oss"], 4,
    ),
    "granitemoe": (
        "granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", {"num_local_experts": E, "num_experts_per_tok": 4}, SOFTMAX_AFTER, 4,
    ),
    "phimoe": (
        "phimoe", "PhimoeTopKRouter", "PhimoeConfig", {"num_local_experts": E, "num_experts_per_tok": 2, "router_jitter_noise": 0.2},
        RoutingRule(
            router_selection_nonlinearity="none", expert_weighting_nonlinearity="sparsemixer", expert_weighting_normalization=False,
            router_jitter_noise=0.2,
        ),
        2,
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", "Ernie4_5_MoeConfig", {"moe_num_experts": E, "moe_k": 3, "moe_norm_min": 0.3},
        RoutingRule(e_score_correction_bias=True, norm_min=0.3), 3,
    ),
    "minimax_m2": (
        "minimax_m2", "MiniMaxM2TopKRouter", "MiniMaxM2Config", {"num_local_experts": E, "num_experts_per_tok": 3},
        RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True), 3,
    ),
    "llama4": (
        "llama4", "Llama4Router", "Llama4TextConfig", {"num_local_experts": E, "num_experts_per_tok": 2},
        RoutingRule(router_selection_nonlinearity="none", expert_weighting_nonlinearity="sigmoid", expert_weighting_normalization=False), 2,
    ),
}  # fmt: skip


def theirs(name: str, x: Any, bias: Any, correction: Any) -> tuple[Any, Any, Any, Any]:
    """Gate, logits, and every token's weights, zero where an expert was not chosen: (E, H), (T, E), (T, E)."""
    family, router_name, config_name, options, rule, _ = CASES[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), config_name)(**SIZES, **options)
    router = getattr(module, router_name)(config).eval()
    torch.nn.init.normal_(router.weight, std=1.0 if family != "phimoe" else 0.3)
    args = [x]
    if rule.router_use_bias:
        router.bias.data = bias
    if family == "minimax_m2":
        args.append(correction)
    elif family == "ernie4_5_moe":
        router.moe_statics.e_score_correction_bias.data = correction[None]
    elif rule.e_score_correction_bias:
        router.e_score_correction_bias = correction
    with torch.no_grad():
        out = router(*args)
        if family == "llama4":
            scores, logits = out
            return router.weight, logits, scores, None
        logits, weights, ids = out
    return router.weight, logits, torch.zeros(T, E).scatter_(1, ids, weights), ids


@pytest.mark.parametrize("name", CASES)
def test_experts_and_weights_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(7)
    rule, top_k = CASES[name][4:]
    rule.check_sizes(E, top_k)
    x, bias, correction = torch.randn(T, H), torch.randn(E), torch.randn(E) * 0.2
    gate, logits, dense, ids = theirs(name, x, bias, correction)
    own = (x.double() @ gate.detach().double().T).numpy() + (bias.double().numpy() if rule.router_use_bias else 0)
    np.testing.assert_allclose(own, logits.detach().double().numpy(), atol=2e-5)
    corrected = correction.double().numpy() if rule.e_score_correction_bias else None
    chosen = routing.choose(routing.compared(own, rule, corrected), top_k, rule)
    wide = np.zeros((T, E))
    np.put_along_axis(wide, chosen, routing.weights(own, chosen, rule), axis=1)
    np.testing.assert_allclose(wide, dense.detach().double().numpy(), atol=3e-6 * rule.routed_scaling_factor)
    if ids is not None:
        np.testing.assert_array_equal(np.sort(chosen, axis=1), np.sort(ids.numpy(), axis=1))
    # and the kernel, from the very logits of transformers
    given = logits.detach().float().numpy().copy()
    found, weights, none = np.zeros((T, top_k), np.int64), np.zeros((T, top_k), np.float32), np.zeros((1, 1), np.float32)
    code = router_code(rule)._replace(has_bias=0)
    added = none if corrected is None else correction.numpy()[None]
    route_tokens(given, none, added, code, np.empty((WORK_ROWS, E), np.float32), found, weights)
    narrow = np.zeros((T, E))
    np.put_along_axis(narrow, found, weights.astype(np.float64), axis=1)
    np.testing.assert_allclose(narrow, dense.detach().double().numpy(), atol=5e-7 * rule.routed_scaling_factor)

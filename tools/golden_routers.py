"""Routers of transformers beside the routing rule of each family; and their golden file, ``tests/golden/routers.npz``.

    python tools/golden_routers.py      # needs torch and transformers (the `oracle` extra)

Keys of the file: ``NAME.logits`` (tokens, experts), with the gate's bias, ``NAME.correction`` (experts,) where the rule has one, and
``NAME.weights`` (tokens, experts), zero where an expert was not chosen; float32.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "routers.npz"
N_GOLDEN = 12
"""Tokens of a golden case."""
E, H = 16, 24
"""Experts, and features of a token."""
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
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", "Ernie4_5_MoeConfig", {"moe_num_experts": E, "moe_k": 3, "moe_norm_min": 0.7},
        RoutingRule(e_score_correction_bias=True, norm_min=0.7), 3,
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


def consult(name: str, x: Any, bias: Any, correction: Any) -> tuple[Any, Any, Any, Any]:
    """Ask a family's router: its gate (E, H), logits (T, E), every token's weights, zero where an expert was not chosen, (T, E), and ids.

    `x` (T, H), `bias` and `correction` (E,) are float32 tensors; ids are None where the router gives none.
    """
    family, router_name, config_name, options, rule, _ = CASES[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), config_name)(**SIZES, **options)
    router = getattr(module, router_name)(config).eval()
    torch.nn.init.normal_(router.weight, std=0.3 if family in ("phimoe", "ernie4_5_moe") else 1.0)
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
    return router.weight, logits, torch.zeros(len(x), E).scatter_(1, ids, weights), ids


def main() -> None:
    """Write the golden file."""
    out: dict[str, Any] = {}
    for name, case in CASES.items():
        torch.manual_seed(11)
        x, bias, correction = torch.randn(N_GOLDEN, H), torch.randn(E), torch.randn(E) * 0.2
        _, logits, weights, _ = consult(name, x, bias, correction)
        out |= {f"{name}.logits": logits.detach().float().numpy(), f"{name}.weights": weights.detach().float().numpy()}
        if case[4].e_score_correction_bias:
            out[f"{name}.correction"] = correction.numpy()
    np.savez_compressed(GOLDEN, **out)


if __name__ == "__main__":
    main()

"""Gradients of transformers' mixtures of experts, by automatic differentiation; and their golden file, ``tests/golden/gradients.npz``.

    python tools/golden_gradients.py      # needs torch and transformers (the `oracle` extra)

Keys of the file: ``NAME.x`` and ``NAME.d_out``, (tokens, hidden), input and gradient of the output; ``NAME.ROLE``, tensors in published
order, those of experts stacked, and ``NAME.shared.ROLE``; each but ``d_out`` again with ``d:`` before it, its gradient. All computed in
float64, but what transformers itself takes in float32 (scores of routers), and kept in float32.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.foundation.shared_experts import SharedExperts

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "gradients.npz"
N_GOLDEN = 10
"""Tokens of a golden case."""
E, H, F = 8, 6, 5
"""Experts, and features of a token and of a hidden layer."""
Tensors = dict[tuple[str, Any], np.ndarray]


class Case(NamedTuple):
    """One family's block, and what it is to us."""

    family: str
    block: str
    config: str
    options: dict[str, Any]
    rule: RoutingRule
    top_k: int
    shared: SharedExperts | None = None
    clamped: ClampedExperts | None = None


SIZES = {"hidden_size": H, "intermediate_size": F, "moe_intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2}
CASES = {
    "mixtral": Case(
        "mixtral", "MixtralSparseMoeBlock", "MixtralConfig", {"num_local_experts": E, "num_experts_per_tok": 2}, RoutingRule(), 2
    ),
    "qwen3_moe": Case(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {"num_experts": E, "num_experts_per_tok": 3, "norm_topk_prob": False},
        RoutingRule(expert_weighting_normalization=False), 3,
    ),
    "qwen2_moe": Case(
        "qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig",
        {"num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": True, "shared_expert_intermediate_size": 7},
        RoutingRule(), 2, SharedExperts(intermediate_size=7, gated=True),
    ),
    "deepseek_v3": Case(
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config",
        {
            "n_routed_experts": E, "num_local_experts": E, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "n_shared_experts": 2,
        },
        ROUTING_PRESETS["deepseek_v3"], 3, SharedExperts(intermediate_size=2 * F),
    ),
    "gpt_oss": Case(
        "gpt_oss", "GptOssMLP", "GptOssConfig", {"num_local_experts": E, "num_experts_per_tok": 2, "swiglu_limit": 1.0},
        ROUTING_PRESETS["gpt_oss"], 2, None, ClampedExperts(alpha=1.702, limit=1.0),
    ),
}  # fmt: skip


def rule_of(name: str) -> RoutingRule:
    """The rule, with the groups of the case."""
    rule = CASES[name].rule
    return replace(rule, n_group=4, topk_group=2) if name == "deepseek_v3" else rule


def tensors_of(block: Any, clamped: bool, take: Any) -> Tensors:
    """What `take` gives of every parameter, by role and expert, (out, in)."""
    experts, router, out = block.experts, block.router if clamped else block.gate, Tensors()
    for e in range(E):
        gate_up, down = take(experts.gate_up_proj)[e], take(experts.down_proj)[e]
        if clamped:
            gate_up, down = gate_up.T.reshape(-1, 2, gate_up.shape[0]).transpose(1, 0, 2), down.T
            b_gate_up = take(experts.gate_up_proj_bias)[e].reshape(-1, 2)
            out["b_gate", e], out["b_up", e], out["b_down", e] = b_gate_up[:, 0], b_gate_up[:, 1], take(experts.down_proj_bias)[e]
        else:
            gate_up = gate_up.reshape(2, -1, gate_up.shape[1])
        out["w_gate", e], out["w_up", e], out["w_down", e] = gate_up[0], gate_up[1], down
    out["router", None] = take(router.weight)
    if clamped:
        out["router_bias", None] = take(router.bias)
    for name in ("shared_expert", "shared_experts"):
        if hasattr(block, name):
            for role in ("gate", "up", "down"):
                out[f"w_{role}", "shared"] = take(getattr(getattr(block, name), f"{role}_proj").weight)
    if hasattr(block, "shared_expert_gate"):
        out["shared_gate", None] = take(block.shared_expert_gate.weight)
    return out


def consult(name: str, n_tokens: int, seed: int) -> tuple[Tensors, Tensors]:
    """Run a family's block forward and backward: tensors, ``x`` and ``d_out``; and gradients, of ``x`` too."""
    case = CASES[name]
    torch.manual_seed(seed)
    module = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    config = getattr(importlib.import_module(f"transformers.models.{case.family}"), case.config)(**SIZES, **case.options)
    config._experts_implementation = "eager"
    block = getattr(module, case.block)(config).double().train()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.6).float().double())  # numbers that float32 holds
        if hasattr(block, "gate") and hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias.copy_(torch.randn(E).mul(0.1).float().double())
    x, d_out = (torch.randn(1, n_tokens, H).float().double().requires_grad_(i == 0) for i in range(2))
    out = block(x)
    (out[0] if isinstance(out, tuple) else out).backward(d_out)
    given = tensors_of(block, case.clamped is not None, lambda p: p.detach().numpy().copy())
    found = tensors_of(block, case.clamped is not None, lambda p: p.grad.numpy().copy())
    if case.rule.e_score_correction_bias:
        given["e_score_correction_bias", None] = block.gate.e_score_correction_bias.numpy().copy()
    given["x", None], given["d_out", None], found["x", None] = x.detach().numpy()[0], d_out.numpy()[0], x.grad.numpy()[0]
    return given, found


def main() -> None:
    """Write the golden file."""
    out: dict[str, Any] = {}
    for name in CASES:
        for mark, tensors in zip(("", "d:"), consult(name, N_GOLDEN, 3), strict=True):
            for role, expert in tensors:
                if expert in (None, "shared"):
                    out[f"{mark}{name}.{'' if expert is None else 'shared.'}{role}"] = tensors[role, expert].astype(np.float32)
                elif expert == 0:
                    out[f"{mark}{name}.{role}"] = np.stack([tensors[role, e] for e in range(E)]).astype(np.float32)
    np.savez_compressed(GOLDEN, **out)


if __name__ == "__main__":
    main()

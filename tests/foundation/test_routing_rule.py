"""Routing rules are valid from birth: what contradicts itself raises, with the rule and the value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.testing import contract_specs
from wse_emu.testing.routing_rules import random_rule

MOE = next(spec for spec in contract_specs().values() if spec.is_moe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_algorithm": "random"}, "`routing_algorithm` must be one of learned, hash, uniform, got 'random'"),
        ({"router_selection_nonlinearity": "relu"}, "`router_selection_nonlinearity` must be one of"),
        ({"tie_policy": "first"}, "`tie_policy` must be one of lowest_id, highest_id, reject"),
        ({"selection_dtype": "int8"}, "`selection_dtype` must be one of"),
        ({"expert_weighting_normalization": 1}, "`expert_weighting_normalization` must be True or False, got 1"),
        ({"n_group": 0}, "`n_group` must be an integer >= 1, got 0"),
        ({"n_group": 2, "topk_group": 3}, "`topk_group` must not exceed `n_group`, got 3 of 2"),
        ({"null_expert_bias": -1.0}, "`null_expert_bias` must be a number >= 0 that float32 can hold"),
        ({"routed_scaling_factor": 1e39}, "`routed_scaling_factor` must be a number >= 0 that float32 can hold"),
        ({"null_expert_bias": float("nan")}, "`null_expert_bias` must be a number >= 0 that float32 can hold"),
        ({"null_expert_bias": 1.1, "expert_weighting_normalization": False}, "`null_expert_bias` needs `expert_weighting_normalization`"),
        ({"norm_min": 0.1, "expert_weighting_normalization": False}, "`norm_min` needs `expert_weighting_normalization`"),
        ({"routed_scaling_factor": 0.0}, "`routed_scaling_factor` must be above 0"),
        ({"expert_weighting_nonlinearity": "softmax_topk"}, "`expert_weighting_normalization` must be False"),
        (
            {"expert_weighting_nonlinearity": "sparsemixer", "expert_weighting_normalization": False, "router_jitter_noise": 0.1},
            "sparsemixer chooses by logits alone",
        ),
        (
            {
                "expert_weighting_nonlinearity": "sparsemixer", "expert_weighting_normalization": False,
                "router_selection_nonlinearity": "none",
            },
            "`router_jitter_noise` above 0 .* belong together",
        ),
        ({"router_jitter_noise": 0.1}, "`router_jitter_noise` above 0 .* belong together"),
        ({"router_fp32": False}, "`router_fp32` False rounds logits"),
        ({"routing_algorithm": "hash", "router_use_bias": True}, "`router_use_bias` must be False with `routing_algorithm` 'hash'"),
        ({"routing_algorithm": "uniform", "e_score_correction_bias": True}, "`e_score_correction_bias` must be False"),
        ({"routing_algorithm": "hash", "n_group": 2}, "`n_group` must be 1 with `routing_algorithm` 'hash'"),
    ],
)  # fmt: skip
def test_contradictions_raise_at_birth(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RoutingRule(**options)


@pytest.mark.parametrize(
    ("rule", "num_experts", "top_k", "message"),
    [
        (RoutingRule(routing_algorithm="hash"), 4, 2, "`top_k` must be 1 with `routing_algorithm` 'hash', got 2"),
        (RoutingRule(n_group=3), 8, 2, "`n_group` must divide the experts, got 3 groups of 8 experts"),
        (RoutingRule(n_group=8, group_score="top2_sum"), 8, 1, "'top2_sum' needs two experts in a group"),
        (RoutingRule(n_group=4, topk_group=1), 8, 3, "`topk_group` leaves 2 experts open, fewer than the 3 to choose"),
        (RoutingRule(), 40_000, 2, "`num_experts` must not exceed 32768"),
    ],
)
def test_rules_that_do_not_fit_the_layer_raise(rule: RoutingRule, num_experts: int, top_k: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        rule.check_sizes(num_experts, top_k)
    with pytest.raises(SpecError, match=message):
        replace(MOE, num_experts=num_experts, top_k=top_k, routing=rule)


def test_presets_are_what_their_models_publish() -> None:
    assert set(ROUTING_PRESETS) >= {"mixtral", "qwen", "deepseek_v2", "deepseek_v3", "gpt_oss", "modelzoo"}
    sizes = {"mixtral": (8, 2), "qwen": (128, 8), "deepseek_v2": (160, 6), "deepseek_v3": (256, 8), "gpt_oss": (128, 4)}
    for name, (experts, top_k) in sizes.items():
        ROUTING_PRESETS[name].check_sizes(experts, top_k)


def test_random_rules_fit_their_layers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        rule, num_experts, top_k = random_rule(rng, algorithms=("learned", "learned", "hash", "uniform"))
        rule.check_sizes(num_experts, top_k)

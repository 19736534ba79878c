"""Routing rules of config.json, as the families say them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.routing_rule import RoutingRule


def fixed_routing(rule: RoutingRule) -> Callable[[Fields], RoutingRule]:
    """One rule, whatever the fields say."""
    return lambda fields: rule


def fixed_routing_config(rule: RoutingRule) -> dict[str, Any]:
    """Nothing of the rule is written: the family has one only."""
    return {}


def softmax_routing(fields: Fields) -> RoutingRule:
    """Softmax over all experts; ``norm_topk_prob`` says whether chosen weights are divided by their sum."""
    return RoutingRule(expert_weighting_normalization=fields.boolean("norm_topk_prob", False))


def softmax_routing_config(rule: RoutingRule) -> dict[str, Any]:
    """Write that switch."""
    return {"norm_topk_prob": rule.expert_weighting_normalization}


def grouped_sigmoid_routing(
    *, normalized: bool, n_group: int = 1, topk_group: int = 1, scale: float = 1.0
) -> Callable[[Fields], RoutingRule]:  # fmt: skip
    """Rule of DeepSeek-V3 and its kin: sigmoid, a correction bias, groups scored by their two best; the arguments are defaults."""

    def read(fields: Fields) -> RoutingRule:
        divided = fields.boolean("norm_topk_prob", normalized)
        return RoutingRule(
            router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True,
            n_group=fields.integer("n_group", n_group), topk_group=fields.integer("topk_group", topk_group), group_score="top2_sum",
            expert_weighting_normalization=divided, norm_epsilon=1e-20 if divided else 0.0,
            routed_scaling_factor=fields.number("routed_scaling_factor", scale),
        )  # fmt: skip

    return read


def grouped_sigmoid_config(rule: RoutingRule) -> dict[str, Any]:
    """Write its numbers."""
    return {
        "n_group": rule.n_group, "topk_group": rule.topk_group, "norm_topk_prob": rule.expert_weighting_normalization,
        "routed_scaling_factor": rule.routed_scaling_factor,
    }  # fmt: skip


def greedy_softmax_routing(fields: Fields) -> RoutingRule:
    """Rule of DeepSeek-V2: softmax over all experts; ``topk_method`` says whether groups, scored by their best expert, are chosen first."""
    method = fields.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.fail("topk_method", "must be 'greedy' or 'group_limited_greedy'")
    grouped = method == "group_limited_greedy"
    return RoutingRule(
        n_group=fields.integer("n_group") if grouped else 1, topk_group=fields.integer("topk_group") if grouped else 1,
        expert_weighting_normalization=False, routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
    )  # fmt: skip


def greedy_softmax_config(rule: RoutingRule) -> dict[str, Any]:
    """Write it."""
    groups = {"topk_method": "group_limited_greedy", "n_group": rule.n_group, "topk_group": rule.topk_group}
    return (groups if rule.n_group > 1 else {"topk_method": "greedy"}) | {"routed_scaling_factor": rule.routed_scaling_factor}

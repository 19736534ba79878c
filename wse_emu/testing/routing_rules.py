"""Random routing rules, for property tests: every piece of a rule with every other that it may be put together with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from wse_emu.foundation.routing_rule import RoutingRule


def random_rule(rng: np.random.Generator, *, algorithms: tuple[str, ...] = ("learned",)) -> tuple[RoutingRule, int, int]:
    """Draw a rule, a number of experts and a `top_k` that fit each other.

    Parameters
    ----------
    rng : Generator
    algorithms : tuple of str
        From which `RoutingRule.routing_algorithm` is drawn.

    Returns
    -------
    tuple of (RoutingRule, int, int)
        The rule, `num_experts` and `top_k`.
    """

    def one_of(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    algorithm = one_of(*algorithms)
    if algorithm != "learned":
        num_experts = int(rng.integers(1, 9))
        top_k = 1 if algorithm == "hash" else int(rng.integers(1, num_experts + 1))
        return RoutingRule(routing_algorithm=algorithm, routed_scaling_factor=one_of(1.0, 2.5)), num_experts, top_k
    n_group, size = one_of(1, 1, 2, 3), int(rng.integers(2, 6))
    topk_group = int(rng.integers(1, n_group + 1))
    top_k = int(rng.integers(1, topk_group * size + 1))
    weighting = one_of("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sparsemixer")
    plain = weighting == "sparsemixer"
    if plain:
        n_group = topk_group = 1
        top_k = min(top_k, size)
    normalizes = bool(rng.integers(2)) and weighting not in ("softmax_topk", "sparsemixer")
    dtype = one_of("float32", "float32", "bfloat16", "float16", "cb16")
    rule = RoutingRule(
        router_selection_nonlinearity="none" if plain else one_of("softmax", "sigmoid", "sqrtsoftplus", "none"),
        e_score_correction_bias=not plain and bool(rng.integers(2)),
        n_group=n_group,
        topk_group=topk_group,
        group_score=one_of("max", "top2_sum"),
        tie_policy=one_of("lowest_id", "highest_id"),
        expert_weighting_nonlinearity=weighting,
        expert_weighting_normalization=normalizes,
        null_expert_bias=one_of(0.0, 1.1) if normalizes else 0.0,
        norm_epsilon=one_of(0.0, 1e-20) if normalizes else 0.0,
        norm_min=one_of(0.0, 1e-12, 0.4) if normalizes else 0.0,
        routed_scaling_factor=one_of(1.0, 2.5),
        router_jitter_noise=one_of(0.01, 0.3) if plain else 0.0,
        router_use_bias=bool(rng.integers(2)),
        probability_before_ffn=bool(rng.integers(2)),
        router_fp32=dtype == "float32" or bool(rng.integers(2)),
        selection_dtype=dtype,
    )
    return rule, n_group * size, top_k


def random_rule_together(rng: np.random.Generator, *, weights: bool = False) -> tuple[RoutingRule, int, int]:
    """Draw a rule under which tokens meet, a number of experts and a `top_k` that fit each other.

    Parameters
    ----------
    rng : Generator
    weights : bool
        Whether weights may be sinkhorn's, too; no gradient is taken of those.

    Returns
    -------
    tuple of (RoutingRule, int, int)
        The rule, `num_experts` and `top_k`.
    """
    rule, num_experts, top_k = random_rule(rng)
    while rule.expert_weighting_nonlinearity == "sparsemixer":
        rule, num_experts, top_k = random_rule(rng)
    kind = int(rng.integers(4))
    if kind == 0 or rng.integers(4) == 0:
        rule = replace(rule, router_selection_nonlinearity="sinkhorn", sinkhorn_n_iters=int(rng.integers(1, 4)))
    if weights and rng.integers(3) == 0:
        rule = replace(rule, expert_weighting_nonlinearity="sinkhorn")
    factor = float(rng.choice([0.3, 0.5, 1.0, 1.25, 2.0]))
    if kind in (1, 2):
        rule = replace(rule, capacity_factor=factor, overflow=("drop", "reroute")[kind - 1])
    if kind == 3:
        weighting = rule.expert_weighting_nonlinearity
        rule = replace(
            rule, chooser="expert", capacity_factor=None if rng.integers(3) == 0 else factor, n_group=1, topk_group=1,
            tie_policy="lowest_id", expert_weighting_normalization=False, null_expert_bias=0.0, norm_epsilon=0.0, norm_min=0.0,
            expert_weighting_nonlinearity="softmax" if weighting == "softmax_topk" else weighting,
        )  # fmt: skip
    return rule, num_experts, top_k

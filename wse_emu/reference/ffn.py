"""The feed-forward half of a layer, densely: one network for all tokens, or every expert for every token, then masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import formulas, routing
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.tensors import Expert
from wse_emu.reference.weights import PublishedWeights


def routing_numbers(rule: RoutingRule, token_ids: Ints, pos: Ints) -> Ints:
    """What hash (token ids) and uniform (positions) routing go by."""
    return token_ids if rule.routing_algorithm == "hash" else pos


def dense_ffn(weights: PublishedWeights, layer: int, x: Floats, expert: Expert = None) -> Iterator[tuple[str, Floats]]:
    """Stages of one feed-forward network, a layer's own or one expert's; the last is "ffn_out"."""
    gate, up = (weights.product(x, weights.layer(layer, name, expert)) for name in ("w_gate", "w_up"))
    clamped = weights.spec.clamped_experts if isinstance(expert, int) else None
    if clamped is not None:
        b_gate, b_up, b_down = (weights.layer(layer, name, expert) for name in ("b_gate", "b_up", "b_down"))
        hidden = weights.stored(formulas.clamped_glu(gate + b_gate, up + b_up, clamped.alpha, clamped.limit))
        yield "ffn_hidden", hidden
        yield "ffn_out", weights.product(hidden, weights.layer(layer, "w_down", expert)) + b_down
        return
    hidden = weights.stored(formulas.glu(gate, up, weights.spec.activation))
    yield "ffn_hidden", hidden
    out = weights.product(hidden, weights.layer(layer, "w_down", expert))
    yield "ffn_out", weights.stored(out) if expert is None else out  # others join a sum


def experts_ffn(
    weights: PublishedWeights, layer: int, x: Floats, numbers: Ints, replay: Ints | None, replayed_weights: Floats | None = None,
    together: Ints | None = None,
) -> Iterator[tuple[str, NDArray[Any]]]:  # fmt: skip
    """Stages of a mixture: every expert for every token, then masked.

    `numbers` (T,) takes the place of scores where these are not learned (see `routing_numbers`), `replay` (T, k) that of the choice,
    `replayed_weights` (T, k) that of the weights. Tokens of one number in `together` (T,) meet where the rule lets them.
    """
    spec = weights.spec
    rule = spec.routing
    if rule.is_learned:
        logits = formulas.linear(x, weights.layer(layer, "router"))
        if rule.router_use_bias:
            logits = logits + weights.layer(layer, "router_bias")
        yield "router_logits", logits
        correction = weights.layer(layer, "e_score_correction_bias") if rule.e_score_correction_bias else None
        if rule.tokens_meet:
            assert together is not None
            value = routing.compared_together(logits, together, rule, correction)
            yield "router_scores", value
            ids = routing.choose_together(value, together, spec.top_k, rule)
        else:
            ids = routing.choose(routing.compared(logits, rule, correction), spec.top_k, rule)
        ids = ids if replay is None else replay
        share = routing.weights(logits if together is None else routing.shares(logits, together, rule), ids, rule)
    else:
        ids = routing.assigned(numbers, spec.num_experts, spec.top_k) if replay is None else replay
        share = np.full(ids.shape, rule.routed_scaling_factor / spec.top_k, weights.dtype)
    yield "topk_ids", ids
    share = share if replayed_weights is None else formulas.cast(replayed_weights, weights.dtype)
    yield "topk_weights", share
    combined = np.zeros_like(x)
    if spec.shared_experts is not None:
        shared = dict(dense_ffn(weights, layer, x, "shared"))
        yield "shared_hidden", shared["ffn_hidden"]
        yield "shared_out", shared["ffn_out"]
        combined += shared["ffn_out"]
        if spec.shared_experts.gated:
            gate = formulas.linear(x, weights.layer(layer, "shared_gate"))
            yield "shared_gate", gate
            combined *= expit(gate)
    hidden = np.zeros((*ids.shape, spec.moe_intermediate_size), weights.dtype)
    outs = np.zeros((*ids.shape, spec.hidden_size), weights.dtype)
    for expert in range(spec.num_experts):
        mask = ids == expert  # (T, k), at most one slot of a token
        factor = np.where(mask, share, 0).sum(axis=1, keepdims=True)
        before = rule.probability_before_ffn
        stage = dict(dense_ffn(weights, layer, weights.stored(x * factor) if before else x, expert))  # every token, chosen or not
        t, slot = np.nonzero(mask)
        hidden[t, slot] = stage["ffn_hidden"][t]
        outs[t, slot] = stage["ffn_out"][t]
        combined += np.where(mask.any(axis=1, keepdims=True), stage["ffn_out"] if before else factor * stage["ffn_out"], 0)
    yield "expert_hidden", hidden
    yield "expert_out", outs
    yield "ffn_out", weights.stored(combined)

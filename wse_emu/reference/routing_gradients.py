"""How a token's weights answer to its logits, as full matrices of derivatives; the choice of experts held as it is."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import routing
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.storage import rounded


def scores_jacobian(logits: Floats, kind: str) -> Floats:
    """``d score[t, a] / d logit[t, e]`` of `routing.scores`: (T, E) -> (T, E, E)."""
    one = np.eye(logits.shape[1], dtype=logits.dtype)
    value = routing.scores(logits, kind)
    out: Floats
    if kind == "softmax":
        out = value[:, :, None] * (one - value[:, None, :])
    elif kind == "sigmoid":
        out = (value * expit(-logits))[:, :, None] * one
    elif kind == "sqrtsoftplus":
        slope = np.divide(expit(logits), 2 * value, out=np.zeros_like(value), where=value > 0)
        out = slope[:, :, None] * one
    else:
        out = np.broadcast_to(one, (len(logits), *one.shape))
    return out


def weights_jacobian(logits: Floats, ids: Ints, rule: RoutingRule) -> Floats:
    """``d weight[t, s] / d logit[t, e]`` of `routing.weights`: (T, E), (T, k) -> (T, k, E); 0 where the id is -1.

    Rounding to 16 bits counts as having slope 1, as automatic differentiation has it; sinkhorn's scores as weights have none at all.
    """
    if rule.weighs_together:
        return np.zeros((*ids.shape, logits.shape[1]), logits.dtype)
    if (ids < 0).any():
        out = np.zeros((*ids.shape, logits.shape[1]), logits.dtype)
        for n in range(1, ids.shape[1] + 1):
            mine = (ids >= 0).sum(axis=1) == n
            out[mine, :n] = weights_jacobian(logits[mine], ids[mine, :n], rule)
        return out
    jacobian, share = _raw_jacobian(logits, ids, rule), routing.raw_weights(logits, ids, rule)
    if rule.expert_weighting_normalization:
        total = routing.divisor(share, rule)
        answers = share.sum(axis=-1, keepdims=True) + share.dtype.type(rule.null_expert_bias + rule.norm_epsilon) >= rule.norm_min
        of_total = np.where(answers[:, :, None], jacobian.sum(axis=1, keepdims=True), 0)
        jacobian = (jacobian - (share / total)[:, :, None] * of_total) / total[:, :, None]
    scaled: Floats = jacobian * logits.dtype.type(rule.routed_scaling_factor)
    return scaled


def _raw_jacobian(logits: Floats, ids: Ints, rule: RoutingRule) -> Floats:
    """The same of `routing.raw_weights`."""
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    kind = rule.expert_weighting_nonlinearity
    chosen = (ids[:, :, None] == np.arange(logits.shape[1])).astype(logits.dtype)  # (T, k, E)
    out: Floats
    if kind == "softmax_topk":
        among = scores_jacobian(np.take_along_axis(used, ids, axis=1), "softmax")
        out = np.einsum("tab,tbe->tae", among, chosen)
    elif kind == "sparsemixer":
        terms, ratio = routing.sparsemixer_terms(used, ids)
        inside = np.where(ratio > 2 * rule.router_jitter_noise, 0, terms)
        weight = 1 / inside.sum(axis=2, keepdims=True)
        out = weight * (chosen - inside * weight)
    else:
        out = np.take_along_axis(scores_jacobian(used, kind), ids[:, :, None], axis=1)
    return out


def logits_gradient(logits: Floats, ids: Ints, rule: RoutingRule, d_weights: Floats) -> Floats:
    """Gradient of the logits from that of the weights: (T, E), (T, k), (T, k) -> (T, E)."""
    out: Floats = np.einsum("tk,tke->te", d_weights, weights_jacobian(logits, ids, rule))
    return out

"""Gradients of a mixture, densely: every expert for every token, then masked; in the dtype of the arrays that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.reference import formulas
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.routing_gradients import logits_gradient
from wse_emu.reference.tensors import Expert
from wse_emu.reference.weights import PublishedWeights


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """Gradients of one layer's mixture."""

    x: Floats
    """(T, hidden) of its input."""
    logits: Floats | None
    """(T, E) of the router, before its bias is added or after; None where there is no router."""
    topk_weights: Floats
    """(T, k) of the experts' weights."""
    weights: dict[tuple[str, Expert], Floats]
    """Of every tensor, by role and expert, in published order; see `tensors.layer_tensor`."""


def glu_slopes(gate: Floats, up: Floats, activation: str, clamped: ClampedExperts | None = None) -> tuple[Floats, Floats]:
    """Derivatives of the gated activation by gate and by up, elementwise."""
    if clamped is not None:
        g, u = np.minimum(gate, clamped.limit), np.clip(up, -clamped.limit, clamped.limit)
        s = expit(clamped.alpha * g)
        by_gate: Floats = (u + 1) * s * (1 + clamped.alpha * g * expit(-clamped.alpha * g)) * (gate <= clamped.limit)
        by_up: Floats = g * s * (np.abs(up) <= clamped.limit)
        return by_gate, by_up
    if activation == "silu":
        s = expit(gate)
        return up * s * (1 + gate * expit(-gate)), gate * s
    c = 2 * np.sqrt(2 / np.pi)
    z = c * (gate + 0.044715 * gate**3)
    slope = expit(z) + gate * expit(z) * expit(-z) * c * (1 + 3 * 0.044715 * gate * gate)
    return up * slope, formulas.activate(gate, activation)


def mixture_gradients(
    weights: PublishedWeights, layer: int, x: Floats, ids: Ints, share: Floats, d_out: Floats, logits: Floats | None = None
) -> LayerGradients:
    """Gradients of `experts_ffn` in a model whose stages are not rounded, the choice of experts held as it is.

    Parameters
    ----------
    weights : PublishedWeights
    layer : int
    x, d_out : ndarray, (T, hidden)
        Input, and gradient of the output.
    ids, share : ndarray, (T, k), int64 and floating
        Experts, -1 for none, and their weights.
    logits : ndarray, (T, E), optional
        With the router's bias, as `ids` and `share` were found from them.
    """
    spec, found = weights.spec, dict[tuple[str, Expert], Floats]()
    dx, d_share = np.zeros_like(x), np.zeros_like(share)
    if spec.shared_experts is not None:
        dx += _shared(weights, layer, x, d_out, found)
    before = spec.routing.probability_before_ffn
    for expert in range(spec.num_experts):
        mask = ids == expert
        visits, factor = mask.any(axis=1, keepdims=True), np.where(mask, share, 0).sum(axis=1, keepdims=True)
        given = x * factor if before else x
        out, d_given = _network(weights, layer, given, np.where(visits, d_out * (1 if before else factor), 0), expert, found)
        d_factor = (d_given * x if before else out * d_out).sum(axis=1, keepdims=True)
        d_share += np.where(mask, d_factor, 0)
        dx += d_given * factor if before else d_given
    d_logits = None
    if logits is not None:
        d_logits = logits_gradient(logits, ids, spec.routing, d_share)
        found["router", None] = d_logits.T @ x
        if spec.routing.router_use_bias:
            found["router_bias", None] = d_logits.sum(axis=0)
        dx += d_logits @ weights.layer(layer, "router")
    return LayerGradients(dx, d_logits, d_share, found)


def _network(
    weights: PublishedWeights, layer: int, x: Floats, d_out: Floats, expert: Expert, found: dict[tuple[str, Expert], Floats]
) -> tuple[Floats, Floats]:
    """Output of one network, and the gradient of its input; those of its tensors go to `found`."""
    w_gate, w_up, w_down = (weights.layer(layer, name, expert) for name in ("w_gate", "w_up", "w_down"))
    gate, up = formulas.linear(x, w_gate), formulas.linear(x, w_up)
    clamped = weights.spec.clamped_experts if isinstance(expert, int) else None
    if clamped is not None:
        gate, up = (y + weights.layer(layer, name, expert) for y, name in ((gate, "b_gate"), (up, "b_up")))
        hidden = formulas.clamped_glu(gate, up, clamped.alpha, clamped.limit)
        out: Floats = formulas.linear(hidden, w_down) + weights.layer(layer, "b_down", expert)
    else:
        hidden = formulas.glu(gate, up, weights.spec.activation)
        out = formulas.linear(hidden, w_down)
    d_hidden: Floats = d_out @ w_down
    d_gate, d_up = (d_hidden * slope for slope in glu_slopes(gate, up, weights.spec.activation, clamped))
    found["w_down", expert], found["w_gate", expert], found["w_up", expert] = d_out.T @ hidden, d_gate.T @ x, d_up.T @ x
    if clamped is not None:
        for name, gradient in (("b_gate", d_gate), ("b_up", d_up), ("b_down", d_out)):
            found[name, expert] = gradient.sum(axis=0)
    return out, d_gate @ w_gate + d_up @ w_up


def _shared(weights: PublishedWeights, layer: int, x: Floats, d_out: Floats, found: dict[tuple[str, Expert], Floats]) -> Floats:
    """Gradient of the input through the shared experts."""
    shared = weights.spec.shared_experts
    assert shared is not None
    if not shared.gated:
        return _network(weights, layer, x, d_out, "shared", found)[1]
    w_gate = weights.layer(layer, "shared_gate")
    opened = expit(formulas.linear(x, w_gate))
    out, dx = _network(weights, layer, x, d_out * opened, "shared", found)
    d_gate = (out * d_out).sum(axis=1, keepdims=True) * opened * (1 - opened)
    found["shared_gate", None] = d_gate.T @ x
    through: Floats = dx + d_gate @ w_gate
    return through

"""What float32 may make of a mixture's gradients: bounds derived from `tolerance`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from wse_emu.equivalence.routing_bounds import chosen_score_error
from wse_emu.equivalence.tolerance import EXP_ERROR, SMALLEST_NORMAL, SUBNORMAL, U, clamped_glu_bound, glu_bound, linear_bound, sum_bound
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import formulas, routing
from wse_emu.reference.ffn_gradients import LayerGradients, glu_slopes
from wse_emu.reference.routing_gradients import logits_gradient
from wse_emu.reference.storage import rounded
from wse_emu.reference.tensors import Expert
from wse_emu.reference.weights import PublishedWeights

Floats = NDArray[Any]
"""Of float64."""
Ints = NDArray[np.int64]
Known = tuple[Floats, Floats]
"""A value and its error."""


def logits_gradient_bound(logits: Floats, ids: Ints, rule: RoutingRule, d_weights: Floats, e_weights: Floats) -> Floats:
    """Bound of `routing_gradients.logits_gradient` of exact `logits` (T, E), where `d_weights` (T, k) are known to `e_weights`; (T, E).

    Sums and differences are taken of the absolute values of what they add: ``(|d| + sum of w |d|) / D`` for weights that are divided,
    ``p (|d| + sum of p |d|)`` for softmax. Each product and sum of them has the relative errors of its factors: of scores
    (`chosen_score_error`, twice, and in the divisor as its terms), of probabilities, and of its own roundings, of which there are as many
    as the sum has terms, and eight. The errors of `d_weights` go through the same expressions. Where the divisor lies as near its least
    value as its error, either side is right. Sinkhorn's scores as weights have no gradient: nothing is allowed there.
    """
    if rule.weighs_together:
        return np.zeros(logits.shape)
    if (ids < 0).any():
        out = np.zeros(logits.shape)
        for n in range(1, ids.shape[1] + 1):
            mine = (ids >= 0).sum(axis=1) == n
            out[mine] = logits_gradient_bound(logits[mine], ids[mine, :n], rule, d_weights[mine, :n], e_weights[mine, :n])
        return out
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    raw = routing.raw_weights(logits, ids, rule)
    error = chosen_score_error(logits, ids, raw, rule)
    relative = error / np.maximum(raw, SMALLEST_NORMAL) + (ids.shape[1] + 8) * U
    scale = rule.routed_scaling_factor
    size, loss = scale * np.abs(d_weights), scale * (e_weights + 2 * U * np.abs(d_weights))
    if rule.expert_weighting_normalization:
        total, sure = routing.divisor(raw, rule), 4 * relative.max(axis=1, keepdims=True)
        share = raw / total
        size = (size + (share * size).sum(axis=1, keepdims=True)) / total
        loss = (loss + (share * loss).sum(axis=1, keepdims=True)) / total + sure * size
        plain = raw.sum(axis=1, keepdims=True) + rule.null_expert_bias + rule.norm_epsilon
        loss = loss + np.where((rule.norm_min > 0) & (np.abs(plain - rule.norm_min) <= sure * plain), 2 * size, 0)
    through = _Through(used, ids, raw, relative, rule)
    return through.error(size, loss)


class _Through:
    """Sizes and errors on their way through the score that weighs."""

    def __init__(self, logits: Floats, ids: Ints, raw: Floats, relative: Floats, rule: RoutingRule) -> None:
        self.logits, self.ids, self.raw, self.relative, self.rule = logits, ids, raw, relative, rule

    def error(self, size: Floats, loss: Floats) -> Floats:
        """From sizes and errors of the scores' gradients, (T, k), to the error of the logits', (T, E)."""
        kind, n = self.rule.expert_weighting_nonlinearity, self.logits.shape[1]
        wide_size, wide_loss = (np.zeros(self.logits.shape) for _ in range(2))
        np.put_along_axis(wide_size, self.ids, size, axis=1)
        np.put_along_axis(wide_loss, self.ids, loss, axis=1)
        out: Floats
        if kind == "sparsemixer":  # an expert at the edge of the band may count or not: its share is part of the chosen score's error
            own = (size * self.raw * (4 * self.relative + (n + 8) * U)).sum(axis=1, keepdims=True)
            out = np.broadcast_to(own + (loss * self.raw).sum(axis=1, keepdims=True), self.logits.shape) + SMALLEST_NORMAL
            return out
        if kind in ("softmax", "softmax_topk"):
            left = np.ones(self.logits.shape, np.bool_)
            if kind == "softmax_topk":
                left[:] = False
                np.put_along_axis(left, self.ids, True, axis=1)
            x = np.where(left, self.logits, -np.inf)
            gap = np.where(left, x.max(axis=1, keepdims=True) - x, 0)
            p = np.exp(np.where(left, -gap, -np.inf))
            p = p / p.sum(axis=1, keepdims=True)
            each = EXP_ERROR + U * gap.max(axis=1, keepdims=True) + (n + 8) * U
            size_of = wide_size + (p * wide_size).sum(axis=1, keepdims=True)
            loss_of = wide_loss + (p * wide_loss).sum(axis=1, keepdims=True)
            lost = SMALLEST_NORMAL * (1 + size_of) * (1 + n)
            out = p * (loss_of + 4 * each * size_of) + lost
            return out
        slope = np.abs(logits_gradient(self.logits, self.ids, _plain(self.rule), np.ones(self.ids.shape)))
        out = slope * (wide_loss + 24 * U * wide_size) + SMALLEST_NORMAL * (1 + wide_size)
        return out


def _plain(rule: RoutingRule) -> RoutingRule:
    """The score alone, not divided, scaled or rounded."""
    return RoutingRule(expert_weighting_nonlinearity=rule.expert_weighting_nonlinearity, expert_weighting_normalization=False)


def product_error(*factors: Known) -> Floats:
    """Error of a product of values that are each known to an error, and its own roundings, one less than there are factors."""
    size, whole = np.ones(()), np.ones(())
    for value, error in factors:
        size, whole = size * np.abs(value), whole * (np.abs(value) + error)
    out: Floats = whole - size + (len(factors) - 1) * U * whole + len(factors) * SUBNORMAL
    return out


def glu_gradient_bound(
    gate: Floats, up: Floats, d: Floats, e_gate: Floats, e_up: Floats, e_d: Floats, activation: str, clamped: ClampedExperts | None = None
) -> tuple[Floats, Floats]:
    """Bounds of the gradients of gate and up of a gated activation whose own gradient is `d`, all known to their errors; of one shape.

    Slope and value have their roundings (a sigmoid and its complement 5 each, sums and products; where the argument of the sigmoid is
    itself computed, as many of its size), and the error of gate enters with the slope's own slope: 1/2 for silu, 1 for gelu, half of
    alpha for the clamped gate. Where gate or up lies as near its limit as its error, the gradient may be there or not.
    """
    held, held_up, z, by_z, bend, roundings = gate, up, gate, np.ones(()), 0.5, np.full((), 12.0)
    if clamped is not None:
        held, held_up = np.minimum(gate, clamped.limit), np.clip(up, -clamped.limit, clamped.limit) + 1
        z, by_z, bend = clamped.alpha * held, np.full((), clamped.alpha), clamped.alpha / 2
        roundings = 12 + 4 * np.abs(z)
    elif activation == "gelu_tanh":
        c = 2 * np.sqrt(2 / np.pi)
        z, by_z, bend = c * (gate + 0.044715 * gate**3), c * (1 + 3 * 0.044715 * gate**2), 1.0
        roundings = 12 + 12 * np.abs(z)
    s, rest = expit(z), expit(-z)
    value, slope = held * s, s + held * s * rest * by_z
    size, lost = s + np.abs(held * s * rest * by_z), 4 * SMALLEST_NORMAL * (1 + np.abs(held))
    e_slope = bend * e_gate + roundings * U * size + lost
    e_value = np.abs(slope) * e_gate + bend / 2 * e_gate * e_gate + roundings * U * np.abs(value) + lost
    of_gate = product_error((d, e_d), (held_up, e_up + U * np.abs(held_up)), (slope, e_slope))
    of_up = product_error((d, e_d), (value, e_value))
    if clamped is not None:
        at_limit = np.abs(gate - clamped.limit) <= e_gate, np.abs(np.abs(up) - clamped.limit) <= e_up
        of_gate = np.where(gate > clamped.limit, 0, of_gate) + at_limit[0] * (np.abs(d * held_up * slope) + of_gate)
        of_up = np.where(np.abs(up) > clamped.limit, 0, of_up) + at_limit[1] * (np.abs(d * value) + of_up)
    return of_gate, of_up


def mixture_gradients_bound(
    weights: PublishedWeights, layer: int, x: Floats, ids: Ints, share: Floats, d_out: Floats, logits: Floats | None = None
) -> LayerGradients:
    """Bounds of `ffn_gradients.mixture_gradients` in float32, all its arguments being exact: errors of every stage through all later ones.

    Sums follow the one rule (`tolerance.sum_bound`), each with the errors of its terms.
    """
    spec, bounds = weights.spec, dict[tuple[str, Expert], Floats]()
    parts: list[Known] = []
    e_share, d_share = np.zeros(share.shape), np.zeros(share.shape)
    if spec.shared_experts is not None:
        parts += _shared(weights, layer, x, d_out, bounds)
    before = spec.routing.probability_before_ffn
    for expert in range(spec.num_experts):
        token, slot = np.nonzero(ids == expert)
        factor, given, d = share[token, slot][:, None], x[token], d_out[token]
        one = np.ones_like(factor), np.zeros_like(factor)
        if before:
            scaled = given * factor
            net = _Network(weights, layer, (scaled, U * np.abs(scaled)), d, expert)
            d_in, e_in = net.input(one, bounds)
            of_factor = (d_in * given).sum(axis=1), _sum_of(d_in * given, e_in * np.abs(given))
            d_in, e_in = d_in * factor, e_in * np.abs(factor) + U * np.abs(d_in * factor)
        else:
            net = _Network(weights, layer, (given, np.zeros_like(given)), d, expert)
            of_factor = net.factor()
            d_in, e_in = net.input((factor, np.zeros_like(factor)), bounds)
        d_share[token, slot], e_share[token, slot] = of_factor
        wide = np.zeros_like(x), np.zeros_like(x)
        wide[0][token], wide[1][token] = d_in, e_in
        parts.append(wide)
    e_logits = None
    if logits is not None:
        router, d_logits = weights.layer(layer, "router"), logits_gradient(logits, ids, spec.routing, d_share)
        e_logits = logits_gradient_bound(logits, ids, spec.routing, d_share, e_share)
        bounds["router", None] = _outer((d_logits, e_logits), (x, np.zeros_like(x)))
        if spec.routing.router_use_bias:
            bounds["router_bias", None] = _sum_of(d_logits.T, e_logits.T)
        parts.append((d_logits @ router, _product((d_logits, e_logits), router.T)))
    terms = np.stack([np.abs(value) for value, _ in parts], axis=-1)
    return LayerGradients(_sum_of(terms, np.stack([error for _, error in parts], axis=-1)), e_logits, e_share, bounds)


def _sum_of(terms: Floats, errors: Floats) -> Floats:
    """Error of a sum over the last axis."""
    out: Floats = sum_bound(terms.shape[-1], np.abs(terms).sum(axis=-1)) + errors.sum(axis=-1)
    return out


def _product(x: Known, weight: Floats) -> Floats:
    """Error of ``x @ weight.T``."""
    out: Floats = linear_bound(np.abs(x[0]) + x[1], weight) + x[1] @ np.abs(weight).T
    return out


def _outer(d: Known, x: Known) -> Floats:
    """Error of ``d.T @ x``, a sum over tokens."""
    size = np.abs(d[0]).T @ np.abs(x[0])
    out: Floats = sum_bound(len(d[0]), size) + (np.abs(d[0]) + d[1]).T @ (np.abs(x[0]) + x[1]) - size
    return out


class _Network:
    """Errors of one network's backward pass for its tokens `x`, whose outputs, times a factor, have gradient `d`."""

    def __init__(self, weights: PublishedWeights, layer: int, x: Known, d: Floats, expert: Expert) -> None:
        self.x, self.d, self.expert, self.activation = x, d, expert, weights.spec.activation
        self.clamped = weights.spec.clamped_experts if isinstance(expert, int) else None
        self.w_gate, self.w_up, self.w_down = (weights.layer(layer, name, expert) for name in ("w_gate", "w_up", "w_down"))
        self.gate, self.up = self.projected(self.w_gate), self.projected(self.w_up)
        self.u = d @ self.w_down, _product((d, np.zeros_like(d)), self.w_down.T)
        self.b_down = None
        if self.clamped is not None:
            b_gate, b_up, self.b_down = (weights.layer(layer, name, expert) for name in ("b_gate", "b_up", "b_down"))
            self.gate, self.up = self.added(self.gate, b_gate), self.added(self.up, b_up)
            alpha, limit = self.clamped.alpha, self.clamped.limit
            value = formulas.clamped_glu(self.gate[0], self.up[0], alpha, limit)
            self.h = value, clamped_glu_bound(self.gate[0], self.up[0], self.gate[1], self.up[1], alpha, limit)
        else:
            value = formulas.glu(self.gate[0], self.up[0], self.activation)
            self.h = value, glu_bound(self.gate[0], self.up[0], self.gate[1], self.up[1], self.activation)

    def projected(self, weight: Floats) -> Known:
        return formulas.linear(self.x[0], weight), _product(self.x, weight)

    @staticmethod
    def added(y: Known, bias: Floats) -> Known:
        return y[0] + bias, y[1] + U * (np.abs(y[0] + bias) + y[1])

    def factor(self) -> Known:
        """Gradient of the factors, (m,), and its error."""
        terms, errors = self.h[0] * self.u[0], product_error(self.h, self.u)
        if self.b_down is not None:
            terms = np.concatenate([terms, self.d * self.b_down], axis=1)
            errors = np.concatenate([errors, np.zeros_like(self.d)], axis=1)
        return terms.sum(axis=1), _sum_of(terms, errors)

    def input(self, factor: Known, bounds: dict[tuple[str, Expert], Floats]) -> Known:
        """Gradient of the input and its error; errors of the weights' gradients go to `bounds`."""
        d_out, dh = ((v[0] * factor[0], product_error(v, factor)) for v in ((self.d, np.zeros_like(self.d)), self.u))
        errors = glu_gradient_bound(
            self.gate[0], self.up[0], dh[0], self.gate[1], self.up[1], dh[1], self.activation, self.clamped
        )  # fmt: skip
        slopes = glu_slopes(self.gate[0], self.up[0], self.activation, self.clamped)
        d_gate, d_up = ((dh[0] * slope, error) for slope, error in zip(slopes, errors, strict=True))
        bounds["w_down", self.expert] = _outer(d_out, self.h)
        bounds["w_gate", self.expert], bounds["w_up", self.expert] = _outer(d_gate, self.x), _outer(d_up, self.x)
        if self.clamped is not None:
            for name, (value, error) in (("b_gate", d_gate), ("b_up", d_up), ("b_down", d_out)):
                bounds[name, self.expert] = _sum_of(value.T, error.T)
        d_both, e_both = (np.concatenate(both, axis=1) for both in zip(d_gate, d_up, strict=True))
        w_both = np.concatenate([self.w_gate, self.w_up])
        return d_both @ w_both, _product((d_both, e_both), w_both.T)


def _shared(
    weights: PublishedWeights, layer: int, x: Floats, d_out: Floats, bounds: dict[tuple[str, Expert], Floats]
) -> list[Known]:  # fmt: skip
    """What the shared experts add to the input's gradient."""
    shared, none = weights.spec.shared_experts, np.zeros_like(x)
    assert shared is not None
    net = _Network(weights, layer, (x, none), d_out, "shared")
    if not shared.gated:
        return [net.input((np.ones((len(x), 1)), np.zeros((len(x), 1))), bounds)]
    w_gate = weights.layer(layer, "shared_gate")
    logit, e_logit = formulas.linear(x, w_gate), _product((x, none), w_gate)
    s = expit(logit)
    slope, (d, e_d) = s * (1 - s), net.factor()
    d_gate = d[:, None] * slope, product_error((d[:, None], e_d[:, None]), (slope, slope * (np.expm1(e_logit) + 12 * U)))
    bounds["shared_gate", None] = _outer(d_gate, (x, none))
    return [net.input((s, slope * np.expm1(e_logit) + 5 * U * s), bounds), (d_gate[0] @ w_gate, _product(d_gate, w_gate.T))]

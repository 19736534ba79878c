"""What float32 may make of a mixture's gradients: bounds derived from `tolerance`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from wse_emu.equivalence.routing_bounds import chosen_score_error
from wse_emu.equivalence.tolerance import EXP_ERROR, SMALLEST_NORMAL, SUBNORMAL, U
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import routing
from wse_emu.reference.routing_gradients import logits_gradient
from wse_emu.reference.storage import rounded

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def logits_gradient_bound(logits: Floats, ids: Ints, rule: RoutingRule, d_weights: Floats, e_weights: Floats) -> Floats:
    """Bound of `routing_gradients.logits_gradient` of exact `logits` (T, E), where `d_weights` (T, k) are known to `e_weights`; (T, E).

    Sums and differences are taken of the absolute values of what they add: ``(|d| + sum of w |d|) / D`` for weights that are divided,
    ``p (|d| + sum of p |d|)`` for softmax. Each product and sum of them has the relative errors of its factors: of scores
    (`chosen_score_error`, twice, and in the divisor as its terms), of probabilities, and of its own roundings, of which there are as many
    as the sum has terms, and eight. The errors of `d_weights` go through the same expressions. Where the divisor lies as near its least
    value as its error, either side is right.
    """
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


def product_error(*factors: tuple[Floats, Floats]) -> Floats:
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

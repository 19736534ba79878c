"""What float32 may make of a routing rule's scores and weights: bounds derived from `tolerance`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence.tolerance import EXP_ERROR, SMALLEST_NORMAL, U
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import routing
from wse_emu.reference.storage import rounded

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Compared:
    """Scores for the choice in float64, and how far apart two of them may lie while float32 sees them equal or the other way round."""

    seen: routing.Scores
    error: Floats | None
    """(T, E) of each score; None where logits stand for probabilities: `probability_tolerance`."""
    bound: Floats
    """(T, E) of each logit."""
    group_error: Floats
    """(T, n_group)."""

    def allowed(self, token: int) -> Floats:
        """(E, E) largest excused distance of two experts' scores."""
        each = self.bound[token] if self.error is None else self.error[token]
        pairs: Floats = each[:, None] + each[None, :]
        return pairs + probability_tolerance(self.seen.experts[token]) if self.error is None else pairs


def compare(logits: Floats, bound: Floats, rule: RoutingRule, correction: Floats | None) -> Compared:
    """Scores of logits that are known to `bound`, both (T, E), with the errors of float32.

    Probabilities without a correction are compared as logits, which order experts alike and do not run out of digits.
    """
    size = logits.shape[1] // rule.n_group
    if (
        rule.router_selection_nonlinearity == "softmax" and correction is None and rule.selection_dtype == "float32"
        and (rule.n_group == 1 or rule.group_score == "max")
    ):  # fmt: skip
        gap = logits.max(axis=1, keepdims=True) - logits
        each = (EXP_ERROR + U * gap + U + bound).reshape(len(logits), -1, size).max(axis=2)
        return Compared(routing.Scores(logits, routing.group_scores(logits, rule)), None, bound, each)
    used, e_used = logits, bound
    if not rule.router_fp32:
        used, e_used = _through_rounding(logits, bound, rule.selection_dtype)
    kind = rule.router_selection_nonlinearity
    exact = routing.scores(used, kind)
    value, error = _through_rounding(exact, score_error(used, exact, kind, e_used), rule.selection_dtype)
    if correction is not None:
        value = value + correction
        error = error + U * np.abs(value)
    groups = routing.group_scores(value, rule)
    by_group = error.reshape(len(logits), -1, size).max(axis=2)
    by_group = 2 * by_group + U * np.abs(groups) if rule.group_score == "top2_sum" else by_group
    return Compared(routing.Scores(value, groups), error, bound, by_group)


def probability_tolerance(logits: Floats) -> Floats:
    """How far apart two logits may lie while their float32 probabilities are equal or in the other order: (E,) -> (E, E).

    Each probability is an exponential of a rounded difference, divided: ``2 u + u |l - max| + u`` of relative error. Where both are below
    the smallest normal number they may both be zero, and any distance is allowed.
    """
    gap = logits.max() - logits
    each = EXP_ERROR + U * gap + U
    lost = np.exp(-gap) <= len(logits) * SMALLEST_NORMAL  # the denominator is at most E
    return np.where(lost[:, None] & lost[None, :], np.inf, each[:, None] + each[None, :])


def together_scores(
    logits: Floats, together: NDArray[np.int64], rule: RoutingRule, correction: Floats | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores for the choice where tokens meet, from exact `logits` (T, E), and what float32 may make of them."""
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    kind = rule.router_selection_nonlinearity
    if kind == "sinkhorn":
        exact, error = _sinkhorn_scores(used, together, rule.sinkhorn_n_iters)
    else:
        exact = routing.scores(used, kind)
        error = score_error(used, exact, kind, np.zeros_like(used))
    value, error = _through_rounding(exact, error, rule.selection_dtype)
    if correction is not None:
        value = value + correction
        error = error + U * np.abs(value)
    return value.astype(np.float64), error.astype(np.float64)


def _sinkhorn_scores(logits: Floats, together: NDArray[np.int64], n_iters: int) -> tuple[Floats, Floats]:
    """Sinkhorn's scores and their error, (T, E)."""
    error = np.zeros_like(logits)
    for group in np.unique(together):
        error[together == group] = _sinkhorn_error(logits[together == group], n_iters)
    return routing.sinkhorn(logits, together, n_iters), error


def _sinkhorn_error(r: Floats, n_iters: int) -> Floats:
    """Error of sinkhorn's scores of tokens that meet: (t, E).

    A log-sum of terms known to e each is known to ``log(sum of p exp(e))``, p the terms' shares of the sum. Beside that: the exponentials
    of rounded differences and their sum, all relative to the sum and so absolute in its logarithm; the logarithm itself (1 ulp, 2 u of
    its size); the sum with the maximum; and the rounding of what is taken away.
    """
    error = np.zeros_like(r)
    for _ in range(n_iters):
        for axis in (1, 0):
            top = r.max(axis=axis, keepdims=True)
            p = np.exp(r - top)
            total = p.sum(axis=axis, keepdims=True)
            spread = np.log((p * np.exp(error)).sum(axis=axis, keepdims=True) / total)
            terms = (p * (EXP_ERROR + U * (top - r))).sum(axis=axis, keepdims=True) / total
            log_total = np.log(total)
            whole = top + log_total
            own = terms + 2 * np.sqrt(r.shape[axis]) * U + 2 * U * np.abs(log_total) + U * np.abs(whole)
            r = r - whole
            error = error + spread + own + U * np.abs(r)
    value = np.exp(r)
    out: Floats = value * (np.expm1(error) + EXP_ERROR) + SMALLEST_NORMAL
    return out


def _through_rounding(value: Floats, error: Floats, dtype: str) -> tuple[Floats, Floats]:
    """Values and errors after rounding to a format: none where both ends round alike, else the distance of what they round to."""
    if dtype == "float32":
        return value, error
    middle = rounded(value, dtype)
    high, low = rounded(value + error, dtype), rounded(value - error, dtype)
    return middle, np.maximum(high - middle, middle - low)


def score_error(logits: Floats, exact: Floats, kind: str, bound: Floats) -> Floats:
    """Absolute error of float32 scores `exact` of logits known to `bound`; all (T, E).

    softmax: `_softmax_relative`. sigmoid: 2.5 units in the last place, and the slope ``s (1 - s)``, which a step of d changes by at most
    ``exp(d)``. sqrtsoftplus: 2.5 units, halved by the root, and its rounding; the relative slope is at most 1/2. What underflows is lost.
    """
    error: Floats = bound
    if kind == "softmax":
        error = exact * _softmax_relative(logits, bound) + SMALLEST_NORMAL
    elif kind == "sigmoid":
        slope = np.minimum(exact * (1 - exact) * np.exp(np.minimum(bound, 80)), 0.25)
        error = 5 * U * exact + bound * slope + SMALLEST_NORMAL
    elif kind == "sqrtsoftplus":
        least = np.sqrt(SMALLEST_NORMAL)
        error = exact * (4 * U + np.expm1(bound / 2)) + least * (exact < 2 * least)
    return error


def _softmax_relative(logits: Floats, bound: Floats) -> Floats:
    """Relative errors of float32 probabilities, (..., E).

    One exponential: its own error and that of the subtraction, ``2 u + u |l - max|``. The denominator: the same, weighted by the terms,
    and the sum over E. A division.
    """
    gap = logits.max(axis=-1, keepdims=True) - logits
    e_term = EXP_ERROR + U * gap + np.expm1(bound)
    p = np.exp(-gap)
    mean = (p * e_term).sum(axis=-1, keepdims=True) / p.sum(axis=-1, keepdims=True)
    relative: Floats = e_term + mean + 2 * np.sqrt(logits.shape[-1]) * U + U
    return relative


def shares_error(logits: Floats, together: NDArray[np.int64], rule: RoutingRule) -> Floats:
    """What float32 may make of `routing.shares` of exact `logits`, (T, E); nothing where these are the logits."""
    if not rule.weighs_together:
        return np.zeros_like(logits)
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    exact, error = _sinkhorn_scores(used, together, rule.sinkhorn_n_iters)
    return _through_rounding(exact, error, rule.selection_dtype)[1] if rule.router_selection_nonlinearity == "sinkhorn" else error


def expert_weights_bound(logits: Floats, ids: NDArray[np.int64], rule: RoutingRule, shares_error: Floats | None = None) -> Floats:
    """Bound of the weights of the experts `ids` (T, k), from exact `logits`, or `routing.shares` and their error, (T, E).

    Nothing is allowed where the id is -1.

    The error of each chosen score; where they are divided by their sum also those of the sum, averaged, its k roundings and the division;
    where they are scaled, the scale's own rounding and the product's.
    """
    if (ids < 0).any():
        each = np.zeros(ids.shape)
        for n in range(1, ids.shape[1] + 1):
            mine = (ids >= 0).sum(axis=1) == n
            each[mine, :n] = expert_weights_bound(logits[mine], ids[mine, :n], rule, None if shares_error is None else shares_error[mine])
        return each
    raw = routing.raw_weights(logits, ids, rule)
    if rule.weighs_together:
        assert shares_error is not None
        error: Floats = np.take_along_axis(shares_error, ids, axis=1)
    else:
        error = chosen_score_error(logits, ids, raw, rule)
    bound = error
    if rule.expert_weighting_normalization:
        total = routing.divisor(raw, rule)
        added = 2 * U * total if rule.null_expert_bias or rule.norm_epsilon else 0.0
        e_total = error.sum(axis=1, keepdims=True) + 2 * np.sqrt(ids.shape[1]) * U * raw.sum(axis=1, keepdims=True) + added
        bound = error / total + raw / total * (e_total / total + U)
    scale = rule.routed_scaling_factor
    if scale != 1:
        bound = bound * scale + 2 * U * routing.weights(logits, ids, rule)
    out: Floats = bound + SMALLEST_NORMAL
    return out


def chosen_score_error(logits: Floats, ids: NDArray[np.int64], raw: Floats, rule: RoutingRule) -> Floats:
    """Error of the chosen scores before they are divided, (T, k)."""
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    kind = rule.expert_weighting_nonlinearity
    if kind == "softmax_topk":
        chosen = np.take_along_axis(used, ids, axis=1)
        return raw * _softmax_relative(chosen, np.zeros_like(chosen)) + SMALLEST_NORMAL
    if kind == "sparsemixer":
        return _sparsemixer_error(used, ids, raw, rule)
    exact = routing.scores(used, kind)
    error = score_error(used, exact, kind, np.zeros_like(used))
    if kind == rule.router_selection_nonlinearity:
        error = _through_rounding(exact, error, rule.selection_dtype)[1]
    return np.take_along_axis(error, ids, axis=1)


def _sparsemixer_error(logits: Floats, ids: NDArray[np.int64], raw: Floats, rule: RoutingRule) -> Floats:
    """Error of ``1 / sum``: that of the terms, of the sum and the division, and terms so near the band's edge that either side is right."""
    terms, ratio = routing.sparsemixer_terms(logits, ids)
    edge = 2 * rule.router_jitter_noise
    inside = np.where(ratio > edge, 0, terms)
    gap = np.take_along_axis(logits, ids, axis=1)[:, :, None] - logits[:, None, :]
    lost = (inside * (EXP_ERROR + U * np.abs(gap))).sum(axis=2) + np.where(np.abs(ratio - edge) <= 4 * U * edge, terms, 0).sum(axis=2)
    relative = lost * raw + (2 * np.sqrt(logits.shape[1]) + 1) * U  # raw is 1 / sum
    out: Floats = raw * relative / np.maximum(1 - relative, 0.5)
    return out

"""The one tolerance rule, and the bounds of single stages derived from it.

A float32 sum of ``n`` terms may differ from the exact one by ``2 sqrt(n) u sum|terms|`` with ``u = 2**-24``. Rounding errors of real data
behave like a random walk (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019),
so ``sqrt(n)`` replaces the proven ``n``; the factor 2 is their ``lambda``. For data that an adversary may choose, such as Hypothesis',
`proven_sum_bound` holds without exception. Every function below adds to this only what its formula adds: one ``u`` for one rounding.

All bounds are for one stage applied to the inputs that the run itself had, so no error of an earlier stage enters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

U = 2.0**-24
"""Unit roundoff of float32."""

EXP_ERROR = 2 * U
"""Relative error of one exponential: it is good to one unit in the last place."""

SUBNORMAL = 2.0**-149
"""Smallest positive float32: an operation whose result underflows may lose this much."""

SMALLEST_NORMAL = 2.0**-126
"""Smallest normal float32: an exponential below it may be given as zero."""

F64 = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]


def sum_bound(n: int | NDArray[np.integer[Any]], magnitude: Floats) -> F64:
    """Apply the rule, ``2 sqrt(n) u magnitude``, to a sum of `n` terms whose absolute values sum to `magnitude`."""
    bound: F64 = 2 * np.sqrt(n) * U * np.asarray(magnitude, np.float64) + n * SUBNORMAL
    return bound


def proven_sum_bound(n: int, magnitude: Floats) -> F64:
    """``n u / (1 - n u) * magnitude``: no float32 sum of `n` products, in whatever order, differs by more.

    References
    ----------
    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.1.
    """
    bound: F64 = n * U / (1 - n * U) * np.asarray(magnitude, np.float64) + n * SUBNORMAL
    return bound


def magnitude_product(x: Floats, weight: Floats) -> Floats:
    """``|x| @ |weight|.T``: the absolute values of the terms of `linear`, summed; x (T, in), weight (out, in) -> (T, out).

    Taken in float32, since a bound needs no more than two digits, and again in float64 where that overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out: Floats = np.abs(x).astype(np.float32) @ np.abs(weight).astype(np.float32).T
    if not np.isfinite(out).all():
        out = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    return out


def linear_bound(x: Floats, weight: Floats) -> F64:
    """Bound of ``x @ weight.T``; x (T, in), weight (out, in) -> (T, out)."""
    return sum_bound(x.shape[-1], magnitude_product(x, weight))


def rms_norm_bound(y: F64) -> F64:
    """Bound of an RMSNorm whose exact result is `y` (T, n).

    The sum of squares has relative error ``2 sqrt(n) u`` (all terms are positive), and ``u`` more each from the division by n, from eps as
    a float32 and from its addition; the root halves all that: ``(sqrt(n) + 1.5) u``. Then root, reciprocal and two products: ``4 u``.
    """
    bound: F64 = (np.sqrt(y.shape[-1]) + 5.5) * U * np.abs(y) + SUBNORMAL
    return bound


def rotary_bound(x: F64, angles: F64, factor: float = 1.0) -> F64:
    """Bound of `rotate`; x (T, heads, d), angles (T, d/2) -> (T, heads, d).

    Each of the two terms meets three roundings: of the cosine or sine (times `factor`, which only scales), of the product, of the sum. An
    angle is a float64 product of a power, known to about eight units of ``2**-53``; a stretched frequency takes as many again. That shifts
    cosine and sine by as much as it shifts the angle.
    """
    a, b = np.split(np.abs(x), 2, axis=-1)
    cos, sin = np.abs(np.cos(angles))[:, None, :], np.abs(np.sin(angles))[:, None, :]
    shift = 16 * 2.0**-53 * (1 + np.abs(angles))[:, None, :] * (a + b)
    return factor * np.concatenate([3 * U * (a * cos + b * sin) + shift, 3 * U * (b * cos + a * sin) + shift], axis=-1) + SUBNORMAL


def score_bound(q: F64, k: F64) -> F64:
    """Bound of the scaled scores ``q @ k.T / sqrt(d)``; q (T, d), k (S, d) -> (T, S).

    The sum over d, then two roundings: of the factor ``1/sqrt(d)`` and of the product with it.
    """
    d = q.shape[-1]
    bound: F64 = ((2 * np.sqrt(d) + 2) * U * (np.abs(q) @ np.abs(k).T) + d * SUBNORMAL) / np.sqrt(d)
    return bound


def maximum_bound(scores: F64, e_scores: F64) -> F64:
    """Bound of the row maximum of `scores` that are each known to `e_scores`; both (T, S), masked entries -inf -> (T,).

    The maximum itself rounds nothing; it lies between the maxima of the lower and of the upper ends.
    """
    m = scores.max(axis=1)
    bound: F64 = np.maximum((scores + e_scores).max(axis=1) - m, m - (scores - e_scores).max(axis=1))
    return bound


def softmax_term_error(scores: F64, maximum: F64, e_scores: F64) -> F64:
    """Relative error of ``exp(score - maximum)``, the maximum being exact; scores (T, S), maximum (T,) -> (T, S).

    Score error and the rounding of the subtraction enter through the exponential, hence expm1; masked entries give 0.
    """
    gap = np.abs(scores - maximum[:, None])
    return np.where(np.isneginf(scores), 0.0, np.expm1(e_scores + U * gap + EXP_ERROR))


def _term_loss(p: F64, e_p: F64) -> F64:
    """Absolute error of exponentials `p` with relative errors `e_p`: at most ``max(p, 1)``, for those of a run lie in 0..1.

    So also where scores are so large that nothing is known of a term: `e_p` is infinite then, and ``0 * inf`` no number.
    """
    loss: F64 = np.fmin(p * e_p, np.maximum(p, 1))
    return loss


def denominator_bound(p: F64, e_p: F64, n_visible: NDArray[np.integer[Any]]) -> F64:
    """Bound of ``sum_j p_j``; p, e_p (T, S) with relative errors e_p, n_visible (T,) -> (T,).

    The terms' own errors, the *proven* bound of a sum of n terms, and what exponentials below the smallest normal number may lose. The
    terms are positive and, where attention is spread evenly, nearly equal: their roundings then all fall to one side, and the rule for
    random terms does not hold.
    """
    proven = n_visible * U / (1 - n_visible * U) * p.sum(axis=1)
    bound: F64 = _term_loss(p, e_p).sum(axis=1) + proven + n_visible * (SMALLEST_NORMAL + SUBNORMAL)
    return bound


def context_bound(p: F64, e_p: F64, v: F64, denominator: F64, n_visible: NDArray[np.integer[Any]]) -> F64:
    """Bound of ``sum_j p_j v_j / denominator``; p, e_p (T, S), v (S, d), denominator, n_visible (T,) -> (T, d).

    As for the denominator with ``|v|`` as factor, and two roundings: of the division, and of each term where it is divided first.
    """
    size = p @ np.abs(v)
    lost = (n_visible * SMALLEST_NORMAL)[:, None] * np.abs(v).max(axis=0)
    total = _term_loss(p, e_p) @ np.abs(v) + sum_bound(n_visible[:, None], size) + lost + 2 * U * size
    bound: F64 = total / np.abs(denominator)[:, None] + SUBNORMAL
    return bound


def add_bound(total: F64) -> F64:
    """Bound of one addition of two float32 numbers whose exact sum is `total`: one rounding (and float64's own)."""
    bound: F64 = (U + 2.0**-52) * np.abs(total)
    return bound


def swiglu_bound(gate: F64, up: F64, e_gate: F64, e_up: F64) -> F64:
    """Bound of ``silu(gate) * up`` where gate and up are known to `e_gate` and `e_up`; all of one shape.

    silu has slope ``s (1 + g (1 - s))`` with ``s = sigmoid(g)`` and a second derivative of at most 1/2, so its argument's error enters as
    ``|slope| e + e^2 / 4``. Computing it costs an exponential (2 u), a sum, a division and a product: ``5 u``; where the exponential
    underflows, all of silu, at most 128 smallest normals. The product with up adds ``u`` and carries both factors' errors.
    """
    s = expit(gate)
    silu = gate * s
    e_silu = np.abs(s * (1 + gate * (1 - s))) * e_gate + e_gate * e_gate / 4 + 5 * U * np.abs(silu) + 128 * SMALLEST_NORMAL
    bound: F64 = np.abs(up) * e_silu + np.abs(silu) * e_up + e_silu * e_up + U * np.abs(silu * up) + SUBNORMAL
    return bound


def combine_bound(weights: F64, outs: F64) -> F64:
    """Bound of ``sum_slot weights * outs``; weights (T, k), outs (T, k, h) -> (T, h)."""
    return sum_bound(weights.shape[1], np.einsum("tk,tkh->th", np.abs(weights), np.abs(outs)))

"""The one tolerance rule, and the bounds of single stages derived from it.

A float32 sum of ``n`` terms may differ from the exact one by ``2 sqrt(n) u sum|terms|`` with ``u = 2**-24``. Rounding errors of real data
behave like a random walk (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019),
so ``sqrt(n)`` replaces the proven ``n``; the factor 2 is their ``lambda``. For data that an adversary may choose, such as Hypothesis',
`proven_sum_bound` holds without exception. Every function below adds to this only what its formula adds: one ``u`` for one rounding.

What a stage stores in a format of 16 bits is rounded once more where SRAM is written: `stored_bound`.

All bounds are for one stage applied to the inputs that the run itself had, so no error of an earlier stage enters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from wse_emu.foundation.precision import DType
from wse_emu.reference.storage import smallest, unit_roundoff

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


def rms_norm_bound(y: F64, *, unit_offset: bool = False) -> F64:
    """Bound of an RMSNorm whose exact result is `y` (T, n).

    Where the weight is ``1 + w``, that sum is rounded once more.

    The sum of squares has relative error ``2 sqrt(n) u`` (all terms are positive), and ``u`` more each from the division by n, from eps as
    a float32 and from its addition; the root halves all that: ``(sqrt(n) + 1.5) u``. Then root, reciprocal and two products: ``4 u``.
    """
    bound: F64 = (np.sqrt(y.shape[-1]) + 5.5 + unit_offset) * U * np.abs(y) + SUBNORMAL
    return bound


def layer_norm_bound(x: F64, weight: F64, eps: float, bias: F64 | None = None) -> F64:
    """Bound of a LayerNorm of `x` (T, n) with weight and bias (n,).

    The mean is a sum and a division: known to ``e = 2 sqrt(n) u mean|x| + u |mean|``. That enters every difference as it is, and the
    variance as ``e^2`` only, for deviations from the true mean sum to nothing. Differences are rounded (``u``, so ``2 u`` of a square),
    their squares' sum has relative error ``2 sqrt(n) u``, division, eps as a float32 and its addition ``u`` each; the root halves all
    that: ``(sqrt(n) + 2.5) u``. Then root, reciprocal, the difference itself and two products: ``5 u``. A bias is one more rounding.
    """
    n = x.shape[-1]
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps
    e_mean = sum_bound(n, np.abs(x).sum(axis=-1, keepdims=True)) / n + U * np.abs(mean)
    scale, y = np.abs(weight) / np.sqrt(variance), (x - mean) / np.sqrt(variance) * weight
    relative = (np.sqrt(n) + 7.5) * U + 0.5 * e_mean**2 / variance
    bound: F64 = relative * np.abs(y) + (1 + relative) * e_mean * scale + SUBNORMAL
    return bound if bias is None else bound + add_bound(np.abs(y + bias) + bound)


def rotary_bound(x: F64, angles: F64, factor: float | F64 = 1.0, *, interleaved: bool = False) -> F64:
    """Bound of `rotate`; x (T, heads, d), angles (T, r/2), factor a number or (T, 1) -> (T, heads, d).

    Elements that are not rotated must stay as they are.

    Each of the two terms meets three roundings: of the cosine or sine (times `factor`, which only scales), of the product, of the sum. An
    angle is a float64 product of a power, known to about eight units of ``2**-53``; a stretched frequency takes as many again. That shifts
    cosine and sine by as much as it shifts the angle.
    """
    r = 2 * angles.shape[1]
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    a, b = np.abs(x[..., first]), np.abs(x[..., second])
    cos, sin = np.abs(np.cos(angles))[:, None, :], np.abs(np.sin(angles))[:, None, :]
    shift = 16 * 2.0**-53 * (1 + np.abs(angles))[:, None, :] * (a + b)
    bound, factor = np.zeros(x.shape), np.asarray(factor)[..., None]
    bound[..., first] = factor * (3 * U * (a * cos + b * sin) + shift) + SUBNORMAL
    bound[..., second] = factor * (3 * U * (b * cos + a * sin) + shift) + SUBNORMAL
    return bound


def tuned_bound(y: F64, factor: F64) -> F64:
    """Bound of queries ``y = x * factor`` that grow with their position; y (T, heads, d), factor (T, 1, 1).

    The factor is a float64 expression rounded once, and so is the product.
    """
    bound: F64 = 2 * U * (1 + U) * np.abs(y) + SUBNORMAL * (1 + factor)
    return bound


def score_bound(q: F64, k: F64, scale: float) -> F64:
    """Bound of the scaled scores ``scale * q @ k.T``; q (T, d), k (S, d) -> (T, S).

    The sum over d, then two roundings: of the factor and of the product with it.
    """
    d = q.shape[-1]
    bound: F64 = ((2 * np.sqrt(d) + 2) * U * (np.abs(q) @ np.abs(k).T) + d * SUBNORMAL) * scale
    return bound


def index_bound(size: F64, error: F64, n_heads: int) -> F64:
    """Bound of an indexer's scores ``sum_h w[h] * relu(s[h])``; all (T, S).

    Parameters
    ----------
    size : ndarray, float64
        ``sum_h |w[h]| relu(s[h])``.
    error : ndarray, float64
        ``sum_h |w[h]| e[h]``, `e` being the bound of the product s: relu moves no value farther than its argument is off.
    n_heads : int
        Terms of the sum. Each weight is a product with a constant, both rounded.
    """
    bound: F64 = error * (1 + 2 * U) + sum_bound(n_heads, size) + 2 * U * size
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


def stored_bound(value: F64, bound: F64, dtype: DType) -> F64:
    """Bound of `value`, computed to `bound`, once it is rounded to a format: one rounding of what was computed.

    That is half a step: the unit roundoff of its size or, where it is below the smallest normal number, half the smallest one.
    """
    if dtype == "float32":
        return bound
    rounded: F64 = bound + unit_roundoff(dtype) * (np.abs(value) + bound) + smallest(dtype) / 2
    return rounded


def scaled_add_bound(total: F64, added: F64) -> F64:
    """Bound of ``x + factor * y`` with exact sum `total` and exact product `added`.

    The factor and the product are rounded (``2 u``), then the sum.
    """
    loss = 2 * U * (1 + U) * np.abs(added) + SUBNORMAL
    return loss + add_bound(np.abs(total) + loss)


def capped_bound(x: F64, e_x: F64, cap: float) -> F64:
    """Bound of ``cap * tanh(x / cap)`` where x is known to `e_x`; the cap is a float32 number.

    tanh has slope at most 1, so x's error enters as it is. The division is one rounding, tanh 2.5 ulp (at most ``5 u``), the product one.
    """
    y = cap * np.tanh(x / cap)
    bound: F64 = e_x + U * np.abs(x) + 6 * U * np.abs(y) + SUBNORMAL
    return bound


def glu_bound(gate: F64, up: F64, e_gate: F64, e_up: F64, activation: str) -> F64:
    """Bound of ``activation(gate) * up`` where gate and up are known to `e_gate` and `e_up`; all of one shape.

    silu has slope ``s (1 + g (1 - s))`` with ``s = sigmoid(g)`` and a second derivative of at most 1/2, so its argument's error enters as
    ``|slope| e + e^2 / 4``. Computing it costs an exponential (2 u), a sum, a division and a product: ``5 u``; where the exponential
    underflows, all of silu, at most 128 smallest normals. gelu in its tanh form is ``g sigmoid(z)`` with a slope of
    ``s + g s (1 - s) z'`` and a second derivative of at most 1, hence ``e^2 / 2``; the five roundings of z enter as ``5 |z| (1 - s)`` of
    its value. The product with up adds ``u`` and carries both factors' errors.
    """
    if activation == "silu":
        s = expit(gate)
        value = gate * s
        slope, bend, roundings = s * (1 + gate * (1 - s)), 0.25, np.float64(5)
    else:
        c = 2 * np.sqrt(2 / np.pi)
        z = c * (gate + 0.044715 * gate**3)
        s = expit(z)
        value = gate * s
        slope, bend, roundings = s + value * (1 - s) * c * (1 + 3 * 0.044715 * gate**2), 0.5, 6 + 5 * np.abs(z) * (1 - s)
    e_value = np.abs(slope) * e_gate + bend * e_gate * e_gate + roundings * U * np.abs(value) + 128 * SMALLEST_NORMAL
    bound: F64 = np.abs(up) * e_value + np.abs(value) * e_up + e_value * e_up + U * np.abs(value * up) + SUBNORMAL
    return bound


def clamped_glu_bound(gate: F64, up: F64, e_gate: F64, e_up: F64, alpha: float, limit: float) -> F64:
    """Bound of ``(clip(up) + 1) * g * sigmoid(alpha g)``, ``g = min(gate, limit)``, where gate and up are known to `e_gate` and `e_up`.

    Limits magnify no error. ``g sigmoid(z)``, ``z = alpha g``, has slope ``s (1 + z (1 - s))`` and a second derivative of at most
    ``alpha / 2``. Computing it rounds alpha and z (which enter as ``2 |z| (1 - s)`` of its value), the sigmoid (``5 u``) and the product;
    where the exponential underflows, at most ``2 |g|`` smallest normals are lost. The sum ``up + 1`` is rounded, and the last product.
    """
    g, one_up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
    z = alpha * g
    s = expit(z)
    value = g * s
    e_value = np.abs(s * (1 + z * (1 - s))) * e_gate + 0.25 * alpha * e_gate * e_gate
    e_value = e_value + (6 + 2 * np.abs(z) * (1 - s)) * U * np.abs(value) + 2 * SMALLEST_NORMAL * (1 + np.abs(g))
    e_one_up = e_up + U * np.abs(one_up)
    bound: F64 = np.abs(one_up) * e_value + np.abs(value) * e_one_up + e_value * e_one_up + U * np.abs(value * one_up) + SUBNORMAL
    return bound


def combine_bound(weights: F64, outs: F64, first: F64 | None = None, gate: F64 | None = None) -> F64:
    """Bound of ``sum_slot weights * outs``; weights (T, k), outs (T, k, h) -> (T, h).

    A `first` term (T, h), the shared experts', is one more in the sum; times ``sigmoid(gate)``, (T, 1), it is known to 2.5 ulp of the
    factor (``5 u``), the rounding of the product and, where the exponential underflows, to a smallest normal.
    """
    size = np.einsum("tk,tkh->th", np.abs(weights), np.abs(outs))
    if first is None:
        return sum_bound(weights.shape[1], size)
    term = np.abs(first)
    loss = np.zeros_like(term)
    if gate is not None:
        loss = 6 * U * term * expit(gate) + 2 * SMALLEST_NORMAL * (1 + term)
        term = term * expit(gate)
    return sum_bound(weights.shape[1] + 1, size + term + loss) + loss

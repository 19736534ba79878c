"""The formulas of the transformer, written once, plainly; each works in the dtype of the arrays it is given.

Weights are in published order, ``[out, in]``. ``T`` is the number of tokens, flattened and unpadded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.special import expit

from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.memory_tokens import MemoryTokens
from wse_emu.foundation.query_temperature import QueryTemperature

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def linear(x: Floats, weight: Floats) -> Floats:
    """``x @ weight.T``: x (T, in), weight (out, in) -> (T, out)."""
    out: Floats = x @ weight.T
    return out


def per_head(x: Floats, weight: Floats) -> Floats:
    """``x[:, head] @ weight[head].T``: x (T, heads, in), weight (heads, out, in) -> (T, heads, out)."""
    out: Floats = np.ascontiguousarray((x.transpose(1, 0, 2) @ weight.transpose(0, 2, 1)).transpose(1, 0, 2))
    return out


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; x (T, n), weight (n,)."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    out: Floats = x * (1 / np.sqrt(mean + x.dtype.type(eps))) * weight
    return out


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, eps: float) -> Floats:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis; x (T, n), weight and bias (n,)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    out: Floats = centred / np.sqrt(variance + x.dtype.type(eps)) * weight
    return out if bias is None else out + bias


def rotate(x: Floats, angles: NDArray[np.float64], factor: float | NDArray[np.float64] = 1.0, *, interleaved: bool = False) -> Floats:
    """Rotary embedding of the first elements of every head: x (T, heads, d), angles (T, r/2) -> (T, heads, d).

    The first r elements turn, in pairs ``(u, u + r/2)`` or, `interleaved`, ``(2 u, 2 u + 1)``; the others stay. Cosine and sine, times
    `factor`, a number or (T, 1), are taken in float64 and rounded to the dtype of `x`.

    References
    ----------
    Su et al., "RoFormer", 2021, section 3.2, in the half-split pairing of the released Llama weights.
    """
    cos = (factor * np.cos(angles)).astype(x.dtype)[:, None, :]
    sin = (factor * np.sin(angles)).astype(x.dtype)[:, None, :]
    r = 2 * angles.shape[1]
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def are_memory(memory: MemoryTokens, pos: Ints) -> NDArray[np.bool_]:
    """Whether tokens at these positions, (T,), are memory tokens: a chunk of others, then they, over and over."""
    n, found = int(pos.max()) + 1, list[bool]()
    while len(found) < n:
        found += [False] * min(memory.attn_memory_chunk_size, n - len(found))
        found += [True] * min(memory.num_memory_tokens_per_chunk, n - len(found))
    return np.array(found, np.bool_)[pos]


def temperature(tuned: QueryTemperature, pos: Ints) -> NDArray[np.float64]:
    """Factor of the queries at positions `pos` (T,): ``log1p(floor((pos + 1) / floor_scale)) * attn_scale + 1``, float64."""
    out: NDArray[np.float64] = np.log1p(np.floor((pos + 1.0) / tuned.floor_scale)) * tuned.attn_scale + 1.0
    return out


def visible(seq: Ints, pos: Ints, pattern: AttentionPattern = FULL) -> NDArray[np.bool_]:
    """Mask of one pattern, (T, T) bool: entry (i, j) says whether token i sees token j, of its own sequence and at no later position.

    Of the pattern only its numbers are used, each part as a formula on query and key positions (ModelZoo's masks). Where heads have
    patterns of their own, (heads, T, T).
    """
    if pattern.heads:
        return np.stack([visible(seq, pos, of_head) for of_head in pattern.heads])
    q, k = pos[:, None], pos[None, :]
    causal: NDArray[np.bool_] = (seq[:, None] == seq[None, :]) & (k <= q)
    if pattern.mask_function is not None:
        return causal & pattern.mask_function(q, k)
    if pattern.block_size is not None:
        size = pattern.block_size
        allowed = np.zeros((len(pattern.blocks), len(pattern.blocks)), np.bool_)
        for i, listed in enumerate(pattern.blocks):
            allowed[i, list(listed)] = True
        return causal & allowed[q // size, np.minimum(k // size, len(allowed) - 1)]
    seen = np.ones_like(causal)
    if pattern.window is not None:
        seen = q - k < pattern.window
    if pattern.chunk is not None:
        seen = q // pattern.chunk == k // pattern.chunk
    seen = seen | (k < pattern.sinks)
    if pattern.column_spacing is not None and pattern.column_width is not None:
        # Columns begin at spacing - 1, 2 spacing - 1, ..., if they are not said to begin elsewhere.
        first = pattern.column_spacing - 1 if pattern.column_start is None else pattern.column_start
        seen = seen | ((k >= first) & ((k - first) % pattern.column_spacing < pattern.column_width))
    return causal & seen


def attention(
    q: Floats, k: Floats, v: Floats, mask: NDArray[np.bool_], scale: float, cap: float | None = None, sinks: Floats | None = None,
    nearest: Callable[[Floats], Floats] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Softmax attention of every query over every key, with a full matrix of scores.

    Parameters
    ----------
    q : ndarray, (T, heads, d)
    k, v : ndarray, (T, kv_heads, d), (T, kv_heads, dv)
        Head ``i`` of `q` reads key/value head ``i // (heads / kv_heads)``.
    mask : ndarray, (T, T) or (heads, T, T), bool
        True where query i sees key j.
    scale : float
        Factor of the scores.
    cap : float, optional
        Scaled scores ``x`` become ``cap * tanh(x / cap)``.
    sinks : ndarray, (heads,), optional
        A score of each head that no key has and every query sees.
    nearest : callable, optional
        Rounds maximum and exponentials, and denominator and output after every key.

    Returns
    -------
    maximum, denominator : ndarray, (T, heads)
        ``max_j s`` and ``sum_j exp(s - max)`` of ``s = scale * q.k``, capped, the sink among them.
    context : ndarray, (T, heads, dv)
    """
    heads = q.shape[1]
    group = heads // k.shape[1]
    maximum = np.empty(q.shape[:2], q.dtype)
    denominator = np.empty(q.shape[:2], q.dtype)
    context = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
    for head in range(heads):  # one (T, T) matrix at a time
        scores = capped(q[:, head] @ k[:, head // group].T * q.dtype.type(scale), cap)
        scores = np.where(mask[head] if mask.ndim == 3 else mask, scores, q.dtype.type(-np.inf))
        maximum[:, head] = scores.max(axis=1, initial=-np.inf if sinks is None else sinks[head])
        if nearest is not None:
            sink = None if sinks is None else sinks[head]
            of_head = _key_by_key(scores, v[:, head // group], nearest(maximum[:, head]), sink, nearest)
            maximum[:, head], denominator[:, head], context[:, head] = of_head
            continue
        p = np.exp(scores - maximum[:, head, None])
        terms = p if sinks is None else np.concatenate([np.exp(sinks[head] - maximum[:, head, None]), p], axis=1)
        denominator[:, head] = np.add.accumulate(terms, axis=1)[:, -1]  # key by key: `sum` would go by pairs, with an error of another law
        context[:, head] = p @ v[:, head // group] / denominator[:, head, None]
    return maximum, denominator, context


def _key_by_key(
    scores: Floats, v: Floats, m: Floats, sink: Floats | None, nearest: Callable[[Floats], Floats]
) -> tuple[Floats, Floats, Floats]:
    """`attention` of one head whose state is rounded after every key; scores (T, S), -inf where none is seen, v (S, dv), m (T,)."""
    p = nearest(np.exp(scores - m[:, None]))
    denominator = np.zeros_like(m) if sink is None else nearest(np.exp(sink - m))
    total = np.zeros((len(m), v.shape[1]), m.dtype)
    for key in range(scores.shape[1]):
        denominator = nearest(denominator + p[:, key])
        total = nearest(total + p[:, key, None] * v[key])
    return m, denominator, total / denominator[:, None]


def activate(x: Floats, kind: str) -> Floats:
    """Activation of a feed-forward network, elementwise: "silu" or "gelu_tanh".

    References
    ----------
    Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.
    """
    if kind == "silu":
        silu: Floats = x * expit(x)
        return silu
    assert kind == "gelu_tanh", kind
    t = x.dtype.type
    inner = t(np.sqrt(2 / np.pi)) * (x + t(0.044715) * x * x * x)
    gelu: Floats = x * expit(2 * inner)  # (1 + tanh(y)) / 2, without its cancellation
    return gelu


def glu(gate: Floats, up: Floats, activation: str) -> Floats:
    """``activation(gate) * up``, elementwise.

    References
    ----------
    Shazeer, "GLU variants improve Transformer", 2020, section 2.
    """
    out: Floats = activate(gate, activation) * up
    return out


def clamped_glu(gate: Floats, up: Floats, alpha: float, limit: float) -> Floats:
    """``(clip(up) + 1) * g * sigmoid(alpha * g)`` with ``g = min(gate, limit)``, elementwise.

    References
    ----------
    OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2025, section 2.2.
    """
    t = gate.dtype.type
    g = np.minimum(gate, t(limit))
    out: Floats = (np.clip(up, t(-limit), t(limit)) + t(1)) * (g * expit(t(alpha) * g))
    return out


def capped(x: Floats, cap: float | None) -> Floats:
    """``cap * tanh(x / cap)``, elementwise; `x` itself without a cap."""
    if cap is None:
        return x
    c = x.dtype.type(cap)
    out: Floats = c * np.tanh(x / c)
    return out


def cast(x: NDArray[Any], dtype: DTypeLike) -> Floats:
    """`x` in `dtype`, copied only if it is in another one."""
    out: Floats = x.astype(dtype, copy=False)
    return out

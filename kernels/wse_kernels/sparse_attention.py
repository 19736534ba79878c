"""Attention over listed keys, in FlashMLA's calling form: each query names the keys that it sees.

All query heads of a token share one key/value row; its first elements are the value (latent attention), or all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.errors import ShapeError, check_arrays
from wse_kernels.exp import exp32
from wse_kernels.fma import fma
from wse_kernels.log import log32
from wse_kernels.threads import Driver

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_ZERO = np.float32(0.0)
_INF = np.float32(np.inf)


@kernel()
def attend_listed(
    q: F32, kv: F32, indices: I32, topk_length: I32, attn_sink: F32, sm_scale: np.float32, work: F32, out: F32, max_logits: F32, lse: F32
) -> None:
    """Softmax of the scaled scores over the keys that each token lists, times their values.

    A score is a chain of fma over ascending elements from +0, then scaled. The maximum is exact; the denominator, and with fma the output,
    run over the list in its order from +0. A key that is listed twice counts twice. What is not listed, or masked, is skipped.

    Parameters
    ----------
    q : ndarray, (t, n_heads * d), float32
        Head by head.
    kv : ndarray, (n_keys, d), float32
        A row is a key, and its first elements the value.
    indices : ndarray, (t, topk), int32
        Rows of `kv`; one below 0 or beyond the last is masked.
    topk_length : ndarray, (t,) or (0,), int32
        So many entries of a token's list count; all of them where this is empty.
    attn_sink : ndarray, (n_heads,) or (0,), float32
        A score that no key has, for the denominator of the output alone; -inf has no effect, +inf makes the output 0.
    sm_scale : float32
    work : ndarray, (d + d_v + topk, n_heads), float32
        Scratch.
    out : ndarray, (t, n_heads * d_v), float32
        Written; 0 where a token sees no key.
    max_logits, lse : ndarray, (t, n_heads), float32
        Written: maximum of the scaled scores, and logarithm of the sum of their exponentials; -inf and +inf where a token sees no key.
    """
    d, n_heads, topk = kv.shape[1], max_logits.shape[1], indices.shape[1]
    d_v = out.shape[1] // n_heads
    queries, outputs, scores = work[:d], work[d : d + d_v], work[d + d_v :]
    for i in range(q.shape[0]):
        m, total = max_logits[i], lse[i]
        for h in range(n_heads):
            m[h] = -_INF
            total[h] = _ZERO
            for f in range(d):
                queries[f, h] = q[i, h * d + f]
            for f in range(d_v):
                outputs[f, h] = _ZERO
        n = min(max(topk_length[i], 0), topk) if topk_length.shape[0] > 0 else topk
        n_seen = 0
        for j in range(n):
            key = indices[i, j]
            if key < 0 or key >= kv.shape[0]:
                continue
            n_seen += 1
            row = scores[j]
            for h in range(n_heads):
                row[h] = _ZERO
            for f in range(d):
                x = kv[key, f]
                for h in range(n_heads):
                    row[h] = fma(x, queries[f, h], row[h])
            for h in range(n_heads):
                row[h] = row[h] * sm_scale
                m[h] = row[h] if row[h] > m[h] or row[h] != row[h] else m[h]
        for h in range(n_heads):
            m[h] = m[h] + _ZERO
        for j in range(n):
            key = indices[i, j]
            if key < 0 or key >= kv.shape[0]:
                continue
            row = scores[j]
            for h in range(n_heads):
                row[h] = exp32(row[h] - m[h])
                total[h] = total[h] + row[h]
            for f in range(d_v):
                x = kv[key, f]
                for h in range(n_heads):
                    outputs[f, h] = fma(row[h], x, outputs[f, h])
        for h in range(n_heads):
            divisor = total[h]
            if attn_sink.shape[0] > 0:
                divisor = divisor + exp32(attn_sink[h] - m[h])
            for f in range(d_v):
                out[i, h * d_v + f] = outputs[f, h] / divisor if n_seen > 0 else _ZERO
            lse[i, h] = m[h] + log32(total[h]) if n_seen > 0 else _INF


@kernel(driver=True)
def _attend_all(
    part: int, n_parts: int, q: F32, kv: F32, indices: I32, topk_length: I32, attn_sink: F32, sm_scale: np.float32, out: F32,
    max_logits: F32, lse: F32,
) -> None:  # fmt: skip
    """One part of all tokens."""
    n, n_heads = q.shape[0], max_logits.shape[1]
    first, last = n * part // n_parts, n * (part + 1) // n_parts
    work = np.empty((kv.shape[1] + out.shape[1] // n_heads + indices.shape[1], n_heads), np.float32)
    lengths = topk_length[first:last] if topk_length.shape[0] > 0 else topk_length
    attend_listed(
        q[first:last], kv, indices[first:last], lengths, attn_sink, sm_scale, work, out[first:last], max_logits[first:last], lse[first:last]
    )


_driver = Driver(_attend_all)


def flash_mla_sparse_fwd(
    q: F32, kv: F32, indices: I32, sm_scale: float, d_v: int, attn_sink: F32 | None = None, topk_length: I32 | None = None
) -> tuple[F32, F32, F32]:
    """Sparse attention of listed keys: `attend_listed` for each key/value head, in parallel over tokens.

    Parameters
    ----------
    q : ndarray, (s_q, h_q, d_qk), float32
    kv : ndarray, (s_kv, h_kv, d_qk), float32
        Query heads are shared out over the key/value heads in order.
    indices : ndarray, (s_q, h_kv, topk), int32
        Keys of each token; -1, or any number that is no key, is masked.
    sm_scale : float
        Factor of the scores, rounded to float32.
    d_v : int
        Elements of a value, the first of its row.
    attn_sink : ndarray, (h_q,), float32, optional
        The output is multiplied by ``exp(lse) / (exp(lse) + exp(attn_sink))``; the other results are not changed.
    topk_length : ndarray, (s_q,), int32, optional
        So many of a token's entries count.

    Returns
    -------
    out : ndarray, (s_q, h_q, d_v), float32
    max_logits, lse : ndarray, (s_q, h_q), float32
        In natural logarithms.

    Raises
    ------
    ShapeError, DTypeError
        If an axis disagrees with an earlier argument, the query heads are no multiple of the others, or an array has another type.

    References
    ----------
    DeepSeek-AI, "FlashMLA", ``flash_mla_sparse_fwd``; DeepSeek-AI, "DeepSeek-V3.2", 2025, section 2.1.
    """
    sizes = check_arrays(np.float32, q=(q, "s_q h_q d_qk"), kv=(kv, "s_kv h_kv d_qk"))
    check_arrays(np.int32, indices=(indices, "s_q h_kv topk"))
    s_q, h_q, d, h_kv = (sizes[name] for name in ("s_q", "h_q", "d_qk", "h_kv"))
    if indices.shape[:2] != (s_q, h_kv):
        raise ShapeError(f"`indices` must have axes ({s_q}, {h_kv}, topk), got shape {indices.shape}")
    if h_kv == 0 or h_q % h_kv:
        raise ShapeError(f"`q` must have a multiple of {h_kv} heads (those of `kv`), got {h_q}")
    if not 1 <= d_v <= d:
        raise ShapeError(f"`d_v` must lie in 1..{d} (elements of a row of `kv`), got {d_v}")
    sink, lengths = np.zeros(0, np.float32), np.zeros(0, np.int32)
    if attn_sink is not None:
        check_arrays(np.float32, attn_sink=(attn_sink, str(h_q)))
        sink = attn_sink
    if topk_length is not None:
        check_arrays(np.int32, topk_length=(topk_length, str(s_q)))
        lengths = topk_length
    group = h_q // h_kv
    out, max_logits, lse = np.empty((s_q, h_q, d_v), np.float32), np.empty((s_q, h_q), np.float32), np.empty((s_q, h_q), np.float32)
    for g in range(h_kv):
        heads = slice(g * group, (g + 1) * group)
        made = np.empty((s_q, group * d_v), np.float32), np.empty((s_q, group), np.float32), np.empty((s_q, group), np.float32)
        of_head = tuple(np.ascontiguousarray(a) for a in (q[:, heads].reshape(s_q, group * d), kv[:, g], indices[:, g]))
        units = indices.shape[2] * s_q * group * (d + d_v)
        _driver(units, *of_head, np.ascontiguousarray(lengths), np.ascontiguousarray(sink[heads]), np.float32(sm_scale), *made)
        out[:, heads], max_logits[:, heads], lse[:, heads] = made[0].reshape(s_q, group, d_v), made[1], made[2]
    return out, max_logits, lse

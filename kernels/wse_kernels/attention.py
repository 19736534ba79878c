"""Attention as one core computes it: plain blocks in, plain blocks out, nothing allocated.

A head may be cut over a *group* of adjacent cores of a row, each with a slice of its pair units. So a score is a chain of partial dot
products (`partial_scores` on each core, added west to east), after which every core of the group holds the same score and works on its own
elements of the values. Keys lie over the rows of the wafer; whether key blocks visit the queries (prefill) or the queries and their
accumulators visit the keys (decode), the arithmetic of a query is the same:

1. score = chain over the group of the partial sums, each over ascending pair units (element 0, then 1) with fma from +0;
2. scaled = score * scale, rounded; where scores have a cap, cap * tanh32(scaled / cap) (`cap_scores`);
3. m = exact maximum of the admitted scaled scores, and of the head's sink where it has one (`start_max`, `score_max`);
4. denominator from +0, or from exp32(sink - m) (`start_denominator`); over admitted keys in ascending order: p = exp32(scaled - m),
   denominator = denominator + p, o[f] = fma(p, v[f], o[f]) with o from +0 (`softmax_accumulate`);
5. context = o / denominator (`finish`).

Which keys a query admits is its layer's pattern to say; a key that is not admitted is skipped, never added as zero. A core works on the
keys that some query of the tile admits: their rows in its block (``keys``), and for each the queries that do (``admitted``, bit i for
token i of the tile). Blocks of queries are transposed, ``(elements, Q)``: column ``s * t + i`` is query slot ``s`` of token ``i`` of the
``t`` tokens at hand, so that inner loops run over queries and no sum is ever reordered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.exp import exp32, tanh32
from wse_kernels.fma import fma

_ZERO = np.float32(0.0)

_MINUS_INF = np.float32(-np.inf)


@kernel()
def store_kv(qkv: NDArray[np.float32], q_slots: int, row0: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
    """Copy the keys and values of ``t`` tokens of a core's block into its cache rows.

    Parameters
    ----------
    qkv : ndarray, (>= row0 + t, n_units * (q_slots + 2) * 2), float32
        This core's block, keys already rotated. ``(q_slots + 1)`` where values are part of the keys.
    q_slots : int
        Query heads for each key/value head.
    row0 : int
        First row of the block to copy.
    k, v : ndarray, (t, n_units * 2), float32
        Rows of the cache that belong to these tokens, written. Element ``e`` of unit ``u`` is column ``2 u + e``. Where values are part of
        the keys, `v` is (t, 0).
    """
    has_values = v.shape[1] > 0
    width = (q_slots + 2) * 2 if has_values else (q_slots + 1) * 2
    for i in range(k.shape[0]):
        for u in range(k.shape[1] // 2):
            j = u * width + q_slots * 2
            k[i, 2 * u] = qkv[row0 + i, j]
            k[i, 2 * u + 1] = qkv[row0 + i, j + 1]
            if has_values:
                v[i, 2 * u] = qkv[row0 + i, j + 2]
                v[i, 2 * u + 1] = qkv[row0 + i, j + 3]


@kernel()
def pack_queries(
    qkv: NDArray[np.float32], first_slot: int, q_slots: int, other_slots: int, row0: int, u0: int, q_t: NDArray[np.float32]
) -> None:  # fmt: skip
    """Transpose queries of one key/value head into scratch.

    Parameters
    ----------
    qkv : ndarray, (>= row0 + t, n_units * (first_slot + q_slots + other_slots) * 2), float32
        This core's block, queries already rotated.
    first_slot, q_slots : int
        Slots of a unit before those that are packed, and how many are: all query heads of the key/value head, or a group of them.
    other_slots : int
        Slots of a unit behind: other queries, its key and, where that is no part of the key, its value.
    row0 : int
        First token (row of the block) to pack.
    u0 : int
        First of the head's pair units among the core's; 0 unless the core owns several whole heads.
    q_t : ndarray, (nf, q_slots * t), float32
        Written: element ``f = 2 u + e`` of the head's units on this core, column ``s * t + i``.
    """
    t = q_t.shape[1] // q_slots
    width = (first_slot + q_slots + other_slots) * 2
    for f in range(q_t.shape[0]):
        for s in range(q_slots):
            j = (u0 + f // 2) * width + (first_slot + s) * 2 + f % 2
            for i in range(t):
                q_t[f, s * t + i] = qkv[row0 + i, j]


@kernel()
def partial_scores(k: NDArray[np.float32], f0: int, keys: NDArray[np.int64], q_t: NDArray[np.float32], s_t: NDArray[np.float32]) -> None:
    """Dot products of some keys of a block with the queries, over the elements of the head that this core holds.

    Each is a chain of fma over ascending ``f`` from +0. Where a head is cut over several cores, these are the partial sums to be chained
    west to east.

    Parameters
    ----------
    k : ndarray, (any, w), float32
        Keys on this core (or visiting it).
    f0 : int
        First column of ``k`` that belongs to the head.
    keys : ndarray, (n_keys,), int64
        Rows of ``k``.
    q_t : ndarray, (nf, Q), float32
        Queries from `pack_queries`.
    s_t : ndarray, (n_keys, Q), float32
        Written, for every query, also those that do not admit the key.
    """
    for j in range(s_t.shape[0]):
        for c in range(s_t.shape[1]):
            s_t[j, c] = _ZERO
        for f in range(q_t.shape[0]):
            x = k[keys[j], f0 + f]
            for c in range(s_t.shape[1]):
                s_t[j, c] = fma(x, q_t[f, c], s_t[j, c])


@kernel()
def start_max(sink: NDArray[np.float32], m: NDArray[np.float32]) -> None:
    """Maxima before the first key: the sink of each query head, or -inf where heads have none.

    Parameters
    ----------
    sink : ndarray, (q_slots,) or (0,), float32
        A score that no key has and that every query admits.
    m : ndarray, (Q,), float32
        Written.
    """
    t = m.shape[0] // max(sink.shape[0], 1)
    for c in range(m.shape[0]):
        m[c] = _MINUS_INF
        if sink.shape[0] > 0:
            m[c] = sink[c // t] + _ZERO


@kernel()
def cap_scores(s_t: NDArray[np.float32], scale: np.float32, cap: np.float32) -> None:
    """Scale the scores of some keys and hold them softly within a cap; `score_max` then scales by 1.

    Parameters
    ----------
    s_t : ndarray, (n_keys, Q), float32
        Whole scores (the chain is complete); ``cap * tanh32(s_t * scale / cap)`` in place, every operation rounded.
    scale, cap : float32
        Must be ``np.float32``; the cap above 0.

    References
    ----------
    Gemma Team, "Gemma 2: Improving open language models at a practical size", 2024, section 2.
    """
    for j in range(s_t.shape[0]):
        for c in range(s_t.shape[1]):
            s_t[j, c] = cap * tanh32(s_t[j, c] * scale / cap)


@kernel()
def score_max(s_t: NDArray[np.float32], scale: np.float32, q_slots: int, admitted: NDArray[np.int64], m: NDArray[np.float32]) -> None:
    """Scale the scores of some keys, and raise the running maximum of every query by those that it admits.

    Exact, so the order of blocks does not matter; a maximum of zero is always +0, and a NaN score stays (its query has no answer).

    Parameters
    ----------
    s_t : ndarray, (n_keys, Q), float32
        Whole scores (the chain is complete); scaled in place.
    scale : float32
        Factor of the scores; must be a ``np.float32``.
    q_slots : int
        Query heads for each key/value head; ``Q = q_slots * t``.
    admitted : ndarray, (n_keys,), int64
        Bit i: token i of the ``t`` tokens admits the key.
    m : ndarray, (Q,), float32
        Read and written; from `start_max` before the first block.
    """
    t = m.shape[0] // q_slots
    for j in range(s_t.shape[0]):
        for s in range(q_slots):
            for i in range(t):
                c = s * t + i
                x = s_t[j, c] * scale
                s_t[j, c] = x
                if (admitted[j] >> i) & 1 and (x > m[c] or x != x):
                    m[c] = x + _ZERO


@kernel()
def start_denominator(sink: NDArray[np.float32], m: NDArray[np.float32], denom: NDArray[np.float32]) -> None:
    """Denominators before the first key: ``exp32(sink - m)``, or +0 where heads have no sink.

    Parameters
    ----------
    sink : ndarray, (q_slots,) or (0,), float32
    m : ndarray, (Q,), float32
        Final maxima.
    denom : ndarray, (Q,), float32
        Written.
    """
    t = m.shape[0] // max(sink.shape[0], 1)
    for c in range(m.shape[0]):
        denom[c] = _ZERO
        if sink.shape[0] > 0:
            denom[c] = exp32(sink[c // t] - m[c])


@kernel()
def softmax_accumulate(
    s_t: NDArray[np.float32],
    q_slots: int,
    keys: NDArray[np.int64],
    admitted: NDArray[np.int64],
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    f0: int,
    denom: NDArray[np.float32],
    o_t: NDArray[np.float32],
) -> None:
    """Add some keys to the denominators and outputs of the queries that admit them; keys must come in ascending order.

    Parameters
    ----------
    s_t : ndarray, (n_keys, Q), float32
        Scores as `score_max` scaled them. Those of admitted keys are overwritten by their weights ``exp32(score - m)``.
    q_slots : int
        Query heads for each key/value head; ``Q = q_slots * t``.
    keys : ndarray, (n_keys,), int64
        Rows of ``v``, ascending.
    admitted : ndarray, (n_keys,), int64
        Bit i: token i of the ``t`` tokens admits the key.
    m : ndarray, (Q,), float32
        Final maxima from `score_max` over *all* admitted keys.
    v : ndarray, (any, w), float32
        Values on this core.
    f0 : int
        First column of ``v`` that belongs to the head.
    denom : ndarray, (Q,), float32
        Read and written; from `start_denominator` before the first block.
    o_t : ndarray, (nf, Q), float32
        Read and written; +0 before the first block.
    """
    t = m.shape[0] // q_slots
    for j in range(s_t.shape[0]):
        for s in range(q_slots):
            for i in range(t):
                if (admitted[j] >> i) & 1:
                    c = s * t + i
                    p = exp32(s_t[j, c] - m[c])
                    s_t[j, c] = p
                    denom[c] = denom[c] + p
        for f in range(o_t.shape[0]):
            x = v[keys[j], f0 + f]
            for s in range(q_slots):
                for i in range(t):
                    if (admitted[j] >> i) & 1:
                        o_t[f, s * t + i] = fma(s_t[j, s * t + i], x, o_t[f, s * t + i])


@kernel()
def finish(o_t: NDArray[np.float32], denom: NDArray[np.float32], q_slots: int, row0: int, u0: int, context: NDArray[np.float32]) -> None:
    """Divide by the denominators and put the result where the output projection reads it.

    Parameters
    ----------
    o_t : ndarray, (nf, q_slots * t), float32
        From `softmax_accumulate`, all keys seen.
    denom : ndarray, (q_slots * t,), float32
        From `softmax_accumulate`.
    q_slots : int
        Query heads for each key/value head.
    row0 : int
        Row of ``context`` of the first token.
    u0 : int
        First of the head's pair units among the core's; 0 unless the core owns several whole heads.
    context : ndarray, (>= row0 + t, n_units * q_slots * 2), float32
        This core's block, written: element ``e`` of slot ``s`` of unit ``u`` is column ``(u * q_slots + s) * 2 + e``.
    """
    t = denom.shape[0] // q_slots
    for f in range(o_t.shape[0]):
        for s in range(q_slots):
            j = ((u0 + f // 2) * q_slots + s) * 2 + f % 2
            for i in range(t):
                context[row0 + i, j] = o_t[f, s * t + i] / denom[s * t + i]

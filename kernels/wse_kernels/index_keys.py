"""The lightning indexer: how a key scores for a token, and which keys score highest; on one core, and the driver for a whole mesh.

A key's score for a token is ``sum_h w[h] * relu(q[h] . k)``. The products are chains of partial sums over the cores of a row, as
attention's (`wse_kernels.attention.partial_scores`); the last core of the row scales them, and adds the heads in ascending order with fma
from +0 (`index_scores`). Scores are kept as *order numbers* (`order_scores`): int32 that compare as the scores do, the least one for keys
that a token does not admit.

The k-th highest score is found without moving scores. All rows of cores hold a threshold for each token. Bit by bit, from the highest, each
counts its keys that reach the threshold with that bit (`count_reaching`), counts are added up, and the bit stays where at least k keys
reach it (`raise_threshold`). Of the keys that score exactly the threshold the first ones are taken, as many as are still wanted
(`take_keys`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32
from wse_kernels.fma import fma
from wse_kernels.threads import Driver

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

N_BITS = 32
"""Of an order number."""
NOT_ADMITTED = -(1 << 31)
"""Order number of a key that a token does not admit; no score has it but one NaN."""

_BELOW_SIGN = np.int32(0x7FFFFFFF)
_NOBODY = np.int32(NOT_ADMITTED)
_ZERO = np.float32(0.0)
_MINUS_ZERO = np.float32(-0.0)


def scores_of(order: I32) -> F32:
    """The scores that order numbers stand for."""
    return np.where(order < 0, order ^ np.int32(0x7FFFFFFF), order).astype(np.int32).view(np.float32)


@helper
def _order_of(score: np.float32) -> np.int32:
    """Order number of a score: its bits, those of a negative one reversed below the sign."""
    bits = np.int32(bits_of_f32(score))
    return bits if bits >= 0 else np.int32(bits ^ _BELOW_SIGN)


@kernel()
def index_scores(s_t: F32, weights: F32, first_head: int, scale: np.float32, weight_scale: np.float32, scores: F32) -> None:
    """Add some heads to the scores of some keys for the tokens of a tile.

    Parameters
    ----------
    s_t : ndarray, (n_keys, n * t), float32
        Whole products, column ``h * t + i`` of head ``first_head + h`` and token i.
    weights : ndarray, (t, n_heads), float32
        Of all heads.
    first_head : int
        Heads are added in ascending order, group by group.
    scale, weight_scale : float32
        Factors of the products and of the weights.
    scores : ndarray, (n_keys, t), float32
        Read and written; +0 before the first head.
    """
    t = scores.shape[1]
    for j in range(scores.shape[0]):
        for i in range(t):
            total = scores[j, i]
            for h in range(s_t.shape[1] // t):
                x = s_t[j, h * t + i] * scale
                x = x if x > _ZERO or x != x else _ZERO
                total = fma(weights[i, first_head + h] * weight_scale, x, total)
            scores[j, i] = total


@kernel()
def order_scores(scores: F32, admitted: I64, order: I32) -> None:
    """Order numbers of (n_keys, t) scores; ``-0`` is ``+0``.

    Parameters
    ----------
    scores : ndarray, (n_keys, t), float32
    admitted : ndarray, (n_keys,), int64
        Bit i: token i admits the key.
    order : ndarray, (n_keys, t), int32
        Written.
    """
    for j in range(order.shape[0]):
        for i in range(order.shape[1]):
            order[j, i] = _order_of(scores[j, i] + _ZERO) if (admitted[j] >> i) & 1 else _NOBODY


@kernel()
def count_reaching(order: I32, threshold: I32, step: int, counts: I32) -> None:
    """How many keys of (n_keys, t) order numbers reach ``threshold + step``, both (t,) int32; the sum may be one above every int32."""
    for i in range(counts.shape[0]):
        counts[i] = 0
    for j in range(order.shape[0]):
        for i in range(counts.shape[0]):
            if np.int64(order[j, i]) >= np.int64(threshold[i]) + step:
                counts[i] += 1


@kernel()
def add_counts(acc: I32, p: I32) -> None:
    """``acc = acc + p``, both (t,) int32."""
    for i in range(acc.shape[0]):
        acc[i] += p[i]


@kernel()
def raise_threshold(counts: I32, step: int, first: int, topk: int, threshold: I32) -> None:
    """Raise the threshold of every token that enough keys reach.

    Parameters
    ----------
    counts : ndarray, (t,), int32
        Keys that reach ``threshold + step``, of all rows.
    step : int
    first : int
        Position of the tile's first token: the one at ``first + i`` admits ``first + i + 1`` keys and takes `topk` of them, or all.
    topk : int
    threshold : ndarray, (t,), int32
        Read and written.
    """
    for i in range(counts.shape[0]):
        if counts[i] >= min(topk, first + i + 1):
            threshold[i] = np.int32(np.int64(threshold[i]) + step)


@kernel()
def count_wanted(counts: I32, first: int, topk: int, wanted: I32) -> None:
    """How many keys that score the threshold are taken: those of `raise_threshold` less ``counts`` that score higher; all (t,) int32."""
    for i in range(counts.shape[0]):
        wanted[i] = min(topk, first + i + 1) - counts[i]


@kernel()
def take_keys(order: I32, threshold: I32, before: I32, wanted: I32, taken: I64) -> None:
    """Which keys of a row every token of a tile takes.

    Parameters
    ----------
    order : ndarray, (n_keys, t), int32
    threshold, wanted : ndarray, (t,), int32
        The k-th highest order number, and how many keys that have it are taken.
    before : ndarray, (t,), int32
        Keys that have it in the rows before; counted on here.
    taken : ndarray, (n_keys,), int64
        Written: bit i if token i takes the key.
    """
    for j in range(order.shape[0]):
        taken[j] = 0
        for i in range(order.shape[1]):
            x = order[j, i]
            if x > threshold[i]:
                taken[j] |= np.int64(1) << i
            elif x == threshold[i]:
                if before[i] < wanted[i]:
                    taken[j] |= np.int64(1) << i
                before[i] += 1


@helper
def _score_keys(
    qk: F32, unit_starts: I64, n_heads: int, n_tokens: int, token: int, n_keys: int, weights: F32, scale: np.float32,
    weight_scale: np.float32, kv_base: int, cap: int, k_cache: F32, query: F32, part: F32, total: F32, order: I32,
) -> None:  # fmt: skip
    """Order numbers of the first keys of a token's sequence."""
    width = 2 * (n_heads + 1)
    for c in range(unit_starts.shape[0] - 1):
        units = unit_starts[c + 1] - unit_starts[c]
        for u in range(units):
            at = n_tokens * unit_starts[c] * width + (token * units + u) * width
            for e in range(2):
                to = (2 * (unit_starts[c] + u) + e) * n_heads
                for h in range(n_heads):
                    query[to + h] = qk[at + 2 * h + e]
    for j in range(n_keys):
        for h in range(n_heads):
            total[h] = _MINUS_ZERO  # -0.0 + p is p, bit for bit
        for c in range(unit_starts.shape[0] - 1):
            units = unit_starts[c + 1] - unit_starts[c]
            if units == 0:
                continue
            for h in range(n_heads):
                part[h] = _ZERO
            at = kv_base + cap * 2 * unit_starts[c] + j * 2 * units
            for f in range(2 * units):
                x = k_cache[at + f]
                of = (2 * unit_starts[c] + f) * n_heads
                for h in range(n_heads):
                    part[h] = fma(x, query[of + h], part[h])
            for h in range(n_heads):
                total[h] = total[h] + part[h]
        sum_of_heads = _ZERO
        for h in range(n_heads):
            x = total[h] * scale
            x = x if x > _ZERO or x != x else _ZERO
            sum_of_heads = fma(weights[token * n_heads + h] * weight_scale, x, sum_of_heads)
        order[j] = _order_of(sum_of_heads + _ZERO)


@helper
def _take(order: I32, n_keys: int, topk: int, taken: NDArray[np.bool_]) -> None:
    """The `topk` keys of the highest order numbers, of equal ones the first."""
    threshold = np.int64(NOT_ADMITTED)
    for b in range(N_BITS):
        candidate = threshold + (np.int64(1) << (N_BITS - 1 - b))
        n = 0
        for j in range(n_keys):
            n += 1 if np.int64(order[j]) >= candidate else 0
        if n >= topk:
            threshold = candidate
    wanted = topk
    for j in range(n_keys):
        wanted -= 1 if np.int64(order[j]) > threshold else 0
    for j in range(n_keys):
        taken[j] = np.int64(order[j]) > threshold
        if np.int64(order[j]) == threshold:
            taken[j] = wanted > 0
            wanted -= 1


@kernel(driver=True)
def _mesh_index_keys(
    part: int, n_parts: int, qk: F32, unit_starts: I64, n_heads: int, weights: F32, scale: np.float32, weight_scale: np.float32, topk: int,
    t0: I64, nt: I64, pos0: I64, kv_base: I64, cap: I64, k_cache: F32, taken: NDArray[np.bool_], order_out: I32,
) -> None:  # fmt: skip
    """One part of `mesh_index_keys`: every n-th token, for late ones admit more keys."""
    n_tokens, n_keys = taken.shape
    query, of_heads = np.empty(2 * unit_starts[-1] * n_heads, np.float32), np.empty((2, n_heads), np.float32)
    order = np.empty(n_keys, np.int32)
    for s in range(nt.shape[0]):
        for i in range(nt[s]):
            token = t0[s] + i
            if token % n_parts != part:
                continue
            n = pos0[s] + i + 1
            _score_keys(
                qk, unit_starts, n_heads, n_tokens, token, n, weights, scale, weight_scale, kv_base[s], cap[s], k_cache, query, of_heads[0],
                of_heads[1], order,
            )  # fmt: skip
            if order_out.shape[0] > 0:
                for j in range(n):
                    order_out[token, j] = order[j]
            _take(order, n, min(topk, n), taken[token])


_driver = Driver(_mesh_index_keys)


def mesh_index_keys(
    qk: F32, unit_starts: I64, n_heads: int, weights: F32, scale: np.float32, weight_scale: np.float32, topk: int, t0: I64, nt: I64,
    pos0: I64, kv_base: I64, cap: I64, k_cache: F32, taken: NDArray[np.bool_], order_out: I32,
) -> None:  # fmt: skip
    """The keys that every new token takes, for a whole mesh, in parallel over tokens: what the cores find together, bit for bit.

    Parameters
    ----------
    qk : ndarray, (n_tokens * n_units * (n_heads + 1) * 2,), float32
        Column-panel-major: of every pair unit the queries of all heads, then the key; rotated.
    unit_starts : ndarray, (n_cols + 1,), int64
        First pair unit of each column; the last entry is their number.
    n_heads : int
    weights : ndarray, (n_tokens * n_heads,), float32
    scale, weight_scale : float32
    topk : int
    t0, nt, pos0 : ndarray, (n_seqs,), int64
        First row of a sequence in `qk`, number of its new tokens, position of the first of them.
    kv_base, cap : ndarray, (n_seqs,), int64
        Where a sequence lies in the cache; see `wse_kernels.attention_mesh.mesh_store_kv`.
    k_cache : ndarray, (any,), float32
    taken : ndarray, (n_tokens, n_keys), bool
        Written where a token admits a key: whether it takes it. False elsewhere before.
    order_out : ndarray, (n_tokens, n_keys) or (0, 0), int32
        Written likewise: order numbers of the scores.
    """
    work = int(((2 * pos0 + nt + 1) * nt // 2).sum()) * int(unit_starts[-1]) * 2 * n_heads
    _driver(
        work, qk, unit_starts, n_heads, weights, scale, weight_scale, topk, t0, nt, pos0, kv_base, cap, k_cache, taken, order_out
    )  # fmt: skip

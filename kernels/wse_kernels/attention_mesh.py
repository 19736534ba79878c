"""Attention of a whole mesh in one call: what its cores compute together with the bodies of `wse_kernels.attention`, bit for bit, faster.

What every core of a column group does for itself (the maximum, the exponentials, the denominator) is done once; queries and keys are cut into
other tiles, on which nothing depends. Every sum keeps the order that `wse_kernels.attention` states.

Buffers are flat and column-panel-major. ``unit_starts[c]`` is the first pair unit of column ``c``, counted over all key/value heads (head ``g``
owns units ``g * d/2`` to ``(g + 1) * d/2``): a column holds several whole heads, or a slice of one, or nothing. The panel of column ``c`` in a
tensor with ``x`` elements per unit and ``n`` rows starts at element ``n * x * unit_starts[c]``, C-contiguous.

A task is up to `_LANES` queries of one sequence and one key/value head. They are *lanes*: lane ``i * q_slots + s`` is query slot ``s`` of token
``i`` of the sequence's new tokens, so that those which admit a key are a contiguous range. Scratch rows hold one float32 for each lane, rounded up
to whole register tiles; lanes without a query compute with zeros and are never written out.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, prange
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.attention_tile import ROWS, WIDTH, add_tiles, fill_tile, fma_step, fma_step_from, load_tile, scale_tile, store_tile
from wse_kernels.exp import exp32

_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)
_MINUS_ZERO = np.float32(-0.0)
_LANES = 64
"""Queries of a task: those of a head of 64 are 16 KiB, half an L1 cache. A multiple of `WIDTH`."""
_KEYS = 32
"""Keys worked through at a time. A multiple of `ROWS`."""


@kernel()
def mesh_store_kv(
    qkv: NDArray[np.float32],
    unit_starts: NDArray[np.int64],
    q_slots: int,
    t0: NDArray[np.int64],
    nt: NDArray[np.int64],
    pos0: NDArray[np.int64],
    kv_base: NDArray[np.int64],
    cap: NDArray[np.int64],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
) -> None:
    """Append the new tokens' keys and values to the cache, on every core: `wse_kernels.attention.store_kv` for a whole mesh.

    Parameters
    ----------
    qkv : ndarray, (n_tokens * n_units * (q_slots + 2) * 2,), float32
        Column-panel-major output of the projections, keys already rotated.
    unit_starts : ndarray, (n_cols + 1,), int64
        First pair unit of each column; the last entry is the number of units.
    q_slots : int
        Query heads for each key/value head.
    t0, nt, pos0 : ndarray, (n_seqs,), int64
        First row of a sequence in `qkv`, number of its new tokens, position of the first of them.
    kv_base, cap : ndarray, (n_seqs,), int64
        The sequence's part of the caches starts at element ``kv_base`` and has room for ``cap`` tokens: column ``c`` is the C-contiguous
        ``(cap, 2 * units)`` panel at ``kv_base + cap * 2 * unit_starts[c]``. ``pos0 + nt <= cap``.
    k_cache, v_cache : ndarray, (any,), float32
        Written at rows ``pos0`` to ``pos0 + nt``.
    """
    width = (q_slots + 2) * 2
    n_tokens = qkv.shape[0] // (unit_starts[-1] * width)
    for s in range(t0.shape[0]):
        for c in range(unit_starts.shape[0] - 1):
            units = unit_starts[c + 1] - unit_starts[c]
            for i in range(nt[s]):
                at = n_tokens * width * unit_starts[c] + (t0[s] + i) * units * width + 2 * q_slots
                to = kv_base[s] + cap[s] * 2 * unit_starts[c] + (pos0[s] + i) * 2 * units
                for _ in range(units):
                    k_cache[to] = qkv[at]
                    k_cache[to + 1] = qkv[at + 1]
                    v_cache[to] = qkv[at + 2]
                    v_cache[to + 1] = qkv[at + 3]
                    at += width
                    to += 2


@helper
def _load_queries(q_t, lanes, lane0, n_lanes, qkv, base, units, u0, nu, q_slots):  # type: ignore[no-untyped-def]
    """Transpose units u0 to u0 + nu of a core's block (it starts at ``base``) into 2 nu rows of scratch."""
    for i in range(lane0 // q_slots, (lane0 + n_lanes - 1) // q_slots + 1):
        first = i * q_slots - lane0
        for u in range(nu):
            at = base + ((i * units + u0 + u) * (q_slots + 2)) * 2
            to = 2 * u * lanes + first
            for s in range(max(0, -first), min(q_slots, n_lanes - first)):
                q_t[to + s] = qkv[at + 2 * s]
                q_t[to + lanes + s] = qkv[at + 2 * s + 1]


@helper
def _store_context(context, base, units, u0, nu, q_slots, o_t, denom, lanes, lane0, n_lanes):  # type: ignore[no-untyped-def]
    """Divide by the denominators and transpose into units u0 to u0 + nu of a core's block (it starts at ``base``)."""
    for i in range(lane0 // q_slots, (lane0 + n_lanes - 1) // q_slots + 1):
        first = i * q_slots - lane0
        for u in range(nu):
            at = base + (i * units + u0 + u) * q_slots * 2
            of = 2 * u * lanes + first
            for s in range(max(0, -first), min(q_slots, n_lanes - first)):
                context[at + 2 * s] = o_t[of + s] / denom[first + s]
                context[at + 2 * s + 1] = o_t[of + lanes + s] / denom[first + s]


@helper
def _first_lane(key, q_slots, shift, lanes):  # type: ignore[no-untyped-def]
    """First lane of a task that admits a key; ``shift`` is the position of the sequence's first new token times slots, plus ``lane0``."""
    return min(max(0, key * q_slots - shift), lanes)


@helper
def _raise_max(m, s_t, lanes, key0, key1, q_slots, shift):  # type: ignore[no-untyped-def]
    """Raise the maxima by keys key0 to key1."""
    for j in range(key0, key1):
        lo = _first_lane(j, q_slots, shift, lanes)
        top, row = m[lo:], s_t[j * lanes + lo :]
        for n in range(lanes - lo):
            x = row[n]
            top[n] = x if x > top[n] or x != x else top[n]


@helper
def _weigh(denom, s_t, m, lanes, key0, key1, q_slots, shift):  # type: ignore[no-untyped-def]
    """Turn the scaled scores of keys key0 to key1 into weights, and add them to the denominators."""
    for j in range(key0, key1):
        lo = _first_lane(j, q_slots, shift, lanes)
        total, row, top = denom[lo:], s_t[j * lanes + lo :], m[lo:]
        for n in range(lanes - lo):
            p = exp32(row[n] - top[n])
            row[n] = p
            total[n] = total[n] + p


@helper
def _accumulate(o_t, nf, s_t, lanes, key0, key1, v, v0, width, q_slots, shift):  # type: ignore[no-untyped-def]
    """Add the weighted values of keys key0 to key1 to ``nf`` rows of outputs; the first key's values are ``v[v0:]``, keys ``width`` apart."""
    for lane in range(0, lanes, WIDTH):
        # Keys before `all_admit` are admitted by every lane of the tile, those from `none_admits` on by none.
        none_admits = min(key1, (lane + WIDTH - 1 + shift) // q_slots + 1)
        all_admit = min(none_admits, (lane + shift) // q_slots + 1)
        for f in range(0, nf, ROWS):
            last = min(ROWS, nf - f) - 1
            o = load_tile(o_t, f * lanes + lane, lanes, last)
            for j in range(key0, all_admit):
                o = fma_step(o, v, v0 + (j - key0) * width + f, 1, last, s_t, j * lanes + lane)
            for j in range(max(key0, all_admit), none_admits):
                first = j * q_slots - shift - lane
                o = fma_step_from(first, o, v, v0 + (j - key0) * width + f, 1, last, s_t, j * lanes + lane)
            store_tile(o, o_t, f * lanes + lane, lanes, last)


@helper
def _attend(  # type: ignore[no-untyped-def]
    qkv, n_tokens, unit_starts, q_slots, half, head, scale, t0, pos0, kv_base, cap, k_cache, v_cache, lane0, n_lanes, work, context, m_out, denom_out
):  # fmt: skip
    """One task: lanes lane0 to lane0 + n_lanes of one sequence and head."""
    d = 2 * half
    lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
    shift = pos0 * q_slots + lane0
    n_keys = (shift + n_lanes - 1) // q_slots + 1
    q_t, o_t, work = work[: d * lanes], work[d * lanes : 2 * d * lanes], work[2 * d * lanes :]
    m, denom, work = work[:lanes], work[lanes : 2 * lanes], work[2 * lanes :]
    values, s_t = work[: _KEYS * d], work[_KEYS * d :]
    for n in range(d * lanes):
        q_t[n] = _ZERO
        o_t[n] = _ZERO
    for n in range(lanes):
        m[n] = _MINUS_INF
        denom[n] = _ZERO

    # The head's columns, west to east, are those of c0 to c1 that are not empty.
    head_unit = head * half
    c0 = 0
    while unit_starts[c0 + 1] <= head_unit:
        c0 += 1
    c1 = c0
    while unit_starts[c1] < head_unit + half:
        c1 += 1
    for c in range(c0, c1):
        start, units = unit_starts[c], unit_starts[c + 1] - unit_starts[c]
        ua, ub = max(start, head_unit), min(start + units, head_unit + half)
        base = (n_tokens * start + t0 * units) * (q_slots + 2) * 2
        _load_queries(q_t[2 * (ua - head_unit) * lanes :], lanes, lane0, n_lanes, qkv, base, units, ua - start, ub - ua, q_slots)

    for key0 in range(0, n_keys, _KEYS):
        key1 = min(key0 + _KEYS, n_keys)
        for j in range(key0, key1, ROWS):
            last = min(ROWS, key1 - j) - 1
            for lane in range(_first_lane(j, q_slots, shift, lanes) // WIDTH * WIDTH, lanes, WIDTH):
                # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own.
                total = fill_tile(_MINUS_ZERO)
                for c in range(c0, c1):
                    start, units = unit_starts[c], unit_starts[c + 1] - unit_starts[c]
                    ua, ub = max(start, head_unit), min(start + units, head_unit + half)
                    if ua < ub:
                        p = fill_tile(_ZERO)
                        at = kv_base + (cap * start + j * units + ua - start) * 2
                        for f in range(2 * (ub - ua)):
                            p = fma_step(p, k_cache, at + f, 2 * units, last, q_t, (2 * (ua - head_unit) + f) * lanes + lane)
                        total = add_tiles(total, p)
                store_tile(scale_tile(total, scale), s_t, j * lanes + lane, lanes, last)
        _raise_max(m, s_t, lanes, key0, key1, q_slots, shift)
    for n in range(lanes):
        m[n] = m[n] + _ZERO  # -0 would depend on which zero came first

    for key0 in range(0, n_keys, _KEYS):
        key1 = min(key0 + _KEYS, n_keys)
        _weigh(denom, s_t, m, lanes, key0, key1, q_slots, shift)
        for c in range(c0, c1):
            start, units = unit_starts[c], unit_starts[c + 1] - unit_starts[c]
            ua, ub = max(start, head_unit), min(start + units, head_unit + half)
            at = kv_base + (cap * start + key0 * units + ua - start) * 2
            for j in range(key1 - key0):
                for f in range(2 * (ub - ua)):
                    values[j * d + 2 * (ua - head_unit) + f] = v_cache[at + j * 2 * units + f]
        _accumulate(o_t, d, s_t, lanes, key0, key1, values, 0, d, q_slots, shift)

    for c in range(c0, c1):
        start, units = unit_starts[c], unit_starts[c + 1] - unit_starts[c]
        ua, ub = max(start, head_unit), min(start + units, head_unit + half)
        base = (n_tokens * start + t0 * units) * q_slots * 2
        o = o_t[2 * (ua - head_unit) * lanes :]
        _store_context(context, base, units, ua - start, ub - ua, q_slots, o, denom, lanes, lane0, n_lanes)
    if m_out.shape[0] > 0:
        for n in range(n_lanes):
            i = (lane0 + n) // q_slots
            h = head * q_slots + lane0 + n - i * q_slots
            m_out[t0 + i, h] = m[n]
            denom_out[t0 + i, h] = denom[n]


@kernel(parallel=True)
def mesh_attention(
    qkv: NDArray[np.float32],
    unit_starts: NDArray[np.int64],
    q_slots: int,
    head_dim: int,
    scale: np.float32,
    t0: NDArray[np.int64],
    nt: NDArray[np.int64],
    pos0: NDArray[np.int64],
    kv_base: NDArray[np.int64],
    cap: NDArray[np.int64],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    context: NDArray[np.float32],
    m_out: NDArray[np.float32],
    denom_out: NDArray[np.float32],
) -> None:
    """Causal attention of one layer over all cores and sequences, in parallel over sequences, key/value heads and tiles of queries.

    Parameters
    ----------
    qkv : ndarray, (n_tokens * n_units * (q_slots + 2) * 2,), float32
        Column-panel-major output of the projections, queries already rotated. Keys and values are read from the caches only.
    unit_starts : ndarray, (n_cols + 1,), int64
        First pair unit of each column; the last entry is the number of units, ``n_kv_heads * head_dim / 2``.
    q_slots : int
        Query heads for each key/value head.
    head_dim : int
        Elements of a head, even.
    scale : float32
        Factor of the scores; must be a ``np.float32``.
    t0, nt, pos0 : ndarray, (n_seqs,), int64
        First row of a sequence in `qkv`, number of its new tokens, position of the first of them. Keys 0 to ``pos0 + nt`` must be cached.
    kv_base, cap : ndarray, (n_seqs,), int64
        Where a sequence lies in the caches; see `mesh_store_kv`.
    k_cache, v_cache : ndarray, (any,), float32
        Keys (rotated) and values.
    context : ndarray, (n_tokens * n_units * q_slots * 2,), float32
        Written, column-panel-major; element ``e`` of slot ``s`` of a column's unit ``u`` is column ``(u * q_slots + s) * 2 + e`` of its panel.
        Rows that belong to no sequence are left as they are.
    m_out, denom_out : ndarray, (n_tokens, n_kv_heads * q_slots), float32
        Written: maximum of the scaled scores and denominator of every query head. Pass arrays of shape (0, 0) if not wanted.
    """
    half = head_dim // 2
    n_tokens = qkv.shape[0] // (unit_starts[-1] * (q_slots + 2) * 2)
    n_heads = unit_starts[-1] // half
    n_workers = get_num_threads()
    size = 0
    for s in range(nt.shape[0]):
        lanes = min(_LANES, (nt[s] * q_slots + WIDTH - 1) // WIDTH * WIDTH)
        size = max(size, (2 * head_dim + 2 + pos0[s] + nt[s]) * lanes + _KEYS * head_dim)
    for worker in prange(n_workers):
        work = np.empty(size, np.float32)
        task = 0
        for s in range(nt.shape[0]):
            for lane0 in range(0, nt[s] * q_slots, _LANES):
                n_lanes = min(_LANES, nt[s] * q_slots - lane0)
                for head in range(n_heads):
                    if task % n_workers == worker:
                        _attend(
                            qkv, n_tokens, unit_starts, q_slots, half, head, scale, t0[s], pos0[s], kv_base[s], cap[s],
                            k_cache, v_cache, lane0, n_lanes, work, context, m_out, denom_out,
                        )  # fmt: skip
                    task += 1

"""Attention of a whole mesh in one call: what its cores compute together with the bodies of `wse_kernels.attention`, bit for bit, faster.

What every core of a column group does for itself (the maximum, the exponentials, the denominator) is done once; queries and keys are cut
into other tiles, on which nothing depends. Every sum keeps the order that `wse_kernels.attention` states.

Buffers are flat and column-panel-major. ``unit_starts[c]`` is the first pair unit of column ``c``, counted over all key/value heads (head
``g`` owns units ``g * d/2`` to ``(g + 1) * d/2``): a column holds several whole heads, or a slice of one, or nothing. The panel of column
``c`` in a tensor with ``x`` elements per unit and ``n`` rows starts at element ``n * x * unit_starts[c]``, C-contiguous.

A task is up to `_LANES` queries of one sequence and one key/value head. They are *lanes*: lane ``i * q_slots + s`` is query slot ``s`` of
token ``i`` of the sequence's new tokens, so that those which admit a key are a contiguous range. Scratch rows hold one float32 for each
lane, rounded up to whole register tiles; lanes without a query compute with zeros and are never written out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.attention_tile import (
    ROWS,
    WIDTH,
    add_tiles,
    divide_tile,
    fill_tile,
    fma_step,
    fma_step_between,
    load_tile,
    scale_tile,
    store_tile,
)
from wse_kernels.exp import exp32
from wse_kernels.threads import Driver

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)
_MINUS_ZERO = np.float32(-0.0)
_LANES = 64
"""Queries of a task: those of a head of 64 are 16 KiB, half an L1 cache. A multiple of `WIDTH`."""
_KEYS = 32
"""Keys worked through at a time. A multiple of `ROWS`."""


@kernel()
def mesh_store_kv(
    qkv: F32, unit_starts: I64, q_slots: int, t0: I64, nt: I64, pos0: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32
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
def _first_lane(key: int, q_slots: int, shift: int, lanes: int) -> int:
    """First lane of a task that admits a key; ``shift`` is the position of the sequence's first new token times slots, plus ``lane0``."""
    return min(max(0, key * q_slots - shift), lanes)


@helper
def _raise_max(m: F32, s_t: F32, lanes: int, first_key: int, key0: int, key1: int, window: int, q_slots: int, shift: int) -> None:
    """Raise the maxima by keys key0 to key1; row 0 of the scores is `first_key`."""
    for j in range(key0, key1):
        lo, hi = _first_lane(j, q_slots, shift, lanes), _first_lane(j + window, q_slots, shift, lanes)
        top, row = m[lo:], s_t[(j - first_key) * lanes + lo :]
        for n in range(hi - lo):
            x = row[n]
            top[n] = x if x > top[n] or x != x else top[n]


@helper
def _weigh(
    denom: F32, s_t: F32, m: F32, lanes: int, first_key: int, key0: int, key1: int, window: int, q_slots: int, shift: int
) -> None:  # fmt: skip
    """Turn the scaled scores of keys key0 to key1 into weights, and add them to the denominators; row 0 of the scores is `first_key`."""
    for j in range(key0, key1):
        lo, hi = _first_lane(j, q_slots, shift, lanes), _first_lane(j + window, q_slots, shift, lanes)
        total, row, top = denom[lo:], s_t[(j - first_key) * lanes + lo :], m[lo:]
        for n in range(hi - lo):
            p = exp32(row[n] - top[n])
            row[n] = p
            total[n] = total[n] + p


@helper
def _accumulate(
    work: F32, outputs: int, values: int, scores: int, height: int, lanes: int, first_key: int, key0: int, key1: int, window: int,
    q_slots: int, shift: int,
) -> None:  # fmt: skip
    """Add the weighted values of keys key0 to key1 to the outputs; a lane takes its keys in ascending order."""
    for lane in range(0, lanes, WIDTH):
        # Positions of the tile's first and last lane: keys from `begin` to `end` are admitted by some lane, `all_from` to `all_to` by all.
        low, high = (lane + shift) // q_slots, (lane + WIDTH - 1 + shift) // q_slots
        begin, end = max(key0, low - window + 1), min(key1, high + 1)
        all_from = min(max(begin, high - window + 1), end)
        all_to = max(all_from, min(end, low + 1))
        for f in range(0, height, ROWS):
            o = load_tile(work, outputs + f * lanes + lane, lanes)
            for j in range(begin, all_from):
                first = j * q_slots - shift - lane
                at, row = values + (j - key0) * height + f, scores + (j - first_key) * lanes + lane
                o = fma_step_between(first, first + window * q_slots, o, work, at, 1, work, row)
            for j in range(all_from, all_to):
                o = fma_step(o, work, values + (j - key0) * height + f, 1, work, scores + (j - first_key) * lanes + lane)
            for j in range(all_to, end):
                first = j * q_slots - shift - lane
                at, row = values + (j - key0) * height + f, scores + (j - first_key) * lanes + lane
                o = fma_step_between(first, first + window * q_slots, o, work, at, 1, work, row)
            store_tile(o, work, outputs + f * lanes + lane, lanes)


@helper
def _find_pieces(unit_starts: I64, half: int, pieces: I64, first_piece: I64) -> None:
    """Cut the units of every head into pieces, one for each column that holds any, west to east; head g's are first_piece[g] to [g + 1].

    A row of ``pieces``: first unit of the column, units of the column, first unit of the piece in the column and in the head, units of the
    piece.
    """
    n = 0
    c = 0
    for head in range(first_piece.shape[0] - 1):
        first_piece[head] = n
        unit = head * half
        while unit < (head + 1) * half:
            while unit_starts[c + 1] <= unit:
                c += 1
            end = min(unit_starts[c + 1], (head + 1) * half)
            pieces[n, 0] = unit_starts[c]
            pieces[n, 1] = unit_starts[c + 1] - unit_starts[c]
            pieces[n, 2] = unit - unit_starts[c]
            pieces[n, 3] = unit - head * half
            pieces[n, 4] = end - unit
            unit = end
            n += 1
    first_piece[-1] = n


@kernel()
def _attend(
    qkv: F32, n_tokens: int, pieces: I64, q_slots: int, height: int, head: int, scale: np.float32, window: int,
    t0: int, pos0: int, kv_base: int, cap: int, k_cache: F32, v_cache: F32,
    lane0: int, n_lanes: int, work: F32, context: F32, m_out: F32, denom_out: F32,
) -> None:  # fmt: skip
    """One task: lanes lane0 to lane0 + n_lanes of one sequence and head."""
    lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
    shift = pos0 * q_slots + lane0
    first_key, n_keys = max(0, shift // q_slots - window + 1), (shift + n_lanes - 1) // q_slots + 1
    # Scratch: queries (height, lanes), outputs (height, lanes), values (_KEYS, height), denominators, maxima, scores (keys, lanes).
    outputs = height * lanes
    values = outputs + height * lanes
    denominators = values + _KEYS * height
    scores = denominators + 2 * lanes
    denom = work[denominators:]
    m = denom[lanes:]
    s_t = m[lanes:]
    for n in range(scores):
        work[n] = _ZERO
    for n in range(lanes):
        m[n] = _MINUS_INF

    for n in range(n_lanes):
        i = (lane0 + n) // q_slots
        s = lane0 + n - i * q_slots
        for c in range(pieces.shape[0]):
            at = ((n_tokens * pieces[c, 0] + (t0 + i) * pieces[c, 1] + pieces[c, 2]) * (q_slots + 2) + s) * 2
            to = 2 * pieces[c, 3] * lanes + n
            for _ in range(pieces[c, 4]):
                work[to] = qkv[at]
                work[to + lanes] = qkv[at + 1]
                at += 2 * (q_slots + 2)
                to += 2 * lanes

    for key0 in range(first_key, n_keys, _KEYS):
        key1 = min(key0 + _KEYS, n_keys)
        j = key0
        while j < key1:
            # The last keys, fewer than a tile has rows, one at a time in all its rows.
            step = ROWS if j + ROWS <= key1 else 1
            apart = 1 if step > 1 else 0
            stop = _first_lane(j + step - 1 + window, q_slots, shift, lanes)
            for lane in range(_first_lane(j, q_slots, shift, lanes) // WIDTH * WIDTH, stop, WIDTH):
                # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own.
                total = fill_tile(_MINUS_ZERO)
                for c in range(pieces.shape[0]):
                    p = fill_tile(_ZERO)
                    at = kv_base + (cap * pieces[c, 0] + j * pieces[c, 1] + pieces[c, 2]) * 2
                    of = 2 * pieces[c, 3] * lanes + lane
                    for _ in range(2 * pieces[c, 4]):
                        p = fma_step(p, k_cache, at, apart * 2 * pieces[c, 1], work, of)
                        at += 1
                        of += lanes
                    total = add_tiles(total, p)
                store_tile(scale_tile(total, scale), s_t, (j - first_key) * lanes + lane, apart * lanes)
            j += step
        _raise_max(m, s_t, lanes, first_key, key0, key1, window, q_slots, shift)
    for n in range(lanes):
        m[n] = m[n] + _ZERO  # -0 would depend on which zero came first

    for key0 in range(first_key, n_keys, _KEYS):
        key1 = min(key0 + _KEYS, n_keys)
        _weigh(denom, s_t, m, lanes, first_key, key0, key1, window, q_slots, shift)
        for c in range(pieces.shape[0]):
            for j in range(key0, key1):
                at = kv_base + (cap * pieces[c, 0] + j * pieces[c, 1] + pieces[c, 2]) * 2
                to = values + (j - key0) * height + 2 * pieces[c, 3]
                for f in range(2 * pieces[c, 4]):
                    work[to + f] = v_cache[at + f]
        _accumulate(work, outputs, values, scores, height, lanes, first_key, key0, key1, window, q_slots, shift)

    for lane in range(0, lanes, WIDTH):
        for f in range(0, height, ROWS):
            at = outputs + f * lanes + lane
            store_tile(divide_tile(load_tile(work, at, lanes), denom, lane), work, at, lanes)
    for n in range(n_lanes):
        i = (lane0 + n) // q_slots
        s = lane0 + n - i * q_slots
        for c in range(pieces.shape[0]):
            at = ((n_tokens * pieces[c, 0] + (t0 + i) * pieces[c, 1] + pieces[c, 2]) * q_slots + s) * 2
            of = outputs + 2 * pieces[c, 3] * lanes + n
            for _ in range(pieces[c, 4]):
                context[at] = work[of]
                context[at + 1] = work[of + lanes]
                at += 2 * q_slots
                of += 2 * lanes
        if m_out.shape[0] > 0:
            m_out[t0 + i, head * q_slots + s] = m[n]
            denom_out[t0 + i, head * q_slots + s] = denom[n]


@kernel(driver=True)
def _mesh_attention(
    part: int, n_parts: int, qkv: F32, unit_starts: I64, q_slots: int, head_dim: int, scale: np.float32, window: int,
    t0: I64, nt: I64, pos0: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32,
) -> None:  # fmt: skip
    """One part of `mesh_attention`: every n-th task, for late queries see more keys."""
    half = head_dim // 2
    n_tokens = qkv.shape[0] // (unit_starts[-1] * (q_slots + 2) * 2)
    n_heads = unit_starts[-1] // half
    pieces = np.empty((unit_starts.shape[0] - 1 + n_heads, 5), np.int64)
    first_piece = np.empty(n_heads + 1, np.int64)
    _find_pieces(unit_starts, half, pieces, first_piece)
    height = (head_dim + ROWS - 1) // ROWS * ROWS
    size = 0
    for s in range(nt.shape[0]):
        lanes = min(_LANES, (nt[s] * q_slots + WIDTH - 1) // WIDTH * WIDTH)
        n_keys = min(pos0[s] + nt[s], window + (lanes - 1) // q_slots + 1)
        size = max(size, (2 * height + 2 + n_keys) * lanes + _KEYS * height)
    work = np.empty(size, np.float32)
    task = 0
    for s in range(nt.shape[0]):
        for lane0 in range(0, nt[s] * q_slots, _LANES):
            n_lanes = min(_LANES, nt[s] * q_slots - lane0)
            for head in range(n_heads):
                if task % n_parts == part:
                    _attend(
                        qkv, n_tokens, pieces[first_piece[head] : first_piece[head + 1]], q_slots, height, head, scale, window,
                        t0[s], pos0[s], kv_base[s], cap[s],
                        k_cache, v_cache, lane0, n_lanes, work, context, m_out, denom_out,
                    )  # fmt: skip
                task += 1


_driver = Driver(_mesh_attention)


def mesh_attention(
    qkv: F32, unit_starts: I64, q_slots: int, head_dim: int, scale: np.float32, window: int,
    t0: I64, nt: I64, pos0: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32,
) -> None:  # fmt: skip
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
    window : int
        Keys that a query sees, its own included; `wse_kernels.attention.NO_WINDOW` for all before it.
    t0, nt, pos0 : ndarray, (n_seqs,), int64
        First row of a sequence in `qkv`, number of its new tokens, position of the first of them. Keys 0 to ``pos0 + nt`` must be cached.
    kv_base, cap : ndarray, (n_seqs,), int64
        Where a sequence lies in the caches; see `mesh_store_kv`.
    k_cache, v_cache : ndarray, (any,), float32
        Keys (rotated) and values.
    context : ndarray, (n_tokens * n_units * q_slots * 2,), float32
        Written, column-panel-major; element ``e`` of slot ``s`` of a column's unit ``u`` is column ``(u * q_slots + s) * 2 + e`` of its
        panel. Rows that belong to no sequence are left as they are.
    m_out, denom_out : ndarray, (n_tokens, n_kv_heads * q_slots), float32
        Written: maximum of the scaled scores and denominator of every query head. Pass arrays of shape (0, 0) if not wanted.
    """
    keys = pos0 + nt
    units = int((nt * np.minimum(keys, window)).sum()) * int(unit_starts[-1]) * q_slots
    _driver(
        units, qkv, unit_starts, q_slots, head_dim, scale, window, t0, nt, pos0, kv_base, cap, k_cache, v_cache, context, m_out, denom_out
    )  # fmt: skip

"""Attention of a whole mesh in one call: what its cores compute together with the bodies of `wse_kernels.attention`, bit for bit, faster.

What every core of a column group does for itself (the maximum, the exponentials, the denominator) is done once; queries and keys are cut
into other tiles, on which nothing depends. Every sum keeps the order that `wse_kernels.attention` states.

Buffers are flat and column-panel-major. ``unit_starts[c]`` is the first pair unit of column ``c``, counted over all key/value heads (head
``g`` owns units ``g * d/2`` to ``(g + 1) * d/2``): a column holds several whole heads, or a slice of one, or nothing. The panel of column
``c`` in a tensor with ``x`` elements per unit and ``n`` rows starts at element ``n * x * unit_starts[c]``, C-contiguous.

A task is up to `LANES` queries of one sequence and of one group of a key/value head's query heads. They are *lanes*: lane ``i * n + s`` is
the group's query head ``s`` of ``n``, of token ``i`` of the sequence's new tokens. Scratch rows hold one float32 for each lane, rounded up
to whole register tiles; lanes without a query compute with zeros and are never written out. Which lanes admit a key is a word of bits for
each register tile, made from the ranges of keys that each token admits; keys that no lane of a tile admits cost nothing but a look at it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.attention_tile import (
    ALL_LANES,
    ROWS,
    WIDTH,
    add_tiles,
    divide_tile,
    fill_tile,
    fma_step,
    fma_step_where,
    load_tile,
    raise_max,
    scale_tile,
    store_tile,
)
from wse_kernels.exp import exp32, tanh32
from wse_kernels.threads import Driver, Runner, at_once

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)
_MINUS_ZERO = np.float32(-0.0)
LANES = 64
"""Queries of a task: those of a head of 64 are 16 KiB, half an L1 cache. A multiple of `WIDTH`."""
KEYS = 32
"""Keys worked through at a time. A multiple of `ROWS`."""


@kernel()
def mesh_store_kv(
    qkv: F32, unit_starts: I64, q_slots: int, t0: I64, nt: I64, pos0: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32
) -> None:
    """Append the new tokens' keys and values to the cache, on every core: `wse_kernels.attention.store_kv` for a whole mesh.

    Parameters
    ----------
    qkv : ndarray, (n_tokens * n_units * (q_slots + 2) * 2,), float32
        Column-panel-major output of the projections, keys already rotated. ``(q_slots + 1)`` where values are part of the keys.
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
        Written at rows ``pos0`` to ``pos0 + nt``. `v_cache` is (0,) where values are part of the keys.
    """
    has_values = v_cache.shape[0] > 0
    width = (q_slots + 2) * 2 if has_values else (q_slots + 1) * 2
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
                    if has_values:
                        v_cache[to] = qkv[at + 2]
                        v_cache[to + 1] = qkv[at + 3]
                    at += width
                    to += 2


@helper
def key_span(first_range: I64, ranges: I64, token: int, stop: int) -> tuple[int, int]:
    """First key that some of the tokens `token` to `stop` admits, and the one after the last."""
    low, high = ranges[first_range[token], 0], 0
    for i in range(token, stop):
        low = min(low, ranges[first_range[i], 0])
        high = max(high, ranges[first_range[i + 1] - 1, 1])
    return low, high


@helper
def admit(masks: I32, span: int, first_key: int, first_range: I64, ranges: I64, t0: int, lane0: int, n_lanes: int, q_slots: int) -> None:
    """Bits of the lanes that admit each of `span` keys: word ``tile * span + key - first_key`` for the lanes of a register tile.

    Lanes without a query go with the last token, so that its tile is whole where it can be.
    """
    lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
    masks[: lanes // WIDTH * span] = np.int32(0)
    last = (lane0 + n_lanes - 1) // q_slots
    for i in range(lane0 // q_slots, last + 1):
        low, high = max(i * q_slots - lane0, 0), lanes if i == last else (i + 1) * q_slots - lane0
        for tile in range(low // WIDTH, (high - 1) // WIDTH + 1):
            begin, end = max(low - tile * WIDTH, 0), min(high - tile * WIDTH, WIDTH)
            bits = np.int32((1 << end) - (1 << begin))
            for r in range(first_range[t0 + i], first_range[t0 + i + 1]):
                row = masks[tile * span + ranges[r, 0] - first_key :]
                for j in range(ranges[r, 1] - ranges[r, 0]):
                    row[j] |= bits


@helper
def _run_of_all(masks: I32, tile: int, tiles: int, span: int, begin: int, end: int) -> tuple[int, int]:
    """First run of keys, among begin to end, that all lanes of the tiles `tile` to `tiles` admit; empty if there is none."""
    first = begin
    while first < end and not _all_admit(masks, tile, tiles, span, first):
        first += 1
    last = first
    while last < end and _all_admit(masks, tile, tiles, span, last):
        last += 1
    return first, last


@helper
def _all_admit(masks: I32, tile: int, tiles: int, span: int, j: int) -> bool:
    """Whether all lanes of the tiles `tile` to `tiles` admit key j."""
    for t in range(tile, tiles):
        if masks[t * span + j] != ALL_LANES:
            return False
    return True


@helper
def any_admits(masks: I32, tile: int, tiles: int, span: int, begin: int, end: int) -> bool:
    """Whether some lane of the tiles `tile` to `tiles` admits some of the keys begin to end."""
    bits = 0
    for t in range(tile, tiles):
        for j in range(begin, end):
            bits |= masks[t * span + j]
    return bits != 0


@helper
def raise_admitted(m: F32, s_t: F32, masks: I32, lanes: int, lane: int, span: int, begin: int, end: int) -> None:
    """Raise the maxima of one register tile's lanes, those from `lane` on, by the keys begin to end that each admits."""
    for j in range(begin, end):
        row, bits = s_t[j * lanes :], masks[lane // WIDTH * span + j]
        for n in range(WIDTH):
            x = row[lane + n]
            if (bits >> n) & 1 and (x > m[lane + n] or x != x):
                m[lane + n] = x


@helper
def _weigh(denom: F32, s_t: F32, m: F32, masks: I32, lanes: int, span: int, begin: int, end: int) -> None:
    """Turn the scaled scores of keys begin to end, counted from the first, into weights, and add them to the denominators."""
    first, last = _run_of_all(masks, 0, lanes // WIDTH, span, begin, end)
    for j in range(begin, end):
        row = s_t[j * lanes :]
        if first <= j < last:
            for n in range(lanes):
                p = exp32(row[n] - m[n])
                row[n] = p
                denom[n] = denom[n] + p
        else:
            for lane in range(0, lanes, WIDTH):
                bits = masks[lane // WIDTH * span + j]
                if bits == 0:
                    continue
                for n in range(lane, lane + WIDTH):
                    p = exp32(row[n] - m[n])
                    admitted = (bits >> (n - lane)) & 1
                    row[n] = p
                    denom[n] = denom[n] + p if admitted else denom[n]


@helper
def _accumulate_tile(
    work: F32, o: int, lanes: int, a: F32, at: int, step: int, s: int, bits: I32, first: int, last: int, begin: int, end: int
) -> None:  # fmt: skip
    """Add keys begin to end to `ROWS` elements of the outputs, from ``work[o]`` on.

    Values of key j are at ``a[at + (j - begin) * step]``, its weights at ``work[s + j * lanes]``; all lanes admit the keys first to last.
    """
    tile = load_tile(work, o, lanes)
    for j in range(begin, first):
        if bits[j] != 0:
            tile = fma_step_where(bits[j], tile, a, at + (j - begin) * step, 1, work, s + j * lanes)
    value, weight = at + (first - begin) * step, s + first * lanes
    for _ in range(last - first):
        tile = fma_step(tile, a, value, 1, work, weight)
        value += step
        weight += lanes
    for j in range(last, end):
        if bits[j] != 0:
            tile = fma_step_where(bits[j], tile, a, at + (j - begin) * step, 1, work, s + j * lanes)
    store_tile(tile, work, o, lanes)


@helper
def _accumulate(
    work: F32, masks: I32, outputs: int, values: int, scores: int, height: int, lanes: int, span: int, begin: int, end: int,
    v_cache: F32, first_value: I64, pieces: I64, in_place: bool,
) -> None:  # fmt: skip
    """Add the weighted values of keys begin to end, counted from the first, to the outputs; a lane takes its keys in ascending order.

    The values of each piece of the head lie in the cache from `first_value` on; where they are not `in_place`, all of them were copied to
    the rows of scratch from `values` on.
    """
    for lane in range(0, lanes, WIDTH):
        tile = lane // WIDTH
        if not any_admits(masks, tile, tile + 1, span, begin, end):
            continue
        bits = masks[tile * span :]
        first, last = _run_of_all(masks, tile, tile + 1, span, begin, end)
        if in_place:
            for c in range(pieces.shape[0]):
                o = outputs + 2 * pieces[c, 3] * lanes + lane
                for f in range(0, 2 * pieces[c, 7], ROWS):
                    _accumulate_tile(
                        work, o + f * lanes, lanes, v_cache, first_value[c] + f, 2 * pieces[c, 1], scores + lane, bits, first, last, begin,
                        end,
                    )  # fmt: skip
        else:
            for f in range(0, height, ROWS):
                _accumulate_tile(
                    work, outputs + f * lanes + lane, lanes, work, values + f, height, scores + lane, bits, first, last, begin, end
                )  # fmt: skip


@helper
def cap_tile(s_t: F32, at: int, rows: int, stride: int, cap: np.float32) -> None:
    """Hold the scores of a register tile, `rows` rows from element `at` on, softly within the cap."""
    for r in range(rows):
        row = s_t[at + r * stride :]
        for n in range(WIDTH):
            row[n] = cap * tanh32(row[n] / cap)


@helper
def find_pieces(unit_starts: I64, half: int, value_half: int, pieces: I64, first_piece: I64) -> None:
    """Cut the units of every head into pieces, one for each column that holds any, west to east; head g's are first_piece[g] to [g + 1].

    A row of ``pieces``: first unit of the column, units of the column, first unit of the piece in the column and in the head, units of the
    piece; then of those that have values, the first of the column, how many of the column and how many of the piece. Where values are the
    first ``value_half`` units of the keys, there is one head.
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
            pieces[n, 5] = pieces[n, 0]
            pieces[n, 6] = pieces[n, 1]
            pieces[n, 7] = pieces[n, 4]
            if value_half < half:
                pieces[n, 5] = min(pieces[n, 0], value_half)
                pieces[n, 6] = max(min(end, value_half) - unit, 0)
                pieces[n, 7] = pieces[n, 6]
            unit = end
            n += 1
    first_piece[-1] = n


@helper
def scratch_size(groups: I64, height: int, value_height: int, first_range: I64, ranges: I64, t0: I64, nt: I64) -> tuple[int, int, int]:
    """Elements of scratch and words of bits that the largest task takes, and query heads of the largest group."""
    size = words = most = 0
    for g in range(groups.shape[0]):
        of_token = groups[g, 2]
        most = max(most, of_token)
        if g > 0 and of_token == groups[g - 1, 2]:
            continue
        for s in range(nt.shape[0]):
            for lane0 in range(0, nt[s] * of_token, LANES):
                n_lanes = min(LANES, nt[s] * of_token - lane0)
                lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
                low, high = key_span(first_range, ranges, t0[s] + lane0 // of_token, t0[s] + (lane0 + n_lanes - 1) // of_token + 1)
                size = max(size, (height + value_height + 2 + high - low) * lanes + KEYS * value_height)
                words = max(words, lanes // WIDTH * (high - low))
    return size, words, most


@helper
def queries_in(
    work: F32, to: int, lanes: int, n_lanes: int, qkv: F32, first: int, width: int, n_units: int, slot: int, q_slots: int, token: int
) -> None:  # fmt: skip
    """Copy the units of a piece, `width` elements apart from ``qkv[first]`` on, to rows of lanes from ``work[to]`` on.

    The first lane is query slot `slot` of its token; the next token lies `token` elements behind.
    """
    for u in range(n_units):
        at, s = first + u * width, slot
        for n in range(to + 2 * u * lanes, to + 2 * u * lanes + n_lanes):
            work[n] = qkv[at]
            work[n + lanes] = qkv[at + 1]
            at, s = at + 2, s + 1
            if s == q_slots:
                at, s = at + token - 2 * q_slots, 0


@helper
def context_out(
    work: F32, of: int, lanes: int, n_lanes: int, context: F32, first: int, width: int, n_units: int, slot: int, q_slots: int, token: int
) -> None:  # fmt: skip
    """Copy rows of lanes from ``work[of]`` on to the units of a piece of the context: `queries_in` the other way."""
    for u in range(n_units):
        at, s = first + u * width, slot
        for n in range(of + 2 * u * lanes, of + 2 * u * lanes + n_lanes):
            context[at] = work[n]
            context[at + 1] = work[n + lanes]
            at, s = at + 2, s + 1
            if s == q_slots:
                at, s = at + token - 2 * q_slots, 0


@kernel()
def _attend(
    qkv: F32, width: int, n_tokens: int, pieces: I64, q_slots: int, height: int, value_height: int, group: I64, scale: np.float32,
    cap_score: np.float32, sink: F32, first_range: I64, ranges: I64, t0: int, kv_base: int, cap: int, k_cache: F32, v_cache: F32,
    lane0: int, n_lanes: int, work: F32, masks: I32, first_value: I64, context: F32, m_out: F32, denom_out: F32,
) -> None:  # fmt: skip
    """One task: lanes lane0 to lane0 + n_lanes of one sequence and group of query heads."""
    of_token, first_slot = group[2], group[1]
    first_head = group[0] * q_slots + first_slot
    lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
    first_key, last_key = key_span(first_range, ranges, t0 + lane0 // of_token, t0 + (lane0 + n_lanes - 1) // of_token + 1)
    span = last_key - first_key
    admit(masks, span, first_key, first_range, ranges, t0, lane0, n_lanes, of_token)
    # Scratch: queries (height, lanes), outputs (value_height, lanes), values (KEYS, value_height), denominators, maxima,
    # scores (keys, lanes).
    outputs = height * lanes
    values = outputs + value_height * lanes
    denominators = values + KEYS * value_height
    scores = denominators + 2 * lanes
    denom = work[denominators:]
    m = denom[lanes:]
    s_t = m[lanes:]
    in_place = True  # whether every piece is whole register tiles of values
    for c in range(pieces.shape[0]):
        in_place = in_place and 2 * pieces[c, 7] % ROWS == 0
    for n in range(scores):
        work[n] = _ZERO
    for n in range(lanes):
        m[n] = _MINUS_INF

    if sink.shape[0] > 0:
        for n in range(n_lanes):
            m[n] = sink[first_head + (lane0 + n) % of_token]
    slot, token = lane0 % of_token, t0 + lane0 // of_token
    for c in range(pieces.shape[0]):
        first = (n_tokens * pieces[c, 0] + token * pieces[c, 1] + pieces[c, 2]) * width + 2 * (first_slot + slot)
        queries_in(
            work, 2 * pieces[c, 3] * lanes, lanes, n_lanes, qkv, first, width, pieces[c, 4], slot, of_token, pieces[c, 1] * width
        )  # fmt: skip

    for begin in range(0, span, KEYS):
        end = min(begin + KEYS, span)
        j = begin
        while j < end:
            # The last keys, fewer than a tile has rows, one at a time in all its rows.
            step = ROWS if j + ROWS <= end else 1
            apart = 1 if step > 1 else 0
            for lane in range(0, lanes, WIDTH):
                if not any_admits(masks, lane // WIDTH, lane // WIDTH + 1, span, j, j + step):
                    continue
                # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own.
                total = fill_tile(_MINUS_ZERO)
                for c in range(pieces.shape[0]):
                    p = fill_tile(_ZERO)
                    at = kv_base + (cap * pieces[c, 0] + (first_key + j) * pieces[c, 1] + pieces[c, 2]) * 2
                    of = 2 * pieces[c, 3] * lanes + lane
                    for _ in range(2 * pieces[c, 4]):
                        p = fma_step(p, k_cache, at, apart * 2 * pieces[c, 1], work, of)
                        at += 1
                        of += lanes
                    total = add_tiles(total, p)
                total = scale_tile(total, scale)
                store_tile(total, s_t, j * lanes + lane, apart * lanes)
                if cap_score > _ZERO:
                    cap_tile(s_t, j * lanes + lane, step, lanes, cap_score)
                    total = load_tile(s_t, j * lanes + lane, apart * lanes)
                first, last = _run_of_all(masks, lane // WIDTH, lane // WIDTH + 1, span, j, j + step)
                if last - first == step:
                    raise_max(m, lane, total)
                else:
                    raise_admitted(m, s_t, masks, lanes, lane, span, j, j + step)
            j += step
    for n in range(lanes):
        m[n] = m[n] + _ZERO  # -0 would depend on which zero came first
    if sink.shape[0] > 0:
        for n in range(n_lanes):
            denom[n] = exp32(sink[first_head + (lane0 + n) % of_token] - m[n])

    for begin in range(0, span, KEYS):
        end = min(begin + KEYS, span)
        if not any_admits(masks, 0, lanes // WIDTH, span, begin, end):
            continue
        _weigh(denom, s_t, m, masks, lanes, span, begin, end)
        for c in range(pieces.shape[0]):
            first_value[c] = kv_base + (cap * pieces[c, 0] + (first_key + begin) * pieces[c, 1] + pieces[c, 2]) * 2
            for j in range(0 if in_place else end - begin):
                at, to = first_value[c] + j * 2 * pieces[c, 1], values + j * value_height + 2 * pieces[c, 3]
                for f in range(2 * pieces[c, 7]):
                    work[to + f] = v_cache[at + f]
        _accumulate(
            work, masks, outputs, values, scores, value_height, lanes, span, begin, end, v_cache, first_value, pieces, in_place
        )  # fmt: skip

    for lane in range(0, lanes, WIDTH):
        for f in range(0, value_height, ROWS):
            at = outputs + f * lanes + lane
            store_tile(divide_tile(load_tile(work, at, lanes), denom, lane), work, at, lanes)
    for c in range(pieces.shape[0]):
        first = ((n_tokens * pieces[c, 5] + token * pieces[c, 6] + pieces[c, 2]) * q_slots + first_slot + slot) * 2
        context_out(
            work, outputs + 2 * pieces[c, 3] * lanes, lanes, n_lanes, context, first, 2 * q_slots, pieces[c, 7], slot, of_token,
            pieces[c, 6] * 2 * q_slots,
        )  # fmt: skip
    if m_out.shape[0] > 0:
        for n in range(n_lanes):
            i, s = (lane0 + n) // of_token, (lane0 + n) % of_token
            m_out[t0 + i, first_head + s] = m[n]
            denom_out[t0 + i, first_head + s] = denom[n]


@kernel(driver=True)
def _mesh_attention(
    part: int, n_parts: int, qkv: F32, unit_starts: I64, q_slots: int, groups: I64, head_dim: int, scale: np.float32,
    cap_score: np.float32, sink: F32, first_range: I64, ranges: I64, t0: I64, nt: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32,
) -> None:  # fmt: skip
    """One part of `mesh_attention`: every n-th task, for late queries see more keys."""
    half = head_dim // 2
    n_tokens = first_range.shape[0] - 1
    n_heads = unit_starts[-1] // half
    width = qkv.shape[0] // (n_tokens * unit_starts[-1])
    value_half = context.shape[0] // (n_tokens * n_heads * q_slots * 2)
    pieces = np.empty((unit_starts.shape[0] - 1 + n_heads, 8), np.int64)
    first_piece = np.empty(n_heads + 1, np.int64)
    find_pieces(unit_starts, half, value_half, pieces, first_piece)
    height = (head_dim + ROWS - 1) // ROWS * ROWS
    value_height = (2 * value_half + ROWS - 1) // ROWS * ROWS
    size, words, most = scratch_size(groups, height, value_height, first_range, ranges, t0, nt)
    work, masks = np.empty(size, np.float32), np.empty(words, np.int32)
    first_value = np.empty(pieces.shape[0], np.int64)
    task = 0
    for s in range(nt.shape[0]):
        for lane0 in range(0, nt[s] * most, LANES):
            for g in range(groups.shape[0]):
                n_lanes, head = min(LANES, nt[s] * groups[g, 2] - lane0), groups[g, 0]
                if n_lanes > 0 and task % n_parts == part:
                    _attend(
                        qkv, width, n_tokens, pieces[first_piece[head] : first_piece[head + 1]], q_slots, height, value_height, groups[g],
                        scale, cap_score, sink, first_range, ranges, t0[s], kv_base[s], cap[s],
                        k_cache, v_cache, lane0, n_lanes, work, masks, first_value, context, m_out, denom_out,
                    )  # fmt: skip
                task += n_lanes > 0


_driver = Driver(_mesh_attention)


def mesh_attention(
    qkv: F32, unit_starts: I64, q_slots: int, groups: I64, head_dim: int, scale: np.float32, cap_score: np.float32, sink: F32,
    first_range: I64, ranges: I64, t0: I64, nt: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32, *, run: Runner = at_once,
) -> None:  # fmt: skip
    """Attention of one layer over all cores and sequences, in parallel over sequences, groups of query heads and tiles of queries.

    Parameters
    ----------
    qkv : ndarray, (n_tokens * n_units * (q_slots + 2) * 2,), float32
        Column-panel-major output of the projections, queries already rotated. Keys and values are read from the caches only. It may have
        any number of elements for each unit and token, queries first.
    unit_starts : ndarray, (n_cols + 1,), int64
        First pair unit of each column; the last entry is the number of units, ``n_kv_heads * head_dim / 2``.
    q_slots : int
        Query heads for each key/value head.
    groups : ndarray, (n_groups, 3), int64
        Query heads to work on: key/value head, first of its query heads and how many, each at most once. Other columns of the context are
        left as they are.
    head_dim : int
        Elements of a head, even.
    scale : float32
        Factor of the scores; must be a ``np.float32``.
    cap_score : float32
        Scaled scores ``x`` become ``cap * tanh(x / cap)``; 0 leaves them. Must be a ``np.float32``.
    sink : ndarray, (n_kv_heads * q_slots,) or (0,), float32
        A score of each query head that no key has and that every query admits; empty where heads have none.
    first_range : ndarray, (n_tokens + 1,), int64
    ranges : ndarray, (n_ranges, 2), int64
        Token i admits the keys at positions ``ranges[r, 0]`` to ``ranges[r, 1]`` (not included) of its sequence, for r from
        ``first_range[i]`` to ``first_range[i + 1]``: ascending, apart from each other, at least one and none empty. They must be cached.
    t0, nt : ndarray, (n_seqs,), int64
        First row of a sequence in `qkv`, number of its new tokens.
    kv_base, cap : ndarray, (n_seqs,), int64
        Where a sequence lies in the caches; see `mesh_store_kv`.
    k_cache, v_cache : ndarray, (any,), float32
        Keys (rotated) and values; the same array where values are the first units of the keys.
    context : ndarray, (n_tokens * n_units * q_slots * 2,), float32
        Written, column-panel-major; element ``e`` of slot ``s`` of a column's unit ``u`` is column ``(u * q_slots + s) * 2 + e`` of its
        panel. Rows that belong to no sequence are left as they are. Where values are the first units of one head's keys, it holds those
        units only, and its size says how many.
    m_out, denom_out : ndarray, (n_tokens, n_kv_heads * q_slots), float32
        Written: maximum of the scaled scores and denominator of every query head. Pass arrays of shape (0, 0) if not wanted.
    run : callable
        How the driver is called.
    """
    admitted = int((ranges[:, 1] - ranges[:, 0]).sum())
    run(
        _driver, admitted * head_dim // 2 * int(groups[:, 2].sum()), qkv, unit_starts, q_slots, groups, head_dim, scale, cap_score, sink,
        first_range, ranges, t0, nt, kv_base, cap, k_cache, v_cache, context, m_out, denom_out,
    )  # fmt: skip

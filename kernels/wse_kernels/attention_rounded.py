"""Softmax whose state has 16 bits: the body of one core, and the whole mesh in one call.

Scores are those of `wse_kernels.attention`, in float32. Then, with round16 to the nearest number of the format, ties to even:

1. m = round16(maximum of the admitted scores, and of the head's sink where it has one). Rounding puts no number before a smaller one, so it
   does not matter how often a maximum was rounded on its way;
2. denominator from +0, or from round16(exp32(sink - m)); over admitted keys in ascending order: p = round16(exp32(score - m)),
   denominator = round16(denominator + p), o[f] = round16(fma(p, v[f], o[f])) with o from +0;
3. context = o / denominator, in float32.

What lies in SRAM, and is handed from row to row, has 16 bits after every key; so nothing depends on which rows the keys lie on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.attention_mesh import (
    KEYS,
    LANES,
    admit,
    any_admits,
    cap_tile,
    context_out,
    find_pieces,
    key_span,
    queries_in,
    raise_admitted,
    scratch_size,
)
from wse_kernels.attention_tile import (
    ALL_LANES,
    ROWS,
    WIDTH,
    add_tiles,
    divide_tile,
    fill_tile,
    fma_step,
    load_tile,
    scale_tile,
    store_tile,
)
from wse_kernels.exp import exp32
from wse_kernels.fma import fma
from wse_kernels.storage import finite_size, nearest_to, round_to
from wse_kernels.threads import Driver, n_threads

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)
_MINUS_ZERO = np.float32(-0.0)


@kernel()
def softmax_accumulate_rounded(
    s_t: F32, q_slots: int, keys: I64, admitted: I64, m: F32, v: F32, f0: int, fmt: int, largest: I32, denom: F32, o_t: F32
) -> None:
    """Add some keys to denominators and outputs of 16 bits; `wse_kernels.attention.softmax_accumulate` with a rounding after every key.

    Parameters
    ----------
    s_t, q_slots, keys, admitted, m, v, f0, denom, o_t
        As `softmax_accumulate` takes them; `m`, `denom` and `o_t` hold numbers of the format.
    fmt : int
        `TO_BF16`, `TO_F16` or `TO_CB16` of `wse_kernels.storage`.
    largest : ndarray, (1,), int32
        Read and written: bits of the largest finite magnitude that was rounded.
    """
    t = m.shape[0] // q_slots
    top = largest[0]
    for j in range(s_t.shape[0]):
        for s in range(q_slots):
            for i in range(t):
                if (admitted[j] >> i) & 1:
                    c = s * t + i
                    p = exp32(s_t[j, c] - m[c])
                    top = max(top, finite_size(p))
                    p = nearest_to(p, fmt)
                    s_t[j, c] = p
                    total = denom[c] + p
                    top = max(top, finite_size(total))
                    denom[c] = nearest_to(total, fmt)
        for f in range(o_t.shape[0]):
            x = v[keys[j], f0 + f]
            for s in range(q_slots):
                for i in range(t):
                    if (admitted[j] >> i) & 1:
                        o = fma(s_t[j, s * t + i], x, o_t[f, s * t + i])
                        top = max(top, finite_size(o))
                        o_t[f, s * t + i] = nearest_to(o, fmt)
    largest[0] = top


@helper
def _weigh(
    denom: F32, s_t: F32, m: F32, masks: I32, lanes: int, n_lanes: int, span: int, begin: int, end: int, fmt: int
) -> np.int32:
    """Turn scores of keys begin to end into weights, 0 where a lane has no query or does not admit, and add them to the denominators."""
    top = np.int32(0)
    for j in range(begin, end):
        row = s_t[j * lanes : (j + 1) * lanes]
        for n in range(lanes):
            p = exp32(row[n] - m[n])
            row[n] = p if n < n_lanes and (masks[n // WIDTH * span + j] >> (n % WIDTH)) & 1 else _ZERO
        top = max(top, round_to(row, fmt))
        for n in range(lanes):
            denom[n] = denom[n] + row[n]
        top = max(top, round_to(denom[:lanes], fmt))
    return top


@helper
def _accumulate(
    work: F32, masks: I32, outputs: int, values: int, scores: int, height: int, lanes: int, span: int, begin: int, end: int, fmt: int,
    sums: F32,
) -> np.int32:  # fmt: skip
    """Add the weighted values of keys begin to end to the outputs, rounded after every key; `sums` is scratch, (any,)."""
    top = np.int32(0)
    for lane in range(0, lanes, WIDTH):
        bits = masks[lane // WIDTH * span :]
        # Several elements of a head at a time: rounding takes many numbers faster than few.
        for f0 in range(0, height, ROWS):
            for j in range(begin, end):
                if bits[j] == 0:
                    continue
                x = work[values + (j - begin) * height + f0 :]
                weights = work[scores + j * lanes + lane :]
                for f in range(ROWS):
                    out = work[outputs + (f0 + f) * lanes + lane :]
                    for n in range(WIDTH):
                        sums[f * WIDTH + n] = fma(weights[n], x[f], out[n])
                top = max(top, round_to(sums[: ROWS * WIDTH], fmt))
                for f in range(ROWS):
                    out = work[outputs + (f0 + f) * lanes + lane :]
                    if bits[j] == ALL_LANES:
                        for n in range(WIDTH):
                            out[n] = sums[f * WIDTH + n]
                    else:  # a weight of 0 is no key: not even the sign of a zero may come of it
                        for n in range(WIDTH):
                            out[n] = sums[f * WIDTH + n] if (bits[j] >> n) & 1 else out[n]
    return top


@helper
def _score(
    pieces: I64, scale: np.float32, cap_score: np.float32, first_key: int, span: int, kv_base: int, cap: int, k_cache: F32,
    lanes: int, work: F32, masks: I32, m: F32, s_t: F32,
) -> None:  # fmt: skip
    """Whole scores of a task's queries, at the start of `work`, with all keys that some lane admits; the maxima are raised by them."""
    for begin in range(0, span, ROWS):
        # The last keys, fewer than a tile has rows, one at a time in all its rows.
        step = ROWS if begin + ROWS <= span else 1
        apart = 1 if step > 1 else 0
        for j in range(begin, min(begin + ROWS, span), step):
            for lane in range(0, lanes, WIDTH):
                if not any_admits(masks, lane // WIDTH, lane // WIDTH + 1, span, j, j + step):
                    continue
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
                store_tile(scale_tile(total, scale), s_t, j * lanes + lane, apart * lanes)
                if cap_score > _ZERO:
                    cap_tile(s_t, j * lanes + lane, step, lanes, cap_score)
                raise_admitted(m, s_t, masks, lanes, lane, span, j, j + step)


@kernel()
def _attend(
    qkv: F32, width: int, n_tokens: int, pieces: I64, q_slots: int, height: int, value_height: int, group: I64, scale: np.float32,
    cap_score: np.float32, sink: F32, first_range: I64, ranges: I64, t0: int, kv_base: int, cap: int, k_cache: F32, v_cache: F32,
    lane0: int, n_lanes: int, work: F32, masks: I32, sums: F32, context: F32, m_out: F32, denom_out: F32, fmt: int,
) -> np.int32:  # fmt: skip
    """One task: lanes lane0 to lane0 + n_lanes of one sequence and group of query heads."""
    of_token, first_slot = group[2], group[1]
    first_head = group[0] * q_slots + first_slot
    lanes = (n_lanes + WIDTH - 1) // WIDTH * WIDTH
    first_key, last_key = key_span(first_range, ranges, t0 + lane0 // of_token, t0 + (lane0 + n_lanes - 1) // of_token + 1)
    span = last_key - first_key
    admit(masks, span, first_key, first_range, ranges, t0, lane0, n_lanes, of_token)
    # Scratch, as in `mesh_attention`: queries, outputs, values, denominators, maxima, scores.
    outputs = height * lanes
    values = outputs + value_height * lanes
    scores = values + KEYS * value_height + 2 * lanes
    denom = work[scores - 2 * lanes : scores - lanes]
    m = work[scores - lanes : scores]
    s_t = work[scores:]
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
    _score(pieces, scale, cap_score, first_key, span, kv_base, cap, k_cache, lanes, work, masks, m, s_t)
    for n in range(lanes):
        m[n] = m[n] + _ZERO  # -0 would depend on which zero came first
    top = round_to(m[:n_lanes], fmt)
    if sink.shape[0] > 0:
        for n in range(n_lanes):
            denom[n] = exp32(sink[first_head + (lane0 + n) % of_token] - m[n])
        top = max(top, round_to(denom[:n_lanes], fmt))
    for begin in range(0, span, KEYS):
        end = min(begin + KEYS, span)
        if not any_admits(masks, 0, lanes // WIDTH, span, begin, end):
            continue
        top = max(top, _weigh(denom, s_t, m, masks, lanes, n_lanes, span, begin, end, fmt))
        for c in range(pieces.shape[0]):
            for j in range(begin, end):
                at = kv_base + (cap * pieces[c, 0] + (first_key + j) * pieces[c, 1] + pieces[c, 2]) * 2
                to = values + (j - begin) * value_height + 2 * pieces[c, 3]
                for f in range(2 * pieces[c, 7]):
                    work[to + f] = v_cache[at + f]
        top = max(top, _accumulate(work, masks, outputs, values, scores, value_height, lanes, span, begin, end, fmt, sums))
    for lane in range(0, lanes, WIDTH):
        for f in range(0, value_height, ROWS):
            of = outputs + f * lanes + lane
            store_tile(divide_tile(load_tile(work, of, lanes), denom, lane), work, of, lanes)
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
    return top


@kernel(driver=True)
def _mesh_attention_rounded(
    part: int, n_parts: int, largest: I32, qkv: F32, unit_starts: I64, q_slots: int, groups: I64, head_dim: int, scale: np.float32,
    cap_score: np.float32, sink: F32, first_range: I64, ranges: I64, t0: I64, nt: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32, fmt: int,
) -> None:  # fmt: skip
    """One part of `mesh_attention_rounded`: every n-th task, for late queries see more keys."""
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
    work, masks, sums = np.empty(size, np.float32), np.empty(words, np.int32), np.empty(ROWS * WIDTH, np.float32)
    task = 0
    for s in range(nt.shape[0]):
        for lane0 in range(0, nt[s] * most, LANES):
            for g in range(groups.shape[0]):
                n_lanes, head = min(LANES, nt[s] * groups[g, 2] - lane0), groups[g, 0]
                if n_lanes > 0 and task % n_parts == part:
                    top = _attend(
                        qkv, width, n_tokens, pieces[first_piece[head] : first_piece[head + 1]], q_slots, height, value_height, groups[g],
                        scale, cap_score, sink, first_range, ranges, t0[s], kv_base[s], cap[s],
                        k_cache, v_cache, lane0, n_lanes, work, masks, sums, context, m_out, denom_out, fmt,
                    )  # fmt: skip
                    largest[part] = max(largest[part], top)
                task += n_lanes > 0


_driver = Driver(_mesh_attention_rounded)


def mesh_attention_rounded(
    qkv: F32, unit_starts: I64, q_slots: int, groups: I64, head_dim: int, scale: np.float32, cap_score: np.float32, sink: F32,
    first_range: I64, ranges: I64, t0: I64, nt: I64, kv_base: I64, cap: I64, k_cache: F32, v_cache: F32,
    context: F32, m_out: F32, denom_out: F32, fmt: int,
) -> int:  # fmt: skip
    """`mesh_attention` with a softmax of 16 bits, in parallel over sequences, groups of query heads and tiles of queries.

    Parameters
    ----------
    qkv, unit_starts, q_slots, groups, head_dim, scale, cap_score, sink, first_range, ranges, t0, nt, kv_base, cap
        As `wse_kernels.attention_mesh.mesh_attention` takes them.
    k_cache, v_cache, context, m_out, denom_out
        Likewise.
    fmt : int
        `TO_BF16`, `TO_F16` or `TO_CB16` of `wse_kernels.storage`.

    Returns
    -------
    int
        Bits, as int32, of the largest finite magnitude that was rounded: where the format has no such number, it became an infinity.
    """
    largest = np.zeros(n_threads(), np.int32)
    admitted = int((ranges[:, 1] - ranges[:, 0]).sum())
    _driver(
        admitted * head_dim // 2 * int(groups[:, 2].sum()), largest, qkv, unit_starts, q_slots, groups, head_dim, scale, cap_score, sink,
        first_range, ranges, t0, nt, kv_base, cap, k_cache, v_cache, context, m_out, denom_out, fmt,
    )  # fmt: skip
    return int(largest.max())

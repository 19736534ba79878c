"""RMSNorm of every head's queries and keys, for models that normalise heads: what one core does, and the driver for a whole mesh.

A core's block of the projections is ``(t, n_units * (q_slots + 2) * 2)``: for every pair unit ``q_slots`` query slots, the key, the value,
two elements each. It holds several whole heads, or a slice of one. The sum of squares of a head has one order: on a core over ascending
pair units (element 0, then 1) with fma from +0; where a head is cut, the cores' sums are chained from west to east.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.fma import fma
from wse_kernels.threads import Driver, Runner, at_once

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_ZERO = np.float32(0.0)
_MINUS_ZERO = np.float32(-0.0)
_ONE = np.float32(1.0)


@kernel()
def head_squares(qkv: F32, q_slots: int, ss: F32) -> None:
    """Sum of squares of every query head and key on this core.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        This core's block, not yet rotated.
    q_slots : int
        Query heads for each key/value head.
    ss : ndarray, (t, n_heads * (q_slots + 1)), float32
        Written: key/value head by key/value head its query slots, then its key. The core's units are divided evenly among its heads.
    """
    slots = q_slots + 1
    n_heads = ss.shape[1] // slots
    units = qkv.shape[1] // (2 * (q_slots + 2)) // n_heads
    for i in range(ss.shape[0]):
        for head in range(n_heads):
            for s in range(slots):
                total = _ZERO
                for u in range(head * units, (head + 1) * units):
                    j = (u * (q_slots + 2) + s) * 2
                    total = fma(qkv[i, j], qkv[i, j], total)
                    total = fma(qkv[i, j + 1], qkv[i, j + 1], total)
                ss[i, head * slots + s] = total


@kernel()
def head_scale(qkv: F32, total: F32, q_weight: F32, k_weight: F32, q_slots: int, size: np.float32, eps: np.float32) -> None:
    """``x = (x * (1 / sqrt(total / size + eps))) * weight`` for the queries and keys on this core, every operation rounded to float32.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        This core's block, read and written; values stay as they are.
    total : ndarray, (t, n_heads * (q_slots + 1)), float32
        Sums of squares of whole heads, in the order of `head_squares`.
    q_weight, k_weight : ndarray, (1, units of a head on this core * 2), float32
        In the order of the pair units.
    q_slots : int
    size, eps : float32
        Elements of a head; guard against a zero head.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4; Henry et al., "Query-Key Normalization for Transformers",
    2020.
    """
    slots = q_slots + 1
    units = q_weight.shape[1] // 2
    for i in range(total.shape[0]):
        for n in range(total.shape[1]):
            head, s = n // slots, n % slots
            r = _ONE / np.sqrt(total[i, n] / size + eps)
            for u in range(units):
                j = ((head * units + u) * (q_slots + 2) + s) * 2
                for e in range(2):
                    w = k_weight[0, 2 * u + e] if s == q_slots else q_weight[0, 2 * u + e]
                    qkv[i, j + e] = (qkv[i, j + e] * r) * w


@kernel()
def head_scale_plain(qkv: F32, total: F32, q_slots: int, size: np.float32, eps: np.float32) -> None:
    """`head_scale` without weights: ``x = x * (1 / sqrt(total / size + eps))``.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        This core's block, read and written; values stay as they are.
    total : ndarray, (t, n_heads * (q_slots + 1)), float32
        Sums of squares of whole heads, in the order of `head_squares`; the core's units are divided evenly among its heads.
    q_slots : int
    size, eps : float32
        Elements of a head; guard against a zero head.
    """
    slots = q_slots + 1
    units = qkv.shape[1] // (2 * (q_slots + 2)) // (total.shape[1] // slots)
    for i in range(total.shape[0]):
        for n in range(total.shape[1]):
            head, s = n // slots, n % slots
            r = _ONE / np.sqrt(total[i, n] / size + eps)
            for u in range(units):
                j = ((head * units + u) * (q_slots + 2) + s) * 2
                qkv[i, j] = qkv[i, j] * r
                qkv[i, j + 1] = qkv[i, j + 1] * r


@helper
def _place_of(n_tokens: int, i: int, unit_starts: I64, col: int, unit: int) -> int:
    """Units before one of a token, in the panel of a column and in all panels before it."""
    first: int = unit_starts[col]
    units: int = unit_starts[col + 1] - first
    return n_tokens * first + i * units + unit - first


@helper
def _norm_token(
    qkv: F32, n_tokens: int, i: int, unit_starts: I64, q_slots: int, half: int, q_weight: F32, k_weight: F32, size: np.float32,
    eps: np.float32,
) -> None:  # fmt: skip
    """All heads of one token, over the columns that hold them."""
    width = 2 * (q_slots + 2)
    c = 0
    for head in range(unit_starts[-1] // half):
        begin, end = head * half, (head + 1) * half
        while unit_starts[c + 1] <= begin:
            c += 1
        for s in range(q_slots + 1):
            # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own.
            total, unit, col = _MINUS_ZERO, begin, c
            while unit < end:
                stop = min(end, unit_starts[col + 1])
                p = _ZERO
                j = _place_of(n_tokens, i, unit_starts, col, unit) * width + 2 * s
                for _ in range(unit, stop):
                    p = fma(qkv[j], qkv[j], p)
                    p = fma(qkv[j + 1], qkv[j + 1], p)
                    j += width
                if unit < stop:
                    total = total + p
                unit = stop
                col += 1
            r = _ONE / np.sqrt(total / size + eps)
            weight = k_weight if s == q_slots else q_weight
            unit, col = begin, c
            while unit < end:
                stop = min(end, unit_starts[col + 1])
                j = _place_of(n_tokens, i, unit_starts, col, unit) * width + 2 * s
                for u in range(unit - begin, stop - begin):
                    qkv[j] = (qkv[j] * r) * weight[2 * u]
                    qkv[j + 1] = (qkv[j + 1] * r) * weight[2 * u + 1]
                    j += width
                unit = stop
                col += 1


@kernel(driver=True)
def _mesh_head_norm(
    part: int, n_parts: int,
    qkv: F32, n_tokens: int, unit_starts: I64, q_slots: int, half: int, q_weight: F32, k_weight: F32, size: np.float32, eps: np.float32,
) -> None:  # fmt: skip
    """One part of `mesh_head_norm`: its tokens."""
    for i in range(part * n_tokens // n_parts, (part + 1) * n_tokens // n_parts):
        _norm_token(qkv, n_tokens, i, unit_starts, q_slots, half, q_weight, k_weight, size, eps)


_driver = Driver(_mesh_head_norm)


def mesh_head_norm(
    qkv: F32, n_tokens: int, unit_starts: I64, q_slots: int, half: int, q_weight: F32, k_weight: F32, size: np.float32, eps: np.float32,
    *, run: Runner = at_once,
) -> None:  # fmt: skip
    """`head_squares`, the chains, and `head_scale` for a whole mesh, parallel over tokens: the same bits.

    Parameters
    ----------
    qkv : ndarray, (n_tokens * n_units * (q_slots + 2) * 2,), float32
        Column-panel-major projections, read and written.
    n_tokens : int
    unit_starts : ndarray, (n_cols + 1,), int64
        First pair unit of each column, counted over all key/value heads; the last entry is their number.
    q_slots, half : int
        Query heads for each key/value head; pair units of a head.
    q_weight, k_weight : ndarray, (2 * half,), float32
        In the order of the pair units.
    size, eps : float32
        Elements of a head; guard against a zero head.
    run : callable
        How the driver is called.
    """
    run(_driver, qkv.shape[0], qkv, n_tokens, unit_starts, q_slots, half, q_weight, k_weight, size, eps)

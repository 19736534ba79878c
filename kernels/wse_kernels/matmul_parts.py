"""What the drivers of matrix products share: a few rows times weight tiles, and finished blocks written to their owners."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper
from wse_kernels.fma import fma
from wse_kernels.matmul_tile import THIN_COLS, fma_step, load_thin, store_tile

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

WEIGHT_TILE_COLS = 128
"""Columns of one tile of a weight matrix at rest: each tile is one C-contiguous ``(n_in, <= WEIGHT_TILE_COLS)`` block."""

STREAMS = 4
"""Weight tiles that a product of a few rows reads side by side: memory delivers several streams faster than one."""

_THIN_BLOCK = 2
"""Rows of a weight tile that it reads before it turns to the next tile."""

GROUPS_PER_THREAD = 4
"""Groups of weight tiles for every thread, at least: the last one of a thread keeps nobody waiting for long."""


@helper
def write_strip(
    t: F32, i0: int, i1: int, j0: int, j1: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, combine: bool,
) -> None:  # fmt: skip
    """Write the block `t` as rows i0 to i1 and columns j0 to j1 of the output, into the panels of their owners."""
    lo, hi = 0, out_starts.shape[0] - 1  # out_starts[lo] <= j0 < out_starts[hi]
    while hi - lo > 1:
        mid = (lo + hi) // 2
        if out_starts[mid] <= j0:
            lo = mid
        else:
            hi = mid
    j = j0
    while j < j1:
        begin, end = out_starts[lo], out_starts[lo + 1]
        n = min(j1, end) - j
        for i in range(i1 - i0):
            to = n_out_rows * begin + out_rows[i0 + i] * (end - begin) + j - begin
            if combine:
                s = scale[i0 + i]
                for q in range(n):
                    out[to + q] = fma(s, t[i, j - j0 + q], out[to + q])
            else:
                for q in range(n):
                    out[to + q] = t[i, j - j0 + q]
        j += n
        lo += 1


@helper
def thin_tiles(x: F32, n_x_rows: int, k_starts: I64, rows: I64, w: F32, w0: int, n_in: int, n: int, p: F32, total: F32) -> None:
    """A few rows times the weight tiles from ``w[w0]`` on, n columns in all, chained over all wafer columns; to `total`, -0.0 beyond.

    Tiles are read side by side, each once and in the order in which it lies. `p` is scratch: the partials of the wafer column at work.
    """
    m = rows.shape[0]
    for i in range(m):
        for j in range(total.shape[1]):
            total[i, j] = np.float32(-0.0)
    for c in range(k_starts.shape[0] - 1):
        k0, k1 = k_starts[c], k_starts[c + 1]
        if k0 == k1:
            continue
        for i in range(m):
            for j in range(n):
                p[i, j] = np.float32(0.0)
        for first in range(k0, k1, _THIN_BLOCK):
            n_k = min(_THIN_BLOCK, k1 - first)
            for j0 in range(0, n, WEIGHT_TILE_COLS):
                width = min(WEIGHT_TILE_COLS, n - j0)
                tile = w0 + j0 * n_in + first * width
                for i in range(m):
                    x0, p0 = n_x_rows * k0 + rows[i] * (k1 - k0) + first - k0, i * p.shape[1] + j0
                    for j in range(0, width - THIN_COLS + 1, THIN_COLS):
                        acc = load_thin(p, p0 + j)
                        for k in range(n_k):
                            acc = fma_step(acc, x, x0 + k, w, tile + k * width + j)
                        store_tile(acc, p, p0 + j)
                    if width % THIN_COLS:
                        _thin_rest(x, x0, n_k, w, tile, width, p[i], j0)
        for i in range(m):
            for j in range(n):
                total[i, j] = total[i, j] + p[i, j]


@helper
def _thin_rest(x: F32, x0: int, n_k: int, w: F32, w0: int, width: int, p: F32, p0: int) -> None:
    """Columns of a weight tile that fill no thin tile."""
    for k in range(n_k):
        a = x[x0 + k]
        for j in range(width // THIN_COLS * THIN_COLS, width):
            p[p0 + j] = fma(a, w[w0 + k * width + j], p[p0 + j])

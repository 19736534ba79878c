"""Matrix products whose totals are rounded to a format of 16 bits where a wafer column hands them on to the next.

As in `wse_kernels.matmul`, the core of wafer column c sums its own k ascending, with fma, from +0.0: ``p_c``. Along the row, from the first
column that has any k, ``acc = p``, then for each further one ``acc = round16(acc) + p_c``: what comes in has 16 bits, and the sum with the
core's own partial is float32. So what the last column has was rounded to float32 only; one column rounds nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.ffn import geglu_into, swiglu_into
from wse_kernels.matmul import COMBINE, GEGLU, SWIGLU, group_columns, pack_rows, pack_strips
from wse_kernels.matmul_parts import WEIGHT_TILE_COLS, write_strip
from wse_kernels.matmul_tile import COLS, ROWS, fma_step, read_only, store_tile, zero_tile
from wse_kernels.storage import round_to
from wse_kernels.threads import Driver, n_threads
from wse_kernels.tickets import new_tickets, take_ticket

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_PACKED_BLOCKS = 4
"""With this many row blocks the strips of a weight tile are copied before they are used."""


@helper
def _chain_rounded(a: F32, n_blocks: int, w: F32, w0: int, stride: int, k_starts: I64, fmt: int, t: F32, p: F32) -> np.int32:
    """All wafer columns of the strip of weights at ``w[w0]``, rows `stride` apart, for all packed row blocks; to `t`.

    `p` is scratch: the partials of the wafer column at work. Returns the bits of the largest finite magnitude that was handed on.
    """
    n_cols = k_starts.shape[0] - 1
    largest = np.int32(0)
    first = True
    for c in range(n_cols):
        if k_starts[c] == k_starts[c + 1]:
            continue
        for r in range(n_blocks):
            tile = zero_tile()
            for k in range(k_starts[c], k_starts[c + 1]):
                tile = fma_step(tile, a, (r * k_starts[n_cols] + k) * ROWS, w, w0 + k * stride)
            store_tile(tile, p, r * ROWS * COLS)
        if first:
            for i in range(t.shape[0]):
                t[i] = p[i]
            first = False
        else:
            largest = max(largest, round_to(t, fmt))
            for i in range(t.shape[0]):
                t[i] = t[i] + p[i]
    return largest


@kernel(driver=True)
def _mesh_matmul_rounded(
    part: int, n_parts: int, tickets: I64, largest: I32, x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, fmt: int,
) -> None:  # fmt: skip
    """One part of `mesh_matmul_rounded`: groups of strips by ticket."""
    m = rows.shape[0]
    n_blocks = (m + ROWS - 1) // ROWS
    a = np.empty(n_blocks * ROWS * n_in, np.float32)
    b = np.empty(WEIGHT_TILE_COLS * n_in, np.float32)
    t = np.empty((n_blocks * ROWS, COLS), np.float32)
    p = np.empty(n_blocks * ROWS * COLS, np.float32)
    h = np.empty((n_blocks * ROWS, COLS // 2), np.float32)
    pack_rows(x, n_x_rows, k_starts, rows, 0, m, np.empty(ROWS, np.int64), a)
    width = group_columns(n_out, n_parts)
    n_groups = (n_out + width - 1) // width
    group = take_ticket(tickets)
    while group < n_groups:
        first_col, last_col = group * width, min((group + 1) * width, n_out)
        tile = first_col // WEIGHT_TILE_COLS * WEIGHT_TILE_COLS
        stride = min(WEIGHT_TILE_COLS, n_out - tile)
        w0 = w_offset + tile * n_in + first_col - tile
        packed = n_blocks >= _PACKED_BLOCKS or (last_col - first_col) % COLS > 0
        if packed:
            pack_strips(w, w0, stride, last_col - first_col, n_in, b)
        for j0 in range(first_col, last_col, COLS):
            j1 = min(j0 + COLS, last_col)
            if packed:
                size = _chain_rounded(a, n_blocks, read_only(b), (j0 - first_col) * n_in, COLS, k_starts, fmt, t.reshape(-1), p)
            else:
                size = _chain_rounded(a, n_blocks, w, w0 + j0 - first_col, stride, k_starts, fmt, t.reshape(-1), p)
            largest[part] = max(largest[part], size)
            if mode == SWIGLU or mode == GEGLU:
                if mode == SWIGLU:
                    swiglu_into(t[:m], 0, h[:m])
                else:
                    geglu_into(t[:m], 0, h[:m])
                write_strip(h, 0, m, j0 // 2, j1 // 2, out, n_out_rows, out_starts, out_rows, scale, False)
            else:
                write_strip(t, 0, m, j0, j1, out, n_out_rows, out_starts, out_rows, scale, mode == COMBINE)
        group = take_ticket(tickets)


_driver = Driver(_mesh_matmul_rounded)


def mesh_matmul_rounded(
    x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, fmt: int,
) -> int:  # fmt: skip
    """`mesh_matmul` with totals that are handed on in 16 bits; parallel over outputs.

    Parameters
    ----------
    x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out, out, n_out_rows, out_starts, out_rows, scale, mode
        As `wse_kernels.matmul.mesh_matmul` takes them.
    fmt : int
        `TO_BF16`, `TO_F16` or `TO_CB16` of `wse_kernels.storage`.

    Returns
    -------
    int
        Bits, as int32, of the largest finite magnitude that was handed on: where the format has no such number, it became an infinity.

    Notes
    -----
    Shapes and indices are the caller's to check: compiled, nothing is. The result does not depend on the number of threads.
    """
    largest = np.zeros(n_threads(), np.int32)
    _driver(
        rows.shape[0] * n_in * n_out, new_tickets(), largest, x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out,
        out, n_out_rows, out_starts, out_rows, scale, mode, fmt,
    )  # fmt: skip
    return int(largest.max())

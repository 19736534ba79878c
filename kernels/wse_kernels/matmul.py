"""Matrix products of a wafer: what one core does, and the driver that does it for all cores of a launch at once.

``y = x @ w`` with the columns of `x` (and so the rows of `w`) spread over the wafer's columns. The sum over k has one order:

* the core of wafer column c sums its own k ascending, with fma, from +0.0: ``p_c``;
* the row's partials are chained from west to east: ``acc = p`` of the first column that has any k, then ``acc = acc + p_c``, rounded to
  float32; columns without k are skipped.

:func:`partial_matmul` and :func:`chain_add` are that definition, one core at a time. :func:`mesh_matmul` does the same arithmetic for the
whole mesh: partials and totals live in registers, and only the finished output is written. Same bits, by a property test.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.ffn import geglu_into, swiglu_into
from wse_kernels.fma import fma
from wse_kernels.matmul_parts import GROUPS_PER_THREAD, STREAMS, WEIGHT_TILE_COLS, thin_tiles, write_strip
from wse_kernels.matmul_tile import (
    COLS,
    ROWS,
    THIN_ROWS,
    add_tiles,
    fma_step,
    load_tile,
    read_only,
    store_tile,
    zero_tile,
)
from wse_kernels.threads import LEAVE, STAY, Runner, SharedDriver, at_once
from wse_kernels.tickets import new_tickets, pause, take_ticket, tickets_taken

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

STORE = 0
"""`mesh_matmul` writes ``out[out_rows[i], j] = acc``."""
SWIGLU = 1
"""`mesh_matmul` writes ``out[out_rows[i], f] = silu(acc[2 f]) * acc[2 f + 1]``."""
COMBINE = 2
"""`mesh_matmul` writes ``out[out_rows[i], j] = fma(scale[i], acc, out[out_rows[i], j])``."""
GEGLU = 3
"""`mesh_matmul` writes ``out[out_rows[i], f] = gelu_tanh(acc[2 f]) * acc[2 f + 1]``."""

_K_BLOCK = 2048
"""Rows of a strip of weights that stay in the CPU's second-level cache while the rows of x pass."""

_PACKED_BLOCKS = 4
"""With this many row blocks the strips of a weight tile are copied before they are used: memory then delivers whole rows of the tile, and
the cache holds a strip. In place, 64 bytes of every 512, they share an eighth of its sets."""

_BLOCKS_PER_THREAD = 16
"""With this many row blocks for every thread the rows are shared out, and each is packed once; otherwise the strips."""


@kernel()
def partial_matmul(x: F32, rows: I64, w: F32, p: F32) -> None:
    """One core's partial product of the rows it selects with the chunk of weights it was sent.

    Parameters
    ----------
    x : ndarray, (n_rows, k), float32
        The core's block of the input.
    rows : ndarray, (m,), int64
        Rows of `x` to use, local to the core.
    w : ndarray, (k, n), float32
        The core's slab of the chunk.
    p : ndarray, (m, n), float32
        Written: ``p[i, j]`` is the sum of ``x[rows[i], k] * w[k, j]`` over ascending k, one fma a step, from +0.0.
    """
    for i in range(rows.shape[0]):
        r = rows[i]
        for j in range(w.shape[1]):
            p[i, j] = np.float32(0.0)
        for k in range(w.shape[0]):
            a = x[r, k]
            for j in range(w.shape[1]):
                p[i, j] = fma(a, w[k, j], p[i, j])


@kernel()
def chain_add(acc: F32, p: F32) -> None:
    """Add a core's partial to the total that came from the west: ``acc = acc + p``.

    Parameters
    ----------
    acc : ndarray, (m, n), float32
        Read and written.
    p : ndarray, (m, n), float32
        The core's own partial.
    """
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            acc[i, j] = acc[i, j] + p[i, j]


@helper
def _chain_tile(a: F32, a0: int, w: F32, w0: int, stride: int, k_starts: I64, c0: int, c1: int, t: F32, t0: int) -> None:
    """Wafer columns c0 to c1 of one register tile; the chain's total comes from, and goes to, element t0 of `t`."""
    total = load_tile(t, t0)
    for c in range(c0, c1):
        if k_starts[c] < k_starts[c + 1]:
            p = zero_tile()
            for k in range(k_starts[c], k_starts[c + 1]):
                p = fma_step(p, a, a0 + k * ROWS, w, w0 + k * stride)
            total = add_tiles(total, p)
    store_tile(total, t, t0)


@helper
def _chain_strip(a: F32, r0: int, r1: int, w: F32, w0: int, stride: int, k_starts: I64, t: F32) -> None:
    """All wafer columns of the strip of weights at ``w[w0]``, rows `stride` apart, for the packed row blocks r0 to r1; to `t`."""
    n_cols = k_starts.shape[0] - 1
    # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own.
    for i in range((r1 - r0) * ROWS):
        for j in range(COLS):
            t[i, j] = np.float32(-0.0)
    c0 = 0
    while c0 < n_cols:
        c1 = c0 + 1
        while c1 < n_cols and k_starts[c1 + 1] - k_starts[c0] <= _K_BLOCK:
            c1 += 1
        for r in range(r0, r1):
            _chain_tile(a, r * ROWS * k_starts[n_cols], w, w0, stride, k_starts, c0, c1, t, (r - r0) * ROWS * COLS)
        c0 = c1


@helper
def pack_rows(x: F32, n_x_rows: int, k_starts: I64, rows: I64, i0: int, i1: int, starts: I64, a: F32) -> None:
    """Copy the chosen rows i0 to i1 of x to `a` as (blocks, k, ROWS), the last one again where a block is not full; `starts` is scratch."""
    n_cols = k_starts.shape[0] - 1
    for c in range(n_cols):
        k_c = k_starts[c + 1] - k_starts[c]
        for i in range(i0, i1, ROWS):
            for r in range(ROWS):
                starts[r] = n_x_rows * k_starts[c] + rows[min(i + r, i1 - 1)] * k_c
            q = (i - i0) * k_starts[n_cols] + k_starts[c] * ROWS
            for k in range(k_c):
                for r in range(ROWS):
                    a[q + r] = x[starts[r] + k]
                q += ROWS


@helper
def pack_strips(w: F32, w0: int, stride: int, n: int, n_in: int, b: F32) -> None:
    """Copy n adjacent columns of a weight tile to `b` as (strips, n_in, COLS), the last strip filled up with zeros."""
    n_full = n // COLS
    for k in range(n_in):
        for s in range(n_full):
            to, at = (s * n_in + k) * COLS, w0 + k * stride + s * COLS
            for j in range(COLS):
                b[to + j] = w[at + j]
    if n % COLS:
        for k in range(n_in):
            to, at = (n_full * n_in + k) * COLS, w0 + k * stride + n_full * COLS
            for j in range(COLS):
                b[to + j] = w[at + j] if j < n % COLS else np.float32(0.0)


@helper
def _thin_matmul(
    role: int, n_threads: int, progress: I64, tickets: I64, x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, p: F32, t: F32, h: F32,
) -> None:  # fmt: skip
    """`mesh_matmul` for a few rows: groups of weight tiles, each read once for every row; `p`, `t` and `h` are scratch."""
    n_tiles = (n_out + WEIGHT_TILE_COLS - 1) // WEIGHT_TILE_COLS
    n_groups = (n_tiles + STREAMS - 1) // STREAMS
    if n_threads > 1:
        n_groups = max(n_groups, min(n_tiles, GROUPS_PER_THREAD * n_threads))
    progress[1] = n_groups
    mine, group = 1, take_ticket(tickets)
    while group < n_groups:
        j0 = n_tiles * group // n_groups * WEIGHT_TILE_COLS
        j1 = min(n_tiles * (group + 1) // n_groups * WEIGHT_TILE_COLS, n_out)
        thin_tiles(x, n_x_rows, k_starts, rows, w, w_offset + j0 * n_in, n_in, j1 - j0, p, t)
        block = t
        if mode in (SWIGLU, GEGLU):
            if mode == SWIGLU:
                swiglu_into(t, 0, h)
            else:
                geglu_into(t, 0, h)
            block, j0, j1 = h, j0 // 2, j1 // 2
        write_strip(block, 0, rows.shape[0], j0, j1, out, n_out_rows, out_starts, out_rows, scale, mode == COMBINE)
        take_ticket(progress)
        if role == LEAVE and tickets_taken(tickets) > mine:
            return
        mine, group = mine + 1, take_ticket(tickets)


@helper
def group_columns(n_out: int, n_threads: int) -> int:
    """Columns that a thread takes at a time: a weight tile, or an equal part of it that is whole strips, for threads to take turns."""
    width = WEIGHT_TILE_COLS
    while n_threads > 1 and width > COLS and n_out < GROUPS_PER_THREAD * n_threads * width:
        width //= 2
    return width


@helper
def _columns(
    a: F32, n_blocks: int, i0: int, i1: int, first_col: int, last_col: int, k_starts: I64, w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, packed: bool, b: F32, t: F32, h: F32,
) -> None:  # fmt: skip
    """Packed rows i0 to i1 times some columns of one weight tile; `b`, `t` and `h` are scratch."""
    tile = first_col // WEIGHT_TILE_COLS * WEIGHT_TILE_COLS
    stride = min(WEIGHT_TILE_COLS, n_out - tile)
    w0 = w_offset + tile * n_in + first_col - tile
    if packed:
        pack_strips(w, w0, stride, last_col - first_col, n_in, b)
    for j0 in range(first_col, last_col, COLS):
        j1 = min(j0 + COLS, last_col)
        if packed:
            _chain_strip(a, 0, n_blocks, read_only(b), (j0 - first_col) * n_in, COLS, k_starts, t)
        else:
            _chain_strip(a, 0, n_blocks, w, w0 + j0 - first_col, stride, k_starts, t)
        if mode == SWIGLU or mode == GEGLU:
            if mode == SWIGLU:
                swiglu_into(t[: i1 - i0], 0, h[: i1 - i0])
            else:
                geglu_into(t[: i1 - i0], 0, h[: i1 - i0])
            write_strip(h, i0, i1, j0 // 2, j1 // 2, out, n_out_rows, out_starts, out_rows, scale, False)
        else:
            write_strip(t, i0, i1, j0, j1, out, n_out_rows, out_starts, out_rows, scale, mode == COMBINE)


@helper
def _thick_matmul(
    role: int, n_threads: int, progress: I64, tickets: I64, x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, a: F32, b: F32, t: F32, h: F32, starts: I64,
) -> None:  # fmt: skip
    """`mesh_matmul` for many rows, which are packed: a piece of them with all columns for each thread, or all of them with some columns.

    `a`, `b`, `t`, `h` and `starts` are scratch.
    """
    n_blocks = (rows.shape[0] + ROWS - 1) // ROWS
    width = group_columns(n_out, n_threads)
    n_groups = (n_out + width - 1) // width
    share_rows = n_blocks >= _BLOCKS_PER_THREAD * n_threads
    n_pieces = n_threads if share_rows else n_groups
    progress[1] = n_pieces
    mine, piece = 1, take_ticket(tickets)
    first, last = 0, n_blocks
    while piece < n_pieces:
        if share_rows:
            first, last = piece * n_blocks // n_threads, (piece + 1) * n_blocks // n_threads
        i0, i1 = first * ROWS, min(rows.shape[0], last * ROWS)
        if share_rows or mine == 1:
            pack_rows(x, n_x_rows, k_starts, rows, i0, i1, starts, a)
        for group in range(0 if share_rows else piece, n_groups if share_rows else piece + 1):
            j0, j1 = group * width, min((group + 1) * width, n_out)
            packed = n_blocks >= _PACKED_BLOCKS or (j1 - j0) % COLS > 0
            _columns(
                a, last - first, i0, i1, j0, j1, k_starts, w, w_offset, n_in, n_out, out, n_out_rows, out_starts, out_rows, scale, mode,
                packed, b, t, h,
            )  # fmt: skip
        take_ticket(progress)
        if role == LEAVE and tickets_taken(tickets) > mine:
            return
        mine, piece = mine + 1, take_ticket(tickets)


@kernel(driver=True)
def _mesh_matmul(
    role: int, n_threads: int, progress: I64, tickets: I64, x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int,
) -> None:  # fmt: skip
    """One thread's share of `mesh_matmul`, taken by tickets (see `SharedDriver`)."""
    m = rows.shape[0]
    if m <= THIN_ROWS:
        width = STREAMS * WEIGHT_TILE_COLS
        _thin_matmul(
            role, n_threads, progress, tickets, x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out,
            out, n_out_rows, out_starts, out_rows, scale, mode,
            np.empty((m, width), np.float32), np.empty((m, width), np.float32), np.empty((m, width // 2), np.float32),
        )  # fmt: skip
    else:
        n_blocks = (m + ROWS - 1) // ROWS
        if n_blocks >= _BLOCKS_PER_THREAD * n_threads:
            n_blocks = (n_blocks + n_threads - 1) // n_threads
        n_rows = n_blocks * ROWS
        _thick_matmul(
            role, n_threads, progress, tickets, x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out,
            out, n_out_rows, out_starts, out_rows, scale, mode,
            np.empty(n_rows * n_in, np.float32), np.empty(WEIGHT_TILE_COLS * n_in, np.float32), np.empty((n_rows, COLS), np.float32),
            np.empty((n_rows, COLS // 2), np.float32), np.empty(ROWS, np.int64),
        )  # fmt: skip
    if role == STAY:
        while tickets_taken(progress) < progress[1]:
            pause()


_driver = SharedDriver(_mesh_matmul)


def mesh_matmul(
    x: F32, n_x_rows: int, k_starts: I64, rows: I64,
    w: F32, w_offset: int, n_in: int, n_out: int,
    out: F32, n_out_rows: int, out_starts: I64, out_rows: I64, scale: F32, mode: int, *, run: Runner = at_once,
) -> None:  # fmt: skip
    """Product of chosen rows of a placed tensor with a weight matrix, chained over the wafer's columns; parallel over outputs.

    Parameters
    ----------
    x : ndarray, (n_x_rows * n_in,), float32
        Placed input, column-panel-major: wafer column c holds ``x[n_x_rows * k_starts[c] :]`` viewed as ``(n_x_rows, k_c)``.
    n_x_rows : int
        Rows of the placed input.
    k_starts : ndarray, (n_cols + 1,), int64
        Split of the `n_in` features over the wafer's columns; ascending from 0 to `n_in`, empty columns allowed.
    rows : ndarray, (m,), int64
        Rows of `x` to use, the same in every column.
    w : ndarray, float32, read-only
        Tiled weights: from ``w[w_offset]`` on, tile t is a C-contiguous ``(n_in, min(128, n_out - 128 t))`` block.
    w_offset, n_in, n_out : int
        First element of the matrix in `w`, and its shape.
    out : ndarray, flat, float32
        Placed output with `n_out_rows` rows; its columns, `n_out` of them (half with `SWIGLU` and `GEGLU`), are split by `out_starts`.
    n_out_rows : int
        Rows of the placed output.
    out_starts : ndarray, (n_out_cols + 1,), int64
        Split of the output's columns; empty ones allowed.
    out_rows : ndarray, (m,), int64
        Row of `out` that each product goes to; no row twice.
    scale : ndarray, (m,), float32
        Factor of each row, read with `COMBINE` only.
    mode : int
        `STORE`, `SWIGLU` or `GEGLU` (gate and up projection in alternate columns; `n_out` even) or `COMBINE`.
    run : callable
        How the driver is called.

    Notes
    -----
    Shapes and indices are the caller's to check: compiled, nothing is. The result does not depend on the number of threads.
    """
    units = rows.shape[0] * n_in * n_out
    run(
        _driver, units, new_tickets(), x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out,
        out, n_out_rows, out_starts, out_rows, scale, mode,
    )  # fmt: skip

"""The chosen experts of a few tokens, all of them in one driver: while it decodes, a model waits for their weights and for little else.

Expert by expert the threads would be woken twice for each, for less work than waking them takes. Here they take groups of weight tiles
of all gate and up projections, meet, and take groups of columns of the output, for which each adds the experts in ascending order. The
sums are those of `mesh_matmul`, number by number; a test holds them to the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.ffn import geglu_into, swiglu_into
from wse_kernels.matmul import SWIGLU
from wse_kernels.matmul_parts import GROUPS_PER_THREAD, STREAMS, WEIGHT_TILE_COLS, thin_tiles, write_strip
from wse_kernels.threads import LEAVE, STAY, Runner, SharedDriver, at_once
from wse_kernels.tickets import new_tickets, pause, take_ticket, tickets_taken

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Tiles = tuple[F32, F32, F32, F32, F32, F32, F32, F32]

AT_ONCE = 8
"""Experts of one call of the driver: one compiled specialisation for any number up to this."""

FEW_TOKENS = 2
"""Tokens up to which it is meant: their rows go one by one, which suits products that wait for their weights."""


@kernel(driver=True)
def _mesh_experts(
    role: int, n_threads: int, progress: I64, gates: I64, gated: I64, downs: I64,
    x: F32, n_x_rows: int, k_starts: I64, starts: I64, rows: I64, scale: F32,
    gate_up: Tiles, down: Tiles, n_in: int, width: int, mode: int,
    hidden: F32, hidden_starts: I64, places: I64, out: F32, n_out_rows: int, out_starts: I64, n_out: int,
) -> None:  # fmt: skip
    """One thread's share of `mesh_experts`, by tickets; the rows of `hidden` lie expert by expert, compacted."""
    n_experts = starts.shape[0] - 1
    most = places.shape[0]
    p = np.empty((most, STREAMS * WEIGHT_TILE_COLS), np.float32)
    t = np.empty((most, STREAMS * WEIGHT_TILE_COLS), np.float32)
    h = np.empty((most, STREAMS * WEIGHT_TILE_COLS // 2), np.float32)
    n_out_tiles = (n_out + WEIGHT_TILE_COLS - 1) // WEIGHT_TILE_COLS
    n_out_groups = (n_out_tiles + STREAMS - 1) // STREAMS
    if n_threads > 1:
        n_out_groups = max(n_out_groups, min(n_out_tiles, GROUPS_PER_THREAD * n_threads))
    progress[1] = n_out_groups
    n_tiles = (2 * width + WEIGHT_TILE_COLS - 1) // WEIGHT_TILE_COLS
    per_expert = (n_tiles + STREAMS - 1) // STREAMS
    if n_threads > 1:
        per_expert = max(per_expert, min(n_tiles, (GROUPS_PER_THREAD * n_threads + n_experts - 1) // n_experts))
    n_groups = n_experts * per_expert
    mine, number = 1, take_ticket(gates)
    while number < n_groups:
        expert, group = number // per_expert, number % per_expert
        j0 = n_tiles * group // per_expert * WEIGHT_TILE_COLS
        j1 = min(n_tiles * (group + 1) // per_expert * WEIGHT_TILE_COLS, 2 * width)
        i0, i1 = starts[expert], starts[expert + 1]
        m = i1 - i0
        thin_tiles(x, n_x_rows, k_starts, rows[i0:i1], gate_up[expert], j0 * n_in, n_in, j1 - j0, p[:m], t[:m])
        if mode == SWIGLU:
            swiglu_into(t[:m], 0, h[:m])
        else:
            geglu_into(t[:m], 0, h[:m])
        write_strip(h, 0, m, j0 // 2, j1 // 2, hidden[i0 * width :], m, hidden_starts, places, scale, False)
        take_ticket(gated)
        if role == LEAVE and tickets_taken(gates) > mine:
            return
        mine, number = mine + 1, take_ticket(gates)
    while tickets_taken(gated) < n_groups:  # the others are at their last group
        pause()
    mine, group = 1, take_ticket(downs)
    while group < n_out_groups:
        j0 = n_out_tiles * group // n_out_groups * WEIGHT_TILE_COLS
        j1 = min(n_out_tiles * (group + 1) // n_out_groups * WEIGHT_TILE_COLS, n_out)
        for expert in range(n_experts):
            i0, i1 = starts[expert], starts[expert + 1]
            m = i1 - i0
            own = hidden[i0 * width :]
            thin_tiles(own, m, hidden_starts, places[:m], down[expert], j0 * width, width, j1 - j0, p[:m], t[:m])
            write_strip(t, 0, m, j0, j1, out, n_out_rows, out_starts, rows[i0:i1], scale[i0:i1], True)
        take_ticket(progress)
        if role == LEAVE and tickets_taken(downs) > mine:
            return
        mine, group = mine + 1, take_ticket(downs)
    if role == STAY:
        while tickets_taken(progress) < n_out_groups:
            pause()


_driver = SharedDriver(_mesh_experts)


def mesh_experts(
    x: F32, n_x_rows: int, k_starts: I64, starts: I64, rows: I64, scale: F32,
    gate_up: list[F32], down: list[F32], n_in: int, width: int, mode: int,
    hidden_starts: I64, out: F32, n_out_rows: int, out_starts: I64, n_out: int, *, run: Runner = at_once,
) -> None:  # fmt: skip
    """Add what up to `AT_ONCE` experts make of their tokens to a placed output: ``out[t] = fma(scale, ffn_e(x[t]), out[t])``, e ascending.

    Each expert is two products of `mesh_matmul`: `SWIGLU` or `GEGLU` to a hidden layer, and from there `COMBINE`.

    Parameters
    ----------
    x : ndarray, (n_x_rows * n_in,), float32
        Placed input, column-panel-major, as `mesh_matmul` takes it.
    n_x_rows, k_starts : int, (n_cols + 1,) int64
        Its rows, and the split of its `n_in` features over the wafer's columns.
    starts : ndarray, (n_experts + 1,), int64
        Entries of `rows` and `scale` at which each expert's begin.
    rows : ndarray, int64
        Rows of `x` and `out` that chose each expert, ascending.
    scale : ndarray, float32
        Their weights.
    gate_up, down : list of n_experts ndarrays, float32, read-only
        Tiled weights, (n_in, 2 * width) with gate and up in alternate columns, and (width, n_out).
    n_in, width, n_out : int
        Features of the input, of the hidden layer, and of the output.
    mode : int
        `SWIGLU` or `GEGLU`.
    hidden_starts : ndarray, (n_cols + 1,), int64
        Split of the hidden layer over the wafer's columns.
    out : ndarray, (n_out_rows * n_out,), float32
        Placed output; read and written.
    n_out_rows, out_starts : int, (n_cols + 1,) int64
        Its rows, and the split of its columns.
    run : callable
        How the driver is called.

    Notes
    -----
    Shapes and indices are the caller's to check: compiled, nothing is.
    """
    filler = AT_ONCE - (starts.size - 1)
    hidden = np.empty(rows.size * width, np.float32)
    places = np.arange(max(1, int(np.diff(starts).max(initial=0))))
    run(
        _driver, rows.size * n_in * width, new_tickets(), new_tickets(), new_tickets(), x, n_x_rows, k_starts, starts, rows, scale,
        tuple(gate_up + gate_up[-1:] * filler), tuple(down + down[-1:] * filler), n_in, width, mode,
        hidden, hidden_starts, places, out, n_out_rows, out_starts, n_out,
    )  # fmt: skip

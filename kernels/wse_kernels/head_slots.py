"""Heads side by side on one core: one head taken out of all, one or several put among all, and the rotation of all.

A block is ``(t, n_units * n_slots * 2)``: element ``e`` of slot ``s`` of pair unit ``u`` is column ``(u * n_slots + s) * 2 + e``. A slot
is a head, so a core that owns a pair unit has it of every head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.fma import fma

F32 = NDArray[np.float32]


@kernel()
def take_slot(x: F32, slot: int, out: F32) -> None:
    """Copy one slot of every pair unit of x, (t, n_units * n_slots * 2), into out, (t, n_units * 2)."""
    if out.shape[1] == 0:
        return
    n_slots = x.shape[1] // out.shape[1]
    for i in range(out.shape[0]):
        for u in range(out.shape[1] // 2):
            j = (u * n_slots + slot) * 2
            out[i, 2 * u] = x[i, j]
            out[i, 2 * u + 1] = x[i, j + 1]


@kernel()
def put_slots(x: F32, n: int, slot: int, n_slots: int, last: int, out: F32) -> None:
    """Copy all of x, a block of ``n`` slots, into slots ``slot`` to ``slot + n`` of some pair units of a block of `n_slots`.

    Parameters
    ----------
    x : ndarray, (t, n_units * n * 2), float32
    n : int
    slot : int
        First slot to write.
    n_slots : int
        Slots of `out`.
    last : int
        0: into its first `n_units` pair units; 1: into its last.
    out : ndarray, (t, any * n_slots * 2), float32
        Written there; the rest stays.
    """
    units = x.shape[1] // (2 * n)
    u0 = out.shape[1] // (2 * n_slots) - units if last else 0
    for i in range(x.shape[0]):
        for u in range(units):
            at = u * n * 2
            to = ((u0 + u) * n_slots + slot) * 2
            for j in range(2 * n):
                out[i, to + j] = x[i, at + j]


@kernel()
def rotate_slots(x: F32, cos: F32, sin: F32) -> None:
    """Rotate every slot of every pair unit of x by the token's angle, in place; the arithmetic is that of `wse_kernels.rope.rotate_qk`.

    Parameters
    ----------
    x : ndarray, (t, n_units * n_slots * 2), float32
    cos, sin : ndarray, (t, n_units), float32
    """
    n_slots = x.shape[1] // (2 * cos.shape[1])
    for i in range(cos.shape[0]):
        for u in range(cos.shape[1]):
            co = cos[i, u]
            si = sin[i, u]
            for s in range(n_slots):
                j = (u * n_slots + s) * 2
                a = x[i, j]
                b = x[i, j + 1]
                x[i, j] = fma(a, co, -(b * si))
                x[i, j + 1] = fma(b, co, a * si)

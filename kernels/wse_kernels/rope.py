"""Rotary position embedding on one core's block, in place.

A core's block of the projections ``w_qkv`` is ``(t, n_units * (q + 2) * 2)``: for every pair unit that the core owns, ``q`` query slots,
then the key, then the value, each with its two elements ``e = 0, 1``. Both halves of a rotary pair therefore lie side by side on one core,
and the rotation needs no neighbour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.fma import fma


@kernel()
def rotate_qk(qkv: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32], q_slots: int) -> None:
    """Rotate the queries and the key of every pair unit by the token's angle, in place; values stay as they are.

    ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. The product with the sine is rounded first, the product with the cosine is fused:
    ``fma(a, cos, -(b * sin))`` and ``fma(b, cos, a * sin)``, two roundings for each element.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        This core's block, read and written. Element ``e`` of slot ``s`` of unit ``u`` is column ``(u * (q_slots + 2) + s) * 2 + e``; slots
        below ``q_slots`` are queries, slot ``q_slots`` is the key, the last is the value.
    cos, sin : ndarray, (t, n_units), float32
        Of the angle ``pos * theta**(-2 u / head_dim)``, computed in float64 and rounded, for this core's tokens and units.
    q_slots : int
        Query heads for each key/value head.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.4.2; pairs are ``(u, u + head_dim/2)`` as
    in the published checkpoints.
    """
    width = (q_slots + 2) * 2
    for i in range(cos.shape[0]):
        for u in range(cos.shape[1]):
            co = cos[i, u]
            si = sin[i, u]
            for s in range(q_slots + 1):
                j = u * width + s * 2
                a = qkv[i, j]
                b = qkv[i, j + 1]
                qkv[i, j] = fma(a, co, -(b * si))
                qkv[i, j + 1] = fma(b, co, a * si)

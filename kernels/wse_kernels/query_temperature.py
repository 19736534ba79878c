"""Queries that grow with their position: what one core does to its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel

F32 = NDArray[np.float32]


@kernel()
def tune_queries(qkv: F32, factor: F32, q_slots: int) -> None:
    """``q = q * factor`` for every query on this core; keys and values stay as they are.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        Of every pair unit its queries, key and value, two elements each; read and written.
    factor : ndarray, (t, 1), float32
        Of each token.
    q_slots : int
        Query heads for each key/value head.
    """
    width = 2 * (q_slots + 2)
    for i in range(factor.shape[0]):
        f = factor[i, 0]
        for u in range(qkv.shape[1] // width):
            for j in range(u * width, u * width + 2 * q_slots):
                qkv[i, j] = qkv[i, j] * f

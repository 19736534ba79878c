"""RMSNorm of all of a token's queries together, and of all its keys, on one core's block of the projections.

The block is ``(t, n_units * (q_slots + 2) * 2)`` as in `wse_kernels.head_norm`. A sum of squares has one order: on a core over ascending
pair units, then slots, then the two elements, with fma from +0; the cores' sums are chained from west to east.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.fma import fma

F32 = NDArray[np.float32]

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@kernel()
def qk_squares(qkv: F32, q_slots: int, ss: F32) -> None:
    """Sums of squares of the queries and of the keys on this core.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
    q_slots : int
        Query heads for each key/value head.
    ss : ndarray, (t, 2), float32
        Written: of the queries, of the keys.
    """
    width = (q_slots + 2) * 2
    for i in range(ss.shape[0]):
        of_q = _ZERO
        of_k = _ZERO
        for u in range(qkv.shape[1] // width):
            for j in range(u * width, u * width + 2 * q_slots):
                of_q = fma(qkv[i, j], qkv[i, j], of_q)
            for j in range(u * width + 2 * q_slots, u * width + 2 * q_slots + 2):
                of_k = fma(qkv[i, j], qkv[i, j], of_k)
        ss[i, 0] = of_q
        ss[i, 1] = of_k


@kernel()
def qk_scale(
    qkv: F32, total: F32, q_weight: F32, k_weight: F32, q_slots: int, q_size: np.float32, k_size: np.float32, eps: np.float32
) -> None:  # fmt: skip
    """``x = (x * (1 / sqrt(total / size + eps))) * weight`` for the queries and keys on this core, every operation rounded to float32.

    Parameters
    ----------
    qkv : ndarray, (t, n_units * (q_slots + 2) * 2), float32
        Read and written; values stay as they are.
    total : ndarray, (t, 2), float32
        Sums of squares of all queries and of all keys of a token.
    q_weight : ndarray, (1, n_units * q_slots * 2), float32
        Unit by unit, slot by slot.
    k_weight : ndarray, (1, n_units * 2), float32
    q_slots : int
    q_size, k_size, eps : float32
        Elements of all queries, of all keys; guard against a zero row.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4; Muennighoff et al., "OLMoE", 2024, section 2.
    """
    width = (q_slots + 2) * 2
    for i in range(total.shape[0]):
        r_q = _ONE / np.sqrt(total[i, 0] / q_size + eps)
        r_k = _ONE / np.sqrt(total[i, 1] / k_size + eps)
        for u in range(qkv.shape[1] // width):
            for j in range(2 * q_slots):
                at = u * width + j
                qkv[i, at] = (qkv[i, at] * r_q) * q_weight[0, u * 2 * q_slots + j]
            for e in range(2):
                at = u * width + 2 * q_slots + e
                qkv[i, at] = (qkv[i, at] * r_k) * k_weight[0, 2 * u + e]

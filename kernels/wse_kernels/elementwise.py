"""What a core does to its own elements between the sums: biases, constant factors, limits, gates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.exp import sigmoid32, tanh32

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@kernel()
def add_bias(x: F32, bias: F32) -> None:
    """``x = x + bias``, x (t, n) and bias (1, n) float32, in place."""
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] = x[i, k] + bias[0, k]


@kernel()
def add_bias_to(x: F32, rows: I64, bias: F32) -> None:
    """``x[rows] = x[rows] + bias``, x (t, n) and bias (1, n) float32, rows (m,) int64, in place."""
    for i in range(rows.shape[0]):
        for k in range(x.shape[1]):
            x[rows[i], k] = x[rows[i], k] + bias[0, k]


@kernel()
def add_scaled(x: F32, y: F32, factor: np.float32) -> None:
    """``x = x + y * factor``, both (t, n) float32, in place; the product is rounded, then the sum."""
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] = x[i, k] + y[i, k] * factor


@kernel()
def clip_to(x: F32, limit: np.float32) -> None:
    """Hold every element of x, (t, n) float32, within ``-limit`` and ``limit``, in place; a NaN stays."""
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            a = x[i, k]
            a = limit if a > limit else a
            x[i, k] = -limit if a < -limit else a


@kernel()
def soft_cap(x: F32, cap: np.float32) -> None:
    """``x = cap * tanh(x / cap)``, (t, n) float32, in place; every operation rounded to float32.

    References
    ----------
    Gemma Team, "Gemma 2: Improving open language models at a practical size", 2024, section 2.
    """
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] = cap * tanh32(x[i, k] / cap)


@kernel()
def scale_by_sigmoid(x: F32, gate: F32) -> None:
    """``x = x * sigmoid(gate)``, x (t, n) and gate (t, 1) float32, in place."""
    for i in range(x.shape[0]):
        s = sigmoid32(gate[i, 0])
        for k in range(x.shape[1]):
            x[i, k] = x[i, k] * s

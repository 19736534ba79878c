"""LayerNorm in three steps, mean first and then variance, with the row's two sums chained between them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.fma import fma

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@kernel()
def sum_features(x: NDArray[np.float32], s: NDArray[np.float32]) -> None:
    """Sum over this core's features, ascending from +0.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    s : ndarray, (t, 1), float32
        Written.
    """
    for i in range(x.shape[0]):
        total = _ZERO
        for k in range(x.shape[1]):
            total = total + x[i, k]
        s[i, 0] = total


@kernel()
def sum_squared_deviations(x: NDArray[np.float32], total: NDArray[np.float32], size: np.float32, ss: NDArray[np.float32]) -> None:
    """Sum of ``(x - mean)**2`` over this core's features, a chain of fma over ascending index from +0; each difference is rounded.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    total : ndarray, (t, 1), float32
        Sum of the whole row; the mean is ``total / size``.
    size : float32
        Features of a row.
    ss : ndarray, (t, 1), float32
        Written.
    """
    for i in range(x.shape[0]):
        mean = total[i, 0] / size
        squares = _ZERO
        for k in range(x.shape[1]):
            d = x[i, k] - mean
            squares = fma(d, d, squares)
        ss[i, 0] = squares


@kernel()
def layer_scale(
    x: NDArray[np.float32],
    total: NDArray[np.float32],
    squares: NDArray[np.float32],
    weight: NDArray[np.float32],
    size: np.float32,
    eps: np.float32,
    out: NDArray[np.float32],
) -> None:
    """``out = ((x - mean) * (1 / sqrt(squares / size + eps))) * weight``, every operation rounded to float32.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    total, squares : ndarray, (t, 1), float32
        Sum of the whole row, and of its squared deviations from the mean ``total / size``.
    weight : ndarray, (1, n), float32
    size, eps : float32
        Features of a row; guard against a constant row.
    out : ndarray, (t, n), float32
        Written.

    References
    ----------
    Ba, Kiros and Hinton, "Layer normalization", 2016, equation 4.
    """
    for i in range(x.shape[0]):
        mean = total[i, 0] / size
        r = _ONE / np.sqrt(squares[i, 0] / size + eps)
        for k in range(x.shape[1]):
            out[i, k] = ((x[i, k] - mean) * r) * weight[0, k]

"""What the owner of a delivered block does with it: gate it, or add it to the tokens it belongs to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.exp import gelu_tanh32, sigmoid32, silu32
from wse_kernels.fma import fma

_ONE = np.float32(1.0)


@kernel()
def swiglu_into(y: NDArray[np.float32], first: int, h: NDArray[np.float32]) -> None:
    """``h[:, first + f] = silu(y[:, 2 f]) * y[:, 2 f + 1]`` for the gate/up pairs of a delivered chunk.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
    first : int
        Column of ``h`` of the first pair.
    h : ndarray, (>= m, >= first + n), float32
        Written there.

    References
    ----------
    Shazeer, "GLU variants improve Transformer", 2020, section 2.
    """
    for i in range(y.shape[0]):
        for f in range(y.shape[1] // 2):
            gate = y[i, 2 * f]
            h[i, first + f] = silu32(gate) * y[i, 2 * f + 1]


@kernel()
def geglu_into(y: NDArray[np.float32], first: int, h: NDArray[np.float32]) -> None:
    """``h[:, first + f] = gelu_tanh(y[:, 2 f]) * y[:, 2 f + 1]`` for the gate/up pairs of a delivered chunk.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
    first : int
        Column of ``h`` of the first pair.
    h : ndarray, (>= m, >= first + n), float32
        Written there.

    References
    ----------
    Shazeer, "GLU variants improve Transformer", 2020, section 2; Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.
    """
    for i in range(y.shape[0]):
        for f in range(y.shape[1] // 2):
            h[i, first + f] = gelu_tanh32(y[i, 2 * f]) * y[i, 2 * f + 1]


@kernel()
def clamped_glu(y: NDArray[np.float32], alpha: np.float32, limit: np.float32, h: NDArray[np.float32]) -> None:
    """``h[:, f] = (up + 1) * (gate * sigmoid(alpha * gate))``, every operation rounded.

    ``gate = min(y[:, 2 f], limit)`` and ``up = y[:, 2 f + 1]`` held within plus and minus `limit`; a NaN stays.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
    alpha, limit : float32
    h : ndarray, (m, n), float32
        Written.

    References
    ----------
    OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2025, section 2.2.
    """
    for i in range(h.shape[0]):
        for f in range(h.shape[1]):
            gate, up = y[i, 2 * f], y[i, 2 * f + 1]
            gate = limit if gate > limit else gate
            up = limit if up > limit else up
            up = -limit if up < -limit else up
            h[i, f] = (up + _ONE) * (gate * sigmoid32(alpha * gate))


@kernel()
def combine_into(y: NDArray[np.float32], rows: NDArray[np.int64], scale: NDArray[np.float32], first: int, out: NDArray[np.float32]) -> None:
    """``out[rows[i], first + j] = fma(scale[i], y[i, j], out[rows[i], first + j])``: add an expert's weighted output.

    Parameters
    ----------
    y : ndarray, (m, n), float32
        Delivered chunk of the expert's output.
    rows : ndarray, (>= m,), int64
        Tokens of the rows of ``y``.
    scale : ndarray, (>= m,), float32
        Their routing weights.
    first : int
        Column of ``out`` of the chunk.
    out : ndarray, (t, >= first + n), float32
        Read and written.
    """
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            out[rows[i], first + j] = fma(scale[i], y[i, j], out[rows[i], first + j])


@kernel()
def combine_rows(y: NDArray[np.float32], rows: NDArray[np.int64], scale: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out[r, j] = fma(scale[i], y[r, j], out[r, j])`` for ``r = rows[i]``: the mask after an expert was computed for every token.

    Parameters
    ----------
    y, out : ndarray, (t, n), float32
        The expert's output for every token; `out` is read and written.
    rows, scale : ndarray, (m,), int64 and float32
        Tokens that chose it, and their weights.
    """
    for i in range(rows.shape[0]):
        r = rows[i]
        for j in range(out.shape[1]):
            out[r, j] = fma(scale[i], y[r, j], out[r, j])


@kernel()
def scale_rows(x: NDArray[np.float32], rows: NDArray[np.int64], scale: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out[i, j] = x[rows[i], j] * scale[i]``: tokens gathered and weighted before an expert.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    rows, scale : ndarray, (m,), int64 and float32
    out : ndarray, (m, n), float32
        Written.
    """
    for i in range(rows.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = x[rows[i], j] * scale[i]

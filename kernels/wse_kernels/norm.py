"""RMSNorm in two steps, with the row's sum chained between them, and the residual sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.fma import fma
from wse_kernels.threads import Driver, Runner, at_once

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@kernel()
def sum_squares(x: NDArray[np.float32], ss: NDArray[np.float32]) -> None:
    """Sum of squares over this core's features, a chain of fma over ascending index from +0.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    ss : ndarray, (t, 1), float32
        Written.
    """
    i = 0
    while i + 3 < x.shape[0]:  # four independent chains hide the latency of one
        s0 = _ZERO
        s1 = _ZERO
        s2 = _ZERO
        s3 = _ZERO
        for k in range(x.shape[1]):
            s0 = fma(x[i, k], x[i, k], s0)
            s1 = fma(x[i + 1, k], x[i + 1, k], s1)
            s2 = fma(x[i + 2, k], x[i + 2, k], s2)
            s3 = fma(x[i + 3, k], x[i + 3, k], s3)
        ss[i, 0] = s0
        ss[i + 1, 0] = s1
        ss[i + 2, 0] = s2
        ss[i + 3, 0] = s3
        i += 4
    while i < x.shape[0]:
        s0 = _ZERO
        for k in range(x.shape[1]):
            s0 = fma(x[i, k], x[i, k], s0)
        ss[i, 0] = s0
        i += 1


@kernel()
def rms_scale(
    x: NDArray[np.float32],
    total: NDArray[np.float32],
    weight: NDArray[np.float32],
    size: np.float32,
    eps: np.float32,
    out: NDArray[np.float32],
) -> None:
    """``out = (x * (1 / sqrt(total / size + eps))) * weight``, every operation rounded to float32.

    Parameters
    ----------
    x : ndarray, (t, n), float32
    total : ndarray, (t, 1), float32
        Sum of squares of the whole row.
    weight : ndarray, (1, n), float32
    size, eps : float32
        Features of a row; guard against a zero row.
    out : ndarray, (t, n), float32
        Written.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """
    for i in range(x.shape[0]):
        r = _ONE / np.sqrt(total[i, 0] / size + eps)
        for k in range(x.shape[1]):
            out[i, k] = (x[i, k] * r) * weight[0, k]


@kernel(driver=True)
def _mesh_rms_norm(
    part: int, n_parts: int, x: NDArray[np.float32], n_rows: int, starts: NDArray[np.int64], weight: NDArray[np.float32],
    size: np.float32, eps: np.float32, out: NDArray[np.float32],
) -> None:  # fmt: skip
    """One part of `mesh_rms_norm`: some of the rows."""
    i0, i1 = part * n_rows // n_parts, (part + 1) * n_rows // n_parts
    total, p = np.empty((i1 - i0, 1), np.float32), np.empty((i1 - i0, 1), np.float32)
    total[...] = np.float32(-0.0)  # -0.0 + p is p, bit for bit: the chain's first partial needs no case of its own
    for c in range(starts.shape[0] - 1):
        j0, j1 = starts[c], starts[c + 1]
        if j0 < j1:
            sum_squares(x[n_rows * j0 : n_rows * j1].reshape((n_rows, j1 - j0))[i0:i1], p)
            for i in range(i1 - i0):
                total[i, 0] = total[i, 0] + p[i, 0]
    for c in range(starts.shape[0] - 1):
        j0, j1 = starts[c], starts[c + 1]
        if j0 < j1:
            panel = slice(n_rows * j0, n_rows * j1)
            block, to = x[panel].reshape((n_rows, j1 - j0))[i0:i1], out[panel].reshape((n_rows, j1 - j0))[i0:i1]
            rms_scale(block, total, weight[j0:j1].reshape((1, j1 - j0)), size, eps, to)


_driver = Driver(_mesh_rms_norm)


def mesh_rms_norm(
    x: NDArray[np.float32], n_rows: int, starts: NDArray[np.int64], weight: NDArray[np.float32],
    size: np.float32, eps: np.float32, out: NDArray[np.float32], *, run: Runner = at_once,
) -> None:  # fmt: skip
    """RMSNorm of a whole mesh: `sum_squares` on every column, its partials chained west to east, then `rms_scale`.

    Parameters
    ----------
    x : ndarray, (n_rows * n,), float32
        Placed input, column-panel-major.
    n_rows : int
        Tokens.
    starts : ndarray, (n_cols + 1,), int64
        Split of the n features over columns of cores; empty ones allowed.
    weight : ndarray, (n,), float32
    size, eps : float32
        As for `rms_scale`.
    out : ndarray, as `x`
        Written.
    run : callable
        How the driver is called.
    """
    run(_driver, x.shape[0], x, n_rows, starts, weight, size, eps, out)


@kernel()
def add_to(x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """``x = x + y`` elementwise, both (t, n) float32; the residual sum, in place."""
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] = x[i, k] + y[i, k]


@kernel()
def chain_panels(partials: NDArray[np.float32], size: int, cols: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Chain along the rows of a whole mesh: ``out = ((p[cols[0]] + p[cols[1]]) + ...)``.

    Parameters
    ----------
    partials : ndarray, (n_cols * size,), float32
        One panel of `size` elements for each column.
    size : int
        Elements of a panel.
    cols : ndarray, (n,), int64
        Columns that take part, west to east.
    out : ndarray, (>= size,), float32
        Written.
    """
    for i in range(size):
        out[i] = partials[cols[0] * size + i]
    for c in cols[1:]:
        for i in range(size):
            out[i] = out[i] + partials[c * size + i]


@kernel()
def chain_max(acc: NDArray[np.float32], p: NDArray[np.float32]) -> None:
    """``acc = max(acc, p)`` elementwise, both (m, n) float32; a NaN stays."""
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            if p[i, j] > acc[i, j] or p[i, j] != p[i, j]:
                acc[i, j] = p[i, j]


@kernel()
def fill_zero(x: NDArray[np.float32]) -> None:
    """``x = +0`` elementwise, (t, n) float32."""
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] = _ZERO

"""Backward forms of an expert's network, on one core's blocks: its gate, its weights, the weight that a token gives it.

Of ``y = x @ w`` the gradient of x is the product with the transposed weights, which stream past a second time as they are published,
``[out, in]``: `partial_matmul` does it. The gradient of w is a sum over tokens, which each core adds to what it was given, token by token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.exp import GELU_CUBE, GELU_SCALE, sigmoid32
from wse_kernels.fma import fma, fma_uncounted

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_GELU_BEND = np.float32(3 * 0.044715 * float(GELU_SCALE))


@kernel()
def swiglu_backward(y: NDArray[np.float32], dh: NDArray[np.float32], dy: NDArray[np.float32]) -> None:
    """Gradient of ``h = silu(gate) * up``, gate and up in alternate columns: backward of `swiglu_into`.

    ``dy[:, 2 f] = (dh up) s (1 + gate (1 - s))`` with ``s = sigmoid(gate)``, and ``dy[:, 2 f + 1] = dh silu(gate)``.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
        Products with gate and up.
    dh : ndarray, (m, n), float32
    dy : ndarray, (m, 2 n), float32
        Written.
    """
    for i in range(dh.shape[0]):
        for f in range(dh.shape[1]):
            gate, d = y[i, 2 * f], dh[i, f]
            s = sigmoid32(gate)
            dy[i, 2 * f] = (d * y[i, 2 * f + 1]) * (s * fma_uncounted(gate, sigmoid32(-gate), _ONE))
            dy[i, 2 * f + 1] = d * (gate * s)


@kernel()
def geglu_backward(y: NDArray[np.float32], dh: NDArray[np.float32], dy: NDArray[np.float32]) -> None:
    """Gradient of ``h = gelu_tanh(gate) * up``, gate and up in alternate columns: backward of `geglu_into`.

    With ``s = sigmoid(z)``, ``z = 2 sqrt(2/pi) (gate + 0.044715 gate^3)``, the slope is ``s + gate s (1 - s) z'``.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
        Products with gate and up.
    dh : ndarray, (m, n), float32
    dy : ndarray, (m, 2 n), float32
        Written.
    """
    for i in range(dh.shape[0]):
        for f in range(dh.shape[1]):
            gate, d = y[i, 2 * f], dh[i, f]
            square = gate * gate
            z = gate * fma_uncounted(square, GELU_CUBE, _ONE) * GELU_SCALE
            s = sigmoid32(z)
            bend = (gate * s) * sigmoid32(-z)
            # Far out s is 0 or 1, and the slope of z may be infinite.
            slope = s if bend == _ZERO else fma_uncounted(bend, fma_uncounted(square, _GELU_BEND, GELU_SCALE), s)
            dy[i, 2 * f] = (d * y[i, 2 * f + 1]) * slope
            dy[i, 2 * f + 1] = d * (gate * s)


@kernel()
def clamped_glu_backward(
    y: NDArray[np.float32], alpha: np.float32, limit: np.float32, dh: NDArray[np.float32], dy: NDArray[np.float32]
) -> None:
    """Gradient of ``h = (up + 1) * gate * sigmoid(alpha gate)``, both held within limits: backward of `clamped_glu`.

    What was held at a limit gets 0; exactly at it, the gradient passes.

    Parameters
    ----------
    y : ndarray, (m, 2 n), float32
        Gate and up in alternate columns, with their biases.
    alpha, limit : float32
    dh : ndarray, (m, n), float32
    dy : ndarray, (m, 2 n), float32
        Written.
    """
    for i in range(dh.shape[0]):
        for f in range(dh.shape[1]):
            gate, up, d = y[i, 2 * f], y[i, 2 * f + 1], dh[i, f]
            held = limit if gate > limit else gate
            one_up = limit if up > limit else up
            one_up = (-limit if one_up < -limit else one_up) + _ONE
            z = alpha * held
            s = sigmoid32(z)
            slope = s if s == _ZERO else s * fma_uncounted(z, sigmoid32(-z), _ONE)
            dy[i, 2 * f] = _ZERO if gate > limit else (d * one_up) * slope
            dy[i, 2 * f + 1] = _ZERO if up > limit or up < -limit else d * (held * s)


@kernel()
def add_weight_gradient(x: NDArray[np.float32], rows: NDArray[np.int64], dy: NDArray[np.float32], dw: NDArray[np.float32]) -> None:
    """``dw[k, j] = fma(x[rows[i], k], dy[i, j], dw[k, j])`` over ascending i: gradient of the weights of ``y = x[rows] @ w``.

    The sum goes on where it stood, so that tokens in several pieces, one after the other, give the bits of all of them at once.

    Parameters
    ----------
    x : ndarray, (n_rows, k), float32
        The core's block of the input.
    rows : ndarray, (m,), int64
        Rows of `x` to use.
    dy : ndarray, (m, n), float32
    dw : ndarray, (k, n), float32
        Read and written.
    """
    m = rows.shape[0]
    fours = m // 4 * 4
    for i in range(0, fours, 4):
        for k in range(dw.shape[0]):
            a, b, c, d = x[rows[i], k], x[rows[i + 1], k], x[rows[i + 2], k], x[rows[i + 3], k]
            for j in range(dw.shape[1]):
                total = fma(a, dy[i, j], dw[k, j])
                total = fma(b, dy[i + 1, j], total)
                total = fma(c, dy[i + 2, j], total)
                dw[k, j] = fma(d, dy[i + 3, j], total)
    for i in range(fours, m):
        for k in range(dw.shape[0]):
            a = x[rows[i], k]
            for j in range(dw.shape[1]):
                dw[k, j] = fma(a, dy[i, j], dw[k, j])


@kernel()
def add_column_sums(dy: NDArray[np.float32], sums: NDArray[np.float32]) -> None:
    """``sums[0, j] = sums[0, j] + dy[i, j]`` over ascending i: gradient of a bias.

    Parameters
    ----------
    dy : ndarray, (m, n), float32
    sums : ndarray, (1, n), float32
        Read and written.
    """
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            sums[0, j] = sums[0, j] + dy[i, j]


@kernel()
def row_products(a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out[i] = sum over ascending j of a[i, j] * b[i, j]``, with fma from +0.

    The gradient of the weight of an expert: of its hidden layer with that layer's gradient before the weight was applied to it.

    Parameters
    ----------
    a, b : ndarray, (m, n), float32
    out : ndarray, (m,), float32
        Written.
    """
    for i in range(a.shape[0]):
        out[i] = _row_product(a[i], b[i])


@helper
def _row_product(a: NDArray[np.float32], b: NDArray[np.float32]) -> np.float32:
    total = _ZERO
    for j in range(a.shape[0]):
        total = fma(a[j], b[j], total)
    return total


@kernel()
def put_row_products(
    a: NDArray[np.float32], b: NDArray[np.float32], rows: NDArray[np.int64], expert: int, topk_ids: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:  # fmt: skip
    """`row_products` of one expert's tokens, each put where that expert stands among its token's slots (`put_in_slots`).

    Parameters
    ----------
    a, b : ndarray, (m, n), float32
    rows : ndarray, (m,), int64
        Tokens that the rows belong to.
    expert : int
    topk_ids : ndarray, (t, slots), int64
    out : ndarray, (t, slots), float32
        Written there.
    """
    for i in range(a.shape[0]):
        total = _row_product(a[i], b[i])
        for slot in range(topk_ids.shape[1]):
            if topk_ids[rows[i], slot] == expert:
                out[rows[i], slot] = total


@kernel()
def add_bias_products(a: NDArray[np.float32], bias: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out[i] = fma(a[i, j], bias[0, j], out[i])`` over ascending j: what an expert's output bias adds to `row_products`.

    Parameters
    ----------
    a : ndarray, (m, n), float32
    bias : ndarray, (1, n), float32
    out : ndarray, (m,), float32
        Read and written.
    """
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            out[i] = fma(a[i, j], bias[0, j], out[i])


@kernel()
def sigmoid_backward(x: NDArray[np.float32], d: NDArray[np.float32], dx: NDArray[np.float32]) -> None:
    """``dx[i, 0] = d[i] * s (1 - s)`` with ``s = sigmoid(x[i, 0])``: gradient of the gate of shared experts.

    Parameters
    ----------
    x : ndarray, (m, 1), float32
        Argument of the sigmoid.
    d : ndarray, (m,), float32
        Gradient of its value.
    dx : ndarray, (m, 1), float32
        Written.
    """
    for i in range(x.shape[0]):
        dx[i, 0] = d[i] * (sigmoid32(x[i, 0]) * sigmoid32(-x[i, 0]))


@kernel()
def keep_rows(rows: NDArray[np.int64], x: NDArray[np.float32]) -> None:
    """Set all rows of `x`, (t, n) float32, to +0 but those listed in `rows`, (m,) int64, ascending: the mask after all was computed."""
    n = 0
    for i in range(x.shape[0]):
        if n < rows.shape[0] and rows[n] == i:
            n += 1
        else:
            for j in range(x.shape[1]):
                x[i, j] = _ZERO


@kernel()
def put_in_slots(
    values: NDArray[np.float32], rows: NDArray[np.int64], expert: int, topk_ids: NDArray[np.int64], out: NDArray[np.float32]
) -> None:
    """Put one value of each listed token, of one expert, where that expert stands among the token's slots.

    Parameters
    ----------
    values, rows : ndarray, (m,), float32 and int64
        Values, and the tokens that they belong to.
    expert : int
    topk_ids : ndarray, (t, slots), int64
    out : ndarray, (t, slots), float32
        Written there.
    """
    for i in range(rows.shape[0]):
        for slot in range(topk_ids.shape[1]):
            if topk_ids[rows[i], slot] == expert:
                out[rows[i], slot] = values[i]

"""The sums of the mesh programs as the numerics law states them, one scalar after another with the exact `fma` of plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wse_kernels.exp import silu_array
from wse_kernels.fma import fma

F = np.float32
F32 = NDArray[np.float32]
Ints = NDArray[np.int64]


def normal(seed: int, *shape: int) -> F32:
    """Seeded standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def dot(x: F32, w: F32, offsets: Ints) -> np.float32:
    """One output: every column's part over its own k ascending from +0, then the parts west to east; columns without k are skipped."""
    total: np.float32 | None = None
    for k0, k1 in pairwise(offsets.tolist()):
        if k0 == k1:
            continue
        part = F(0.0)
        for k in range(k0, k1):
            part = fma(x[k], w[k], part)
        total = part if total is None else total + part
    assert total is not None
    return total


def product(x: F32, w: F32, offsets: Ints) -> F32:
    """``x @ w``: x (m, k), w (k, n), k split over columns of cores at `offsets`."""
    out = np.empty((x.shape[0], w.shape[1]), F)
    for i, j in np.ndindex(*out.shape):
        out[i, j] = dot(x[i], w[:, j], offsets)
    return out


def silu(x: F32) -> F32:
    """Element by element."""
    out = np.empty(x.size, F)
    silu_array(x.reshape(-1).copy(), out)
    return out.reshape(x.shape)


def swiglu(y: F32) -> F32:
    """``silu(gate) * up`` of alternating columns (gate, up)."""
    gated: F32 = silu(y[:, ::2]) * y[:, 1::2]
    return gated


def combine(out: F32, scale: F32, y: F32) -> F32:
    """``fma(scale[i], y[i, j], out[i, j])``."""
    result = np.empty_like(out)
    for i, j in np.ndindex(*out.shape):
        result[i, j] = fma(scale[i], y[i, j], out[i, j])
    return result


def rms_norm(x: F32, weight: F32, eps: float, offsets: Ints) -> F32:
    """Sum of squares as in `dot`, then ``(x * (1 / sqrt(total / n + eps))) * weight``, every operation rounded."""
    out = np.empty_like(x)
    for i, row in enumerate(x):
        factor = F(1.0) / np.sqrt(dot(row, row, offsets) / F(row.size) + F(eps))
        out[i] = (row * factor) * weight
    return out


def layer_norm(x: F32, weight: F32, eps: float, offsets: Ints) -> F32:
    """Sum and sum of squared deviations as in `dot`, then ``((x - mean) * (1 / sqrt(squares / n + eps))) * weight``, each rounded."""
    out = np.empty_like(x)
    for i, row in enumerate(x):
        n = F(row.size)
        deviation = row - dot(row, np.ones_like(row), offsets) / n
        factor = F(1.0) / np.sqrt(dot(deviation, deviation, offsets) / n + F(eps))
        out[i] = (deviation * factor) * weight
    return out

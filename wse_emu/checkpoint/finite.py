"""Weights are finite: where the first one lies that is not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def first_not_finite(rows: NDArray[np.float32], start: int) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity in row order, within the tensor whose rows begin at `start`; None if there is none."""
    finite = np.isfinite(rows)
    if finite.all():
        return None
    at = np.unravel_index(int(np.argmin(finite)), rows.shape)
    return (int(at[0]) + start, *(int(i) for i in at[1:]))

"""Matrix products as a run sums them: exact where sums are float32; where a row of cores hands totals on in 16 bits, along its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.stages import columns_of
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, HalfType, Precision
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import formulas
from wse_emu.reference.storage import rounded

F64 = NDArray[np.float64]
Bounded = tuple[F64, F64]
"""Exact value and bound of the error, of one shape."""


class Products:
    """Products of a run's stages with matrices: the value that is expected, and the bound of the error.

    Parameters
    ----------
    record : TapRecord
        Says on which columns of cores the elements of a stage lie.
    spec : ModelSpec
    precision : Precision
        Whose `sums` is the format in which totals are handed on.
    """

    def __init__(self, record: TapRecord, spec: ModelSpec, precision: Precision = FLOAT32) -> None:
        self._record, self._spec, self._sums = record, spec, precision.sums
        self._columns: dict[tuple[str, int], NDArray[np.int64]] = {}

    def scores(self, x: F64, weight: NDArray[Any]) -> Bounded:
        """``x @ weight.T`` with sums in float32, whatever the precision; x (T, in), weight (out, in) -> (T, out)."""
        return formulas.linear(x, weight.astype(np.float64)).astype(np.float64), tolerance.linear_bound(x, weight)

    def linear(self, stage: str, x: F64, weight: NDArray[Any]) -> Bounded:
        """The same with sums as the run's precision has them, `x` being what `stage` gave."""
        return self.scores(x, weight) if self._sums is None else chained(x, weight, self._columns_of(stage, x.shape[1]), self._sums)

    def per_head(self, stage: str, x: F64, weight: F64) -> Bounded:
        """``x[:, head] @ weight[head].T``; x (T, heads, in), the first elements of what `stage` gave, weight (heads, out, in)."""
        if self._sums is None:
            size = formulas.per_head(np.abs(x), np.abs(weight))
            return formulas.per_head(x, weight).astype(np.float64), tolerance.sum_bound(x.shape[-1], size)
        of_heads = [self.linear(stage, x[:, head], weight[head]) for head in range(x.shape[1])]
        value, bound = (np.stack([both[i] for both in of_heads], axis=1) for i in (0, 1))
        return value, bound

    def _columns_of(self, stage: str, n: int) -> NDArray[np.int64]:
        if (stage, n) not in self._columns:
            self._columns[stage, n] = columns_of(self._record, self._spec, stage, n)
        return self._columns[stage, n]


def chained(x: F64, weight: NDArray[Any], columns: NDArray[np.int64], sums: HalfType) -> Bounded:
    """``x @ weight.T`` where each column of cores hands its total on to the next in a format of 16 bits; columns (in,), of every element.

    Two ends between which the run's total must lie are followed from west to east. A column's own partial sum is known to the rule for sums
    of float32; its sum with what came in is one rounding more. Rounding to nearest never puts a larger number below a smaller one, so a
    total between the ends lies between their nearest numbers once it is handed on. Mostly these are one and the same, and what float32 lost
    so far is gone; where a tie lies between the ends they are a step of the format apart. So a rounding that is left out, cut off or made
    elsewhere leaves the ends, which half a step for every column would let pass.
    """
    low = high = np.zeros((len(x), len(weight)))
    for column in np.unique(columns):
        at = columns == column
        part = weight[:, at]
        p, e = formulas.linear(x[:, at], part.astype(np.float64)), tolerance.linear_bound(x[:, at], part)
        if column == columns.min():
            low, high = p - e, p + e
            continue
        low, high = rounded(low, sums) + p - e, rounded(high, sums) + p + e
        loss = tolerance.add_bound(np.maximum(np.abs(low), np.abs(high)))
        low, high = low - loss, high + loss
    return (low + high) / 2, (high - low) / 2 + 2.0**-52 * np.abs(high)

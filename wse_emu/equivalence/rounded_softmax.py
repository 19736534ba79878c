"""Softmax whose state has 16 bits, followed key by key as two ends between which the state of a run must lie.

Every step rounds to float32 and then to the format, both to nearest, which puts no number before a smaller one: a sum of two numbers that
lie between ends lies between the sums of the ends, rounded alike. What is not known exactly is what enters: a score, to `score_bound`, and
an exponential, to two units in the last place. Mostly both ends of an exponential round to one number of the format, and so do all sums
behind it; where a tie lies between them they are a step apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.foundation.precision import HalfType
from wse_emu.reference.storage import rounded, unit_roundoff

F64 = NDArray[np.float64]
Bounded = tuple[F64, F64]
"""Exact value and bound of the error, of one shape."""


def between(low: F64, high: F64) -> Bounded:
    """Middle and half width."""
    return (low + high) / 2, (high - low) / 2


def stored(x: F64, dtype: HalfType) -> F64:
    """The nearest number of the format to the float32 nearest to `x`."""
    out: F64 = rounded(x.astype(np.float32).astype(np.float64), dtype).astype(np.float64)
    return out


def maximum(scores: F64, e_scores: F64, dtype: HalfType) -> Bounded:
    """Largest of the scores that are each known to `e_scores`, rounded; (T, S), -inf where none is seen -> (T,)."""
    return between(stored((scores - e_scores).max(axis=1), dtype), stored((scores + e_scores).max(axis=1), dtype))


@dataclass(frozen=True, slots=True)
class Followed:
    """Ends of the state behind the last key."""

    low: F64
    """(T,) of the denominator."""
    high: F64
    low_sum: F64
    """(T, d) of the output before it is divided."""
    high_sum: F64

    @property
    def denominator(self) -> Bounded:
        """(T,)."""
        return between(self.low, self.high)

    def context(self, denominator: F64) -> Bounded:
        """(T, d): the output, divided by the run's own denominators (T,); that is one rounding."""
        value, bound = (x / denominator[:, None] for x in between(self.low_sum, self.high_sum))
        return value, bound + tolerance.U * (np.abs(value) + bound) + tolerance.SUBNORMAL


def follow(scores: F64, e_scores: F64, m: F64, v: F64, dtype: HalfType, *, has_sink: bool) -> Followed:
    """Denominator and output of one head.

    Parameters
    ----------
    scores, e_scores : ndarray, (T, S), float64
        Scores, -inf where a key is not seen, and the bound of each; with `has_sink` the first column is the sink's.
    m : ndarray, (T,), float64
        The run's own maxima.
    v : ndarray, (keys, d), float64
        Values as the cache keeps them.
    dtype : {"bfloat16", "float16", "cb16"}
    """
    seen = ~np.isneginf(scores)
    p = np.exp(scores - m[:, None])
    # A maximum that was rounded down by half a step leaves exponentials above 1.
    most = np.maximum(p, np.exp(unit_roundoff(dtype) * np.abs(m)[:, None]))
    loss = np.fmin(p * tolerance.softmax_term_error(scores, m, e_scores), most)
    low_p, high_p = stored(np.maximum(p - loss - tolerance.SMALLEST_NORMAL, 0), dtype), stored(p + loss + tolerance.SMALLEST_NORMAL, dtype)
    low, high = np.zeros(len(scores)), np.zeros(len(scores))
    low_sum, high_sum = np.zeros((len(scores), v.shape[1])), np.zeros((len(scores), v.shape[1]))
    for column in range(scores.shape[1]):
        on = seen[:, column]
        low[on] = stored(low[on] + low_p[on, column], dtype)
        high[on] = stored(high[on] + high_p[on, column], dtype)
        if has_sink and column == 0:
            continue
        ends = np.stack([end[on, column, None] * v[column - has_sink] for end in (low_p, high_p)])
        low_sum[on] = stored(low_sum[on] + ends.min(axis=0), dtype)
        high_sum[on] = stored(high_sum[on] + ends.max(axis=0), dtype)
    return Followed(low, high, low_sum, high_sum)

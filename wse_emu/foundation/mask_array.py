"""A mask of attention that is given as an array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import SpecError


class MaskArray:
    """Booleans (queries, keys) by position, as a function of positions; two of equal content are one pattern.

    Parameters
    ----------
    values : ndarray, (n, n), bool
        Entry (q, k): whether the query at position q admits the key at position k. Copied. Sequences of up to n tokens have a mask.

    Raises
    ------
    SpecError
        If it is no square of booleans; when it is asked for a position that it does not have.
    """

    __slots__ = ("_hash", "values")

    def __init__(self, values: NDArray[np.bool_]) -> None:
        if values.dtype != np.bool_ or values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
            raise SpecError(
                "attention pattern: an array as `mask` must hold booleans (queries, keys), as many keys as queries, got "
                f"{values.dtype} of shape {values.shape}; give one pattern for each head as `heads`"
            )
        self.values = values.copy()
        self.values.flags.writeable = False
        self._hash = hash((values.shape, self.values.tobytes()))

    def __call__(self, q: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The mask of queries and keys at these positions, of shapes that broadcast."""
        most = int(q.max(initial=-1))
        if most >= len(self.values):
            raise SpecError(f"attention pattern: `mask` describes {len(self.values)} positions, there is a query at position {most}")
        seen: NDArray[np.bool_] = self.values[q, np.minimum(k, len(self.values) - 1)]
        return seen

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, MaskArray) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<mask of {len(self.values)} positions>"

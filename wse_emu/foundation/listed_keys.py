"""Keys that are listed for every query: top-k sparse attention by index."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.key_ranges import Ints, KeyRanges


class ListedKeys:
    """A mask that admits the keys of a list; two of equal content are one pattern. See `AttentionPattern.listed`."""

    __slots__ = ("_hash", "keys", "n_queries")

    def __init__(self, indices: ArrayLike, topk_length: ArrayLike | None = None) -> None:
        listed = np.asarray(indices)
        if listed.dtype.kind not in "iu" or listed.ndim != 2 or not listed.size:
            raise SpecError(
                f"attention pattern: `indices` must be integers (queries, topk), got {listed.dtype} of shape {listed.shape}; give one "
                "pattern for each head as `heads`"
            )
        lengths = np.full(len(listed), listed.shape[1]) if topk_length is None else np.asarray(topk_length)
        if lengths.dtype.kind not in "iu" or lengths.shape != (len(listed),):
            raise SpecError(
                f"attention pattern: `topk_length` must be integers ({len(listed)},), got {lengths.dtype} of shape {lengths.shape}"
            )
        if lengths.min() < 0 or lengths.max() > listed.shape[1]:
            raise SpecError(f"attention pattern: `topk_length` must lie in 0..{listed.shape[1]}, got {lengths.min()} to {lengths.max()}")
        if listed.min() < -1:
            raise SpecError(f"attention pattern: `indices` must be positions or -1, got {listed.min()}")
        query = np.broadcast_to(np.arange(len(listed))[:, None], listed.shape)
        counts = (np.arange(listed.shape[1]) < lengths[:, None]) & (listed >= 0) & (listed <= query)
        self.n_queries = len(listed)
        self.keys = np.unique(query[counts] * self.n_queries + listed[counts].astype(np.int64))
        """Ascending ``query * n_queries + key`` of every admitted pair."""
        self._hash = hash((self.n_queries, self.keys.tobytes()))

    def _check(self, positions: Ints) -> None:
        most = int(positions.max(initial=-1))
        if most >= self.n_queries:
            raise SpecError(f"attention pattern: `indices` lists keys of {self.n_queries} queries, there is one at position {most}")

    def __call__(self, q: Ints, k: Ints) -> NDArray[np.bool_]:
        """Whether queries admit keys at these positions, of shapes that broadcast."""
        self._check(q)
        pair = q * self.n_queries + k
        if not self.keys.size:
            return np.zeros(pair.shape, np.bool_)
        at = np.minimum(np.searchsorted(self.keys, pair), self.keys.size - 1)
        found: NDArray[np.bool_] = (self.keys[at] == pair) & (k < self.n_queries)
        return found

    def ranges(self, positions: Ints) -> KeyRanges:
        """Keys that queries at these positions admit.

        Raises
        ------
        SpecError
            If some query has none.
        """
        self._check(positions)
        begin, end = (np.searchsorted(self.keys, (positions + i) * self.n_queries) for i in (0, 1))
        counts = end - begin
        if (counts == 0).any():
            raise SpecError(f"attention pattern: `indices` list no key for the query at position {int(positions[counts == 0][0])}")
        first_pair = np.cumsum(counts) - counts
        of = np.repeat(np.arange(positions.size), counts)
        key = self.keys[np.arange(int(counts.sum())) + np.repeat(begin - first_pair, counts)] - positions[of] * self.n_queries
        new = np.ones(key.size + 1, np.bool_)  # where a range begins: a query's first key, or one that does not follow the key before
        new[1:-1] = (np.diff(key) != 1) | (np.diff(of) != 0)
        starts = np.flatnonzero(new)
        first = np.concatenate([[0], np.cumsum(np.bincount(of[starts[:-1]], minlength=positions.size))]).astype(np.int64)
        return KeyRanges(first, np.stack([key[starts[:-1]], key[starts[1:] - 1] + 1], axis=1).astype(np.int64))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ListedKeys) and self.n_queries == other.n_queries and np.array_equal(self.keys, other.keys)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<{self.keys.size} keys listed for {self.n_queries} queries>"

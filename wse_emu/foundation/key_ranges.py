"""Ranges of key positions: those that queries admit, and what lies where among keys that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class KeyRanges(NamedTuple):
    """Ranges of key positions that some queries admit, query by query."""

    first: Ints
    """(n + 1,) query i's ranges are ``ranges[first[i] : first[i + 1]]``."""
    ranges: Ints
    """(n_ranges, 2) start and stop of each: ascending and disjoint for one query, none empty."""

    @property
    def n_admitted(self) -> int:
        """Pairs of a query and a key."""
        return n_keys_of(self.ranges)

    @staticmethod
    def of_mask(seen: NDArray[np.bool_]) -> KeyRanges:
        """Of the keys that a mask (n, keys) admits."""
        n, n_keys = seen.shape
        edges = np.zeros((n, n_keys + 1), np.bool_)  # where a range begins, and then where it ends
        edges[:, :n_keys] = seen
        edges[:, 1:] ^= seen
        row, at = np.divmod(np.flatnonzero(edges), n_keys + 1)
        first = np.concatenate([[0], np.cumsum(np.bincount(row[::2], minlength=n))]).astype(np.int64)
        return KeyRanges(first, at.reshape(-1, 2))

    @staticmethod
    def joined(several: Sequence[KeyRanges]) -> KeyRanges:
        """Keys that some of several sets of ranges of the same queries hold."""
        n = several[0].first.size - 1
        each = [merged(np.concatenate([of.ranges[of.first[i] : of.first[i + 1]] for of in several])) for i in range(n)]
        first = np.concatenate([[0], np.cumsum([len(ranges) for ranges in each])]).astype(np.int64)
        return KeyRanges(first, np.concatenate(each) if each else np.zeros((0, 2), np.int64))


def merged(ranges: Ints) -> Ints:
    """Ranges (n, 2) in any order, overlapping or touching, as ascending ones that neither overlap nor touch."""
    if len(ranges) < 2:
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    new = np.flatnonzero(np.concatenate([[True], ranges[1:, 0] > reach[:-1]]))
    return np.stack([ranges[new, 0], np.concatenate([reach[new[1:] - 1], reach[-1:]])], axis=1)


def keys_below(ranges: Ints, positions: Ints) -> Ints:
    """How many keys of ascending ranges (n, 2) lie below each of some positions: their indices, if the ranges hold them."""
    before = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])
    at = np.searchsorted(ranges[:, 0], positions, side="left")
    last = np.maximum(at - 1, 0)
    below: Ints = np.where(at > 0, before[last] + np.minimum(positions, ranges[last, 1]) - ranges[last, 0], 0)
    return below


def n_keys_of(ranges: Ints) -> int:
    """How many keys ranges (n, 2) hold."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def keys_of(ranges: Ints) -> Ints:
    """The keys of ascending ranges (n, 2), one by one."""
    sizes = ranges[:, 1] - ranges[:, 0]
    keys: Ints = np.repeat(ranges[:, 0], sizes) + within(sizes)
    return keys


def within(counts: Ints) -> Ints:
    """``0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ...``."""
    total = int(counts.sum())
    within: Ints = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return within

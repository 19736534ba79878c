"""How tensors lie on the grid: splits of an axis over rows or columns of cores, and the panel layout of a placed tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import PlacementError

Ints = NDArray[np.int64]
GridAxis = Literal["row", "col"]


@dataclass(frozen=True, eq=False)
class Split:
    """Ranges ``[starts[i], stops[i])`` of an axis of `total` elements that the grid's rows (or columns) ``i`` hold.

    Ranges may be empty (idle rows) and may repeat (replicas): see `banded`. Two splits with equal ranges are equal.
    """

    total: int
    starts: Ints
    stops: Ints

    def __post_init__(self) -> None:
        for name in ("starts", "stops"):
            value = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        if self.starts.shape != self.stops.shape or self.starts.ndim != 1:
            raise PlacementError("`starts` and `stops` must be one-dimensional and of one length")
        if self.starts.size and not ((self.starts >= 0).all() and (self.starts <= self.stops).all() and (self.stops <= self.total).all()):
            raise PlacementError(f"ranges must lie in 0..{self.total} and not run backwards")

    @cached_property
    def key(self) -> tuple[int, bytes, bytes]:
        """Hashable identity."""
        return self.total, self.starts.tobytes(), self.stops.tobytes()

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Split) and self.key == other.key)

    def __len__(self) -> int:
        return int(self.starts.size)

    @cached_property
    def sizes(self) -> Ints:
        """Elements held by each row or column."""
        sizes: Ints = self.stops - self.starts
        sizes.flags.writeable = False
        return sizes

    @cached_property
    def max_size(self) -> int:
        """Largest range."""
        return int(self.sizes.max(initial=0))

    @cached_property
    def used(self) -> Ints:
        """Indices with a non-empty range, ascending."""
        return np.flatnonzero(self.sizes)

    @cached_property
    def offsets(self) -> Ints:
        """(n + 1,) boundaries, for a split that is a partition in ascending order."""
        if not self.is_partition:
            raise PlacementError("this split holds replicas; it has no boundaries")
        return np.concatenate([self.starts, np.array([self.total], dtype=np.int64)])

    @cached_property
    def is_partition(self) -> bool:
        """Whether the ranges cover the axis once, in ascending order."""
        return bool(
            self.starts.size and self.starts[0] == 0 and self.stops[-1] == self.total and (self.starts[1:] == self.stops[:-1]).all()
        )

    @cached_property
    def representatives(self) -> Ints:
        """First index of each distinct non-empty range, ascending."""
        _, first = np.unique(np.stack([self.starts, self.stops]), axis=1, return_index=True)
        first = np.sort(first)
        kept: Ints = first[self.sizes[first] > 0].astype(np.int64)
        return kept

    @cached_property
    def owner(self) -> Ints:
        """(total,) first index whose range holds each element; -1 where none does."""
        owner = np.full(self.total, -1, dtype=np.int64)
        for i in self.representatives[::-1]:
            owner[self.starts[i] : self.stops[i]] = i
        return owner

    def scaled(self, factor: int) -> Split:
        """The same split of an axis whose elements are groups of `factor`."""
        return _scaled(self, factor)

    @staticmethod
    def balanced(total: int, parts: int) -> Split:
        """Partition with sizes that differ by at most one; with fewer elements than parts, some parts are empty."""
        return _balanced(total, parts)

    @staticmethod
    def single(total: int, index: int, parts: int) -> Split:
        """Everything at `index`, nothing elsewhere."""
        return _single(total, index, parts)

    @staticmethod
    def everywhere(total: int, parts: int) -> Split:
        """Everything at every index (replicas)."""
        return _everywhere(total, parts)

    @staticmethod
    def uniform(size: int, parts: int) -> Split:
        """`size` private elements at each index."""
        return _uniform(size, parts)


@lru_cache(maxsize=4096)
def _scaled(split: Split, factor: int) -> Split:
    return Split(split.total * factor, split.starts * factor, split.stops * factor)


@lru_cache(maxsize=4096)
def _balanced(total: int, parts: int) -> Split:
    if total < 0 or parts <= 0:
        raise PlacementError(f"cannot split {total} elements over {parts} parts")
    edges = np.arange(parts + 1, dtype=np.int64) * total // parts
    return Split(total, edges[:-1], edges[1:])


@lru_cache(maxsize=1024)
def _single(total: int, index: int, parts: int) -> Split:
    starts = np.where(np.arange(parts) <= index, 0, total)
    stops = np.where(np.arange(parts) < index, 0, total)
    return Split(total, starts, stops)


@lru_cache(maxsize=1024)
def _everywhere(total: int, parts: int) -> Split:
    return Split(total, np.zeros(parts, np.int64), np.full(parts, total, np.int64))


@lru_cache(maxsize=1024)
def _uniform(size: int, parts: int) -> Split:
    starts = np.arange(parts, dtype=np.int64) * size
    return Split(size * parts, starts, starts + size)


@dataclass(frozen=True)
class TokenBands:
    """Factorisation of the grid's rows for `n_tokens` tokens: token bands x feature bands.

    With at least as many tokens as rows there is one feature band and the tokens are a balanced partition of the rows. With fewer, every
    token has a band of ``n_feature_bands`` adjacent rows which hold replicas of it and share the output features; rows left over idle.
    """

    n_tokens: int
    n_rows: int

    @property
    def n_token_bands(self) -> int:
        """Groups of rows with different tokens."""
        return min(self.n_tokens, self.n_rows)

    @property
    def n_feature_bands(self) -> int:
        """Rows that hold the same tokens and share the output features."""
        return self.n_rows // self.n_tokens if 0 < self.n_tokens < self.n_rows else 1

    @property
    def split(self) -> Split:
        """Tokens held by each row, replicas included."""
        return _band_split(self)

    @property
    def used_rows(self) -> int:
        """Rows that hold tokens (0 without tokens); rows beyond idle."""
        return self.n_token_bands * self.n_feature_bands if self.n_tokens else 0


@lru_cache(maxsize=4096)
def _band_split(bands: TokenBands) -> Split:
    if bands.n_tokens >= bands.n_rows:
        return Split.balanced(bands.n_tokens, bands.n_rows)
    token = np.arange(bands.n_rows, dtype=np.int64) // bands.n_feature_bands
    starts = np.minimum(token, bands.n_tokens)
    return Split(bands.n_tokens, starts, np.minimum(token + 1, bands.n_tokens))


@lru_cache(maxsize=256)
def head_split(n_kv_heads: int, pair_units: int, n_cols: int) -> Split:
    """Pair units of all key/value heads over columns; a head is never cut while there are heads enough for the columns.

    Parameters
    ----------
    n_kv_heads, pair_units : int
        Key/value heads and rotary pairs ``head_dim / 2`` of each.
    n_cols : int
        Columns of the grid.

    Returns
    -------
    Split
        Of ``n_kv_heads * pair_units`` units. With ``n_cols <= n_kv_heads`` whole heads are balanced over columns; with more columns,
        these are balanced into one group per head and a group's units are balanced over its columns (surplus columns stay empty).
    """
    if n_cols <= n_kv_heads:
        return Split.balanced(n_kv_heads, n_cols).scaled(pair_units)
    groups = Split.balanced(n_cols, n_kv_heads)
    starts = np.empty(n_cols, np.int64)
    stops = np.empty(n_cols, np.int64)
    for head in range(n_kv_heads):
        inner = Split.balanced(pair_units, int(groups.sizes[head]))
        where = slice(int(groups.starts[head]), int(groups.stops[head]))
        starts[where] = inner.starts + head * pair_units
        stops[where] = inner.stops + head * pair_units
    return Split(n_kv_heads * pair_units, starts, stops)


@dataclass(frozen=True, eq=True, unsafe_hash=False)
class Placement:
    """Where the blocks of an ``(m, n)`` tensor lie: which grid axis splits each tensor axis.

    A tensor axis with grid axis None is whole on every core. The block of core (r, c) that covers rows ``[i0, i1)`` and columns
    ``[j0, j1)`` starts at element ``m * j0 + i0 * (j1 - j0)`` of one flat buffer and is C-contiguous there (column-panel-major), so a
    column panel of all rows is contiguous too. Grid axes that split nothing hold replicas, stored once by the batched executor.
    """

    shape: tuple[int, int]
    axis0: tuple[GridAxis | None, Split]
    axis1: tuple[GridAxis | None, Split]
    n_rows: int
    n_cols: int

    def __post_init__(self) -> None:
        length = {"row": self.n_rows, "col": self.n_cols, None: 1}
        for axis, (grid, split) in enumerate((self.axis0, self.axis1)):
            if len(split) != length[grid]:
                raise PlacementError(f"axis {axis}: a split of {len(split)} parts does not fit {length[grid]} {grid or 'whole'} positions")
            if split.total != self.shape[axis]:
                raise PlacementError(f"axis {axis}: the split covers {split.total} elements, the tensor has {self.shape[axis]}")
        if self.axis0[0] is not None and self.axis0[0] == self.axis1[0]:
            raise PlacementError("both tensor axes cannot be split over one grid axis")

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.axis0, self.axis1, self.n_rows, self.n_cols))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def table(self) -> Ints:
        """Blocks as compiled drivers read them.

        ``[m, mode0, mode1, at0, at1]``, then starts and stops of axis 0 (from ``at0``) and axis 1 (from ``at1``); mode 0 is whole, 1
        indexed by row, 2 by column.
        """
        modes = {None: 0, "row": 1, "col": 2}
        (grid0, split0), (grid1, split1) = self.axis0, self.axis1
        n0 = len(split0)
        head = np.array([self.shape[0], modes[grid0], modes[grid1], 5, 5 + 2 * n0], dtype=np.int64)
        return np.concatenate([head, split0.starts, split0.stops, split1.starts, split1.stops])

    def split_of(self, grid: GridAxis) -> Split | None:
        """The split over the grid's rows or columns, None if the blocks do not depend on them."""
        for axis, split in (self.axis0, self.axis1):
            if axis == grid:
                return split
        return None

    def ranges(self, row: int, col: int) -> tuple[int, int, int, int]:
        """``(i0, i1, j0, j1)`` of the block of core (row, col)."""
        out: list[int] = []
        for grid, split in (self.axis0, self.axis1):
            at = row if grid == "row" else col if grid == "col" else 0
            out += [int(split.starts[at]), int(split.stops[at])]
        return out[0], out[1], out[2], out[3]

    def offset(self, row: int, col: int) -> int:
        """First element of the block of core (row, col) in the flat buffer."""
        i0, _, j0, j1 = self.ranges(row, col)
        return self.shape[0] * j0 + i0 * (j1 - j0)

    @cached_property
    def row_factor(self) -> Ints:
        """(n_rows,) factor by which each row enters the block sizes: elements of (r, c) are ``row_factor[r] * col_factor[c]``."""
        return self._factor("row", self.n_rows)

    @cached_property
    def col_factor(self) -> Ints:
        """(n_cols,) factor by which each column enters the block sizes; holds the whole axes too."""
        factor = self._factor("col", self.n_cols).copy()
        for grid, split in (self.axis0, self.axis1):
            if grid is None:
                factor *= int(split.sizes[0])
        return factor

    def _factor(self, grid: GridAxis, n: int) -> Ints:
        split = self.split_of(grid)
        return np.ones(n, np.int64) if split is None else split.sizes

    def __str__(self) -> str:
        rows, cols = self.split_of("row"), self.split_of("col")
        lines = [f"({self.shape[0]}, {self.shape[1]}) on {self.n_rows} x {self.n_cols} cores"]
        for axis, (grid, split) in enumerate((self.axis0, self.axis1)):
            if grid is None:
                lines.append(f"  axis {axis}: whole on every core ({split.total})")
            else:
                sizes = split.sizes
                unique = "" if split.is_partition else ", replicated over bands"
                lines.append(f"  axis {axis}: over {grid}s, {int(sizes.min())}..{int(sizes.max())} each{unique}")
        lines += [f"  {name}: replicas" for name, over in (("rows", rows), ("cols", cols)) if over is None]
        if self.n_rows * self.n_cols <= 64:
            for row in range(self.n_rows):
                lines.append("  " + "  ".join("[{}:{}, {}:{}]".format(*self.ranges(row, col)) for col in range(self.n_cols)))
        return "\n".join(lines)


@lru_cache(maxsize=8192)
def placed(
    shape: tuple[int, int],
    rows: tuple[GridAxis | None, Split | None],
    cols: tuple[GridAxis | None, Split | None],
    n_rows: int,
    n_cols: int,
) -> Placement:
    """`Placement` of an ``(m, n)`` tensor with ``(grid axis, split)`` for each tensor axis; a split of None is the whole axis."""
    axis0 = (rows[0], rows[1] if rows[1] is not None else Split.balanced(shape[0], 1))
    axis1 = (cols[0], cols[1] if cols[1] is not None else Split.balanced(shape[1], 1))
    return Placement(shape, axis0, axis1, n_rows, n_cols)

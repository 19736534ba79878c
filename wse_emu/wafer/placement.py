"""How tensors lie on the grid: splits of an axis over rows or columns of cores, and the panel layout of a placed tensor."""

from __future__ import annotations

from collections.abc import Sequence
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

    Ranges may be empty (idle rows), may repeat (replicas) and may come in any order; together they cover the axis. Two ranges that differ
    share no element: who owned it, and what a drain would read, could not be told. Two splits with equal ranges are equal.

    Raises
    ------
    PlacementError
        If a range leaves the axis or runs backwards, two ranges overlap without being equal, or an element lies nowhere.
    """

    total: int
    starts: Ints
    stops: Ints

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _count(self.total, "`total` of a split"))
        for name in ("starts", "stops"):
            given = np.asarray(getattr(self, name))
            if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
                raise PlacementError(
                    f"`{name}` of a split must be a vector of at least one integer, got {given.dtype} of shape {given.shape}"
                )
            object.__setattr__(self, name, _frozen(given.astype(np.int64)))
        if self.starts.shape != self.stops.shape:
            raise PlacementError(f"`starts` and `stops` of a split must be of one length, got {self.starts.size} and {self.stops.size}")
        if not ((self.starts >= 0).all() and (self.starts <= self.stops).all() and (self.stops <= self.total).all()):
            raise PlacementError(f"ranges must lie in 0..{self.total} and not run backwards")
        used = self.sizes > 0  # where an empty range lies says nothing: it gets one place, the end of what lies before
        ends = np.maximum.accumulate(np.where(used, self.stops, 0))
        object.__setattr__(self, "starts", _frozen(np.where(used, self.starts, ends)))
        object.__setattr__(self, "stops", _frozen(np.where(used, self.stops, ends)))
        if not self.is_partition:
            self._check_cover()

    def _check_cover(self) -> None:
        ranges = np.unique(np.stack([self.starts, self.stops], axis=1)[self.used], axis=0)
        ends = np.concatenate([[0], ranges[:, 1]])
        begins = np.concatenate([ranges[:, 0], [self.total]])
        wrong = np.flatnonzero(begins != ends)
        if not wrong.size:
            return
        i = int(wrong[0])
        if begins[i] < ends[i]:
            (a0, a1), (b0, b1) = ranges[i - 1].tolist(), ranges[i].tolist()
            raise PlacementError(f"ranges [{a0}, {a1}) and [{b0}, {b1}) of a split overlap; they must be equal (replicas) or share nothing")
        raise PlacementError(
            f"elements {int(ends[i])}..{int(begins[i]) - 1} of {self.total} lie nowhere; the ranges of a split cover the axis"
        )

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
        return _frozen(self.stops - self.starts)

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
        _, first = np.unique(self.starts[self.used], return_index=True)
        kept: Ints = np.sort(self.used[first])
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

    @cached_property
    def labels(self) -> Ints:
        """(n,) first index that holds the same range as each index, -1 where the range is empty."""
        labels = np.full(len(self), -1, np.int64)
        _, first, inverse = np.unique(self.starts[self.used], return_index=True, return_inverse=True)
        labels[self.used] = self.used[first][inverse.reshape(-1)]
        return _frozen(labels)

    @staticmethod
    def balanced(total: int, parts: int) -> Split:
        """Partition with sizes that differ by at most one; with fewer elements than parts, some parts are empty."""
        return _balanced(total, parts)

    @staticmethod
    def single(total: int, index: int, parts: int) -> Split:
        """Everything at `index`, nothing elsewhere."""
        return _single(total, index, parts)

    @staticmethod
    def everywhere(total: int, parts: int, at: Sequence[int] | Ints | None = None) -> Split:
        """Everything at every index (replicas), or only at the indices `at`, ascending."""
        return _everywhere(total, parts, _indices(at, parts))

    @staticmethod
    def uniform(size: int, parts: int, at: Sequence[int] | Ints | None = None) -> Split:
        """`size` private elements at each index, or only at the indices `at`, ascending."""
        return _uniform(size, parts, _indices(at, parts))


@lru_cache(maxsize=4096)
def _scaled(split: Split, factor: int) -> Split:
    return Split(split.total * factor, split.starts * factor, split.stops * factor)


def _frozen(values: Ints) -> Ints:
    values.flags.writeable = False
    return values


def _count(value: int, what: str, least: int = 0) -> int:
    """`value` as an int, if it is an integer of at least `least`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise PlacementError(f"{what} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _indices(at: Sequence[int] | Ints | None, parts: int) -> bytes | None:
    """Indices as a key for caches, None for all."""
    parts = _count(parts, "`parts` of a split", 1)
    if at is None:
        return None
    given = np.asarray(at)
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
        raise PlacementError(f"`at` must name at least one of the {parts} positions by its number, got {at!r}")
    if given[0] < 0 or given[-1] >= parts or (given[1:] <= given[:-1]).any():
        raise PlacementError(f"`at` must rise within 0..{parts - 1}, got {given.tolist()}")
    if given.size == parts:
        return None
    return given.astype(np.int64).tobytes()


@lru_cache(maxsize=4096, typed=True)
def _balanced(total: int, parts: int) -> Split:
    total, parts = _count(total, "elements of a split"), _count(parts, "`parts` of a split", 1)
    edges = np.arange(parts + 1, dtype=np.int64) * total // parts
    return Split(total, edges[:-1], edges[1:])


@lru_cache(maxsize=1024, typed=True)
def _single(total: int, index: int, parts: int) -> Split:
    total, index, parts = _count(total, "elements of a split"), _count(index, "`index` of a split"), _count(parts, "`parts` of a split", 1)
    if index >= parts:
        raise PlacementError(f"`index` must lie in 0..{parts - 1}, got {index}")
    starts = np.where(np.arange(parts) <= index, 0, total)
    stops = np.where(np.arange(parts) < index, 0, total)
    return Split(total, starts, stops)


@lru_cache(maxsize=1024, typed=True)
def _everywhere(total: int, parts: int, at: bytes | None) -> Split:
    total = _count(total, "elements of a split")
    stops = np.full(parts, total if at is None else 0, np.int64)
    if at is not None:
        stops[np.frombuffer(at, np.int64)] = total
    return Split(total, np.zeros(parts, np.int64), stops)


@lru_cache(maxsize=1024, typed=True)
def _uniform(size: int, parts: int, at: bytes | None) -> Split:
    size = _count(size, "elements of a split")
    used = np.ones(parts, np.int64) if at is None else np.bincount(np.frombuffer(at, np.int64), minlength=parts)
    stops = np.cumsum(used * size)
    return Split(int(stops[-1]), stops - used * size, stops)


@dataclass(frozen=True)
class TokenBands:
    """Factorisation of the grid's rows for `n_tokens` tokens: token bands x feature bands.

    With at least as many tokens as rows there is one feature band and the tokens are a balanced partition of the rows. With fewer, every
    token has a band of ``n_feature_bands`` adjacent rows which hold replicas of it and share the output features; rows left over idle.
    """

    n_tokens: int
    n_rows: int
    given: Split | None = None
    """Tokens of each row, where they lie otherwise: one feature band then."""

    @property
    def n_token_bands(self) -> int:
        """Groups of rows with different tokens."""
        return min(self.n_tokens, self.n_rows)

    @property
    def n_feature_bands(self) -> int:
        """Rows that hold the same tokens and share the output features."""
        return self.n_rows // self.n_tokens if 0 < self.n_tokens < self.n_rows and self.given is None else 1

    @property
    def split(self) -> Split:
        """Tokens held by each row, replicas included."""
        return _band_split(self) if self.given is None else self.given

    @property
    def used_rows(self) -> int:
        """Rows that hold tokens (0 without tokens), or lie between such rows; rows beyond idle."""
        if self.given is not None:
            return int(self.given.used[-1]) + 1 if self.n_tokens else 0
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
        if len(self.shape) != 2:
            raise PlacementError(f"a placement has two axes, got shape {self.shape}")
        object.__setattr__(self, "shape", tuple(_count(n, f"axis {axis} of a placement") for axis, n in enumerate(self.shape)))
        for axis, (grid, split) in enumerate((self.axis0, self.axis1)):
            if grid not in length:
                raise PlacementError(f"axis {axis}: a grid axis is 'row', 'col' or None, got {grid!r}")
            if not isinstance(split, Split):
                raise PlacementError(f"axis {axis}: expected a `Split`, got {split!r}")
            if len(split) != length[grid]:
                over = f"{length[grid]} {grid}s" if grid else "an axis that is whole on every core (use `Split.balanced(n, 1)` or None)"
                raise PlacementError(f"axis {axis}: a split of {len(split)} parts does not fit {over}")
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

    @cached_property
    def factor_bytes(self) -> tuple[bytes, bytes]:
        """Both, as what one placement's blocks are told apart by."""
        return self.row_factor.tobytes(), self.col_factor.tobytes()

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
                unique = "" if split.representatives.size == split.used.size else ", with replicas"
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
    """`Placement` of an ``(m, n)`` tensor with ``(grid axis, split)`` for each tensor axis; without a split the axis is balanced."""
    length = {"row": n_rows, "col": n_cols}
    (grid0, split0), (grid1, split1) = rows, cols
    axis0 = (grid0, Split.balanced(shape[0], length.get(grid0 or "", 1)) if split0 is None else split0)
    axis1 = (grid1, Split.balanced(shape[1], length.get(grid1 or "", 1)) if split1 is None else split1)
    return Placement(shape, axis0, axis1, n_rows, n_cols)

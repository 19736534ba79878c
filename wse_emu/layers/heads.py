"""How attention heads lie over columns of cores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from wse_emu.wafer.placement import Ints, Split, head_split


class Part(NamedTuple):
    """The part of one key/value head that one column holds."""

    col: int
    first_unit: int
    """First of the head's pair units among those of the column."""
    n_units: int
    n_values: int
    """Those of them that have values, the first ones."""


@dataclass(frozen=True)
class HeadLayout:
    """Key/value heads, their query heads and their pair units over `n_cols` columns; see `head_split`."""

    n_kv_heads: int
    queries_per_kv: int
    head_dim: int
    n_cols: int
    sm_scale: float | None = None
    """Factor of the scores; None is ``1 / sqrt(head_dim)``."""
    score_cap: float | None = None
    """Soft cap of the scaled scores; None is none."""
    value_dim: int | None = None
    """Where values are the first elements of the one key/value head's keys, how many of them, 0 where there are none; None: they lie by
    themselves."""

    @cached_property
    def units(self) -> Split:
        """Pair units of all heads over columns."""
        return head_split(self.n_kv_heads, self.head_dim // 2, self.n_cols)

    @property
    def values_in_keys(self) -> bool:
        """Whether values are part of the keys."""
        return self.value_dim is not None

    @property
    def kept(self) -> str:
        """What a cache keeps of them, in reports."""
        return "index keys" if self.value_dim == 0 else "keys and values"

    @property
    def kv_slots(self) -> int:
        """Slots of a pair unit beside its queries: its key and its value, or its key alone."""
        return 1 if self.values_in_keys else 2

    @property
    def value_width(self) -> int:
        """Elements of a head's value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @cached_property
    def value_units(self) -> Split:
        """Pair units that have values, over columns."""
        return self.units if self.value_dim is None else self._within(0, self.value_dim // 2)

    @cached_property
    def rotary_units(self) -> Split:
        """Pair units that rotary tables are made for, over columns: all, or those that have no values."""
        return self.units if self.value_dim is None else self._within(self.value_dim // 2, self.units.total)

    def _within(self, begin: int, end: int) -> Split:
        """Units begin to end, where they lie."""
        starts, stops = (np.clip(edges, begin, end) - begin for edges in (self.units.starts, self.units.stops))
        return Split(end - begin, starts, stops)

    @cached_property
    def qkv(self) -> Split:
        """Queries, keys and values (columns of ``w_qkv``) over columns of cores."""
        return self.units.scaled(2 * (self.queries_per_kv + self.kv_slots))

    @cached_property
    def context(self) -> Split:
        """Elements of what attention gives for all query heads over columns of cores (the rows of ``w_o``)."""
        return self.value_units.scaled(2 * self.queries_per_kv)

    @cached_property
    def keys(self) -> Split:
        """Elements of all keys over columns of cores."""
        return self.units.scaled(2)

    @cached_property
    def heads(self) -> tuple[tuple[Part, ...], ...]:
        """For each key/value head its parts, west to east."""
        half = self.head_dim // 2
        out = []
        for head in range(self.n_kv_heads):
            parts = []
            for col in self.units.used.tolist():
                low = max(int(self.units.starts[col]), head * half)
                high = min(int(self.units.stops[col]), (head + 1) * half)
                if low < high:
                    values = high - low if self.value_dim is None else max(min(high, self.value_dim // 2) - low, 0)
                    parts.append(Part(col, low - int(self.units.starts[col]), high - low, values))
            out.append(tuple(parts))
        return tuple(out)

    @cached_property
    def n_parts(self) -> int:
        """Parts of all heads."""
        return sum(len(parts) for parts in self.heads)

    @cached_property
    def n_value_parts(self) -> int:
        """Parts of all heads that have values."""
        return sum(part.n_values > 0 for parts in self.heads for part in parts)

    @cached_property
    def parts(self) -> Split:
        """Parts of all heads over columns of cores."""
        ends = np.cumsum(self.heads_per_col)
        return Split(self.n_parts, ends - self.heads_per_col, ends)

    @cached_property
    def part_heads(self) -> Ints:
        """(n_parts,) the head of each part, column by column."""
        by_column = sorted((part.col, head) for head, parts in enumerate(self.heads) for part in parts)
        return np.array([head for _, head in by_column], np.int64)

    @cached_property
    def unit_elements(self) -> Ints:
        """Elements of one head, in the order of its pair units, that each column works on, side by side; its whole heads share one set."""
        return np.concatenate([np.arange(start, stop) for start, stop in self._element_ranges])

    @cached_property
    def unit_weights(self) -> Split:
        """`unit_elements` over columns of cores."""
        stops = np.cumsum([stop - start for start, stop in self._element_ranges])
        return Split(int(stops[-1]), np.concatenate([[0], stops[:-1]]), stops)

    @cached_property
    def _element_ranges(self) -> list[tuple[int, int]]:
        """First and last element (plus one) of a head on each column."""
        ranges = [(0, 0)] * self.n_cols
        for parts, first in zip(self.heads, range(0, self.units.total, self.head_dim // 2), strict=True):
            for part in parts:
                begin = int(self.units.starts[part.col]) + part.first_unit - first
                ranges[part.col] = 2 * begin, 2 * (begin + part.n_units)
        return ranges

    @cached_property
    def max_part_units(self) -> int:
        """Pair units of the largest part."""
        return max(part.n_units for parts in self.heads for part in parts)

    @cached_property
    def heads_per_col(self) -> Ints:
        """(n_cols,) heads of which each column holds a part."""
        count = np.zeros(self.n_cols, np.int64)
        for parts in self.heads:
            for part in parts:
                count[part.col] += 1
        return count

    @property
    def scale(self) -> np.float32:
        """Factor of the scores, in float32."""
        return np.float32(1.0 / np.sqrt(float(self.head_dim)) if self.sm_scale is None else self.sm_scale)

    @property
    def cap(self) -> np.float32:
        """Soft cap of the scaled scores in float32, 0 for none."""
        return np.float32(0.0 if self.score_cap is None else self.score_cap)

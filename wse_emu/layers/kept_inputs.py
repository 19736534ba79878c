"""What recomputing keys and values keeps in their place, every token's input; and the earlier tokens whose inputs a pass takes up again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wse_emu.foundation.key_ranges import keys_of
from wse_emu.wafer.placement import Ints, Split, TokenBands


@dataclass(frozen=True)
class InputLayout:
    """The features of a token over `n_cols` columns, kept as they come; what a cache asks of a `HeadLayout`."""

    hidden_size: int
    n_cols: int

    @cached_property
    def keys(self) -> Split:
        """Features over columns of cores, as the residual stream has them."""
        return Split.balanced(self.hidden_size, self.n_cols)

    @property
    def kv_slots(self) -> int:
        """Blocks of a token on a core."""
        return 1

    @property
    def values_in_keys(self) -> bool:
        """There are no values."""
        return True

    @property
    def kept(self) -> str:
        """What is kept, in reports."""
        return "inputs of keys and values"


@dataclass(frozen=True, slots=True)
class EarlierTokens:
    """Tokens that a pass holds and that are not new, row of cores by row, there sequence by sequence, each in ascending order."""

    bands: TokenBands
    """How they lie over rows."""
    positions: Ints
    """(n,) of each in its sequence."""
    first: Ints
    """(n_runs,) of every run of adjacent positions of one sequence on one row: its first token among these."""
    n: Ints
    """(n_runs,) tokens of it."""
    sequence: Ints
    """(n_runs,) index of its sequence in the pass."""
    row: Ints
    """(n_runs,) row of cores."""

    @property
    def n_tokens(self) -> int:
        """All of them."""
        return self.positions.size

    @property
    def shares(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, sequence, first token, tokens) of every sequence on every row that holds some of it."""
        same = (np.diff(self.row) == 0) & (np.diff(self.sequence) == 0)
        begin = np.flatnonzero(np.append(True, ~same)) if self.n.size else self.n
        n = np.add.reduceat(self.n, begin) if self.n.size else self.n
        return zip(self.row[begin].tolist(), self.sequence[begin].tolist(), self.first[begin].tolist(), n.tolist(), strict=True)

    @property
    def n_stored(self) -> int:
        """How many `shares` there are."""
        return sum(1 for _ in self.shares)

    @staticmethod
    def of(held: list[Ints], splits: list[Split], n_new: list[int], n_rows: int) -> EarlierTokens:
        """Of the keys that the sequences of a pass hold, (m, 2) ranges that end with the new ones, and how they lie."""
        positions = [keys_of(keys)[: split.total - n] for keys, split, n in zip(held, splits, n_new, strict=True)]
        rows = np.concatenate([split.owner[: p.size] for p, split in zip(positions, splits, strict=True)])
        sequence = np.repeat(np.arange(len(positions)), [p.size for p in positions])
        order = np.argsort(rows, kind="stable")
        position, row, sequence = np.concatenate(positions)[order], rows[order], sequence[order]
        ends = np.cumsum(np.bincount(row, minlength=n_rows))
        split = Split(position.size, np.concatenate([[0], ends[:-1]]), ends)
        new = np.ones(position.size, np.bool_)
        new[1:] = (np.diff(row) != 0) | (np.diff(sequence) != 0) | (np.diff(position) != 1)
        first = np.flatnonzero(new)
        n = np.diff(np.append(first, position.size))
        return EarlierTokens(TokenBands(position.size, n_rows, split), position, first, n, sequence[first], row[first])

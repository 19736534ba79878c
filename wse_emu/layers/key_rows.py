"""On which row of cores the keys and values of a token lie, and where the next one goes: growth by shifts, or behind the last.

In both the keys of a sequence lie in ascending order over the rows, so that attention, which walks down the rows, sums in the same order.

References
----------
He et al., "WaferLLM", OSDI 2025, section 5: shift-based against concat-based growth of the key/value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from wse_emu.foundation.arguments import show
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.key_ranges import keys_below, n_keys_of
from wse_emu.wafer.placement import Ints, Split

KvGrowth = Literal["shift", "concat"]
"""How keys and values take in new tokens: all rows stay balanced, or what decoding adds comes to lie on the last row."""


def check_growth(growth: KvGrowth) -> None:
    """Raise `SpecError` for anything else."""
    if not isinstance(growth, str) or growth not in get_args(KvGrowth):
        raise SpecError(f"`kv_growth` must be 'shift' or 'concat', got {show(growth)}")


class KeyRows(Protocol):
    """Where the keys of a batch of sequences lie."""

    def split(self, slot: int, held: Ints) -> Split:
        """How the keys of one sequence that are held, (m, 2) ranges of positions, lie over rows."""

    def room(self, split: Split) -> Ints:
        """(n_rows,) tokens that each row has room for while keys lie like that."""

    def least_room(self, slot: int, capacity: int, pattern: AttentionPattern) -> Ints:
        """(n_rows,) tokens that each row has room for at all times, so that what is kept between passes fits at every length."""


class ShiftedRows:
    """A balanced split of what is held: rows differ by at most one token at any length, and tokens shift as it grows."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    def split(self, slot: int, held: Ints) -> Split:
        """See `KeyRows`."""
        del slot
        return Split.balanced(n_keys_of(held), self._n_rows)

    def room(self, split: Split) -> Ints:
        """The same for all rows, so that a token more on the first of them asks for nothing."""
        return np.full(self._n_rows, split.max_size, np.int64)

    def least_room(self, slot: int, capacity: int, pattern: AttentionPattern) -> Ints:
        """See `KeyRows`."""
        del slot
        return np.full(self._n_rows, -(-pattern.most_held(capacity) // self._n_rows), np.int64)


class ConcatenatedRows:
    """A prompt lies in a balanced split, chunk after chunk; every later token comes to lie on the last row. No token ever moves.

    Parameters
    ----------
    n_rows : int
    prompts : sequence of int
        Tokens of each sequence's prompt.
    """

    def __init__(self, n_rows: int, prompts: Sequence[int]) -> None:
        self._prompts = [Split.balanced(n, n_rows) for n in prompts]

    def split(self, slot: int, held: Ints) -> Split:
        """See `KeyRows`."""
        if not len(held):
            return Split.balanced(0, len(self._prompts[slot]))
        starts, total = keys_below(held, self._prompts[slot].starts), n_keys_of(held)
        return Split(total, starts, np.append(starts[1:], total))

    def room(self, split: Split) -> Ints:
        """What lies there; of a prompt no row has more than the last, which the last of its chunks fills."""
        return split.sizes

    def least_room(self, slot: int, capacity: int, pattern: AttentionPattern) -> Ints:
        """See `KeyRows`."""
        share = self._prompts[slot].sizes.copy()
        share[-1] += capacity - self._prompts[slot].total
        return np.minimum(share, pattern.most_held(capacity))

"""Which keys new tokens attend to, as every core was told: what an indexer chose, until the layers that attend to it are done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wse_emu.wafer.cores import Block
from wse_emu.wafer.placement import Ints, Split
from wse_emu.wafer.wafer import Wafer


class KeptKeys:
    """On every core that holds a part of attention's keys, a bit for each of its row's keys and each new token of the key's sequence.

    Parameters
    ----------
    wafer : Wafer
    columns : Split
        Pair units of attention's keys.
    splits : sequence of Split
        How the keys of each sequence of the pass lie over rows.
    n_new : sequence of int
        New tokens of each.

    Raises
    ------
    SramOverflowError
        If they do not fit.
    """

    def __init__(self, wafer: Wafer, columns: Split, splits: Sequence[Split], n_new: Sequence[int]) -> None:
        self._wafer, self._n_new = wafer, list(n_new)
        self._sizes: Ints = np.stack([split.sizes for split in splits])
        n_bits = self._sizes * np.array(n_new, np.int64)[:, None]
        self._first: Ints = np.cumsum(n_bits, axis=0) - n_bits
        """(n_sequences, n_rows) bit at which a sequence begins."""
        words: Ints = -(-n_bits.sum(axis=0) // 32)
        self._reserved = wafer.sram.allocate("chosen keys", words, (columns.sizes > 0).astype(np.int64), 4)
        self._blocks: dict[tuple[int, int], Block] = {}
        if wafer.cores is not None:
            for row in np.flatnonzero(words).tolist():
                for col in columns.used.tolist():
                    block = self._blocks[row, col] = wafer.cores.arena(row, col).allocate("chosen keys", (int(words[row]),), np.int32)
                    block.write(0)

    def keep(self, core: tuple[int, int], sequence: int, token: int, n_tokens: int, keys: Ints, taken: Block) -> None:
        """Isolated executor: note what a core was told of its row's `keys`: bit i of each word of `taken` is for token ``token + i``."""
        bits = self._bits(core)
        of = bits[self._part(core, sequence)].reshape(-1, self._n_new[sequence])
        of[keys, token : token + n_tokens] = taken.read()[:, None] >> np.arange(n_tokens) & 1
        self._blocks[core].write(np.packbits(bits, bitorder="little").view(np.int32))

    def of(self, core: tuple[int, int], sequence: int, token: int, n_tokens: int) -> tuple[Ints, Ints]:
        """Isolated executor: keys of a core's row that some of the tokens take, and bits of the tokens that take each, by what it keeps."""
        of = self._bits(core)[self._part(core, sequence)].reshape(-1, self._n_new[sequence])[:, token : token + n_tokens]
        takers: Ints = (of.astype(np.int64) << np.arange(n_tokens)).sum(axis=1)
        keys = np.flatnonzero(takers)
        return keys, takers[keys]

    def _bits(self, core: tuple[int, int]) -> NDArray[np.uint8]:
        return np.unpackbits(self._blocks[core].read().view(np.uint8), bitorder="little")

    def _part(self, core: tuple[int, int], sequence: int) -> slice:
        first = int(self._first[sequence, core[0]])
        return slice(first, first + int(self._sizes[sequence, core[0]]) * self._n_new[sequence])

    def free(self) -> None:
        """Give the SRAM back."""
        self._wafer.sram.free(self._reserved)
        if self._wafer.cores is not None:
            for core, block in self._blocks.items():
                self._wafer.cores.arena(*core).free(block)
        self._blocks = {}

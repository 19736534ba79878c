"""Counting what crosses the fabric, message by message: the isolated executor's evidence for the ledger."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from wse_emu.foundation.errors import RouteError
from wse_emu.foundation.wafer_spec import BYTES_PER_WAVELET
from wse_emu.wafer.ledger import Event

Core = tuple[int, int]
_SOUTH, _NORTH, _EAST, _WEST = range(4)


class Traffic:
    """Link loads and message counts of one move; routes go along the row first, then along the column."""

    def __init__(self, n_rows: int, n_cols: int) -> None:
        self._shape = (n_rows, n_cols)
        self._load = np.zeros((4, n_rows, n_cols), np.int64)
        self.count = self.bytes = self.wavelets = self.wavelet_hops = self.max_hops = 0

    def message(self, source: Core, targets: Iterable[Core], n_bytes: int) -> None:
        """Count one message of `n_bytes` from `source` to all `targets` (a multicast tree if there are several).

        Raises
        ------
        RouteError
            If a position lies off the grid.
        """
        if n_bytes == 0:
            return
        links: set[tuple[int, int, int]] = set()
        for target in targets:
            path = list(self._path(source, target))
            self.max_hops = max(self.max_hops, len(path))
            links.update(path)
        words = -(-n_bytes // BYTES_PER_WAVELET)
        self.count += 1
        self.bytes += n_bytes
        self.wavelets += words
        self.wavelet_hops += words * len(links)
        for link in links:
            self._load[link] += words

    def event(self, kind: str, name: str, colors: int) -> Event:
        """Everything counted so far as one ledger event."""
        return Event(
            None, "", kind, name, count=self.count, bytes=self.bytes, wavelets=self.wavelets, wavelet_hops=self.wavelet_hops,
            max_link_wavelets=int(self._load.max(initial=0)), max_hops=self.max_hops, colors=colors if self.count else 0,
        )  # fmt: skip

    def _path(self, source: Core, target: Core) -> Iterable[tuple[int, int, int]]:
        (row, col), (to_row, to_col) = source, target
        for r, c in (source, target):
            if not (0 <= r < self._shape[0] and 0 <= c < self._shape[1]):
                raise RouteError(f"core ({r}, {c}) is off the grid of {self._shape[0]} x {self._shape[1]} cores")
        while col != to_col:
            yield (_EAST if to_col > col else _WEST), row, col
            col += 1 if to_col > col else -1
        while row != to_row:
            yield (_SOUTH if to_row > row else _NORTH), row, col
            row += 1 if to_row > row else -1

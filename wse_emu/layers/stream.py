"""Weights on their way from MemoryX to the wafer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.precision import HalfType
from wse_emu.foundation.weights import TILE_COLS


@dataclass(frozen=True, slots=True)
class StreamedVector:
    """One vector at rest; `values` is None when only shapes are streamed."""

    name: str
    values: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class StreamedMatrix:
    """One matrix ``[n_in, n_out]`` at rest, tiled by `TILE_COLS` columns; `tiles` is None when only shapes are streamed."""

    name: str
    n_in: int
    n_out: int
    tiles: NDArray[np.float32] | None
    disk_bytes: int | None = None
    """Bytes of its codes and scales as the checkpoint holds it; None is float32."""
    skip_zeros: bool = False
    """Whether weights that are zero (all bits; not -0) stay behind."""
    sums: HalfType | None = None
    """Format of 16 bits in which a row of cores hands on the partial sums of products with it; None is float32."""

    @property
    def n_bytes(self) -> int:
        """Bytes that cross the wafer's edge when all of it streams."""
        return 4 * self.n_in * self.n_out if self.disk_bytes is None else self.disk_bytes

    @property
    def leaves_zeros(self) -> bool:
        """Whether what streams depends on the values, which are there."""
        return self.skip_zeros and self.tiles is not None

    def bytes_of(self, n_weights: int) -> int:
        """Bytes of so many of its weights, rounded up."""
        return -(-self.n_bytes * n_weights // max(1, self.n_in * self.n_out))

    @property
    def values(self) -> NDArray[np.float32]:
        """The tiles; asking for them when only shapes are streamed is a mistake of the program."""
        assert self.tiles is not None, f"`{self.name}` is streamed without values"
        return self.tiles

    def columns(self, start: int, stop: int) -> NDArray[np.float32]:
        """Columns ``[start, stop)`` as a new C-contiguous ``(n_in, stop - start)`` array."""
        out = np.empty((self.n_in, stop - start), np.float32)
        at = start
        while at < stop:
            first = at // TILE_COLS * TILE_COLS
            width = min(TILE_COLS, self.n_out - first)
            tile = self.values[first * self.n_in : (first + width) * self.n_in].reshape(self.n_in, width)
            end = min(stop, first + width)
            out[:, at - start : end - start] = tile[:, at - first : end - first]
            at = end
        return out

    def slice(self, start: int, stop: int) -> StreamedMatrix:
        """Columns ``[start, stop)`` as a matrix of their own, without a copy; `start` must lie on a tile's edge."""
        assert start % TILE_COLS == 0
        assert stop % TILE_COLS == 0 or stop == self.n_out
        tiles = None if self.tiles is None else self.tiles[start * self.n_in : stop * self.n_in]
        disk = self.disk_bytes
        share = None if disk is None else disk * stop // self.n_out - disk * start // self.n_out
        return StreamedMatrix(self.name, self.n_in, stop - start, tiles, share, self.skip_zeros, self.sums)

    def some(self, name: str, columns: NDArray[np.int64]) -> StreamedMatrix:
        """Some columns as a matrix of their own, with a copy; their share of the bytes on disk, rounded up."""
        n, tiles = columns.size, None
        if self.tiles is not None:
            chosen = self.columns(0, self.n_out)[:, columns]
            tiles = np.concatenate([chosen[:, at : at + TILE_COLS].reshape(-1) for at in range(0, n, TILE_COLS)])
            tiles.flags.writeable = False  # as all weights: one compiled specialisation of what multiplies them
        share = None if self.disk_bytes is None else -(-self.disk_bytes * n // self.n_out)
        return StreamedMatrix(name, self.n_in, n, tiles, share, self.skip_zeros, self.sums)


@dataclass(frozen=True, slots=True)
class StreamedHeads:
    """One matrix ``[n_in, n_out]`` for every head at rest, one after another, each tiled by itself; `tiles` as in `StreamedMatrix`."""

    name: str
    n_heads: int
    n_in: int
    n_out: int
    tiles: NDArray[np.float32] | None
    disk_bytes: int | None = None
    skip_zeros: bool = False
    sums: HalfType | None = None

    def head(self, head: int) -> StreamedMatrix:
        """The matrix of one head, without a copy; in the ledger all go by one name."""
        size = self.n_in * self.n_out
        tiles = None if self.tiles is None else self.tiles[head * size : (head + 1) * size]
        share = None if self.disk_bytes is None else -(-self.disk_bytes // self.n_heads)
        return StreamedMatrix(self.name, self.n_in, self.n_out, tiles, share, self.skip_zeros, self.sums)

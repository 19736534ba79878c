"""A tensor that lies on the wafer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import PlacementError, SramStateError
from wse_emu.foundation.precision import HalfType
from wse_emu.wafer.cores import Block
from wse_emu.wafer.placement import Placement
from wse_emu.wafer.sram import Reservation
from wse_emu.wafer.storage import overflow, round_in_place

if TYPE_CHECKING:
    from types import TracebackType

    from wse_emu.wafer.wafer import Wafer


class PlacedTensor:
    """One tensor cut into blocks, one per core; made by `Wafer.place` and `Wafer.empty`.

    Use it as a context manager, or call `free`, to give its SRAM back.
    """

    __slots__ = ("_data", "_reservation", "blocks", "dtype", "name", "ndim", "placement", "stored", "wafer")

    def __init__(
        self, wafer: Wafer, name: str, placement: Placement, dtype: np.dtype[Any], ndim: int, reservation: Reservation,
        data: NDArray[Any] | None, blocks: dict[tuple[int, int], Block] | None, stored: HalfType | None = None,
    ) -> None:  # fmt: skip
        self.wafer = wafer
        self.name = name
        self.placement = placement
        """Where the blocks lie; print it."""
        self.dtype = dtype
        self.ndim = ndim
        self.stored = stored
        """Format of 16 bits to which its float32 numbers are rounded where SRAM is written; None leaves them."""
        self._reservation: Reservation | None = reservation
        self._data = data
        self.blocks = blocks
        """Block of every core (isolated and interpreted executors), else None."""

    @property
    def data(self) -> NDArray[Any] | None:
        """Flat column-panel-major buffer (batched executor), whatever writes to it done; else None."""
        self.wafer.pending.finish()
        return self._data

    @property
    def flat(self) -> NDArray[Any]:
        """The buffer of the batched executor; asking for it elsewhere is a mistake of the program."""
        self.wafer.pending.finish()
        return self.unsettled

    @property
    def unsettled(self) -> NDArray[Any]:
        """The same for who does not look at it yet: an argument of `Pending.run` and `Pending.behind`."""
        assert self._data is not None, f"`{self.name}` has no flat buffer"
        return self._data

    def settle(self, n: int | None = None) -> None:
        """Round what a program wrote into `flat` to the format that is stored: everything, or the first `n` numbers.

        Raises
        ------
        NumberOverflowError
            If a finite number is beyond the format's largest.
        """
        if self.stored is None or self._data is None:
            return
        beyond = round_in_place(self.flat if n is None else self.flat[:n], self.stored)
        if beyond is not None:
            raise overflow(self.wafer.ledger.where(self.name), beyond, self.stored)

    @property
    def held(self) -> dict[tuple[int, int], Block]:
        """The blocks of the isolated executors; asking for them elsewhere is a mistake of the program."""
        assert self.blocks is not None, f"`{self.name}` has no blocks"
        return self.blocks

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.placement.shape if self.ndim == 2 else self.placement.shape[1:]

    def block_shape(self, row: int, col: int) -> tuple[int, ...]:
        """Shape of the block of core (row, col)."""
        i0, i1, j0, j1 = self.placement.ranges(row, col)
        return (i1 - i0, j1 - j0) if self.ndim == 2 else (j1 - j0,)

    def block(self, row: int, col: int) -> NDArray[Any]:
        """The block of core (row, col): a view, for looking at; empty arrays for idle cores.

        Raises
        ------
        SramStateError
            If the tensor was freed, or the executor is ``dry``.
        PlacementError
            If the core lies off the grid.
        """
        self._check_live()
        if not (0 <= row < self.wafer.rows and 0 <= col < self.wafer.cols):
            raise PlacementError(f"`{self.name}`: core ({row}, {col}) is off the grid of {self.wafer.rows} x {self.wafer.cols} cores")
        shape = self.block_shape(row, col)
        if self.blocks is not None:
            found = self.blocks.get((row, col))
            return np.empty(shape, self.dtype) if found is None else found.array
        start = self.placement.offset(row, col)
        return self.flat[start : start + int(np.prod(shape))].reshape(shape)

    def gather(self) -> NDArray[Any]:
        """The whole tensor on the host, through the probe channel; replicas are read once.

        Returns
        -------
        ndarray
            New C-contiguous array of `shape`.
        """
        self._check_live()
        return self.wafer.drain(self, kind="probe")

    def free(self) -> None:
        """Give the SRAM back; the tensor cannot be used any more."""
        if self._reservation is None:
            raise SramStateError(f"`{self.name}` is not on the wafer: it was freed before")
        self.wafer.release(self, self._reservation)
        self._reservation = None
        self._data = self.blocks = None

    def check_placed(self, wafer: Wafer) -> None:
        """Raise unless the tensor lies on `wafer`.

        Raises
        ------
        SramStateError
            If it was freed.
        PlacementError
            If it lies on another wafer.
        """
        if self._reservation is None:
            raise SramStateError(f"`{self.name}` is not on the wafer: it was freed before")
        if self.wafer is not wafer:
            raise PlacementError(f"`{self.name}` lies on another wafer")

    def _check_live(self) -> None:
        self.check_placed(self.wafer)
        if self._data is None and self.blocks is None:
            raise SramStateError(f"`{self.name}` has no values: the `dry` executor moves shapes and counts only")

    def __enter__(self) -> PlacedTensor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reservation is not None:
            self.free()

    def __repr__(self) -> str:
        return f"PlacedTensor({self.name!r}, {self.shape}, {self.dtype if self.stored is None else self.stored})"

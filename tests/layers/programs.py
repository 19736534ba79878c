"""Run one mesh program on every executor, and hold values, ledgers and SRAM together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.linear import Selection
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Values = Sequence[NDArray[Any]]
EXECUTORS = ("batched", "isolated", "interpreted", "dry")


def assert_same_bits(first: NDArray[Any], second: NDArray[Any]) -> None:
    """Shape, type and every bit, also of zeros."""
    assert first.dtype == second.dtype
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.signbit(first), np.signbit(second))


def agree(program: Callable[[wse.Wafer], Values], rows: int, cols: int) -> tuple[Values, wse.Wafer]:
    """Values of a program, and the batched wafer it ran on.

    The program runs on every executor: those that compute give the same bits, all leave the same ledger, event by event, hold as much SRAM
    at most, and leave nothing behind. Where programs that ran before are accounted for by what they recorded, it runs once more.
    """
    wafers = {name: wse.Wafer(rows=rows, cols=cols, executor=name) for name in EXECUTORS}
    values = {name: program(wafer) for name, wafer in wafers.items()}
    for name in ("batched", "dry"):
        events = wafers[name].ledger.events()
        wafers[name].ledger.clear()
        for again, first in zip(program(wafers[name]), values[name], strict=True):
            assert_same_bits(again, first)
        assert wafers[name].ledger.events() == events, name
    batched = wafers["batched"]
    for name, wafer in wafers.items():
        assert wafer.ledger.events() == batched.ledger.events(), name
        assert wafer.sram.high_water_bytes == batched.sram.high_water_bytes, name
        assert not wafer.sram.live, name
        assert len(values[name]) == len(values["batched"])
        if not wafer.is_dry:
            for ours, theirs in zip(values[name], values["batched"], strict=True):
                assert_same_bits(ours, theirs)
    return values["batched"], batched


def tokens(wafer: wse.Wafer, values: F32, bands: TokenBands, split: Split | None = None, name: str = "x") -> PlacedTensor:
    """Activations (T, n) on the wafer: tokens by `bands`, features by `split` (balanced by default)."""
    tensor = room(wafer, bands, split or Split.balanced(values.shape[1], wafer.cols), name)
    wafer.inject(tensor, None if wafer.is_dry else values)
    return tensor


def room(wafer: wse.Wafer, bands: TokenBands, split: Split, name: str = "out") -> PlacedTensor:
    """Undefined activations, placed likewise."""
    return wafer.empty(name, wafer.placement((bands.n_tokens, split.total), ("row", bands.split), ("col", split)))


def streamed(wafer: wse.Wafer, w: F32, name: str = "w") -> StreamedMatrix:
    """A matrix (n_in, n_out) at rest: tiles of `TILE_COLS` columns, each contiguous."""
    tiles = np.concatenate([w[:, j : j + TILE_COLS].ravel() for j in range(0, w.shape[1], TILE_COLS)])
    tiles.flags.writeable = False
    return StreamedMatrix(name, *w.shape, None if wafer.is_dry else tiles)


def look(tensor: PlacedTensor) -> NDArray[Any]:
    """The whole tensor through the probe channel; zeros from a dry wafer."""
    return tensor.wafer.drain(tensor, kind="probe")


def selection_on_cores(wafer: wse.Wafer, bands: TokenBands, chosen: Ints, scale: F32) -> tuple[Selection, list[PlacedTensor]]:
    """A selection whose lists lie on the cores, as a router leaves them; and the tensors to free afterwards."""
    local, weights = np.zeros((1, bands.n_tokens), np.int64), np.zeros((1, bands.n_tokens), np.float32)
    for start, stop in zip(bands.split.starts.tolist(), bands.split.stops.tolist(), strict=True):
        mine = (chosen >= start) & (chosen < stop)
        n = int(mine.sum())
        local[0, start : start + n], weights[0, start : start + n] = chosen[mine] - start, scale[mine]
    place = wafer.placement((1, bands.n_tokens), (None, None), ("row", bands.split))
    lists = [wafer.empty("chosen", place, np.int64, ndim=1), wafer.empty("scales", place, ndim=1)]
    for tensor, values in zip(lists, (local[0], weights[0]), strict=True):
        wafer.inject(tensor, None if wafer.is_dry else values)
    known = Selection.of_tokens(chosen, bands.split, scale)
    return Selection(known.counts, known.rows, known.scale, *lists), lists


def any_split(rng: np.random.Generator, total: int, parts: int) -> Split:
    """A partition that is balanced or not, with empty parts anywhere."""
    if rng.random() < 0.5:
        return Split.balanced(total, parts)
    cuts = np.concatenate([[0], np.sort(rng.integers(0, total + 1, parts - 1)), [total]])
    return Split(total, cuts[:-1], cuts[1:])

"""Pieces of a matrix at rest in tiles: any range of columns, and parts that begin on a tile's edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.stream import StreamedMatrix

from .definitions import normal
from .programs import streamed

WAFER = wse.Wafer(rows=1, cols=1)
N_OUT = 2 * TILE_COLS + 37


@given(st.integers(0, N_OUT), st.integers(0, N_OUT))
def test_columns_are_those_of_the_matrix(a: int, b: int) -> None:
    w = normal(0, 3, N_OUT)
    start, stop = min(a, b), max(a, b)
    piece = streamed(WAFER, w).columns(start, stop)
    assert piece.flags.c_contiguous
    np.testing.assert_array_equal(piece, w[:, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, N_OUT), (0, TILE_COLS), (TILE_COLS, 2 * TILE_COLS), (2 * TILE_COLS, N_OUT)])
def test_a_slice_is_a_matrix_without_a_copy(start: int, stop: int) -> None:
    w = normal(1, 3, N_OUT)
    whole = streamed(WAFER, w)
    part = whole.slice(start, stop)
    assert (part.name, part.n_in, part.n_out) == ("w", 3, stop - start)
    assert np.shares_memory(part.values, whole.values)
    np.testing.assert_array_equal(part.columns(0, stop - start), w[:, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(1, N_OUT), (0, TILE_COLS + 1)])
def test_a_slice_off_the_tiles_edges_is_a_mistake(start: int, stop: int) -> None:
    with pytest.raises(AssertionError):
        streamed(WAFER, normal(2, 3, N_OUT)).slice(start, stop)


def test_shapes_alone_have_slices_but_no_values() -> None:
    shape = StreamedMatrix("w", 3, N_OUT, None).slice(TILE_COLS, N_OUT)
    assert (shape.n_out, shape.tiles) == (N_OUT - TILE_COLS, None)
    with pytest.raises(AssertionError, match="`w` is streamed without values"):
        shape.columns(0, 1)

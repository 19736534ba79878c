"""Every move against its definition in plain NumPy, on any grid, split and element type; all executors give the same bits and ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.wafer import moves
from wse_emu.wafer.placement import Placement, Split

from .programs import (
    DTYPES,
    GRIDS,
    MAX_EXAMPLES,
    SEEDS,
    Array,
    assert_same_bits,
    block_range,
    look,
    numbers,
    partitions,
    put,
    random_bits,
    run_everywhere,
    splits,
)

SIZES = st.integers(0, 7)
LENGTH = {"row": 0, "col": 1}
LINES = pytest.mark.parametrize("passed", ["row", "col"])


def bits(arrays: list[Array]) -> list[Array]:
    """The same as unsigned integers: a move keeps every bit, also of a NaN."""
    return [a.view(f"u{a.itemsize}") for a in arrays]


@st.composite
def along(draw: st.DrawFn, passed: str, grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, Any]:
    """Which tensor axis moves, and a function that makes a placement from a pair for that axis; the other axis is drawn."""
    axis = draw(st.integers(0, 1))
    other = "col" if passed == "row" else "row"
    across = (
        (other, draw(splits(shape[1 - axis], grid[LENGTH[other]]))) if draw(st.booleans()) else (None, Split.balanced(shape[1 - axis], 1))
    )

    def place(pair: tuple[Any, Split]) -> Placement:
        pairs = (pair, across) if axis == 0 else (across, pair)
        return Placement(shape, *pairs, *grid)

    return axis, place


def blocks_at(values: Array, place: Placement) -> dict[tuple[int, int], Array]:
    return {(r, c): values[block_range(place, r, c)] for r in range(place.n_rows) for c in range(place.n_cols)}


@LINES
@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, SIZES, SIZES, st.sampled_from(DTYPES), SEEDS)
def test_a_broadcast_leaves_the_sender_s_block_on_every_receiver(passed, data, grid, m, n, dtype, seed) -> None:
    axis, place = data.draw(along(passed, grid, (m, n)))
    total, length = (m, n)[axis], grid[LENGTH[passed]]
    source = place((passed, Split.single(total, data.draw(st.integers(0, length - 1)), length)))
    if data.draw(st.booleans()):
        out = place((None, Split.balanced(total, 1)))
    else:
        out = place((passed, Split.everywhere(total, length, sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))))
    values = random_bits(seed, (m, n), dtype)
    move = moves.broadcast_row if passed == "col" else moves.broadcast_col

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", source, values) as x, wafer.empty("y", out, dtype) as y:
            move(wafer, x, y)
            return bits(look(y))

    (whole, *blocks), _ = run_everywhere(grid, program)
    assert_same_bits(whole, bits([values])[0])
    for block, expected in zip(blocks, blocks_at(whole, out).values(), strict=True):
        assert_same_bits(block, expected)


@LINES
@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, SIZES, SIZES, st.sampled_from(DTYPES), SEEDS)
def test_an_all_gather_leaves_the_whole_axis_everywhere(passed, data, grid, m, n, dtype, seed) -> None:
    axis, place = data.draw(along(passed, grid, (m, n)))
    total, length = (m, n)[axis], grid[LENGTH[passed]]
    source = place((passed, data.draw(partitions(total, length))))
    out = place((None, Split.balanced(total, 1)))
    values = random_bits(seed, (m, n), dtype)
    move = moves.all_gather_row if passed == "col" else moves.all_gather_col

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", source, values) as x, wafer.empty("y", out, dtype) as y:
            move(wafer, x, y)
            return bits(look(y))

    (whole, *blocks), _ = run_everywhere(grid, program)
    assert_same_bits(whole, bits([values])[0])
    for block, expected in zip(blocks, blocks_at(whole, out).values(), strict=True):
        assert_same_bits(block, expected)


@LINES
@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(1, 3), st.integers(0, 5), st.integers(-7, 7), st.sampled_from(DTYPES), SEEDS)
def test_a_shift_moves_blocks_by_n_and_leaves_the_rest(passed, data, grid, size, k, n, dtype, seed) -> None:
    length = grid[LENGTH[passed]]
    axis = data.draw(st.integers(0, 1))
    other = "col" if passed == "row" else "row"
    across = (other, data.draw(splits(k, grid[LENGTH[other]])))
    pair = (passed, Split.balanced(size * length, length))
    shape = (size * length, k) if axis == 0 else (k, size * length)
    place = Placement(shape, *((pair, across) if axis == 0 else (across, pair)), *grid)
    values, before = random_bits(seed, shape, dtype), random_bits(seed + 1, shape, dtype)
    move = moves.shift_cols if passed == "col" else moves.shift_rows

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", place, values) as x, put(wafer, "y", place, before) as y:
            move(wafer, x, y, n)
            return bits(look(y))

    (whole, *_), _ = run_everywhere(grid, program)
    expected = np.moveaxis(before.copy(), axis, 0)
    moved = np.moveaxis(values, axis, 0)
    for at in range(length):
        if 0 <= at - n < length:
            expected[at * size : (at + 1) * size] = moved[(at - n) * size : (at - n + 1) * size]
    assert_same_bits(whole, bits([np.ascontiguousarray(np.moveaxis(expected, 0, axis))])[0])


@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, SIZES, st.integers(1, 6), SEEDS)
def test_a_chain_along_a_row_adds_west_to_east_and_delivers_to_the_owners(data, grid, m, n, seed) -> None:
    rows, cols = grid
    stations = sorted(data.draw(st.sets(st.integers(0, cols - 1), min_size=1)))
    of_rows = ("row", data.draw(splits(m, rows))) if data.draw(st.booleans()) else (None, Split.balanced(m, 1))
    out = Placement((m, n), of_rows, ("col", data.draw(splits(n, cols))), rows, cols)
    parts = Placement((m, n * len(stations)), of_rows, ("col", Split.uniform(n, cols, stations)), rows, cols)
    values = numbers(seed, m, n * len(stations))

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "p", parts, values) as p, wafer.empty("y", out) as y:
            moves.chain_row(wafer, p, y)
            return look(y)

    (whole, *blocks), _ = run_everywhere(grid, program)
    expected = np.empty((m, n), np.float32)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(m, n):
            acc = values[i, j]
            for at in range(1, len(stations)):
                acc = acc + values[i, at * n + j]
            expected[i, j] = acc
    assert_same_bits(whole, expected)
    for block, of_core in zip(blocks, blocks_at(whole, out).values(), strict=True):
        assert_same_bits(block, of_core)


@pytest.mark.parametrize("op", ["add", "max", "or"])
@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(1, 5), SIZES, SEEDS)
def test_a_chain_along_a_column_combines_north_to_south(op, data, grid, m, n, seed) -> None:
    rows, cols = grid
    stations = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    of_cols = ("col", data.draw(splits(n, cols))) if data.draw(st.booleans()) else (None, Split.balanced(n, 1))
    out = Placement((m, n), ("row", Split.single(m, stations[-1], rows)), of_cols, rows, cols)
    parts = Placement((m * len(stations), n), ("row", Split.uniform(m, rows, stations)), of_cols, rows, cols)
    values = random_bits(seed, parts.shape, "int32") if op == "or" else numbers(seed, *parts.shape)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "p", parts, values) as p, wafer.empty("y", out, values.dtype) as y:
            moves.chain_col(wafer, p, y, op)
            return look(y)

    (whole, *blocks), _ = run_everywhere(grid, program)
    expected = np.empty((m, n), values.dtype)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(m, n):
            acc = values[i, j]
            for at in range(1, len(stations)):
                p = values[at * m + i, j]
                if op == "add":
                    acc = acc + p
                elif op == "or":
                    acc = acc | p
                elif p > acc or np.isnan(p):
                    acc = p
            expected[i, j] = acc
    assert_same_bits(whole, expected)
    for block, of_core in zip(blocks, blocks_at(whole, out).values(), strict=True):
        assert_same_bits(block, of_core)


def test_opposite_infinities_chain_to_a_nan_without_a_word() -> None:
    parts = Placement((2, 1), ("row", Split.uniform(1, 2)), ("col", Split.single(1, 0, 1)), 2, 1)
    out = Placement((1, 1), ("row", Split.single(1, 1, 2)), ("col", Split.single(1, 0, 1)), 2, 1)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "p", parts, np.array([[np.inf], [-np.inf]], np.float32)) as p, wafer.empty("y", out) as y:
            moves.chain_col(wafer, p, y)
            return look(y)

    (whole, *_), _ = run_everywhere((2, 1), program)
    assert np.isnan(whole).all()


@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, SIZES, SIZES, st.sampled_from(DTYPES), SEEDS)
def test_a_send_replaces_one_block(data, grid, m, n, dtype, seed) -> None:
    rows, cols = grid
    mine = Placement((m, n), ("row", data.draw(splits(m, rows))), ("col", data.draw(splits(n, cols))), rows, cols)
    start = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    end = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    a, b = (s.stop - s.start for s in block_range(mine, *start))
    theirs = Placement((a * rows, b * cols), ("row", Split.uniform(a, rows)), ("col", Split.uniform(b, cols)), rows, cols)
    values, before = random_bits(seed, (m, n), dtype), random_bits(seed + 1, theirs.shape, dtype)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", mine, values) as x, put(wafer, "y", theirs, before) as y:
            moves.send(wafer, x, y, start, end)
            return bits(look(y))

    (whole, *_), events = run_everywhere(grid, program)
    expected = before.copy()
    expected[block_range(theirs, *end)] = values[block_range(mine, *start)]
    assert_same_bits(whole, bits([expected])[0])
    (event,) = (e for e in events if e.kind == "send")
    hops = abs(start[0] - end[0]) + abs(start[1] - end[1])
    assert event.bytes == (a * b * values.itemsize if hops else 0)
    assert event.wavelet_hops == event.wavelets * hops


@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_a_send_within_one_tensor_copies_a_block(data, grid, a, b, seed) -> None:
    rows, cols = grid
    place = Placement((a * rows, b * cols), ("row", Split.uniform(a, rows)), ("col", Split.uniform(b, cols)), rows, cols)
    start = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    end = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    values = random_bits(seed, place.shape, "int32")

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", place, values) as x:
            moves.send(wafer, x, x, start, end)
            return look(x)

    (whole, *_), _ = run_everywhere(grid, program)
    expected = values.copy()
    expected[block_range(place, *end)] = values[block_range(place, *start)]
    assert_same_bits(whole, expected)


@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), GRIDS, SIZES, SIZES, st.sampled_from(DTYPES), SEEDS)
def test_a_gather_leaves_everything_on_one_core(data, grid, m, n, dtype, seed) -> None:
    rows, cols = grid
    flip = data.draw(st.booleans())
    axes = [("row", data.draw(partitions(m, rows))), ("col", data.draw(partitions(n, cols)))]
    if flip:
        axes = [("col", data.draw(partitions(m, cols))), ("row", data.draw(partitions(n, rows)))]
    source = Placement((m, n), *axes, rows, cols)
    core = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    out = Placement((m, n), ("row", Split.single(m, core[0], rows)), ("col", Split.single(n, core[1], cols)), rows, cols)
    values = random_bits(seed, (m, n), dtype)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", source, values) as x, wafer.empty("y", out, dtype) as y:
            moves.gather_to_core(wafer, x, y)
            return bits(look(y))

    (whole, *blocks), _ = run_everywhere(grid, program)
    assert_same_bits(whole, bits([values])[0])
    assert_same_bits(blocks[core[0] * cols + core[1]], whole)


@settings(max_examples=MAX_EXAMPLES)
@given(st.data(), st.integers(1, 6), st.integers(1, 9), SEEDS)
def test_vectors_move_as_one_row(data, cols, n, seed) -> None:
    values = numbers(seed, n)
    at = data.draw(st.integers(0, cols - 1))
    whole, single = ((None, None), (None, None)), ("col", Split.single(n, at, cols))

    def program(wafer: wse.Wafer) -> list[Array]:
        with (
            wafer.place(values, name="x") as x,
            wafer.empty("y", wafer.placement((1, n), *whole), ndim=1) as y,
            wafer.empty("z", wafer.placement((1, n), (None, None), single), ndim=1) as z,
            wafer.empty("q", wafer.placement((1, n), *whole), ndim=1) as q,
        ):
            moves.all_gather_row(wafer, x, y)
            wafer.inject(z, None if wafer.is_dry else values)
            moves.broadcast_row(wafer, z, q)
            return [*look(y), *look(q)]

    results, _ = run_everywhere((2, cols), program)
    for result in results:
        assert_same_bits(result, values)

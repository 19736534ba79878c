"""Splits and placements, and what the host puts on the wafer and takes off it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.wafer.placement import Placement, Split, TokenBands

from .programs import (
    DTYPES,
    EXECUTORS,
    GRIDS,
    MAX_EXAMPLES,
    SEEDS,
    Array,
    assert_same_bits,
    blocks_of,
    look,
    placements,
    put,
    random_bits,
    refused_everywhere,
    run_everywhere,
    splits,
)

RANGES = st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9)), min_size=1, max_size=6)


def is_allowed(total: int, ranges: list[tuple[int, int]]) -> bool:
    """The rule, element by element: every element lies somewhere, and all ranges that hold it are equal."""
    if any(not 0 <= start <= stop <= total for start, stop in ranges):
        return False
    return all(len({r for r in ranges if r[0] <= i < r[1]}) == 1 for i in range(total))


@settings(max_examples=max(100, MAX_EXAMPLES))
@given(st.integers(0, 8), RANGES)
def test_a_split_covers_its_axis_and_its_ranges_are_equal_or_disjoint(total: int, ranges: list[tuple[int, int]]) -> None:
    starts, stops = np.array([r[0] for r in ranges]), np.array([r[1] for r in ranges])
    if not is_allowed(total, ranges):
        with pytest.raises(wse.PlacementError, match=r"ranges must lie in|overlap; they must be equal|lie nowhere; the ranges of a split"):
            Split(total, starts, stops)
        return
    check_split(Split(total, starts, stops), total, ranges)


@settings(max_examples=4 * MAX_EXAMPLES)
@given(st.data(), st.integers(0, 9), st.integers(1, 6))
def test_replicas_and_other_orders_are_told_by_their_labels(data: Any, total: int, parts: int) -> None:
    split = data.draw(splits(total, parts))
    check_split(split, total, list(zip(split.starts.tolist(), split.stops.tolist(), strict=True)))


def check_split(split: Split, total: int, ranges: list[tuple[int, int]]) -> None:
    """Everything a split says of itself, from the sets of elements that its ranges hold."""
    held = [set(range(a, b)) for a, b in ranges]
    assert [set(range(a, b)) for a, b in zip(split.starts.tolist(), split.stops.tolist(), strict=True)] == held
    assert split.sizes.tolist() == [len(h) for h in held]
    assert split.used.tolist() == [i for i, h in enumerate(held) if h]
    first = {i: held.index(h) if h else -1 for i, h in enumerate(held)}
    assert split.labels.tolist() == list(first.values())
    assert split.representatives.tolist() == sorted(set(first.values()) - {-1})
    assert split.owner.tolist() == [next(i for i, h in enumerate(held) if e in h) for e in range(total)]
    in_order = [e for h in held for e in sorted(h)] == list(range(total))
    assert split.is_partition == in_order
    if in_order:
        assert split.offsets.tolist() == np.concatenate([[0], np.cumsum([len(h) for h in held])]).tolist()
    else:
        with pytest.raises(wse.PlacementError, match="it has no boundaries"):
            _ = split.offsets


@given(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_where_an_empty_range_lies_does_not_tell_splits_apart(total: int, at: list[int]) -> None:
    starts, stops = np.array([min(i, total) for i in at] + [0]), np.array([min(i, total) for i in at] + [total])
    assert Split(total, starts, stops) == Split.single(total, len(at), len(at) + 1)
    assert hash(Split(total, starts, stops)) == hash(Split.single(total, len(at), len(at) + 1))


@given(st.integers(0, 40), st.integers(1, 12))
def test_balanced_sizes_differ_by_at_most_one(total: int, parts: int) -> None:
    sizes = Split.balanced(total, parts).sizes
    assert (len(sizes), sizes.sum()) == (parts, total)
    assert sizes.max() - sizes.min() <= 1


@given(st.integers(0, 5), st.integers(1, 6), st.data())
def test_uniform_and_everywhere_at_some_positions(size: int, parts: int, data: Any) -> None:
    at = sorted(data.draw(st.sets(st.integers(0, parts - 1), min_size=1)))
    uniform, everywhere = Split.uniform(size, parts, at), Split.everywhere(size, parts, at)
    assert uniform.total == size * len(at)
    assert uniform.is_partition
    for i in range(parts):
        assert uniform.sizes[i] == everywhere.sizes[i] == (size if i in at else 0)
    assert [int(uniform.starts[i]) for i in at] == [size * k for k in range(len(at))]
    assert Split.uniform(size, parts) == Split.uniform(size, parts, range(parts))


@given(st.integers(0, 12), st.integers(1, 12))
def test_bands_hold_every_token_equally_often(n_tokens: int, n_rows: int) -> None:
    bands = TokenBands(n_tokens, n_rows)
    copies = np.zeros(n_tokens, np.int64)
    for start, stop in zip(bands.split.starts, bands.split.stops, strict=True):
        copies[start:stop] += 1
    assert (copies == bands.n_feature_bands).all()
    assert bands.split.used.size == bands.used_rows


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Split(4, [0], [4, 4]), r"must be of one length, got 1 and 2"),
        (lambda: Split(4, [], []), r"must be a vector of at least one integer"),
        (lambda: Split(4, [[0]], [[4]]), r"must be a vector of at least one integer, got int64 of shape \(1, 1\)"),
        (lambda: Split(4, [0.0], [4.0]), r"must be a vector of at least one integer, got float64"),
        (lambda: Split(4, [False], [True]), r"must be a vector of at least one integer, got bool"),
        (lambda: Split(True, [0], [1]), r"`total` of a split must be an integer of at least 0, got True"),
        (lambda: Split(-1, [0], [0]), r"`total` of a split must be an integer of at least 0, got -1"),
        (lambda: Split(4, [0, 1], [3, 4]), r"ranges \[0, 3\) and \[1, 4\) of a split overlap; they must be equal \(replicas\) or share"),
        (lambda: Split(6, [0, 4], [2, 6]), r"elements 2\.\.3 of 6 lie nowhere; the ranges of a split cover the axis"),
        (lambda: Split(6, [0], [2]), r"elements 2\.\.5 of 6 lie nowhere"),
        (lambda: Split.balanced(-1, 2), r"elements of a split must be an integer of at least 0, got -1"),
        (lambda: Split.balanced(4, 0), r"`parts` of a split must be an integer of at least 1, got 0"),
        (lambda: Split.balanced(4.0, 2), r"elements of a split must be an integer of at least 0, got 4.0"),
        (lambda: Split.balanced(True, 2), r"elements of a split must be an integer of at least 0, got True"),
        (lambda: Split.balanced(4, np.float32(2)), r"`parts` of a split must be an integer of at least 1"),
        (lambda: Split.single(4, 2, 2), r"`index` must lie in 0\.\.1, got 2"),
        (lambda: Split.single(4, -1, 2), r"`index` of a split must be an integer of at least 0, got -1"),
        (lambda: Split.everywhere(4, 2, [2]), r"`at` must rise within 0\.\.1, got \[2\]"),
        (lambda: Split.uniform(4, 3, [1, 0]), r"`at` must rise within 0\.\.2, got \[1, 0\]"),
        (lambda: Split.uniform(4, 3, []), r"`at` must name at least one of the 3 positions by its number"),
        (lambda: Split.uniform(4, 3, [True]), r"`at` must name at least one of the 3 positions by its number"),
        (lambda: place_on((4, 4), ("rows", None)), r"axis 0: a grid axis is 'row', 'col' or None, got 'rows'"),
        (lambda: place_on((4, 4), ("row", Split.balanced(4, 3))), r"axis 0: a split of 3 parts does not fit 2 rows"),
        (lambda: place_on((4, 4), (None, Split.balanced(4, 2))), r"axis 0: a split of 2 parts does not fit an axis that is whole"),
        (lambda: place_on((4, 4), ("row", Split.balanced(5, 2))), r"axis 0: the split covers 5 elements, the tensor has 4"),
        (lambda: place_on((4, 4), ("col", Split.balanced(4, 2))), r"both tensor axes cannot be split over one grid axis"),
        (lambda: place_on((4, 4), ("row", 4)), r"axis 0: expected a `Split`, got 4"),
        (lambda: place_on((4, -4), ("row", None)), r"axis 1 of a placement must be an integer of at least 0, got -4"),
        (lambda: place_on((4,), ("row", None)), r"a placement has two axes, got shape \(4,\)"),
    ],
)  # fmt: skip
def test_a_wrong_split_or_placement_is_told(make: Any, said: str) -> None:
    with pytest.raises(wse.PlacementError, match=said):
        make()


def test_an_axis_without_a_split_is_balanced() -> None:
    wafer = wse.Wafer(wse.TINY, rows=2, cols=3)
    place = wafer.placement([5, 7], ["row", None], (None, None))
    assert place == Placement((5, 7), ("row", Split.balanced(5, 2)), (None, Split.balanced(7, 1)), 2, 3)
    with pytest.raises(
        wse.PlacementError, match=r"a placement takes a shape \(m, n\) and a pair \(grid axis, split\) for each axis, got 5, "
    ):
        wafer.placement(5, ("row", None), (None, None))
    with pytest.raises(wse.PlacementError, match=r"a placement takes integers, grid axes and splits: unhashable type: 'list'"):
        wafer.placement((5, [7]), ("row", None), (None, None))


def place_on(shape: Any, rows: Any) -> Placement:
    grid, split = rows
    split = Split.balanced(4, 2) if split is None and grid is not None else split or Split.balanced(4, 1)
    return Placement(shape, (grid, split), ("col", Split.balanced(4, 2)), 2, 2)


# ---- host to wafer and back


@settings(max_examples=4 * MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(0, 7), st.integers(0, 7), st.sampled_from(DTYPES), SEEDS)
def test_what_goes_in_lies_where_the_placement_says_and_comes_out(data, grid, m, n, dtype, seed) -> None:
    place = data.draw(placements((m, n), grid))
    values = random_bits(seed, (m, n), dtype)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", place, values) as x:
            drained = wafer.drain(x)
            return [a.view(f"u{a.itemsize}") for a in (*look(x), drained)]

    (*laid, drained), events = run_everywhere(grid, program)
    for ours, expected in zip(laid, blocks_of(values.view(f"u{values.itemsize}"), place), strict=True):
        assert_same_bits(ours, np.ascontiguousarray(expected))
    assert_same_bits(drained, laid[0])
    held = sum(b.nbytes for b in laid[1:])
    by_kind = {e.kind: e.bytes for e in events}
    assert by_kind == {"inject": held, "probe": values.nbytes, "drain": values.nbytes}, "replicas come in one by one, and leave once"


@settings(max_examples=2 * MAX_EXAMPLES)
@given(GRIDS, st.lists(st.integers(0, 6), min_size=1, max_size=2), st.data(), st.sampled_from(DTYPES), SEEDS)
def test_place_and_gather_are_inverse(grid, shape, data, dtype, seed) -> None:
    values = random_bits(seed, tuple(shape), dtype)
    kinds = [["row", None], ["col", None]] if data.draw(st.booleans()) else [["col", None], ["row", None]]
    axes = data.draw(st.none() | st.tuples(*(st.sampled_from(k) for k in kinds[: len(shape)])))
    source = np.asfortranarray(values) if data.draw(st.booleans()) else values

    def program(wafer: wse.Wafer) -> list[Array]:
        with wafer.place(source, axes=axes) as x:
            assert x.shape == values.shape
            assert "(" in str(x.placement)
            return [values.view(f"u{values.itemsize}") if wafer.is_dry else x.gather().view(f"u{values.itemsize}")]

    for name in EXECUTORS[:3]:
        wafer = wse.Wafer(wse.WSE3, rows=grid[0], cols=grid[1], executor=name)
        (result,) = program(wafer)
        assert_same_bits(result, values.view(f"u{values.itemsize}"))
        assert not wafer.sram.live


@pytest.mark.parametrize(
    ("array", "options", "said"),
    [
        (3.0, {}, r"`x` must have one or two axes, got shape \(\)"),
        (np.zeros((1, 1, 1), np.float32), {}, r"`x` must have one or two axes, got shape \(1, 1, 1\)"),
        ([[1, 2], [3]], {}, r"`x`: no array: "),
        (np.zeros(3, np.float16), {}, r"that fill one or two 32-bit words, got float16; convert to float32 or int32"),
        (np.zeros(3, np.bool_), {}, r"got bool; convert"),
        (np.zeros(3, np.complex64), {}, r"got complex64; convert"),
        (np.array(["abcd"]), {}, r"got <U4; convert"),
        (np.array([None]), {}, r"got object; convert"),
        (np.zeros(3, ">f4"), {}, r"got >f4; convert"),
        (np.zeros(3, "M8[s]"), {}, r"got datetime64\[s\]; convert"),
        (np.zeros(3, np.longdouble), {}, r"got .*; convert"),
        (np.zeros(3, np.float32), {"axes": ("row", "col")}, r"`x` has 1 axes, `axes` names 2"),
        (np.zeros((3, 3), np.float32), {"axes": ("row", "row")}, r"both tensor axes cannot be split over one grid axis"),
        (np.zeros((3, 3), np.float32), {"axes": ("row", "column")}, r"`axes` may hold 'row', 'col' and None, got 'column'"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_told(array: Any, options: dict[str, Any], said: str) -> None:
    refused_everywhere((2, 2), lambda wafer: wafer.place(array, **options), wse.PlacementError, said)


def one(wafer: wse.Wafer) -> dict[str, Any]:
    return {"x": wafer.place(np.ones((4, 6), np.float32), name="x")}


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda w, x: w.inject(x, np.ones((4, 5), np.float32)), wse.PlacementError, r"`x` \(4, 6\) float32 cannot take .* shape \(4, 5\)"),
        (lambda w, x: w.inject(x, np.ones(24, np.float32)), wse.PlacementError, r"cannot take an array of shape \(24,\)"),
        (lambda w, x: w.inject(x, np.ones((4, 6))), wse.PlacementError, r"cannot take an array of shape \(4, 6\) and type float64"),
        (lambda w, x: w.inject(x, np.ones((4, 6), np.float32), kind="launch"), wse.RouteError, r"`kind` must be one of inject, stream, co"),
        (lambda w, x: w.drain(x, kind="inject"), wse.RouteError, r"`x`: `kind` must be one of drain, control, probe, got 'inject'"),
        (lambda w, x: w.empty("y", x.placement, np.float16), wse.PlacementError, r"`y`: elements must be integers or floating point"),
        (lambda w, x: w.empty("y", x.placement, ndim=1), wse.PlacementError, r"`y`: `ndim` is 2, or 1 for a tensor of shape \(1, n\)"),
        (lambda w, x: w.empty("y", (4, 6)), wse.PlacementError, r"`y`: expected a placement, made by `Wafer.placement`, got \(4, 6\)"),
        (
            lambda w, x: w.empty("y", Placement((4, 6), ("row", Split.balanced(4, 3)), (None, Split.balanced(6, 1)), 3, 2)),
            wse.PlacementError, r"`y`: its placement is for 3 x 2 cores, the wafer has 2 x 2",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_tensor_is_told(act: Any, error: type[Exception], said: str) -> None:
    refused_everywhere((2, 2), act, error, said, ready=one)


def test_a_tensor_without_values_is_for_dry_wafers_alone() -> None:
    for name in EXECUTORS[:3]:
        wafer = wse.Wafer(wse.TINY, rows=2, cols=2, executor=name)
        with pytest.raises(wse.PlacementError, match=r"`x`: only the `dry` executor brings in a tensor without values"):
            wafer.inject(one(wafer)["x"], None)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_freed_tensor_is_gone(name: Any) -> None:
    wafer = wse.Wafer(wse.TINY, rows=2, cols=2, executor=name)
    x = one(wafer)["x"]
    x.free()
    for act in (x.free, x.gather, lambda: x.block(0, 0), lambda: wafer.drain(x), lambda: wafer.inject(x, np.ones((4, 6), np.float32))):
        with pytest.raises(wse.SramStateError, match=r"`x` is not on the wafer: it was freed before"):
            act()
    assert wafer.sram.used_bytes() == wse.TINY.base_code_bytes


@pytest.mark.parametrize("name", EXECUTORS[:3])
@pytest.mark.parametrize("core", [(-1, 0), (2, 0), (0, 2)])
def test_a_block_off_the_grid_is_told(name: Any, core: tuple[int, int]) -> None:
    with pytest.raises(wse.PlacementError, match=r"`x`: core \(-?\d, \d\) is off the grid of 2 x 2 cores"):
        one(wse.Wafer(wse.TINY, rows=2, cols=2, executor=name))["x"].block(*core)


def test_a_dry_tensor_has_no_values() -> None:
    x = one(wse.Wafer(wse.TINY, rows=2, cols=2, executor="dry"))["x"]
    for act in (x.gather, lambda: x.block(0, 0)):
        with pytest.raises(wse.SramStateError, match=r"`x` has no values: the `dry` executor moves shapes and counts only"):
            act()


def test_a_fabric_without_colors_takes_nothing_in() -> None:
    spec = replace(wse.TINY, n_colors=1)
    wafer = wse.Wafer(spec, rows=2, cols=2)
    x = one(wafer)["x"]
    with pytest.raises(wse.RouteError, match=r"probe of `x`: the routes need 2 colors \(inject 1, probe 1\), TINY has 1"):
        x.gather()


@settings(max_examples=2 * MAX_EXAMPLES)
@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 6))
def test_a_nested_split_stays_inside_its_outer_one(data: Any, units: int, factor: int, parts: int) -> None:
    outer = data.draw(splits(units, parts))
    inner = outer.scaled(factor)
    assert inner.total == units * factor
    np.testing.assert_array_equal(inner.starts, outer.starts * factor)
    np.testing.assert_array_equal(inner.stops, outer.stops * factor)
    assert inner.labels.tolist() == outer.labels.tolist()


def test_a_placement_shows_every_block_of_a_small_grid() -> None:
    wafer = wse.Wafer(wse.TINY, rows=2, cols=3)
    x = wafer.place(np.ones((3, 4), np.float32))
    assert str(x.placement) == (
        "(3, 4) on 2 x 3 cores\n  axis 0: over rows, 1..2 each\n  axis 1: over cols, 1..2 each\n"
        "  [0:1, 0:1]  [0:1, 1:2]  [0:1, 2:4]\n  [1:3, 0:1]  [1:3, 1:2]  [1:3, 2:4]"
    )
    y = wafer.empty("y", wafer.placement((3, 4), ("row", Split.everywhere(3, 2)), (None, None)))
    assert "axis 0: over rows, 3..3 each, with replicas" in str(y.placement)
    assert "axis 1: whole on every core (4)" in str(y.placement)
    assert "cols: replicas" in str(y.placement)

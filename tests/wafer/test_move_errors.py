"""What a move refuses: by name, on every executor alike, before anything is written, recorded or left in SRAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.wafer import moves
from wse_emu.wafer.cores import Cores
from wse_emu.wafer.placement import Placement, Split
from wse_emu.wafer.tensor import PlacedTensor

from .programs import put, refused_everywhere

GRID = (3, 4)
ROWS, COLS = Split.balanced(6, 3), Split.balanced(8, 4)
ON_ONE_COL, ON_ONE_ROW = Split.single(8, 1, 4), Split.single(6, 2, 3)
WHOLE6, WHOLE8 = (None, Split.balanced(6, 1)), (None, Split.balanced(8, 1))
TILED = Placement((6, 8), ("row", ROWS), ("col", COLS), *GRID)
ON_A_COL = Placement((6, 8), ("row", ROWS), ("col", ON_ONE_COL), *GRID)
ON_A_ROW = Placement((6, 8), ("row", ON_ONE_ROW), ("col", COLS), *GRID)
ON_A_CORE = Placement((6, 8), ("row", ON_ONE_ROW), ("col", ON_ONE_COL), *GRID)
BY_ROWS = Placement((6, 8), ("row", ROWS), WHOLE8, *GRID)
BY_COLS = Placement((6, 8), WHOLE6, ("col", COLS), *GRID)
EVERYWHERE = Placement((6, 8), WHOLE6, WHOLE8, *GRID)
FLIPPED = Placement((6, 8), ("col", Split.balanced(6, 4)), ("row", Split.balanced(8, 3)), *GRID)
SMALLER = Placement((6, 7), ("row", ROWS), (None, Split.balanced(7, 1)), *GRID)
BANDS = Placement((6, 8), ("row", Split(6, [0, 0, 3], [3, 3, 6])), ("col", COLS), *GRID)
ROW_PARTS = Placement((6, 8), ("row", ROWS), ("col", Split.uniform(2, 4)), *GRID)
ROW_SUM = Placement((6, 2), ("row", ROWS), ("col", Split.single(2, 0, 4)), *GRID)
COL_PARTS = Placement((6, 8), ("row", Split.uniform(2, 3)), ("col", COLS), *GRID)
COL_SUM = Placement((2, 8), ("row", Split.single(2, 2, 3)), ("col", COLS), *GRID)

Move = Callable[..., None]

PLACEMENTS: list[tuple[str, Move, Placement, Placement, str]] = [
    ("split source", moves.broadcast_row, TILED, BY_ROWS, r"`x` must lie whole on one col of cores, it lies on 4"),
    ("split source", moves.broadcast_col, TILED, BY_COLS, r"`x` must lie whole on one row of cores, it lies on 3"),
    ("replicated source", moves.broadcast_row, BY_ROWS, BY_ROWS, r"`x` must be split over cols; it is replicated there"),
    ("replicated source", moves.broadcast_col, BY_COLS, BY_COLS, r"`x` must be split over rows; it is replicated there"),
    ("split out", moves.broadcast_row, ON_A_COL, TILED, r"axis 1 of `y` must be whole where it lies .*, it is split over cols"),
    ("other axis", moves.broadcast_row, ON_A_COL, EVERYWHERE, r"axis 0 of `x` and `y`, which does not move, must be placed alike"),
    ("other axis", moves.broadcast_col, ON_A_ROW, EVERYWHERE, r"axis 1 of `x` and `y`, which does not move, must be placed alike"),
    ("shape", moves.broadcast_row, ON_A_COL, SMALLER, r"`x` \(6, 8\) and `y` \(6, 7\) must have one shape"),
    ("replicas", moves.all_gather_col, BANDS, BY_COLS, r"`x` must be a partition over rows, it has replicas or another order there"),
    ("replicated source", moves.all_gather_row, BY_ROWS, BY_ROWS, r"`x` must be split over cols"),
    ("not everywhere", moves.all_gather_row, TILED, ON_A_COL, r"axis 1 of `y` must be whole on every core, it lies on 1 of 4 cols"),
    ("other axis", moves.all_gather_row, TILED, EVERYWHERE, r"axis 0 of `x` and `y`"),
    ("shape", moves.all_gather_row, TILED, SMALLER, r"must have one shape"),
    ("unlike", lambda w, x, y: moves.shift_rows(w, x, y, 1), TILED, BY_ROWS, r"`x` and `y` must be placed alike"),
    ("unequal", lambda w, x, y: moves.shift_rows(w, x, y, 1), FLIPPED, FLIPPED, r"equal blocks on all rows to be shifted, it has 2\.\.3"),
    ("unequal", lambda w, x, y: moves.shift_cols(w, x, y, 1), ON_A_COL, ON_A_COL, r"equal blocks on all cols to be shifted, it has 0\.\.8"),
    ("replicas", lambda w, x, y: moves.shift_cols(w, x, y, 1), BY_ROWS, BY_ROWS, r"`x` must be split over cols"),
    ("no partials", moves.chain_row, TILED, ON_A_COL, r"`x` must hold one private block of 8 columns, as `y` has, on every col"),
    ("whole out", moves.chain_row, ROW_PARTS, replace(ROW_SUM, axis1=(None, Split.balanced(2, 1))), r"`y` must be split over columns"),
    ("other rows", moves.chain_row, ROW_PARTS, replace(ROW_SUM, axis0=WHOLE6), r"`x` and `y` must have their rows placed alike"),
    ("no partials", moves.chain_col, BY_COLS, COL_SUM, r"`x` must hold one private block of 2 rows, as `y` has, on every row that"),
    ("other row", moves.chain_col, COL_PARTS, replace(COL_SUM, axis0=("row", Split.single(2, 0, 3))), r"whole on row 2 of cores, where"),
    ("other columns", moves.chain_col, COL_PARTS, replace(COL_SUM, axis1=WHOLE8), r"`x` and `y` must have their columns placed alike"),
    ("replicas", moves.gather_to_core, BY_ROWS, ON_A_CORE, r"`x` must be a partition over cols, it has replicas or another order there"),
    ("several cores", moves.gather_to_core, TILED, ON_A_COL, r"`y` must lie whole on one core; it lies on several rows"),
    ("shape", moves.gather_to_core, TILED, ROW_SUM, r"must have one shape"),
    ("replicated out", lambda w, x, y: moves.send(w, x, y, (0, 0), (0, 0)), BANDS, BANDS, r"its block of `y` has replicas on 2 rows"),
    ("replicated out", lambda w, x, y: moves.send(w, x, y, (0, 0), (1, 0)), BY_ROWS, BY_ROWS, r"its block of `y` has replicas on 4 cols"),
    ("block shape", lambda w, x, y: moves.send(w, x, y, (1, 2), (2, 1)), TILED, ON_A_CORE, r"core \(2, 1\): `y` \(6, 8\) cannot take `x`"),
]  # fmt: skip


def tensors(source: Placement, out: Placement, dtype: str = "float32", out_dtype: str | None = None) -> Callable[..., Any]:
    """Two tensors full of numbers, so that a change would be seen."""

    def ready(wafer: wse.Wafer) -> dict[str, PlacedTensor]:
        return {
            "x": put(wafer, "x", source, np.full(source.shape, 3, dtype)),
            "y": put(wafer, "y", out, np.full(out.shape, 7, out_dtype or dtype)),
        }

    return ready


@pytest.mark.parametrize(("case", "move", "source", "out", "match"), PLACEMENTS)
def test_placements_that_do_not_fit_are_named(case: str, move: Move, source: Placement, out: Placement, match: str) -> None:
    error = wse.RouteError if case == "block shape" else wse.PlacementError
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, y), error, match, ready=tensors(source, out))


EVERY: dict[str, tuple[Move, Placement, Placement]] = {
    "broadcast_row": (moves.broadcast_row, ON_A_COL, BY_ROWS),
    "broadcast_col": (moves.broadcast_col, ON_A_ROW, BY_COLS),
    "all_gather_row": (moves.all_gather_row, TILED, BY_ROWS),
    "all_gather_col": (moves.all_gather_col, TILED, BY_COLS),
    "shift_rows": (lambda wafer, x, y: moves.shift_rows(wafer, x, y, 1), TILED, TILED),
    "shift_cols": (lambda wafer, x, y: moves.shift_cols(wafer, x, y, -1), TILED, TILED),
    "chain_row": (moves.chain_row, ROW_PARTS, ROW_SUM),
    "chain_col": (moves.chain_col, COL_PARTS, COL_SUM),
    "send": (lambda wafer, x, y: moves.send(wafer, x, y, (0, 0), (2, 3)), TILED, TILED),
    "gather_to_core": (moves.gather_to_core, TILED, ON_A_CORE),
}
"""Every public move, as it works."""


def test_every_move_is_here() -> None:
    assert set(EVERY) | {"ChainOp"} == set(moves.__all__)


@pytest.mark.parametrize("name", EVERY)
def test_element_types_are_not_converted(name: str) -> None:
    move, source, out = EVERY[name]
    ready = tensors(source, out, "float32", "int32")
    match = r"`y` int32 cannot take `x` float32: a move converts nothing"
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, y), wse.RouteError, match, ready=ready)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"send"}))
def test_a_tensor_is_not_moved_onto_itself(name: str) -> None:
    move, source, _ = EVERY[name]
    match = r"`x` cannot be moved onto itself: `(source|partials)` and `out` must be two tensors"
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, x), wse.RouteError, match, ready=tensors(source, source))


@pytest.mark.parametrize("name", EVERY)
def test_freed_tensors_arrays_and_other_wafers_are_named(name: str) -> None:
    move, source, out = EVERY[name]

    def freed(wafer: wse.Wafer, x: PlacedTensor, y: PlacedTensor) -> None:
        with wafer.empty("gone", source) as gone:
            pass
        move(wafer, gone, y)

    def to_freed(wafer: wse.Wafer, x: PlacedTensor, y: PlacedTensor) -> None:
        with wafer.empty("gone", out) as gone:
            pass
        move(wafer, x, gone)

    def elsewhere(wafer: wse.Wafer, x: PlacedTensor, y: PlacedTensor) -> None:
        other = wse.Wafer(wse.WSE3, rows=3, cols=4, executor=wafer.executor)
        with other.empty("far", out) as far:
            move(wafer, x, far)

    ready = tensors(source, out)
    for act in (freed, to_freed):
        refused_everywhere(GRID, act, wse.SramStateError, r"`gone` is not on the wafer: it was freed before", ready=ready)
    refused_everywhere(GRID, elsewhere, wse.PlacementError, r"`far` lies on another wafer", ready=ready)
    array = np.ones((6, 8), np.float32)
    match = r"must be a placed tensor \(`Wafer.place`, `Wafer.empty`\), got ndarray"
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, array, y), wse.RouteError, "`(source|partials)` " + match, ready=ready)
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, array), wse.RouteError, "`out` " + match, ready=ready)
    refused_everywhere(GRID, lambda wafer, x, y: move(x, x, y), wse.RouteError, r"first argument of a move is the wafer, got", ready=ready)


@pytest.mark.parametrize("name", EVERY)
def test_a_fabric_without_colors_left_is_named_before_anything_moves(name: str) -> None:
    move, source, out = EVERY[name]
    spec = replace(wse.WSE3, n_colors=2)  # one for inject
    match = r"the routes need \d+ colors \(inject 1, .*\), WSE-3 has 2"
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, y), wse.RouteError, match, ready=tensors(source, out), spec=spec)


def test_a_program_with_more_routes_than_the_fabric_has_colors_is_refused() -> None:
    spec = replace(wse.WSE3, n_colors=16)

    def all_of_them(wafer: wse.Wafer) -> None:
        for move, source, out in EVERY.values():
            with put(wafer, "x", source, np.ones(source.shape, np.float32)) as x, put(wafer, "y", out, np.ones(out.shape, np.float32)) as y:
                move(wafer, x, y)

    for executor in ("batched", "isolated", "dry"):
        wafer = wse.Wafer(spec, rows=3, cols=4, executor=executor)
        with pytest.raises(
            wse.RouteError, match=r"gather of `x`: the routes need 19 colors \(inject 1, broadcast 2, allgather 2, shift 2, ch"
        ):
            all_of_them(wafer)
        assert not wafer.sram.live


@pytest.mark.parametrize("name", ["chain_row", "chain_col"])
def test_no_room_for_the_inbox_is_told_before_anything_moves(name: str) -> None:
    move, source, out = EVERY[name]
    held = max(int(p.row_factor.max() * p.col_factor.max()) * 4 for p in (source, out))
    spec = replace(wse.WSE3, sram_bytes_per_core=wse.WSE3.base_code_bytes + 2 * held)
    match = r"core \(\d, \d\): `(inbox|code of chain_add)` needs"
    refused_everywhere(GRID, lambda wafer, x, y: move(wafer, x, y), wse.SramOverflowError, match, ready=tensors(source, out), spec=spec)


@pytest.mark.parametrize("executor", ["isolated", "interpreted"])
@pytest.mark.parametrize("name", EVERY)
def test_elements_that_nothing_wrote_do_not_move(name: str, executor: Any) -> None:
    move, source, out = EVERY[name]
    wafer = wse.Wafer(wse.WSE3, rows=3, cols=4, executor=executor)
    with wafer.empty("x", source) as x, put(wafer, "y", out, np.full(out.shape, 7, np.float32)) as y:
        missing = (0, 0) if name in ("send", "shift_rows") else max(x.held)  # one that moves; all others are there
        for core in set(x.held) - {missing}:
            x.held[core].write(1)
        before, events = [b.array.copy() for b in y.held.values()], wafer.ledger.events()
        with pytest.raises(
            wse.UninitializedReadError, match=r"core \(\d, \d\): `x` is read, but \d+ of its \d+ elements were written by no"
        ):
            move(wafer, x, y)
        assert wafer.ledger.events() == events
        for block, held in zip(y.held.values(), before, strict=True):
            np.testing.assert_array_equal(block.array, held)
    assert not wafer.sram.live


@pytest.mark.parametrize("what", ["the move", "its messages"])
@pytest.mark.parametrize("name", EVERY)
def test_a_move_left_out_shows(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the move, or with its messages lost, a core that should have received reads what nothing wrote."""
    move, source, out = EVERY[name]
    if name.startswith("shift"):
        cores = [(1, 0), (2, 0)] if name == "shift_rows" else [(0, 0), (0, 2)]  # others keep what they held
    else:
        cores = [(2, 3)] if name == "send" else [(r, c) for r in range(3) for c in range(4)]
    wafer = wse.Wafer(wse.WSE3, rows=3, cols=4, executor="isolated")
    for left_out in (False, True):
        with put(wafer, "x", source, np.ones(source.shape, np.float32)) as x, wafer.empty("y", out) as y, monkeypatch.context() as patch:
            if left_out and what == "its messages":
                patch.setattr(Cores, "deliver", lambda *args: None)
            seen = "read"
            try:
                if not left_out or what == "its messages":
                    move(wafer, x, y)
                for core in sorted(set(cores) & set(y.held)):
                    y.held[core].read()
            except wse.UninitializedReadError:
                seen = "undefined"
        assert seen == ("undefined" if left_out else "read")


@pytest.mark.parametrize("n", [True, np.bool_(True), 1.0, np.float32(1), "1", None])
def test_a_shift_is_by_an_integer(n: Any) -> None:
    ready = tensors(TILED, TILED)
    for move in (moves.shift_rows, moves.shift_cols):
        refused_everywhere(GRID, lambda wafer, x, y, move=move: move(wafer, x, y, n), wse.RouteError, "`n` must be an integer", ready=ready)


@pytest.mark.parametrize("core", [(True, 0), (0, 1.0), (np.bool_(1), 0), (0,), (0, 0, 0), 3, "ab", None, (None, 0)])
def test_a_core_is_two_integers(core: Any) -> None:
    ready = tensors(TILED, TILED)
    for name, args in (("from_core", (core, (0, 0))), ("to_core", ((0, 0), core))):
        refused_everywhere(
            GRID, lambda wafer, x, y, args=args: moves.send(wafer, x, y, *args), wse.RouteError,
            rf"`{name}` must be \(row, column\), two integers, got", ready=ready,
        )  # fmt: skip


@pytest.mark.parametrize("core", [(-1, 0), (3, 0), (0, 4), (0, -1), (10**30, 0)])
def test_a_core_lies_on_the_grid(core: Any) -> None:
    ready, match = tensors(TILED, TILED), r"core \(-?\d+, -?\d+\) is off the grid of 3 x 4 cores"
    refused_everywhere(GRID, lambda wafer, x, y: moves.send(wafer, x, y, core, (0, 0)), wse.RouteError, match, ready=ready)
    refused_everywhere(GRID, lambda wafer, x, y: moves.send(wafer, x, y, (0, 0), core), wse.RouteError, match, ready=ready)


def test_numpy_integers_are_integers() -> None:
    wafer = wse.Wafer(wse.WSE3, rows=3, cols=4)
    with (
        put(wafer, "x", TILED, np.arange(48, dtype=np.float32).reshape(6, 8)) as x,
        put(wafer, "y", TILED, np.zeros((6, 8), np.float32)) as y,
    ):
        moves.shift_rows(wafer, x, y, np.int32(1))
        moves.send(wafer, x, y, (np.int64(0), np.uint8(0)), (np.int16(0), 3))
        np.testing.assert_array_equal(y.block(0, 3), x.block(0, 0))
        np.testing.assert_array_equal(y.block(1, 0), x.block(0, 0))


@pytest.mark.parametrize(("op", "dtype", "takes"), [("add", "int32", "float32"), ("max", "float64", "float32"), ("or", "float32", "int32")])
def test_chains_take_their_element_type(op: Any, dtype: str, takes: str) -> None:
    ready = tensors(COL_PARTS, COL_SUM, dtype)
    match = rf"`x`: a chain of `{op}` takes {takes}, got {dtype}"
    refused_everywhere(GRID, lambda wafer, x, y: moves.chain_col(wafer, x, y, op), wse.RouteError, match, ready=ready)


def test_an_unknown_operation_and_a_chain_of_integers_along_a_row_are_named() -> None:
    refused_everywhere(
        GRID, lambda wafer, x, y: moves.chain_col(wafer, x, y, "min"), wse.RouteError, r"`op` must be one of add, max, or, got 'min'",
        ready=tensors(COL_PARTS, COL_SUM),
    )  # fmt: skip
    refused_everywhere(
        GRID, lambda wafer, x, y: moves.chain_row(wafer, x, y), wse.RouteError, r"`x`: a chain along a row takes float32, got int32",
        ready=tensors(ROW_PARTS, ROW_SUM, "int32"),
    )  # fmt: skip

"""Launches on any placements: every executor the same bits, ledger and SRAM; replicas never part; wrong arguments are told first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Placement, Split
from wse_kernels.fma import fma
from wse_kernels.norm import add_to
from wse_kernels.routing import merge_bits

from .programs import (
    EXECUTORS,
    GRIDS,
    MAX_EXAMPLES,
    SEEDS,
    Array,
    assert_same_bits,
    block_range,
    look,
    numbers,
    partitions,
    placements,
    put,
    refused_everywhere,
    run_everywhere,
)

N = np.float32
ADD_TO = Kernel(body=add_to, params=("x", "y"), inout=("x",), code_bytes=128)
MERGE_BITS = Kernel(body=merge_bits, params=("mask", "other"), inout=("mask",))


@wse.kernel(out=("y",), scratch=("t",), code_bytes=300, macs=lambda s: s["x"][0] * s["x"][1])
def affine(x, w, scale, y, t):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            t[j] = fma(x[i, j], scale, w[i, j])
        for j in range(x.shape[1]):
            y[i, j] = t[j]


@wse.kernel(out=("y",), macs=lambda s: s["x"][0] * s["x"][1])
def row_sum(x, y):
    for i in range(x.shape[0]):
        acc = N(0)
        for j in range(x.shape[1]):
            acc = fma(x[i, j], N(1), acc)
        y[i, 0] = acc


@wse.kernel(out=("y",))
def where_am_i(core, y):
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] = 1000 * core.row + 100 * core.col + 10 * core.n_rows + core.n_cols


@pytest.mark.slow  # its body is compiled in three ways
@settings(max_examples=2 * MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(0, 6), st.integers(0, 6), SEEDS)
def test_an_elementwise_kernel_is_its_formula_on_any_placement(data, grid, m, n, seed) -> None:
    place = data.draw(placements((m, n), grid))
    x, w = numbers(seed, m, n), numbers(seed + 1, m, n)
    width = place.col_factor.max() if place.axis1[0] == "col" else place.row_factor.max() if place.axis1[0] == "row" else n
    scale = N(1.7)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", place, x) as a, put(wafer, "w", place, w) as b, wafer.empty("y", place) as y:
            wafer.launch(affine, x=a, w=b, scale=scale, y=y, t=wse.scratch(int(width)))
            wafer.launch(ADD_TO, x=y, y=b)
            return look(y)

    (whole, *blocks), events = run_everywhere(grid, program)
    expected = np.empty((m, n), N)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(m, n):
            t = fma(x[i, j], scale, w[i, j])
            expected[i, j] = t + w[i, j]
    assert_same_bits(whole, expected)
    launches = [e for e in events if e.kind == "launch"]
    cores = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    sizes = [whole[block_range(place, *core)].size for core in cores]
    assert [(e.name, e.count, e.macs) for e in launches] == [
        ("affine", sum(s > 0 for s in sizes), sum(sizes)), ("add_to", sum(s > 0 for s in sizes), 0),
    ]  # fmt: skip
    for block, core in zip(blocks, cores, strict=True):
        assert_same_bits(block, np.ascontiguousarray(expected[block_range(place, *core)]))


@pytest.mark.slow  # its body is compiled in three ways
@settings(max_examples=2 * MAX_EXAMPLES)
@given(st.data(), GRIDS, st.integers(1, 6), st.integers(1, 6))
def test_launches_on_unlike_placements_agree_or_are_refused_by_all(data, grid, m, n) -> None:
    """Whatever two placements come together: every executor computes the same, or every one says why it cannot."""
    rows, cols = grid
    source = data.draw(placements((m, n), grid))
    grid0 = data.draw(st.sampled_from([source.axis0, (None, Split.balanced(m, 1)), ("row", Split.everywhere(m, rows))]))
    column = data.draw(
        st.sampled_from([(None, Split.balanced(1, 1)), ("col", Split.everywhere(1, cols)), ("col", Split.single(1, 0, cols))])
    )
    assume(not (grid0[0] == "col" and column[0] == "col"))
    out = Placement((m, 1), grid0, column, rows, cols)
    rows_of = [split.sizes[split.used] for split in (source.axis0[1], out.axis0[1])]
    assume(rows_of[0].min() == rows_of[1].max())  # no block of `x` has fewer rows than one of `y`
    values = numbers(1, m, n)

    def program(wafer: wse.Wafer) -> list[Array]:
        with put(wafer, "x", source, values) as x, put(wafer, "y", out, np.zeros((m, 1), N)) as y:
            wafer.launch(row_sum, x=x, y=y)
            return look(y)

    said = set()
    for name in EXECUTORS:
        wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=name)
        try:
            program(wafer)
            said.add("ran")
        except wse.KernelError as error:
            said.add(str(error))
            assert "launch" not in {e.kind for e in wafer.ledger.events()}
        assert not wafer.sram.live
    assert len(said) == 1, said
    if said == {"ran"}:
        run_everywhere(grid, program)
    else:
        assert "replicas" in said.pop()


@pytest.mark.slow  # its body is compiled in three ways
@given(GRIDS, st.data())
def test_a_kernel_knows_its_core(grid, data) -> None:
    rows, cols = grid
    place = Placement((9, 7), ("row", data.draw(partitions(9, rows))), ("col", data.draw(partitions(7, cols))), rows, cols)

    def program(wafer: wse.Wafer) -> list[Array]:
        with wafer.empty("y", place, np.int64) as y:
            wafer.launch(where_am_i, y=y)
            return look(y)

    (_, *blocks), _ = run_everywhere(grid, program)
    for (r, c), block in zip(np.ndindex(rows, cols), blocks, strict=True):
        assert (block == 1000 * r + 100 * c + 10 * rows + cols).all()


@settings(max_examples=MAX_EXAMPLES)
@given(st.integers(1, 5), st.integers(1, 9), SEEDS)
def test_vectors_are_vectors_in_a_kernel(cols, n, seed) -> None:
    masks = np.random.default_rng(seed).integers(0, 2**31, (2, n), np.int32)

    def program(wafer: wse.Wafer) -> list[Array]:
        with wafer.place(masks[0]) as x, wafer.place(masks[1]) as y:
            wafer.launch(MERGE_BITS, mask=x, other=y)
            return look(x)

    (whole, *_), _ = run_everywhere((1, cols), program)
    assert_same_bits(whole, masks[0] | masks[1])


REPLICAS = [
    ("an input differs where the result is one", ("row", "col"), (None, "col"), r"`y` has replicas on several rows, but `x` differs there"),
    ("likewise over columns", ("row", "col"), ("row", None), r"`y` has replicas on several columns, but `x` differs there"),
]


@pytest.mark.parametrize(("case", "source", "out", "said"), REPLICAS)
def test_replicas_of_a_result_must_be_computed_from_the_same(case: str, source: Any, out: Any, said: str) -> None:
    wafer_rows, wafer_cols = 2, 3

    def ready(wafer: wse.Wafer) -> dict[str, Any]:
        return {"x": wafer.place(np.ones((4, 6), N), axes=source, name="x"), "y": wafer.place(np.ones((4, 6), N), axes=out, name="y")}

    refused_everywhere((wafer_rows, wafer_cols), lambda wafer, x, y: wafer.launch(row_sum, x=x, y=y), wse.KernelError, said, ready=ready)


def test_replicas_where_nothing_runs_are_told() -> None:
    def ready(wafer: wse.Wafer) -> dict[str, Any]:
        only_one = wafer.placement((4, 6), ("row", Split.balanced(4, 2)), ("col", Split.single(6, 1, 3)))
        return {"x": put(wafer, "x", only_one, np.ones((4, 6), N)), "y": wafer.place(np.ones((4, 1), N), axes=("row", None), name="y")}

    said = r"`y` has replicas on several columns, but nothing runs on col 0, where another argument has no block.* and broadcast it"
    refused_everywhere((2, 3), lambda wafer, x, y: wafer.launch(row_sum, x=x, y=y), wse.KernelError, said, ready=ready)


def test_replicas_and_a_kernel_that_knows_its_core_are_told() -> None:
    def ready(wafer: wse.Wafer) -> dict[str, Any]:
        return {"y": wafer.place(np.ones((4, 1), np.int64), axes=("row", None), name="y")}

    said = r"kernel `where_am_i` takes `core` and writes `y`, which has replicas on several columns; they would differ\. Split `y` over"
    refused_everywhere((2, 3), lambda wafer, y: wafer.launch(where_am_i, y=y), wse.KernelError, said, ready=ready)

    def on_one_column(wafer: wse.Wafer) -> list[Array]:
        with ready(wafer)["y"] as y:
            wafer.launch(where_am_i, y=y)
            return look(y)

    run_everywhere((2, 1), on_one_column)


def two(wafer: wse.Wafer) -> dict[str, Any]:
    return {name: wafer.place(np.full((4, 6), 2, N), name=name) for name in "xwy"}


def launch(**changes: Any) -> Any:
    """A launch of `affine` with some arguments changed; those that are None are left out."""

    def act(wafer: wse.Wafer, x: Any, w: Any, y: Any) -> None:
        args = {"x": x, "w": w, "scale": N(1), "y": y, "t": wse.scratch(6)} | {
            k: v(x, w, y) if callable(v) else v for k, v in changes.items()
        }
        wafer.launch(affine, **{k: v for k, v in args.items() if v is not None})

    return act


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": None}, r"kernel `affine` takes `x`, `w`, `scale`, `y`, `t`: missing `scale`"),
        ({"more": 1, "x": None}, r": missing `x`; unknown `more`"),
        ({"scale": 1.5}, r"`scale` must be a placed tensor or a typed scalar, got float; place the array, or write np.float32"),
        ({"scale": "1"}, r"`scale` must be a placed tensor or a typed scalar, got str"),
        ({"scale": 2j}, r"got complex"),
        ({"scale": np.complex64(1)}, r"got complex64"),
        ({"scale": np.ones(3, N)}, r"got ndarray"),
        ({"scale": [1]}, r"got list"),
        ({"scale": 2**63}, r"`scale` must fit 64 bits, got 9223372036854775808"),
        ({"t": lambda x, w, y: x}, r"`t` must be a scratch request"),
        ({"t": 3}, r"`t` must be a scratch request"),
        ({"x": wse.scratch(3)}, r"`x` must not be a scratch request"),
        ({"y": 3}, r"`y` is written, so it must be a placed tensor"),
        ({"x": lambda x, w, y: y}, r"`y` is written, so the same tensor cannot be `x` too"),
        ({"x": 1, "w": 1, "y": 1}, r"kernel `affine`: no argument is a placed tensor"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_before_a_core_runs(changes: dict[str, Any], said: str) -> None:
    refused_everywhere((2, 2), launch(**changes), wse.KernelError, said, ready=two)


def test_tensors_freed_or_of_another_wafer_are_told() -> None:
    def freed(wafer: wse.Wafer, x: Any, w: Any, y: Any) -> None:
        with wafer.place(np.ones((4, 6), N), name="gone") as gone:
            pass
        events.append(wafer.ledger.events())
        wafer.launch(affine, x=gone, w=w, scale=N(1), y=y, t=wse.scratch(6))

    events: list[Any] = []
    for name in EXECUTORS:
        wafer = wse.Wafer(wse.TINY, rows=2, cols=2, executor=name)
        with pytest.raises(wse.SramStateError, match=r"`gone` is not on the wafer: it was freed before"):
            freed(wafer, **two(wafer))
        assert wafer.ledger.events() == events[-1]
    other = two(wse.Wafer(wse.TINY, rows=2, cols=2))["x"]
    refused_everywhere((2, 2), launch(x=lambda x, w, y: other), wse.KernelError, r"`x` lies on another wafer", ready=two)


def test_a_tensor_may_be_read_twice() -> None:
    def program(wafer: wse.Wafer) -> list[Array]:
        tensors = two(wafer)
        launch(w=lambda x, w, y: x)(wafer, **tensors)
        result = look(tensors["y"])
        for tensor in tensors.values():
            tensor.free()
        return result

    (whole, *_), _ = run_everywhere((2, 2), program)
    assert (whole == 4).all()


def test_scratch_and_code_are_charged_while_the_kernel_runs() -> None:
    def program(wafer: wse.Wafer) -> list[Array]:
        tensors = two(wafer)
        launch(t=wse.scratch(50))(wafer, **tensors)
        assert wafer.sram.high_water_bytes == wse.TINY.base_code_bytes + 300 + 4 * 50 + 3 * 4 * 6
        assert ("kernel code", 300) in wafer.sram.high_water_map.blocks
        assert ("t", 200) in wafer.sram.high_water_map.blocks
        for tensor in tensors.values():
            tensor.free()
        assert wafer.sram.used_bytes() == wse.TINY.base_code_bytes
        return []

    run_everywhere((2, 2), program, spec=wse.TINY)


def test_a_launch_that_fitted_once_is_refused_where_it_does_not_fit() -> None:
    spec = replace(wse.WSE3, sram_bytes_per_core=wse.WSE3.base_code_bytes + 3 * 24 + 300 + 4 * 50)
    for executor in ("batched", "isolated", "dry"):
        wafer = wse.Wafer(spec, rows=2, cols=2, executor=executor)
        tensors = two(wafer)
        for _ in range(2):
            launch(t=wse.scratch(50))(wafer, **tensors)
        before = wafer.ledger.events()
        assert before[-1] == before[-2]
        with wafer.empty("one word more", wafer.placement((1, 1), (None, None), (None, None))):
            with pytest.raises(wse.SramOverflowError, match=r"`t` needs 200 bytes, 196 of"):
                launch(t=wse.scratch(50))(wafer, **tensors)
            with pytest.raises(wse.SramOverflowError, match=r"`t` needs 204 bytes"):
                launch(t=wse.scratch(51))(wafer, **tensors)
        assert wafer.ledger.events() == before
        launch(t=wse.scratch(50))(wafer, **tensors)


@pytest.mark.parametrize(
    ("t", "said"), [(2000, r"core \(\d, \d\): `t` needs 8000 bytes"), (0, r"core \(\d, \d\): `code of affine` needs 300")]
)
def test_no_room_for_scratch_or_code_is_told_before_a_core_runs(t: int, said: str) -> None:
    spec = replace(wse.WSE3, sram_bytes_per_core=wse.WSE3.base_code_bytes + 3 * 24 + (400 if t else 200))
    refused_everywhere((2, 2), launch(t=wse.scratch(t)), wse.SramOverflowError, said, ready=two, spec=spec)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((-1,), r"scratch has one or two axes of non-negative length, got -1"),
        ((True,), r"scratch has one or two axes of non-negative length, got True"),
        ((1.5,), r"scratch has one or two axes"),
        (((1, 2, 3),), r"scratch has one or two axes of non-negative length, got \(1, 2, 3\)"),
        (((),), r"scratch has one or two axes"),
        (((2, -1),), r"scratch has one or two axes"),
        ((3, "words"), r"scratch has elements of a NumPy type, got 'words'"),
        ((3, np.complex128), r"scratch holds numbers of at most 8 bytes, got complex128"),
        ((3, object), r"scratch holds numbers of at most 8 bytes, got object"),
    ],
)  # fmt: skip
def test_a_wrong_scratch_request_is_told(args: Any, said: str) -> None:
    with pytest.raises(wse.KernelError, match=said):
        wse.scratch(*args)


def test_a_scratch_request_takes_numpy_integers() -> None:
    assert wse.scratch(np.int64(3)).shape == (3,)
    assert wse.scratch([np.int32(2), 3], np.int64).shape == (2, 3)

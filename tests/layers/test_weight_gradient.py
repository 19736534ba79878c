"""Gradients of streamed matrices: every executor gives the bits of one sum over tokens, wherever rows are cut, and one ledger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.tolerance import proven_sum_bound
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.layers.weight_gradient import weight_gradient
from wse_emu.wafer.placement import TokenBands
from wse_kernels.ffn_backward import add_weight_gradient

from . import definitions
from .definitions import normal
from .programs import agree, any_split, assert_same_bits, look, room, selection_on_cores, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 8), st.integers(1, 9))
CHUNKS = st.sampled_from([1, 2, 3, 32])
SEEDS = st.integers(0, 1 << 32)


def defined(x: F32, rows: NDArray[np.int64], dy: F32) -> F32:
    out = np.zeros((x.shape[1], dy.shape[1]), np.float32)
    add_weight_gradient(x, rows, dy, out)
    return out


@settings(max_examples=10)
@given(SEEDS, GRIDS, SIZES, CHUNKS)
@example(0, (5, 3), (2, 4, 3), 2)
@example(1, (1, 5), (7, 3, 2), 1)
@example(2, (5, 5), (1, 2, 9), 3)
def test_the_sum_over_tokens_has_one_order_on_every_executor_and_grid(seed, grid, sizes, chunk) -> None:
    (rows, cols), (m, k, n) = grid, sizes
    rng = np.random.default_rng(seed)
    x, dy, bands = normal(seed, m, k), normal(seed + 1, m, n), TokenBands(m, rows)
    splits = any_split(rng, k, cols), any_split(rng, n, cols)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, x, bands, splits[0]) as placed_x, tokens(wafer, dy, bands, splits[1], "dy") as placed_dy:
            return [weight_gradient(wafer, placed_x, placed_dy, bands, "d w", chunk=chunk)]

    (found,), wafer = agree(program, *grid)
    assert_same_bits(found, defined(x, np.arange(m), dy))
    exact = x.astype(np.float64).T @ dy
    assert (np.abs(found - exact) <= proven_sum_bound(m, np.abs(x.astype(np.float64)).T @ np.abs(dy))).all()
    events = {(e.kind, e.name): e for e in wafer.ledger.events()}
    assert events["drain", "d w"].bytes == 4 * k * n  # each weight's gradient leaves once
    assert events["launch", "add_weight_gradient"].macs == m * k * n


@settings(max_examples=8)
@given(SEEDS, GRIDS, SIZES, CHUNKS, st.floats(0, 1))
@example(0, (5, 3), (2, 4, 3), 2, 0.0)
@example(1, (4, 2), (7, 3, 3), 32, 0.5)
@example(2, (4, 2), (1, 3, 3), 2, 1.0)
def test_tokens_that_chose_an_expert_alone_count(seed, grid, sizes, chunk, fraction) -> None:
    """As a product of chosen tokens leaves them, its output's gradient lies in the first places of each row."""
    (rows, cols), (m, k, n) = grid, sizes
    rng = np.random.default_rng(seed)
    x, w, bands = normal(seed, m, k), normal(seed + 1, k, n), TokenBands(m, rows)
    splits = any_split(rng, k, cols), any_split(rng, n, cols)
    chosen = np.flatnonzero(rng.random(m) < fraction)

    def program(wafer: wse.Wafer) -> list[F32]:
        selection, lists = selection_on_cores(wafer, bands, chosen, np.ones(chosen.size, np.float32))
        with tokens(wafer, x, bands, splits[0]) as placed_x, room(wafer, bands, splits[1], "dy") as dy:
            matmul(wafer, placed_x, streamed(wafer, w), dy, bands, take=selection, chunk=chunk)
            all_gather_bands(wafer, dy, bands, selection)
            found = weight_gradient(wafer, placed_x, dy, bands, "d w", take=selection, chunk=chunk)
            square = weight_gradient(wafer, dy, dy, bands, "d v", compact=selection, chunk=chunk)
        for tensor in lists:
            tensor.free()
        return [found, square]

    (found, square), wafer = agree(program, *grid)
    dy = definitions.product(x[chosen], w, splits[0].offsets)
    assert_same_bits(found, defined(x, chosen, dy))
    assert_same_bits(square, defined(dy, np.arange(chosen.size), dy))
    drained = [e for e in wafer.ledger.events() if e.kind == "drain" and e.name == "d w"]
    assert sum(e.bytes for e in drained) == (4 * k * n if chosen.size else 0)  # nothing leaves where nobody chose


@pytest.mark.parametrize(("m", "k", "n"), [(9, 20, 300), (70, 5, 129), (1, 40, 128)])
def test_wide_matrices_have_the_same_order(m: int, k: int, n: int) -> None:
    x, dy, bands, wafer = normal(3, m, k), normal(4, m, n), TokenBands(m, 2), wse.Wafer(rows=2, cols=3)
    with tokens(wafer, x, bands) as placed_x, tokens(wafer, dy, bands, name="dy") as placed_dy:
        assert_same_bits(weight_gradient(wafer, placed_x, placed_dy, bands, "d w"), defined(x, np.arange(m), dy))


def test_a_linear_layer_goes_backward_on_the_wafer() -> None:
    """Gradient of the input: the product with the matrix as it streams a second time, transposed."""
    x, w, dy = normal(0, 6, 8), normal(1, 8, 5), normal(2, 6, 5)
    bands = TokenBands(6, 3)

    def program(wafer: wse.Wafer) -> list[F32]:
        with (
            tokens(wafer, x, bands) as placed_x, tokens(wafer, dy, bands, name="dy") as placed_dy,
            room(wafer, bands, placed_x.placement.axis1[1], "dx") as dx,
        ):  # fmt: skip
            matmul(wafer, placed_dy, streamed(wafer, np.ascontiguousarray(w.T), "w transposed"), dx, bands)
            return [look(dx), weight_gradient(wafer, placed_x, placed_dy, bands, "d w")]

    (dx, dw), _ = agree(program, 3, 2)
    np.testing.assert_allclose(dx, dy.astype(np.float64) @ w.T, atol=1e-5)
    np.testing.assert_allclose(dw, x.astype(np.float64).T @ dy, atol=1e-5)


def test_a_gradient_that_has_no_room_names_what_lies_there() -> None:
    wafer = wse.Wafer(wse.TINY, rows=1, cols=1, executor="dry")
    bands = TokenBands(1, 1)
    with (
        tokens(wafer, np.zeros((1, 5000), np.float32), bands) as x, tokens(wafer, np.zeros((1, 5), np.float32), bands, name="dy") as dy,
        pytest.raises(wse.SramOverflowError, match="gradient of weights"),
    ):  # fmt: skip
        weight_gradient(wafer, x, dy, bands, "d w")

"""RMSNorm across columns of cores and the residual sum: the stated bits on every executor, and the float64 formula within the rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.tolerance import rms_norm_bound
from wse_emu.layers.norm import add_residual, rms_norm, stream_vector
from wse_emu.wafer.placement import Split, TokenBands

from . import definitions
from .definitions import normal
from .programs import agree, any_split, assert_same_bits, look, room, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
SEEDS = st.integers(0, 1 << 32)


@settings(max_examples=60)
@given(SEEDS, GRIDS, st.integers(1, 9), st.integers(1, 12), st.sampled_from([1e-6, 1e-5, 0.5]), st.sampled_from([1e-3, 1.0, 1e4]))
@example(0, (1, 1), 1, 1, 1e-5, 1.0)
@example(1, (6, 6), 2, 3, 1e-5, 1.0)
def test_norm_is_the_stated_sum_on_every_executor(seed, grid, m, n, eps, size) -> None:
    bands, split = TokenBands(m, grid[0]), any_split(np.random.default_rng(seed), n, grid[1])
    values, weight = normal(seed, m, n) * np.float32(size), 1 + np.float32(0.1) * normal(seed + 1, n)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, values, bands, split) as x, room(wafer, bands, split) as out:
            rms_norm(wafer, x, "norm", None if wafer.is_dry else weight, eps, out, bands)
            return [look(out), look(x)]

    (out, x), wafer = agree(program, *grid)
    assert_same_bits(out, definitions.rms_norm(values, weight, eps, split.offsets))
    assert_same_bits(x, values)
    wide = values.astype(np.float64)
    exact = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + eps) * weight
    assert (np.abs(out - exact) <= rms_norm_bound(exact)).all()
    assert [e.bytes for e in wafer.ledger.events() if e.kind == "stream"] == [weight.nbytes]


@pytest.mark.parametrize("n", [33, 64, 65])
def test_long_rows_keep_the_rule(n: int) -> None:
    """More features than a core's loop takes at a time, against float64."""
    bands, split = TokenBands(40, 3), Split.balanced(n, 2)
    values, weight = normal(n, 40, n), normal(n + 1, n)
    wafer = wse.Wafer(rows=3, cols=2)
    with tokens(wafer, values, bands, split) as x, room(wafer, bands, split) as out:
        rms_norm(wafer, x, "norm", weight, 1e-5, out, bands)
        ours = look(out)
    wide = values.astype(np.float64)
    exact = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + 1e-5) * weight
    error = np.abs(ours - exact) / rms_norm_bound(exact)
    assert 0 < error.max() <= 1


def test_a_row_of_zeros_stays_zero() -> None:
    bands, split = TokenBands(2, 2), Split.balanced(4, 3)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, np.zeros((2, 4), np.float32), bands, split) as x, room(wafer, bands, split) as out:
            rms_norm(wafer, x, "norm", None if wafer.is_dry else np.ones(4, np.float32), 1e-5, out, bands)
            return [look(out)]

    (out,), _ = agree(program, 2, 3)
    assert not out.any()


@pytest.mark.parametrize(("n_tokens", "used"), [(2, 4), (3, 3), (9, 5)])
def test_a_streamed_vector_reaches_the_rows_that_hold_tokens_and_no_other(n_tokens: int, used: int) -> None:
    weight, bands, split = normal(0, 4), TokenBands(n_tokens, 5), Split.balanced(4, 3)
    wafer = wse.Wafer(rows=5, cols=3, executor="isolated")
    with stream_vector(wafer, "norm", weight, split, bands) as w:
        for (row, col), block in w.held.items():
            if row < used:
                assert_same_bits(block.read(), weight[None, split.starts[col] : split.stops[col]])
            else:
                assert not block.defined.any()


@settings(max_examples=30)
@given(SEEDS, GRIDS, st.integers(1, 9), st.integers(1, 12))
def test_the_residual_sum_rounds_once(seed, grid, m, n) -> None:
    bands = TokenBands(m, grid[0])
    a, b = normal(seed, m, n), normal(seed + 1, m, n)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, a, bands) as x, tokens(wafer, b, bands, name="y") as y:
            add_residual(wafer, x, y)
            return [look(x), look(y)]

    (x, y), _ = agree(program, *grid)
    assert_same_bits(x, (a.astype(np.float64) + b).astype(np.float32))
    assert_same_bits(y, b)

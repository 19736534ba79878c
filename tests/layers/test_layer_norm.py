"""LayerNorm across columns of cores, and the head's bias: the stated bits on every executor, the float64 formula within the rule."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.tolerance import layer_norm_bound
from wse_emu.layers.layer_norm import layer_norm
from wse_emu.wafer.placement import TokenBands

from . import definitions
from .definitions import normal
from .programs import agree, any_split, assert_same_bits, look, room, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=30)
@given(st.integers(0, 1 << 32), GRIDS, st.integers(1, 9), st.integers(1, 12), st.sampled_from([1e-5, 0.5]), st.sampled_from([0.0, 10.0]))
@example(0, (1, 1), 1, 1, 1e-5, 0.0)
@example(1, (6, 6), 2, 3, 1e-5, 10.0)
def test_norm_is_the_stated_sums_on_every_executor(seed, grid, m, n, eps, middle) -> None:
    bands, split = TokenBands(m, grid[0]), any_split(np.random.default_rng(seed), n, grid[1])
    values, weight = normal(seed, m, n) + np.float32(middle), 1 + np.float32(0.1) * normal(seed + 1, n)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, values, bands, split) as x, room(wafer, bands, split) as out:
            layer_norm(wafer, x, "norm", None if wafer.is_dry else weight, eps, out, bands)
            return [look(out), look(x)]

    (out, x), wafer = agree(program, *grid)
    assert_same_bits(out, definitions.layer_norm(values, weight, eps, split.offsets))
    assert_same_bits(x, values)
    wide = values.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight
    assert (np.abs(out - exact) <= layer_norm_bound(wide, weight.astype(np.float64), eps)).all()
    assert [e.bytes for e in wafer.ledger.events() if e.kind == "stream"] == [weight.nbytes]

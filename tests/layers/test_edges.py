"""Logits leave over the wafer's edge pass by pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.edges import logits, vocabulary_passes
from wse_emu.layers.linear import Selection
from wse_emu.layers.stream import StreamedVector
from wse_emu.wafer.placement import Split, TokenBands

from . import definitions
from .definitions import normal
from .programs import agree, assert_same_bits, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
LOGIT_BYTES = 8192
ROOMY = replace(wse.WSE3, sram_bytes_per_core=1 << 20)


@given(GRIDS, st.integers(1, 6000), st.integers(1, 300))
@example((1, 1), 32000, 1)
@example((6, 6), 1, 1)
def test_vocabulary_passes_cover_it_once_on_the_tiles_edges_and_keep_the_budget(grid, vocab, m) -> None:
    wafer, bands = wse.Wafer(rows=grid[0], cols=grid[1]), TokenBands(m, grid[0])
    passes = vocabulary_passes(wafer, vocab, bands)
    assert passes[0][0] == 0
    assert passes[-1][1] == vocab
    assert [last for _, last in passes[:-1]] == [first for first, _ in passes[1:]]
    assert all(first % TILE_COLS == 0 for first, _ in passes)
    for first, last in passes:
        one_tile = last - first <= TILE_COLS
        assert one_tile or 4 * bands.split.max_size * -(-(last - first) // wafer.cols) <= LOGIT_BYTES
    assert len({last - first for first, last in passes[:-1]}) <= 1


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), GRIDS, st.integers(1, 6), st.integers(1, 4), st.integers(1, 30), st.floats(0, 1), st.booleans())
@example(0, (1, 1), 1, 1, 1, 1.0, False)
@example(1, (6, 2), 2, 3, 7, 1.0, True)
@example(2, (3, 3), 5, 3, 7, 0.0, False)
def test_logits_of_the_wanted_tokens_on_every_executor(seed, grid, m, hidden, vocab, fraction, biased) -> None:
    values, head, bands = normal(seed, m, hidden), normal(seed + 1, hidden, vocab), TokenBands(m, grid[0])
    wanted, added = np.flatnonzero(np.random.default_rng(seed).random(m) < fraction), normal(seed + 2, vocab)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, values, bands) as x:
            bias = StreamedVector("lm_head_bias", None if wafer.is_dry else added) if biased else None
            return [logits(wafer, x, streamed(wafer, head, "lm_head"), Selection.of_tokens(wanted, bands.split), bands, bias=bias)]

    (out,), wafer = agree(program, *grid)
    product = definitions.product(values[wanted], head, Split.balanced(hidden, grid[1]).offsets)
    assert_same_bits(out, product + added if biased else product)
    assert sum(e.bytes for e in wafer.ledger.events() if e.kind == "drain") == out.nbytes


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 2)])
def test_several_passes_over_the_vocabulary(grid: tuple[int, int]) -> None:
    """Three tokens of a batch and more logits than a core may hold at one time."""
    vocab = 3 * TILE_COLS * grid[1] + 5
    bands = TokenBands(30 * grid[0], grid[0]) if grid[0] < 7 else TokenBands(3, 7)
    values, head, added = normal(0, bands.n_tokens, 2), normal(1, 2, vocab), normal(2, vocab)
    wanted = np.array([0, bands.n_tokens // 2, bands.n_tokens - 1])
    selection = Selection.of_tokens(wanted, bands.split)
    wafer = wse.Wafer(rows=grid[0], cols=grid[1])
    if grid[0] < 7:
        assert len(vocabulary_passes(wafer, vocab, bands)) > 1

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, values, bands) as x:
            bias = StreamedVector("lm_head_bias", added)
            return [logits(wafer, x, streamed(wafer, head, "lm_head"), selection, bands, bias=bias)]

    for executor in ("batched", "isolated"):
        (out,) = program(wse.Wafer(rows=grid[0], cols=grid[1], executor=executor))
        assert_same_bits(out, definitions.product(values[wanted], head, Split.balanced(2, grid[1]).offsets) + added)


@settings(max_examples=40)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 9000), st.integers(1, 200), st.booleans())
def test_fewer_tokens_never_need_more_room_for_their_logits(grid, vocab, m, biased) -> None:
    """Rounding to whole tiles must not turn a smaller batch into a larger block: sequences end while a batch is decoded."""

    def peak(n: int) -> int:
        wafer = wse.Wafer(ROOMY, rows=grid[0], cols=grid[1], executor="dry")
        bands = TokenBands(n, grid[0])
        with tokens(wafer, np.zeros((n, 4), np.float32), bands) as x:
            head = streamed(wafer, np.zeros((4, vocab), np.float32), "lm_head")
            bias = StreamedVector("lm_head_bias", None) if biased else None
            logits(wafer, x, head, Selection.of_tokens(np.arange(n), bands.split), bands, bias=bias)
        return wafer.sram.high_water_bytes

    assert peak(m) <= peak(m + 1) <= peak(m + grid[0])

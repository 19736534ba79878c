"""Products of activations with streamed matrices: every executor gives the bits of one stated sum and leaves the same ledger."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.layers.ffn import read_compact
from wse_emu.layers.linear import COMBINE, STORE, SWIGLU, Selection, all_gather_bands, matmul
from wse_emu.wafer.placement import Split, TokenBands

from . import definitions
from .definitions import normal
from .programs import agree, any_split, assert_same_bits, look, room, selection_on_cores, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 8), st.integers(1, 9))
MODES = st.sampled_from([STORE, SWIGLU])
CHUNKS = st.sampled_from([1, 2, 3, 5, 32])
SEEDS = st.integers(0, 1 << 32)


class Case(NamedTuple):
    """One product ``x @ w`` on a grid."""

    rows: int
    cols: int
    x: F32
    w: F32
    k_split: Split
    out_split: Split
    mode: int
    chunk: int

    @property
    def bands(self) -> TokenBands:
        return TokenBands(len(self.x), self.rows)

    def expected(self) -> F32:
        """By the definition."""
        y = definitions.product(self.x, self.w, self.k_split.offsets)
        return definitions.swiglu(y) if self.mode == SWIGLU else y


def case_of(seed: int, grid: tuple[int, int], sizes: tuple[int, int, int], mode: int, chunk: int) -> Case:
    rng = np.random.default_rng(seed)
    (rows, cols), (m, k, n) = grid, sizes
    splits = any_split(rng, k, cols), any_split(rng, n, cols)
    unit = 2 if mode == SWIGLU else 1
    return Case(rows, cols, normal(seed, m, k), normal(seed + 1, k, n * unit), *splits, mode, chunk)


@settings(max_examples=80)
@given(SEEDS, GRIDS, SIZES, MODES, CHUNKS)
@example(0, (1, 1), (1, 1, 1), STORE, 32)
@example(1, (5, 5), (1, 2, 3), SWIGLU, 2)
@example(2, (1, 5), (7, 3, 2), STORE, 1)
@example(3, (5, 1), (7, 8, 9), SWIGLU, 32)
@example(4, (5, 2), (2, 5, 1), STORE, 32)
def test_product_is_the_stated_sum_on_every_executor(seed, grid, sizes, mode, chunk) -> None:
    case = case_of(seed, grid, sizes, mode, chunk)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, case.x, case.bands, case.k_split) as x, room(wafer, case.bands, case.out_split) as out:
            matmul(wafer, x, streamed(wafer, case.w), out, case.bands, mode=mode, chunk=chunk)
            all_gather_bands(wafer, out, case.bands)
            return [look(out)]

    (out,), wafer = agree(program, *grid)
    assert_same_bits(out, case.expected())
    events = {(e.kind, e.name): e for e in wafer.ledger.events()}
    assert events["stream", "w"].bytes == case.w.nbytes
    assert events["launch", "partial_matmul"].macs == len(case.x) * case.w.size


@settings(max_examples=60)
@given(SEEDS, GRIDS, SIZES, MODES, CHUNKS, st.floats(0, 1))
@example(0, (5, 3), (2, 4, 3), STORE, 2, 0.0)
@example(1, (2, 3), (7, 4, 3), SWIGLU, 2, 1.0)
@example(2, (4, 2), (1, 3, 3), SWIGLU, 32, 1.0)
def test_chosen_tokens_are_taken_compacted_and_added_back(seed, grid, sizes, mode, chunk, fraction) -> None:
    """As an expert does it: take the tokens that chose it, keep them together, add the weighted results to where they belong."""
    case = case_of(seed, grid, sizes, mode, chunk)
    (m, k), bands = case.x.shape, case.bands
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(rng.random(m) < fraction)
    scale, back, before = normal(seed + 2, chosen.size), normal(seed + 3, case.out_split.total, k), normal(seed + 4, m, k)

    def program(wafer: wse.Wafer) -> list[F32]:
        with ExitStack() as stack:
            selection, lists = selection_on_cores(wafer, bands, chosen, scale)
            for tensor in lists:
                stack.enter_context(tensor)
            x = stack.enter_context(tokens(wafer, case.x, bands, case.k_split))
            h, y = (stack.enter_context(room(wafer, bands, split)) for split in (case.out_split, case.k_split))
            out = stack.enter_context(tokens(wafer, before, bands, case.k_split))
            matmul(wafer, x, streamed(wafer, case.w), h, bands, mode=mode, take=selection, chunk=chunk)
            all_gather_bands(wafer, h, bands, selection)
            taken = read_compact(h, bands, selection)
            matmul(wafer, h, streamed(wafer, back, "back"), y, bands, compact=selection, chunk=chunk)
            all_gather_bands(wafer, y, bands, selection)
            matmul(wafer, h, streamed(wafer, back, "back"), out, bands, mode=COMBINE, put=selection, chunk=chunk)
            all_gather_bands(wafer, out, bands)
            return [taken, read_compact(y, bands, selection), look(out)]

    (taken, kept, out), wafer = agree(program, *grid)
    hidden = case.expected()[chosen]
    assert_same_bits(taken, hidden)
    result = definitions.product(hidden, back, case.out_split.offsets)
    assert_same_bits(kept, result)
    expected = before.copy()
    expected[chosen] = definitions.combine(before[chosen], scale, result)
    assert_same_bits(out, expected)
    streams = [(e.name, e.bytes) for e in wafer.ledger.events() if e.kind == "stream"]
    assert streams == [("w", case.w.nbytes), ("back", back.nbytes), ("back", back.nbytes)]


@settings(max_examples=20)
@given(SEEDS, GRIDS, SIZES, CHUNKS)
def test_tokens_that_the_program_knows_need_no_lists_on_the_cores(seed, grid, sizes, chunk) -> None:
    case = case_of(seed, grid, sizes, STORE, chunk)
    known = np.flatnonzero(np.random.default_rng(seed).random(len(case.x)) < 0.5)
    selection = Selection.of_tokens(known, case.bands.split)
    assert selection.n_tokens == known.size

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, case.x, case.bands, case.k_split) as x, room(wafer, case.bands, case.out_split) as out:
            matmul(wafer, x, streamed(wafer, case.w), out, case.bands, take=selection, chunk=chunk)
            all_gather_bands(wafer, out, case.bands, selection)
            return [read_compact(out, case.bands, selection)]

    (out,), _ = agree(program, *grid)
    assert_same_bits(out, case.expected()[known])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
@pytest.mark.parametrize("mode", [STORE, SWIGLU])
def test_a_matrix_of_several_tiles_at_rest(grid: tuple[int, int], mode: int) -> None:
    """Pieces cross the edges of the tiles of 128 columns."""
    case = case_of(7, grid, (3, 4, 150), mode, 32)

    def program(wafer: wse.Wafer) -> list[F32]:
        with tokens(wafer, case.x, case.bands, case.k_split) as x, room(wafer, case.bands, case.out_split) as out:
            matmul(wafer, x, streamed(wafer, case.w), out, case.bands, mode=mode, chunk=case.chunk)
            return [look(out)]

    (out,), _ = agree(program, *grid)
    assert_same_bits(out, case.expected())


def test_smaller_pieces_stream_the_same_bytes_in_more_messages() -> None:
    streams = []
    for chunk in (32, 4, 1):
        case = case_of(3, (2, 2), (4, 5, 24), STORE, chunk)
        wafer = wse.Wafer(rows=2, cols=2)
        with tokens(wafer, case.x, case.bands, case.k_split) as x, room(wafer, case.bands, case.out_split) as out:
            matmul(wafer, x, streamed(wafer, case.w), out, case.bands, chunk=chunk)
        streams.append(next(e for e in wafer.ledger.events() if e.kind == "stream"))
    assert len({e.bytes for e in streams}) == 1
    assert [e.count for e in streams] == sorted({e.count for e in streams})


@pytest.mark.parametrize("selected", [False, True])
def test_bands_hold_their_own_share_until_it_is_gathered(selected: bool) -> None:
    """Six rows share two tokens in three bands each: before the gather no core knows a whole row, after it all do."""
    case = case_of(5, (6, 2), (2, 3, 7), STORE, 32)
    case = case._replace(k_split=Split.balanced(3, 2), out_split=Split.balanced(7, 2))
    selection = Selection.of_tokens(np.array([1]), case.bands.split) if selected else None
    wafer = wse.Wafer(rows=6, cols=2, executor="isolated")
    with tokens(wafer, case.x, case.bands, case.k_split) as x, room(wafer, case.bands, case.out_split) as out:
        matmul(wafer, x, streamed(wafer, case.w), out, case.bands, take=selection)
        for block in (out.held[row, col] for row in (3, 4, 5) for col in (0, 1)):
            with pytest.raises(wse.UninitializedReadError, match="were written by no kernel and no message"):
                block.read()
        all_gather_bands(wafer, out, case.bands, selection)
        expected = case.expected()
        for row, col in np.ndindex(6, 2):
            token = row // 3
            if selected and token != 1:
                continue
            whole = expected[token : token + 1, case.out_split.starts[col] : case.out_split.stops[col]]
            assert_same_bits(out.held[row, col].read(), whole)


def test_one_band_has_nothing_to_gather() -> None:
    wafer = wse.Wafer(rows=2, cols=2)
    bands = TokenBands(3, 2)
    with tokens(wafer, normal(0, 3, 4), bands) as x:
        before = len(wafer.ledger)
        all_gather_bands(wafer, x, bands)
        assert len(wafer.ledger) == before


def test_a_product_that_does_not_fit_leaves_only_its_operands() -> None:
    small = replace(wse.TINY, sram_bytes_per_core=4176 + 2 * 4 * 64 * 4 + 1024)
    wafer = wse.Wafer(small, rows=1, cols=1)
    bands = TokenBands(4, 1)
    with tokens(wafer, normal(0, 4, 64), bands) as x, room(wafer, bands, Split.balanced(64, 1)) as out:
        events = len(wafer.ledger)
        with pytest.raises(wse.SramOverflowError, match=r"core \(0, 0\): `weight slabs` needs 16384 bytes, 1024 of 7248 are free"):
            matmul(wafer, x, streamed(wafer, normal(1, 64, 64)), out, bands)
        assert wafer.sram.live == ("x", "out")
        assert len(wafer.ledger) == events

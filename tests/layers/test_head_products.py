"""Products of every head with its own matrix: the formula, and the same bits and ledger on every executor and number of rows."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.equivalence.tolerance import proven_sum_bound
from wse_emu.layers.head_products import head_products
from wse_emu.layers.stream import StreamedHeads
from wse_emu.memoryx.layout import pairs_to_published, tile_matrix
from wse_emu.wafer.placement import Split, TokenBands

HEADS, N_IN, N_OUT, T = 3, 6, 10, 5


def run(executor: str, rows: int, x: np.ndarray, w: np.ndarray, n_slots: int) -> tuple[np.ndarray, list]:
    """Products of (T, heads, n_in) tokens, published order, and what was done for them."""
    wafer, bands = wse.Wafer(wse.WSE3, rows=rows, cols=4, executor=executor), TokenBands(len(x), rows)
    units, to = Split.balanced(N_IN // 2, 4), Split.balanced(N_OUT // 2, 4)
    tokens = ("row", bands.split)
    pairs = np.ascontiguousarray(x.reshape(len(x), HEADS, -1, 2).transpose(0, 2, 1, 3)).reshape(len(x), -1)
    placed = wafer.empty("x", wafer.placement(pairs.shape, tokens, ("col", units.scaled(2 * HEADS))))
    wafer.inject(placed, pairs)
    out = wafer.empty("out", wafer.placement((len(x), N_OUT * n_slots), tokens, ("col", to.scaled(2 * n_slots))))
    if n_slots > HEADS:  # what the product leaves alone
        wafer.inject(out, np.zeros((len(x), N_OUT * n_slots), np.float32))
    wafer.ledger.clear()
    tiles = np.concatenate([tile_matrix(of) for of in w])
    tiles.flags.writeable = False
    head_products(wafer, placed, units, StreamedHeads("w", HEADS, N_IN, N_OUT, tiles), out, to, n_slots, bands, chunk=4)
    events = wafer.ledger.events()
    return pairs_to_published(wafer.drain(out, kind="probe"), n_slots, np.arange(N_OUT).reshape(-1, 2)), events


@pytest.mark.parametrize("n_slots", [HEADS, HEADS + 1])
def test_every_head_meets_its_own_matrix(n_slots: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((T, HEADS, N_IN)).astype(np.float32), rng.standard_normal((HEADS, N_IN, N_OUT)).astype(np.float32)
    found, events = run("batched", 3, x, w, n_slots)
    exact, size = (np.einsum("thi,hio->tho", a.astype(np.float64), b) for a, b in ((x, w), (np.abs(x), np.abs(w))))
    assert (np.abs(found[:, :HEADS] - exact) <= proven_sum_bound(N_IN, size)).all()
    assert not found[:, HEADS:].any()
    alone, events_alone = run("isolated", 3, x, w, n_slots)
    np.testing.assert_array_equal(found, alone)
    assert events == events_alone
    assert sum(event.bytes for event in events if event.kind == "stream") == w.nbytes
    for rows in (1, 8):
        np.testing.assert_array_equal(run("batched", rows, x, w, n_slots)[0], found)

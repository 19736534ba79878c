"""Experts with biases and a clamped gate: product, biases and gate on the cores that own the features, product, bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from wse_emu.layers.elementwise import bias
from wse_emu.layers.linear import COMBINE_INTO, Selection, all_gather_bands, matmul
from wse_emu.layers.selected import panel, run_selected
from wse_emu.layers.stream import StreamedMatrix, StreamedVector
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.ffn import clamped_glu

CLAMPED_GLU = Kernel(body=clamped_glu, params=("y", "alpha", "limit", "h"), out=("h",), code_bytes=512)


@dataclass(frozen=True, slots=True)
class ClampedWeights:
    """What an expert has beside its matrices."""

    b_gate_up: StreamedVector
    """(2 * ffn,), gate and up alternating."""
    b_down: StreamedVector
    """(hidden,)."""
    alpha: np.float32
    limit: np.float32


@contextmanager
def gate_and_up(wafer: Wafer, h: PlacedTensor) -> Iterator[PlacedTensor]:
    """Room for the projections behind `h`, (T, ffn): two columns for each of its own, on the same cores."""
    (rows, width), n = h.placement.axis1, h.placement.shape[0]
    assert rows == "col"
    with wafer.empty("gate and up", wafer.placement((n, 2 * width.total), h.placement.axis0, ("col", width.scaled(2)))) as y:
        yield y


def hidden(
    wafer: Wafer, x: PlacedTensor, gate_up: StreamedMatrix, extra: ClampedWeights, y: PlacedTensor, h: PlacedTensor, bands: TokenBands,
    *, take: Selection | None = None, compact: Selection | None = None, chunk: int,
) -> None:  # fmt: skip
    """``h = gate(x @ w_gate_up + b_gate_up)``, of all tokens or of some, complete on every row of a band.

    Parameters
    ----------
    x : PlacedTensor, (T, hidden), float32
    y, h : PlacedTensor, (T, 2 ffn) from `gate_and_up` and (T, ffn), float32
        Written; with a selection its tokens come first.
    take, compact : Selection, optional
        Tokens of `x` to use; or `x` holds just these.
    """
    selection = take or compact
    matmul(wafer, x, gate_up, y, bands, take=take, compact=compact, chunk=chunk)
    all_gather_bands(wafer, y, bands, selection)
    bias(wafer, y, extra.b_gate_up.name, extra.b_gate_up.values, bands, selection)
    run_selected(wafer, CLAMPED_GLU, {"y": y, "h": h}, {"alpha": extra.alpha, "limit": extra.limit}, selection)


def output(
    wafer: Wafer, h: PlacedTensor, down: StreamedMatrix, extra: ClampedWeights, out: PlacedTensor, bands: TokenBands,
    selection: Selection | None, *, chunk: int,
) -> None:  # fmt: skip
    """``out = h @ w_down + b_down`` of all tokens, or of those that both hold compacted; complete on every row of a band."""
    matmul(wafer, h, down, out, bands, compact=selection, chunk=chunk)
    all_gather_bands(wafer, out, bands, selection)
    bias(wafer, out, extra.b_down.name, extra.b_down.values, bands, selection)


def combine(wafer: Wafer, y: PlacedTensor, selection: Selection, out: PlacedTensor, bands: TokenBands) -> None:
    """Add the compacted `y`, times the tokens' weights, to the tokens of `out`, on every row of a band alike."""
    split = out.placement.axis1[1]
    rows, m = np.flatnonzero(selection.counts), selection.n_tokens
    with wafer.sram.code(COMBINE_INTO.name, COMBINE_INTO.code_bytes):
        if wafer.cores is not None:
            for row in rows.tolist():
                for col in split.used.tolist():
                    places, scale = selection.heads(row, col)
                    delivered = y.held[row, col].view(slice(0, int(selection.counts[row])))
                    target = out.held[row, col]
                    args = {"y": delivered, "rows": places, "scale": scale, "first": 0, "out": target}
                    target.read()
                    wafer.cores.run(COMBINE_INTO, (row, col), args)
        elif not wafer.is_dry and m:
            for col in split.used.tolist():
                combine_panel = COMBINE_INTO.body
                combine_panel(panel(y, col, m), selection.rows, selection.scale, 0, panel(out, col, bands.n_tokens))
            out.settle()
    macs = int(selection.counts.sum()) * split.total
    wafer.record(Event(None, "", "launch", COMBINE_INTO.name, count=int(rows.size * split.used.size), macs=macs))

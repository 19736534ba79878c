"""Feed-forward networks: one for all tokens, or experts that stream past and serve the tokens of each row that chose them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.linear import COMBINE, DEFAULT_CHUNK, SWIGLU, Selection, all_gather_bands, matmul
from wse_emu.layers.router import Routing
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.norm import fill_zero
from wse_kernels.routing import group_tokens, select_expert

FILL_ZERO = Kernel(body=fill_zero, params=("x",), out=("x",), code_bytes=64)
SELECT_EXPERT = Kernel(
    body=select_expert,
    params=("topk_ids", "topk_weights", "expert", "rows", "scale", "n_rows"),
    out=("rows", "scale", "n_rows"),
    code_bytes=192,
)


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """Weights of one feed-forward network, on their way to the wafer."""

    gate_up: StreamedMatrix
    """(hidden, 2 * ffn), gate and up columns alternating."""
    down: StreamedMatrix
    """(ffn, hidden)."""


def dense_ffn(
    wafer: Wafer, x: PlacedTensor, weights: FfnWeights, out: PlacedTensor, bands: TokenBands, *, chunk: int = DEFAULT_CHUNK,
    probe: Callable[[str, PlacedTensor], None] | None = None,
) -> None:  # fmt: skip
    """``out = (silu(x @ w_gate) * (x @ w_up)) @ w_down``.

    Parameters
    ----------
    wafer : Wafer
    x, out : PlacedTensor, (T, hidden), float32
        `out` is written.
    weights : FfnWeights
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.
    probe : callable, optional
        Shown ``("ffn_hidden", h)``.
    """
    width = weights.down.n_in
    place = wafer.placement((bands.n_tokens, width), x.placement.axis0, ("col", Split.balanced(width, wafer.cols)))
    with wafer.empty("ffn hidden", place) as h:
        matmul(wafer, x, weights.gate_up, h, bands, mode=SWIGLU, chunk=chunk)
        all_gather_bands(wafer, h, bands)
        if probe is not None:
            probe("ffn_hidden", h)
        matmul(wafer, h, weights.down, out, bands, chunk=chunk)
        all_gather_bands(wafer, out, bands)


@dataclass(slots=True)
class ExpertTaps:
    """Per-token, per-slot values of a layer's experts, for the probe."""

    hidden: NDArray[np.float32]
    """(T, top_k, ffn)."""
    out: NDArray[np.float32]
    """(T, top_k, hidden)."""


def experts_ffn(
    wafer: Wafer, x: PlacedTensor, routing: Routing, experts: Iterable[tuple[int, FfnWeights]], width: int, out: PlacedTensor,
    bands: TokenBands, *, n_experts: int, chunk: int = DEFAULT_CHUNK, taps: ExpertTaps | None = None,
) -> None:  # fmt: skip
    """Mixture of experts: ``out[t] = sum over chosen e, ascending, of weight[t, e] * ffn_e(x[t])``, each added with fma from +0.

    Expert by expert, the weights stream past all rows; every row applies them to its own tokens that chose the expert.

    Parameters
    ----------
    wafer : Wafer
    x, out : PlacedTensor, (T, hidden), float32
        `out` is written.
    routing : Routing
    experts : iterable of (expert id, FfnWeights)
        In ascending order; must hold every chosen expert.
    width : int
        Features of an expert's hidden layer.
    bands : TokenBands
    n_experts : int
    chunk : int
        Most columns of one streamed piece.
    taps : ExpertTaps, optional
        Filled through the probe channel.
    """
    place = wafer.placement((bands.n_tokens, width), x.placement.axis0, ("col", Split.balanced(width, wafer.cols)))
    lists = wafer.placement((1, bands.n_tokens), (None, None), ("row", bands.split))
    counts = wafer.placement((1, wafer.rows), (None, None), ("row", _counters(bands)))
    wafer.launch(FILL_ZERO, x=out)
    grouped = _Grouped(routing, n_experts)
    with (
        wafer.empty("expert hidden", place) as h,
        wafer.empty("expert tokens", lists, np.int64, ndim=1) as rows,
        wafer.empty("expert token weights", lists, ndim=1) as scale,
        wafer.empty("expert token count", counts, np.int64, ndim=1) as n_rows,
    ):
        for expert, weights in experts:
            args = {
                "topk_ids": routing.ids,
                "topk_weights": routing.weights,
                "expert": expert,
                "rows": rows,
                "scale": scale,
                "n_rows": n_rows,
            }
            if wafer.cores is not None:
                wafer.launch(SELECT_EXPERT, **args)
                selection = _selection_of_cores(rows, scale, n_rows, bands)
            else:
                wafer.account(SELECT_EXPERT, **args)
                selection = grouped.selection(expert, bands)
            matmul(wafer, x, weights.gate_up, h, bands, mode=SWIGLU, take=selection, chunk=chunk)
            all_gather_bands(wafer, h, bands, selection)
            if taps is not None:
                _tap(wafer, h, weights, out, bands, selection, grouped.tokens(expert), (routing.topk_ids == expert), taps, chunk)
            matmul(wafer, h, weights.down, out, bands, mode=COMBINE, put=selection, chunk=chunk)
    all_gather_bands(wafer, out, bands)


class _Grouped:
    """Tokens of every expert, from the decision as a whole."""

    def __init__(self, routing: Routing, n_experts: int) -> None:
        n = routing.topk_ids.size
        self._starts = np.empty(n_experts + 1, np.int64)
        self._rows, self._scale = np.empty(n, np.int64), np.empty(n, np.float32)
        group_tokens(routing.topk_ids, routing.topk_weights, self._starts, self._rows, self._scale)

    def tokens(self, expert: int) -> NDArray[np.int64]:
        """Tokens that chose `expert`, ascending."""
        return self._rows[self._starts[expert] : self._starts[expert + 1]]

    def selection(self, expert: int, bands: TokenBands) -> Selection:
        """The same as a selection."""
        where = slice(int(self._starts[expert]), int(self._starts[expert + 1]))
        return Selection.of_tokens(self._rows[where], bands.split, self._scale[where])


def _counters(bands: TokenBands) -> Split:
    """One counter for each row; rows of a band are replicas."""
    split = bands.split
    index = np.where(split.sizes > 0, np.arange(len(split)) // bands.n_feature_bands, 0)
    return Split(bands.n_rows, index, np.where(split.sizes > 0, index + 1, index))


def _selection_of_cores(rows: PlacedTensor, scale: PlacedTensor, n_rows: PlacedTensor, bands: TokenBands) -> Selection:
    """What each row of cores selected for itself."""
    counts = np.zeros(bands.n_rows, np.int64)
    chosen = []
    for row in range(bands.used_rows):
        counts[row] = n_rows.block(row, 0)[0]
        if row % bands.n_feature_bands == 0:
            chosen.append(rows.block(row, 0)[: counts[row]] + bands.split.starts[row])
    return Selection(counts, np.concatenate(chosen), np.zeros(1, np.float32), rows, scale)


def _tap(
    wafer: Wafer, h: PlacedTensor, weights: FfnWeights, out: PlacedTensor, bands: TokenBands, selection: Selection,
    tokens: NDArray[np.int64], slots: NDArray[np.bool_], taps: ExpertTaps, chunk: int,
) -> None:  # fmt: skip
    """Read an expert's hidden layer, and its output before it is weighted (computed once more, for the probe)."""
    slot = slots[tokens].argmax(axis=1)
    taps.hidden[tokens, slot] = read_compact(h, bands, selection)
    with wafer.empty("probed expert output", out.placement) as y:
        matmul(wafer, h, weights.down, y, bands, compact=selection, chunk=chunk)
        all_gather_bands(wafer, y, bands, selection)
        taps.out[tokens, slot] = read_compact(y, bands, selection)


def read_compact(tensor: PlacedTensor, bands: TokenBands, selection: Selection) -> NDArray[np.float32]:
    """The first ``counts[row]`` rows of every band's block, as an (m, n) array, without an entry in the ledger; zeros from a dry wafer."""
    n = tensor.placement.shape[1]
    split = tensor.placement.axis1[1]
    whole = np.zeros((selection.n_tokens, n), np.float32)
    if tensor.wafer.is_dry:
        return whole
    if tensor.data is not None:
        m = selection.n_tokens
        for col in split.used.tolist():
            j0, j1 = int(split.starts[col]), int(split.stops[col])
            whole[:, j0:j1] = tensor.flat[m * j0 : m * j1].reshape(m, j1 - j0)
        return whole
    at = 0
    for row in bands.split.representatives.tolist():
        m = int(selection.counts[row])
        for col in split.used.tolist():
            whole[at : at + m, split.starts[col] : split.stops[col]] = tensor.block(row, col)[:m]
        at += m
    return whole

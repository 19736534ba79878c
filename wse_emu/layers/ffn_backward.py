"""Backward passes of feed-forward networks on the wafer: of one for all tokens, and of experts for the tokens that chose them.

The matrices stream a second time, in their own order for the hidden layer, which is computed again, and transposed for the gradients of
hidden layer and input. Gradients of weights leave at the edge (see `weight_gradient`); that of the input stays where the input lies. Order
of sums: products as in the forward pass (`wse_kernels.matmul`); experts ascending; gradients of experts' weights over each core's features
of the hidden layer ascending, then along the row. With one column of cores all bits are those of `mixture_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.activations import Activation
from wse_emu.foundation.errors import InputError
from wse_emu.layers.ffn import FILL_ZERO, SCALE_ROWS, ExpertLists, on_selected
from wse_emu.layers.linear import COMBINE, DEFAULT_CHUNK, GEGLU_INTO, SWIGLU_INTO, Selection, all_gather_bands, matmul
from wse_emu.layers.router import Routing
from wse_emu.layers.selected import panel, run_selected
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.layers.weight_gradient import weight_gradient
from wse_emu.wafer import moves
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.ffn_backward import geglu_backward, put_row_products, swiglu_backward

F32 = NDArray[np.float32]

SWIGLU_BACKWARD = Kernel(body=swiglu_backward, params=("y", "dh", "dy"), out=("dy",), code_bytes=640)
GEGLU_BACKWARD = Kernel(body=geglu_backward, params=("y", "dh", "dy"), out=("dy",), code_bytes=768)
_KERNELS: dict[Activation, tuple[Kernel, Kernel]] = {
    "silu": (SWIGLU_INTO, SWIGLU_BACKWARD), "gelu_tanh": (GEGLU_INTO, GEGLU_BACKWARD),
}  # fmt: skip
PUT_ROW_PRODUCTS = Kernel(
    body=put_row_products,
    params=("a", "b", "rows", "expert", "topk_ids", "out"),
    inout=("out",),
    code_bytes=256,
    macs=lambda s: s["a"][0] * s["a"][1],
)


@dataclass(frozen=True, slots=True)
class BackwardWeights:
    """Weights of one feed-forward network without biases, as they stream in a backward pass."""

    gate_up: StreamedMatrix
    """(hidden, 2 * ffn), gate and up columns alternating."""
    down_t: StreamedMatrix
    """(hidden, ffn): the output projection, transposed."""
    gate_up_t: StreamedMatrix
    """(2 * ffn, hidden): `gate_up`, transposed."""
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class FfnGradients:
    """Gradients of one network's weights, in the order of the forward pass."""

    gate_up: F32
    """(hidden, 2 * ffn)."""
    down: F32
    """(ffn, hidden)."""


class _Rooms:
    """Work blocks of a backward pass: projections, hidden layer, its gradient, and the gradient of the projections."""

    def __init__(self, wafer: Wafer, x: PlacedTensor, width: int, bands: TokenBands, held: ExitStack) -> None:
        split = Split.balanced(width, wafer.cols)

        def room(name: str, columns: Split) -> PlacedTensor:
            place = wafer.placement((bands.n_tokens, columns.total), x.placement.axis0, ("col", columns))
            return held.enter_context(wafer.empty(name, place))

        self.split = split
        self.y, self.dy = room("gate and up", split.scaled(2)), room("gradient of gate and up", split.scaled(2))
        self.h, self.u = room("ffn hidden", split), room("gradient of ffn hidden", split)


def dense_ffn_backward(
    wafer: Wafer, x: PlacedTensor, weights: BackwardWeights, d_out: PlacedTensor, dx: PlacedTensor, bands: TokenBands, name: str,
    *, chunk: int = DEFAULT_CHUNK,
) -> FfnGradients:  # fmt: skip
    """Gradients of ``(activation(x @ w_gate) * (x @ w_up)) @ w_down``.

    Parameters
    ----------
    wafer : Wafer
    x, d_out, dx : PlacedTensor, (T, hidden), float32
        Input and gradient of the output, complete on every row of a band; gradient of the input, written so.
    weights : BackwardWeights
    bands : TokenBands
    name : str
        Of the gradients in the ledger: with ``.gate_up`` and ``.down`` behind it.
    chunk : int
        Most columns of one streamed or drained piece.
    """
    forward, backward = _KERNELS[weights.activation]
    split = Split.balanced(weights.down_t.n_out, wafer.cols)

    def room(name: str, columns: Split) -> PlacedTensor:
        return wafer.empty(name, wafer.placement((bands.n_tokens, columns.total), x.placement.axis0, ("col", columns)))

    with room("gradient of gate and up", split.scaled(2)) as dy:
        with room("gate and up", split.scaled(2)) as y:  # each block only as long as it is needed: this is where SRAM is short
            matmul(wafer, x, weights.gate_up, y, bands, chunk=chunk)
            all_gather_bands(wafer, y, bands)
            with room("ffn hidden", split) as h:
                wafer.launch(forward, y=y, first=0, h=h)
                d_down = weight_gradient(wafer, h, d_out, bands, f"{name}.down", chunk=chunk)
            with room("gradient of ffn hidden", split) as u:
                matmul(wafer, d_out, weights.down_t, u, bands, chunk=chunk)
                all_gather_bands(wafer, u, bands)
                wafer.launch(backward, y=y, dh=u, dy=dy)
        d_gate_up = weight_gradient(wafer, x, dy, bands, f"{name}.gate_up", chunk=chunk)
        matmul(wafer, dy, weights.gate_up_t, dx, bands, chunk=chunk)
    all_gather_bands(wafer, dx, bands)
    return FfnGradients(d_gate_up, d_down)


def experts_ffn_backward(
    wafer: Wafer, x: PlacedTensor, routing: Routing, experts: Iterable[tuple[int, BackwardWeights]], width: int, d_out: PlacedTensor,
    dx: PlacedTensor, d_share: PlacedTensor, bands: TokenBands, name: str, *, n_experts: int, chunk: int = DEFAULT_CHUNK,
    implementation: str = "experimental",
) -> dict[int, FfnGradients]:  # fmt: skip
    """Gradients of ``sum over chosen e of weight[t, e] * ffn_e(x[t])``, expert by expert.

    Parameters
    ----------
    wafer : Wafer
    x, d_out, dx : PlacedTensor, (T, hidden), float32
        Input and gradient of the output, complete on every row of a band; gradient of the input, written so.
    routing : Routing
        Decision of the forward pass.
    experts : iterable of (expert id, BackwardWeights)
        In ascending order; must hold every chosen expert.
    width : int
        Features of an expert's hidden layer.
    d_share : PlacedTensor, (T, top_k), float32
        Written: gradient of the experts' weights, 0 in slots of nobody; rows as those of `x`, columns on any columns of cores.
    bands : TokenBands
    name : str
        Of the gradients in the ledger: with the expert and ``.gate_up`` or ``.down`` behind it.
    n_experts : int
    chunk : int
        Most columns of one streamed or drained piece.
    implementation : {"experimental", "optimized"}
        Search for an expert's tokens, or sort all tokens once.

    Returns
    -------
    dict of int to FfnGradients
        Exactly 0 for an expert that no token chose.

    Raises
    ------
    InputError
        If `implementation` is another.
    """
    if implementation not in ("experimental", "optimized"):
        raise InputError(f"`implementation` must be 'experimental' or 'optimized' in a backward pass on the wafer, got {implementation!r}")
    found: dict[int, FfnGradients] = {}
    slots = routing.topk_ids.shape[1]
    with ExitStack() as held:
        rooms = _Rooms(wafer, x, width, bands, held)
        d_taken = held.enter_context(wafer.empty("gradients of experts' outputs", d_out.placement))
        private = Split.uniform(slots, wafer.cols, at=rooms.split.used)
        place = wafer.placement((bands.n_tokens, private.total), x.placement.axis0, ("col", private))
        shares = held.enter_context(wafer.empty("parts of weights' gradients", place))
        lists = held.enter_context(ExpertLists(wafer, routing, bands, n_experts, sorted_once=implementation == "optimized"))
        wafer.launch(FILL_ZERO, x=dx)
        wafer.launch(FILL_ZERO, x=shares)
        for expert, weights in experts:
            tokens = lists.selection(expert)
            forward, backward = _KERNELS[weights.activation]
            matmul(wafer, x, weights.gate_up, rooms.y, bands, take=tokens, chunk=chunk)
            all_gather_bands(wafer, rooms.y, bands, tokens)
            run_selected(wafer, forward, {"y": rooms.y, "h": rooms.h}, {"first": 0}, tokens)
            matmul(wafer, d_out, weights.down_t, rooms.u, bands, take=tokens, chunk=chunk)
            all_gather_bands(wafer, rooms.u, bands, tokens)
            _put_shares(wafer, rooms, shares, routing, expert, tokens, bands)
            on_selected(wafer, SCALE_ROWS, tokens, {"x": d_out, "out": d_taken}, bands, compact="out")
            d_down = weight_gradient(wafer, rooms.h, d_taken, bands, f"{name}.{expert}.down", compact=tokens, chunk=chunk)
            _scale_hidden(wafer, rooms, tokens)
            run_selected(wafer, backward, {"y": rooms.y, "dh": rooms.h, "dy": rooms.dy}, {}, tokens)
            d_gate_up = weight_gradient(wafer, x, rooms.dy, bands, f"{name}.{expert}.gate_up", take=tokens, chunk=chunk)
            plain = replace(tokens, scale=np.ones_like(tokens.scale), scale_blocks=None)
            matmul(wafer, rooms.dy, weights.gate_up_t, dx, bands, mode=COMBINE, put=plain, chunk=chunk)
            found[expert] = FfnGradients(d_gate_up, d_down)
        moves.chain_row(wafer, shares, d_share)
    all_gather_bands(wafer, dx, bands)
    return found


def _put_shares(
    wafer: Wafer, rooms: _Rooms, shares: PlacedTensor, routing: Routing, expert: int, tokens: Selection, bands: TokenBands
) -> None:
    """Every core's part of the gradient of its tokens' weights for one expert, over its own features."""
    rows, runs, macs = np.flatnonzero(tokens.counts), 0, 0
    with wafer.sram.code(PUT_ROW_PRODUCTS.name, PUT_ROW_PRODUCTS.code_bytes):
        if wafer.cores is not None:
            for row in rows.tolist():
                some = slice(0, int(tokens.counts[row]))
                for col in rooms.split.used.tolist():
                    args: dict[str, Any] = {
                        "a": rooms.h.held[row, col].view(some), "b": rooms.u.held[row, col].view(some), "rows": tokens.heads(row, col)[0],
                        "expert": expert, "topk_ids": routing.ids.held[row, col], "out": shares.held[row, col],
                    }  # fmt: skip
                    macs += wafer.cores.run(PUT_ROW_PRODUCTS, (row, col), args)
                    runs += 1
        else:
            runs = int(rows.size * rooms.split.used.size)
            macs = int(tokens.counts.sum()) * rooms.split.total
            if not wafer.is_dry:
                for col in rooms.split.used.tolist():
                    h, u = (panel(tensor, col, tokens.n_tokens) for tensor in (rooms.h, rooms.u))
                    put_row_products(h, u, tokens.rows, expert, routing.topk_ids, panel(shares, col, bands.n_tokens))
    wafer.record(Event(None, "", "launch", PUT_ROW_PRODUCTS.name, count=runs, macs=macs))


def _scale_hidden(wafer: Wafer, rooms: _Rooms, tokens: Selection) -> None:
    """The hidden layer's gradient times the tokens' weights, where the hidden layer was."""
    rows, runs = np.flatnonzero(tokens.counts), 0
    with wafer.sram.code(SCALE_ROWS.name, SCALE_ROWS.code_bytes):
        if wafer.cores is not None:
            for row in rows.tolist():
                m = int(tokens.counts[row])
                for col in rooms.split.used.tolist():
                    u, h = (tensor.held[row, col].view(slice(0, m)) for tensor in (rooms.u, rooms.h))
                    args = {"x": u, "rows": np.arange(m), "scale": tokens.heads(row, col)[1], "out": h}
                    wafer.cores.run(SCALE_ROWS, (row, col), args)
                    runs += 1
        else:
            runs, m = int(rows.size * rooms.split.used.size), tokens.n_tokens
            for col in [] if wafer.is_dry else rooms.split.used.tolist():
                SCALE_ROWS.body(panel(rooms.u, col, m), np.arange(m), tokens.scale, panel(rooms.h, col, m))
    wafer.record(Event(None, "", "launch", SCALE_ROWS.name, count=runs))

"""Backward pass of a router on the wafer: logits again, on one core of every row, the rule's derivatives there, and two products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.linear import DEFAULT_CHUNK, all_gather_bands, matmul
from wse_emu.layers.norm import add_residual
from wse_emu.layers.router import Routing, router_code
from wse_emu.layers.selected import panel
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.layers.weight_gradient import weight_gradient
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.routing_backward import BACKWARD_ROWS, route_tokens_backward

ROUTE_TOKENS_BACKWARD = Kernel(
    body=route_tokens_backward,
    params=("logits", "topk_ids", "d_weights", "rule", "work", "d_logits"),
    out=("d_logits",),
    scratch=("work",),
    code_bytes=3072,
)


@dataclass(frozen=True, slots=True)
class RouterMatrices:
    """A gate as it streams in a backward pass."""

    gate: StreamedMatrix
    """(hidden, n_experts)."""
    gate_t: StreamedMatrix
    """(n_experts, hidden): transposed."""


def share_split(slots: int, n_cols: int) -> Split:
    """Where `router_backward` wants the gradient of the experts' weights: whole on the first column of cores."""
    return Split.single(slots, 0, n_cols)


def router_backward(
    wafer: Wafer, x: PlacedTensor, matrices: RouterMatrices, rule: RoutingRule, routing: Routing, d_share: PlacedTensor, dx: PlacedTensor,
    bands: TokenBands, name: str, *, chunk: int = DEFAULT_CHUNK,
) -> NDArray[np.float32]:  # fmt: skip
    """Gradient of a learned router from that of the experts' weights; the choice has none.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, hidden), float32
    matrices : RouterMatrices
    rule : RoutingRule
        Of the forward pass.
    routing : Routing
        Its decision.
    d_share : PlacedTensor, (T, slots), float32
        Gradient of the experts' weights; columns by `share_split`.
    dx : PlacedTensor, (T, hidden), float32
        Gradient of the input, complete on every row of a band: the router's part is added.
    bands : TokenBands
    name : str
        Of the gradient, in the ledger.
    chunk : int
        Most columns of one streamed or drained piece.

    Returns
    -------
    ndarray, (hidden, n_experts), float32
        Gradient of the gate.

    Raises
    ------
    SpecError
        If the rule has no gate, or a gate with a bias.
    """
    if not rule.is_learned or rule.router_use_bias:
        raise SpecError("the router's backward pass on the wafer is for `routing_algorithm` 'learned' and `router_use_bias` False")
    n_experts = matrices.gate.n_out
    place = wafer.placement((bands.n_tokens, n_experts), x.placement.axis0, ("col", Split.single(n_experts, 0, wafer.cols)))
    with wafer.empty("router logits", place) as logits, wafer.empty("gradient of router logits", place) as d_logits:
        matmul(wafer, x, matrices.gate, logits, bands, chunk=chunk)
        all_gather_bands(wafer, logits, bands)
        _through_rule(wafer, rule, routing, logits, d_share, d_logits, bands)
        found = weight_gradient(wafer, x, d_logits, bands, name, chunk=chunk)
        with wafer.empty("router's part", dx.placement) as part:
            matmul(wafer, d_logits, matrices.gate_t, part, bands, chunk=chunk)
            all_gather_bands(wafer, part, bands)
            add_residual(wafer, dx, part)
    return found


def _through_rule(
    wafer: Wafer, rule: RoutingRule, routing: Routing, logits: PlacedTensor, d_share: PlacedTensor, d_logits: PlacedTensor,
    bands: TokenBands,
) -> None:  # fmt: skip
    """From gradients of weights to those of logits, on the first core of every row."""
    n_experts, code, kernel = logits.placement.shape[1], router_code(rule), ROUTE_TOKENS_BACKWARD
    rows, runs = bands.split.used.tolist(), 0
    place = wafer.placement((BACKWARD_ROWS, n_experts), (None, None), ("col", Split.single(n_experts, 0, wafer.cols)))
    with wafer.empty("router work", place) as work, wafer.sram.code(kernel.name, kernel.code_bytes):
        if wafer.cores is not None:
            named = {"logits": logits, "topk_ids": routing.ids, "d_weights": d_share, "work": work, "d_logits": d_logits}
            for row in rows:
                blocks = {key: tensor.held[row, 0] for key, tensor in named.items()}
                wafer.cores.run(kernel, (row, 0), {**blocks, "rule": code})
                runs += 1
        else:
            runs = len(rows)
            if not wafer.is_dry:
                given, shares, out = (panel(tensor, 0, bands.n_tokens) for tensor in (logits, d_share, d_logits))
                route_tokens_backward(given, routing.topk_ids, shares, code, np.empty((BACKWARD_ROWS, n_experts), np.float32), out)
    wafer.record(Event(None, "", "launch", kernel.name, count=runs))

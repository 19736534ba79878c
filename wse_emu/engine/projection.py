"""Products around attention, of every token with the weights of its own kind: a model's memory tokens may have theirs."""

from __future__ import annotations

from collections.abc import Callable

from wse_emu.engine.forward_pass import ForwardPass, Kinds
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.elementwise import bias
from wse_emu.layers.linear import all_gather_bands, matmul, matmul_by_kind
from wse_emu.layers.stream import StreamedMatrix, StreamedVector
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor


def project(run: ForwardPass, x: PlacedTensor, name: str, out: PlacedTensor, *, biased: bool) -> None:
    """``out = x @ w + b`` with the current layer's weights ``w_name`` and, if `biased`, ``b_name``; complete on every row of a band."""
    prefix, shape, weights = layer_prefix(run.current_layer), (x.placement.shape[1], out.placement.shape[1]), run.weights

    def vector(kind: str) -> StreamedVector:
        full = f"{prefix}{kind}b_{name}"
        return StreamedVector(full, weights.vector(full))

    project_with(
        run, x, lambda kind: weights.matrix(f"{prefix}{kind}w_{name}", *shape), vector if biased else None, out, run.bands, run.kinds
    )  # fmt: skip


def project_with(
    run: ForwardPass, x: PlacedTensor, matrix: Callable[[str], StreamedMatrix], vector: Callable[[str], StreamedVector] | None,
    out: PlacedTensor, bands: TokenBands, kinds: Kinds,
) -> None:  # fmt: skip
    """The same for tokens that lie as `bands` says, of these kinds, each with the matrix and the bias that it is given."""
    if len(kinds) == 1:
        matmul(run.wafer, x, matrix(kinds[0][0]), out, bands, chunk=run.options.piece)
    else:
        parts = [(matrix(kind), tokens) for kind, tokens in kinds if tokens is not None]
        matmul_by_kind(run.wafer, x, parts, out, bands, chunk=run.options.piece)
    all_gather_bands(run.wafer, out, bands)
    if vector is not None:
        for kind, tokens in kinds:
            added = vector(kind)
            bias(run.wafer, out, added.name, added.values, bands, only=tokens)

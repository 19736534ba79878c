"""Products of every head with a matrix of its own, head by head: each is a product of the whole mesh, as an expert's is."""

from __future__ import annotations

from wse_emu.layers.linear import DEFAULT_CHUNK, all_gather_bands, matmul
from wse_emu.layers.stream import StreamedHeads
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.head_slots import put_slots, rotate_slots, take_slot

TAKE_SLOT = Kernel(body=take_slot, params=("x", "slot", "out"), out=("out",), code_bytes=160)
PUT_SLOTS = Kernel(body=put_slots, params=("x", "n", "slot", "n_slots", "last", "out"), out=("out",), code_bytes=192)
ROTATE_SLOTS = Kernel(
    body=rotate_slots, params=("x", "cos", "sin"), inout=("x",), code_bytes=256, macs=lambda s: s["x"][0] * s["x"][1]
)  # fmt: skip


def head_products(
    wafer: Wafer, x: PlacedTensor, x_units: Split, weights: StreamedHeads, out: PlacedTensor, out_units: Split, n_slots: int,
    bands: TokenBands, *, chunk: int = DEFAULT_CHUNK,
) -> None:  # fmt: skip
    """``out[head] = x[head] @ weights[head]`` for every head.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, n_in * n_heads), float32
        Of every pair unit all heads, side by side; complete on every row of a token's band.
    x_units : Split
        Its pair units over columns.
    weights : StreamedHeads, (n_heads, n_in, n_out)
    out : PlacedTensor, (T, any), float32
        Of every pair unit `n_slots` slots; the first ``n_heads`` slots of the first pair units of every block are written, on every row
        of a token's band.
    out_units : Split
        The written pair units over columns.
    n_slots : int
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.
    """
    rows = x.placement.axis0
    with (
        wafer.empty("one head", wafer.placement((bands.n_tokens, weights.n_in), rows, ("col", x_units.scaled(2))), stored=x.stored) as own,
        wafer.empty(
            "product of a head", wafer.placement((bands.n_tokens, weights.n_out), rows, ("col", out_units.scaled(2))), stored=out.stored
        ) as product,
    ):
        start = len(wafer.ledger)
        for head in range(weights.n_heads):
            if wafer.is_dry and head == 1:  # without values, what follows is what the first head was
                one = wafer.ledger.recorded(start)
                for _ in range(1, weights.n_heads):
                    wafer.ledger.extend(one)
                break
            wafer.launch(TAKE_SLOT, x=x, slot=head, out=own)
            matmul(wafer, own, weights.head(head), product, bands, chunk=chunk)
            all_gather_bands(wafer, product, bands)
            wafer.launch(PUT_SLOTS, x=product, n=1, slot=head, n_slots=n_slots, last=0, out=out)

"""Operations on single elements of placed tensors: biases, constant factors, limits, gates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.linear import DEFAULT_CHUNK, Selection, all_gather_bands, matmul
from wse_emu.layers.norm import stream_vector
from wse_emu.layers.selected import run_only, run_selected
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import broadcast_row
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.elementwise import add_bias, add_bias_to, clip_to, scale_by_sigmoid, soft_cap
from wse_kernels.storage import copy_to

ADD_BIAS = Kernel(body=add_bias, params=("x", "bias"), inout=("x",), code_bytes=128)
ADD_BIAS_TO = Kernel(body=add_bias_to, params=("x", "rows", "bias"), inout=("x",), code_bytes=160)
CLIP = Kernel(body=clip_to, params=("x", "limit"), inout=("x",), code_bytes=128)
SOFT_CAP = Kernel(body=soft_cap, params=("x", "cap"), inout=("x",), code_bytes=416)
COPY = Kernel(body=copy_to, params=("x", "out"), out=("out",), code_bytes=96)
"""Into a tensor of another format it rounds, as every write does."""
SCALE_BY_SIGMOID = Kernel(body=scale_by_sigmoid, params=("x", "gate"), inout=("x",), code_bytes=352)


def bias(
    wafer: Wafer, x: PlacedTensor, name: str, values: NDArray[np.float32] | None, bands: TokenBands, selection: Selection | None = None,
    *, only: Selection | None = None,
) -> None:  # fmt: skip
    """``x = x + values``; each column's part of the vector streams down its column, not kept.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, n), float32
        Complete on every row of a token's band; read and written.
    name : str
        Of the vector, in the ledger.
    values : ndarray, (n,), float32, or None with the ``dry`` executor
    bands : TokenBands
    selection : Selection, optional
        Tokens that `x` holds in its first places, and nothing else.
    only : Selection, optional
        Those of all tokens that it is added to; where they lie, the program knows.
    """
    with stream_vector(wafer, name, values, x.placement.axis1[1], bands) as b:
        if only is not None:
            run_only(wafer, ADD_BIAS_TO, {"x": x}, {"bias": b}, only, bands)
        else:
            run_selected(wafer, ADD_BIAS, {"x": x}, {"bias": b}, selection)


def clip(wafer: Wafer, x: PlacedTensor, limit: float) -> None:
    """Hold every element within plus and minus `limit`."""
    wafer.launch(CLIP, x=x, limit=np.float32(limit))


def cap(wafer: Wafer, x: PlacedTensor, limit: float) -> None:
    """``x = limit * tanh(x / limit)``."""
    wafer.launch(SOFT_CAP, x=x, cap=np.float32(limit))


def gate_rows(
    wafer: Wafer, x: PlacedTensor, gate: StreamedMatrix, y: PlacedTensor, bands: TokenBands, *, chunk: int = DEFAULT_CHUNK
) -> NDArray[np.float32]:
    """``y = y * sigmoid(x @ gate)``, one factor for each token; returns ``x @ gate``, (T, 1), for the probe (zeros from a dry wafer).

    Parameters
    ----------
    wafer : Wafer
    x, y : PlacedTensor, (T, hidden), float32
        `y` is read and written.
    gate : StreamedMatrix, (hidden, 1)
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.
    """
    rows, last = x.placement.axis0, int(x.placement.axis1[1].used[-1])
    end_place = wafer.placement((bands.n_tokens, 1), rows, ("col", Split.single(1, last, wafer.cols)))
    everywhere = Split.everywhere(1, wafer.cols, at=y.placement.axis1[1].used)
    with (
        wafer.empty("gate", end_place) as end,
        wafer.empty("gate of every row", wafer.placement((bands.n_tokens, 1), rows, ("col", everywhere))) as whole,
    ):
        matmul(wafer, x, gate, end, bands, chunk=chunk)
        all_gather_bands(wafer, end, bands)
        broadcast_row(wafer, end, whole)
        wafer.launch(SCALE_BY_SIGMOID, x=y, gate=whole)
        return np.zeros((bands.n_tokens, 1), np.float32) if wafer.is_dry else _first_column(end, bands, last)


def _first_column(end: PlacedTensor, bands: TokenBands, col: int) -> NDArray[np.float32]:
    """The (T, 1) tensor on one column, read as bookkeeping."""
    if end.data is not None:
        return end.flat.reshape(-1, 1).copy()
    return np.concatenate([end.block(row, col) for row in bands.split.representatives.tolist()])

"""LayerNorm over features that lie across columns of cores: mean first, then variance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.norm import stream_vector, sum_places
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import broadcast_row, chain_row
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.layer_norm import layer_scale, sum_features, sum_squared_deviations

SUM_FEATURES = Kernel(body=sum_features, params=("x", "s"), out=("s",), code_bytes=128)
SUM_SQUARED_DEVIATIONS = Kernel(
    body=sum_squared_deviations, params=("x", "total", "size", "ss"), out=("ss",), code_bytes=192, macs=lambda s: s["x"][0] * s["x"][1]
)
LAYER_SCALE = Kernel(body=layer_scale, params=("x", "total", "squares", "weight", "size", "eps", "out"), out=("out",), code_bytes=288)


def layer_norm(
    wafer: Wafer, x: PlacedTensor, name: str, weight: NDArray[np.float32] | None, eps: float, out: PlacedTensor, bands: TokenBands
) -> None:
    """``out = (x - mean(x)) * (1 / sqrt(mean((x - mean(x))**2) + eps)) * weight``.

    The row's sum is chained west to east and sent back, then the sum of its squared deviations likewise. A bias is an operation of its
    own (`wse_emu.layers.elementwise.bias`).

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, n), float32
    name : str
        Name of the weight in the ledger.
    weight : ndarray, (n,), float32, or None with the ``dry`` executor
        Streamed to every core of the column that owns the features, not kept.
    eps : float
        Rounded to float32.
    out : PlacedTensor, placed as `x`
        Written.
    bands : TokenBands
    """
    size = np.float32(x.placement.shape[1])
    partial_place, end_place, total_place = sum_places(x.placement)
    with wafer.empty("row sums", total_place) as total, wafer.empty("sums of squared deviations", total_place) as squares:
        with wafer.empty("partial sums", partial_place) as partial, wafer.empty("end of a chain", end_place) as end:
            wafer.launch(SUM_FEATURES, x=x, s=partial)
            chain_row(wafer, partial, end)
            broadcast_row(wafer, end, total)
            wafer.launch(SUM_SQUARED_DEVIATIONS, x=x, total=total, size=size, ss=partial)
            chain_row(wafer, partial, end)
            broadcast_row(wafer, end, squares)
        with stream_vector(wafer, name, weight, x.placement.axis1[1], bands) as w:
            wafer.launch(LAYER_SCALE, x=x, total=total, squares=squares, weight=w, size=size, eps=np.float32(eps), out=out)

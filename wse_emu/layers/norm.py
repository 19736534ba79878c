"""RMSNorm over features that lie across columns of cores, and the residual sum."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wse_emu.wafer import costs
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import broadcast_row, chain_row
from wse_emu.wafer.placement import Placement, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.elementwise import add_scaled
from wse_kernels.norm import add_to, mesh_rms_norm, rms_scale, sum_squares

SUM_SQUARES = Kernel(body=sum_squares, params=("x", "ss"), out=("ss",), code_bytes=160, macs=lambda s: s["x"][0] * s["x"][1])
RMS_SCALE = Kernel(body=rms_scale, params=("x", "total", "weight", "size", "eps", "out"), out=("out",), code_bytes=256)
ADD_SCALED = Kernel(body=add_scaled, params=("x", "y", "factor"), inout=("x",), code_bytes=128)
ADD_TO = Kernel(body=add_to, params=("x", "y"), inout=("x",), code_bytes=128)


def rms_norm(
    wafer: Wafer, x: PlacedTensor, name: str, weight: NDArray[np.float32] | None, eps: float, out: PlacedTensor, bands: TokenBands
) -> None:
    """``out = x * (1 / sqrt(mean(x**2) + eps)) * weight``; the row's sum of squares is chained west to east and sent back.

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
    (_, features), (n_tokens, n) = x.placement.axis1, x.placement.shape
    size, guard = np.float32(n), np.float32(eps)
    program = rms_norm, x.placement, out.placement, bands, name
    events = wafer.known_events(program)
    if events is None:
        with wafer.first_run(program):
            _whole(wafer, x, name, weight, size, guard, out, bands)
        return
    if weight is not None:
        mesh_rms_norm(x.unsettled, n_tokens, features.offsets, weight, size, guard, out.unsettled, run=wafer.pending.run)
        out.settle()
    wafer.ledger.extend(events)


def _whole(
    wafer: Wafer, x: PlacedTensor, name: str, weight: NDArray[np.float32] | None, size: np.float32, eps: np.float32, out: PlacedTensor,
    bands: TokenBands,
) -> None:  # fmt: skip
    """The norm as its launches and moves."""
    partial_place, end_place, total_place = sum_places(x.placement)
    with wafer.empty("sum of squares", total_place) as total:
        with wafer.empty("partial sums of squares", partial_place) as partial, wafer.empty("row sum", end_place) as end:
            wafer.launch(SUM_SQUARES, x=x, ss=partial)
            chain_row(wafer, partial, end)
            broadcast_row(wafer, end, total)
        with stream_vector(wafer, name, weight, x.placement.axis1[1], bands) as w:
            wafer.launch(RMS_SCALE, x=x, total=total, weight=w, size=size, eps=eps, out=out)


@lru_cache(maxsize=1024)
def sum_places(x: Placement) -> tuple[Placement, Placement, Placement]:
    """Where a row's sums lie: partial ones on every column that has features, the sum on the last of them, then on all."""
    cols, n_cols = x.axis1[1].used, x.n_cols
    splits = Split.uniform(1, n_cols, cols), Split.single(1, int(cols[-1]), n_cols), Split.everywhere(1, n_cols, cols)
    partial, end, total = (Placement((x.shape[0], split.total), x.axis0, ("col", split), x.n_rows, n_cols) for split in splits)
    return partial, end, total


def stream_vector(
    wafer: Wafer, name: str, values: NDArray[np.float32] | None, split: Split, bands: TokenBands, *, n_rows: int | None = None
) -> PlacedTensor:
    """Broadcast each column's part of a vector down to the rows that hold tokens, or to the first `n_rows`; free it after use."""
    tensor = wafer.empty(name, wafer.placement((1, split.total), (None, None), ("col", split)))
    last = (bands.used_rows if n_rows is None else n_rows) - 1
    if wafer.cores is None:
        wafer.record(
            costs.moved(
                "stream", name, count=int(split.used.size), words=int(split.sizes.sum()), hops=int(split.sizes.sum()) * last,
                max_link=split.max_size if last else 0, max_hops=last,
            )
        )  # fmt: skip
        if values is not None:
            tensor.unsettled[...] = values  # nothing knows it yet
        return tensor
    assert values is not None
    traffic = wafer.cores.traffic()
    for col in split.used.tolist():
        payload = np.ascontiguousarray(values[split.starts[col] : split.stops[col]]).reshape(1, -1)
        wafer.cores.from_edge(traffic, payload, col, [tensor.held[row, col] for row in range(last + 1)])
    wafer.record(traffic.event("stream", name, costs.COLORS["stream"]))
    return tensor


def add_residual(wafer: Wafer, x: PlacedTensor, y: PlacedTensor, factor: float = 1.0) -> None:
    """``x = x + y * factor``, both placed alike."""
    if factor == 1:
        wafer.launch(ADD_TO, x=x, y=y)
    else:
        wafer.launch(ADD_SCALED, x=x, y=y, factor=np.float32(factor))

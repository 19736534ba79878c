"""RMSNorm of all of a token's queries together, and of all its keys: the sums of squares are chained along the row and sent back."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.norm import stream_vector
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import broadcast_row, chain_row
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.qk_norm import qk_scale, qk_squares

QK_SQUARES = Kernel(
    body=qk_squares,
    params=("qkv", "q_slots", "ss"),
    out=("ss",),
    code_bytes=224,
    macs=lambda s: s["qkv"][0] * s["qkv"][1] // (s["q_slots"] + 2) * (s["q_slots"] + 1),
)
QK_SCALE = Kernel(
    body=qk_scale,
    params=("qkv", "total", "q_weight", "k_weight", "q_slots", "q_size", "k_size", "eps"),
    inout=("qkv",),
    code_bytes=352,
)


def qk_norm(
    wafer: Wafer, qkv: PlacedTensor, heads: HeadLayout, names: tuple[str, str],
    weights: tuple[NDArray[np.float32], NDArray[np.float32]] | None, eps: float, bands: TokenBands,
) -> None:  # fmt: skip
    """Normalise a token's queries, all heads together, and its keys.

    Parameters
    ----------
    wafer : Wafer
    qkv : PlacedTensor, (T, n_qkv), float32
        Complete on every row of a token's band; read and written.
    heads : HeadLayout
    names : tuple of str
        Of the two weights, in the ledger.
    weights : two ndarrays, (num_heads * head_dim,) and (num_kv_heads * head_dim,), float32, or None with the ``dry`` executor
        In the wafer layout's order; each core receives the elements of its units, and does not keep them.
    eps : float
        Rounded to float32.
    bands : TokenBands
    """
    rows, cols, n = qkv.placement.axis0, heads.units.used, bands.n_tokens
    partial_place = wafer.placement((n, 2 * cols.size), rows, ("col", Split.uniform(2, wafer.cols, at=cols)))
    end_place = wafer.placement((n, 2), rows, ("col", Split.single(2, int(cols[-1]), wafer.cols)))
    of_q, of_k = weights if weights is not None else (None, None)
    slots = heads.queries_per_kv
    q_size, k_size = np.float32(max(1, heads.context.total)), np.float32(heads.keys.total)  # there may be no queries: keys made again
    with wafer.empty("sums of squares", wafer.placement((n, 2), rows, ("col", Split.everywhere(2, wafer.cols, at=cols)))) as total:
        with wafer.empty("partial sums of squares", partial_place) as partial, wafer.empty("row sums", end_place) as end:
            wafer.launch(QK_SQUARES, qkv=qkv, q_slots=slots, ss=partial)
            chain_row(wafer, partial, end)
            broadcast_row(wafer, end, total)
        with ExitStack() as stack:
            w_q = stack.enter_context(stream_vector(wafer, names[0], of_q, heads.context, bands)) if slots else None
            w_k = stack.enter_context(stream_vector(wafer, names[1], of_k, heads.keys, bands))
            wafer.launch(
                QK_SCALE, qkv=qkv, total=total, q_weight=w_q or w_k, k_weight=w_k, q_slots=slots, q_size=q_size, k_size=k_size,
                eps=np.float32(eps),
            )  # fmt: skip

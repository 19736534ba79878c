"""RMSNorm of every head's queries and keys; where a head is cut over columns, its sums of squares are chained through the group."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.norm import stream_vector
from wse_emu.wafer import costs
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.head_norm import head_scale, head_scale_plain, head_squares, mesh_head_norm

HEAD_SQUARES = Kernel(
    body=head_squares,
    params=("qkv", "q_slots", "ss"),
    out=("ss",),
    code_bytes=224,
    macs=lambda s: s["qkv"][0] * s["qkv"][1] // (s["q_slots"] + 2) * (s["q_slots"] + 1),
)
HEAD_SCALE = Kernel(
    body=head_scale, params=("qkv", "total", "q_weight", "k_weight", "q_slots", "size", "eps"), inout=("qkv",), code_bytes=320
)
HEAD_SCALE_PLAIN = Kernel(
    body=head_scale_plain, params=("qkv", "total", "q_slots", "size", "eps"), inout=("qkv",), code_bytes=256
)


def head_norm(
    wafer: Wafer, qkv: PlacedTensor, heads: HeadLayout, names: tuple[str, str] | None,
    weights: tuple[NDArray[np.float32], NDArray[np.float32]] | None, eps: float, bands: TokenBands,
) -> None:  # fmt: skip
    """Normalise the queries and keys of every head.

    Parameters
    ----------
    wafer : Wafer
    qkv : PlacedTensor, (T, n_qkv), float32
        Complete on every row of a token's band; read and written.
    heads : HeadLayout
    names : tuple of str, optional
        Of the two weights, in the ledger; None is a norm without weights.
    weights : two ndarrays, (head_dim,), float32, in the order of the pair units, or None with the ``dry`` executor or without weights
        For queries and for keys; each core receives the elements of its units, and does not keep them.
    eps : float
        Rounded to float32.
    bands : TokenBands
    """
    size, guard = np.float32(heads.head_dim), np.float32(eps)
    program = head_norm, qkv.placement, heads, names, bands
    events = wafer.known_events(program)
    if events is None:
        with wafer.first_run(program):
            _account(wafer, qkv, heads, names, weights, size, guard, bands)
    else:
        wafer.ledger.extend(events)
    if wafer.cores is None and not wafer.is_dry:
        if weights is None:  # a product with 1 changes no bit
            weights = (np.ones(heads.head_dim, np.float32),) * 2
        mesh_head_norm(
            qkv.unsettled, bands.n_tokens, heads.units.offsets, heads.queries_per_kv, heads.head_dim // 2, *weights, size, guard,
            run=wafer.pending.run,
        )  # fmt: skip
        qkv.settle()


def _account(
    wafer: Wafer, qkv: PlacedTensor, heads: HeadLayout, names: tuple[str, str] | None,
    weights: tuple[NDArray[np.float32], NDArray[np.float32]] | None, size: np.float32, eps: np.float32, bands: TokenBands,
) -> None:  # fmt: skip
    """The norm as its launches and moves; cores of their own compute there, a fused driver computes elsewhere."""
    q, slots = heads.queries_per_kv, heads.queries_per_kv + 1
    sums = wafer.placement((bands.n_tokens, heads.n_parts * slots), qkv.placement.axis0, ("col", heads.parts.scaled(slots)))
    run = wafer.launch if wafer.cores is not None else wafer.account
    with wafer.empty("head sums of squares", sums) as total:
        run(HEAD_SQUARES, qkv=qkv, q_slots=q, ss=total)
        _chain_cut_heads(wafer, total, heads, slots, bands)
        if names is None:
            run(HEAD_SCALE_PLAIN, qkv=qkv, total=total, q_slots=q, size=size, eps=eps)
            return
        w_q, w_k = weights if weights is not None else (None, None)
        with ExitStack() as stack:
            of_q = stack.enter_context(stream_vector(wafer, names[0], _laid_out(w_q, heads), heads.unit_weights, bands)) if q else None
            of_k = stack.enter_context(stream_vector(wafer, names[1], _laid_out(w_k, heads), heads.unit_weights, bands))
            run(HEAD_SCALE, qkv=qkv, total=total, q_weight=of_q or of_k, k_weight=of_k, q_slots=q, size=size, eps=eps)


def _laid_out(weight: NDArray[np.float32] | None, heads: HeadLayout) -> NDArray[np.float32] | None:
    """What each column needs of a head's weights, side by side."""
    return None if weight is None else weight[heads.unit_elements]


def _chain_cut_heads(wafer: Wafer, total: PlacedTensor, heads: HeadLayout, slots: int, bands: TokenBands) -> None:
    """Add the sums of a head's columns west to east and give the result back to all of them; whole heads need nothing."""
    groups = [[part.col for part in parts] for parts in heads.heads if len(parts) > 1]
    if not groups:
        return
    with wafer.empty("incoming sums", total.placement) as inbox, wafer.sram.code(CHAIN_ADD.name, CHAIN_ADD.code_bytes):
        if wafer.cores is None:
            for event in _chain_events(bands, tuple(map(tuple, groups)), slots):
                wafer.record(event)
            return
        chain, back, runs = wafer.cores.traffic(), wafer.cores.traffic(), 0
        for row in bands.split.used.tolist():
            for group in groups:
                acc = total.held[row, group[0]]
                for col in group[1:]:
                    come = inbox.held[row, col]
                    wafer.cores.send(chain, acc, [come])
                    wafer.cores.run(CHAIN_ADD, (row, col), {"acc": come, "p": total.held[row, col]})
                    runs += 1
                    acc = come
                total.held[row, group[-1]].write(acc.read())
                others = [total.held[row, col] for col in group[:-1]]
                for block in others:
                    block.poison()  # what was passed on makes room for the whole
                wafer.cores.send(back, acc, others)
        wafer.record(chain.event("chain", "head sums", costs.COLORS["chain"]))
        wafer.record(Event(None, "", "launch", CHAIN_ADD.name, count=runs))
        wafer.record(back.event("broadcast", "head sums", costs.COLORS["broadcast"]))


@lru_cache(maxsize=1024)
def _chain_events(bands: TokenBands, groups: tuple[tuple[int, ...], ...], slots: int) -> tuple[Event, Event, Event]:
    words = bands.split.sizes * slots
    stations = [np.array(group, np.int64) for group in groups]
    hands = int(np.count_nonzero(words)) * sum(s.size - 1 for s in stations)
    return (
        costs.merge("chain", "head sums", [costs.chain("head sums", words, s) for s in stations]),
        Event(None, "", "launch", CHAIN_ADD.name, count=hands),
        costs.merge("broadcast", "head sums", [costs.multicast("head sums", words, int(s[-1]), s) for s in stations]),
    )

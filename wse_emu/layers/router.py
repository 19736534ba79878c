"""Which experts each token visits: scores meet on one core of the token's row, which applies the routing rule and tells the row.

The core for a token is the one in column ``token index modulo columns``. Tokens never leave their row, and neither does the decision; only
the set of chosen experts goes to MemoryX, over the control channel.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import TraceError
from wse_emu.layers.linear import DEFAULT_CHUNK
from wse_emu.layers.row_products import PARTIAL_MATMUL, RowProducts
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD, CHAIN_OR
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.matmul import STORE, mesh_matmul
from wse_kernels.routing import mark_chosen, softmax_topk

SOFTMAX_TOPK = Kernel(
    body=softmax_topk,
    params=("logits", "renormalize", "probs", "topk_ids", "topk_weights"),
    out=("topk_ids", "topk_weights"),
    scratch=("probs",),
    code_bytes=512,
)
MARK_CHOSEN = Kernel(body=mark_chosen, params=("topk_ids", "mask"), out=("mask",), code_bytes=128)
_ID_WORDS = 2


@dataclass(frozen=True)
class Routing:
    """Decision of one MoE layer."""

    ids: PlacedTensor
    """(T, top_k) int64, on every core of the token's row."""
    weights: PlacedTensor
    """(T, top_k) float32, likewise."""
    topk_ids: NDArray[np.int64]
    """(T, top_k) the same on the host, as bookkeeping: experts in descending order of probability."""
    topk_weights: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    """(T, n_experts), if asked for."""

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the SRAM back."""
        self.ids.free()
        self.weights.free()


def route(
    wafer: Wafer, x: PlacedTensor, gate: StreamedMatrix, bands: TokenBands, top_k: int, renormalize: bool,
    *, chunk: int = DEFAULT_CHUNK, probe: bool = False, replay: NDArray[np.int64] | None = None,
) -> Routing:  # fmt: skip
    """Choose experts: softmax over all, the `top_k` most probable, ties to the lowest id.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, hidden), float32
    gate : StreamedMatrix, (hidden, n_experts)
    bands : TokenBands
    top_k : int
    renormalize : bool
        Divide the chosen weights by their sum.
    chunk : int
        Most experts of one streamed piece.
    probe : bool
        Also return the logits, through the probe channel.
    replay : ndarray, (T, top_k), int64, optional
        With the ``dry`` executor: the decision, from a recorded trace.

    Raises
    ------
    TraceError
        If the ``dry`` executor gets no decision, or one that is not for these tokens and experts.
    """
    n_tokens, n_experts = bands.n_tokens, gate.n_out
    rows = x.placement.axis0
    per_core = -(-bands.split.max_size // wafer.cols)
    # Scores, probabilities and the decision, for the tokens that meet on a core.
    meeting_words = np.full(wafer.cols, per_core * (2 * n_experts + top_k * (_ID_WORDS + 1)))
    place = wafer.placement((n_tokens, top_k), rows, (None, None))
    slab_place = wafer.placement((gate.n_in, 2 * min(chunk, n_experts)), ("col", x.placement.axis1[1]), (None, None))
    part_place = wafer.placement(
        (n_tokens, wafer.cols * min(chunk, n_experts)), rows, ("col", Split.uniform(min(chunk, n_experts), wafer.cols))
    )
    logits = np.zeros((n_tokens, n_experts), np.float32)
    topk_ids, topk_weights = np.zeros((n_tokens, top_k), np.int64), np.zeros((n_tokens, top_k), np.float32)
    with ExitStack() as kept:  # what outlives this call, unless it fails
        ids = kept.enter_context(wafer.empty("chosen experts", place, np.int64))
        weights = kept.enter_context(wafer.empty("expert weights", place))
        with (
            wafer.sram.reserved("router scores", np.ones(wafer.rows, np.int64), meeting_words, 4),
            wafer.empty("weight slabs", slab_place) as slab,
            wafer.empty("partial sums", part_place) as part,
            wafer.empty("incoming sums", part_place) as inbox,
            wafer.sram.code("router", PARTIAL_MATMUL.code_bytes + CHAIN_ADD.code_bytes + SOFTMAX_TOPK.code_bytes),
        ):
            if wafer.cores is not None:
                events = _isolated(wafer, x, gate, bands, renormalize, chunk, slab, part, inbox, ids, weights, logits)
                for row in bands.split.representatives.tolist():
                    where = slice(int(bands.split.starts[row]), int(bands.split.stops[row]))
                    topk_ids[where], topk_weights[where] = ids.block(row, 0), weights.block(row, 0)
            else:
                events = _events(wafer.rows, wafer.cols, x.placement.axis1[1], bands, n_experts, top_k, chunk, gate.name)
                if wafer.is_dry:
                    topk_ids = _checked_replay(replay, n_tokens, n_experts, top_k)
                else:
                    all_tokens = np.arange(n_tokens, dtype=np.int64)
                    whole = np.array([0, n_experts], np.int64)
                    mesh_matmul(
                        x.flat, n_tokens, x.placement.axis1[1].offsets, all_tokens, gate.values, 0, gate.n_in, n_experts,
                        logits.reshape(-1), n_tokens, whole, all_tokens, np.zeros(1, np.float32), STORE,
                    )  # fmt: skip
                    softmax_topk(logits, renormalize, np.empty_like(logits), topk_ids, topk_weights)
                    ids.flat[...], weights.flat[...] = topk_ids.reshape(-1), topk_weights.reshape(-1)
        kept.pop_all()
    for event in events:
        wafer.record(event)
    if probe:
        wafer.record(costs.moved("probe", "router logits", count=1, words=logits.size, hops=0, max_link=0, max_hops=0))
    return Routing(ids, weights, topk_ids, topk_weights, logits if probe else None)


def _checked_replay(replay: NDArray[np.int64] | None, n_tokens: int, n_experts: int, top_k: int) -> NDArray[np.int64]:
    if replay is None:
        raise TraceError("the `dry` executor needs a routing trace: it computes no scores")
    if replay.shape != (n_tokens, top_k):
        raise TraceError(f"routing trace: expected ids of shape {(n_tokens, top_k)}, got {replay.shape}")
    ids = np.sort(replay, axis=1)
    bad = (ids[:, 0] < 0) | (ids[:, -1] >= n_experts) | (ids[:, 1:] == ids[:, :-1]).any(axis=1)
    for token in np.flatnonzero(bad).tolist():
        raise TraceError(f"routing trace: token {token} chose {replay[token].tolist()}; expected different experts in 0..{n_experts - 1}")
    return replay.astype(np.int64, copy=False)


def _meeting_cores(bands: TokenBands, n_cols: int) -> tuple[Ints, Ints, Ints]:
    """(row, column, tokens) of every core on which tokens' scores meet, replicas once."""
    tokens = np.arange(bands.n_tokens)
    pairs, counts = np.unique(np.stack([bands.split.owner, tokens % n_cols]), axis=1, return_counts=True)
    return pairs[0], pairs[1], counts


@lru_cache(maxsize=4096)
def _events(
    n_rows: int, n_cols: int, k_split: Split, bands: TokenBands, n_experts: int, top_k: int, chunk: int, name: str
) -> tuple[Event, ...]:
    stations, source, n_in = k_split.used, int(k_split.used[-1]), k_split.total
    n_pieces = -(-n_experts // chunk)
    used, replicas = bands.used_rows, bands.n_feature_bands
    last_row = used - 1
    row_words = bands.split.sizes[:used] * n_experts
    row, col, n = _meeting_cores(bands, n_cols)
    away = col != source
    side = np.zeros((2, n_rows), np.int64)
    np.add.at(side[0], row[col < source], n[col < source])
    np.add.at(side[1], row[col > source], n[col > source])
    ends = np.zeros((2, n_rows), np.int64)
    np.add.at(ends[0], row[col > 0], n[col > 0])
    np.add.at(ends[1], row[col < n_cols - 1], n[col < n_cols - 1])
    words = top_k * (_ID_WORDS + 1)
    spread = n_cols > 1
    runs = used * stations.size * n_pieces
    return (
        costs.moved(
            "stream", name, count=n_pieces * stations.size, words=n_in * n_experts, hops=n_in * n_experts * last_row,
            max_link=k_split.max_size * n_experts if last_row else 0, max_hops=last_row,
        ),
        Event(None, "", "launch", PARTIAL_MATMUL.name, count=runs, macs=n_in * int(row_words.sum())),
        costs.chain(name, row_words, stations, messages=n_pieces),
        Event(None, "", "launch", CHAIN_ADD.name, count=used * (stations.size - 1) * n_pieces),
        costs.moved(
            "deliver", name, count=int(away.sum()) * n_pieces * replicas, words=int(n[away].sum()) * n_experts * replicas,
            hops=int((n * np.abs(col - source)).sum()) * n_experts * replicas, max_link=int(side.max(initial=0)) * n_experts,
            max_hops=int(np.abs(col - source).max()),
        ),
        Event(None, "", "launch", SOFTMAX_TOPK.name, count=int(row.size) * replicas),
        costs.moved(
            "broadcast", "routing", count=2 * int(row.size) * replicas if spread else 0,
            words=bands.n_tokens * words * replicas if spread else 0,
            hops=bands.n_tokens * words * replicas * (n_cols - 1), max_link=int(ends.max(initial=0)) * words,
            max_hops=int(np.maximum(col, n_cols - 1 - col).max()),
        ),
    )  # fmt: skip


def _isolated(
    wafer: Wafer, x: PlacedTensor, gate: StreamedMatrix, bands: TokenBands, renormalize: bool, chunk: int,
    slab: PlacedTensor, part: PlacedTensor, inbox: PlacedTensor, ids: PlacedTensor, weights: PlacedTensor, logits_out: NDArray[np.float32],
) -> tuple[Event, ...]:  # fmt: skip
    cores = wafer.cores
    assert cores is not None
    n_experts, top_k = gate.n_out, ids.placement.shape[1]
    products, told = RowProducts(cores, gate.name, x, slab, part, inbox), cores.traffic()
    decided = macs = 0
    rows = range(bands.used_rows)
    with cores.borrowing() as borrow:
        meeting: dict[tuple[int, int], tuple[Block, Ints]] = {}
        for row in rows:
            tokens = np.arange(bands.split.starts[row], bands.split.stops[row])
            for col in range(wafer.cols):
                mine = np.flatnonzero(tokens % wafer.cols == col)
                if mine.size:
                    meeting[row, col] = (borrow((row, col), "router scores", (mine.size, n_experts), np.float32), mine)
        for first in range(0, n_experts, chunk):
            n = min(chunk, n_experts - first)
            products.stream(gate.columns(first, first + n), rows)
            for row in rows:
                all_rows = np.arange(bands.split.sizes[row], dtype=np.int64)
                acc = products.product(row, all_rows.size, partial(_constant, all_rows), compact=False)
                for col in range(wafer.cols):
                    if (row, col) in meeting:
                        scores, mine = meeting[row, col]
                        products.hand(acc, scores, (slice(None), slice(first, first + n)), (mine, slice(None)))
        for core, (scores, mine) in meeting.items():
            probs = borrow(core, "probabilities", scores.array.shape, np.float32)
            decision = borrow(core, "decision", (mine.size, top_k), np.int64), borrow(core, "weights", (mine.size, top_k), np.float32)
            args = {"logits": scores, "renormalize": renormalize, "probs": probs, "topk_ids": decision[0], "topk_weights": decision[1]}
            macs += cores.run(SOFTMAX_TOPK, core, args)
            decided += 1
            to = (mine, slice(None))
            for block, tensor in zip(decision, (ids, weights), strict=True):
                tensor.held[core].write(block.read(), to)
                cores.send(told, block, [tensor.held[core[0], c] for c in range(wafer.cols) if c != core[1]], to=to)
            logits_out[bands.split.starts[core[0]] + mine] = scores.read()
    return (
        *products.events(),
        Event(None, "", "launch", SOFTMAX_TOPK.name, count=decided, macs=macs),
        told.event("broadcast", "routing", costs.COLORS["broadcast"]),
    )


def _constant(rows: Ints, _col: int) -> Ints:
    return rows


def report_chosen(wafer: Wafer, routing: Routing, bands: TokenBands, n_experts: int) -> Ints:
    """Tell MemoryX which experts any token chose: bit sets merged down the first column of cores, out at the north edge.

    Returns
    -------
    ndarray of int64
        Chosen experts, ascending.
    """
    n_words = -(-n_experts // 32)
    used = bands.used_rows
    ends = np.zeros(wafer.cols, np.int64)
    ends[0] = 2 * n_words
    with (
        wafer.sram.reserved("chosen set", np.ones(wafer.rows, np.int64), ends, 4),
        wafer.sram.code("chosen set", MARK_CHOSEN.code_bytes + CHAIN_OR.code_bytes),
    ):
        if wafer.cores is None:
            sizes = np.array([n_words])
            events = [
                Event(None, "", "launch", MARK_CHOSEN.name, count=used),
                costs.chain("chosen experts", sizes, np.arange(used), kind="control"),
                Event(None, "", "launch", CHAIN_OR.name, count=used - 1),
                costs.moved(
                    "control", "chosen experts", count=1, words=n_words, hops=n_words * (used - 1), max_link=n_words if used > 1 else 0,
                    max_hops=used - 1,
                ),
            ]  # fmt: skip
            chosen = np.unique(routing.topk_ids)
        else:
            events, mask = _merge_isolated(wafer, routing, used, n_words)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            chosen = np.flatnonzero(bits[:n_experts])
    for event in events:
        wafer.record(event)
    return chosen.astype(np.int64)


def _merge_isolated(wafer: Wafer, routing: Routing, used: int, n_words: int) -> tuple[list[Event], NDArray[np.int32]]:
    cores = wafer.cores
    assert cores is not None
    merging, leaving = cores.traffic(), cores.traffic()
    with cores.borrowing() as borrow:
        before: Block | None = None
        for row in range(used):
            mask = borrow((row, 0), "chosen set", (n_words,), np.int32)
            cores.run(MARK_CHOSEN, (row, 0), {"topk_ids": routing.ids.held[row, 0], "mask": mask})
            if before is not None:
                come = borrow((row, 0), "incoming set", (n_words,), np.int32)
                cores.send(merging, before, [come])
                cores.run(CHAIN_OR, (row, 0), {"mask": mask, "other": come})
            before = mask
        assert before is not None
        result = cores.to_edge(leaving, before)
    events = [
        Event(None, "", "launch", MARK_CHOSEN.name, count=used),
        merging.event("control", "chosen experts", costs.COLORS["control"]),
        Event(None, "", "launch", CHAIN_OR.name, count=used - 1),
        leaving.event("control", "chosen experts", costs.COLORS["control"]),
    ]
    return events, result

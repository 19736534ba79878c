"""Experts by number instead of by score: hash routing from token ids, uniform routing from positions.

There is no gate. The numbers come in over the edge, one for each token, to the core on which its scores would meet (see `router`), which
works out the experts and tells its row.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.router import Routing, checked_replay, meeting_cores, told_event
from wse_emu.wafer import costs
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.routing import assign_experts

ASSIGN_EXPERTS = Kernel(
    body=assign_experts,
    params=("numbers", "n_experts", "weight", "topk_ids", "topk_weights"),
    out=("topk_ids", "topk_weights"),
    code_bytes=192,
)
_NUMBER_WORDS = 2


def assign(
    wafer: Wafer, numbers: Ints, bands: TokenBands, n_experts: int, top_k: int, rule: RoutingRule,
    *, replay: NDArray[np.int64] | None = None,
) -> Routing:  # fmt: skip
    """Choose experts ``(number + slot) mod n_experts``, each with the weight ``scale / top_k``.

    Parameters
    ----------
    wafer : Wafer
    numbers : ndarray, (T,), int64
        Token ids (hash) or positions in the sequence (uniform).
    bands : TokenBands
    n_experts, top_k : int
    rule : RoutingRule
        Of algorithm "hash" or "uniform".
    replay : ndarray, (T, top_k), int64, optional
        With the ``dry`` executor: the decision, from a recorded trace, which takes the place of the numbers.
    """
    n_tokens = bands.n_tokens
    weight = np.float32(rule.routed_scaling_factor) / np.float32(top_k)
    per_core = -(-bands.split.max_size // wafer.cols)
    words = np.full(wafer.cols, per_core * (_NUMBER_WORDS + 3 * top_k))
    place = wafer.placement((n_tokens, top_k), ("row", bands.split), (None, None))
    topk_ids, topk_weights = np.zeros((n_tokens, top_k), np.int64), np.zeros((n_tokens, top_k), np.float32)
    with ExitStack() as kept:
        ids = kept.enter_context(wafer.empty("chosen experts", place, np.int64))
        weights = kept.enter_context(wafer.empty("expert weights", place))
        with (
            wafer.sram.reserved("router scores", np.ones(wafer.rows, np.int64), words, 4),
            wafer.sram.code("router", ASSIGN_EXPERTS.code_bytes),
        ):
            if wafer.cores is not None:
                events = _isolated(wafer, numbers, bands, n_experts, weight, ids, weights)
                for row in bands.split.representatives.tolist():
                    where = slice(int(bands.split.starts[row]), int(bands.split.stops[row]))
                    topk_ids[where], topk_weights[where] = ids.block(row, 0), weights.block(row, 0)
            else:
                events = _events(wafer.rows, wafer.cols, bands, top_k)
                if wafer.is_dry:
                    topk_ids = checked_replay(replay, n_tokens, n_experts, top_k)
                else:
                    assign_experts(numbers, n_experts, weight, topk_ids, topk_weights)
                    ids.flat[...], weights.flat[...] = topk_ids.reshape(-1), topk_weights.reshape(-1)
        kept.pop_all()
    for event in events:
        wafer.record(event)
    return Routing(ids, weights, topk_ids, topk_weights, None)


def _events(n_rows: int, n_cols: int, bands: TokenBands, top_k: int) -> tuple[Event, ...]:
    row, col, n, _ = meeting_cores(bands, n_cols)
    rows = (row[:, None] + np.arange(bands.n_feature_bands)).reshape(-1)  # replicas, too
    words = np.repeat(n * _NUMBER_WORDS, bands.n_feature_bands)
    link = np.zeros(n_cols, np.int64)
    np.add.at(link, np.repeat(col, bands.n_feature_bands)[rows > 0], words[rows > 0])
    return (
        costs.moved(
            "inject", "token numbers", count=int(rows.size), words=int(words.sum()), hops=int((words * rows).sum()),
            max_link=int(link.max()), max_hops=int(rows.max()),
        ),
        Event(None, "", "launch", ASSIGN_EXPERTS.name, count=int(rows.size)),
        told_event(n_rows, n_cols, bands, top_k),
    )  # fmt: skip


def _isolated(
    wafer: Wafer, numbers: Ints, bands: TokenBands, n_experts: int, weight: np.float32, ids: PlacedTensor, weights: PlacedTensor
) -> tuple[Event, ...]:
    cores = wafer.cores
    assert cores is not None
    top_k = ids.placement.shape[1]
    come, told, runs = cores.traffic(), cores.traffic(), 0
    with cores.borrowing() as borrow:
        for row in range(bands.used_rows):
            tokens = np.arange(bands.split.starts[row], bands.split.stops[row])
            for col in range(wafer.cols):
                mine = np.flatnonzero(tokens % wafer.cols == col)
                if not mine.size:
                    continue
                core = (row, col)
                number = borrow(core, "token numbers", (mine.size,), np.int64)
                cores.from_edge(come, np.ascontiguousarray(numbers[tokens[mine]]), col, [number])
                made = borrow(core, "decision", (mine.size, top_k), np.int64), borrow(core, "weights", (mine.size, top_k), np.float32)
                args = {"numbers": number, "n_experts": n_experts, "weight": weight, "topk_ids": made[0], "topk_weights": made[1]}
                cores.run(ASSIGN_EXPERTS, core, args)
                runs += 1
                to = (mine, slice(None))
                for block, tensor in zip(made, (ids, weights), strict=True):
                    tensor.held[core].write(block.read(), to)
                    cores.send(told, block, [tensor.held[row, c] for c in range(wafer.cols) if c != col], to=to)
    return (
        come.event("inject", "token numbers", costs.COLORS["inject"]),
        Event(None, "", "launch", ASSIGN_EXPERTS.name, count=runs),
        told.event("broadcast", "routing", costs.COLORS["broadcast"]),
    )

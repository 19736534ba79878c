"""Gradient of a streamed matrix on the wafer: ``x.T @ dy``, a sum over tokens that is handed from row to row, and leaves at the edge.

The activations lie as the forward pass left them: tokens over rows, features over columns. For a piece of the output's columns the core
that owns them tells its row what `dy` is there; every core adds its own tokens, one by one, to the sum that came from the north, and hands
it on. So the sum has one order, tokens ascending, with fma, from +0, wherever the rows are cut. The last row's sums leave for MemoryX.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.ffn import FILL_ZERO
from wse_emu.layers.linear import DEFAULT_CHUNK, Selection
from wse_emu.layers.selected import panel
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.ffn_backward import add_weight_gradient
from wse_kernels.matmul import STORE, mesh_matmul
from wse_kernels.matmul_parts import WEIGHT_TILE_COLS

F32 = NDArray[np.float32]

ADD_WEIGHT_GRADIENT = Kernel(
    body=add_weight_gradient,
    params=("x", "rows", "dy", "dw"),
    inout=("dw",),
    code_bytes=512,
    macs=lambda s: s["rows"][0] * s["dw"][0] * s["dw"][1],
)


def weight_gradient(
    wafer: Wafer, x: PlacedTensor, dy: PlacedTensor, bands: TokenBands, name: str, *, take: Selection | None = None,
    compact: Selection | None = None, chunk: int = DEFAULT_CHUNK,
) -> F32:  # fmt: skip
    """Gradient of the weights of ``y = x @ w`` from that of `y`, drained by pieces.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, n_in), float32
        Rows by `bands`, columns split over columns of cores.
    dy : PlacedTensor, (T, n_out), float32
        Likewise, complete on every row of a band; with `take` only its first tokens on each row of cores are meant, as a product of those
        tokens leaves them.
    bands : TokenBands
        How tokens lie over rows. Rows that hold the same tokens share the columns of the gradient.
    name : str
        Of the gradient, in the ledger.
    take : Selection, optional
        Tokens of `x` that belong to `dy`.
    compact : Selection, optional
        `x` and `dy` both hold just these tokens, compacted. At most one of the two may be given.
    chunk : int
        Most columns of one piece.

    Returns
    -------
    ndarray, (n_in, n_out), float32
        What left at the edge; +0, and nothing leaves, where there are no tokens. Zeros with the ``dry`` executor.
    """
    selection = take or compact
    counts = bands.split.sizes if selection is None else selection.counts
    out = np.zeros((x.placement.shape[1], dy.placement.shape[1]), np.float32)
    program = weight_gradient, bands, counts.tobytes(), x.placement, dy.placement, dy.name, name, chunk
    events = wafer.known_events(program)
    if events is None:
        with wafer.first_run(program):
            _whole(wafer, x, dy, bands, name, take, compact, chunk, counts, out)
        return out
    if not wafer.is_dry:
        _batched(x, dy, bands, take, compact, out)
    wafer.ledger.extend(events)
    return out


def _whole(
    wafer: Wafer, x: PlacedTensor, dy: PlacedTensor, bands: TokenBands, name: str, take: Selection | None, compact: Selection | None,
    chunk: int, counts: Ints, out: F32,
) -> None:  # fmt: skip
    """Hold the work blocks and the code, sum, and write down what moved."""
    k_split, out_split = x.placement.axis1[1], dy.placement.axis1[1]
    size = max(1, min(chunk, -(-out_split.max_size // bands.n_feature_bands)))
    piece_place = wafer.placement((bands.n_tokens, wafer.cols * size), x.placement.axis0, ("col", Split.uniform(size, wafer.cols)))
    sum_place = wafer.placement((k_split.total, size), ("col", k_split), (None, None))
    with (
        wafer.empty("gradient of outputs", piece_place) as pieces,
        wafer.empty("gradient of weights", sum_place) as sums,
        wafer.sram.code(ADD_WEIGHT_GRADIENT.name, ADD_WEIGHT_GRADIENT.code_bytes + FILL_ZERO.code_bytes),
    ):
        if wafer.cores is not None:
            events = _isolated(wafer, x, dy, bands, name, take, compact, chunk, counts, pieces, sums, out)
        else:
            events = _events(bands, counts.tobytes(), k_split, out_split, chunk, dy.name, name)
            if not wafer.is_dry:
                _batched(x, dy, bands, take, compact, out)
    for event in events:
        wafer.record(event)


def _batched(x: PlacedTensor, dy: PlacedTensor, bands: TokenBands, take: Selection | None, compact: Selection | None, out: F32) -> None:
    """All rows' tokens at once, in their order: the product of one column of cores that has all tokens for its k, the same bits."""
    selection = take or compact
    m = bands.n_tokens if selection is None else selection.n_tokens
    if m == 0:
        return
    whole_x, whole_dy = _rows_of(x, bands.n_tokens if compact is None else m), _rows_of(dy, m)
    n_in, n_out = out.shape
    turned = np.ascontiguousarray((whole_x if take is None else whole_x[take.rows]).T)
    tiles = np.concatenate([whole_dy[:, at : at + WEIGHT_TILE_COLS].reshape(-1) for at in range(0, n_out, WEIGHT_TILE_COLS)])
    tiles.flags.writeable = False  # as all weights: one compiled specialisation
    all_rows = np.arange(n_in)
    mesh_matmul(
        turned.reshape(-1), n_in, np.array([0, m]), all_rows, tiles, 0, m, n_out,
        out.reshape(-1), n_in, np.array([0, n_out]), all_rows, np.zeros(1, np.float32), STORE,
    )  # fmt: skip


def _rows_of(tensor: PlacedTensor, m: int) -> F32:
    """The first `m` rows of a tensor that holds as many, as one array."""
    whole, split = np.empty((m, tensor.placement.shape[1]), np.float32), tensor.placement.axis1[1]
    for col in split.used.tolist():
        whole[:, split.starts[col] : split.stops[col]] = panel(tensor, col, m)
    return whole


def _share(size: Any, band: Any, n_bands: int) -> Any:
    """First column of a band's share of a block of `size` columns (arrays welcome)."""
    return size * band // n_bands


@lru_cache(maxsize=1024)
def _events(
    bands: TokenBands, count_bytes: bytes, k_split: Split, out_split: Split, chunk: int, told: str, name: str
) -> tuple[Event, ...]:  # fmt: skip
    counts, n_bands = np.frombuffer(count_bytes, np.int64), bands.n_feature_bands
    stations, owners = k_split.used, out_split.used
    low, high = int(stations[0]), int(stations[-1])
    east, west = np.maximum(high - owners, 0), np.maximum(owners - low, 0)
    away = (stations.size > 1) | (owners != low)  # someone else needs the piece
    band = np.arange(n_bands)[:, None]
    share = _share(out_split.sizes[owners], band + 1, n_bands) - _share(out_split.sizes[owners], band, n_bands)  # (band, owner)
    n_pieces = -(-share // chunk)
    rows = [np.flatnonzero((counts > 0) & (np.arange(counts.size) % n_bands == b)) for b in range(n_bands)]
    tokens = np.array([counts[r].sum() for r in rows])
    n_rows = np.array([r.size for r in rows])
    live = n_rows > 0
    words, pieces = share.sum(axis=1), n_pieces.sum(axis=1)  # per band
    busiest = np.array([counts[r].max(initial=0) for r in rows])
    told_there = away & (share[live] > 0).any(axis=0) if live.any() else np.zeros(owners.size, np.bool_)
    broadcast = costs.moved(
        "broadcast", told, count=int(n_rows @ n_pieces[:, away].sum(axis=1)), words=int(tokens @ share[:, away].sum(axis=1)),
        hops=int(tokens @ (share @ (east + west))),
        max_link=int((busiest * np.maximum(share @ (east > 0), share @ (west > 0))).max(initial=0)),
        max_hops=int(np.maximum(east, west)[told_there].max(initial=0)),
    )  # fmt: skip
    first, last = (np.array([r[i] if r.size else 0 for r in rows]) for i in (0, -1))
    sent = words * live
    n_in, most, hands = k_split.total, k_split.max_size, np.maximum(n_rows - 1, 0)
    load = np.zeros(counts.size + 1, np.int64)  # of the link below each row
    np.add.at(load, first, sent)
    np.add.at(load, last, -sent)
    chain = costs.moved(
        "chain", name, count=int(hands @ pieces) * stations.size, words=n_in * int(hands @ words), hops=n_in * int((last - first) @ sent),
        max_link=most * int(np.cumsum(load).max(initial=0)),
        max_hops=int(np.diff(rows[-1]).max(initial=0)),  # the last band's share is never empty
    )  # fmt: skip
    drain = costs.moved(
        "drain", name, count=int(live @ pieces) * stations.size, words=n_in * int(sent.sum()), hops=n_in * int(last @ sent),
        max_link=most * int(sent[last > 0].sum()), max_hops=int(last.max(initial=0)),
    )  # fmt: skip
    cleared, added = (int(n @ pieces) * stations.size for n in (live, n_rows))
    return (
        broadcast,
        Event(None, "", "launch", FILL_ZERO.name, count=cleared),
        Event(None, "", "launch", ADD_WEIGHT_GRADIENT.name, count=added, macs=n_in * int(tokens @ words)),
        chain,
        drain,
    )


def _isolated(
    wafer: Wafer, x: PlacedTensor, dy: PlacedTensor, bands: TokenBands, name: str, take: Selection | None, compact: Selection | None,
    chunk: int, counts: Ints, pieces: PlacedTensor, sums: PlacedTensor, out: F32,
) -> tuple[Event, ...]:  # fmt: skip
    """Core by core; counts what it does."""
    cores, k_split, out_split, n_bands = wafer.cores, x.placement.axis1[1], dy.placement.axis1[1], bands.n_feature_bands
    assert cores is not None
    told, handed, left = cores.traffic(), cores.traffic(), cores.traffic()
    cleared = added = macs = 0
    columns = k_split.used.tolist()
    for owner in out_split.used.tolist():
        size, start = int(out_split.sizes[owner]), int(out_split.starts[owner])
        for band in range(n_bands):
            rows = [r for r in np.flatnonzero(counts).tolist() if r % n_bands == band]
            stop = _share(size, band + 1, n_bands)
            for at in range(_share(size, band, n_bands), stop, chunk):
                part = slice(at, min(at + chunk, stop))
                n = part.stop - part.start
                totals: dict[int, Block] = {}
                for row in rows:
                    m = int(counts[row])
                    here = {col: pieces.held[row, col].prefix(m, n) for col in columns}
                    source = dy.held[row, owner]
                    if owner in here:
                        here[owner].write(source.read((slice(0, m), part)))
                    cores.send(told, source, [here[col] for col in columns if col != owner], where=(slice(0, m), part))
                    for col in columns:
                        total = sums.held[row, col].prefix(int(k_split.sizes[col]), n)
                        if row == rows[0]:
                            cores.run(FILL_ZERO, (row, col), {"x": total})
                            cleared += 1
                        else:
                            cores.send(handed, totals[col], [total])
                        mine: Any = np.arange(m) if take is None else take.heads(row, col)[0]
                        block = x.held[row, col]
                        args = {"x": block if compact is None else block.view(slice(0, m)), "rows": mine, "dy": here[col], "dw": total}
                        macs += cores.run(ADD_WEIGHT_GRADIENT, (row, col), args)
                        added += 1
                        totals[col] = total
                for col, total in totals.items():
                    k = slice(int(k_split.starts[col]), int(k_split.stops[col]))
                    out[k, start + part.start : start + part.stop] = cores.to_edge(left, total)
    return (
        told.event("broadcast", dy.name, costs.COLORS["broadcast"]),
        Event(None, "", "launch", FILL_ZERO.name, count=cleared),
        Event(None, "", "launch", ADD_WEIGHT_GRADIENT.name, count=added, macs=macs),
        handed.event("chain", name, costs.COLORS["chain"]),
        left.event("drain", name, costs.COLORS["drain"]),
    )

"""Tokens of a part of the batch, brought from the rows that hold them to all rows, and back: what tiles of attention work on."""

from __future__ import annotations

import numpy as np

from wse_emu.layers.kv_cache import runs_of
from wse_emu.wafer import costs
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer


def move_tokens(
    wafer: Wafer, source: PlacedTensor, source_bands: TokenBands, first: int, target: PlacedTensor, target_bands: TokenBands, to: int,
    n: int,
) -> None:  # fmt: skip
    """Copy tokens `first` to ``first + n`` of `source` to the places from `to` on of `target`, along the columns.

    Parameters
    ----------
    wafer : Wafer
    source, target : PlacedTensor, (T, m) and (T', m), float32
        Columns split alike. Of the rows that hold a token the first one sends, and all that hold it in `target` receive.
    source_bands, target_bands : TokenBands
    first, to, n : int
    """
    columns = source.placement.axis1[1]
    here = source_bands.split.owner[first : first + n]
    there = target_bands.split.owner[to : to + n]
    runs, replicas = runs_of(here, there), target_bands.n_feature_bands
    if wafer.cores is not None:
        sent = wafer.cores.traffic()
        for run in runs:
            at = first + run.first - int(source_bands.split.starts[run.source])
            put = to + run.first - int(target_bands.split.starts[run.target])
            where, place = slice(at, at + run.n), slice(put, put + run.n)
            for col in columns.used.tolist():
                block = source.held[run.source, col]
                blocks = [target.held[run.target + i, col] for i in range(replicas)]
                for own in blocks:
                    if own.core == block.core:
                        own.write(block.read(where), place)
                wafer.cores.send(sent, block, [b for b in blocks if b.core != block.core], where=where, to=place)
        wafer.record(sent.event("send", "tokens of a tile", costs.COLORS["send"]))
        return
    if not wafer.is_dry:
        for col in columns.used.tolist():
            j0, j1 = int(columns.starts[col]), int(columns.stops[col])
            of, into = (t.flat[t.placement.shape[0] * j0 : t.placement.shape[0] * j1].reshape(-1, j1 - j0) for t in (source, target))
            into[to : to + n] = of[first : first + n]
    tokens, rows, top = runs.n, runs.source, runs.target
    bottom = top + replicas - 1
    goes = ~((top == rows) & (bottom == rows))
    tokens, rows, top, bottom = tokens[goes], rows[goes], np.minimum(top, rows)[goes], np.maximum(bottom, rows)[goes]
    load = costs.LineLoad(wafer.rows)
    for end in (top, bottom):
        load.add(rows, end, tokens)
    wafer.record(_event(tokens, rows, top, bottom, load.busiest(), columns.total, columns.max_size, int(columns.used.size)))


def _event(
    tokens: np.ndarray, rows: np.ndarray, top: np.ndarray, bottom: np.ndarray, busiest: int, total: int, widest: int, n_cols: int
) -> Event:  # fmt: skip
    return costs.moved(
        "send", "tokens of a tile", count=int(tokens.size) * n_cols, words=int(tokens.sum()) * total,
        hops=int((tokens * (bottom - top)).sum()) * total, max_link=busiest * widest,
        max_hops=int(np.maximum(rows - top, bottom - rows).max(initial=0)),
    )  # fmt: skip

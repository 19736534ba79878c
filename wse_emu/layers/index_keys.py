"""The lightning indexer on the wafer: which keys every new token attends to.

The indexer's keys lie over the rows as attention's do, token by token on the same row. A tile of queries is sent along the columns to every
row that holds keys of its past; there each core computes partial products, which are chained west to east. The last core of the row makes
scores of them, with the weights of the heads, which came along, and keeps the scores of its row.

The highest scores are found without moving any (see `wse_kernels.index_keys`): the last cores of the rows count the keys that reach a
threshold, bit by bit of it; counts are chained from row to row, the last row decides and sends the threshold back. Then every row knows
which of its keys are taken, once it has been told how many of the threshold's equals were taken above it; it tells all columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.attention_pattern import FULL
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.key_ranges import KeyRanges
from wse_emu.layers.attention_plan import AttentionPlan, plan_attention
from wse_emu.layers.head_groups import query_groups
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.index_cores import choose_on_cores
from wse_emu.layers.index_kernels import (
    ADD_COUNTS,
    CODE_BYTES,
    COUNT_REACHING,
    COUNT_WANTED,
    INDEX_SCORES,
    ORDER_SCORES,
    RAISE_THRESHOLD,
    TAKE_KEYS,
)
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.wafer import costs
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.index_keys import N_BITS, mesh_index_keys, scores_of

_MAX_TILE_TOKENS = 16
_WORK_BYTES = 4096
"""SRAM that the work blocks of one query tile may take, what belongs to keys alone apart; it holds at least one head of one token."""
_WORDS_PER_KEY = 6
"""Of the lists of keys: its row, the tokens that admit it and those that take it, a 64-bit word each."""
_WORDS_PER_TOKEN = 6
"""Threshold, wanted, before, counts (own and incoming), and one to spare."""


@dataclass(frozen=True, slots=True)
class ChosenKeys:
    """What every new token attends to."""

    taken: NDArray[np.bool_]
    """(T, keys) by position in the token's sequence."""
    scores: NDArray[np.float32] | None
    """(T, keys), 0 where a token does not admit the key; None if they were not asked for."""

    @property
    def ranges(self) -> KeyRanges:
        """The same as ranges of positions."""
        return KeyRanges.of_mask(self.taken)


def index_heads(indexer: Indexer, n_cols: int) -> HeadLayout:
    """How the indexer's heads lie over columns: one key that all queries share, without values."""
    return HeadLayout(1, indexer.num_heads, indexer.head_dim, n_cols, indexer.score_scale, value_dim=0)


def weights_column(heads: HeadLayout) -> int:
    """Column of cores that scores are made on: the last that holds a part of the key."""
    return int(heads.units.used[-1])


def choose_keys(
    wafer: Wafer, qk: PlacedTensor, weights: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    indexer: Indexer, columns: Split, *, kept: KeptKeys | None = None, probe: bool = False, replay: NDArray[np.bool_] | None = None,
) -> ChosenKeys:  # fmt: skip
    """The keys of the highest scores, for every new token.

    Parameters
    ----------
    wafer : Wafer
    qk : PlacedTensor, (T, units * (heads + 1) * 2), float32
        Queries and key of every pair unit, rotated; complete on every row of the token's band.
    weights : PlacedTensor, (T, heads), float32
        On the column that `weights_column` names; complete likewise.
    cache : KVCache
        Holds the indexer's keys of all tokens, the new ones included.
    layer : int
        As the cache counts.
    sequences : Sequences
    bands : TokenBands
    indexer : Indexer
    columns : Split
        Pair units of attention's own keys: every column that has any is told which keys are taken.
    kept : KeptKeys, optional
        Where cores that run one at a time keep what they are told.
    probe : bool
        Also give the scores back, through the probe channel.
    replay : ndarray, (T, keys), bool, optional
        With the ``dry`` executor: what is taken; by default the newest keys.
    """
    heads, rows_per_core = cache.heads, cache.keys_per_core(layer)
    tile_tokens, largest, words = _tile_size(heads, rows_per_core)
    n_keys = int((sequences.start + sequences.n_new).max())
    taken = np.zeros((bands.n_tokens, n_keys), np.bool_)
    order = np.zeros(taken.shape if probe else (0, 0), np.int32)
    with wafer.working((choose_keys, heads, rows_per_core), lambda: _work(wafer, heads, words, rows_per_core)):
        if not wafer.counts_visits:
            nothing = np.zeros((bands.n_tokens, 0), np.float32)
            return ChosenKeys(nothing.astype(np.bool_), nothing if probe else None)
        (groups,) = query_groups(heads, FULL, largest)
        (plan,) = cache.attention_plans(
            sequences, FULL, lambda: (plan_attention(cache, layer, sequences, bands, FULL, tile_tokens, groups),)
        )
        if wafer.cores is not None:
            events = choose_on_cores(wafer, qk, weights, cache, layer, sequences, bands, plan, indexer, columns, taken, order, kept)
        else:
            events = _events(heads, wafer.rows, plan, columns)
            if wafer.is_dry:
                taken = _newest(sequences, indexer.topk, n_keys) if replay is None else replay
            else:
                k, _, base, capacity = cache.buffers(layer, sequences)
                mesh_index_keys(
                    qk.flat, heads.units.offsets, heads.queries_per_kv, weights.flat, np.float32(indexer.score_scale),
                    np.float32(indexer.weight_scale), indexer.topk, sequences.first_token, sequences.n_new, sequences.start, base, capacity,
                    k, taken, order,
                )  # fmt: skip
    wafer.record(*events)
    if not probe:
        return ChosenKeys(taken, None)
    admitted = np.arange(n_keys) <= sequences.positions[:, None]
    wafer.record(costs.moved("probe", "index scores", count=1, words=int(admitted.sum()), hops=0, max_link=0, max_hops=0))
    return ChosenKeys(taken, np.where(admitted, scores_of(order), np.float32(0.0)))


def _newest(sequences: Sequences, topk: int, n_keys: int) -> NDArray[np.bool_]:
    """The newest keys of every token."""
    key, position = np.arange(n_keys), sequences.positions[:, None]
    newest: NDArray[np.bool_] = (key <= position) & (key > position - topk)
    return newest


@contextmanager
def _work(wafer: Wafer, heads: HeadLayout, words: int, rows_per_core: int) -> Iterator[None]:
    """Hold the code and the work blocks; columns without a part of the key are told which keys are taken."""
    of_columns = np.where(heads.units.sizes > 0, words, 2 * rows_per_core)
    with wafer.sram.reserved("index work", np.ones(wafer.rows, np.int64), of_columns, 4), wafer.sram.code("indexer", CODE_BYTES):
        yield


def _tile_size(heads: HeadLayout, rows_per_core: int) -> tuple[int, int, int]:
    """Tokens of a query tile, most heads that go together, and the words of a core's room for its work blocks.

    The room is whole, so that fewer keys never need more of it. Heads are cut where one token's would not fit it.
    """
    q, most = heads.queries_per_kv, _WORK_BYTES // 4
    # Of a head: packed queries, own and incoming products. Of a token: weights, scores, order numbers, and what it needs by itself.
    per_head = 2 * heads.max_part_units + 2 * rows_per_core
    by_itself = q + 2 * rows_per_core + _WORDS_PER_TOKEN
    n = min(_MAX_TILE_TOKENS, max(1, most // (q * per_head + by_itself)))
    largest = min(q, max(1, (most - by_itself) // per_head))
    words = min(_MAX_TILE_TOKENS * (q * per_head + by_itself), max(most, per_head + by_itself)) + _WORDS_PER_KEY * rows_per_core
    return n, largest, words


def _events(heads: HeadLayout, n_rows: int, plan: AttentionPlan, columns: Split) -> tuple[Event, ...]:
    """What `choose_on_cores` does and moves, from the tiles and the rows that they visit."""
    visits, rounds = plan.visits, N_BITS + 1
    n_tiles, n_visits, n_heads = visits.n.size, visits.key_row.size, heads.queries_per_kv
    low, high, row, n = visits.low, visits.high, visits.row, visits.n
    several = visits.n_rows > 1
    steps = visits.n_rows - 1
    up, down = np.minimum(low, row), np.maximum(high, row)
    goes = ~((low == row) & (high == row))
    load = costs.LineLoad(n_rows)
    sent = np.where(goes, n * n_heads, 0)
    for end in (up, down):
        load.add(row, end, sent)
    weights = costs.moved(
        "broadcast", "index weights", count=int(goes.sum()), words=int(sent.sum()), hops=int((sent * (down - up)).sum()),
        max_link=load.busiest(), max_hops=int(np.where(goes, np.maximum(row - up, down - row), 0).max(initial=0)),
    )  # fmt: skip
    same = np.diff(visits.tile) == 0
    gap = int(np.diff(visits.key_row)[same].max(initial=0))

    def handed(name: str, times: int) -> Event:
        """A word of every token, handed from key row to key row so many times."""
        load = costs.LineLoad(n_rows)
        load.add(low, high, np.where(several, n, 0))
        return costs.moved(
            "chain", name, count=times * int(steps.sum()), words=times * int((n * steps).sum()), hops=times * int((n * (high - low)).sum()),
            max_link=times * load.busiest(), max_hops=gap,
        )  # fmt: skip

    back = costs.LineLoad(n_rows)
    back.add(high, low, np.where(several, n, 0))
    thresholds = costs.moved(
        "broadcast", "index thresholds", count=rounds * int(several.sum()), words=rounds * int(np.where(several, n, 0).sum()),
        hops=rounds * int((n * (high - low)).sum()), max_link=rounds * back.busiest(), max_hops=int((high - low).max(initial=0)),
    )  # fmt: skip
    return (
        *plan.events[:5],
        weights,
        Event(
            None, "", "launch", INDEX_SCORES.name, count=n_visits * len(plan.groups.groups),
            macs=int((n[visits.tile] * visits.n_keys).sum()) * n_heads,
        ),
        Event(None, "", "launch", ORDER_SCORES.name, count=n_visits),
        Event(None, "", "launch", COUNT_REACHING.name, count=rounds * n_visits),
        handed("index counts", rounds),
        Event(None, "", "launch", ADD_COUNTS.name, count=rounds * int(steps.sum())),
        Event(None, "", "launch", RAISE_THRESHOLD.name, count=N_BITS * n_tiles),
        Event(None, "", "launch", COUNT_WANTED.name, count=n_tiles),
        thresholds,
        Event(None, "", "launch", TAKE_KEYS.name, count=n_visits),
        handed("index ties", 1),
        _told(heads, n_rows, visits.key_row, visits.n_keys, columns),
    )


def _told(heads: HeadLayout, n_rows: int, key_row: Ints, n_keys: Ints, columns: Split) -> Event:
    """Every row tells its columns which keys are taken: a 64-bit word for each key."""
    last = weights_column(heads)
    west, east = min(int(columns.used[0]), last), max(int(columns.used[-1]), last)
    if west == east:
        return costs.moved("broadcast", "chosen keys", count=0, words=0, hops=0, max_link=0, max_hops=0)
    words = 2 * int(n_keys.sum())
    return costs.moved(
        "broadcast", "chosen keys", count=key_row.size, words=words, hops=words * (east - west),
        max_link=2 * int(np.bincount(key_row, n_keys, n_rows).max()), max_hops=max(last - west, east - last),
    )  # fmt: skip

"""Which tiles of queries visit which rows of keys, and what that computes and sends: the same in every layer with one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.key_ranges import KeyRanges, keys_below, merged, within
from wse_emu.layers.attention_kernels import (
    ACCUMULATE,
    CAP_SCORES,
    FINISH,
    PACK_QUERIES,
    PARTIAL_SCORES,
    SCORE_MAX,
    START_DENOMINATOR,
    START_MAX,
)
from wse_emu.layers.head_groups import QueryGroups
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.wafer import costs
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import Ints, Split, TokenBands


@dataclass(frozen=True)
class Visits:
    """Tiles of queries (tokens of one sequence on one row of cores) and the rows of keys that each visits, tile by tile, top down."""

    sequence: Ints
    """Per tile, index among the pass's sequences."""
    first: Ints
    """First token (index among all new tokens)."""
    n: Ints
    """Tokens."""
    row: Ints
    """Row of cores that holds them."""
    first_visit: Ints
    """(tiles + 1,) a tile's visits are ``first_visit[i]`` to ``first_visit[i + 1]``."""
    key_row: Ints
    """Per visit, row of cores with keys that some token of the tile admits."""
    n_keys: Ints
    """Per visit, how many of them."""

    @property
    def low(self) -> Ints:
        """Per tile, first row visited."""
        return self.key_row[self.first_visit[:-1]]

    @property
    def high(self) -> Ints:
        """Per tile, last row visited."""
        return self.key_row[self.first_visit[1:] - 1]

    @property
    def n_rows(self) -> Ints:
        """Per tile, rows visited."""
        return np.diff(self.first_visit)

    @property
    def tile(self) -> Ints:
        """Per visit, its tile."""
        return np.repeat(np.arange(self.n.size), self.n_rows)


@dataclass(frozen=True)
class AttentionPlan:
    """What one pattern, or one of its layouts, asks for in one forward pass."""

    admitted: KeyRanges
    """Of every new token."""
    held: tuple[Ints, ...]
    """Per sequence, the keys that lie on the wafer, as (m, 2) ranges."""
    visits: Visits
    events: tuple[Event, ...]
    groups: QueryGroups
    """Query heads that admit these keys: a tile of queries goes its way once for each group."""


def plan_attention(
    cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands, pattern: AttentionPattern, tile_tokens: int,
    groups: QueryGroups, chosen: KeyRanges | None = None,
) -> AttentionPlan:  # fmt: skip
    """Tiles, visits and costs of a pattern over the newest tokens, or of keys that were chosen for each.

    Parameters
    ----------
    cache : KVCache
    layer : int
        One of those with that pattern, or of which it is a layout.
    sequences : Sequences
    bands : TokenBands
    pattern : AttentionPattern
    tile_tokens : int
        Most tokens of a tile.
    groups : QueryGroups
        Query heads that the pattern is for.
    chosen : KeyRanges, optional
        Of every new token, in place of what the pattern admits.
    """
    admitted = pattern.ranges(sequences.positions) if chosen is None else chosen
    held = cache.keys_in_pass(layer, sequences)
    visits = _visits(cache, sequences, bands, admitted, held, tile_tokens)
    events = _events(groups, cache.wafer.rows, bands, admitted, visits)
    return AttentionPlan(admitted, held, visits, tuple(events), groups)


def _visits(
    cache: KVCache, sequences: Sequences, bands: TokenBands, admitted: KeyRanges, held: tuple[Ints, ...], tile_tokens: int
) -> Visits:
    tiles, visited = [], []
    for s in range(sequences.n_new.size):
        first, n = int(sequences.first_token[s]), int(sequences.n_new[s])
        starts = cache.split(int(sequences.slot[s]), held[s]).offsets
        begin, row = _tiles(bands.split, first, n, tile_tokens)
        count = np.diff(begin, append=first + n)
        tiles.append((np.full(begin.size, s), begin, count, row))
        visited += [
            _visited(admitted, held[s], starts, np.append(begin, first + n)[at : at + _MOST_TILES + 1])
            for at in range(0, begin.size, _MOST_TILES)
        ]
    sequence, token, n_tokens, row_of_tile = (np.concatenate(of) for of in zip(*tiles, strict=True))
    n_visits, key_row, n_keys = (np.concatenate(of) for of in zip(*visited, strict=True))
    return Visits(sequence, token, n_tokens, row_of_tile, np.concatenate([[0], np.cumsum(n_visits)]), key_row, n_keys)


_MOST_TILES = 1024
"""Tiles whose visits are found at one time; they may be as many for each as there are rows of cores."""


def _tiles(split: Split, first: int, n: int, tile_tokens: int) -> tuple[Ints, Ints]:
    """First tokens of a sequence's tiles, each of at most `tile_tokens` on one row, and their rows."""
    if n == 1:
        return np.array([first]), split.owner[first : first + 1]
    token, row = np.arange(first, first + n), split.owner[first : first + n]
    begins = (token - np.maximum(split.starts[row], first)) % tile_tokens == 0
    return token[begins], row[begins]


def _visited(admitted: KeyRanges, held: Ints, starts: Ints, edges: Ints) -> tuple[Ints, Ints, Ints]:
    """Rows that some tiles visit: how many each, then which and with how many keys, tile by tile.

    Tile i has the tokens ``edges[i]`` to ``edges[i + 1]``; row r of cores holds the kept keys ``starts[r]`` to ``starts[r + 1]``.
    """
    of_tile = admitted.first[edges]
    ranges = admitted.ranges[of_tile[0] : of_tile[-1]]
    # Keys that some token of a tile admits: tiles are set so far apart that their ranges do not meet.
    apart = int(ranges[:, 1].max()) + 1
    tile = np.repeat(np.arange(edges.size - 1), np.diff(of_tile))
    union = merged(ranges + (tile * apart)[:, None])
    tile = union[:, 0] // apart
    low, high = keys_below(held, (union - (tile * apart)[:, None]).reshape(-1)).reshape(-1, 2).T
    # Rows that each range crosses, and its keys on each.
    above, below = np.searchsorted(starts, low, side="right") - 1, np.searchsorted(starts, high, side="left")
    n_rows = below - above
    row, of_range = np.repeat(above, n_rows) + within(n_rows), np.repeat(np.arange(tile.size), n_rows)
    keys = np.minimum(high[of_range], starts[row + 1]) - np.maximum(low[of_range], starts[row])
    row, tile, keys = row[keys > 0], tile[of_range][keys > 0], keys[keys > 0]
    # Several ranges of a tile may meet on a row.
    new = np.flatnonzero(np.diff(tile * starts.size + row, prepend=-1))
    return np.bincount(tile[new], minlength=edges.size - 1), row[new], np.add.reduceat(keys, new)


def _events(groups: QueryGroups, n_rows: int, bands: TokenBands, admitted: KeyRanges, visits: Visits) -> list[Event]:
    """What tiles and rows decide is the same for many passes of a growing sequence; the rest follows from the number of keys."""
    kept = _moves_of_tiles(
        groups, n_rows, bands.n_feature_bands, *(v.tobytes() for v in (visits.n, visits.row, visits.first_visit, visits.key_row))
    )
    heads, parts, v_parts, along = groups.heads, groups.n_parts, groups.n_value_parts, groups.chain
    pairs = visits.n[visits.tile] * visits.n_keys
    scored, n_visits, n_tiles = int(pairs.sum()), visits.n_keys.size, visits.n.size
    busiest = int(np.bincount(visits.key_row, pairs, n_rows).max()) * along.most_queries
    chain = costs.moved(
        "chain", "scores", count=n_visits * along.n_hands, words=scored * along.hand_queries, hops=scored * along.hop_queries,
        max_link=busiest, max_hops=along.max_gap,
    )  # fmt: skip
    back = costs.moved(
        "broadcast", "scores", count=n_visits * along.n_cut, words=scored * along.cut_queries, hops=scored * along.hop_queries,
        max_link=busiest, max_hops=along.max_span,
    )  # fmt: skip
    return [
        Event(None, "", "launch", PACK_QUERIES.name, count=n_tiles * parts),
        kept.queries,
        Event(None, "", "launch", PARTIAL_SCORES.name, count=n_visits * parts, macs=scored * groups.queries[0]),
        chain,
        Event(None, "", "launch", CHAIN_ADD.name, count=n_visits * along.n_hands),
        back,
        Event(None, "", "launch", START_MAX.name, count=n_tiles * parts),
        *([] if heads.score_cap is None else [Event(None, "", "launch", CAP_SCORES.name, count=n_visits * parts)]),
        Event(None, "", "launch", SCORE_MAX.name, count=n_visits * parts),
        kept.maxima,
        kept.maxima_back,
        Event(None, "", "launch", START_DENOMINATOR.name, count=n_tiles * v_parts),
        Event(
            None, "", "launch", ACCUMULATE.name, count=n_visits * v_parts, macs=admitted.n_admitted * groups.n_queries * heads.value_width
        ),
        kept.accumulators,
        Event(None, "", "launch", FINISH.name, count=n_tiles * v_parts),
        kept.context,
    ]


class _TileMoves(NamedTuple):
    """Moves whose size does not depend on the number of keys."""

    queries: Event
    maxima: Event
    maxima_back: Event
    accumulators: Event
    context: Event


@lru_cache(maxsize=256)
def _moves_of_tiles(
    groups: QueryGroups, n_rows: int, n_feature_bands: int, n_bytes: bytes, row_bytes: bytes, first_visit_bytes: bytes, key_row_bytes: bytes
) -> _TileMoves:
    """Of tiles with `n` tokens on a `row`, whose visits begin at `first_visit` and go to `key_row` (int64, see `Visits`)."""
    n, row, first_visit, key_row = (np.frombuffer(b, np.int64) for b in (n_bytes, row_bytes, first_visit_bytes, key_row_bytes))
    low, high, rows = key_row[first_visit[:-1]], key_row[first_visit[1:] - 1], np.diff(first_visit)
    parts, v_parts = groups.n_parts, groups.n_value_parts

    def column(
        kind: str, name: str, count: int, tokens: Ints, source: Ints, ends: list[Ints], *, words: tuple[int, int], hops: int
    ) -> Event:
        """Messages along columns, `words` of each token in all and of the widest column, from `source` out to `ends`."""
        load, length = costs.LineLoad(n_rows), np.zeros(tokens.size, np.int64)
        for end in ends:
            load.add(source, end, tokens)
            length += np.abs(end - source)
        return costs.moved(
            kind, name, count=count, words=int(tokens.sum()) * words[0], hops=int((tokens * length).sum()) * words[0],
            max_link=load.busiest() * words[1], max_hops=hops,
        )  # fmt: skip

    goes = ~((low == row) & (high == row))
    up, down = np.minimum(low, row), np.maximum(high, row)
    far = np.where(goes, np.maximum(row - up, down - row), 0)
    queries = column(
        "broadcast", "queries", int(goes.sum()) * parts, np.where(goes, n, 0), row, [up, down], words=groups.queries,
        hops=int(far.max(initial=0)),
    )  # fmt: skip

    several = rows > 1
    steps = np.where(several, rows - 1, 0)
    same = np.diff(np.repeat(np.arange(n.size), rows)) == 0
    row_gap = int(np.diff(key_row)[same].max(initial=0))

    def handed(name: str, messages: int, words: tuple[int, int]) -> Event:
        """Blocks handed from key row to key row, `words` of each token in all and of the widest column."""
        load = costs.LineLoad(n_rows)
        load.add(low, high, np.where(several, n, 0))
        return costs.moved(
            "chain", name, count=int(steps.sum()) * messages, words=int((n * steps).sum()) * words[0],
            hops=int((n * (high - low)).sum()) * words[0], max_link=load.busiest() * words[1], max_hops=row_gap,
        )  # fmt: skip

    maxima_back = column(
        "broadcast", "maxima", int(several.sum()) * parts, np.where(several, n, 0), high, [low], words=groups.maxima,
        hops=int((high - low)[several].max(initial=0)),
    )  # fmt: skip

    bottom = row + n_feature_bands - 1
    leaves = ~((bottom == row) & (high == row))
    top, end = np.minimum(high, row), np.maximum(high, bottom)
    far = np.where(leaves, np.maximum(high - top, end - high), 0)
    context = column(
        "send", "context", int(leaves.sum()) * v_parts, np.where(leaves, n, 0), high, [top, end], words=groups.context,
        hops=int(far.max(initial=0)),
    )  # fmt: skip
    maxima, accumulators = handed("maxima", parts, groups.maxima), handed("accumulators", 2 * v_parts, groups.accumulators)
    return _TileMoves(queries, maxima, maxima_back, accumulators, context)

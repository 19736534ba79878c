"""Causal attention over keys and values that lie over the rows of the wafer.

Queries go to the keys: a tile of queries (tokens of one sequence on one row of cores) is sent along the columns to every row that holds
keys it may see. There each core of the head's column group computes partial scores, which are chained west to east and sent back; the
running maximum is handed from row to row and its final value returned to all; then the accumulators (denominator and output) are handed
from row to row in ascending order of keys; the last row divides and sends the context back. Prefill and decode are the same program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.heads import HeadLayout, Part
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.attention import NO_WINDOW, finish, pack_queries, partial_scores, score_max, softmax_accumulate
from wse_kernels.attention_mesh import mesh_attention

PACK_QUERIES = Kernel(body=pack_queries, params=("qkv", "q_slots", "row0", "u0", "q_t"), out=("q_t",), code_bytes=224)
PARTIAL_SCORES = Kernel(
    body=partial_scores,
    params=("k", "f0", "q_t", "s_t"),
    out=("s_t",),
    code_bytes=416,
    macs=lambda s: s["s_t"][0] * s["s_t"][1] * s["q_t"][0],
)
SCORE_MAX = Kernel(body=score_max, params=("s_t", "scale", "key_pos0", "q_pos", "window", "m"), inout=("m",), code_bytes=256)
ACCUMULATE = Kernel(
    body=softmax_accumulate,
    params=("s_t", "scale", "key_pos0", "q_pos", "window", "m", "v", "f0", "denom", "o_t"),
    inout=("s_t", "denom", "o_t"),
    code_bytes=704,
)
FINISH = Kernel(body=finish, params=("o_t", "denom", "q_slots", "row0", "u0", "context"), out=("context",), code_bytes=224)

_CODE_BYTES = sum(k.code_bytes for k in (PACK_QUERIES, PARTIAL_SCORES, SCORE_MAX, ACCUMULATE, FINISH, CHAIN_ADD))
_MAX_TILE_TOKENS = 16
_WORK_BYTES = 4096
"""SRAM that the work blocks of one query tile may take; the tile holds at least one token."""


@dataclass(frozen=True)
class _Tiles:
    """Query tiles of one forward pass, as arrays with one entry for each tile."""

    sequence: Ints
    first: Ints
    """First token (index among all new tokens)."""
    n: Ints
    """Tokens."""
    row: Ints
    """Row of cores that holds them."""
    first_pos: Ints
    last_pos: Ints
    """Keys that some token of the tile sees: from `first_pos` (0 without a window) to the position of its last token."""
    first_key_row: Ints
    last_key_row: Ints
    n_key_rows: Ints


def attention(
    wafer: Wafer, qkv: PlacedTensor, context: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    *, window: int | None = None, probe: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:  # fmt: skip
    """Context of every new token: softmax of its scaled scores over the keys up to its own position, times the values.

    Rows of cores whose keys lie outside the window of every token of a tile are not visited; the cache holds all keys nevertheless.

    Parameters
    ----------
    wafer : Wafer
    qkv : PlacedTensor, (T, n_qkv), float32
        Queries rotated, complete on every row of the token's band.
    context : PlacedTensor, (T, num_heads * head_dim), float32
        Written, in the wafer layout's order.
    cache : KVCache
        Holds the keys and values of all tokens, the new ones included.
    layer : int
    sequences : Sequences
    bands : TokenBands
    window : int, optional
        Keys that a token sees, its own included; all by default.
    probe : bool
        Also return the maximum and the denominator of every token and query head, (T, num_heads), through the probe channel.
    """
    heads, reach = cache.heads, NO_WINDOW if window is None else window
    rows_per_core = int((-(-cache.capacity // wafer.rows)).max(initial=1))
    tile_tokens, words = _tile_size(heads, rows_per_core)
    work_words = np.where(heads.units.sizes > 0, words, 0)
    n_heads = heads.n_kv_heads * heads.queries_per_kv
    shape = (bands.n_tokens, n_heads) if probe else (0, 0)
    m, denominator = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    with (
        wafer.sram.reserved("attention work", np.ones(wafer.rows, np.int64), work_words, 4),
        wafer.sram.code("attention", _CODE_BYTES),
    ):
        if wafer.cores is not None:
            tiles = _tiles(cache, sequences, bands, tile_tokens, reach)
            events = _isolated(wafer, qkv, context, cache, layer, sequences, bands, tiles, reach, m, denominator)
        else:
            events = cache.attention_events(
                sequences, reach, lambda: _events(cache, sequences, bands, _tiles(cache, sequences, bands, tile_tokens, reach), reach)
            )
            if not wafer.is_dry:
                k, v, base, capacity = cache.buffers(layer, sequences)
                mesh_attention(
                    qkv.flat, heads.units.offsets, heads.queries_per_kv, heads.head_dim, heads.scale, reach, sequences.first_token,
                    sequences.n_new, sequences.start, base, capacity, k, v, context.flat, m, denominator,
                )  # fmt: skip
    for event in events:
        wafer.record(event)
    if not probe:
        return None
    wafer.record(costs.moved("probe", "softmax statistics", count=2, words=2 * m.size, hops=0, max_link=0, max_hops=0))
    return m, denominator


def _tile_size(heads: HeadLayout, rows_per_core: int) -> tuple[int, int]:
    """Tokens of a query tile, and the words of a core's room for its work blocks: whole, so that fewer keys never need more of it."""
    features = 2 * heads.max_part_units
    # Packed queries, own and incoming scores, maximum, denominator and output (own and incoming), context.
    per_token = heads.queries_per_kv * (features + 2 * rows_per_core + 2 + 2 * (1 + features) + features)
    n = min(_MAX_TILE_TOKENS, max(1, _WORK_BYTES // 4 // per_token))
    return n, min(_MAX_TILE_TOKENS * per_token, max(_WORK_BYTES // 4, per_token))


def _tiles(cache: KVCache, sequences: Sequences, bands: TokenBands, tile_tokens: int, window: int) -> _Tiles:
    split = bands.split
    columns: list[list[int]] = [[] for _ in range(9)]
    for s in range(sequences.n_new.size):
        first, n, start = (int(a[s]) for a in (sequences.first_token, sequences.n_new, sequences.start))
        keys = cache.split(start + n)
        owner = keys.owner
        ordinal = np.cumsum(keys.sizes > 0)
        at = first
        while at < first + n:
            row = int(split.owner[at])
            stop = min(int(split.stops[row]), first + n, at + tile_tokens)
            first_pos, last_pos = max(0, start + at - first - window + 1), start + stop - 1 - first
            first_row, last_row = int(owner[first_pos]), int(owner[last_pos])
            n_rows = int(ordinal[last_row] - ordinal[first_row]) + 1
            for column, value in zip(columns, (s, at, stop - at, row, first_pos, last_pos, first_row, last_row, n_rows), strict=True):
                column.append(value)
            at = stop
    return _Tiles(*(np.array(column, np.int64) for column in columns))


# ---- what it costs


def _events(cache: KVCache, sequences: Sequences, bands: TokenBands, tiles: _Tiles, window: int) -> list[Event]:
    heads, n_rows = cache.heads, cache.wafer.rows
    parts, q = heads.n_parts, tiles.n * heads.queries_per_kv
    low, high, rows = tiles.first_key_row, tiles.last_key_row, tiles.n_key_rows
    n_keys = tiles.last_pos + 1 - tiles.first_pos
    width = 2 * heads.units.max_size
    total_width = 2 * heads.units.total
    spans = np.array([p[-1].col - p[0].col for p in heads.heads])
    cut = [p for p in heads.heads if len(p) > 1]
    gap = max((int(np.diff([part.col for part in p]).max()) for p in cut), default=0)
    scored = int((q * n_keys).sum())
    pairs = int(np.minimum(sequences.positions + 1, window).sum())

    def column(
        kind: str, name: str, count: int, words: Ints, source: Ints, ends: list[Ints], *, total: int, widest: int, hops: int
    ) -> Event:
        """Messages along columns: per tile `words` for each unit of width, from `source` out to `ends`."""
        load, length = costs.LineLoad(n_rows), np.zeros(words.size, np.int64)
        for end in ends:
            load.add(source, end, words)
            length += np.abs(end - source)
        return costs.moved(
            kind, name, count=count, words=int(words.sum()) * total, hops=int((words * length).sum()) * total,
            max_link=load.busiest() * widest, max_hops=hops,
        )  # fmt: skip

    goes = ~((low == tiles.row) & (high == tiles.row))
    up, down = np.minimum(low, tiles.row), np.maximum(high, tiles.row)
    far = np.where(goes, np.maximum(tiles.row - up, down - tiles.row), 0)
    queries = column(
        "broadcast", "queries", int(goes.sum()) * parts, np.where(goes, q, 0), tiles.row, [up, down], total=total_width, widest=width,
        hops=int(far.max(initial=0)),
    )  # fmt: skip

    busiest = _score_load(cache, sequences, tiles, q)
    hands = sum(len(p) - 1 for p in cut)
    chained = int(rows.sum()) * hands
    chain = costs.moved(
        "chain", "scores", count=chained, words=scored * hands, hops=scored * int(spans.sum()), max_link=busiest if cut else 0, max_hops=gap
    )
    back = costs.moved(
        "broadcast", "scores", count=int(rows.sum()) * len(cut), words=scored * len(cut), hops=scored * int(spans.sum()),
        max_link=busiest if cut else 0, max_hops=int(spans.max()),
    )  # fmt: skip

    several = rows > 1
    steps = np.where(several, rows - 1, 0)
    row_gap = _row_gap(cache, sequences, tiles)
    heads_here = int(heads.heads_per_col.max())

    def handed(name: str, messages: int, total: int, widest: int) -> Event:
        """Blocks handed from key row to key row: `total` words per query column of the tile and hand."""
        load = costs.LineLoad(n_rows)
        load.add(low, high, np.where(several, q, 0))
        return costs.moved(
            "chain", name, count=int(steps.sum()) * messages, words=int((q * steps).sum()) * total,
            hops=int((q * (high - low)).sum()) * total, max_link=load.busiest() * widest, max_hops=row_gap,
        )  # fmt: skip

    returned = np.where(several, q, 0)
    maxima = handed("maxima", parts, parts, heads_here)
    maxima_back = column(
        "broadcast", "maxima", int(several.sum()) * parts, returned, high, [low], total=parts, widest=heads_here,
        hops=int((high - low)[several].max(initial=0)),
    )  # fmt: skip
    accumulators = handed("accumulators", 2 * parts, parts + total_width, heads_here + width)

    bottom = tiles.row + bands.n_feature_bands - 1
    leaves = ~((bottom == tiles.row) & (high == tiles.row))
    top, end = np.minimum(high, tiles.row), np.maximum(high, bottom)
    far = np.where(leaves, np.maximum(high - top, end - high), 0)
    answers = column(
        "send", "context", int(leaves.sum()) * parts, np.where(leaves, q, 0), high, [top, end], total=total_width, widest=width,
        hops=int(far.max(initial=0)),
    )  # fmt: skip
    n_tiles, visits = int(q.size), int(rows.sum()) * parts
    n_heads = heads.n_kv_heads * heads.queries_per_kv
    return [
        Event(None, "", "launch", PACK_QUERIES.name, count=n_tiles * parts),
        queries,
        Event(None, "", "launch", PARTIAL_SCORES.name, count=visits, macs=scored * total_width),
        chain,
        Event(None, "", "launch", CHAIN_ADD.name, count=chained),
        back,
        Event(None, "", "launch", SCORE_MAX.name, count=visits),
        maxima,
        maxima_back,
        Event(None, "", "launch", ACCUMULATE.name, count=visits, macs=pairs * n_heads * heads.head_dim),
        accumulators,
        Event(None, "", "launch", FINISH.name, count=n_tiles * parts),
        answers,
    ]


def _score_load(cache: KVCache, sequences: Sequences, tiles: _Tiles, q: Ints) -> int:
    """Words of scores that pass a link of the busiest row: admitted keys of the row times queries, over all tiles."""
    load = np.zeros(cache.wafer.rows, np.int64)
    for s in range(sequences.n_new.size):
        mine = tiles.sequence == s
        keys = cache.split(int(sequences.start[s] + sequences.n_new[s]))
        begun, ended = np.zeros(cache.wafer.rows, np.int64), np.zeros(cache.wafer.rows + 1, np.int64)
        np.add.at(begun, tiles.first_key_row[mine], q[mine])
        np.add.at(ended, tiles.last_key_row[mine] + 1, q[mine])
        load += keys.sizes * np.cumsum(begun - ended[:-1])  # whole rows, less what the first and the last row hold beyond the tile's keys
        np.subtract.at(load, tiles.first_key_row[mine], q[mine] * (tiles.first_pos[mine] - keys.starts[tiles.first_key_row[mine]]))
        np.subtract.at(load, tiles.last_key_row[mine], q[mine] * (keys.stops[tiles.last_key_row[mine]] - 1 - tiles.last_pos[mine]))
    return int(load.max(initial=0))


def _row_gap(cache: KVCache, sequences: Sequences, tiles: _Tiles) -> int:
    """Longest way between key rows that follow each other, over all tiles."""
    gap = 0
    for s in range(sequences.n_new.size):
        used = cache.split(int(sequences.start[s] + sequences.n_new[s])).used
        steps = np.diff(used)
        mine = tiles.sequence == s
        firsts, lasts = (np.searchsorted(used, rows[mine]) for rows in (tiles.first_key_row, tiles.last_key_row))
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            gap = max(gap, int(steps[first:last].max(initial=0)))
    return gap


# ---- one core at a time


@dataclass(slots=True)
class _Counts:
    """Runs and multiply-adds of one kernel."""

    runs: int = 0
    macs: int = 0


class _TileRun:
    """One query tile and one head on its way over the rows of keys."""

    def __init__(
        self, wafer: Wafer, cache: KVCache, layer: int, slot: int, parts: tuple[Part, ...], keys: Split, span: tuple[int, int], q_pos: Ints,
        window: int, tally: dict[str, _Counts], traffic: dict[str, Any],
    ) -> None:  # fmt: skip
        assert wafer.cores is not None
        self.cores, self.cache, self.layer, self.slot, self.parts = wafer.cores, cache, layer, slot, parts
        self.q_pos, self.window, self.tally, self.traffic = q_pos, window, tally, traffic
        self.n_columns = q_pos.size * cache.heads.queries_per_kv
        self.starts = keys.starts
        first, last = span
        self.visits = [
            (r, max(int(keys.starts[r]), first), min(int(keys.stops[r]), last + 1))
            for r in keys.used.tolist()
            if keys.starts[r] <= last and keys.stops[r] > first
        ]
        self.borrowed: list[Block] = []
        self.queries: dict[tuple[int, int], Block] = {}
        self.scores: dict[tuple[int, int], Block] = {}

    def borrow(self, core: tuple[int, int], name: str, *shape: int) -> Block:
        """A work block that lives as long as this run."""
        block = self.cores.arena(*core).allocate(name, shape, np.float32)
        self.borrowed.append(block)
        return block

    def release(self) -> None:
        """Give all work blocks back."""
        for block in self.borrowed:
            self.cores.arena(*block.core).free(block)

    def run(self, kernel: Kernel, core: tuple[int, int], args: dict[str, Any], *, macs: int = 0) -> None:
        """Run and tally a kernel; `macs` where its multiply-adds do not follow from shapes (the interpreter counts its own)."""
        count = self.tally.setdefault(kernel.name, _Counts())
        count.runs += 1
        done = self.cores.run(kernel, core, args)
        count.macs += done if self.cores.interpreted else done + macs

    def kept(self, which: int, core: tuple[int, int], start: int, stop: int) -> Block:
        """Keys (0) or values (1) of positions start to stop on a core that holds them."""
        first = int(self.starts[core[0]])
        return self.cache.block(self.layer, self.slot, *core)[which].view(slice(start - first, stop - first))

    def send_queries(self, qkv: PlacedTensor, row: int, row0: int) -> None:
        """Pack the tile's queries on their row and send them to every row of keys."""
        q_slots = self.cache.heads.queries_per_kv
        for part in self.parts:
            home = self.borrow((row, part.col), "packed queries", 2 * part.n_units, self.n_columns)
            self.run(
                PACK_QUERIES, (row, part.col),
                {"qkv": qkv.held[row, part.col], "q_slots": q_slots, "row0": row0, "u0": part.first_unit, "q_t": home},
            )  # fmt: skip
            self.queries[row, part.col] = home
            away = []
            for key_row, _, _ in self.visits:
                if key_row != row:
                    self.queries[key_row, part.col] = self.borrow((key_row, part.col), "visiting queries", 2 * part.n_units, self.n_columns)
                    away.append(self.queries[key_row, part.col])
            self.cores.send(self.traffic["queries"], home, away)

    def score(self) -> None:
        """Whole scores on every core of the group, row of keys by row of keys."""
        for row, start, stop in self.visits:
            total: Block | None = None
            for part in self.parts:
                core = (row, part.col)
                own = self.borrow(core, "scores", stop - start, self.n_columns)
                keys = self.kept(0, core, start, stop)
                self.run(PARTIAL_SCORES, core, {"k": keys, "f0": 2 * part.first_unit, "q_t": self.queries[core], "s_t": own})
                self.scores[core] = own
                if total is not None:
                    come = self.borrow(core, "incoming scores", stop - start, self.n_columns)
                    self.cores.send(self.traffic["score chain"], total, [come])
                    self.run(CHAIN_ADD, core, {"acc": come, "p": own})
                    self.scores[core] = come
                total = self.scores[core]
            assert total is not None
            others = [self.scores[row, part.col] for part in self.parts[:-1]]
            for block in others:
                block.poison()  # what was passed on makes room for the whole
            self.cores.send(self.traffic["score return"], total, others)

    def maximum(self) -> dict[tuple[int, int], Block]:
        """The exact maximum over all admitted keys, on every core that the tile visits."""
        maxima: dict[tuple[int, int], Block] = {}
        for part in self.parts:
            before: Block | None = None
            for row, start, _ in self.visits:
                core = (row, part.col)
                m = maxima[core] = self.borrow(core, "maxima", self.n_columns)
                if before is None:
                    m.write(-np.inf)
                else:
                    self.cores.send(self.traffic["maxima"], before, [m])
                self.run(
                    SCORE_MAX,
                    core,
                    {
                        "s_t": self.scores[core],
                        "scale": self.cache.heads.scale,
                        "key_pos0": start,
                        "q_pos": self.q_pos,
                        "window": self.window,
                        "m": m,
                    },
                )
                before = m
            assert before is not None
            others = [maxima[row, part.col] for row, _, _ in self.visits[:-1]]
            for block in others:
                block.poison()
            self.cores.send(self.traffic["maxima return"], before, others)
        return maxima

    def accumulate(self, maxima: dict[tuple[int, int], Block]) -> dict[int, tuple[Block, Block]]:
        """Denominator and output of every part, handed from row to row; they end on the last row of keys."""
        ends: dict[int, tuple[Block, Block]] = {}
        for part in self.parts:
            state: tuple[Block, Block] | None = None
            for row, start, stop in self.visits:
                core = (row, part.col)
                here = (self.borrow(core, "denominators", self.n_columns), self.borrow(core, "outputs", 2 * part.n_units, self.n_columns))
                for i, block in enumerate(here):
                    if state is None:
                        block.write(0.0)
                    else:
                        self.cores.send(self.traffic["accumulators"], state[i], [block])
                lowest = np.maximum(start, self.q_pos + 1 - self.window)
                admitted = int(np.maximum(np.minimum(stop, self.q_pos + 1) - lowest, 0).sum())
                self.run(
                    ACCUMULATE, core,
                    {
                        "s_t": self.scores[core], "scale": self.cache.heads.scale, "key_pos0": start, "q_pos": self.q_pos,
                        "window": self.window, "m": maxima[core], "v": self.kept(1, core, start, stop), "f0": 2 * part.first_unit,
                        "denom": here[0], "o_t": here[1],
                    },
                    macs=admitted * self.cache.heads.queries_per_kv * 2 * part.n_units,
                )  # fmt: skip
                state = here
            assert state is not None
            ends[part.col] = state
        return ends

    def send_context(self, ends: dict[int, tuple[Block, Block]], context: PlacedTensor, row: int, row0: int, n_replicas: int) -> None:
        """Divide, and send the tile's context to all rows that hold its tokens."""
        q_slots, t = self.cache.heads.queries_per_kv, self.q_pos.size
        last = self.visits[-1][0]
        for part in self.parts:
            core = (last, part.col)
            denominator, output = ends[part.col]
            done = self.borrow(core, "finished context", t, 2 * part.n_units * q_slots)
            self.run(FINISH, core, {"o_t": output, "denom": denominator, "q_slots": q_slots, "row0": 0, "u0": 0, "context": done})
            first = 2 * part.first_unit * q_slots
            where = (slice(row0, row0 + t), slice(first, first + 2 * part.n_units * q_slots))
            targets = [context.held[row + i, part.col] for i in range(n_replicas)]
            for target in targets:
                if target.core == core:
                    target.write(done.read(), where)
            self.cores.send(self.traffic["context"], done, [target for target in targets if target.core != core], to=where)


_MOVES = (
    ("broadcast", "queries", "queries"), ("chain", "scores", "score chain"), ("broadcast", "scores", "score return"),
    ("chain", "maxima", "maxima"), ("broadcast", "maxima", "maxima return"), ("chain", "accumulators", "accumulators"),
    ("send", "context", "context"),
)  # fmt: skip


def _isolated(
    wafer: Wafer, qkv: PlacedTensor, context: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    tiles: _Tiles, window: int, m_out: NDArray[np.float32], denom_out: NDArray[np.float32],
) -> list[Event]:  # fmt: skip
    assert wafer.cores is not None
    heads = cache.heads
    traffic = {key: wafer.cores.traffic() for _, _, key in _MOVES}
    tally: dict[str, _Counts] = {}
    for i in range(tiles.n.size):
        s, first, n, row = (int(a[i]) for a in (tiles.sequence, tiles.first, tiles.n, tiles.row))
        first_pos, last_pos = int(tiles.first_pos[i]), int(tiles.last_pos[i])
        keys = cache.split(int(sequences.start[s] + sequences.n_new[s]))
        q_pos = np.arange(last_pos + 1 - n, last_pos + 1, dtype=np.int64)
        row0 = first - int(bands.split.starts[row])
        for head, parts in enumerate(heads.heads):
            run = _TileRun(wafer, cache, layer, int(sequences.slot[s]), parts, keys, (first_pos, last_pos), q_pos, window, tally, traffic)
            try:
                run.send_queries(qkv, row, row0)
                run.score()
                maxima = run.maximum()
                ends = run.accumulate(maxima)
                run.send_context(ends, context, row, row0, bands.n_feature_bands)
                if m_out.size:
                    last = (run.visits[-1][0], parts[0].col)
                    where = (slice(first, first + n), slice(head * heads.queries_per_kv, (head + 1) * heads.queries_per_kv))
                    m_out[where] = maxima[last].read().reshape(-1, n).T
                    denom_out[where] = ends[parts[0].col][0].read().reshape(-1, n).T
            finally:
                run.release()
    moves = {key: traffic[key].event(kind, name, costs.COLORS[kind]) for kind, name, key in _MOVES}

    def launch(kernel: Kernel) -> Event:
        count = tally.get(kernel.name, _Counts())
        return Event(None, "", "launch", kernel.name, count=count.runs, macs=count.macs)

    return [
        launch(PACK_QUERIES), moves["queries"], launch(PARTIAL_SCORES), moves["score chain"], launch(CHAIN_ADD), moves["score return"],
        launch(SCORE_MAX), moves["maxima"], moves["maxima return"], launch(ACCUMULATE), moves["accumulators"], launch(FINISH),
        moves["context"],
    ]  # fmt: skip

"""The lightning indexer one core at a time: tiles of queries on their way over the rows of keys, every block and message of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.indexer import Indexer
from wse_emu.layers.attention_cores import Visit, visits_of
from wse_emu.layers.attention_kernels import PACK_QUERIES, PARTIAL_SCORES
from wse_emu.layers.attention_plan import AttentionPlan
from wse_emu.layers.head_groups import Group
from wse_emu.layers.index_kernels import (
    ADD_COUNTS,
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
from wse_emu.wafer.cores import Block, Borrow
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.index_keys import N_BITS, NOT_ADMITTED

_MOVES = (
    ("broadcast", "queries"), ("chain", "scores"), ("broadcast", "index weights"), ("chain", "index counts"),
    ("broadcast", "index thresholds"), ("chain", "index ties"), ("broadcast", "chosen keys"),
)  # fmt: skip


class _Tally:
    """Runs, multiply-adds and messages of all tiles."""

    def __init__(self, wafer: Wafer) -> None:
        assert wafer.cores is not None
        self.cores = wafer.cores
        self.traffic = {name: wafer.cores.traffic() for _, name in _MOVES}
        self.runs: dict[str, int] = {}
        self.macs: dict[str, int] = {}

    def run(self, kernel: Kernel, core: tuple[int, int], args: dict[str, Any]) -> None:
        self.runs[kernel.name] = self.runs.get(kernel.name, 0) + 1
        self.macs[kernel.name] = self.macs.get(kernel.name, 0) + self.cores.run(kernel, core, args)

    def send(self, move: str, source: Block, targets: list[Block], **where: Any) -> None:
        self.cores.send(self.traffic[move], source, targets, **where)

    def launch(self, kernel: Kernel) -> Event:
        return Event(None, "", "launch", kernel.name, count=self.runs.get(kernel.name, 0), macs=self.macs.get(kernel.name, 0))

    def move(self, name: str) -> Event:
        kind = next(kind for kind, of in _MOVES if of == name)
        return self.traffic[name].event(kind, name, costs.COLORS[kind])


def choose_on_cores(
    wafer: Wafer, qk: PlacedTensor, weights: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    plan: AttentionPlan, indexer: Indexer, columns: Split, taken: NDArray[np.bool_], order: NDArray[np.int32],
    kept: KeptKeys | None,
) -> tuple[Event, ...]:  # fmt: skip
    """`wse_emu.layers.index_keys.choose_keys`, tile by tile, every core on its own; writes `taken` and `order`, returns what was done."""
    assert wafer.cores is not None
    tally, visits = _Tally(wafer), plan.visits
    for i in range(visits.n.size):
        s, first, n, row = (int(a[i]) for a in (visits.sequence, visits.first, visits.n, visits.row))
        held = cache.split(int(sequences.slot[s]), plan.held[s])
        here = visits_of(plan, s, held, i)
        row0 = first - int(bands.split.starts[row])
        with wafer.cores.borrowing() as borrow:
            tile = _Tile(tally, cache, indexer, here, n, borrow)
            tile.send_weights(weights, row, row0)
            for group in plan.groups.groups:
                tile.add_heads(group, qk, row, row0, layer, int(sequences.slot[s]), held)
            tile.order_scores()
            position = int(sequences.start[s]) + first - int(sequences.first_token[s])
            tile.find_threshold(position)
            tile.take(columns)
            for visit in here:
                if kept is not None:
                    for core, told in tile.told[visit.row].items():
                        kept.keep(core, s, first - int(sequences.first_token[s]), n, visit.keys, told)
                keys = int(held.starts[visit.row]) + visit.keys
                of_row = tile.taken[visit.row].read()
                for token in range(n):
                    taken[first + token, keys] = (of_row >> token) & 1
                if order.size:
                    order[first : first + n, keys] = tile.order[visit.row].read().T
    return (
        tally.launch(PACK_QUERIES), tally.move("queries"), tally.launch(PARTIAL_SCORES), tally.move("scores"), tally.launch(CHAIN_ADD),
        tally.move("index weights"), tally.launch(INDEX_SCORES), tally.launch(ORDER_SCORES), tally.launch(COUNT_REACHING),
        tally.move("index counts"),
        tally.launch(ADD_COUNTS), tally.launch(RAISE_THRESHOLD), tally.launch(COUNT_WANTED), tally.move("index thresholds"),
        tally.launch(TAKE_KEYS), tally.move("index ties"), tally.move("chosen keys"),
    )  # fmt: skip


class _Tile:
    """One tile of queries on its way over the rows of keys."""

    def __init__(self, tally: _Tally, cache: KVCache, indexer: Indexer, visits: list[Visit], n_tokens: int, borrow: Borrow) -> None:
        self.tally, self.cache, self.indexer, self.visits, self.n, self.borrow = tally, cache, indexer, visits, n_tokens, borrow
        self.parts = cache.heads.heads[0]
        self.last = self.parts[-1].col
        """Column where scores are made."""
        self.weights: dict[int, Block] = {}
        self.scores: dict[int, Block] = {}
        self.order: dict[int, Block] = {}
        self.taken: dict[int, Block] = {}
        self.told: dict[int, dict[tuple[int, int], Block]] = {}
        """Of every row, what each core with a part of attention's keys was told."""
        self.threshold: dict[int, Block] = {}
        self.wanted: dict[int, Block] = {}

    def send_weights(self, weights: PlacedTensor, row: int, row0: int) -> None:
        """Send the weights of the heads to every row of keys, whose scores begin at 0."""
        shape, rows = (self.n, self.cache.heads.queries_per_kv), [visit.row for visit in self.visits]
        own = self.borrow((row, self.last), "index weights", shape, np.float32)
        own.write(weights.held[row, self.last].read(slice(row0, row0 + self.n)))
        self.weights = {r: own if r == row else self.borrow((r, self.last), "index weights", shape, np.float32) for r in rows}
        self.tally.send("index weights", own, [self.weights[r] for r in rows if r != row])
        for visit in self.visits:
            self.scores[visit.row] = self.borrow((visit.row, self.last), "index scores", (visit.keys.size, self.n), np.float32)
            self.scores[visit.row].write(np.float32(0.0))

    def add_heads(self, group: Group, qk: PlacedTensor, row: int, row0: int, layer: int, slot: int, held: Split) -> None:
        """Add a group of heads to the scores of every row's keys, on its last core."""
        with self.tally.cores.borrowing() as borrow:
            queries = self._send_queries(group, qk, row, row0, borrow)
            for visit in self.visits:
                total: Block | None = None
                for part in self.parts:
                    core = (visit.row, part.col)
                    own = borrow(core, "index products", (visit.keys.size, group.n * self.n), np.float32)
                    keys = borrow(core, "index keys of the past", (visit.keys.size,), np.int64)
                    keys.write(visit.keys)
                    k = self.cache.block(layer, slot, *core)[0].view(slice(0, int(held.sizes[visit.row])))
                    args = {"k": k, "f0": 2 * part.first_unit, "keys": keys, "q_t": queries[core], "s_t": own}
                    self.tally.run(PARTIAL_SCORES, core, args)
                    if total is not None:
                        come = borrow(core, "incoming index products", own.array.shape, np.float32)
                        self.tally.send("scores", total, [come])
                        self.tally.run(CHAIN_ADD, core, {"acc": come, "p": own})
                        own = come
                    total = own
                assert total is not None
                args = {
                    "s_t": total, "weights": self.weights[visit.row], "first_head": group.first,
                    "scale": np.float32(self.indexer.score_scale), "weight_scale": np.float32(self.indexer.weight_scale),
                    "scores": self.scores[visit.row],
                }  # fmt: skip
                self.tally.run(INDEX_SCORES, (visit.row, self.last), args)

    def _send_queries(self, group: Group, qk: PlacedTensor, row: int, row0: int, borrow: Borrow) -> dict[tuple[int, int], Block]:
        """Pack the tile's queries of a group on their row and send them to every row of keys."""
        queries: dict[tuple[int, int], Block] = {}
        slots = {"first_slot": group.first, "q_slots": group.n, "other_slots": self.cache.heads.queries_per_kv + 1 - group.first - group.n}
        for part in self.parts:
            core, shape = (row, part.col), (2 * part.n_units, group.n * self.n)
            home = queries[core] = borrow(core, "packed index queries", shape, np.float32)
            args = {"qkv": qk.held[core], **slots, "row0": row0, "u0": part.first_unit, "q_t": home}
            self.tally.run(PACK_QUERIES, core, args)
            away = [(visit.row, part.col) for visit in self.visits if visit.row != row]
            for there in away:
                queries[there] = borrow(there, "visiting index queries", shape, np.float32)
            self.tally.send("queries", home, [queries[there] for there in away])
        return queries

    def order_scores(self) -> None:
        """Order numbers of the scores of every row's keys."""
        for visit in self.visits:
            core, n_keys = (visit.row, self.last), visit.keys.size
            admitted = self.borrow(core, "admitting tokens", (n_keys,), np.int64)
            admitted.write(visit.admitted)
            self.order[visit.row] = self.borrow(core, "order numbers", (n_keys, self.n), np.int32)
            args = {"scores": self.scores[visit.row], "admitted": admitted, "order": self.order[visit.row]}
            self.tally.run(ORDER_SCORES, core, args)

    def find_threshold(self, position: int) -> None:
        """The k-th highest order number of every token, on every row, and how many keys that have it are taken."""
        rows, topk = [visit.row for visit in self.visits], self.indexer.topk
        counts, inbox = ({row: self._words(row, name) for row in rows} for name in ("counts", "incoming counts"))
        self.threshold = {row: self._words(row, "thresholds") for row in rows}
        self.wanted = {row: self._words(row, "wanted") for row in rows}
        for row in rows:
            self.threshold[row].write(NOT_ADMITTED)
        decider = (rows[-1], self.last)
        for bit in reversed(range(N_BITS)):
            reached = self._count(counts, inbox, 1 << bit)
            args = {"counts": reached, "step": 1 << bit, "first": position, "topk": topk, "threshold": self.threshold[rows[-1]]}
            self.tally.run(RAISE_THRESHOLD, decider, args)
            self._return(self.threshold, rows)
        higher = self._count(counts, inbox, 1)
        self.tally.run(COUNT_WANTED, decider, {"counts": higher, "first": position, "topk": topk, "wanted": self.wanted[rows[-1]]})
        self._return(self.wanted, rows)

    def take(self, columns: Split) -> None:
        """Which keys every row gives, and tell its columns."""
        before: Block | None = None
        for visit in self.visits:
            core = (visit.row, self.last)
            ties = self._words(visit.row, "ties before")
            if before is None:
                ties.write(0)
            else:
                self.tally.send("index ties", before, [ties])
            taken = self.taken[visit.row] = self.borrow(core, "taken keys", (visit.keys.size,), np.int64)
            of = {"order": self.order[visit.row], "threshold": self.threshold[visit.row], "wanted": self.wanted[visit.row]}
            self.tally.run(TAKE_KEYS, core, {**of, "before": ties, "taken": taken})
            before = ties
            others = [col for col in columns.used.tolist() if col != self.last]
            told = {(visit.row, col): self.borrow((visit.row, col), "taken keys", (visit.keys.size,), np.int64) for col in others}
            self.tally.send("chosen keys", taken, list(told.values()))
            self.told[visit.row] = told | ({core: taken} if len(others) < columns.used.size else {})

    def _words(self, row: int, name: str) -> Block:
        """One word of every token on the last core of a row."""
        return self.borrow((row, self.last), name, (self.n,), np.int32)

    def _count(self, counts: dict[int, Block], inbox: dict[int, Block], step: int) -> Block:
        """How many keys of all rows reach ``threshold + step``, on the last row."""
        total: Block | None = None
        for row, own in counts.items():
            args = {"order": self.order[row], "threshold": self.threshold[row], "step": step, "counts": own}
            self.tally.run(COUNT_REACHING, (row, self.last), args)
            if total is not None:
                self.tally.send("index counts", total, [inbox[row]])
                self.tally.run(ADD_COUNTS, (row, self.last), {"acc": inbox[row], "p": own})
                own = inbox[row]
            total = own
        assert total is not None
        return total

    def _return(self, blocks: dict[int, Block], rows: list[int]) -> None:
        """Send what the last row decided back to the others."""
        others = [blocks[row] for row in rows[:-1]]
        for block in others:
            block.poison()
        self.tally.send("index thresholds", blocks[rows[-1]], others)

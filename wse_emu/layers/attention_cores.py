"""Attention one core at a time: tiles of queries on their way over the rows of keys, every block and message of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wse_emu.foundation.key_ranges import keys_below
from wse_emu.foundation.precision import HalfType
from wse_emu.layers.attention_kernels import (
    ACCUMULATE,
    ACCUMULATE_ROUNDED,
    CAP_SCORES,
    FINISH,
    NO_SINK,
    PACK_QUERIES,
    PARTIAL_SCORES,
    SCORE_MAX,
    START_DENOMINATOR,
    START_MAX,
)
from wse_emu.layers.attention_plan import AttentionPlan
from wse_emu.layers.head_groups import Group
from wse_emu.layers.heads import Part
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.storage import ROUNDINGS, beyond_largest, overflow
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer

_NOTHING = np.zeros(1, np.float32)


@dataclass(frozen=True, slots=True)
class Visit:
    """A row of keys that a tile of queries visits."""

    row: int
    keys: Ints
    """Keys that some token admits, as rows of the core's block."""
    admitted: Ints
    """For each, the tokens of the tile that admit it: bit i for token i."""

    @property
    def n_pairs(self) -> int:
        """Pairs of a token and a key that it admits."""
        return int(np.bitwise_count(self.admitted).sum())


@dataclass(slots=True)
class _Counts:
    """Runs and multiply-adds of one kernel."""

    runs: int = 0
    macs: int = 0


class _TileRun:
    """One query tile and one group of query heads on its way over the rows of keys."""

    def __init__(
        self, wafer: Wafer, cache: KVCache, layer: int, slot: int, group: Group, n_tokens: int, visits: list[Visit],
        tally: dict[str, _Counts], traffic: dict[str, Any], softmax: HalfType | None = None,
    ) -> None:  # fmt: skip
        assert wafer.cores is not None
        self.cores, self.cache, self.layer, self.slot = wafer.cores, cache, layer, slot
        self.parts = cache.heads.heads[group.head]
        self.value_parts = [part for part in self.parts if part.n_values]
        self.rows_held: list[int] = []
        """Tokens that each row of cores holds."""
        self.sinks: PlacedTensor | None = None
        self.softmax = softmax
        """Format of 16 bits of maxima, weights, denominators and outputs; None is float32."""
        self.n_tokens, self.visits, self.tally, self.traffic = n_tokens, visits, tally, traffic
        self.head, self.first_slot, self.q_slots = group
        self.n_columns = n_tokens * self.q_slots
        self.borrowed: list[Block] = []
        self.queries: dict[tuple[int, int], Block] = {}
        self.scores: dict[tuple[int, int], Block] = {}
        self.lists: dict[tuple[int, int], tuple[Block, Block]] = {}

    def borrow(
        self, core: tuple[int, int], name: str, *shape: int, dtype: DTypeLike = np.float32, stored: HalfType | None = None
    ) -> Block:
        """A work block that lives as long as this run."""
        block = self.cores.arena(*core).allocate(name, shape, dtype, stored)
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

    def kept(self, which: int, core: tuple[int, int]) -> Block:
        """Keys (0) or values (1) of the sequence on a core that holds some; the keys where values are part of them."""
        blocks = self.cache.block(self.layer, self.slot, *core)
        return blocks[min(which, len(blocks) - 1)].view(slice(0, self.rows_held[core[0]]))

    def sink(self, core: tuple[int, int]) -> Any:
        """Sinks of the head's query heads on a core."""
        if self.sinks is None:
            return NO_SINK
        block, parts = self.sinks.held[core], self.cache.heads.parts
        col = core[1]
        at = self.cache.heads.part_heads[parts.starts[col] : parts.stops[col]].tolist().index(self.head)
        first = at * self.cache.heads.queries_per_kv + self.first_slot
        return block.shaped(block.array.size).view(slice(first, first + self.q_slots))

    def list_keys(self, told: Callable[[tuple[int, int]], tuple[Ints, Ints]] | None) -> None:
        """Every core lists the keys of its row that are admitted, and the tokens that admit them.

        By the pattern, for it knows the positions; or by what it was told.
        """
        for visit in self.visits:
            for part in self.parts:
                core = (visit.row, part.col)
                found = (visit.keys, visit.admitted) if told is None else told(core)
                keys = self.borrow(core, "admitted keys", found[0].size, dtype=np.int64)
                admitted = self.borrow(core, "admitting tokens", found[0].size, dtype=np.int64)
                keys.write(found[0])
                admitted.write(found[1])
                self.lists[core] = keys, admitted

    def send_queries(self, qkv: PlacedTensor, row: int, row0: int) -> None:
        """Pack the tile's queries on their row and send them to every row of keys."""
        others = self.cache.heads.queries_per_kv + self.cache.heads.kv_slots - self.first_slot - self.q_slots
        for part in self.parts:
            home = self.borrow((row, part.col), "packed queries", 2 * part.n_units, self.n_columns)
            self.run(
                PACK_QUERIES, (row, part.col),
                {
                    "qkv": qkv.held[row, part.col], "first_slot": self.first_slot, "q_slots": self.q_slots, "other_slots": others,
                    "row0": row0, "u0": part.first_unit, "q_t": home,
                },
            )  # fmt: skip
            self.queries[row, part.col] = home
            away = []
            for visit in self.visits:
                core = (visit.row, part.col)
                if visit.row != row:
                    self.queries[core] = self.borrow(core, "visiting queries", 2 * part.n_units, self.n_columns)
                    away.append(self.queries[core])
            self.cores.send(self.traffic["queries"], home, away)

    def score(self) -> None:
        """Whole scores on every core of the group, row of keys by row of keys."""
        for visit in self.visits:
            row = visit.row
            total: Block | None = None
            for part in self.parts:
                core = (row, part.col)
                n_keys = self.lists[core][0].array.size
                own = self.borrow(core, "scores", n_keys, self.n_columns)
                args = {"k": self.kept(0, core), "f0": 2 * part.first_unit, "keys": self.lists[core][0], "q_t": self.queries[core]}
                self.run(PARTIAL_SCORES, core, {**args, "s_t": own})
                self.scores[core] = own
                if total is not None:
                    come = self.borrow(core, "incoming scores", n_keys, self.n_columns)
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
            for visit in self.visits:
                core = (visit.row, part.col)
                m = maxima[core] = self.borrow(core, "maxima", self.n_columns, stored=self.softmax)
                if before is None:
                    self.run(START_MAX, core, {"sink": self.sink(core), "m": m})
                else:
                    self.cores.send(self.traffic["maxima"], before, [m])
                heads, scale = self.cache.heads, self.cache.heads.scale
                if heads.score_cap is not None:
                    self.run(CAP_SCORES, core, {"s_t": self.scores[core], "scale": scale, "cap": heads.cap})
                    scale = np.float32(1.0)
                args = {"s_t": self.scores[core], "scale": scale, "q_slots": self.q_slots, "m": m}
                self.run(SCORE_MAX, core, {**args, "admitted": self.lists[core][1]})
                before = m
            assert before is not None
            others = [maxima[visit.row, part.col] for visit in self.visits[:-1]]
            for block in others:
                block.poison()
            self.cores.send(self.traffic["maxima return"], before, others)
        return maxima

    def accumulate(self, maxima: dict[tuple[int, int], Block]) -> dict[int, tuple[Block, Block]]:
        """Denominator and output of every part, handed from row to row; they end on the last row of keys."""
        ends: dict[int, tuple[Block, Block]] = {}
        for part in self.value_parts:
            state: tuple[Block, Block] | None = None
            for visit in self.visits:
                core = (visit.row, part.col)
                denominator = self.borrow(core, "denominators", self.n_columns, stored=self.softmax)
                output = self.borrow(core, "outputs", 2 * part.n_values, self.n_columns, stored=self.softmax)
                if state is None:
                    self.run(START_DENOMINATOR, core, {"sink": self.sink(core), "m": maxima[core], "denom": denominator})
                    output.write(_NOTHING)
                else:
                    for before, block in zip(state, (denominator, output), strict=True):
                        self.cores.send(self.traffic["accumulators"], before, [block])
                keys, admitted = self.lists[core]
                args: dict[str, Any] = {
                    "s_t": self.scores[core], "q_slots": self.q_slots, "keys": keys, "admitted": admitted, "m": maxima[core],
                    "v": self.kept(1, core), "f0": 2 * part.first_unit, "denom": denominator, "o_t": output,
                }  # fmt: skip
                macs = visit.n_pairs * self.q_slots * 2 * part.n_values
                if self.softmax is None:
                    self.run(ACCUMULATE, core, args, macs=macs)
                else:
                    self.accumulate_rounded(core, args, macs, self.softmax)
                state = (denominator, output)
            assert state is not None
            ends[part.col] = state
        return ends

    def accumulate_rounded(self, core: tuple[int, int], args: dict[str, Any], macs: int, softmax: HalfType) -> None:
        """The same in 16 bits on one core, which notes its largest number."""
        largest = self.borrow(core, "largest number", 1, dtype=np.int32)
        largest.write(np.int32(0))
        self.run(ACCUMULATE_ROUNDED, core, {**args, "fmt": ROUNDINGS[softmax], "largest": largest}, macs=macs)
        beyond = beyond_largest(int(largest.read()[0]), softmax)
        if beyond is not None:
            raise overflow(f"core {core}: `softmax`", beyond, softmax)

    def send_context(self, ends: dict[int, tuple[Block, Block]], context: PlacedTensor, row: int, row0: int, n_replicas: int) -> None:
        """Divide, and send the tile's context to all rows that hold its tokens."""
        q_slots, t = self.q_slots, self.n_tokens
        last = self.visits[-1].row
        for part in self.value_parts:
            core = (last, part.col)
            denominator, output = ends[part.col]
            done = self.borrow(core, "finished context", t, 2 * part.n_values * q_slots)
            self.run(FINISH, core, {"o_t": output, "denom": denominator, "q_slots": self.q_slots, "row0": 0, "u0": 0, "context": done})
            where = (slice(row0, row0 + t), self.columns_of(part))
            targets = [context.held[row + i, part.col] for i in range(n_replicas)]
            for target in targets:
                if target.core == core:
                    target.write(done.read(), where)
            self.cores.send(self.traffic["context"], done, [target for target in targets if target.core != core], to=where)

    def columns_of(self, part: Part) -> Any:
        """Columns of the context that the part's values of these query heads make: one range where they are all of the head's."""
        q = self.cache.heads.queries_per_kv
        if self.q_slots == q:
            return slice(2 * part.first_unit * q, 2 * (part.first_unit + part.n_values) * q)
        unit, slot = np.arange(part.first_unit, part.first_unit + part.n_values), np.arange(self.first_slot, self.first_slot + self.q_slots)
        return (2 * (unit[:, None, None] * q + slot[:, None]) + np.arange(2)).reshape(-1)


_MOVES = (
    ("broadcast", "queries", "queries"), ("chain", "scores", "score chain"), ("broadcast", "scores", "score return"),
    ("chain", "maxima", "maxima"), ("broadcast", "maxima", "maxima return"), ("chain", "accumulators", "accumulators"),
    ("send", "context", "context"),
)  # fmt: skip


def attend_on_cores(
    wafer: Wafer, qkv: PlacedTensor, context: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    plan: AttentionPlan, m_out: NDArray[np.float32], denom_out: NDArray[np.float32], sinks: PlacedTensor | None = None,
    kept: KeptKeys | None = None, softmax: HalfType | None = None,
) -> tuple[Event, ...]:  # fmt: skip
    """`wse_emu.layers.attention.attention`, tile by tile and head by head, every core on its own; returns what was done and moved."""
    assert wafer.cores is not None
    heads, visits = cache.heads, plan.visits
    traffic = {key: wafer.cores.traffic() for _, _, key in _MOVES}
    tally: dict[str, _Counts] = {}
    for i in range(visits.n.size):
        s, first, n, row = (int(a[i]) for a in (visits.sequence, visits.first, visits.n, visits.row))
        held = cache.split(int(sequences.slot[s]), plan.held[s])
        here = visits_of(plan, s, held, i)
        row0, token = first - int(bands.split.starts[row]), first - int(sequences.first_token[s])
        for group in plan.groups.groups:
            run = _TileRun(wafer, cache, layer, int(sequences.slot[s]), group, n, here, tally, traffic, softmax)
            try:
                run.rows_held, run.sinks = held.sizes.tolist(), sinks
                run.send_queries(qkv, row, row0)
                run.list_keys(None if kept is None else partial(kept.of, sequence=s, token=token, n_tokens=n))
                run.score()
                maxima = run.maximum()
                ends = run.accumulate(maxima)
                run.send_context(ends, context, row, row0, bands.n_feature_bands)
                if m_out.size:
                    west, query = run.parts[0].col, group.head * heads.queries_per_kv + group.first
                    where = (slice(first, first + n), slice(query, query + group.n))
                    m_out[where] = maxima[here[-1].row, west].read().reshape(-1, n).T
                    denom_out[where] = ends[west][0].read().reshape(-1, n).T
            finally:
                run.release()
    moves = {key: traffic[key].event(kind, name, costs.COLORS[kind]) for kind, name, key in _MOVES}

    def launch(kernel: Kernel) -> Event:
        count = tally.get(kernel.name, _Counts())
        return Event(None, "", "launch", kernel.name, count=count.runs, macs=count.macs)

    return (
        launch(PACK_QUERIES), moves["queries"], launch(PARTIAL_SCORES), moves["score chain"], launch(CHAIN_ADD), moves["score return"],
        launch(START_MAX), *([] if heads.score_cap is None else [launch(CAP_SCORES)]), launch(SCORE_MAX),
        moves["maxima"], moves["maxima return"], launch(START_DENOMINATOR), launch(ACCUMULATE if softmax is None else ACCUMULATE_ROUNDED),
        moves["accumulators"], launch(FINISH), moves["context"],
    )  # fmt: skip


def visits_of(plan: AttentionPlan, sequence: int, held: Split, tile: int) -> list[Visit]:
    """What a tile's visits find: keys as rows of the core's block, and bits of the tokens that admit them."""
    first, n = int(plan.visits.first[tile]), int(plan.visits.n[tile])
    bits = np.zeros(held.total, np.int64)
    for i in range(n):
        ranges = plan.admitted.ranges[plan.admitted.first[first + i] : plan.admitted.first[first + i + 1]]
        for start, stop in keys_below(plan.held[sequence], ranges).tolist():
            bits[start:stop] |= 1 << i
    out = []
    for visit in range(int(plan.visits.first_visit[tile]), int(plan.visits.first_visit[tile + 1])):
        row = int(plan.visits.key_row[visit])
        of_row = bits[held.starts[row] : held.stops[row]]
        keys = np.flatnonzero(of_row)
        out.append(Visit(row, keys, of_row[keys]))
    return out

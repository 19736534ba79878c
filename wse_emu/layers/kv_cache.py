"""Keys and values in the SRAM of the cores: every sequence's tokens lie balanced over all rows and move up as it grows.

Before each append the tokens that are there shift to the rows that a balanced split of the longer sequence gives them (rows differ by at
most one token at any length), then the new tokens come from the rows that computed them.

References
----------
He et al., "WaferLLM", OSDI 2025, section 5: shift-based growth of the cache against concat-based growth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import InputError
from wse_emu.layers.heads import HeadLayout
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Cores
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event, NewTokens
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.sram import Reservation
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.traffic import Traffic
from wse_emu.wafer.wafer import Wafer
from wse_kernels.attention import store_kv
from wse_kernels.attention_mesh import mesh_store_kv

if TYPE_CHECKING:
    from wse_emu.layers.attention_plan import AttentionPlan

STORE_KV = Kernel(body=store_kv, params=("qkv", "q_slots", "row0", "k", "v"), out=("k", "v"), code_bytes=224)


@dataclass(frozen=True)
class Sequences:
    """The new tokens of one forward pass, flattened by sequence."""

    first_token: Ints
    """(n,) index of each sequence's first new token among all new tokens."""
    n_new: Ints
    """(n,) new tokens of each sequence, at least one."""
    start: Ints
    """(n,) position of the first new token: the tokens that are in the cache already."""
    slot: Ints
    """(n,) the cache's sequence that each belongs to."""
    length: Ints
    """(n,) tokens of each sequence that are known: its whole prompt, also where that comes in chunks, and what was generated so far."""

    @property
    def n_tokens(self) -> int:
        """New tokens of all sequences."""
        return int(self.n_new.sum())

    @property
    def positions(self) -> Ints:
        """(n_tokens,) absolute position of every new token."""
        return np.concatenate([np.arange(s, s + n) for s, n in zip(self.start, self.n_new, strict=True)]).astype(np.int64)

    def part(self, begin: int, end: int) -> Sequences:
        """Sequences begin to end, their tokens counted from 0."""
        of = slice(begin, end)
        first = self.first_token[of] - self.first_token[begin]
        return Sequences(first, self.n_new[of], self.start[of], self.slot[of], self.length[of])

    @property
    def new_tokens(self) -> tuple[NewTokens, ...]:
        """The same for the ledger."""
        return tuple(map(NewTokens, self.slot.tolist(), self.start.tolist(), self.n_new.tolist()))


class KVCache:
    """Keys and values of all layers for a batch of sequences.

    Parameters
    ----------
    wafer : Wafer
    heads : HeadLayout
    n_layers : int
    capacity : ndarray of int64, (n_sequences,)
        Most tokens each sequence may hold; SRAM for that many is reserved at once.

    Raises
    ------
    SramOverflowError
        If they do not fit; nothing is reserved then.
    """

    def __init__(self, wafer: Wafer, heads: HeadLayout, n_layers: int, capacity: Ints) -> None:
        self.wafer = wafer
        self.heads = heads
        self.capacity = np.asarray(capacity, np.int64)
        self.lengths = np.zeros(self.capacity.size, np.int64)
        """(n_sequences,) tokens that every layer holds."""
        width = 2 * heads.units.total
        self._bases = np.concatenate([[0], np.cumsum(self.capacity)[:-1]]).astype(np.int64) * width
        self._rows_per_core = -(-self.capacity // wafer.rows)
        self._reserved: list[Reservation] = []
        self._k: list[NDArray[np.float32]] = []
        self._v: list[NDArray[np.float32]] = []
        self._blocks: list[dict[tuple[int, int, int], tuple[Block, Block]]] = []
        self._plans: list[_AppendPlan] = []
        self._attention: list[tuple[Sequences, dict[AttentionPattern, AttentionPlan]]] = []
        try:
            for layer in range(n_layers):
                self._reserve(layer)
        except BaseException:
            self.free()
            raise

    def _reserve(self, layer: int) -> None:
        rows = np.full(self.wafer.rows, int(self._rows_per_core.sum()), np.int64)
        name = f"keys and values of layer {layer}"
        self._reserved.append(self.wafer.sram.allocate(name, rows, self.heads.units.sizes * 4, 4))
        if self.wafer.cores is not None:
            blocks = {}
            for col in self.heads.units.used.tolist():
                width = 2 * int(self.heads.units.sizes[col])
                for row in range(self.wafer.rows):
                    arena = self.wafer.cores.arena(row, col)
                    for s, most in enumerate(self._rows_per_core.tolist()):
                        blocks[s, row, col] = (
                            arena.allocate("keys", (most, width), np.float32),
                            arena.allocate("values", (most, width), np.float32),
                        )
            self._blocks.append(blocks)
        elif not self.wafer.is_dry:
            size = int(self.capacity.sum()) * 2 * self.heads.units.total
            self._k.append(np.empty(size, np.float32))
            self._v.append(np.empty(size, np.float32))

    def free(self) -> None:
        """Give the SRAM back."""
        for reservation in self._reserved:
            self.wafer.sram.free(reservation)
        if self.wafer.cores is not None:
            for blocks in self._blocks:
                for (_, row, col), pair in blocks.items():
                    for block in pair:
                        self.wafer.cores.arena(row, col).free(block)
        self._reserved, self._k, self._v, self._blocks = [], [], [], []

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values held now, in all layers."""
        return int(self.lengths.sum()) * 4 * self.heads.units.total * 4 * len(self._reserved)

    def attention_plan(self, sequences: Sequences, pattern: AttentionPattern, make: Callable[[], AttentionPlan]) -> AttentionPlan:
        """What attention over the newest sequences asks for: the same in all layers with one pattern, so made once."""
        known = next((plans for of, plans in self._attention if of is sequences), None)
        if known is None:
            known = {}
            self._attention.append((sequences, known))
        if pattern not in known:
            known[pattern] = make()
        return known[pattern]

    @property
    def tokens_by_row(self) -> Ints:
        """(n_layers, n_sequences, n_rows) tokens whose keys and values each row of cores holds now."""
        each = np.stack([self.split(length).sizes for length in self.lengths.tolist()])
        return np.stack([each] * len(self._reserved))

    def split(self, length: int) -> Split:
        """How `length` tokens of one sequence lie over rows."""
        return Split.balanced(length, self.wafer.rows)

    def buffers(self, layer: int, sequences: Sequences) -> tuple[NDArray[np.float32], NDArray[np.float32], Ints, Ints]:
        """Batched executor: keys, values, and per sequence the first element and the capacity."""
        return self._k[layer], self._v[layer], self._bases[sequences.slot], self.capacity[sequences.slot]

    def block(self, layer: int, slot: int, row: int, col: int) -> tuple[Block, Block]:
        """Isolated executor: keys and values of one sequence on one core."""
        return self._blocks[layer][slot, row, col]

    def check(self, sequences: Sequences) -> None:
        """Refuse tokens beyond the capacity.

        Raises
        ------
        InputError
            Naming the sequence.
        """
        after = sequences.start + sequences.n_new
        for s in np.flatnonzero(after > self.capacity[sequences.slot]).tolist():
            slot = int(sequences.slot[s])
            raise InputError(
                f"sequence {slot}: {int(after[s])} tokens do not fit a cache of {int(self.capacity[slot])}; "
                f"ask for more room when the cache is made (`capacity`)"
            )

    def advance(self, sequences: Sequences) -> None:
        """Note that every layer holds the new tokens; what was planned for them is done with."""
        self._plans, self._attention = [], []
        self.lengths[sequences.slot] = sequences.start + sequences.n_new

    def append(self, layer: int, qkv: PlacedTensor, sequences: Sequences, bands: TokenBands) -> None:
        """Shift the tokens that are there, then store the keys and values of the new ones.

        Parameters
        ----------
        layer : int
        qkv : PlacedTensor, (n_tokens, n_qkv)
            Complete on every row of the token's band; keys rotated.
        sequences : Sequences
        bands : TokenBands
        """
        plan = self._plan_append(sequences, bands)
        outgoing = np.full(self.wafer.rows, bands.split.max_size)  # at most all of a row's tokens leave at one time
        with (
            self.wafer.sram.reserved("outgoing keys and values", outgoing, self.heads.units.sizes * 4, 4),
            self.wafer.sram.code(STORE_KV.name, STORE_KV.code_bytes),
        ):
            if self.wafer.cores is not None:
                self._append_isolated(layer, qkv, sequences, plan)
            else:
                for event in plan.events:
                    self.wafer.record(event)
                if not self.wafer.is_dry:
                    k, v, base, cap = self.buffers(layer, sequences)
                    mesh_store_kv(
                        qkv.flat, self.heads.units.offsets, self.heads.queries_per_kv,
                        sequences.first_token, sequences.n_new, sequences.start, base, cap, k, v,
                    )  # fmt: skip
        self.wafer.record(plan.stored)

    def _plan_append(self, sequences: Sequences, bands: TokenBands) -> _AppendPlan:
        """The same for all layers, so made once for each forward pass, or each tile of one."""
        plan = next((plan for plan in self._plans if plan.sequences is sequences and plan.bands == bands), None)
        if plan is None:
            shifts, arrivals = [], []
            token_row = bands.split.owner
            for first, n, start in zip(sequences.first_token.tolist(), sequences.n_new.tolist(), sequences.start.tolist(), strict=True):
                after = self.split(start + n).owner
                shifts.append(runs_of(self.split(start).owner, after[:start]))
                arrivals.append(runs_of(token_row[first : first + n], after[start:]))
            units, rows = self.heads.units, self.wafer.rows
            events = tuple(
                _along_columns(kind, "keys and values", runs, units, rows) for kind, runs in (("shift", shifts), ("send", arrivals))
            )
            stored = Event(None, "", "launch", STORE_KV.name, count=sum(map(len, arrivals)) * int(units.used.size))
            plan = _AppendPlan(sequences, bands, shifts, arrivals, events, stored)
            self._plans.append(plan)
        return plan

    def _append_isolated(self, layer: int, qkv: PlacedTensor, sequences: Sequences, plan: _AppendPlan) -> None:
        assert self.wafer.cores is not None
        shifted, sent = self.wafer.cores.traffic(), self.wafer.cores.traffic()
        for s, slot in enumerate(sequences.slot.tolist()):
            start, n = int(sequences.start[s]), int(sequences.n_new[s])
            for col in self.heads.units.used.tolist():
                columns = {row: self.block(layer, slot, row, col) for row in range(self.wafer.rows)}
                _shift(self.wafer.cores, shifted, columns, plan.shifts[s], self.split(start), self.split(start + n))
                first = int(sequences.first_token[s])
                self._arrive(sent, qkv, col, columns, plan.arrivals[s], first, start, self.split(start + n))
        self.wafer.record(shifted.event("shift", "keys and values", costs.COLORS["shift"]))
        self.wafer.record(sent.event("send", "keys and values", costs.COLORS["send"]))

    def _arrive(
        self, sent: Traffic, qkv: PlacedTensor, col: int, columns: dict[int, tuple[Block, Block]], runs: list[Run], first: int, start: int,
        after: Split,
    ) -> None:  # fmt: skip
        """Take keys and values of new tokens out of their rows' projections and send them to the rows that keep them."""
        cores = self.wafer.cores
        assert cores is not None
        width, row_starts = 2 * int(self.heads.units.sizes[col]), qkv.placement.axis0[1].starts
        for run in runs:
            at = start + run.first - int(after.starts[run.target])
            row0 = first + run.first - int(row_starts[run.source])
            core = (run.source, col)
            with cores.borrowing() as borrow:
                k, v = (borrow(core, name, (run.n, width), np.float32) for name in ("outgoing keys", "outgoing values"))
                cores.run(STORE_KV, core, {"qkv": qkv.held[core], "q_slots": self.heads.queries_per_kv, "row0": row0, "k": k, "v": v})
                for piece, block in zip((k, v), columns[run.target], strict=True):
                    if run.source == run.target:
                        block.write(piece.read(), slice(at, at + run.n))
                    else:
                        cores.send(sent, piece, [block], to=slice(at, at + run.n))


def _shift(
    cores: Cores, shifted: Traffic, columns: dict[int, tuple[Block, Block]], runs: list[Run], before: Split, after: Split
) -> None:  # fmt: skip
    """Bring the tokens of one column of cores from the rows of one split to those of another."""
    held: list[tuple[Run, int, NDArray[Any]]] = []
    for run in runs:
        for which, block in enumerate(columns[run.source]):
            at = run.first - int(before.starts[run.source])
            payload = block.read(slice(at, at + run.n)).copy()
            if run.source != run.target:
                shifted.message(block.core, [columns[run.target][which].core], payload.nbytes)
            held.append((run, which, payload))
    for pair in columns.values():
        for block in pair:
            block.poison()
    for run, which, payload in held:
        block = columns[run.target][which]
        at = run.first - int(after.starts[run.target])
        if run.source == run.target:
            block.write(payload, slice(at, at + run.n))
        else:
            cores.deliver(payload, [block], slice(at, at + run.n))


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent tokens that go from one row to one row."""

    first: int
    n: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class _AppendPlan:
    """Which tokens move where in one append, and what that costs."""

    sequences: Sequences
    bands: TokenBands
    shifts: list[list[Run]]
    arrivals: list[list[Run]]
    events: tuple[Event, ...]
    stored: Event


def runs_of(source: Ints, target: Ints) -> list[Run]:
    """Runs of adjacent tokens, from the rows that each token leaves and goes to."""
    if not source.size:
        return []
    cuts = np.flatnonzero((np.diff(source) != 0) | (np.diff(target) != 0)) + 1
    firsts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [source.size]])
    return [Run(f, e - f, int(source[f]), int(target[f])) for f, e in zip(firsts.tolist(), ends.tolist(), strict=True)]


def _along_columns(kind: str, name: str, runs: list[list[Run]], units: Split, n_rows: int) -> Event:
    """Moves of keys and values (two messages a run, four words a token and pair unit) along every column."""
    moving = [run for group in runs for run in group if run.source != run.target]
    if not moving:
        return costs.moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    n, source, target = (np.array([getattr(run, f) for run in moving], np.int64) for f in ("n", "source", "target"))
    load = costs.LineLoad(n_rows)
    load.add(source, target, n)
    distance = np.abs(source - target)
    return costs.moved(
        kind, name, count=2 * n.size * int(units.used.size), words=int(n.sum()) * 4 * units.total,
        hops=int((n * distance).sum()) * 4 * units.total, max_link=load.busiest() * 4 * units.max_size, max_hops=int(distance.max()),
    )  # fmt: skip

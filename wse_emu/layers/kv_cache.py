"""Keys and values in the SRAM of the cores: every sequence's tokens lie balanced over all rows and move up as it grows.

Before each append the tokens that are there shift to the rows that a balanced split of the longer sequence gives them (rows differ by at
most one token at any length), then the new tokens come from the rows that computed them. Or nothing shifts, and what is generated comes
to lie on the last row, for comparison (see `wse_emu.layers.key_rows`).

A layer whose pattern of attention forgets (windows, chunks) keeps what its last query admits: the sinks and the last `window` keys, whose
oldest makes room for the newest. Where a pass brings more tokens than one it holds more while that layer attends, and gives the SRAM back
after. Keys keep the rotation of their absolute positions.

Where values are part of the keys (multi-head latent attention), keys alone are kept.

References
----------
He et al., "WaferLLM", OSDI 2025, section 5: shift-based growth of the cache against concat-based growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.key_ranges import keys_below, keys_of, n_keys_of
from wse_emu.foundation.precision import HalfType
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kept_inputs import EarlierTokens, InputLayout
from wse_emu.layers.key_rows import KeyRows, ShiftedRows
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event, NewTokens
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.sram import Reservation
from wse_emu.wafer.storage import HALF_BYTES, overflow, round_in_place
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
        Most tokens each sequence may have; SRAM for those that are kept is reserved at once.
    patterns : sequence of AttentionPattern, optional
        Of each layer; by default all keys are kept.
    aliases : sequence of int, optional
        The layers of this cache that passes of fewer layers speak of: their layer i is ``aliases[i]``.
    stored : {"bfloat16", "float16", "cb16"}, optional
        Format to which keys and values are rounded where they are stored, in two bytes each; float32 by default.
    inputs : KVCache, optional
        Where keys and values are recomputed: the inputs that they are made of, for the same sequences, likewise freed and counted. This
        cache then holds those of one layer at a time, and nothing between layers.
    index : KVCache, optional
        Keys of the indexers for the same sequences, which lie beside, of the layers that have one; freed and counted with this one.
    lies : KeyRows, optional
        Which row each key lies on; by default all rows stay balanced.

    Raises
    ------
    SramOverflowError
        If they do not fit; nothing is reserved then.
    """

    def __init__(
        self, wafer: Wafer, heads: HeadLayout | InputLayout, n_layers: int, capacity: Ints, patterns: Seq[AttentionPattern] = (), *,
        aliases: Seq[int] | None = None, stored: HalfType | None = None, inputs: KVCache | None = None, index: KVCache | None = None,
        lies: KeyRows | None = None,
    ) -> None:  # fmt: skip
        self.wafer = wafer
        self.stored = stored
        self.inputs = inputs
        self.index = index
        self._earlier: list[tuple[Sequences, AttentionPattern, EarlierTokens]] = []
        self._lies = lies or ShiftedRows(wafer.rows)
        self._n_bytes = 4 if stored is None else HALF_BYTES
        self._per_token: Ints = heads.keys.sizes * heads.kv_slots
        """(n_cols,) numbers of one token on each column of cores."""
        self.layout = heads
        self.capacity = np.asarray(capacity, np.int64)
        self.lengths = np.zeros(self.capacity.size, np.int64)
        """(n_sequences,) tokens that every layer has seen."""
        self._patterns = tuple(p if p.forgets else FULL for p in patterns) or (FULL,) * n_layers
        self._aliases = range(n_layers) if aliases is None else aliases
        width = heads.keys.total
        self._bases = np.concatenate([[0], np.cumsum(self.capacity)[:-1]]).astype(np.int64) * width
        least = {
            p: np.stack([self._lies.least_room(s, n, p) for s, n in enumerate(self.capacity.tolist())]) for p in set(self._patterns)
        }  # fmt: skip
        self._least = [least[p] for p in self._patterns]
        self._rows = list(self._least)
        """Per layer (n_sequences, n_rows) tokens that a core has room for."""
        self._reserved: list[Reservation] = []
        self._k: list[NDArray[np.float32]] = []
        self._v: list[NDArray[np.float32]] = []
        self._blocks: list[dict[tuple[int, int, int], tuple[Block, ...]]] = []
        self._plans: list[_AppendPlan] = []
        self._attention: list[tuple[Sequences, dict[AttentionPattern, tuple[AttentionPlan, ...]]]] = []
        try:
            for layer in range(n_layers):
                self._reserve(layer)
        except BaseException:
            self.free()
            raise

    def _reserve(self, layer: int) -> None:
        self._reserved.append(self._allocate(layer))
        if self.wafer.cores is not None:
            self._blocks.append({})
            for s in range(self.capacity.size):
                self._carve(layer, s)
        elif not self.wafer.is_dry:
            size = int(self.capacity.sum()) * self.layout.keys.total
            self._k.append(np.empty(size, np.float32))
            self._v.append(np.empty(0 if self.layout.values_in_keys else size, np.float32))

    def _allocate(self, layer: int) -> Reservation:
        rows: Ints = self._rows[layer].sum(axis=0)
        name = f"{self.layout.kept} of layer {layer}" if self.inputs is None else "keys and values of a layer"
        return self.wafer.sram.allocate(name, rows, self._per_token, self._n_bytes)

    def _carve(self, layer: int, s: int) -> None:
        """Blocks of one sequence on all cores."""
        assert self.wafer.cores is not None
        for col in self.layout.keys.used.tolist():
            for row, n in enumerate(self._rows[layer][s].tolist()):
                shape = (n, int(self.layout.keys.sizes[col]))
                arena = self.wafer.cores.arena(row, col)
                names = ("keys", "values")[: self.layout.kv_slots]
                self._blocks[layer][s, row, col] = tuple(arena.allocate(name, shape, np.float32, self.stored) for name in names)

    def _resize(self, layer: int, sequences: Sequences, held: Seq[Split]) -> None:
        """Make room for so many keys of each of some sequences; what lay in their blocks is elsewhere then."""
        if self._patterns[layer] is FULL:  # it has room for all of them from the start
            return
        rows = self._rows[layer].copy()
        rows[sequences.slot] = np.maximum(self._least[layer][sequences.slot], [self._lies.room(split) for split in held])
        changed = np.flatnonzero((rows != self._rows[layer]).any(axis=1)).tolist()
        if not changed:
            return
        self.wafer.sram.free(self._reserved[layer])
        if self.wafer.cores is not None:
            for (s, row, col), pair in self._blocks[layer].items():
                for block in pair if s in changed else ():
                    self.wafer.cores.arena(row, col).free(block)
        self._rows[layer] = rows
        self._reserved[layer] = self._allocate(layer)
        if self.wafer.cores is not None:
            for s in changed:
                self._carve(layer, s)

    def free(self) -> None:
        """Give the SRAM back."""
        for beside in (self.index, self.inputs):
            if beside is not None:
                beside.free()
        for reservation in self._reserved:
            self.wafer.sram.free(reservation)
        if self.wafer.cores is not None:
            for blocks in self._blocks:
                for (_, row, col), pair in blocks.items():
                    for block in pair:
                        self.wafer.cores.arena(row, col).free(block)
        self._reserved, self._k, self._v, self._blocks = [], [], [], []

    def keys_held(self, layer: int, slot: int) -> Ints:
        """Positions of the keys of one sequence that a layer holds now, as (m, 2) ranges."""
        return self._patterns[self._aliases[layer]].held_after(int(self.lengths[slot]))

    def keys_in_pass(self, layer: int, sequences: Sequences) -> tuple[Ints, ...]:
        """The same for each of the sequences of a pass whose new tokens are there."""
        pattern = self._patterns[self._aliases[layer]]
        return tuple(pattern.held_during(start, n) for start, n in zip(sequences.start.tolist(), sequences.n_new.tolist(), strict=True))

    def keys_per_core(self, layer: int) -> int:
        """Most keys of one sequence that a core has room for now."""
        return int(self._rows[self._aliases[layer]].max(initial=1))

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values held now, in all layers."""
        held = {p: sum(n_keys_of(p.held_after(n)) for n in self.lengths.tolist()) for p in set(self._patterns)}
        of_keys = sum(held[p] for p in self._patterns[: len(self._reserved)]) * int(self._per_token.sum()) * self._n_bytes
        return of_keys + sum(beside.n_bytes for beside in (self.index, self.inputs) if beside is not None)

    @property
    def heads(self) -> HeadLayout:
        """How heads lie over columns; a cache of inputs has none."""
        assert isinstance(self.layout, HeadLayout)
        return self.layout

    def attention_plans(
        self, sequences: Sequences, pattern: AttentionPattern, make: Callable[[], tuple[AttentionPlan, ...]]
    ) -> tuple[AttentionPlan, ...]:
        """What attention over the newest sequences asks for, layout by layout: the same in all layers with one pattern, so made once."""
        known = next((plans for of, plans in self._attention if of is sequences), None)
        if known is None:
            known = {}
            self._attention.append((sequences, known))
        if pattern not in known:
            known[pattern] = make()
        return known[pattern]

    @property
    def tokens_by_row(self) -> Ints:
        """(n_layers, n_sequences, n_rows) tokens whose keys and values, or inputs of them, each row of cores holds now."""
        if self.inputs is not None:
            return self.inputs.tokens_by_row
        lengths = list(enumerate(self.lengths.tolist()))
        each = {p: np.stack([self.split(s, p.held_after(n)).sizes for s, n in lengths]) for p in set(self._patterns)}
        return np.stack([each[p] for p in self._patterns])

    def split(self, slot: int, held: Ints) -> Split:
        """How the keys of one sequence that are held, (m, 2) ranges of positions, lie over rows."""
        return self._lies.split(slot, held)

    def buffers(self, layer: int, sequences: Sequences) -> tuple[NDArray[np.float32], NDArray[np.float32], Ints, Ints]:
        """Batched executor: keys, values (the keys, where these are part of them), and per sequence the first element and the capacity."""
        layer = self._aliases[layer]
        values = self._k if self.layout.values_in_keys else self._v
        return self._k[layer], values[layer], self._bases[sequences.slot], self.capacity[sequences.slot]

    def block(self, layer: int, slot: int, row: int, col: int) -> tuple[Block, ...]:
        """Isolated executor: keys and values of one sequence on one core; keys alone where values are part of them."""
        return self._blocks[self._aliases[layer]][slot, row, col]

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
        self._plans, self._attention, self._earlier = [], [], []
        self.lengths[sequences.slot] = sequences.start + sequences.n_new
        for beside in (self.index, self.inputs):
            if beside is not None:
                beside.advance(sequences)

    def earlier(self, layer: int, sequences: Sequences) -> EarlierTokens:
        """What a layer holds in a pass beside its new tokens: the same for all layers with one pattern, so made once."""
        pattern = self._patterns[self._aliases[layer]]
        found = next((e for of, p, e in self._earlier if of is sequences and p == pattern), None)
        if found is None:
            held, slots = list(self.keys_in_pass(layer, sequences)), sequences.slot.tolist()
            splits = [self.split(slot, keys) for slot, keys in zip(slots, held, strict=True)]
            found = EarlierTokens.of(held, splits, sequences.n_new.tolist(), self.wafer.rows)
            self._earlier.append((sequences, pattern, found))
        return found

    def gather(self, layer: int, sequences: Sequences, earlier: EarlierTokens, out: PlacedTensor) -> None:
        """Copy the inputs of earlier tokens, on the cores that hold them, to a tensor that lies like these."""
        layer = self._aliases[layer]
        columns, runs = self.layout.keys, list(zip(earlier.first.tolist(), earlier.n.tolist(), earlier.sequence.tolist(), strict=True))
        if self.wafer.cores is not None:
            at = dict[tuple[int, int], int]()
            for (first, n, s), row in zip(runs, earlier.row.tolist(), strict=True):
                slot, to = int(sequences.slot[s]), first - int(earlier.bands.split.starts[row])
                begin = at.get((slot, row), 0)
                at[slot, row] = begin + n
                for col in columns.used.tolist():
                    block = self._blocks[layer][slot, row, col][0]
                    out.held[row, col].write(block.read(slice(begin, begin + n)), slice(to, to + n))
        elif not self.wafer.is_dry:
            taken = out.flat
            for col in columns.used.tolist():
                into = _panel(taken, out.placement.shape[0], columns, col)
                for first, n, s in runs:
                    begin = int(earlier.positions[first])
                    into[first : first + n] = self._kept(layer, int(sequences.slot[s]), col)[begin : begin + n]

    def _kept(self, layer: int, slot: int, col: int) -> NDArray[np.float32]:
        """Batched executor: what a column keeps of a sequence, by position."""
        columns, cap = self.layout.keys, int(self.capacity[slot])
        return _panel(self._k[layer][int(self._bases[slot]) :], cap, columns, col)

    def append(
        self, layer: int, qkv: PlacedTensor, sequences: Sequences, bands: TokenBands, *, again: PlacedTensor | None = None
    ) -> None:  # fmt: skip
        """Shift the tokens that are there, then store the keys and values of the new ones; or store all anew, where they are recomputed.

        Parameters
        ----------
        layer : int
        qkv : PlacedTensor, (n_tokens, n_qkv)
            Complete on every row of the token's band; keys rotated. A cache of inputs takes these, (n_tokens, hidden).
        sequences : Sequences
        bands : TokenBands
        again : PlacedTensor, (n_earlier, n_kv), optional
            Keys and values of the tokens that `earlier` names, unit by unit, with `inputs`; None if there are none.
        """
        earlier = None if self.inputs is None else self.earlier(layer, sequences)
        layer = self._aliases[layer]
        plan = self._plan_append(sequences, bands, self._patterns[layer])
        most = bands.split.max_size  # at most all of a row's tokens leave at one time
        grows = self._patterns[layer] is not FULL  # the cache itself, so that no two situations are alike
        program = None if grows else (KVCache.append, self.layout, self.stored, most)
        with self.wafer.working(program, lambda: self._outgoing(most)):
            if self.wafer.cores is not None:
                if earlier is None:
                    self._shift(layer, sequences, plan.shifts, plan.before, plan.held)
                else:
                    self._empty(layer, sequences)
                    self._resize(layer, sequences, plan.held)
                    self._store_again_isolated(layer, again, sequences, earlier)
                self._arrive_isolated(layer, qkv, sequences, plan)
            else:
                self._resize(layer, sequences, plan.held)
                if earlier is not None:
                    self._store_again(layer, again, sequences, earlier)
                self.wafer.record(*plan.events[0 if earlier is None else 1 :])
                if not self.wafer.is_dry:
                    self._store(layer, qkv, self._queries, sequences.slot, sequences.first_token, sequences.n_new, sequences.start)
        if plan.stored is not None:
            self.wafer.record(plan.stored)

    @property
    def _queries(self) -> int:
        """Query slots of a pair unit of what comes."""
        return self.layout.queries_per_kv if isinstance(self.layout, HeadLayout) else 0

    def _store(self, layer: int, qkv: PlacedTensor, q_slots: int, slot: Ints, first: Ints, n: Ints, position: Ints) -> None:
        """Batched executor: store runs of adjacent tokens, `n` from row `first` of `qkv` on, from `position` on of their sequence."""
        if isinstance(self.layout, InputLayout):
            columns, given = self.layout.keys, qkv.flat  # waits until it is computed
            for col in columns.used.tolist():
                come = _panel(given, qkv.placement.shape[0], columns, col)
                for s, begin, count, at in zip(slot.tolist(), first.tolist(), n.tolist(), position.tolist(), strict=True):
                    self._kept(layer, s, col)[at : at + count] = come[begin : begin + count]
            return
        self.wafer.pending.behind(
            mesh_store_kv, self._as_stored(qkv, q_slots), self.layout.units.offsets, q_slots, first, n, position, self._bases[slot],
            self.capacity[slot], self._k[layer], self._v[layer],
        )  # fmt: skip

    def _store_again(self, layer: int, again: PlacedTensor | None, sequences: Sequences, earlier: EarlierTokens) -> None:
        """Store what was recomputed, on the cores that it lies on."""
        if again is None:
            return
        self.wafer.record(Event(None, "", "launch", STORE_KV.name, count=earlier.n_stored * int(self.layout.keys.used.size)))
        if not self.wafer.is_dry:
            slots = sequences.slot[earlier.sequence]
            self._store(layer, again, 0, slots, earlier.first, earlier.n, earlier.positions[earlier.first])

    def _store_again_isolated(self, layer: int, again: PlacedTensor | None, sequences: Sequences, earlier: EarlierTokens) -> None:
        if again is None:
            return
        cores = self.wafer.cores
        assert cores is not None
        runs = 0
        for row, s, first, n in earlier.shares:
            for col in self.layout.keys.used.tolist():
                core = (row, col)
                k, v = (block.view(slice(0, n)) for block in self._blocks[layer][int(sequences.slot[s]), row, col])
                row0 = first - int(earlier.bands.split.starts[row])
                cores.run(STORE_KV, core, {"qkv": again.held[core], "q_slots": 0, "row0": row0, "k": k, "v": v})
                runs += 1
        self.wafer.record(Event(None, "", "launch", STORE_KV.name, count=runs))

    def _empty(self, layer: int, sequences: Sequences) -> None:
        """Isolated executor: forget what lies in a layer's blocks."""
        slots = set(sequences.slot.tolist())
        for (slot, _, _), blocks in self._blocks[layer].items():
            for block in blocks if slot in slots else ():
                block.poison()

    @contextmanager
    def _outgoing(self, n_tokens: int) -> Iterator[None]:
        """Hold the code and the room that keys and values of so many tokens of a row take on their way."""
        rows, sram = np.full(self.wafer.rows, n_tokens), self.wafer.sram
        with (
            sram.code(STORE_KV.name, STORE_KV.code_bytes),
            sram.reserved("outgoing keys and values", rows, self._per_token, self._n_bytes),
        ):
            yield

    def _as_stored(self, qkv: PlacedTensor, q_slots: int) -> NDArray[np.float32]:
        """Batched executor: the projections, keys and values as the cache takes them."""
        if self.stored is None or self.stored == qkv.stored:
            return qkv.unsettled
        flat, q = qkv.flat.copy(), 2 * q_slots
        kept = flat.reshape(-1, q + 2 * self.layout.kv_slots)[:, q:]
        rounded = kept.reshape(-1)  # a copy: queries lie between
        beyond = round_in_place(rounded, self.stored)
        if beyond is not None:
            raise overflow(f"layer {self.wafer.ledger.current_scope[0]}: keys or values", beyond, self.stored)
        kept[...] = rounded.reshape(kept.shape)
        return flat

    def forget(self, layer: int, sequences: Sequences, bands: TokenBands) -> None:
        """Give up the keys and values that a layer's later queries do not admit, after it attended; the others shift.

        Where they are recomputed, all of them are given up.
        """
        layer = self._aliases[layer]
        plan = self._plan_append(sequences, bands, self._patterns[layer])
        if self.inputs is not None:
            if self.wafer.cores is not None:
                self._empty(layer, sequences)
            self._resize(layer, sequences, plan.kept)
            return
        if plan.closed is None:
            return
        if self.wafer.cores is not None:
            self._shift(layer, sequences, plan.closing, plan.held, plan.kept)
            return
        self._resize(layer, sequences, plan.kept)
        self.wafer.record(plan.closed)

    def _plan_append(self, sequences: Sequences, bands: TokenBands, pattern: AttentionPattern) -> _AppendPlan:
        """The same for all layers with one pattern, so made once for each forward pass, or each tile of one."""
        plan = next((p for p in self._plans if p.sequences is sequences and p.bands == bands and p.pattern == pattern), None)
        if plan is None:
            shifts, arrivals, splits = list[Runs](), list[Runs](), list[list[Split]]()
            closing = list[tuple[tuple[Ints, Split], tuple[Ints, Split]]]()
            token_row = bands.split.owner
            of = (sequences.slot, sequences.first_token, sequences.n_new, sequences.start)
            for slot, first, n, start in zip(*(field.tolist() for field in of), strict=True):
                ranges = pattern.held_after(start), pattern.held_during(start, n), pattern.held_after(start + n)
                before, held, kept = pairs = [(keys, self.split(slot, keys)) for keys in ranges]
                splits.append([split for _, split in pairs])
                shifts.append(_moves(*before, *held))
                closing.append((held, kept))
                there = held[1].owner[held[1].total - n :]
                arrivals.append(runs_of(token_row[first : first + n], there))
            columns, rows = self.layout.keys, self.wafer.rows
            n_kept = self.layout.kv_slots
            events = tuple(
                _along_columns(kind, self._moved, runs, columns, rows, n_kept) for kind, runs in (("shift", shifts), ("send", arrivals))
            )
            stored = None
            if isinstance(self.layout, HeadLayout):
                stored = Event(None, "", "launch", STORE_KV.name, count=sum(map(len, arrivals)) * int(columns.used.size))
            before_it, with_it, after_it = (tuple(column) for column in zip(*splits, strict=True))
            unchanged = [split.total for split in after_it] == [split.total for split in with_it]
            given_up = [] if unchanged else [_moves(*held, *kept) for held, kept in closing]
            closed = _along_columns("shift", self._moved, given_up, columns, rows, n_kept) if given_up else None
            plan = _AppendPlan(sequences, bands, pattern, shifts, arrivals, given_up, before_it, with_it, after_it, events, stored, closed)
            self._plans.append(plan)
        return plan

    @property
    def _moved(self) -> str:
        """Name of what moves, in the ledger."""
        return "keys and values" if isinstance(self.layout, HeadLayout) else self.layout.kept

    def _shift(self, layer: int, sequences: Sequences, shifts: list[Runs], before: Seq[Split], after: Seq[Split]) -> None:
        """Isolated executor: bring the tokens of all columns of cores from the rows of one split to those of another."""
        cores = self.wafer.cores
        assert cores is not None
        shifted, held = cores.traffic(), list[tuple[int, int, int, Run, NDArray[Any]]]()
        blocks = self._blocks[layer]
        for s, slot in enumerate(sequences.slot.tolist()):
            starts = before[s].starts
            for col in self.layout.keys.used.tolist():
                for run in shifts[s]:
                    for which in range(self.layout.kv_slots):
                        block = blocks[slot, run.source, col][which]
                        at = run.first - int(starts[run.source])
                        payload = block.read(slice(at, at + run.n)).copy()
                        if run.source != run.target:
                            shifted.message(block.core, [(run.target, col)], payload.nbytes)
                        held.append((s, col, which, run, payload))
                for row in range(self.wafer.rows):
                    for block in blocks[slot, row, col]:
                        block.poison()
        self._resize(layer, sequences, after)
        ends = [split.starts for split in after]
        for s, col, which, run, payload in held:
            block = blocks[int(sequences.slot[s]), run.target, col][which]
            at = run.to - int(ends[s][run.target])
            if run.source == run.target:
                block.write(payload, slice(at, at + run.n))
            else:
                cores.deliver(payload, [block], slice(at, at + run.n))
        self.wafer.record(shifted.event("shift", self._moved, costs.COLORS["shift"]))

    def _arrive_isolated(self, layer: int, qkv: PlacedTensor, sequences: Sequences, plan: _AppendPlan) -> None:
        assert self.wafer.cores is not None
        sent = self.wafer.cores.traffic()
        for s, slot in enumerate(sequences.slot.tolist()):
            first, earlier = int(sequences.first_token[s]), plan.held[s].total - int(sequences.n_new[s])
            for col in self.layout.keys.used.tolist():
                columns = {row: self._blocks[layer][slot, row, col] for row in range(self.wafer.rows)}
                self._arrive(sent, qkv, col, columns, plan.arrivals[s], first, earlier, plan.held[s])
        self.wafer.record(sent.event("send", self._moved, costs.COLORS["send"]))

    def _arrive(
        self, sent: Traffic, qkv: PlacedTensor, col: int, columns: dict[int, tuple[Block, ...]], runs: Runs, first: int, start: int,
        after: Split,
    ) -> None:  # fmt: skip
        """Take keys and values of new tokens out of their rows' projections and send them to the rows that keep them."""
        cores = self.wafer.cores
        assert cores is not None
        width, row_starts = int(self.layout.keys.sizes[col]), qkv.placement.axis0[1].starts
        names, widths = ("outgoing keys", "outgoing values"), (width, 0 if self.layout.values_in_keys else width)
        for run in runs:
            at = start + run.first - int(after.starts[run.target])
            row0 = first + run.first - int(row_starts[run.source])
            core = (run.source, col)
            if isinstance(self.layout, InputLayout):
                block, where = columns[run.target][0], slice(row0, row0 + run.n)
                if run.source == run.target:
                    block.write(qkv.held[core].read(where), slice(at, at + run.n))
                else:
                    cores.send(sent, qkv.held[core], [block], where=where, to=slice(at, at + run.n))
                continue
            with cores.borrowing() as borrow:
                k, v = (borrow(core, name, (run.n, w), np.float32, self.stored) for name, w in zip(names, widths, strict=True))
                cores.run(STORE_KV, core, {"qkv": qkv.held[core], "q_slots": self._queries, "row0": row0, "k": k, "v": v})
                for piece, block in zip((k, v), columns[run.target], strict=False):
                    if run.source == run.target:
                        block.write(piece.read(), slice(at, at + run.n))
                    else:
                        cores.send(sent, piece, [block], to=slice(at, at + run.n))


class Run(NamedTuple):
    """Adjacent tokens that go from one row to one row."""

    first: int
    to: int
    """Index of the first token there."""
    n: int
    source: int
    target: int


class Runs:
    """Runs of adjacent tokens, as one vector for each field of `Run`."""

    __slots__ = ("first", "n", "source", "target", "to")

    def __init__(self, first: Ints, to: Ints, n: Ints, source: Ints, target: Ints) -> None:
        self.first, self.to, self.n, self.source, self.target = first, to, n, source, target

    def __iter__(self) -> Iterator[Run]:
        return map(Run, *(field.tolist() for field in (self.first, self.to, self.n, self.source, self.target)))

    def __len__(self) -> int:
        return self.n.size


_NO_RUNS = Runs(*np.zeros((5, 0), np.int64))


@dataclass(frozen=True, slots=True)
class _AppendPlan:
    """Which tokens move where in one append, what is given up after, and what that costs."""

    sequences: Sequences
    bands: TokenBands
    pattern: AttentionPattern
    shifts: list[Runs]
    arrivals: list[Runs]
    closing: list[Runs]
    before: tuple[Split, ...]
    """Per sequence, how the keys lie that are held before the append, with the new ones, and after attention."""
    held: tuple[Split, ...]
    kept: tuple[Split, ...]
    events: tuple[Event, ...]
    stored: Event | None
    closed: Event | None


def _moves(before: Ints, source: Split, after: Ints, target: Split) -> Runs:
    """What stays of some keys, ranges (m, 2), from the rows that hold them to those that will."""
    if len(before) == len(after) == 1:
        (low, high), (after_low, after_high) = before[0].tolist(), after[0].tolist()
        begin, end = max(low, after_low), min(high, after_high)
        if end <= begin:
            return _NO_RUNS
        sources, targets = source.owner[begin - low : end - low], target.owner[begin - after_low : end - after_low]
        return runs_of(sources, targets, begin - low, begin - after_low)
    keys = keys_of(before)
    keys = keys[_within_ranges(after, keys)]
    here, there = keys_below(before, keys), keys_below(after, keys)
    return runs_between(source.owner[here], target.owner[there], here, there)


def _within_ranges(ranges: Ints, keys: Ints) -> NDArray[np.bool_]:
    """Which of some keys lie in ranges (n, 2)."""
    at = np.searchsorted(ranges[:, 0], keys, side="right") - 1
    inside: NDArray[np.bool_] = (at >= 0) & (keys < ranges[np.maximum(at, 0), 1])
    return inside


def runs_of(source: Ints, target: Ints, first: int = 0, to: int = 0) -> Runs:
    """Runs of adjacent tokens, from the rows that each token leaves and goes to; their indices count from `first` before and `to` after."""
    begins = _begins((source[1:] != source[:-1]) | (target[1:] != target[:-1]), source.size)
    at = begins[:-1]
    return Runs(at + first, at + to, begins[1:] - at, source[at], target[at])


def runs_between(source: Ints, target: Ints, here: Ints, there: Ints) -> Runs:
    """The same for tokens that need not be adjacent: `here` and `there` are their indices before and after."""
    breaks = (source[1:] != source[:-1]) | (target[1:] != target[:-1]) | (np.diff(here) != 1) | (np.diff(there) != 1)
    begins = _begins(breaks, source.size)
    at = begins[:-1]
    return Runs(here[at], there[at], begins[1:] - at, source[at], target[at])


def _begins(breaks: NDArray[np.bool_], n: int) -> Ints:
    """First of each run among `n`, and `n`; `breaks` tells for every one but the first whether a run begins there."""
    return np.concatenate([[0], np.flatnonzero(breaks) + 1, [n]]) if n else np.zeros(1, np.int64)


def _panel(flat: NDArray[np.float32], n_rows: int, columns: Split, col: int) -> NDArray[np.float32]:
    """A column's panel of a flat buffer of `n_rows` rows."""
    first, width = int(columns.starts[col]), int(columns.sizes[col])
    return flat[n_rows * first : n_rows * (first + width)].reshape(n_rows, width)


def _along_columns(kind: str, name: str, runs: list[Runs], columns: Split, n_rows: int, n_kept: int) -> Event:
    """Moves of what is kept (`n_kept` messages a run, a word a token and element each) along every column."""
    n, source, target = (np.concatenate([getattr(group, f) for group in runs]) for f in ("n", "source", "target"))
    moving = source != target
    n, source, target = n[moving], source[moving], target[moving]
    if not n.size:
        return costs.moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    load = costs.LineLoad(n_rows)
    load.add(source, target, n)
    distance = np.abs(source - target)
    return costs.moved(
        kind, name, count=n_kept * n.size * int(columns.used.size), words=int(n.sum()) * n_kept * columns.total,
        hops=int((n * distance).sum()) * n_kept * columns.total, max_link=load.busiest() * n_kept * columns.max_size,
        max_hops=int(distance.max()),
    )  # fmt: skip

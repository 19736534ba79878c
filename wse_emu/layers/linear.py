"""Matrix product of activations on the wafer with a weight matrix that streams past them.

Tokens lie over rows of cores, features over columns. The matrix comes in pieces: for the features that a column of cores will own, the slab
``W[K_c, piece]`` is broadcast down every column c and never kept; each core multiplies, the partial results are chained along the row and
land on the owner. With fewer tokens than rows, the *feature bands* of a token share its output features (see `TokenBands`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.row_products import PARTIAL_MATMUL, RowProducts
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Cores
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.storage import ROUNDINGS, beyond_largest, overflow
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.ffn import combine_into, geglu_into, swiglu_into
from wse_kernels.matmul import COMBINE, GEGLU, STORE, SWIGLU, mesh_matmul
from wse_kernels.matmul_rounded import mesh_matmul_rounded

__all__ = ["COMBINE", "DEFAULT_CHUNK", "GEGLU", "STORE", "SWIGLU", "Selection", "all_gather_bands", "matmul", "matmul_by_kind"]

DEFAULT_CHUNK = 32
"""Most output columns of one piece of a streamed matrix; smaller pieces need less SRAM and more messages."""

SWIGLU_INTO = Kernel(body=swiglu_into, params=("y", "first", "h"), inout=(), out=("h",), code_bytes=480)
GEGLU_INTO = Kernel(body=geglu_into, params=("y", "first", "h"), inout=(), out=("h",), code_bytes=544)
_GATING = {SWIGLU: SWIGLU_INTO, GEGLU: GEGLU_INTO}
"""Modes that make one column of two, and what the owner of a block does then."""
COMBINE_INTO = Kernel(
    body=combine_into,
    params=("y", "rows", "scale", "first", "out"),
    out=("out",),
    code_bytes=256,
    macs=lambda s: s["y"][0] * s["y"][1],
)
_NO_SCALE = np.zeros(1, np.float32)


@dataclass(frozen=True)
class Selection:
    """Some of the tokens on the wafer, for instance those that chose one expert."""

    counts: Ints
    """(n_rows,) selected tokens on each row of cores, replicas included."""
    rows: Ints
    """(m,) selected tokens, ascending; empty when only shapes are known."""
    scale: NDArray[np.float32]
    """(m,) weight of each selected token."""
    row_blocks: PlacedTensor | None = None
    """Isolated executor: on every core, its selected tokens (local index), then zeros."""
    scale_blocks: PlacedTensor | None = None
    """Isolated executor: their weights; None where all are 1."""
    firsts: Ints | None = None
    """(n_rows,) entry of those lists at which the selection begins on each row of cores; None is 0 everywhere."""

    def heads(self, row: int, col: int) -> tuple[Block, Any]:
        """Isolated executor: a core's selected tokens and their weights."""
        assert self.row_blocks is not None
        m, first = int(self.counts[row]), 0 if self.firsts is None else int(self.firsts[row])
        part = slice(first, first + m)
        scale: Any = np.ones(m, np.float32) if self.scale_blocks is None else self.scale_blocks.held[row, col].view(part)
        return self.row_blocks.held[row, col].view(part), scale

    def local_rows(self, bands: TokenBands, row: int) -> Ints:
        """Places of a row's selected tokens in its blocks, where the program knows them."""
        low, high = np.searchsorted(self.rows, (bands.split.starts[row], bands.split.stops[row]))
        places: Ints = self.rows[low:high] - bands.split.starts[row]
        return places

    @property
    def n_tokens(self) -> int:
        """Number of selected tokens."""
        return int(self.rows.size)

    @staticmethod
    def of_tokens(rows: Ints, split: Split, scale: NDArray[np.float32] | None = None) -> Selection:
        """Selection of ascending token indices, on rows of cores split by `split`."""
        counts = np.searchsorted(rows, split.stops) - np.searchsorted(rows, split.starts)
        return Selection(counts.astype(np.int64), rows, _NO_SCALE if scale is None else scale)


@lru_cache(maxsize=256)
def _ramp(n: int) -> Ints:
    ramp = np.arange(n, dtype=np.int64)
    ramp.flags.writeable = True  # as all offsets: one compiled specialisation
    return ramp


def matmul(
    wafer: Wafer,
    x: PlacedTensor,
    weight: StreamedMatrix,
    out: PlacedTensor,
    bands: TokenBands,
    *,
    mode: int = STORE,
    take: Selection | None = None,
    put: Selection | None = None,
    compact: Selection | None = None,
    only: Selection | None = None,
    chunk: int = DEFAULT_CHUNK,
    elsewhere: bool = False,
) -> None:
    """``out = x @ weight``, chained over the wafer's columns in the order of `wse_kernels.matmul`.

    Where ``weight.sums`` names a format of 16 bits, a total is rounded to it (to nearest, ties to even) every time a column hands it on to
    the next: each core adds its own float32 partial to what came in. What the last column has is float32.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, n_in), float32
        Rows by `bands`, columns split over columns of cores. If `put` is given, only its first tokens on each row of cores are meant (they
        were compacted by a product with `take`).
    weight : StreamedMatrix, (n_in, n_out)
    out : PlacedTensor, (T, n_out) or, with `SWIGLU` and `GEGLU`, (T, n_out / 2), float32
        Written by columns of the band's share: follow with `all_gather_bands`.
    bands : TokenBands
        How tokens lie over rows.
    mode : {STORE, SWIGLU, GEGLU, COMBINE}
        Store; gate pairs of columns with silu or with gelu; or add ``scale * result`` to the tokens of `put`.
    take : Selection, optional
        Tokens of `x` to use; the results are compacted to the first places of their row of cores.
    put : Selection, optional
        Tokens of `out` to add to.
    compact : Selection, optional
        `x` and `out` both hold just these tokens, compacted.
    only : Selection, optional
        Tokens to work on; the others' places in `out` stay as they are. At most one of the four may be given. Until every token has been
        worked on, `out` is not settled: see `matmul_by_kind`.
    chunk : int
        Most columns of one streamed piece.
    elsewhere : bool
        Only account for it: a fused driver does the arithmetic. Not for cores that run one at a time.
    """
    selection = take or put or compact or only
    counts = (selection.counts if selection is not None else bands.split.sizes).tobytes()
    program = matmul, bands, counts, x.placement, out.placement, weight.name, weight.n_in, weight.n_bytes, weight.sums, mode, chunk
    events = None if weight.leaves_zeros else wafer.known_events(program)  # what zeros leave depends on more than shapes
    if events is None:
        with wafer.first_run(program):
            _whole(wafer, x, weight, out, bands, mode, take, put, compact, only, chunk, counts, elsewhere)
        return
    if not (wafer.is_dry or elsewhere):
        _batched(wafer, x, weight, out, bands, mode, take, put, compact, only)
    wafer.ledger.extend(events)


def matmul_by_kind(
    wafer: Wafer, x: PlacedTensor, parts: Sequence[tuple[StreamedMatrix, Selection]], out: PlacedTensor, bands: TokenBands,
    *, chunk: int = DEFAULT_CHUNK,
) -> None:  # fmt: skip
    """``out = x @ weight`` where tokens are of several kinds with a matrix each: every matrix streams past, and meets its own tokens only.

    Parameters
    ----------
    wafer : Wafer
    x, out : PlacedTensor, (T, n_in) and (T, n_out), float32
        As for `matmul`.
    parts : sequence of (StreamedMatrix, Selection)
        Every token belongs to one of the selections.
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.
    """
    for weight, tokens in parts:
        matmul(wafer, x, weight, out, bands, only=tokens, chunk=chunk)
    out.settle()


def _whole(
    wafer: Wafer, x: PlacedTensor, weight: StreamedMatrix, out: PlacedTensor, bands: TokenBands, mode: int,
    take: Selection | None, put: Selection | None, compact: Selection | None, only: Selection | None, chunk: int, counts: bytes,
    elsewhere: bool,
) -> None:  # fmt: skip
    """Hold the work blocks and the code, multiply, and write down what moved."""
    unit = 2 if mode in _GATING else 1
    k_split, out_split = x.placement.axis1[1], out.placement.axis1[1]
    events = _events(wafer.rows, bands, counts, k_split, out_split, unit, mode, chunk, weight.name)
    if wafer.cores is None:
        stream = _nonzero_stream(events[0], bands, k_split, out_split, unit, chunk, weight) if weight.leaves_zeros else events[0]
        events = (stream._replace(bytes=weight.bytes_of(stream.wavelets)), *events[1:])
    size = _piece_columns(bands, out_split, unit, chunk)
    rows = x.placement.axis0
    slab_place = wafer.placement((weight.n_in, 2 * size), ("col", k_split), (None, None))
    part_place = wafer.placement((bands.n_tokens, wafer.cols * size), rows, ("col", Split.uniform(size, wafer.cols)))
    with (
        wafer.empty("weight slabs", slab_place) as slab,
        wafer.empty("partial sums", part_place) as part,
        wafer.empty("incoming sums", part_place, stored=weight.sums) as inbox,
        wafer.empty("delivered sums", part_place) as landing,
        wafer.sram.code(PARTIAL_MATMUL.name, PARTIAL_MATMUL.code_bytes + CHAIN_ADD.code_bytes + _GATING.get(mode, SWIGLU_INTO).code_bytes),
    ):
        if wafer.cores is not None:
            events = _isolated(wafer, x, weight, out, bands, mode, take, put, compact, only, chunk, slab, part, inbox, landing)
        elif not (wafer.is_dry or elsewhere):
            _batched(wafer, x, weight, out, bands, mode, take, put, compact, only)
    for event in events:
        wafer.record(event)


def _batched(
    wafer: Wafer, x: PlacedTensor, weight: StreamedMatrix, out: PlacedTensor, bands: TokenBands, mode: int,
    take: Selection | None, put: Selection | None, compact: Selection | None, only: Selection | None,
) -> None:  # fmt: skip
    n_tokens = bands.n_tokens
    selection, source, target = take or put or compact or only, take or only, put or only
    m = n_tokens if selection is None else selection.n_tokens
    if m == 0:
        return
    all_rows = _ramp(m)
    args = (
        x.unsettled, m if put or compact else n_tokens, x.placement.axis1[1].offsets, all_rows if source is None else source.rows,
        weight.values, 0, weight.n_in, weight.n_out,
        out.unsettled, m if take or compact else n_tokens, out.placement.axis1[1].offsets, all_rows if target is None else target.rows,
        _NO_SCALE if put is None else put.scale, mode,
    )  # fmt: skip
    if weight.sums is None:
        mesh_matmul(*args, run=wafer.pending.run)
    else:
        wafer.pending.finish()
        beyond = beyond_largest(mesh_matmul_rounded(*args, ROUNDINGS[weight.sums]), weight.sums)
        if beyond is not None:
            raise overflow(wafer.ledger.where("incoming sums"), beyond, weight.sums)
    if only is None:
        out.settle(m * out.placement.shape[1] if take or compact else None)


# ---- what it costs


def _share(size: Any, band: Any, n_bands: int) -> Any:
    """First element of a band's share of a block of `size` elements (arrays welcome)."""
    return size * band // n_bands


def _piece_columns(bands: TokenBands, out_split: Split, unit: int, chunk: int) -> int:
    """Columns of the largest piece."""
    largest = -(-out_split.max_size // bands.n_feature_bands)
    return max(1, min(max(1, chunk // unit), largest)) * unit


@lru_cache(maxsize=4096)
def _events(
    n_rows: int, bands: TokenBands, count_bytes: bytes, k_split: Split, out_split: Split, unit: int, mode: int, chunk: int, name: str
) -> tuple[Event, ...]:
    counts = np.frombuffer(count_bytes, np.int64)
    n_bands = bands.n_feature_bands
    stations = k_split.used
    n_in, source = k_split.total, int(stations[-1])
    band = np.arange(n_bands)
    sizes, multiplicity = np.unique(out_split.sizes[out_split.used], return_counts=True)
    shares = _share(sizes[:, None], band + 1, n_bands) - _share(sizes[:, None], band, n_bands)  # (size class, band), in units
    pieces = -(-shares // max(1, chunk // unit))
    words = unit * (multiplicity @ shares)  # per band
    n_pieces = multiplicity @ pieces

    rows = np.flatnonzero(counts)
    tokens, of_band = counts[rows], rows % n_bands if n_bands > 1 else np.zeros(rows.size, np.int64)
    used = bands.split.used
    last_row = used[-1] - (n_bands - 1) + band if n_bands > 1 else used[-1:]
    flowing = words[last_row > 0]
    stream = costs.moved(
        "stream", name, count=int(n_pieces.sum()) * stations.size, words=n_in * int(words.sum()),
        hops=n_in * int((words * last_row).sum()), max_link=k_split.max_size * int(flowing.sum()),
        max_hops=int(last_row[words > 0].max(initial=0)),
    )  # fmt: skip
    runs = int(n_pieces[of_band].sum())
    row_words = tokens * words[of_band]
    partial = Event(None, "", "launch", PARTIAL_MATMUL.name, count=runs * stations.size, macs=n_in * int(row_words.sum()))
    hands = runs * (stations.size - 1)
    total, span = int(row_words.sum()), int(stations[-1] - stations[0])
    chain = costs.moved(
        "chain", name, count=hands, words=total * (stations.size - 1), hops=total * span,
        max_link=int(row_words.max(initial=0)) if hands else 0, max_hops=int(np.diff(stations).max(initial=0)) if hands else 0,
    )  # fmt: skip
    added = Event(None, "", "launch", CHAIN_ADD.name, count=hands)

    west, east, away, distance, far = (np.zeros(sizes.size, np.int64) for _ in range(5))
    for i, size in enumerate(sizes):
        owners = np.flatnonzero(out_split.sizes == size)
        west[i], east[i] = np.count_nonzero(owners < source), np.count_nonzero(owners > source)
        away[i] = west[i] + east[i]
        distance[i] = np.abs(owners - source).sum()
        far[i] = np.abs(owners - source).max()
    live = (shares[:, np.unique(of_band)] > 0).any(axis=1) if rows.size else np.zeros(sizes.size, np.bool_)
    sent = int((away @ pieces)[of_band].sum())
    handed = costs.moved(
        "deliver", name, count=sent, words=unit * int((tokens * (away @ shares)[of_band]).sum()),
        hops=unit * int((tokens * (distance @ shares)[of_band]).sum()),
        max_link=unit * int((tokens * np.maximum(west @ shares, east @ shares)[of_band]).max(initial=0)),
        max_hops=int(far[live].max(initial=0)) if sent else 0,
    )  # fmt: skip
    events = [stream, partial, chain, added, handed]
    if mode in _GATING:
        events.append(Event(None, "", "launch", _GATING[mode].name, count=runs))
    elif mode == COMBINE:
        events.append(Event(None, "", "launch", COMBINE_INTO.name, count=runs, macs=total))
    return tuple(events)


def _nonzero_stream(
    dense: Event, bands: TokenBands, k_split: Split, out_split: Split, unit: int, chunk: int, weight: StreamedMatrix
) -> Event:
    """What is left of a matrix's stream where its zeros stay behind: messages without a weight are not sent."""
    n_bands, step, used = bands.n_feature_bands, max(1, chunk // unit), bands.split.used
    stations = k_split.used
    count = words = hops = max_hops = 0
    first_link = np.zeros(stations.size, np.int64)
    for owner in out_split.used.tolist():
        size, start = int(out_split.sizes[owner]), int(out_split.starts[owner])
        for band in range(n_bands):
            last_row = int(used[-1]) - (n_bands - 1) + band if n_bands > 1 else int(used[-1])
            stop = _share(size, band + 1, n_bands)
            for first in range(_share(size, band, n_bands), stop, step):
                columns = weight.columns((start + first) * unit, (start + min(first + step, stop)) * unit)
                by_row = np.count_nonzero(columns.view(np.uint32), axis=1)
                n = np.add.reduceat(by_row, k_split.starts[stations])
                count += int(np.count_nonzero(n))
                words += int(n.sum())
                hops += int(n.sum()) * last_row
                first_link += n if last_row else 0
                max_hops = max(max_hops, last_row if n.any() else 0)
    return costs.moved(
        "stream", dense.name, count=count, words=words, hops=hops, max_link=int(first_link.max(initial=0)), max_hops=max_hops
    )  # fmt: skip


# ---- one core at a time


def _isolated(
    wafer: Wafer, x: PlacedTensor, weight: StreamedMatrix, out: PlacedTensor, bands: TokenBands, mode: int,
    take: Selection | None, put: Selection | None, compact: Selection | None, only: Selection | None, chunk: int,
    slab: PlacedTensor, part: PlacedTensor, inbox: PlacedTensor, landing: PlacedTensor,
) -> tuple[Event, ...]:  # fmt: skip
    assert wafer.cores is not None
    unit = 2 if mode in _GATING else 1
    out_split = out.placement.axis1[1]
    selection, source = take or put or compact or only, take or only
    counts = selection.counts if selection is not None else bands.split.sizes
    n_bands, step = bands.n_feature_bands, max(1, chunk // unit)
    products = RowProducts(wafer.cores, weight, x, slab, part, inbox)
    finished = macs = 0

    def local_rows(row: int, m: int) -> Callable[[int], Any]:
        return lambda col: _ramp(m) if source is None else _taken(source, bands, row, col)

    for owner in out_split.used.tolist():
        size, start = int(out_split.sizes[owner]), int(out_split.starts[owner])
        for band in range(n_bands):
            rows = [r for r in bands.split.used.tolist() if r % n_bands == band or n_bands == 1]
            stop = _share(size, band + 1, n_bands)
            for first in range(_share(size, band, n_bands), stop, step):
                n = (min(first + step, stop) - first) * unit
                products.stream(weight.columns((start + first) * unit, (start + first) * unit + n), rows)
                for row in rows:
                    m = int(counts[row])
                    if m == 0:
                        continue
                    acc = products.product(row, m, local_rows(row, m), compact=bool(put or compact))
                    target = out.held[row, owner]
                    if mode == STORE:
                        places = slice(0, m) if only is None else only.local_rows(bands, row)
                        products.hand(acc, target, (places, slice(first, first + n)))
                        continue
                    y = landing.held[row, owner].prefix(m, n)
                    products.hand(acc, y, slice(None))
                    finished += 1
                    if mode in _GATING:
                        where, kernel = (slice(0, m), slice(first, first + n // 2)), _GATING[mode]
                        args: dict[str, Any] = {"y": y, "first": first, "h": target}
                    else:
                        assert put is not None
                        where, kernel = (slice(None), slice(first, first + n)), COMBINE_INTO
                        rows_of, scale = put.heads(row, owner)
                        args = {"y": y, "rows": rows_of, "scale": scale, "first": first, "out": target}
                    macs += _finish(wafer.cores, kernel, target, where, args)
    events = products.events()
    if mode != STORE:
        events.append(Event(None, "", "launch", _GATING.get(mode, COMBINE_INTO).name, count=finished, macs=macs))
    return tuple(events)


def _taken(take: Selection, bands: TokenBands, row: int, col: int) -> Any:
    """Local indices of the selected tokens: the core's own list, or one that the program knows."""
    if take.row_blocks is not None:
        return take.heads(row, col)[0]
    return take.local_rows(bands, row)


def _finish(cores: Cores, kernel: Kernel, target: Block, where: tuple[slice, slice], args: dict[str, Any]) -> int:
    """Run a body that writes part of `target`: only that part becomes defined."""
    before = target.defined.copy()
    if kernel is COMBINE_INTO:
        target.read(where)
    macs: int = cores.run(kernel, target.core, args)
    target.defined[...] = before
    target.defined[where] = True
    return macs


# ---- feature bands


def all_gather_bands(wafer: Wafer, tensor: PlacedTensor, bands: TokenBands, selection: Selection | None = None) -> None:
    """Complete every core's block after a product whose output features were shared over feature bands; without bands, nothing.

    Parameters
    ----------
    wafer : Wafer
    tensor : PlacedTensor, (T, n)
        Rows by `bands`, columns split over columns of cores; each core holds its band's share of the columns.
    bands : TokenBands
    selection : Selection, optional
        Only these tokens (compacted) are there.
    """
    n_bands = bands.n_feature_bands
    if n_bands == 1:
        return
    split = tensor.placement.axis1[1]
    counts = selection.counts if selection is not None else bands.split.sizes
    if wafer.cores is None:
        wafer.record(_gather_event(bands, counts.tobytes(), split, tensor.name))
        return
    traffic = wafer.cores.traffic()
    for first in range(0, bands.used_rows, n_bands):
        m = int(counts[first])
        if m == 0:
            continue
        for col in split.used.tolist():
            size = int(split.sizes[col])
            rows = slice(0, m) if selection is not None else slice(None)
            for band in range(n_bands):  # what lies outside a band's own share is not meant to be read
                tensor.held[first + band, col].poison((rows, slice(0, _share(size, band, n_bands))))
                tensor.held[first + band, col].poison((rows, slice(_share(size, band + 1, n_bands), None)))
            for band in range(n_bands):
                share = slice(_share(size, band, n_bands), _share(size, band + 1, n_bands))
                others = [tensor.held[first + b, col] for b in range(n_bands) if b != band]
                wafer.cores.send(traffic, tensor.held[first + band, col], others, where=(rows, share), to=(rows, share))
    wafer.record(traffic.event("allgather", tensor.name, costs.COLORS["allgather"]))


@lru_cache(maxsize=4096)
def _gather_event(bands: TokenBands, count_bytes: bytes, split: Split, name: str) -> Event:
    n_bands = bands.n_feature_bands
    tokens = np.frombuffer(count_bytes, np.int64)[: bands.used_rows : n_bands]
    band = np.arange(n_bands)
    sizes, multiplicity = np.unique(split.sizes[split.used], return_counts=True)
    groups = [
        (tokens, _share(size, band + 1, n_bands) - _share(size, band, n_bands), int(k)) for size, k in zip(sizes, multiplicity, strict=True)
    ]
    return costs.allgather(name, groups)

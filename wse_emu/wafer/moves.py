"""Moves of placed tensors over the fabric. Each really copies between arenas in the isolated executor, and states its order.

All take the wafer first, write into an existing tensor and record their event. Elements are whole 32-bit words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import PlacementError, RouteError
from wse_emu.wafer import costs
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints, Split
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer, _from_panels, _to_panels
from wse_kernels.matmul import chain_add
from wse_kernels.norm import chain_max, chain_panels
from wse_kernels.routing import merge_bits

ChainOp = Literal["add", "max", "or"]

CHAIN_ADD = Kernel(body=chain_add, params=("acc", "p"), inout=("acc",), code_bytes=160)
"""``acc = acc + p``: what a station of a chain does with what came in."""
CHAIN_MAX = Kernel(body=chain_max, params=("acc", "p"), inout=("acc",), code_bytes=160)
CHAIN_OR = Kernel(body=merge_bits, params=("mask", "other"), inout=("mask",), code_bytes=160)
_STATION: dict[ChainOp, Kernel] = {"add": CHAIN_ADD, "max": CHAIN_MAX, "or": CHAIN_OR}


def _words(tensor: PlacedTensor) -> int:
    return tensor.dtype.itemsize // 4


def _split(tensor: PlacedTensor, axis: Literal["row", "col"], role: str) -> Split:
    split = tensor.placement.split_of(axis)
    if split is None:
        raise PlacementError(f"`{tensor.name}` ({role}) must be split over {axis}s; it is replicated there")
    return split


def _same(condition: bool, what: str) -> None:
    if not condition:
        raise PlacementError(what)


def _place_of(split: Split, tensor: PlacedTensor, role: str) -> int:
    used = split.used
    _same(used.size == 1, f"`{tensor.name}` ({role}) must lie whole on one row or column of cores, it lies on {used.size}")
    return int(used[0])


def chain_row(wafer: Wafer, partials: PlacedTensor, out: PlacedTensor, cols: Ints | None = None) -> None:
    """Add private partial blocks along every row, west to east, and deliver the sum to the columns that own it.

    Order: ``acc = p[cols[0]]``, then ``acc = acc + p[c]`` for the further `cols` ascending, each rounded to the element type.

    Parameters
    ----------
    wafer : Wafer
    partials : PlacedTensor, (m, n_cols * n), float32
        Private ``(m_r, n)`` blocks: columns split by ``Split.uniform(n, wafer.cols)``.
    out : PlacedTensor, (m, n), float32
        Written; its n columns may be split over columns of cores in any way.
    cols : ndarray of int64, optional
        Columns that take part, ascending; all by default.

    Raises
    ------
    PlacementError
        If the placements do not fit each other.
    """
    stations = np.arange(wafer.cols) if cols is None else np.asarray(cols, np.int64)
    n = out.placement.shape[1]
    rows, owners = partials.placement.axis0[1], _split(out, "col", "out")
    _same(
        partials.placement.axis1 == ("col", Split.uniform(n, wafer.cols)) and partials.placement.axis0 == out.placement.axis0,
        f"`{partials.name}` must hold one private block of {n} columns on every core, rows as in `{out.name}`",
    )
    last = int(stations[-1])
    inbox_place = partials.placement
    with wafer.empty("inbox", inbox_place, partials.dtype) as inbox, wafer.sram.code(CHAIN_ADD.name, CHAIN_ADD.code_bytes):
        if wafer.cores is None:
            for event in _chain_row_events(partials.name, out.name, rows, owners, stations.tobytes(), _words(partials)):
                wafer.record(event)
            if not wafer.is_dry:
                total = np.empty((out.placement.shape[0], n), np.float32)
                chain_panels(partials.flat, total.size, stations, total.reshape(-1))
                _to_panels(total, out.placement, out.flat)
            return
        chain, handed, runs = wafer.cores.traffic(), wafer.cores.traffic(), 0
        for row in rows.used.tolist():
            acc = partials.held[row, int(stations[0])]
            for col in stations[1:].tolist():
                wafer.cores.send(chain, acc, [inbox.held[row, col]])
                acc = inbox.held[row, col]
                wafer.cores.run(CHAIN_ADD, (row, col), {"acc": acc, "p": partials.held[row, col]})
                runs += 1
            for col in owners.used.tolist():
                piece = slice(int(owners.starts[col]), int(owners.stops[col]))
                if col == last:
                    out.held[row, col].write(acc.read((slice(None), piece)))
                else:
                    wafer.cores.send(handed, acc, [out.held[row, col]], where=(slice(None), piece))
        wafer.record(chain.event("chain", partials.name, costs.COLORS["chain"]))
        wafer.record(Event(None, "", "launch", CHAIN_ADD.name, count=runs))
        wafer.record(handed.event("deliver", out.name, costs.COLORS["deliver"]))


@lru_cache(maxsize=1024)
def _chain_row_events(name: str, out: str, rows: Split, owners: Split, stations: bytes, words: int) -> tuple[Event, Event, Event]:
    cols = np.frombuffer(stations, np.int64)
    sizes = rows.sizes * words
    return (
        costs.chain(name, sizes * owners.total, cols),
        Event(None, "", "launch", CHAIN_ADD.name, count=int(rows.used.size) * (cols.size - 1)),
        costs.deliver(out, sizes, int(cols[-1]), owners.sizes),
    )


@lru_cache(maxsize=1024)
def _broadcast_row_event(name: str, rows: Split, words: int, at: int, targets: bytes) -> Event:
    return costs.multicast(name, rows.sizes * words, at, np.frombuffer(targets, np.int64))


def chain_col(wafer: Wafer, partials: PlacedTensor, out: PlacedTensor, op: ChainOp = "add") -> None:
    """Combine private blocks along every column, north to south; the result stays on the last row, where `out` lies.

    Order: ``acc = p[0]``, then ``acc = acc op p[r]`` for the further rows ascending.

    Parameters
    ----------
    wafer : Wafer
    partials : PlacedTensor, (n_rows * m, n)
        Private ``(m, n_c)`` blocks: rows split by ``Split.uniform(m, wafer.rows)``.
    out : PlacedTensor, (m, n)
        Written; rows ``Split.single(m, wafer.rows - 1, wafer.rows)``, columns as in `partials`.
    op : {"add", "max", "or"}
        ``max`` of float32 is exact; ``or`` is bitwise, of int32.
    """
    m = out.placement.shape[0]
    last = wafer.rows - 1
    _same(
        partials.placement.axis0 == ("row", Split.uniform(m, wafer.rows)) and partials.placement.axis1 == out.placement.axis1,
        f"`{partials.name}` must hold one private block of {m} rows on every core, columns as in `{out.name}`",
    )
    _same(out.placement.axis0 == ("row", Split.single(m, last, wafer.rows)), f"`{out.name}` must lie whole on the last row of cores")
    station = _STATION[op]
    sizes = partials.placement.col_factor * (m * _words(partials))
    n_cols = int(np.count_nonzero(sizes))
    with wafer.empty("inbox", partials.placement, partials.dtype) as inbox, wafer.sram.code(station.name, station.code_bytes):
        if wafer.cores is None:
            wafer.record(costs.chain(partials.name, sizes, np.arange(wafer.rows)))
            wafer.record(Event(None, "", "launch", station.name, count=n_cols * last))
            if not wafer.is_dry:
                whole = np.empty(partials.placement.shape, partials.dtype)
                _from_panels(partials.flat, partials.placement, whole)
                total = whole[:m].copy()
                for row in range(1, wafer.rows):
                    _combine(op, total, whole[row * m : (row + 1) * m])
                _to_panels(total, out.placement, out.flat)
            return
        chain, runs = wafer.cores.traffic(), 0
        for col in np.flatnonzero(sizes).tolist():
            acc = partials.held[0, col]
            for row in range(1, wafer.rows):
                wafer.cores.send(chain, acc, [inbox.held[row, col]])
                acc = inbox.held[row, col]
                first, second = station.params
                wafer.cores.run(station, (row, col), {first: acc, second: partials.held[row, col]})
                runs += 1
            out.held[last, col].write(acc.read())
        wafer.record(chain.event("chain", partials.name, costs.COLORS["chain"]))
        wafer.record(Event(None, "", "launch", station.name, count=runs))


def _combine(op: ChainOp, total: NDArray[Any], more: NDArray[Any]) -> None:
    if op == "add":
        total += more
    elif op == "max":
        np.copyto(total, more, where=(more > total) | (more != more))
    else:
        total |= more


def broadcast_row(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, cols: Ints | None = None) -> None:
    """Copy what one column of cores holds to other columns, along every row.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        Its columns lie whole on one column of cores.
    out : PlacedTensor, (m, n)
        Written; rows as in `source`, columns whole on every core.
    cols : ndarray of int64, optional
        Columns that receive; all by default. The sender keeps a copy of its own.
    """
    targets = np.arange(wafer.cols) if cols is None else np.asarray(cols, np.int64)
    at = _place_of(_split(source, "col", "source"), source, "source")
    _same(
        source.placement.axis0 == out.placement.axis0 and out.placement.axis1[0] is None,
        f"`{out.name}` must have the rows of `{source.name}` and whole columns",
    )
    rows = source.placement.axis0[1]
    n = source.placement.shape[1]
    if wafer.cores is None:
        wafer.record(_broadcast_row_event(source.name, rows, n * _words(source), at, targets.tobytes()))
        if not wafer.is_dry:
            out.flat[...] = source.flat
        return
    traffic = wafer.cores.traffic()
    for row in rows.used.tolist():
        block = source.held[row, at]
        wafer.cores.send(traffic, block, [out.held[row, c] for c in targets.tolist() if c != at])
        out.held[row, at].write(block.read())
    wafer.record(traffic.event("broadcast", source.name, costs.COLORS["broadcast"]))


def broadcast_col(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Copy what one row of cores holds to all rows, along every column.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        Its rows lie whole on one row of cores.
    out : PlacedTensor, (m, n)
        Written; columns as in `source`, rows whole on every core.
    """
    at = _place_of(_split(source, "row", "source"), source, "source")
    _same(
        source.placement.axis1 == out.placement.axis1 and out.placement.axis0[0] is None,
        f"`{out.name}` must have the columns of `{source.name}` and whole rows",
    )
    sizes = source.placement.col_factor * (source.placement.shape[0] * _words(source))
    if wafer.cores is None:
        wafer.record(costs.multicast(source.name, sizes, at, np.arange(wafer.rows)))
        if not wafer.is_dry:
            out.flat[...] = source.flat
        return
    traffic = wafer.cores.traffic()
    for col in np.flatnonzero(sizes).tolist():
        block = source.held[at, col]
        wafer.cores.send(traffic, block, [out.held[r, col] for r in range(wafer.rows) if r != at])
        out.held[at, col].write(block.read())
    wafer.record(traffic.event("broadcast", source.name, costs.COLORS["broadcast"]))


def all_gather_col(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Give every row the blocks of all rows, along every column: each core multicasts its own.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        Rows a partition over rows of cores.
    out : PlacedTensor, (m, n)
        Written; columns as in `source`, rows whole on every core.
    """
    split = _split(source, "row", "source")
    _same(
        split.is_partition and source.placement.axis1 == out.placement.axis1 and out.placement.axis0[0] is None,
        f"`{source.name}` must be a partition over rows, `{out.name}` whole there, columns alike",
    )
    factor = source.placement.col_factor
    if wafer.cores is None:
        widths, counts = np.unique(factor[factor > 0], return_counts=True)
        groups = [(np.array([w * _words(source)]), split.sizes, int(k)) for w, k in zip(widths, counts, strict=True)]
        wafer.record(costs.allgather(source.name, groups))
        if not wafer.is_dry:
            out.flat[...] = source.flat
        return
    traffic = wafer.cores.traffic()
    for col in np.flatnonzero(factor).tolist():
        for row in split.used.tolist():
            where = (slice(int(split.starts[row]), int(split.stops[row])), slice(None))
            wafer.cores.send(traffic, source.held[row, col], [out.held[r, col] for r in range(wafer.rows) if r != row], to=where)
            out.held[row, col].write(source.held[row, col].read(), where)
    wafer.record(traffic.event("allgather", source.name, costs.COLORS["allgather"]))


def shift_rows(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, n: int) -> None:
    """Send every core's block `n` rows south (north if negative); rows that no block reaches keep what `out` held.

    Parameters
    ----------
    wafer : Wafer
    source, out : PlacedTensor, (m, n), placed alike
        Rows split into equal blocks. `out` is written; it may not be `source`.
    n : int
        Rows to shift by; blocks that would leave the grid stay where they are.
    """
    split = _split(source, "row", "source")
    _same(source is not out and source.placement == out.placement, f"`{source.name}` and `{out.name}` must be two tensors placed alike")
    _same(
        split.is_partition and int(split.sizes.min()) == split.max_size,
        f"`{source.name}` must have equal blocks on all rows to be shifted, it has {int(split.sizes.min())}..{split.max_size}",
    )
    if wafer.cores is None:
        wafer.record(costs.shift(source.name, split.sizes * _words(source), source.placement.col_factor, n))
        if not wafer.is_dry and abs(n) < wafer.rows:
            m, step = source.placement.shape[0], n * split.max_size
            whole, result = np.empty(source.placement.shape, source.dtype), np.empty(source.placement.shape, source.dtype)
            _from_panels(source.flat, source.placement, whole)
            _from_panels(out.flat, out.placement, result)
            result[max(step, 0) : m + min(step, 0)] = whole[max(-step, 0) : m - max(step, 0)]
            _to_panels(result, out.placement, out.flat)
        return
    traffic = wafer.cores.traffic()
    for (row, col), block in source.held.items():
        if 0 <= row + n < wafer.rows:
            if n:
                wafer.cores.send(traffic, block, [out.held[row + n, col]])
            else:
                out.held[row, col].write(block.read())
    wafer.record(traffic.event("shift", source.name, costs.COLORS["shift"]))


def send(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, from_core: tuple[int, int], to_core: tuple[int, int]) -> None:
    """Send one core's block of `source` to another core's block of `out`, along the row first, then along the column.

    Raises
    ------
    RouteError
        If a core lies off the grid, or the two blocks differ in shape or type.
    """
    for row, col in (from_core, to_core):
        if not (0 <= row < wafer.rows and 0 <= col < wafer.cols):
            raise RouteError(f"core ({row}, {col}) is off the grid of {wafer.rows} x {wafer.cols} cores")
    shape = source.block_shape(*from_core)
    if shape != out.block_shape(*to_core) or source.dtype != out.dtype:
        raise RouteError(
            f"core {to_core}: `{out.name}` {out.block_shape(*to_core)} {out.dtype} cannot take `{source.name}` {shape} {source.dtype}"
        )
    if wafer.cores is not None:
        traffic = wafer.cores.traffic()
        if from_core == to_core:
            out.held[to_core].write(source.held[from_core].read())
        else:
            wafer.cores.send(traffic, source.held[from_core], [out.held[to_core]])
        wafer.record(traffic.event("send", source.name, costs.COLORS["send"]))
        return
    away = from_core != to_core and 0 not in shape
    words = int(np.prod(shape)) * _words(source) if away else 0
    hops = abs(from_core[0] - to_core[0]) + abs(from_core[1] - to_core[1]) if away else 0
    wafer.record(costs.moved("send", source.name, count=int(away), words=words, hops=words * hops, max_link=words, max_hops=hops))
    if not wafer.is_dry:
        out.block(*to_core)[...] = source.block(*from_core)


def gather_to_core(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Bring all blocks of a tensor to the one core on which `out` lies, along rows first, then along that core's column.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        Rows and columns partitions over the grid.
    out : PlacedTensor, (m, n)
        Written; rows and columns whole on one core.
    """
    rows, cols = _split(source, "row", "source"), _split(source, "col", "source")
    core = (_place_of(_split(out, "row", "out"), out, "out"), _place_of(_split(out, "col", "out"), out, "out"))
    _same(rows.is_partition and cols.is_partition, f"`{source.name}` must be a partition over rows and columns")
    if wafer.cores is None:
        wafer.record(costs.gather(source.name, rows.sizes * _words(source), cols.sizes, core))
        if not wafer.is_dry:
            _from_panels(source.flat, source.placement, out.flat.reshape(out.placement.shape))
        return
    traffic = wafer.cores.traffic()
    target = out.held[core]
    for (row, col), block in source.held.items():
        i0, i1, j0, j1 = source.placement.ranges(row, col)
        where = (slice(i0, i1), slice(j0, j1))
        if (row, col) == core:
            target.write(block.read(), where)
        else:
            wafer.cores.send(traffic, block, [target], to=where)
    wafer.record(traffic.event("gather", source.name, costs.COLORS["gather"]))

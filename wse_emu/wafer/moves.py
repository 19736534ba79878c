"""Moves of placed tensors over the fabric. Each really copies between arenas in the isolated executor, and states its order.

All take the wafer first, write into an existing tensor and record their events. A move checks everything before it writes or records
anything: placements that do not fit each other raise `PlacementError`, what the fabric cannot do `RouteError`, a freed tensor
`SramStateError`, a read of what nothing wrote `UninitializedReadError` (isolated and interpreted executors).

`along a row` means: from column to column of one row of cores. The other axis of a tensor, which does not move, may be split over the
rows, replicated in bands of rows, or whole on every core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import PlacementError, RouteError
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import GridAxis, Ints, Placement, Split
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer, from_panels, to_panels
from wse_kernels.matmul import chain_add
from wse_kernels.norm import chain_max, chain_panels
from wse_kernels.routing import merge_bits

__all__ = [
    "ChainOp",
    "all_gather_col",
    "all_gather_row",
    "broadcast_col",
    "broadcast_row",
    "chain_col",
    "chain_row",
    "gather_to_core",
    "send",
    "shift_cols",
    "shift_rows",
]

ChainOp = Literal["add", "max", "or"]
"""How `chain_col` combines two blocks."""

_F = TypeVar("_F", bound=Callable[..., None])


def _move(function: _F) -> _F:
    """Let a move run when it is its thread's turn on the wafer."""

    @wraps(function)
    def alone(wafer: Wafer, *args: Any, **kwargs: Any) -> None:
        if not isinstance(wafer, Wafer):
            raise RouteError(f"the first argument of a move is the wafer, got {type(wafer).__name__}")
        with wafer.turn.lock:
            function(wafer, *args, **kwargs)

    return cast(_F, alone)


CHAIN_ADD = Kernel(body=chain_add, params=("acc", "p"), inout=("acc",), code_bytes=160)
"""``acc = acc + p``: what a station of a chain does with what came in."""
CHAIN_MAX = Kernel(body=chain_max, params=("acc", "p"), inout=("acc",), code_bytes=160)
CHAIN_OR = Kernel(body=merge_bits, params=("mask", "other"), inout=("mask",), code_bytes=160)
_STATION: dict[str, tuple[Kernel, type[np.generic]]] = {
    "add": (CHAIN_ADD, np.float32),
    "max": (CHAIN_MAX, np.float32),
    "or": (CHAIN_OR, np.int32),
}


# ---- along a row or a column


@_move
def broadcast_row(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Copy what one column of cores holds to other columns, along every row: one multicast a row.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        One axis lies whole on one column of cores (``("col", Split.single(n, at, wafer.cols))``).
    out : PlacedTensor, (m, n)
        Written. That axis is whole on every core, or on some columns only (``("col", Split.everywhere(n, wafer.cols, at=columns))``); a
        core of the sender's column that has a block of `out` keeps a copy. The other axis as in `source`.
    """
    _broadcast(wafer, source, out, "col")


@_move
def broadcast_col(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Copy what one row of cores holds to other rows, along every column; `broadcast_row` with rows and columns exchanged."""
    _broadcast(wafer, source, out, "row")


@_move
def all_gather_row(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Give every column the blocks of all columns, along every row: each core multicasts its own.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        One axis a partition over columns of cores; columns may be empty.
    out : PlacedTensor, (m, n)
        Written. That axis is whole on every core; the other as in `source`.
    """
    _all_gather(wafer, source, out, "col")


@_move
def all_gather_col(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Give every row the blocks of all rows, along every column; `all_gather_row` with rows and columns exchanged."""
    _all_gather(wafer, source, out, "row")


@_move
def shift_rows(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, n: int) -> None:
    """Send every core's block `n` rows south (north if negative); rows that no block reaches keep what `out` held.

    Parameters
    ----------
    wafer : Wafer
    source, out : PlacedTensor, (m, k), placed alike
        One axis split into equal blocks over rows of cores. `out` is written; it may not be `source`.
    n : int
        Rows to shift by; blocks that would leave the grid stay where they are.
    """
    _shift(wafer, source, out, n, "row")


@_move
def shift_cols(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, n: int) -> None:
    """Send every core's block `n` columns east (west if negative); `shift_rows` with rows and columns exchanged."""
    _shift(wafer, source, out, n, "col")


# ---- chains


@_move
def chain_row(wafer: Wafer, partials: PlacedTensor, out: PlacedTensor) -> None:
    """Add private partial blocks along every row, west to east, and deliver the sum to the columns that own it.

    Order: ``acc = p[c]`` of the first column that holds a partial, then ``acc = acc + p[c]`` for the further ones ascending, each rounded
    to float32. The sum is delivered by the last of them.

    Parameters
    ----------
    wafer : Wafer
    partials : PlacedTensor, (m, k * n), float32
        Private ``(m_r, n)`` blocks on k columns: columns split by ``Split.uniform(n, wafer.cols)``, or ``at=`` the columns that take part.
    out : PlacedTensor, (m, n), float32
        Written; its n columns may be split over columns of cores in any way, the rows as in `partials`.
    """
    _check(wafer, partials, out, "partials")
    _check_type(partials, np.float32, "a chain along a row")
    _check_sums(partials)
    plan = _chain_row_plan(partials.placement, out.placement, partials.name, out.name)
    last = int(plan.stations[-1])
    with wafer.empty("inbox", partials.placement) as inbox, wafer.sram.code(CHAIN_ADD.name, CHAIN_ADD.code_bytes):
        if wafer.cores is None:
            wafer.record(*plan.events)
            if not wafer.is_dry:
                total = np.empty(out.placement.shape, np.float32)
                chain_panels(partials.flat, total.size, np.arange(plan.stations.size), total.reshape(-1))
                to_panels(total, out.placement, out.flat)
                out.settle()
            return
        wafer.check_routes(*plan.events)
        _read(partials.held.values())
        owners, (chain, handed), runs = plan.owners, (wafer.cores.traffic(), wafer.cores.traffic()), 0
        for row in np.flatnonzero(plan.lines).tolist():
            acc = partials.held[row, int(plan.stations[0])].plane
            for col in plan.stations[1:].tolist():
                come = inbox.held[row, col]
                wafer.cores.send(chain, acc, [come])
                wafer.cores.run(CHAIN_ADD, (row, col), {"acc": come, "p": partials.held[row, col].plane})
                runs += 1
                acc = come
            for col in owners.used.tolist():
                piece = (slice(None), slice(int(owners.starts[col]), int(owners.stops[col])))
                if col == last:
                    out.held[row, col].plane.write(acc.read(piece))
                else:
                    wafer.cores.send(handed, acc, [out.held[row, col]], where=piece)
        wafer.record(
            chain.event("chain", partials.name, costs.COLORS["chain"]),
            Event(None, "", "launch", CHAIN_ADD.name, count=runs),
            handed.event("deliver", out.name, costs.COLORS["deliver"]),
        )


class _ChainRow(NamedTuple):
    stations: Ints
    """Columns that hold a partial, ascending."""
    owners: Split
    lines: Ints
    """(rows,) rows of the tensor on each row of cores."""
    events: tuple[Event, ...]


@lru_cache(maxsize=1024)
def _chain_row_plan(partials: Placement, out: Placement, name: str, out_name: str) -> _ChainRow:
    n = out.shape[1]
    stations = _stations(partials, 1, n, name, out_name)
    if out.axis1[0] != "col":
        raise PlacementError(f"`{out_name}` must be split over columns of cores along its axis 1, it is not")
    if partials.axis0 != out.axis0:
        raise PlacementError(f"`{name}` and `{out_name}` must have their rows placed alike")
    owners, lines = out.axis1[1], _across(partials, 1, "row")
    events = (
        costs.chain(name, lines * n, stations),
        Event(None, "", "launch", CHAIN_ADD.name, count=int(np.count_nonzero(lines)) * int(stations.size - 1)),
        costs.deliver(out_name, lines, int(stations[-1]), owners.sizes),
    )
    return _ChainRow(stations, owners, lines, events)


@_move
def chain_col(wafer: Wafer, partials: PlacedTensor, out: PlacedTensor, op: ChainOp = "add") -> None:
    """Combine private blocks along every column, north to south; the result stays on the last row that holds one, where `out` lies.

    Order: ``acc = p[r]`` of the first row that holds a partial, then ``acc = acc op p[r]`` for the further ones ascending.

    Parameters
    ----------
    wafer : Wafer
    partials : PlacedTensor, (k * m, n), float32, or int32 for ``or``
        Private ``(m, n_c)`` blocks on k rows: rows split by ``Split.uniform(m, wafer.rows)``, or ``at=`` the rows that take part.
    out : PlacedTensor, (m, n)
        Written; rows ``Split.single(m, last row that takes part, wafer.rows)``, columns as in `partials`.
    op : {"add", "max", "or"}
        ``add`` rounds to float32; ``max`` is exact, and a NaN stays; ``or`` is bitwise.
    """
    _check(wafer, partials, out, "partials")
    if op not in _STATION:
        raise RouteError(f"`op` must be one of {', '.join(_STATION)}, got {op!r}")
    station, dtype = _STATION[op]
    _check_type(partials, dtype, f"a chain of `{op}`")
    _check_sums(partials)
    plan = _chain_col_plan(partials.placement, out.placement, partials.name, out.name, station.name)
    first_row, last = int(plan.stations[0]), int(plan.stations[-1])
    with wafer.empty("inbox", partials.placement, partials.dtype) as inbox, wafer.sram.code(station.name, station.code_bytes):
        if wafer.cores is None:
            wafer.record(*plan.events)
            if not wafer.is_dry:
                m = out.placement.shape[0]
                whole = _whole(partials)
                total = whole[:m].copy()
                for at in range(1, plan.stations.size):
                    _combine(op, total, whole[at * m : (at + 1) * m])
                to_panels(total, out.placement, out.flat)
                out.settle()
            return
        wafer.check_routes(*plan.events)
        _read(partials.held.values())
        chain, runs = wafer.cores.traffic(), 0
        (acc_name, p_name), axes = station.params, (-1,) if op == "or" else (out.placement.shape[0], -1)
        for col in np.flatnonzero(plan.lines).tolist():
            acc = partials.held[first_row, col].shaped(*axes)
            for row in plan.stations[1:].tolist():
                come = inbox.held[row, col].shaped(*axes)
                wafer.cores.send(chain, acc, [come])
                wafer.cores.run(station, (row, col), {acc_name: come, p_name: partials.held[row, col].shaped(*axes)})
                runs += 1
                acc = come
            out.held[last, col].shaped(*axes).write(acc.read())
        wafer.record(
            chain.event("chain", partials.name, costs.COLORS["chain"]), Event(None, "", "launch", station.name, count=runs)
        )  # fmt: skip


class _ChainCol(NamedTuple):
    stations: Ints
    """Rows that hold a partial, ascending."""
    lines: Ints
    """(cols,) columns of the tensor on each column of cores."""
    events: tuple[Event, ...]


@lru_cache(maxsize=1024)
def _chain_col_plan(partials: Placement, out: Placement, name: str, out_name: str, kernel: str) -> _ChainCol:
    m = out.shape[0]
    stations = _stations(partials, 0, m, name, out_name)
    last = int(stations[-1])
    if out.axis0 != ("row", Split.single(m, last, out.n_rows)):
        raise PlacementError(f"`{out_name}` must lie whole on row {last} of cores, where the chain ends")
    if partials.axis1 != out.axis1:
        raise PlacementError(f"`{name}` and `{out_name}` must have their columns placed alike")
    lines = _across(partials, 0, "col")
    count = int(np.count_nonzero(lines)) * int(stations.size - 1)
    return _ChainCol(stations, lines, (costs.chain(name, lines * m, stations), Event(None, "", "launch", kernel, count=count)))


def _stations(partials: Placement, axis: Literal[0, 1], size: int, name: str, out_name: str) -> Ints:
    """Rows or columns of cores that hold a private block of `size`."""
    grid, split = (partials.axis0, partials.axis1)[axis]
    lines: GridAxis = "row" if axis == 0 else "col"
    used = split.used
    if grid == lines and size and used.size and split == Split.uniform(size, len(split), used):
        return used
    raise PlacementError(
        f"`{name}` must hold one private block of {size} {'rows' if axis == 0 else 'columns'}, as `{out_name}` has, on every {lines} that "
        f"takes part (axis {axis}: `Split.uniform`)"
    )


def _combine(op: ChainOp, total: NDArray[Any], more: NDArray[Any]) -> None:
    """`total` and what comes from the next core, as the fabric combines them: IEEE 754, an infinity or a NaN passes without a word."""
    if op == "add":
        with np.errstate(all="ignore"):
            total += more
    elif op == "max":
        np.copyto(total, more, where=(more > total) | (more != more))
    else:
        total |= more


# ---- from core to core


@_move
def send(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, from_core: tuple[int, int], to_core: tuple[int, int]) -> None:
    """Send one core's block of `source` to another core's block of `out`, along the row first, then along the column.

    Parameters
    ----------
    wafer : Wafer
    source, out : PlacedTensor
        The block of `out` is written; no other core may hold a replica of it. Both may be one tensor.
    from_core, to_core : tuple of int
        (row, column). A core that sends to itself copies, and nothing moves.

    Raises
    ------
    RouteError
        If a core lies off the grid, or the two blocks differ in shape or type.
    PlacementError
        If the block of `out` has replicas.
    """
    _check(wafer, source, out, "source", same=True)
    start, end = _core(wafer, from_core, "from_core"), _core(wafer, to_core, "to_core")
    shape = source.block_shape(*start)
    if shape != out.block_shape(*end):
        raise RouteError(f"core {end}: `{out.name}` {out.block_shape(*end)} cannot take `{source.name}` {shape} of core {start}")
    for grid, at, lines in (("row", end[0], wafer.rows), ("col", end[1], wafer.cols)):
        split = out.placement.split_of(grid)  # type: ignore[arg-type]  # the two names
        copies = lines if split is None else int(np.count_nonzero(split.labels == split.labels[at]))
        if copies > 1 and 0 not in shape:
            raise PlacementError(f"core {end}: its block of `{out.name}` has replicas on {copies} {grid}s; they would differ")
    away = start != end and 0 not in shape
    words = int(np.prod(shape)) * _words(source) if away else 0
    hops = abs(start[0] - end[0]) + abs(start[1] - end[1]) if away else 0
    event = costs.moved("send", source.name, count=int(away), words=words, hops=words * hops, max_link=words, max_hops=hops)
    if wafer.cores is None:
        wafer.record(event)
        if not wafer.is_dry:
            out.block(*end)[...] = source.block(*start)
            out.settle()
        return
    wafer.check_routes(event)
    traffic = wafer.cores.traffic()
    if start == end and 0 not in shape:
        out.held[end].write(source.held[start].read())
    elif away:
        wafer.cores.send(traffic, source.held[start], [out.held[end]])
    wafer.record(traffic.event("send", source.name, costs.COLORS["send"]))


@_move
def gather_to_core(wafer: Wafer, source: PlacedTensor, out: PlacedTensor) -> None:
    """Bring all blocks of a tensor to the one core on which `out` lies, along rows first, then along that core's column.

    Parameters
    ----------
    wafer : Wafer
    source : PlacedTensor, (m, n)
        Both axes partitions over the grid.
    out : PlacedTensor, (m, n)
        Written; both axes whole on one core (``Split.single``).
    """
    _check(wafer, source, out, "source")
    core, event = _gather_plan(source.placement, out.placement, source.name, out.name, _words(source))
    if wafer.cores is None:
        wafer.record(event)
        if not wafer.is_dry:
            to_panels(_whole(source), out.placement, out.flat)
            out.settle()
        return
    wafer.check_routes(event)
    _read(source.held.values())
    traffic = wafer.cores.traffic()
    for (row, col), block in source.held.items():
        i0, i1, j0, j1 = source.placement.ranges(row, col)
        target, where = out.held[core].plane, (slice(i0, i1), slice(j0, j1))
        if (row, col) == core:
            target.write(block.plane.read(), where)
        else:
            wafer.cores.send(traffic, block, [target], to=where)
    wafer.record(traffic.event("gather", source.name, costs.COLORS["gather"]))


@lru_cache(maxsize=1024)
def _gather_plan(source: Placement, out: Placement, name: str, out_name: str, words: int) -> tuple[tuple[int, int], Event]:
    _same_shape(source, out, name, out_name)
    at = []
    for grid in _GRID:
        parts, whole = source.split_of(grid), out.split_of(grid)
        if parts is None or not parts.is_partition:
            raise PlacementError(f"`{name}` must be a partition over {grid}s, it has replicas or another order there")
        if whole is None or whole.used.size > 1:
            raise PlacementError(f"`{out_name}` must lie whole on one core; it lies on several {grid}s")
        at.append(int(whole.used[0]) if whole.used.size else 0)
    core = at[0], at[1]
    return core, costs.gather(name, source.row_factor * words, source.col_factor, core)


# ---- what the moves along a line share

_GRID: tuple[GridAxis, GridAxis] = ("row", "col")


class _Line(NamedTuple):
    """A move along every line of cores; a line is a row if the columns are passed, and a column if the rows are."""

    lines: Ints
    """(lines,) words that each line moves in all (0: it takes no part)."""
    source: Split
    """Of the axis that moves, over the positions of a line."""
    targets: Ints
    """Positions that receive."""
    axis: int
    """The tensor axis that moves."""
    event: Event


def _broadcast(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, passed: GridAxis) -> None:
    _check(wafer, source, out, "source")
    plan = _broadcast_plan(source.placement, out.placement, source.name, out.name, passed, _words(source))
    if wafer.cores is None:
        _copy(wafer, source, out, plan.event)
        return
    wafer.check_routes(plan.event)
    _read(source.held.values())
    traffic, targets = wafer.cores.traffic(), plan.targets.tolist()
    for line in np.flatnonzero(plan.lines).tolist():
        at = int(plan.source.used[0])
        block = source.held[_at(passed, line, at)]
        wafer.cores.send(traffic, block, [out.held[_at(passed, line, t)].plane for t in targets if t != at])
        if at in targets:
            out.held[_at(passed, line, at)].plane.write(block.plane.read())
    wafer.record(traffic.event("broadcast", source.name, costs.COLORS["broadcast"]))


@lru_cache(maxsize=1024)
def _broadcast_plan(source: Placement, out: Placement, name: str, out_name: str, passed: GridAxis, words: int) -> _Line:
    axis, split = _moving(source, passed, name)
    if split.used.size > 1:
        raise PlacementError(f"`{name}` must lie whole on one {passed} of cores, it lies on {split.used.size}")
    targets = _receivers(source, out, name, out_name, passed, axis)
    at = int(split.used[0]) if split.used.size else 0
    lines = _across(source, axis, _other(passed)) * (split.total * words)
    return _Line(lines, split, targets, axis, costs.multicast(name, lines, at, targets))


def _all_gather(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, passed: GridAxis) -> None:
    _check(wafer, source, out, "source")
    plan = _all_gather_plan(source.placement, out.placement, source.name, out.name, passed, _words(source))
    if wafer.cores is None:
        _copy(wafer, source, out, plan.event)
        return
    wafer.check_routes(plan.event)
    _read(source.held.values())
    traffic, split = wafer.cores.traffic(), plan.source
    for line in np.flatnonzero(plan.lines).tolist():
        for at in split.used.tolist():
            piece = slice(int(split.starts[at]), int(split.stops[at]))
            where = (piece, slice(None)) if plan.axis == 0 else (slice(None), piece)
            block = source.held[_at(passed, line, at)]
            wafer.cores.send(traffic, block, [out.held[_at(passed, line, t)].plane for t in plan.targets.tolist() if t != at], to=where)
            out.held[_at(passed, line, at)].plane.write(block.plane.read(), where)
    wafer.record(traffic.event("allgather", source.name, costs.COLORS["allgather"]))


@lru_cache(maxsize=1024)
def _all_gather_plan(source: Placement, out: Placement, name: str, out_name: str, passed: GridAxis, words: int) -> _Line:
    axis, split = _moving(source, passed, name)
    if not split.is_partition:
        raise PlacementError(f"`{name}` must be a partition over {passed}s, it has replicas or another order there")
    targets = _receivers(source, out, name, out_name, passed, axis)
    if targets.size < len(split):
        raise PlacementError(
            f"axis {axis} of `{out_name}` must be whole on every core, it lies on {targets.size} of {len(split)} {passed}s"
        )
    across = _across(source, axis, _other(passed))
    widths, counts = np.unique(across[across > 0], return_counts=True)
    groups = [(np.array([w * words]), split.sizes, int(k)) for w, k in zip(widths.tolist(), counts.tolist(), strict=True)]
    return _Line(across * (split.total * words), split, targets, axis, costs.allgather(name, groups))


def _receivers(source: Placement, out: Placement, name: str, out_name: str, passed: GridAxis, axis: int) -> Ints:
    """Positions along a line at which `out` holds the axis whole."""
    _same_shape(source, out, name, out_name)
    mine, theirs = (source.axis0, source.axis1), (out.axis0, out.axis1)
    if mine[1 - axis] != theirs[1 - axis]:
        raise PlacementError(f"axis {1 - axis} of `{name}` and `{out_name}`, which does not move, must be placed alike")
    grid, split = theirs[axis]
    length = source.n_rows if passed == "row" else source.n_cols
    if grid is None:
        return np.arange(length)
    if grid != passed or (split.sizes[split.used] != split.total).any():
        raise PlacementError(
            f"axis {axis} of `{out_name}` must be whole where it lies (None, or `Split.everywhere`), it is split over {grid}s"
        )
    return split.used


def _shift(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, n: int, passed: GridAxis) -> None:
    _check(wafer, source, out, "source")
    if isinstance(n, (bool, np.bool_)) or not isinstance(n, (int, np.integer)):
        raise RouteError(f"`n` must be an integer, got {n!r}")
    n = int(n)
    plan = _shift_plan(source.placement, out.placement, source.name, out.name, passed, _words(source), n)
    length, size = len(plan.source), plan.source.max_size
    if wafer.cores is None:
        wafer.record(plan.event)
        if not wafer.is_dry and abs(n) < length:
            whole, result = (np.moveaxis(_whole(t), plan.axis, 0) for t in (source, out))
            total, step = plan.source.total, n * size
            result[max(step, 0) : total + min(step, 0)] = whole[max(-step, 0) : total - max(step, 0)]
            to_panels(np.moveaxis(result, 0, plan.axis), out.placement, out.flat)
            out.settle()
        return
    wafer.check_routes(plan.event)
    moving = [(core, block) for core, block in source.held.items() if 0 <= core[passed == "col"] + n < length]
    _read(block for _, block in moving)
    traffic = wafer.cores.traffic()
    for (row, col), block in moving:
        target = out.held[(row + n, col) if passed == "row" else (row, col + n)]
        if n:
            wafer.cores.send(traffic, block, [target])
        else:
            target.write(block.plane.read().reshape(target.array.shape))
    wafer.record(traffic.event("shift", source.name, costs.COLORS["shift"]))


@lru_cache(maxsize=1024)
def _shift_plan(source: Placement, out: Placement, name: str, out_name: str, passed: GridAxis, words: int, n: int) -> _Line:
    axis, split = _moving(source, passed, name)
    if source != out:
        raise PlacementError(f"`{name}` and `{out_name}` must be placed alike")
    if not split.is_partition or int(split.sizes.min()) != split.max_size:
        raise PlacementError(
            f"`{name}` must have equal blocks on all {passed}s to be shifted, it has {int(split.sizes.min())}..{split.max_size}"
        )
    across = _across(source, axis, _other(passed))
    event = costs.shift(name, split.sizes * words, across, n)
    return _Line(across * (split.max_size * words), split, np.arange(len(split)), axis, event)


def _copy(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, event: Event) -> None:
    """What a move that changes only the placement leaves in the batched executor."""
    wafer.record(event)
    if not wafer.is_dry:
        to_panels(_whole(source), out.placement, out.flat)
        out.settle()


def _whole(tensor: PlacedTensor) -> NDArray[Any]:
    whole = np.empty(tensor.placement.shape, tensor.dtype)
    from_panels(tensor.flat, tensor.placement, whole)
    return whole


def _moving(place: Placement, passed: GridAxis, name: str) -> tuple[int, Split]:
    """Tensor axis that is split over the positions of a line."""
    for axis, (grid, split) in enumerate((place.axis0, place.axis1)):
        if grid == passed:
            return axis, split
    raise PlacementError(f"`{name}` must be split over {passed}s; it is replicated there")


def _across(place: Placement, axis: int, lines: GridAxis) -> Ints:
    """Elements of the axis that does not move, on every line."""
    grid, split = (place.axis0, place.axis1)[1 - axis]
    if grid is None:
        return np.full(place.n_rows if lines == "row" else place.n_cols, split.total, np.int64)
    return split.sizes


def _at(passed: GridAxis, line: int, position: int) -> tuple[int, int]:
    return (position, line) if passed == "row" else (line, position)


def _other(grid: GridAxis) -> GridAxis:
    return "col" if grid == "row" else "row"


def _words(tensor: PlacedTensor) -> int:
    return tensor.dtype.itemsize // 4


def _read(blocks: Iterable[Block]) -> None:
    """Raise, before anything moves, if an element that would move was never written."""
    for block in blocks:
        block.read()


def _same_shape(source: Placement, out: Placement, name: str, out_name: str) -> None:
    if source.shape != out.shape:
        raise PlacementError(f"`{name}` {source.shape} and `{out_name}` {out.shape} must have one shape")


def _check(wafer: Wafer, source: PlacedTensor, out: PlacedTensor, role: str, *, same: bool = False) -> None:
    for name, tensor in ((role, source), ("out", out)):
        if not isinstance(tensor, PlacedTensor):
            raise RouteError(f"`{name}` must be a placed tensor (`Wafer.place`, `Wafer.empty`), got {type(tensor).__name__}")
        tensor.check_placed(wafer)
    if source is out and not same:
        raise RouteError(f"`{source.name}` cannot be moved onto itself: `{role}` and `out` must be two tensors")
    if source.dtype != out.dtype:
        raise RouteError(f"`{out.name}` {out.dtype} cannot take `{source.name}` {source.dtype}: a move converts nothing")


def _check_type(tensor: PlacedTensor, dtype: type[np.generic], what: str) -> None:
    if tensor.dtype != dtype:
        raise RouteError(f"`{tensor.name}`: {what} takes {np.dtype(dtype)}, got {tensor.dtype}")


def _check_sums(partials: PlacedTensor) -> None:
    if partials.stored is not None:
        raise RouteError(f"`{partials.name}`: partial results are chained in float32, got {partials.stored}; leave `stored` out")


def _core(wafer: Wafer, core: tuple[int, int], name: str) -> tuple[int, int]:
    at = tuple(core) if isinstance(core, (tuple, list)) else ()
    if len(at) != 2 or any(isinstance(i, (bool, np.bool_)) or not isinstance(i, (int, np.integer)) for i in at):
        raise RouteError(f"`{name}` must be (row, column), two integers, got {core!r}")
    row, col = int(at[0]), int(at[1])
    if not (0 <= row < wafer.rows and 0 <= col < wafer.cols):
        raise RouteError(f"core ({row}, {col}) is off the grid of {wafer.rows} x {wafer.cols} cores")
    return row, col

"""Per-core SRAM: what lies on every core, the high-water mark, and refusal of what does not fit.

Block sizes factor over rows and columns (``itemsize * row_factor[r] * col_factor[c]``), so the account is kept per *class* of rows and
columns that never differed in any block: a handful of numbers, also for the full wafer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import SramOverflowError, SramStateError
from wse_emu.foundation.wafer_spec import WaferSpec
from wse_emu.wafer.turn import Turn, in_turn

Ints = NDArray[np.int64]


class Reservation(NamedTuple):
    """Handle of one allocated tensor."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class SramMap:
    """What lies on one core."""

    row: int
    col: int
    used_bytes: int
    capacity_bytes: int
    blocks: tuple[tuple[str, int], ...]
    """(name, bytes) of every block, code first, then in order of allocation; empty blocks are left out."""

    def __str__(self) -> str:
        lines = [f"core ({self.row}, {self.col}): {self.used_bytes} of {self.capacity_bytes} bytes"]
        blocks = numbered_runs(self.blocks)
        width = max((len(name) for name, _ in blocks), default=0)
        lines += [f"  {name:<{width}}  {size:>8}" for name, size in blocks]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class SramMark:
    """What lay on the wafer at one moment."""

    ids: frozenset[int]
    kernel_code: int


def numbered_runs(blocks: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """For people: neighbouring blocks of one size whose names only count on, together in one line.

    >>> numbered_runs([("keys of layer 0", 8), ("keys of layer 1", 8), ("logits", 4)])
    [('keys of layer 0..1 (2 x 8)', 16), ('logits', 4)]
    """
    lines: list[tuple[str, int]] = []
    for (stem, size, _), group in groupby(zip(count(), blocks, strict=False), _counts_on):
        names = [name for _, (name, _) in group]
        one = names[0] if len(names) == 1 else f"{names[0]}..{names[-1][len(stem) :]} ({len(names)} x {size})"
        lines.append((one, len(names) * size))
    return lines


def _counts_on(entry: tuple[int, tuple[str, int]]) -> tuple[str, int, int]:
    """Equal for neighbours of `numbered_runs` that belong together: their numbers and their indices rise alike."""
    index, (name, size) = entry
    stem = name.rstrip("0123456789")
    number = name[len(stem) :]
    return (stem, size, int(number) - index) if number else (name, size, -index - 1)


_Kind = tuple[bytes, bytes, int]
"""What decides how many bytes of a tensor lie where: row factors, column factors, bytes of an element."""
_MOST_LEVELS = 4096


class _Classes:
    """Labels of positions along one grid axis: two positions share a label while no factor told them apart."""

    def __init__(self, n: int) -> None:
        self.labels: Ints = np.zeros(n, np.int64)
        self.first: Ints = np.zeros(1, np.int64)
        self._seen: dict[bytes, Ints] = {}

    def values(self, factor: Ints) -> tuple[Ints, Ints | None]:
        """Factor per class, and the old class of each new one if `factor` splits classes (else None)."""
        key = factor.tobytes()
        known = self._seen.get(key)
        if known is not None:
            return known, None
        value = factor[self.first]
        parents = None
        if not np.array_equal(value[self.labels], factor):
            pairs = np.stack([self.labels, factor])
            _, first, labels = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
            parents = self.labels[first]
            self.labels, self.first = labels.reshape(-1).astype(np.int64), first.astype(np.int64)
            self._seen = {k: v[parents] for k, v in self._seen.items()}
            value = factor[self.first]
        self._seen[key] = value
        return value, parents


class _Level:
    """Bytes of tensors per class of cores at one moment, and what came after it: a run that repeats itself goes the same way again."""

    __slots__ = ("after", "before", "passed", "peak", "used")

    def __init__(self, used: Ints) -> None:
        self.used = used
        self.peak = int(used.max())
        """Most bytes of tensors on a core."""
        self.after: dict[_Kind, _Level] = {}
        """What it became when a tensor of some kind was placed."""
        self.before: dict[_Kind, _Level] = {}
        """And when one was freed."""
        self.passed: dict[Hashable, Any] = {}
        """Programs that began and ended here, each with what its owner notes of it."""


class SramTracker:
    """Account of every core's SRAM.

    Parameters
    ----------
    spec : WaferSpec
        Gives the capacity and the code that lies on every core.
    n_rows, n_cols : int
        The grid.
    turn : Turn, optional
        The wafer's: one thread at a time changes the account, and while a kernel's code lies there nobody else does.
    """

    def __init__(self, spec: WaferSpec, n_rows: int, n_cols: int, turn: Turn | None = None) -> None:
        self.turn = turn or Turn()
        self.capacity = spec.sram_bytes_per_core
        self._rows = _Classes(n_rows)
        self._cols = _Classes(n_cols)
        self._base_code = spec.base_code_bytes
        self._kernel_code = 0
        self._ids = count()
        self._live: dict[int, tuple[str, Ints, Ints, int, _Kind]] = {}
        self._levels: dict[bytes, _Level] = {}
        self._level = self._level_with(np.zeros((1, 1), np.int64))
        self._sizes: dict[_Kind, Ints] = {}
        """Bytes per class of cores of every kind of tensor that was placed."""
        self.high_water_bytes = self._base_code
        """Most bytes that any core held at once, code included."""
        self.high_water_map: SramMap | None = None
        """What lay on the worst core at that moment."""
        self._high_water: tuple[Ints, Ints, Ints] = (self._level.used, self._rows.labels, self._cols.labels)
        """Bytes of tensors per class of cores at that moment, and the classes of rows and of columns."""

    @property
    def high_water_by_core(self) -> Ints:
        """(rows, cols) bytes of every core at the moment of the high-water mark, code included; made anew at each call."""
        used, rows, cols = self._high_water
        return used[np.ix_(rows, cols)] + (self.high_water_bytes - int(used.max()))

    @property
    def live(self) -> tuple[str, ...]:
        """Names of the tensors on the wafer, in order of allocation."""
        return tuple(entry[0] for entry in self._live.values())

    @in_turn
    def allocate(
        self, name: str, row_factor: Ints, col_factor: Ints, itemsize: int, factor_bytes: tuple[bytes, bytes] | None = None
    ) -> Reservation:
        """Reserve ``itemsize * row_factor[r] * col_factor[c]`` bytes on every core (r, c), rounded up to whole 4-byte words.

        `factor_bytes` are the bytes of both factors, if they are at hand.

        Raises
        ------
        SramOverflowError
            If a core has not that much left; nothing is reserved then.
        """
        rows, cols = factor_bytes or (row_factor.tobytes(), col_factor.tobytes())
        kind = rows, cols, itemsize
        level = self._level.after.get(kind)
        if level is None:
            size = self._block_bytes(row_factor, col_factor, itemsize)  # may tell classes apart: the level is another one then
            level = self._level.after[kind] = self._level_with(self._level.used + size)
        if level.peak + self._base_code + self._kernel_code > self.capacity:
            self._refuse(name, level.used, self._block_bytes(row_factor, col_factor, itemsize))
        self._level = level
        reservation = Reservation(next(self._ids), name)
        self._live[reservation.id] = (name, row_factor, col_factor, itemsize, kind)
        self._note(level.peak)
        return reservation

    @in_turn
    def free(self, reservation: Reservation) -> None:
        """Give a tensor's bytes back.

        Raises
        ------
        SramStateError
            If it is not on the wafer (freed before).
        """
        entry = self._live.pop(reservation.id, None)
        if entry is None:
            raise SramStateError(f"`{reservation.name}` is not on the wafer: it was freed before")
        _, row_factor, col_factor, itemsize, kind = entry
        level = self._level.before.get(kind)
        if level is None:
            size = self._block_bytes(row_factor, col_factor, itemsize)
            level = self._level.before[kind] = self._level_with(self._level.used - size)
        self._level = level

    @contextmanager
    def reserved(self, name: str, row_factor: Ints, col_factor: Ints, itemsize: int) -> Iterator[None]:
        """Reserve bytes as `allocate` does, for the block's duration."""
        reservation = self.allocate(name, row_factor, col_factor, itemsize)
        try:
            yield
        finally:
            self.free(reservation)

    @contextmanager
    def code(self, name: str, code_bytes: int) -> Iterator[None]:
        """Hold a kernel's code beside the base code while it runs."""
        with self.turn.lock:
            before = self._kernel_code
            self._kernel_code = code_bytes
            try:
                used, peak = self._level.used, self._level.peak
                if peak + self._base_code + code_bytes > self.capacity:
                    self._kernel_code = 0  # the map shows what lies there without the code that is asked for
                    self._refuse(f"code of {name}", used + code_bytes, np.full_like(used, code_bytes))
                self._note(peak)
                yield
            finally:
                self._kernel_code = before

    def passed(self, program: Hashable) -> Any:
        """The note of a program that frees all it reserves and began from exactly this account before; None for any other.

        It reaches no new high-water mark then.
        """
        return self._level.passed.get((self._kernel_code, program))

    def pass_through(self, program: Hashable, note: Any) -> None:
        """Say that a program began at the present account and ended there; `note` is anything but None."""
        passed = self._level.passed
        if len(passed) >= _MOST_LEVELS:
            passed.clear()
        passed[self._kernel_code, program] = note

    def mark(self) -> SramMark:
        """What lies on the wafer now, for `back_to`."""
        return SramMark(frozenset(self._live), self._kernel_code)

    def back_to(self, mark: SramMark) -> None:
        """Give back everything that was reserved after the mark; the account is made anew, for it may have been left half written."""
        self._live = {id_: entry for id_, entry in self._live.items() if id_ in mark.ids}
        self._kernel_code = mark.kernel_code
        self._rows, self._cols = _Classes(self._rows.labels.size), _Classes(self._cols.labels.size)
        self._sizes.clear()
        self._set_used(np.zeros((1, 1), np.int64))
        for _, row_factor, col_factor, itemsize, _ in self._live.values():
            size = self._block_bytes(row_factor, col_factor, itemsize)  # may tell classes apart: the level is another one then
            self._level = self._level_with(self._level.used + size)

    def used_bytes(self) -> int:
        """Bytes on the fullest core now, code included."""
        return self._level.peak + self._base_code + self._kernel_code

    def core_map(self, row: int, col: int) -> SramMap:
        """What lies on core (row, col) now."""
        blocks = [("base code", self._base_code)]
        if self._kernel_code:
            blocks.append(("kernel code", self._kernel_code))
        for name, row_factor, col_factor, itemsize, _ in self._live.values():
            size = _words(int(row_factor[row]) * int(col_factor[col]) * itemsize)
            if size:
                blocks.append((name, size))
        return SramMap(row, col, sum(size for _, size in blocks), self.capacity, tuple(blocks))

    def worst_core(self) -> tuple[int, int]:
        """(row, col) of a core that holds the most."""
        return self._worst(self._level.used)

    def _block_bytes(self, row_factor: Ints, col_factor: Ints, itemsize: int) -> Ints:
        kind = row_factor.tobytes(), col_factor.tobytes(), itemsize
        known = self._sizes.get(kind)
        if known is not None:
            return known
        rows, parents = self._rows.values(row_factor)
        if parents is not None:
            self._set_used(self._level.used[parents, :])
        cols, parents = self._cols.values(col_factor)
        if parents is not None:
            self._set_used(self._level.used[:, parents])
        size = self._sizes[kind] = _round_words(np.multiply.outer(rows, cols) * itemsize)
        return size

    def _set_used(self, used: Ints) -> None:
        """Go on with other classes of cores: nothing that was known about the old ones holds."""
        self._sizes.clear()
        self._levels.clear()
        self._level = self._level_with(used)

    def _level_with(self, used: Ints) -> _Level:
        """The level with these bytes per class."""
        key = used.tobytes()
        level = self._levels.get(key)
        if level is None:
            if len(self._levels) >= _MOST_LEVELS:
                self._levels.clear()
            level = self._levels[key] = _Level(used)
        return level

    def _worst(self, used: Ints) -> tuple[int, int]:
        row, col = np.unravel_index(int(used.argmax()), used.shape)
        return int(self._rows.first[row]), int(self._cols.first[col])

    def _refuse(self, name: str, used: Ints, size: Ints) -> NoReturn:
        row, col = self._worst(used)
        need = int(size.ravel()[int(used.argmax())])
        lies = self.core_map(row, col)
        free = max(0, self.capacity - lies.used_bytes)
        asked = SramMap(row, col, lies.used_bytes + need, self.capacity, (*lies.blocks, (f"{name} (does not fit)", need)))
        raise SramOverflowError(
            f"core ({row}, {col}): `{name}` needs {need} bytes, {free} of {self.capacity} are free; "
            f"use more rows or columns, shorter prompt chunks, or fewer tokens\n{asked}",
            core_map=asked,
        )

    def _note(self, peak: int) -> None:
        now = peak + self._base_code + self._kernel_code
        if now > self.high_water_bytes or self.high_water_map is None:
            self.high_water_bytes = now
            self.high_water_map = self.core_map(*self.worst_core())
            self._high_water = (self._level.used, self._rows.labels, self._cols.labels)


def _words(n: int) -> int:
    return -(-n // 4) * 4


def _round_words(n: Ints) -> Ints:
    return -(-n // 4) * 4

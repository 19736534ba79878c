"""Cores one at a time: every core's SRAM is a byte arena of its own, and data moves between arenas only as messages.

This is the machine behind the ``isolated`` and ``interpreted`` executors. Fresh memory is poisoned (NaN, or the largest integer) and
every element carries a *defined* flag, so that reading what no kernel and no message wrote raises, at the core and block concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wse_emu.foundation.errors import KernelError, RouteError, SramOverflowError, UninitializedReadError, WseError
from wse_emu.foundation.precision import HalfType
from wse_emu.foundation.wafer_spec import WaferSpec
from wse_emu.wafer.kernel import Core, Kernel
from wse_emu.wafer.storage import HALF_BYTES, nearest
from wse_emu.wafer.traffic import Traffic
from wse_kernels._jit import COMPILE_ERRORS

Slices = tuple[slice | NDArray[np.int64], ...] | slice

WHOLE: slice = slice(None)
_POISON = {
    np.dtype(np.float32): np.array([0x7FC0D1AD], np.uint32).view(np.float32)[0],
    np.dtype(np.float64): np.array([0x7FF8D1ADD1ADD1AD], np.uint64).view(np.float64)[0],
}
"""NaNs that no arithmetic makes of its own: an output that still holds one was not written."""
_GRAIN = 4
"""Bytes to which the size of a block is rounded up."""
_HELD = 4 // HALF_BYTES
"""Bytes of the host for one of SRAM: a number of 16 bits is held as a float32."""


class Borrow(Protocol):
    """Gives work blocks."""

    def __call__(
        self, core: tuple[int, int], name: str, shape: tuple[int, ...], dtype: DTypeLike, stored: HalfType | None = None
    ) -> Block:
        """A block on a core."""


class Block:
    """One core's piece of a tensor: a view of the core's arena, and which elements have been written.

    Where it holds numbers of 16 bits (`stored`), whatever is written to it is rounded to them.
    """

    __slots__ = ("__weakref__", "_derive", "_parts", "array", "core", "defined", "name", "start", "stored")

    def __init__(self, core: tuple[int, int], name: str, start: int, array: NDArray[Any], stored: HalfType | None = None) -> None:
        self.core = core
        self.name = name
        self.start = start
        self.array = array
        self.stored = stored
        self.defined: NDArray[np.bool_] = np.zeros(array.shape, np.bool_)
        self._derive: Callable[[NDArray[Any]], NDArray[Any]] | None = None
        self._parts: WeakSet[Block] = WeakSet()
        self.poison()

    def poison(self, where: Slices = WHOLE) -> None:
        """Make the content undefined again."""
        kind = self.array.dtype.kind
        poison = _POISON.get(self.array.dtype, np.nan) if kind == "f" else True if kind == "b" else np.iinfo(self.array.dtype).max
        self.array[where] = poison
        self.defined[where] = False

    @property
    def n_bytes(self) -> int:
        """Bytes of SRAM that it takes."""
        return self.array.size * (self.array.itemsize if self.stored is None else HALF_BYTES)

    def settle(self) -> None:
        """After a kernel that writes the block: what it left untouched stays undefined, as far as that can be told (floating point)."""
        poison = _POISON.get(self.array.dtype)
        if poison is None or self.defined.all():
            self.defined.fill(True)
        else:
            bits = f"u{self.array.itemsize}"
            self.defined |= self.array.view(bits) != poison.view(bits)
        if self.stored is not None:
            self.array[self.defined] = self._rounded(self.array[self.defined])

    def _rounded(self, value: Any) -> Any:
        """`value` as SRAM takes it."""
        if self.stored is None:
            return value
        return nearest(np.asarray(value, np.float32), self.stored, f"core {self.core}: `{self.name}`")

    def prefix(self, *shape: int) -> Block:
        """A poisoned block of `shape` in the first bytes of this one."""
        n = int(np.prod(shape))
        part = self._part(lambda array: array.reshape(-1)[:n].reshape(shape))
        part.defined = np.zeros(shape, np.bool_)
        part.poison()
        return part

    def view(self, where: slice) -> Block:
        """The leading-axis slice `where` as a block that shares memory and flags with this one."""
        part = self._part(lambda array: array[where])
        part.defined = self.defined[where]
        return part

    def shaped(self, *shape: int) -> Block:
        """The block with other axes; memory and flags are shared."""
        part = self._part(lambda array: array.reshape(shape))
        part.defined = self.defined.reshape(shape)
        return part

    @property
    def plane(self) -> Block:
        """The block with two axes: a vector is one row."""
        return self if self.array.ndim == 2 else self.shaped(1, self.array.size)

    def _part(self, derive: Callable[[NDArray[Any]], NDArray[Any]]) -> Block:
        """A block in this one's memory, which follows it when the arena moves it."""
        part = object.__new__(Block)
        part.core, part.name, part.start, part.stored = self.core, self.name, self.start, self.stored
        part._parts = self._parts  # all parts of a block, and theirs, are found from the block itself
        part._derive, before = derive, self._derive
        if before is not None:
            part._derive = lambda array: derive(before(array))
        part.array = derive(self.array)
        self._parts.add(part)
        return part

    def moved(self, start: int, array: NDArray[Any]) -> None:
        """The arena moved the block: it lies in `array` now, and its parts with it."""
        self.start, self.array = start, array
        for part in self._parts:
            assert part._derive is not None
            part.start, part.array = start, part._derive(array)

    def read(self, where: Slices = WHOLE) -> NDArray[Any]:
        """View of defined elements.

        Raises
        ------
        UninitializedReadError
            If any of them was never written.
        """
        if not self.defined[where].all():
            raise UninitializedReadError(
                f"core {self.core}: `{self.name}` is read, but {int((~self.defined[where]).sum())} of its "
                f"{self.defined[where].size} elements were written by no kernel and no message"
            )
        view: NDArray[Any] = self.array[where]
        return view

    def write(self, value: Any, where: Slices = WHOLE) -> None:
        """Store `value` and mark the elements as defined."""
        self.array[where] = self._rounded(value)
        self.defined[where] = True


class Arena:
    """SRAM of one core, without its code; blocks are carved first-fit and moved together when free bytes lie scattered.

    Addresses and sizes are bytes of SRAM. Each stands for two bytes of the host, for a number of 16 bits is held as a float32.
    """

    def __init__(self, core: tuple[int, int], spec: WaferSpec) -> None:
        self.core = core
        self._size = (spec.sram_bytes_per_core - spec.base_code_bytes) // _GRAIN * _GRAIN
        self._memory = np.zeros(_HELD * self._size, np.uint8)
        self._blocks: list[Block] = []

    def allocate(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, stored: HalfType | None = None) -> Block:
        """Carve a poisoned block; alignment is that of the element type. With `stored` its float32 numbers are of that format."""
        dtype = np.dtype(dtype)
        size = _whole_words(int(np.prod(shape)) * (dtype.itemsize if stored is None else HALF_BYTES))
        start = self._find(size, dtype.itemsize)
        if start is None:
            self._compact()
            start = self._find(size, dtype.itemsize)
        if start is None:
            raise SramOverflowError(
                f"core {self.core}: `{name}` needs {size} bytes; blocks hold {sum(map(_size, self._blocks))} of {self._size}"
            )
        block = Block(self.core, name, start, self._view(start, shape, dtype), stored)
        self._blocks.append(block)
        self._blocks.sort(key=lambda b: b.start)
        return block

    def free(self, block: Block) -> None:
        """Give a block's bytes back, poisoned."""
        block.poison()
        self._blocks.remove(block)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What lies in the arena, in order of address."""
        return tuple(self._blocks)

    def keep(self, blocks: Iterable[Block]) -> None:
        """Give back every block but these."""
        self._blocks = sorted(blocks, key=lambda b: b.start)

    def _view(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._memory[_HELD * start : _HELD * start + size].view(dtype).reshape(shape)

    def _find(self, size: int, alignment: int) -> int | None:
        at = 0
        for block in self._blocks:
            if block.start - at >= size:
                return at
            at = max(at, -(-(block.start + _size(block)) // alignment) * alignment)
        return at if self._size - at >= size else None

    def _compact(self) -> None:
        """Blocks of 8-byte elements to the low end, the others to the high end: no byte is lost to alignment between them."""
        low, high = 0, self._size
        contents = [block.array.copy() for block in self._blocks]
        for block, content in zip(self._blocks, contents, strict=True):
            size = _size(block)
            if content.itemsize > _GRAIN:
                start, low = low, low + size
            else:
                start = high = high - size
            block.moved(start, self._view(start, content.shape, content.dtype))
            block.array[...] = content
        self._blocks.sort(key=lambda b: b.start)


def _size(block: Block) -> int:
    return _whole_words(block.n_bytes)


def _whole_words(n_bytes: int) -> int:
    return -(-n_bytes // _GRAIN) * _GRAIN


class Cores:
    """All arenas of a grid, the kernels that run on them and the messages between them."""

    def __init__(self, spec: WaferSpec, n_rows: int, n_cols: int, *, interpreted: bool) -> None:
        self.shape = (n_rows, n_cols)
        self.interpreted = interpreted
        self._spec = spec
        self._arenas: dict[tuple[int, int], Arena] = {}

    def arena(self, row: int, col: int) -> Arena:
        """Arena of core (row, col)."""
        arena = self._arenas.get((row, col))
        if arena is None:
            arena = self._arenas[row, col] = Arena((row, col), self._spec)
        return arena

    def mark(self) -> dict[tuple[int, int], tuple[Block, ...]]:
        """What lies in every arena now, for `back_to`."""
        return {core: arena.blocks for core, arena in self._arenas.items()}

    def back_to(self, mark: Mapping[tuple[int, int], Iterable[Block]]) -> None:
        """Give back every block that was carved after the mark."""
        for core, arena in self._arenas.items():
            arena.keep(mark.get(core, ()))

    @contextmanager
    def borrowing(self) -> Iterator[Borrow]:
        """Work blocks that live as long as the ``with`` block: it gives a function ``borrow(core, name, shape, dtype, stored)``."""
        held: list[Block] = []

        def borrow(
            core: tuple[int, int], name: str, shape: tuple[int, ...], dtype: DTypeLike, stored: HalfType | None = None
        ) -> Block:
            held.append(self.arena(*core).allocate(name, shape, dtype, stored))
            return held[-1]

        try:
            yield borrow
        finally:
            for block in held:
                self.arena(*block.core).free(block)

    def traffic(self) -> Traffic:
        """A fresh counter for one move."""
        return Traffic(*self.shape)

    def run(self, kernel: Kernel, core: tuple[int, int], args: Mapping[str, Any]) -> int:
        """Run a kernel's body on blocks of one core; returns the multiply-adds done.

        `args` maps parameter names to `Block` or scalars; a plain array is a constant that the core makes itself (an index ramp).

        Raises
        ------
        UninitializedReadError
            If an argument that the kernel reads holds undefined elements.
        KernelError
            If a block lies on another core, the body wrote to a read-only argument, or it left a block.
        """
        values: list[Any] = []
        shapes: dict[str, Any] = {}
        guarded: list[tuple[str, NDArray[Any], NDArray[Any]]] = []
        for name in kernel.params:
            arg = args[name]
            if not isinstance(arg, Block):
                values.append(arg)
                shapes[name] = arg.shape if isinstance(arg, np.ndarray) else arg
                continue
            if arg.core != core:
                raise KernelError(f"kernel `{kernel.name}` on core {core}: `{name}` lies on core {arg.core}; move it over the fabric first")
            shapes[name] = arg.array.shape
            if name in kernel.scratch:
                arg.poison()
            elif name not in kernel.out:
                arg.read()
                if name not in kernel.inout:
                    guarded.append((name, arg.array, arg.array.copy()))
                    if kernel.guarded:
                        values.append(arg.array.view())
                        values[-1].flags.writeable = False
                        continue
            values.append(arg.array)
        if kernel.takes_core:
            values.insert(0, Core(core[0], core[1], *self.shape))
        try:
            macs = kernel.run(values, shapes, interpreted=self.interpreted)
        except IndexError as error:
            raise KernelError(f"kernel `{kernel.name}` on core {core}: {error}; its blocks are {shapes}") from error
        except Exception as error:
            if isinstance(error, (WseError, *COMPILE_ERRORS)):
                raise
            raise kernel.failed(error, f" on core {core}") from error
        for name, array, before in guarded:
            if not np.array_equal(array.view(np.uint8), before.view(np.uint8)):
                raise KernelError(f"kernel `{kernel.name}` wrote to `{name}`, which is read-only: name it in `out`")
        for name in (*kernel.out, *kernel.inout):
            args[name].settle()
        return macs

    def send(
        self,
        traffic: Traffic,
        source: Block,
        targets: Sequence[Block],
        *,
        where: Slices = WHOLE,
        to: Slices | Callable[[Block], Slices] = WHOLE,
    ) -> None:
        """Copy elements of `source` to the arenas of `targets` as one message (a multicast if there are several targets).

        Raises
        ------
        UninitializedReadError
            If the source elements are undefined.
        RouteError
            If a target's elements have another shape or type.
        """
        payload = source.read(where).copy()
        if payload.size == 0 or not targets:
            return
        traffic.message(source.core, [t.core for t in targets], payload.nbytes)
        self.deliver(payload, targets, to)

    def from_edge(
        self, traffic: Traffic, payload: NDArray[Any], col: int, targets: Sequence[Block], to: Slices = WHOLE, *, skip_zeros: bool = False
    ) -> None:
        """Bring host data in at the north end of column `col` and copy it to `targets`, which lie on that column.

        With `skip_zeros` elements whose bits are all zero stay at the host: a target is cleared before the others arrive.
        """
        if payload.size == 0 or not targets:
            return
        n = np.count_nonzero(payload.view(f"u{payload.itemsize}")) if skip_zeros else payload.size
        traffic.message((0, col), [t.core for t in targets], int(n) * payload.itemsize)
        self.deliver(payload, targets, to)

    def to_edge(self, traffic: Traffic, source: Block, where: Slices = WHOLE) -> NDArray[Any]:
        """Take elements of `source` out at the north end of its column."""
        payload = source.read(where).copy()
        if payload.size:
            traffic.message(source.core, [(0, source.core[1])], payload.nbytes)
        return payload

    def deliver(self, payload: NDArray[Any], targets: Iterable[Block], to: Slices | Callable[[Block], Slices]) -> None:
        """Write a message's payload into the arenas of its targets; every byte that a core receives passes here."""
        for target in targets:
            where = to(target) if callable(to) else to
            into = target.array[where]
            if into.size != payload.size or into.dtype != payload.dtype:
                raise RouteError(
                    f"core {target.core}: a message of {payload.size} x {payload.dtype} does not fit `{target.name}` "
                    f"({into.size} x {into.dtype})"
                )
            target.write(payload.reshape(into.shape), where)

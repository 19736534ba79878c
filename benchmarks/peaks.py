"""What this machine does at best, measured: multiply-adds in registers and in `numpy.matmul`, and bytes read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.matmul_tile import COLS, ROWS, add_tiles, fma_step, load_tile, store_tile, zero_tile
from wse_kernels.threads import in_parts, n_threads

F32 = NDArray[np.float32]

_TILE = ROWS * COLS
_STEPS = 16
"""Multiply-adds of a tile with other operands each, all of them in the first-level cache."""
_BLOCK_BYTES = 16 << 10
"""A block that one core of a wafer could hold."""
_MEMORY_BYTES = 256 << 20
"""More than any cache holds."""
_MIN_CALLS, _BUDGET_SECONDS = 5, 0.5


class Peak(NamedTuple):
    """Two rates; work is bound by the one that takes it longer."""

    flops: float
    """float32 operations per second; a multiply-add is two."""
    bytes: float
    """Bytes read per second."""

    def least_seconds(self, macs: int, n_bytes: int) -> tuple[float, str]:
        """Least time for some work, and which rate bounds it (empty if it is neither)."""
        bounds = {"flops": 2 * macs / self.flops, "bytes": n_bytes / self.bytes}
        bound = max(bounds, key=lambda name: bounds[name])
        return bounds[bound], bound if bounds[bound] else ""

    def better(self, other: Peak) -> Peak:
        """The higher of both rates each."""
        return Peak(max(self.flops, other.flops), max(self.bytes, other.bytes))


class Machine(NamedTuple):
    """Peaks of one thread on a block in its cache, and of all threads on memory."""

    core: Peak
    whole: Peak

    def better(self, other: Machine) -> Machine:
        """The better of two measurements of each peak."""
        return Machine(self.core.better(other.core), self.whole.better(other.whole))


@kernel()
def _multiply(part: int, n_parts: int, a: F32, w: F32, out: F32, n_rounds: int) -> None:
    """Multiply-adds of a register tile with operands that stay in the first-level cache; every part does them all."""
    p = zero_tile()
    for _ in range(n_rounds):
        for k in range(_STEPS):
            p = fma_step(p, a, k * ROWS, w, k * COLS)
    store_tile(p, out, part * _TILE)


@kernel()
def _read(part: int, n_parts: int, x: F32, out: F32, n_rounds: int) -> None:
    """Add up whole tiles of `x`, each part its own share of them."""
    n_tiles = x.shape[0] // _TILE
    total = zero_tile()
    for _ in range(n_rounds):
        for i in range(part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts):
            total = add_tiles(total, load_tile(x, i * _TILE))
    store_tile(total, out, part * _TILE)


def measure_machine(*, smoke: bool) -> Machine:
    """Measure every peak: the shortest of as many short calls as half a second has."""
    threads, rounds = n_threads(), 1 if smoke else 4_000
    a, w = np.ones(_STEPS * ROWS, np.float32), np.ones(_STEPS * COLS, np.float32)
    out = np.zeros(threads * _TILE, np.float32)
    block = np.ones(_BLOCK_BYTES // 4, np.float32)
    memory = np.ones((1 << 20 if smoke else _MEMORY_BYTES) // 4, np.float32)
    n = 64 if smoke else 2048
    matrix, product = np.ones((n, n), np.float32), np.empty((n, n), np.float32)

    def rate(call: Callable[[], object], amount: float) -> float:
        call()
        took = [_seconds(call)]
        while not smoke and (len(took) < _MIN_CALLS or sum(took) < _BUDGET_SECONDS):
            took.append(_seconds(call))
        return amount / min(took)

    def in_registers(parts: int) -> float:
        return rate(lambda: in_parts(_multiply, parts, (a, w, out, rounds)), 2 * _TILE * _STEPS * rounds * parts)

    def reading(x: F32, n_rounds: int, parts: int) -> float:
        return rate(lambda: in_parts(_read, parts, (x, out, n_rounds)), 4 * (x.size // _TILE) * _TILE * n_rounds)

    of_matmul = rate(lambda: np.matmul(matrix, matrix, out=product), 2 * n**3)
    return Machine(
        core=Peak(in_registers(1), reading(block, 1 if smoke else 2000, 1)),
        whole=Peak(max(of_matmul, in_registers(threads)), reading(memory, 1, threads)),
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

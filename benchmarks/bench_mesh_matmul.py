"""Matrix products over wafer columns beside `numpy.matmul`: the shapes of a mid-size mixture of experts, prefill and decode.

    python benchmarks/bench_mesh_matmul.py           # table, both sides in one run
    pytest benchmarks/bench_mesh_matmul.py           # the emulator's side, under pytest-benchmark

Every result is checked against the float64 product before it is timed. With few rows the weights, not the arithmetic, are the work: they
are then taken from a buffer larger than any cache, another copy for each call. The two sides run in turns, with a pause between:
the idle threads of either library spin for a while, which slows the other down. Seconds of the host: they say nothing about a wafer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from wse_kernels.matmul import COMBINE, STORE, SWIGLU, WEIGHT_TILE_COLS, mesh_matmul

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

COLD_BYTES = 200 << 20
"""Size of the weight buffer where weights must come from memory."""
MOST_COLD_ROWS = 16
"""Products of no more rows than this take their weights from memory."""
TURNS, PAUSE_SECONDS = 3, 0.2
UNIT_ROUNDOFF = 2.0**-24


class Shape(NamedTuple):
    """One product: `m` of `n_rows` tokens, (n_in, n_out) weights, wafer columns."""

    name: str
    n_rows: int
    m: int
    n_in: int
    n_out: int
    n_cols: int
    mode: int = STORE

    def __str__(self) -> str:
        return f"{self.name}: {self.m} x {self.n_in} x {self.n_out}, {self.n_cols} columns"


SHAPES = (
    Shape("prefill qkv", 512, 512, 1024, 1536, 32),
    Shape("prefill out", 512, 512, 1024, 1024, 32),
    Shape("prefill router", 512, 512, 1024, 8, 32),
    Shape("prefill gate/up", 512, 128, 1024, 3584, 32, SWIGLU),
    Shape("prefill down", 512, 128, 1792, 1024, 32, COMBINE),
    Shape("cube", 1024, 1024, 1024, 1024, 16),
    Shape("cube", 1024, 1024, 1024, 1024, 762),
    Shape("decode qkv", 1, 1, 1024, 1536, 32),
    Shape("decode gate/up", 1, 1, 1024, 3584, 32, SWIGLU),
    Shape("decode gate/up", 1, 1, 1024, 3584, 762, SWIGLU),
    Shape("decode down", 1, 1, 1792, 1024, 32, COMBINE),
    Shape("decode head", 1, 1, 1024, 32000, 32),
    Shape("decode of two", 2, 2, 1024, 3584, 32, SWIGLU),
    Shape("decode of eight", 8, 8, 1024, 3584, 32, SWIGLU),
)

Call = Callable[[], object]


def split(n: int, n_cols: int) -> I64:
    """Balanced split of n features."""
    return np.arange(n_cols + 1, dtype=np.int64) * n // n_cols


def place(x: F32, starts: I64) -> F32:
    """Column-panel-major copy of a matrix."""
    return np.concatenate([x[:, a:b].ravel() for a, b in pairwise(starts)])


def unplace(flat: F32, n_rows: int, starts: I64) -> F32:
    """Matrix held by a column-panel-major buffer."""
    return np.hstack([flat[n_rows * a : n_rows * b].reshape(n_rows, b - a) for a, b in pairwise(starts)])


def check(shape: Shape, x: F32, w: F32, out: F32) -> None:
    """Compare with the formula in float64; the bound of the sum, carried through the gate where there is one."""
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    want = x64 @ w64
    bound = 2 * np.sqrt(shape.n_in) * UNIT_ROUNDOFF * (np.abs(x64) @ np.abs(w64))
    if shape.mode == SWIGLU:
        gate, up = want[:, ::2], want[:, 1::2]
        silu = gate / (1 + np.exp(-gate))
        # The slope of silu is below 1.1, and its own roundings are below 8 units.
        bound = 1.1 * bound[:, ::2] * (np.abs(up) + bound[:, 1::2]) + np.abs(silu) * bound[:, 1::2] + 8 * UNIT_ROUNDOFF * np.abs(silu * up)
        want = silu * up
    assert np.all(np.abs(out - want) <= bound), f"{shape}: off by {np.max(np.abs(out - want) / bound):.2f} bounds"


def prepare(shape: Shape) -> tuple[Call, Call]:
    """The product on the emulator, checked, and in NumPy; each call uses the next copy of the weights."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape.n_rows, shape.n_in), np.float32)
    w = rng.standard_normal((shape.n_in, shape.n_out), np.float32) * np.float32(shape.n_in**-0.5)
    n_copies = max(1, COLD_BYTES // w.nbytes) if shape.m <= MOST_COLD_ROWS else 1
    tiles = np.concatenate([w[:, j : j + WEIGHT_TILE_COLS].ravel() for j in range(0, shape.n_out, WEIGHT_TILE_COLS)] * n_copies)
    tiles.flags.writeable = False
    matrices = [w.copy() for _ in range(n_copies)]

    n_placed = shape.n_out // 2 if shape.mode == SWIGLU else shape.n_out
    k_starts, out_starts = split(shape.n_in, shape.n_cols), split(n_placed, shape.n_cols)
    placed, out = place(x, k_starts), np.zeros(shape.n_rows * n_placed, np.float32)
    rows = np.sort(rng.permutation(shape.n_rows)[: shape.m])
    scale = np.ones(shape.m, np.float32)
    turn = 0

    def ours() -> None:
        nonlocal turn
        turn = (turn + 1) % n_copies
        mesh_matmul(
            placed, shape.n_rows, k_starts, rows, tiles, turn * w.size, shape.n_in, shape.n_out,
            out, shape.n_rows, out_starts, rows, scale, shape.mode,
        )  # fmt: skip

    chosen, product = x[rows], np.empty((shape.m, shape.n_out), np.float32)

    def peer() -> None:
        nonlocal turn
        turn = (turn + 1) % n_copies
        np.matmul(chosen, matrices[turn], out=product)

    ours()
    check(shape, chosen, w, unplace(out, shape.n_rows, out_starts)[rows])
    return ours, peer


def best_seconds(calls: tuple[Call, Call], n_calls: int) -> list[float]:
    """Shortest of `n_calls` calls in each of several turns, for every side."""
    best = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for side, call in enumerate(calls):
            time.sleep(PAUSE_SECONDS)
            for _ in range(n_calls):
                start = time.perf_counter()
                call()
                best[side] = min(best[side], time.perf_counter() - start)
    return best


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mesh_matmul(benchmark: Any, shape: Shape) -> None:
    ours, _ = prepare(shape)
    benchmark.extra_info |= {"macs": shape.m * shape.n_in * shape.n_out, "weight_bytes": 4 * shape.n_in * shape.n_out}
    benchmark(ours)


def main() -> None:
    """Print the table."""
    print(f"{'':62} {'GFLOP/s':>8} {'numpy':>7} {'ratio':>6} {'GB/s':>6} {'numpy':>6}   of weights")
    for shape in SHAPES:
        ours, peer = best_seconds(prepare(shape), 40 if shape.m <= MOST_COLD_ROWS else 10)
        flops, weight_bytes = 2 * shape.m * shape.n_in * shape.n_out, 4 * shape.n_in * shape.n_out
        speeds = f"{flops / ours / 1e9:8.1f} {flops / peer / 1e9:7.1f} {peer / ours:6.2f}"
        print(f"{shape!s:62} {speeds} {weight_bytes / ours / 1e9:6.1f} {weight_bytes / peer / 1e9:6.1f}", flush=True)


if __name__ == "__main__":
    main()

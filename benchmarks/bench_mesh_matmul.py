"""Matrix products over a wafer's columns beside NumPy and torch: grids up to a whole wafer, and the shapes of a mixture of experts.

    pytest benchmarks/bench_mesh_matmul.py --benchmark-only

On grids the product is `wse_emu.layers.linear.matmul`, as a model calls it: placed tensors, SRAM held to its limit, the ledger written and
compared. Samples of the result have the bits of the stated sum, taken with one scalar `fma` after another, and all of it lies within the
bound around the float64 product. Shapes of a model run on the driver alone; with few rows the weights, not the arithmetic, are the work:
they are then taken from a buffer larger than any cache, another copy for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from benchmarks.cases import F32, normal, torch_call, torch_side
from benchmarks.mesh import gathered, put, room, streamed
from benchmarks.racing import Call, Case, Race, Work
from wse_emu.equivalence.tolerance import U, linear_bound
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.wafer.placement import Split, TokenBands
from wse_kernels.experts import mesh_experts
from wse_kernels.fma import fma
from wse_kernels.matmul import COMBINE, STORE, SWIGLU, WEIGHT_TILE_COLS, mesh_matmul
from wse_kernels.matmul_rounded import mesh_matmul_rounded
from wse_kernels.storage import TO_BF16

I64 = NDArray[np.int64]


# ---- grids


class Grid(NamedTuple):
    """Rows and columns of cores, and the product (tokens, n_in, n_out) on them."""

    rows: int
    cols: int
    n_tokens: int
    n_in: int
    n_out: int
    chunk: int = 32
    """Most output columns of one streamed piece: small grids have little SRAM left for it."""

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols} cores, {self.n_tokens} x {self.n_in} x {self.n_out}"

    @property
    def tiny(self) -> Grid:
        """For smoke runs: the same shape of grid, 5 tokens, and at most 12 columns of cores."""
        return Grid(min(self.rows, 6), min(self.cols, 12), 5, 40, 16)


GRIDS = (
    Grid(8, 8, 128, 1024, 1024, 8),
    Grid(16, 16, 512, 1024, 1024, 16),
    Grid(32, 32, 512, 1024, 1024),
    Grid(64, 64, 512, 1024, 1024),
    Grid(256, 256, 512, 1024, 1024),
    Grid(762, 762, 762, 1024, 1024),
    Grid(1172, 762, 1172, 1024, 1024),
    Grid(1172, 762, 1172, 4096, 4096),
    Grid(1172, 762, 1, 4096, 4096),
)
N_SAMPLES = 6


def stated_sum(x: F32, w: F32, offsets: I64) -> np.float32:
    """One output: each column's part over its own k ascending from +0, the parts west to east; columns without k are skipped."""
    total: np.float32 | None = None
    for k0, k1 in pairwise(offsets.tolist()):
        if k0 < k1:
            part = np.float32(0.0)
            for k in range(k0, k1):
                part = fma(x[k], w[k], part)
            total = part if total is None else total + part
    assert total is not None
    return total


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grid(grid: Grid, race: Race, smoke: bool) -> None:
    grid = grid.tiny if smoke else grid
    wafer = wse.Wafer(wse.WSE3, rows=grid.rows, cols=grid.cols)
    bands = TokenBands(grid.n_tokens, grid.rows)
    x, w = normal(grid.n_tokens, grid.n_in), normal(grid.n_in, grid.n_out, seed=1, scale=grid.n_in**-0.5)
    weight = streamed(w)
    placed, out = put(wafer, x), room(wafer, grid.n_tokens, Split.balanced(grid.n_out, grid.cols))

    def ours() -> Any:
        matmul(wafer, placed, weight, out, bands, chunk=grid.chunk)
        all_gather_bands(wafer, out, bands)
        return out

    wafer.ledger.clear()
    found = gathered(ours())
    offsets = Split.balanced(grid.n_in, grid.cols).offsets
    rng = np.random.default_rng(2)
    for i, j in zip(rng.integers(0, grid.n_tokens, N_SAMPLES), rng.integers(0, grid.n_out, N_SAMPLES), strict=True):
        expected = stated_sum(x[i], w[:, j], offsets)
        assert found[i, j].tobytes() == expected.tobytes(), f"output ({i}, {j}) is {found[i, j]!r}, the stated sum {expected!r}"
    macs, n_bytes = grid.n_tokens * w.size, w.nbytes
    totals = {row["kind"]: row for row in wafer.ledger.totals(("kind",))}
    assert totals["launch"]["macs"] == macs
    assert totals["stream"]["bytes"] == n_bytes

    peers = {"numpy": lambda: x @ w, **torch_call(lambda t, a, b: a @ b, x, w)}
    work = Work(macs, n_bytes + x.nbytes + 4 * grid.n_tokens * grid.n_out, grid.n_tokens)
    race.case(Case(ours, peers, (x.astype(np.float64) @ w,), (linear_bound(x, w.T),), work, look=gathered))


# ---- shapes of a model


COLD_BYTES = 200 << 20
"""Size of the weight buffer where weights must come from memory."""
MOST_COLD_ROWS = 16
"""Products of no more rows than this take their weights from memory."""


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
        return f"{self.name}, {self.m} x {self.n_in} x {self.n_out}, {self.n_cols} columns"

    @property
    def tiny(self) -> Shape:
        """For smoke runs."""
        return Shape(self.name, 5, min(self.m, 3), 7, 6, min(self.n_cols, 9), self.mode)


SHAPES = (
    Shape("mesh_matmul", 1024, 1024, 1024, 1024, 16),
    Shape("mesh_matmul", 1024, 1024, 1024, 1024, 762),
    Shape("prefill qkv", 512, 512, 1024, 1536, 32),
    Shape("prefill out", 512, 512, 1024, 1024, 32),
    Shape("prefill router", 512, 512, 1024, 8, 32),
    Shape("prefill gate/up", 512, 128, 1024, 3584, 32, SWIGLU),
    Shape("prefill down", 512, 128, 1792, 1024, 32, COMBINE),
    Shape("decode qkv", 1, 1, 1024, 1536, 32),
    Shape("decode gate/up", 1, 1, 1024, 3584, 32, SWIGLU),
    Shape("decode gate/up", 1, 1, 1024, 3584, 762, SWIGLU),
    Shape("decode down", 1, 1, 1792, 1024, 32, COMBINE),
    Shape("decode head", 1, 1, 1024, 32000, 32),
    Shape("decode of two", 2, 2, 1024, 3584, 32, SWIGLU),
    Shape("decode of eight", 8, 8, 1024, 3584, 32, SWIGLU),
)


@pytest.mark.parametrize("n_experts", [2, 4])
def test_experts_of_a_token(n_experts: int, race: Race, smoke: bool) -> None:
    """The experts that a token chose, all in one driver; the peers go from one to the next. Their weights come from memory."""
    n_in, width, n_cols = (6, 4, 3) if smoke else (1024, 2048 // n_experts, 32)
    n_sets = 1 if smoke else max(1, COLD_BYTES // (12 * n_experts * n_in * width))
    x, scale = normal(1, n_in), np.full(n_experts, 1 / n_experts, np.float32)
    nets = [
        [normal(n_in, 2 * width, seed=e, scale=n_in**-0.5), normal(width, n_in, seed=1000 + e, scale=width**-0.5)]
        for e in range(n_sets * n_experts)
    ]  # fmt: skip
    gate_ups, downs = ([streamed(pair[i]).values for pair in nets] for i in (0, 1))
    k_starts, hidden_starts = (Split.balanced(n, n_cols).offsets for n in (n_in, width))
    starts, rows, out = np.arange(n_experts + 1), np.zeros(n_experts, np.int64), np.zeros(n_in, np.float32)
    turn = 0

    def next_set() -> slice:
        nonlocal turn
        turn = (turn + 1) % n_sets
        return slice(turn * n_experts, (turn + 1) * n_experts)

    def ours() -> Any:
        some = next_set()
        out.fill(0)
        mesh_experts(
            x.ravel(), 1, k_starts, starts, rows, scale, gate_ups[some], downs[some], n_in, width, SWIGLU,
            hidden_starts, out, 1, k_starts, n_in,
        )  # fmt: skip
        return out.copy()

    def by_formula(v: Any, some: Any, silu: Callable[[Any], Any]) -> Any:
        total = 0
        for gate_up, down in some:
            y = v @ gate_up
            total = total + (silu(y[:, ::2]) * y[:, 1::2]) @ down / n_experts
        return total

    def numpy() -> Any:
        return by_formula(x, nets[next_set()], lambda g: g / (1 + np.exp(-g)))

    def torch(t: Any, of: Any) -> Call:
        a, copies = of(x), [[of(m) for m in pair] for pair in nets]
        return lambda: by_formula(a, copies[next_set()], t.nn.functional.silu)

    peers = {"numpy": numpy, **torch_side(torch)}
    for name, call in {"ours": ours, **peers}.items():
        turn = -1
        right = by_formula(x.astype(np.float64), [[m.astype(np.float64) for m in pair] for pair in nets[:n_experts]], _silu64)
        # Three sums behind each other, of at most 2,048 terms: their roundings add up to some sqrt(3 * 2048) * U = 5e-6 of the result.
        assert np.abs(np.asarray(call()) - right).max() <= 5e-5 * np.abs(right).max(), name
    words = 3 * n_experts * n_in * width
    race(ours, peers, Work(words, 4 * words, 1))


HANDED_ON = (Shape("handed on in bfloat16", 512, 512, 1024, 1536, 32), Shape("handed on in bfloat16", 1, 1, 1024, 3584, 32))


@pytest.mark.parametrize("shape", HANDED_ON, ids=str)
def test_totals_in_16_bits(shape: Shape, race: Race, smoke: bool) -> None:
    """Totals that are rounded at every column; the peers compute the product in float32."""
    shape = shape.tiny if smoke else shape
    x, w = normal(shape.m, shape.n_in), normal(shape.n_in, shape.n_out, seed=1, scale=shape.n_in**-0.5)
    tiles = streamed(w).values
    k_starts, out_starts = (Split.balanced(n, shape.n_cols).offsets for n in (shape.n_in, shape.n_out))
    placed, out, rows = place(x, k_starts), np.zeros(shape.m * shape.n_out, np.float32), np.arange(shape.m)
    scale = np.ones(1, np.float32)

    def ours() -> Any:
        mesh_matmul_rounded(
            placed, shape.m, k_starts, rows, tiles, 0, shape.n_in, shape.n_out, out, shape.m, out_starts, rows, scale, STORE, TO_BF16
        )  # fmt: skip
        return out

    ours()
    right, size = x.astype(np.float64) @ w, np.abs(x) @ np.abs(w)
    # Half a step, 2**-8, of every partial total, which is at most the sum of its terms' sizes.
    assert np.all(np.abs(unplace(out, shape.m, out_starts) - right) <= 2.0**-8 * shape.n_cols * size)

    def torch(t: Any, of: Any) -> Call:
        a, b = of(x), of(w)
        return lambda: t.matmul(a, b)

    race(ours, {"numpy": lambda: x @ w, **torch_side(torch)}, Work(x.shape[0] * w.size, w.nbytes + x.nbytes + out.nbytes, shape.m))


def _silu64(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def place(x: F32, starts: I64) -> F32:
    """Column-panel-major copy of a matrix."""
    return np.concatenate([x[:, a:b].ravel() for a, b in pairwise(starts)])


def unplace(flat: F32, n_rows: int, starts: I64) -> F32:
    """Matrix held by a column-panel-major buffer."""
    return np.hstack([flat[n_rows * a : n_rows * b].reshape(n_rows, b - a) for a, b in pairwise(starts)])


def formula(shape: Shape, x: F32, w: F32) -> tuple[Any, Any]:
    """The product in float64, gated or not, and its bound: that of the sum, carried through the gate where there is one."""
    right, bound = x.astype(np.float64) @ w, linear_bound(x, w.T)
    if shape.mode != SWIGLU:
        return right, bound
    gate, up = right[:, ::2], right[:, 1::2]
    silu = gate / (1 + np.exp(-gate))
    # The slope of silu is below 1.1, and its own roundings are below 8 units.
    bound = 1.1 * bound[:, ::2] * (np.abs(up) + bound[:, 1::2]) + np.abs(silu) * bound[:, 1::2] + 8 * U * np.abs(silu * up)
    return silu * up, bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(shape: Shape, race: Race, smoke: bool) -> None:
    """The peers compute the product alone; gating it and adding it to the tokens is our side's extra work, and small."""
    shape = shape.tiny if smoke else shape
    x, w = normal(shape.n_rows, shape.n_in), normal(shape.n_in, shape.n_out, seed=1, scale=shape.n_in**-0.5)
    n_copies = max(1, COLD_BYTES // w.nbytes) if shape.m <= MOST_COLD_ROWS and not smoke else 1
    tiles = np.concatenate([w[:, j : j + WEIGHT_TILE_COLS].ravel() for j in range(0, shape.n_out, WEIGHT_TILE_COLS)] * n_copies)
    tiles.flags.writeable = False
    matrices = [w.copy() for _ in range(n_copies)]

    n_placed = shape.n_out // 2 if shape.mode == SWIGLU else shape.n_out
    k_starts, out_starts = (Split.balanced(n, shape.n_cols).offsets for n in (shape.n_in, n_placed))
    placed, out = place(x, k_starts), np.zeros(shape.n_rows * n_placed, np.float32)
    rows = np.sort(np.random.default_rng(0).permutation(shape.n_rows)[: shape.m])
    scale = np.ones(shape.m, np.float32)
    turn = 0

    def next_copy() -> int:
        nonlocal turn
        turn = (turn + 1) % n_copies
        return turn

    def ours() -> Any:
        mesh_matmul(
            placed, shape.n_rows, k_starts, rows, tiles, next_copy() * w.size, shape.n_in, shape.n_out,
            out, shape.n_rows, out_starts, rows, scale, shape.mode,
        )  # fmt: skip
        return out

    ours()
    chosen, product = x[rows], np.empty((shape.m, shape.n_out), np.float32)
    right, bound = formula(shape, chosen, w)
    error = np.abs(unplace(out, shape.n_rows, out_starts)[rows] - right)
    assert np.all(error <= bound), f"off by {np.max(error / bound):.2f} bounds"

    def torch(t: Any, of: Any) -> Call:
        a, copies, result = of(chosen), [of(m) for m in matrices], of(np.empty_like(product))
        return lambda: t.matmul(a, copies[next_copy()], out=result)

    peers = {"numpy": lambda: np.matmul(chosen, matrices[next_copy()], out=product), **torch_side(torch)}
    plain, plain_bound = chosen.astype(np.float64) @ w, linear_bound(chosen, w.T)
    for name, call in peers.items():
        assert np.all(np.abs(np.asarray(call()) - plain) <= plain_bound), name
    race(ours, peers, Work(shape.m * w.size, w.nbytes + chosen.nbytes + product.nbytes, shape.m))

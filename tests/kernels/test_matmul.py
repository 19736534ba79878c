"""Matrix products over wafer columns: the driver, the bodies and the register tile give the bits of one stated sum.

The sum is written again here, in float64 NumPy with rounding to odd; it shares nothing with the kernels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wse_kernels import matmul, matmul_tile, threads
from wse_kernels._jit import kernel, plain
from wse_kernels.exp import silu32
from wse_kernels.fma import count_fma
from wse_kernels.matmul import (
    COMBINE,
    STORE,
    SWIGLU,
    WEIGHT_TILE_COLS,
    chain_add,
    mesh_matmul,
    partial_matmul,
)
from wse_kernels.threads import limit_threads

from .plain_threads import in_turns

F = np.float32
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
JIT = not numba.config.DISABLE_JIT
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 3e38, -3e38, 1e-30, 1.0], F)
UNIT_ROUNDOFF = 2.0**-24


def round_to_odd_fma(a: F32, b: F32, c: F32) -> F32:
    """Fused multiply-add of arrays: the float64 sum, its last bit set where it is inexact, rounded once to float32."""
    product = a.astype(np.float64) * b
    total = product + c
    shadow = total - product
    error = (product - (total - shadow)) + (c - shadow)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(F)


def stated_sum(x: F32, w: F32, k_starts: I64) -> F32:
    """The product as the numerics define it: a partial for each wafer column, from +0.0; a chain from the first one that has any k."""
    acc: F32 | None = None
    for k0, k1 in pairwise(k_starts):
        if k0 == k1:
            continue
        p = np.zeros((x.shape[0], w.shape[1]), F)
        for k in range(k0, k1):
            p = round_to_odd_fma(*np.broadcast_arrays(x[:, k : k + 1], w[k]), p)
        acc = p if acc is None else acc + p
    assert acc is not None
    return acc


def place(x: F32, starts: I64) -> F32:
    """Column-panel-major copy of a matrix."""
    return np.concatenate([x[:, a:b].ravel() for a, b in pairwise(starts)])


def unplace(flat: F32, n_rows: int, starts: I64) -> F32:
    """Matrix held by a column-panel-major buffer."""
    return np.hstack([flat[n_rows * a : n_rows * b].reshape(n_rows, b - a) for a, b in pairwise(starts)])


def tiled(w: F32, before: int = 0) -> F32:
    """Weights at rest, read-only, behind `before` elements of something else."""
    parts = [np.full(before, np.nan, F)]
    parts += [w[:, j : j + WEIGHT_TILE_COLS].ravel() for j in range(0, w.shape[1], WEIGHT_TILE_COLS)]
    flat = np.concatenate(parts)
    flat.flags.writeable = False
    return flat


def random_split(rng: np.random.Generator, n: int, n_cols: int) -> I64:
    """Any split of n features, empty columns at either end and between included."""
    return np.concatenate([[0], np.sort(rng.integers(0, n + 1, n_cols - 1)), [n]]).astype(np.int64)


def balanced_split(n: int, n_cols: int) -> I64:
    return np.arange(n_cols + 1, dtype=np.int64) * n // n_cols


def same_bits(x: F32, y: F32) -> bool:
    both_nan = np.isnan(x) & np.isnan(y)
    return x.shape == y.shape and bool(np.all(both_nan | (x.view(np.int32) == y.view(np.int32))))


class Case(NamedTuple):
    """One call of the driver, its operands as plain matrices."""

    x: F32
    w: F32
    k_starts: I64
    rows: I64
    out: F32
    out_starts: I64
    out_rows: I64
    scale: F32
    mode: int
    offset: int = 0

    def run(self, driver=mesh_matmul) -> F32:
        """The whole output after the call, as a matrix."""
        flat = place(self.out, self.out_starts)
        driver(
            place(self.x, self.k_starts), len(self.x), self.k_starts, self.rows, tiled(self.w, self.offset), self.offset, *self.w.shape,
            flat, len(self.out), self.out_starts, self.out_rows, self.scale, self.mode,
        )  # fmt: skip
        return unplace(flat, len(self.out), self.out_starts)

    def expected(self) -> F32:
        """The output by `stated_sum`; rows not written keep what they held."""
        acc = stated_sum(self.x[self.rows], self.w, self.k_starts)
        out = self.out.copy()
        if self.mode == STORE:
            out[self.out_rows] = acc
        elif self.mode == SWIGLU:
            silu = np.array([silu32_of(v) for v in acc[:, ::2].ravel()], F).reshape(acc[:, ::2].shape)
            out[self.out_rows] = silu * acc[:, 1::2]
        else:
            out[self.out_rows] = round_to_odd_fma(*np.broadcast_arrays(self.scale[:, None], acc, out[self.out_rows]))
        return out


@kernel(cache=False)
def silu_array(x, out):
    for i in range(x.shape[0]):
        out[i] = silu32(x[i])


def silu32_of(v: np.float32) -> np.float32:
    out = np.empty(1, F)
    silu_array(np.array([v], F), out)
    return out[0]


def make_case(
    seed: int, m: int, k: int, n: int, n_cols: int, mode: int, *, special: float = 0.0, spare_rows: int = 2, even: bool = False
) -> Case:  # fmt: skip
    rng = np.random.default_rng(seed)
    n += n % 2 if mode == SWIGLU else 0
    n_out = n // 2 if mode == SWIGLU else n
    n_rows = m + spare_rows
    x, w, out = (rng.standard_normal(shape).astype(F) for shape in ((n_rows, k), (k, n), (n_rows, n_out)))
    for array in (x, w):
        hit = rng.random(array.shape) < special
        array[hit] = rng.choice(SPECIAL, int(hit.sum()))
    split = (lambda length: balanced_split(length, n_cols)) if even else (lambda length: random_split(rng, length, n_cols))
    return Case(
        x, w, split(k), rng.integers(0, n_rows, m), out, split(n_out), rng.permutation(n_rows)[:m], rng.standard_normal(m).astype(F), mode,
        int(rng.integers(0, 40)),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _any_number_may_overflow():
    """Plain Python warns about inf - inf and the like; compiled code does not."""
    with np.errstate(all="ignore"):
        yield


MODES = st.sampled_from([STORE, SWIGLU, COMBINE])
SIZES = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 150), st.integers(1, 50))
if not JIT:
    SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))


@pytest.mark.nojit
@given(st.integers(0, 1 << 32), SIZES, MODES, st.sampled_from([0.0, 0.0, 0.02, 0.3]))
@example(0, (1, 1, 1, 1), STORE, 0.0)
@example(1, (1, 3, 1, 9), COMBINE, 0.0)
@settings(deadline=None, max_examples=150 if JIT else 5)
def test_driver_gives_the_bits_of_the_stated_sum(seed, sizes, mode, special):
    case = make_case(seed, *sizes, mode, special=special)
    assert same_bits(case.run(), case.expected())


@pytest.mark.parametrize("mode", [STORE, SWIGLU, COMBINE])
@pytest.mark.parametrize("m", [1, 2, 7, 100, 230])
@pytest.mark.parametrize("n_cols", [5, 61])
def test_result_does_not_depend_on_the_thread_count(monkeypatch, m, n_cols, mode):
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    case = make_case(m, m, 60, 330, n_cols, mode)
    want = case.expected()
    for n in (1, 2, 3, 7):
        with limit_threads(n):
            assert same_bits(case.run(), want)


@pytest.mark.parametrize(("m", "n"), [(1, 8), (1, 700), (2, 130), (30, 65), (400, 8), (400, 130)])
def test_many_threads_share_any_shape_without_gap_or_overlap(monkeypatch, m, n):
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    case = make_case(m, m, 9, n, 4, STORE)
    want = case.expected()
    with limit_threads(7):
        assert same_bits(case.run(), want)
        assert same_bits(case.run(), want)  # a driver's first call has one part


@pytest.mark.nojit
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", [STORE, SWIGLU, COMBINE])
@pytest.mark.parametrize("rows_for_a_thread", [0, 16], ids=["rows shared", "strips shared"])
def test_driver_as_plain_python_gives_the_same_bits(monkeypatch, n_threads, mode, rows_for_a_thread):
    case = make_case(3, 7, 3, 6, 4, mode, special=0.1)
    want = case.expected()
    assert same_bits(case.run(), want)
    monkeypatch.setattr(matmul, "_BLOCKS_PER_THREAD", rows_for_a_thread)
    monkeypatch.setattr(matmul, "_driver", in_turns(monkeypatch, matmul, matmul._mesh_matmul, n_threads))
    assert same_bits(case.run(), want)


@pytest.mark.parametrize("k_starts", [[0, 5000], [0, 0, 2500, 2500, 5000], [0, 1, 2047, 2049, 2050, 4096, 4999, 5000, 5000]])
def test_sums_longer_than_a_cache_block(k_starts):
    case = make_case(5, 5, 5000, 70, 1, STORE)._replace(k_starts=np.array(k_starts, np.int64))
    assert same_bits(case.run(), case.expected())


@pytest.mark.nojit
def test_empty_columns_add_nothing_not_even_zero():
    """A product too small for float32 leaves -0.0, which one addition of +0.0 would turn into +0.0."""
    x, w, rows, one = np.array([[-1e-30]], F), np.array([[1e-30]], F), np.zeros(1, np.int64), np.ones(1, F)
    for k_starts in ([0, 1], [0, 0, 0, 1, 1, 1]):
        case = Case(x, w, np.array(k_starts), rows, np.ones((1, 1), F), np.array([0, 1]), rows, one, STORE)
        assert same_bits(case.run(), np.array([[-0.0]], F))


def test_number_of_columns_is_part_of_the_sum():
    """The law's examples can tell one chain from another, so equal bits mean the same order."""
    case = make_case(9, 4, 64, 64, 1, STORE)
    results = [case._replace(k_starts=balanced_split(64, c)).run() for c in (1, 2, 3, 64)]
    assert all(not same_bits(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("n_cols", [1, 16, 200])
def test_driver_is_close_to_the_float64_product(n_cols):
    case = make_case(11, 40, 200, 300, n_cols, STORE, even=True)
    x, w = case.x[case.rows].astype(np.float64), case.w.astype(np.float64)
    error = np.abs(case.run()[case.out_rows] - x @ w)
    assert np.all(error <= 2 * np.sqrt(200) * UNIT_ROUNDOFF * (np.abs(x) @ np.abs(w)))


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_one_specialisation_serves_all_modes_and_shapes():
    for mode in (STORE, SWIGLU, COMBINE):
        for m, n in ((1, 8), (1, 128), (9, 200)):
            make_case(0, m, 4, n, 3, mode).run()
    assert len(matmul._mesh_matmul.signatures) == 1


@pytest.mark.nojit
@given(st.integers(0, 1 << 32), st.integers(1, 4), st.integers(0, 6), st.integers(1, 5), st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=40)
def test_bodies_compose_to_the_driver(seed, m, n_cols, n, special):
    """Core by core, as the isolated and interpreted executors do it, compiled and in plain Python."""
    case = make_case(seed, m, 7, n, n_cols + 1, STORE, special=special)
    want = stated_sum(case.x[case.rows], case.w, case.k_starts)
    for partial, add in ((partial_matmul, chain_add), (plain(partial_matmul), plain(chain_add))):
        acc = np.empty((0, 0), F)
        for k0, k1 in pairwise(case.k_starts):
            if k0 == k1:
                continue
            p = np.full((m, n), np.nan, F)
            partial(case.x[:, k0:k1].copy(), case.rows, case.w[k0:k1].copy(), p)
            if acc.size:
                add(acc, p)
            else:
                acc = p
        assert same_bits(acc, want)


@pytest.mark.nojit
def test_partial_does_one_multiply_add_for_each_product():
    case = make_case(0, 3, 4, 5, 1, STORE)
    with count_fma() as count:
        plain(partial_matmul)(case.x, case.rows, case.w, np.empty((3, 5), F))
    assert count.n == 3 * 4 * 5


@kernel(cache=False)
def through_tiles(a, w, start, out):
    total = matmul_tile.load_tile(start, 1)
    p = matmul_tile.zero_tile()
    for k in range(2):
        p = matmul_tile.fma_step(p, a, k * matmul_tile.ROWS, matmul_tile.read_only(w), 1 + k * matmul_tile.COLS)
    matmul_tile.store_tile(matmul_tile.add_tiles(total, p), out, 2)


@pytest.mark.nojit
@pytest.mark.parametrize("special", [0.0, 0.3])
def test_register_tile_is_its_definition_and_writes_nothing_else(special):
    rng = np.random.default_rng(8)
    size = matmul_tile.ROWS * matmul_tile.COLS
    a, w, start = (rng.standard_normal(n).astype(F) for n in (2 * matmul_tile.ROWS, 1 + 2 * matmul_tile.COLS, size + 1))
    for array in (a, w, start):
        hit = rng.random(array.shape) < special
        array[hit] = rng.choice(SPECIAL, int(hit.sum()))
    out, out_plain = np.full(size + 5, 7.0, F), np.full(size + 5, 7.0, F)
    through_tiles(a, w, start, out)
    plain(through_tiles)(a, w, start, out_plain)
    assert same_bits(out, out_plain)
    assert np.all(out[:2] == 7)
    assert np.all(out[size + 2 :] == 7)
    x = a.reshape(2, matmul_tile.ROWS).T.copy()
    p = stated_sum(x, w[1:].reshape(2, matmul_tile.COLS), np.array([0, 2]))
    assert same_bits(out[2 : size + 2], start[1:] + p.ravel())


def test_read_only_view_cannot_be_written_but_shares_memory():
    array = np.zeros(3, F)
    view = matmul_tile.read_only(array)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    array[0] = 2
    assert view[0] == 2


@pytest.mark.parametrize("n_out", [2, 64, 70, 128, 194, 300])
@pytest.mark.parametrize("mode", [matmul.STORE, matmul.SWIGLU, matmul.GEGLU, matmul.COMBINE])
def test_a_few_rows_have_the_bits_that_they_have_among_many(n_out: int, mode: int) -> None:
    """Few rows go another way through the driver (`THIN_ROWS`)."""
    rng = np.random.default_rng(31)
    n_in, n_rows, n_cols = 37, 11, 5
    k_starts = np.arange(n_cols + 1) * n_in // n_cols
    n_placed = n_out // 2 if mode in (matmul.SWIGLU, matmul.GEGLU) else n_out
    out_starts = np.arange(n_cols + 1) * n_placed // n_cols
    x, w = rng.standard_normal(n_rows * n_in).astype(np.float32), rng.standard_normal(n_in * n_out).astype(np.float32)
    w.flags.writeable = False
    begin = rng.standard_normal(n_rows * n_placed).astype(np.float32)

    def product(rows: list[int]) -> np.ndarray:
        chosen, out = np.array(rows, np.int64), begin.copy()
        scale = np.linspace(0.5, 1.5, n_rows).astype(np.float32)[chosen]
        matmul.mesh_matmul(x, n_rows, k_starts, chosen, w, 0, n_in, n_out, out, n_rows, out_starts, chosen, scale, mode)
        panels = [out[n_rows * a : n_rows * b].reshape(n_rows, b - a)[chosen] for a, b in pairwise(out_starts.tolist())]
        return np.hstack(panels).view(np.int32)

    whole = product(list(range(n_rows)))
    for rows in ([0], [7], [3, 10]):
        np.testing.assert_array_equal(product(rows), whole[rows])

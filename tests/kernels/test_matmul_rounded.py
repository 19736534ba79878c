"""Totals handed on in 16 bits: the driver gives the bits of the stated sum, which is written again here with the formats' definition."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from wse_kernels import matmul_rounded
from wse_kernels._jit import plain
from wse_kernels.ffn import geglu_into, swiglu_into
from wse_kernels.formats import BF16, CB16, F16, FloatFormat, decode, encode
from wse_kernels.matmul import COMBINE, GEGLU, STORE, SWIGLU, mesh_matmul, partial_matmul
from wse_kernels.matmul_rounded import mesh_matmul_rounded
from wse_kernels.storage import TO_BF16, TO_CB16, TO_F16
from wse_kernels.threads import limit_threads

from .test_matmul import Case, balanced_split, place, random_split, same_bits, tiled, unplace

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
FORMATS = {TO_BF16: BF16, TO_F16: F16, TO_CB16: CB16}


def nearest(x: F32, fmt: FloatFormat) -> F32:
    return decode(encode(x, fmt), fmt)


def stated_sum(x: F32, w: F32, k_starts: I64, fmt: FloatFormat) -> F32:
    """Own partials in float32, by the body of one core; what comes from the west has 16 bits."""
    acc: F32 | None = None
    for k0, k1 in pairwise(k_starts):
        if k0 == k1:
            continue
        p = np.empty((len(x), w.shape[1]), np.float32)
        partial_matmul(np.ascontiguousarray(x[:, k0:k1]), np.arange(len(x)), np.ascontiguousarray(w[k0:k1]), p)
        acc = p if acc is None else nearest(acc, fmt) + p
    assert acc is not None
    return acc


def run(case: Case, fmt: int) -> tuple[F32, int]:
    flat = place(case.out, case.out_starts)
    largest = mesh_matmul_rounded(
        place(case.x, case.k_starts), len(case.x), case.k_starts, case.rows, tiled(case.w, case.offset), case.offset, *case.w.shape,
        flat, len(case.out), case.out_starts, case.out_rows, case.scale, case.mode, fmt,
    )  # fmt: skip
    return unplace(flat, len(case.out), case.out_starts), largest


def case_of(rng: np.random.Generator, m: int, n_in: int, n_out: int, n_cols: int, mode: int = STORE) -> Case:
    n_rows, width = m + 2, n_out // 2 if mode in (SWIGLU, GEGLU) else n_out
    x, w = rng.standard_normal((n_rows, n_in)).astype(np.float32), rng.standard_normal((n_in, n_out)).astype(np.float32)
    out = rng.standard_normal((n_rows, width)).astype(np.float32)
    rows, out_rows = (np.sort(rng.permutation(n_rows)[:m]).astype(np.int64) for _ in range(2))
    scale = rng.standard_normal(m).astype(np.float32)
    return Case(x, w, random_split(rng, n_in, n_cols), rows, out, random_split(rng, width, n_cols), out_rows, scale, mode, 7)


@pytest.mark.nojit
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", [STORE, SWIGLU, GEGLU, COMBINE])
def test_the_driver_gives_the_bits_of_the_stated_sum(mode: int, fmt: int) -> None:
    rng = np.random.default_rng(10 * mode + fmt)
    for m, n_in, n_out, n_cols in ((1, 12, 18, 3), (4, 9, 6, 5)) if numba.config.DISABLE_JIT else ((1, 30, 300, 4), (23, 50, 130, 7)):
        case = case_of(rng, m, n_in, n_out, n_cols, mode)
        total = stated_sum(case.x[case.rows], case.w, case.k_starts, FORMATS[fmt])
        want = case.out.copy()
        if mode == COMBINE:
            exact = case.scale[:, None].astype(np.float64) * total + want[case.out_rows]
            want[case.out_rows] = exact.astype(np.float32)  # one rounding, but for ties that float64 itself makes
        elif mode == STORE:
            want[case.out_rows] = total
        else:
            h = np.empty((m, n_out // 2), np.float32)
            (swiglu_into if mode == SWIGLU else geglu_into)(total, 0, h)
            want[case.out_rows] = h
        got, _ = run(case, fmt)
        assert same_bits(got, want)


def test_a_chain_by_hand() -> None:
    # Three columns of one k: 1, then + 2^-8, then + 2^-8. In bfloat16 a step at 1 is 2^-7: 1 + 2^-8 is a tie and goes to 1, which is even.
    x, w = np.array([[1.0, 2.0**-8, 2.0**-8]], np.float32), np.ones((3, 1), np.float32)
    one = np.zeros(1, np.int64)
    case = Case(x, w, balanced_split(3, 3), one, np.zeros((1, 1), np.float32), balanced_split(1, 1), one, np.zeros(1, np.float32), STORE)
    assert run(case, TO_BF16)[0] == 1 + 2.0**-8, "the last sum is not handed on and not rounded"
    assert run(case, TO_F16)[0] == case.run() == 1 + 2.0**-7
    # 1 + 3 * 2^-8 is a tie too: up, to the even 1 + 2^-6.
    case = case._replace(x=np.array([[1.0, 3 * 2.0**-8, 0.0]], np.float32))
    assert run(case, TO_BF16)[0] == 1 + 2.0**-6
    assert run(case._replace(k_starts=np.array([0, 0, 3, 3])), TO_BF16)[0] == 1 + 3 * 2.0**-8, "one column hands nothing on"


def test_one_column_is_the_plain_product_and_several_are_not() -> None:
    case = case_of(np.random.default_rng(0), 9, 40, 70, 1)
    assert same_bits(run(case, TO_CB16)[0], case.run(mesh_matmul))
    case = case._replace(k_starts=balanced_split(40, 4))
    assert not same_bits(run(case, TO_CB16)[0], case.run(mesh_matmul))


def test_threads_do_not_change_the_bits_and_the_largest_number_is_told() -> None:
    case = case_of(np.random.default_rng(1), 12, 60, 400, 6)
    case.x[case.rows[3]] = 0
    case.x[case.rows[3], 0], case.w[0, 7] = 300, 250
    want, largest = run(case, TO_F16)
    first = case.x[case.rows[3], : case.k_starts[1 + np.flatnonzero(case.k_starts[1:])[0]]]
    assert np.int32(largest).view(np.float32) >= abs(first[0] * case.w[0, 7]) == 75000
    for n in (1, 3):
        with limit_threads(n):
            got, again = run(case, TO_F16)
        assert same_bits(got, want)
        assert again == largest
    assert np.isinf(want[case.out_rows[3], 7])


@pytest.mark.nojit
def test_parts_write_what_the_whole_writes() -> None:
    case = case_of(np.random.default_rng(2), 3, 10, 40, 3)
    flat, largest, tickets = place(case.out, case.out_starts), np.zeros(3, np.int32), np.zeros(1, np.int64)
    for part in range(3):
        plain(matmul_rounded._mesh_matmul_rounded)(
            part, 3, tickets, largest, place(case.x, case.k_starts), len(case.x), case.k_starts, case.rows, tiled(case.w, 7), 7,
            *case.w.shape, flat, len(case.out), case.out_starts, case.out_rows, case.scale, STORE, TO_CB16,
        )  # fmt: skip
    assert same_bits(unplace(flat, len(case.out), case.out_starts), run(case, TO_CB16)[0])

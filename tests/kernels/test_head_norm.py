"""RMSNorm of heads: the bodies of the cores, the driver of the mesh, plain Python and float64 against each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import config

from wse_kernels._jit import plain
from wse_kernels.fma import count_fma, fma
from wse_kernels.head_norm import head_scale, head_scale_plain, head_squares, mesh_head_norm

F = np.float32
U = 2.0**-24
EPS = F(1e-5)
NOJIT = bool(config.DISABLE_JIT)


def unit_starts(n_heads: int, half: int, n_cols: int) -> np.ndarray:
    """Whole heads on every column, or every head on a group of columns."""
    if n_cols <= n_heads:
        return np.arange(n_cols + 1) * n_heads // n_cols * half
    starts = [0]
    for g in range(n_heads):
        n = (g + 1) * n_cols // n_heads - g * n_cols // n_heads
        starts += [g * half + i * half // n for i in range(1, n + 1)]
    return np.array(starts, np.int64)


def panels(flat: np.ndarray, starts: np.ndarray, width: int, t: int) -> list[np.ndarray]:
    return [flat[t * width * a : t * width * b].reshape(t, (b - a) * width) for a, b in pairwise(starts.tolist())]


def cores(flat: np.ndarray, starts: np.ndarray, q: int, half: int, t: int, weights: list[np.ndarray], *, interpreted: bool) -> np.ndarray:
    """Every core on its own blocks, sums chained from west to east between them."""
    squares, scale = (plain(f) if interpreted else f for f in (head_squares, head_scale))
    out = flat.copy()
    blocks = panels(out, starts, 2 * (q + 2), t)
    sums: list[np.ndarray] = []
    for c, block in enumerate(blocks):
        n_heads = max(1, (starts[c + 1] - starts[c]) // half)
        sums.append(np.full((t, n_heads * (q + 1)), np.nan, F))
        if block.size:
            squares(block, q, sums[c])
    for head in range(int(starts[-1]) // half):
        held = [c for c in range(len(blocks)) if max(starts[c], head * half) < min(starts[c + 1], (head + 1) * half)]
        if len(held) > 1:
            total = sums[held[0]]
            for c in held[1:]:
                total = total + sums[c]
            for c in held:
                sums[c] = total
    for c, block in enumerate(blocks):
        if block.size:
            first = int(starts[c]) % half
            part = slice(2 * first, 2 * (first + min(half, int(starts[c + 1] - starts[c]))))
            scale(block, sums[c], weights[0][None, part].copy(), weights[1][None, part].copy(), q, F(2 * half), EPS)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    small = NOJIT
    return (
        draw(st.integers(1, 3)), draw(st.integers(1, 2 if small else 5)), draw(st.integers(1, 3 if small else 12)),
        draw(st.integers(1, 9)), draw(st.integers(1, 2 if small else 9)), draw(st.integers(0, 10_000)),
    )  # fmt: skip


def data(n_heads: int, q: int, half: int, n_cols: int, t: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal(t * n_heads * half * 2 * (q + 2)).astype(F)
    return flat, unit_starts(n_heads, half, n_cols), [(1 + 0.3 * rng.standard_normal(2 * half)).astype(F) for _ in range(2)]


@pytest.mark.nojit
@given(cases())
def test_driver_gives_the_bits_of_the_cores_and_leaves_the_values_alone(case: tuple[int, int, int, int, int, int]) -> None:
    _, q, half, _, t, _ = case
    flat, starts, weights = data(*case)
    got = flat.copy()
    mesh_head_norm(got, t, starts, q, half, *weights, F(2 * half), EPS)
    expected = cores(flat, starts, q, half, t, weights, interpreted=False)
    assert np.array_equal(got.view(np.int32), expected.view(np.int32))
    for before, after in zip(panels(flat, starts, 2 * (q + 2), t), panels(got, starts, 2 * (q + 2), t), strict=True):
        values = [x.reshape(t, -1, q + 2, 2)[:, :, q + 1] for x in (before, after)]
        assert np.array_equal(*values)


@pytest.mark.nojit
@pytest.mark.parametrize(("n_heads", "q", "half", "n_cols"), [(2, 2, 3, 1), (2, 1, 4, 5), (3, 2, 2, 2), (1, 3, 5, 3)])
def test_plain_python_gives_the_same_bits_and_the_stated_sum(n_heads: int, q: int, half: int, n_cols: int) -> None:
    t = 2
    flat, starts, weights = data(n_heads, q, half, n_cols, t, 3)
    with count_fma() as count:
        interpreted = cores(flat, starts, q, half, t, weights, interpreted=True)
    assert count.n == t * n_heads * half * 2 * (q + 1)
    assert np.array_equal(interpreted, cores(flat, starts, q, half, t, weights, interpreted=False))
    # The first query head of the first token, one scalar at a time.
    blocks, after = panels(flat, starts, 2 * (q + 2), t), panels(interpreted, starts, 2 * (q + 2), t)
    total = None
    for c, block in enumerate(blocks):
        n = min(int(starts[c + 1]), half) - int(starts[c])
        if n > 0:
            p = F(0)
            for u in range(n):
                for e in range(2):
                    x = block[0, u * 2 * (q + 2) + e]
                    p = fma(x, x, p)
            total = p if total is None else total + p
    assert total is not None
    r = F(1) / np.sqrt(total / F(2 * half) + EPS)
    assert after[0][0, 0] == (blocks[0][0, 0] * r) * weights[0][0]


@pytest.mark.nojit
@pytest.mark.parametrize(("n_heads", "q", "units"), [(1, 1, 3), (3, 2, 2)])
def test_without_weights_the_bits_are_those_of_ones(n_heads: int, q: int, units: int) -> None:
    rng = np.random.default_rng(4)
    before = rng.standard_normal((3, n_heads * units * 2 * (q + 2))).astype(F)
    total, ones = rng.uniform(1, 9, (3, n_heads * (q + 1))).astype(F), np.ones((1, 2 * units), F)
    weighted = before.copy()
    head_scale(weighted, total, ones, ones, q, F(2 * units), EPS)
    for body in (head_scale_plain, plain(head_scale_plain)):
        got = before.copy()
        body(got, total, q, F(2 * units), EPS)
        assert np.array_equal(got.view(np.int32), weighted.view(np.int32))
    assert not np.array_equal(weighted, before)


@pytest.mark.parametrize("n_cols", [1, 2, 7])
def test_result_agrees_with_the_formula_in_float64(n_cols: int) -> None:
    n_heads, q, half, t = 2, 3, 16, 5
    flat, starts, weights = data(n_heads, q, half, n_cols, t, 9)
    got = flat.copy()
    mesh_head_norm(got, t, starts, q, half, *weights, F(2 * half), EPS)

    def heads(x: np.ndarray) -> np.ndarray:
        whole = np.concatenate(panels(x, starts, 2 * (q + 2), t), axis=1)
        return whole.reshape(t, n_heads, half, q + 2, 2).transpose(0, 1, 3, 2, 4).reshape(t, n_heads, q + 2, 2 * half).astype(np.float64)

    before, after = heads(flat), heads(got)
    weight = np.stack([*[weights[0]] * q, weights[1]]).astype(np.float64)
    x = before[:, :, : q + 1]
    exact = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + float(EPS)) * weight
    # A sum of 2 half squares enters with half its relative error; mean, eps, root, reciprocal and two products cost a rounding each.
    assert np.all(np.abs(after[:, :, : q + 1] - exact) <= (np.sqrt(2 * half) + 6) * U * np.abs(exact))

"""The lightning indexer's kernels: scores against float64, order numbers, and the choice of the highest against a stable sort."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from wse_kernels._jit import plain
from wse_kernels.index_keys import (
    N_BITS,
    NOT_ADMITTED,
    add_counts,
    count_reaching,
    count_wanted,
    index_scores,
    mesh_index_keys,
    order_scores,
    raise_threshold,
    scores_of,
    take_keys,
)

pytestmark = pytest.mark.nojit

F = np.float32


def order_numbers(scores: np.ndarray, admitted: np.ndarray) -> np.ndarray:
    """By the kernel, of (n_keys, t) scores: one head of weight 1 and its negative."""
    n, t = scores.shape
    order = np.zeros((n, t), np.int32)
    both, total = np.concatenate([scores, -scores], axis=1).astype(F), np.zeros((n, t), F)
    index_scores(both, np.tile(np.array([[1, -1]], F), (t, 1)), 0, F(1), F(1), total)
    order_scores(total, admitted, order)
    return order


def stable(scores: np.ndarray, k: int) -> np.ndarray:
    taken = np.zeros(len(scores), bool)
    taken[np.argsort(-scores, kind="stable")[:k]] = True
    return taken


def test_scores_are_the_formula_and_plain_python_gives_their_bits() -> None:
    rng = np.random.default_rng(0)
    n, t, heads = 6, 3, 4
    s_t, weights = rng.standard_normal((n, heads * t)).astype(F), rng.standard_normal((t, heads)).astype(F)
    admitted, order, again = np.array([7, 7, 7, 6, 4, 0]), np.zeros((n, t), np.int32), np.zeros((n, t), np.int32)
    scores, apart = np.zeros((n, t), F), np.zeros((n, t), F)
    index_scores(s_t, weights, 0, F(0.3), F(0.5), scores)
    for first, last in ((0, 1), (1, 4)):  # group by group, in plain Python
        plain(index_scores)(np.ascontiguousarray(s_t[:, first * t : last * t]), weights, first, F(0.3), F(0.5), apart)
    np.testing.assert_array_equal(scores, apart)
    order_scores(scores, admitted, order)
    plain(order_scores)(scores, admitted, again)
    np.testing.assert_array_equal(order, again)
    exact = np.einsum("jhi,ih->ji", np.maximum(s_t.reshape(n, heads, t).astype(np.float64) * 0.3, 0), weights * 0.5)
    seen = (admitted[:, None] >> np.arange(t) & 1).astype(bool)
    # A term is scaled, weighted (its weight is scaled too) and added to at most `heads` others: so many roundings of half a step each.
    size = np.einsum("jhi,ih->ji", np.abs(s_t.reshape(n, heads, t)) * 0.3, np.abs(weights) * 0.5)
    assert (np.abs(scores_of(order) - exact)[seen] <= ((6 + heads) * 2.0**-24 * size)[seen]).all()
    assert (order[~seen] == NOT_ADMITTED).all()


def test_order_numbers_compare_as_scores_do() -> None:
    values = np.array([-np.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, np.inf], F)[:, None]
    with np.errstate(all="ignore"):
        finite = order_numbers(values[1:-1], np.ones(8, np.int64))[:, 0]
    assert (np.diff(finite.astype(np.int64)) >= 0).all()
    assert finite[3] == finite[4], "a negative zero is a zero"
    np.testing.assert_array_equal(scores_of(finite), values[1:-1, 0])


@pytest.mark.parametrize("topk", [1, 3, 7, 40])
def test_rows_find_the_highest_together_and_take_the_first_of_equal_ones(topk: int) -> None:
    rng = np.random.default_rng(topk)
    n_rows, per_row, t, first = 4, 5, 2, 17
    scores = rng.integers(-2, 3, (n_rows * per_row, t)).astype(F)  # many ties
    n_admitted = first + np.arange(t) + 1
    seen = np.arange(len(scores))[:, None] < n_admitted
    admitted = (seen << np.arange(t)).sum(axis=1)
    rows = [order_numbers(scores[i : i + per_row], admitted[i : i + per_row]) for i in range(0, len(scores), per_row)]
    threshold, wanted = np.full(t, NOT_ADMITTED, np.int32), np.zeros(t, np.int32)

    def reached(step: int) -> np.ndarray:
        total = np.zeros(t, np.int32)
        for order in rows:
            own = np.zeros(t, np.int32)
            count_reaching(order, threshold, step, own)
            add_counts(total, own)
        return total

    for bit in reversed(range(N_BITS)):
        raise_threshold(reached(1 << bit), 1 << bit, first, topk, threshold)
    count_wanted(reached(1), first, topk, wanted)
    before, taken = np.zeros(t, np.int32), np.zeros((n_rows, per_row), np.int64)
    for order, out in zip(rows, taken, strict=True):
        take_keys(order, threshold, before, wanted, out)
    for i in range(t):
        expected = stable(scores[: n_admitted[i], i], topk)
        np.testing.assert_array_equal((taken.reshape(-1) >> i & 1)[: n_admitted[i]].astype(bool), expected)


@pytest.mark.parametrize("starts", [[0, 3], [0, 1, 1, 3]])
def test_driver_chains_columns_and_takes_what_a_sort_takes(starts: list[int]) -> None:
    rng = np.random.default_rng(5)
    units, heads, t, past, topk = 3, 2, 4, 3, 2
    edges = np.array(starts, np.int64)
    values = rng.standard_normal((t, units, heads + 1, 2)).astype(F)
    keys, weights = rng.standard_normal((past + t, units, 2)).astype(F), rng.standard_normal((t, heads)).astype(F)
    panels = [values[:, a:b].reshape(-1) for a, b in pairwise(starts)]
    cache = np.concatenate([keys[:, a:b].reshape(-1) for a, b in pairwise(starts)])
    taken, order = np.zeros((t, past + t), np.bool_), np.zeros((t, past + t), np.int32)
    one, zero = (np.array([n], np.int64) for n in (t, 0))
    mesh_index_keys(
        np.concatenate(panels), edges, heads, weights.reshape(-1), F(0.5), F(0.7), topk, zero, one, np.array([past]), zero,
        np.array([past + t]), cache, taken, order,
    )  # fmt: skip
    products = np.einsum("tuhe,sue->ths", values[:, :, :heads].astype(np.float64), keys) * 0.5
    exact = np.einsum("th,ths->ts", weights * 0.7, np.maximum(products, 0))
    # Roundings of a term: a multiply-add for each element, a sum for each column, then scales, weights and the sum over heads.
    n_roundings = 2 * values.shape[1] + len(edges) + heads + 6
    size = np.einsum("th,tuhe,sue->ts", np.abs(weights) * 0.35, np.abs(values[:, :, :heads]).astype(np.float64), np.abs(keys))
    for i in range(t):
        n = past + i + 1
        assert (np.abs(scores_of(order[i, :n]) - exact[i, :n]) <= n_roundings * 2.0**-24 * size[i, :n]).all()
        np.testing.assert_array_equal(taken[i, :n], stable(scores_of(order[i, :n]), topk))
        assert not taken[i, n:].any()

"""Routing rules: sets, order, ties and weights against a plain definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_kernels._jit import plain
from wse_kernels.routing import group_tokens, mark_chosen, merge_bits, select_expert, softmax_topk

F = np.float32
U = 2.0**-24


def route(logits: np.ndarray, top_k: int, renormalize: bool = True, body=softmax_topk) -> tuple[np.ndarray, np.ndarray]:
    t = logits.shape[0]
    ids, weights = np.full((t, top_k), -1, np.int64), np.full((t, top_k), np.nan, F)
    body(logits, renormalize, np.empty_like(logits), ids, weights)
    return ids, weights


CASES = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 999))


@pytest.mark.nojit
@given(CASES)
def test_softmax_topk_is_the_formula_in_float64(case: tuple[int, int, int, bool, int]) -> None:
    t, n_experts, top_k, renormalize, seed = case
    top_k = min(top_k, n_experts)
    logits = (np.random.default_rng(seed).standard_normal((t, n_experts)) * 3).astype(F)
    ids, weights = route(logits, top_k, renormalize)
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(exact, ids, axis=1)
    assert (np.diff(chosen, axis=1) <= 0).all()
    left_out = exact.copy()
    np.put_along_axis(left_out, ids, 0, axis=1)
    assert (left_out.max(axis=1) <= chosen[:, -1]).all()
    if renormalize:
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    # exp loses 2 u (1 ulp), its argument u of at most 30; the denominator n u, the quotient u; renormalising k u and one more.
    relative = (2 + 30 + n_experts + 1 + (top_k + 1) * renormalize) * U
    assert (np.abs(weights - chosen) <= relative * chosen + 1e-37).all()
    same = route(logits, top_k, renormalize, plain(softmax_topk))
    np.testing.assert_array_equal(ids, same[0])
    np.testing.assert_array_equal(weights, same[1])


@pytest.mark.nojit
def test_ties_go_to_the_lowest_id() -> None:
    ids, weights = route(np.array([[1, 5, 5, 0, 5]], F), 4)
    assert ids.tolist() == [[1, 2, 4, 0]]
    assert weights[0, 0] == weights[0, 1] == weights[0, 2]


@pytest.mark.nojit
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_scores_that_are_not_finite_still_name_distinct_experts(bad: float, everywhere: bool) -> None:
    logits = np.full((2, 5), bad, F) if everywhere else np.array([[1, bad, 3, 0, 2], [1, 2, 3, 4, 5]], F)
    for body in (softmax_topk, plain(softmax_topk)):
        for top_k in range(1, 6):
            with np.errstate(all="ignore"):
                ids, weights = route(logits, top_k, body=body)
            assert all(len(set(row)) == top_k and 0 <= min(row) and max(row) < 5 for row in ids.tolist())
            hidden = not everywhere and bad == -np.inf  # one expert of probability 0 harms no other
            assert np.isfinite(weights[0]).all() if hidden else np.isnan(weights[0]).all()
    if not everywhere:
        assert ids[1].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.nojit
def test_all_experts_without_renormalising_are_the_whole_softmax() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 5)).astype(F)
    ids, weights = route(logits, 5, renormalize=False)
    assert (np.sort(ids, axis=1) == np.arange(5)).all()
    np.testing.assert_allclose(weights.sum(axis=1, dtype=np.float64), 1, atol=5 * 6 * U)


@pytest.mark.nojit
@given(st.integers(0, 12), st.integers(1, 70), st.integers(1, 4), st.integers(0, 999))
def test_lists_hold_every_choice_once_and_in_order(t: int, n_experts: int, top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(top_k, n_experts)
    ids = np.array([rng.permutation(n_experts)[:top_k] for _ in range(t)], np.int64).reshape(t, top_k)
    weights = rng.random((t, top_k)).astype(F)
    starts, rows, scale = np.empty(n_experts + 1, np.int64), np.empty(ids.size, np.int64), np.empty(ids.size, F)
    group_tokens(ids, weights, starts, rows, scale)
    assert starts[0] == 0
    assert starts[-1] == ids.size
    words = -(-n_experts // 32)
    mask = np.full(words, -1, np.int32)
    mark_chosen(ids, mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    for expert in range(n_experts):
        tokens, slots = np.nonzero(ids == expert)
        where = slice(starts[expert], starts[expert + 1])
        np.testing.assert_array_equal(rows[where], tokens)
        np.testing.assert_array_equal(scale[where], weights[tokens, slots])
        local, local_scale, n = np.full(t, -1, np.int64), np.full(t, np.nan, F), np.full(1, -1, np.int64)
        select_expert(ids, weights, expert, local, local_scale, n)
        assert n[0] == tokens.size
        np.testing.assert_array_equal(local, np.pad(tokens, (0, t - tokens.size)))
        np.testing.assert_array_equal(local_scale[: n[0]], scale[where])
        assert bits[expert] == (tokens.size > 0)


@pytest.mark.nojit
def test_bit_sets_merge() -> None:
    mask = np.array([1, -(2**31)], np.int32)
    merge_bits(mask, np.array([6, 1], np.int32))
    assert mask.tolist() == [7, -(2**31) + 1]

"""Routing decisions given instead of computed: recorded, at worst, or drawn from a histogram."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.routing_trace import RoutingTrace


def test_recorded_decisions_lose_their_batch_axis() -> None:
    first, second = np.arange(6).reshape(3, 2), np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    trace = RoutingTrace.recorded([first, second])
    np.testing.assert_array_equal(trace.layer(0), first)
    np.testing.assert_array_equal(trace.layer(1), second.reshape(6, 2))
    assert all(ids.dtype == np.int64 and ids.flags.c_contiguous for ids in trace.topk_ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0.0, 1.0]], "layer 1: a routing trace holds integers of two axes, got float64 with 2"),
        ([0, 1], "layer 1: a routing trace holds integers of two axes, got int64 with 1"),
        ([[True, False]], "layer 1: a routing trace holds integers of two axes, got bool with 2"),
    ],
)
def test_what_is_no_decision_is_refused_by_layer(ids: list, message: str) -> None:
    with pytest.raises(wse.TraceError, match=message):
        RoutingTrace.recorded([[[0, 1]], ids])


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_trace_lacks_is_named(layer: int) -> None:
    trace = RoutingTrace.worst_case(2, 3, 4, 2)
    with pytest.raises(wse.TraceError, match=f"holds 2 MoE layers, number {layer} was asked for"):
        trace.layer(layer)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"), [(1, 8, 2), (3, 8, 2), (4, 8, 2), (100, 8, 2), (5, 7, 3), (2, 3, 3), (9, 1, 1)]
)
def test_worst_case_chooses_as_many_experts_as_it_can(n_tokens: int, n_experts: int, top_k: int) -> None:
    trace = RoutingTrace.worst_case(3, n_tokens, n_experts, top_k)
    assert len(trace.topk_ids) == 3
    for ids in trace.topk_ids:
        assert ids.shape == (n_tokens, top_k)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert np.unique(ids).size == min(n_experts, n_tokens * top_k)
        assert 0 <= ids.min() <= ids.max() < n_experts


def test_histogram_is_drawn_as_often_as_it_says() -> None:
    """With one expert a token the frequencies are the histogram's; five standard deviations of the draw are allowed."""
    counts, n = [[10, 0, 30, 60], [1, 1, 1, 1]], 20_000
    trace = RoutingTrace.from_histogram(counts, n, 1, seed=3)
    for ids, row in zip(trace.topk_ids, counts, strict=True):
        p = np.array(row) / sum(row)
        drawn = np.bincount(ids.ravel(), minlength=4)
        assert (np.abs(drawn - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_histogram_draws_different_experts_for_a_token_and_none_that_was_never_chosen() -> None:
    trace = RoutingTrace.from_histogram([[5, 0, 1, 100]], 500, 3)
    assert (np.sort(trace.layer(0), axis=1) == [0, 2, 3]).all()


def test_a_seed_draws_the_same_and_another_something_else() -> None:
    counts = [[1, 2, 3, 4]]
    first, again, other = (RoutingTrace.from_histogram(counts, 50, 2, seed=seed).layer(0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_mapping_names_its_layers() -> None:
    """In whatever order it lists them."""
    trace = RoutingTrace.from_histogram({1: [0, 1], 0: [1, 0]}, 2, 1)
    assert [ids.tolist() for ids in trace.topk_ids] == [[[0], [0]], [[1], [1]]]
    with pytest.raises(wse.TraceError, match=r"must name the layers 0\.\.1, got \[0, 2\]"):
        RoutingTrace.from_histogram({0: [1, 1], 2: [1, 1]}, 2, 1)


@pytest.mark.parametrize("row", [[1, 0, 0], [1, -1, 4], [[1, 2], [3, 4]]])
def test_a_histogram_that_cannot_be_drawn_from_is_refused_by_layer(row: list) -> None:
    with pytest.raises(wse.TraceError, match=r"layer 1: the histogram must have at least 2 \(`top_k`\) experts above zero and none below"):
        RoutingTrace.from_histogram([[1, 1, 1], row], 4, 2)

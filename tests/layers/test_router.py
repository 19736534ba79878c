"""The routing decision: scores in the stated order, ties to the lowest id, and the set of chosen experts that MemoryX is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence.routing_bounds import expert_weights_bound
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.router import RouterWeights, report_chosen, route
from wse_emu.wafer.placement import Split, TokenBands

from . import definitions
from .definitions import normal
from .programs import agree, any_split, assert_same_bits, look, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))


def rule_of(renormalize: bool) -> RoutingRule:
    return RoutingRule(expert_weighting_normalization=renormalize)


def decide(
    wafer: wse.Wafer, x: F32, gate: F32, top_k: int, *, split: Split | None = None, renormalize: bool = True, chunk: int = 32,
    replay: NDArray[np.int64] | None = None, probe: bool = True,
) -> list[NDArray]:  # fmt: skip
    """Host's ids, weights and logits, what lies on the cores, and the set that was reported."""
    bands = TokenBands(len(x), wafer.rows)
    matrix = streamed(wafer, gate, "router")
    with tokens(wafer, x, bands, split) as placed:
        given_trace = replay if wafer.is_dry else None
        with route(
            wafer, placed, RouterWeights(matrix), bands, top_k, rule_of(renormalize), chunk=chunk, probe=probe, replay=given_trace
        ) as routing:
            chosen = report_chosen(wafer, routing, bands, gate.shape[1])
            values = [routing.topk_ids, routing.topk_weights, look(routing.ids), look(routing.weights), chosen]
            assert (routing.logits is not None) == probe
            if routing.logits is not None:
                values.append(routing.logits)
    return values


def by_definition(x: F32, gate: F32, top_k: int, offsets: NDArray[np.int64]) -> tuple[F32, NDArray[np.int64]]:
    """Scores, and the experts by descending score, equal scores by ascending id."""
    logits = definitions.product(x, gate, offsets)
    return logits, np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


@settings(max_examples=50)
@given(st.integers(0, 1 << 32), GRIDS, st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), st.booleans(), st.sampled_from([2, 3, 32]))
@example(0, (1, 1), 1, 1, 1, True, 32)
@example(1, (5, 5), 1, 2, 8, False, 2)
@example(2, (4, 2), 2, 3, 4, True, 3)
def test_decision_is_softmax_top_k_on_every_executor(seed, grid, m, hidden, n_experts, renormalize, chunk) -> None:
    rng = np.random.default_rng(seed)
    x, gate, split = normal(seed, m, hidden), normal(seed + 1, hidden, n_experts), any_split(rng, hidden, grid[1])
    top_k = int(rng.integers(1, n_experts + 1))
    logits, ids = by_definition(x, gate, top_k, split.offsets)

    def program(wafer: wse.Wafer) -> list[NDArray]:
        return decide(wafer, x, gate, top_k, split=split, renormalize=renormalize, chunk=chunk, replay=ids)

    (host_ids, host_weights, on_cores, weights_on_cores, chosen, scores), wafer = agree(program, *grid)
    assert_same_bits(scores, logits)
    assert_same_bits(host_ids, ids)
    assert_same_bits(on_cores, ids)
    assert_same_bits(weights_on_cores, host_weights)
    assert_same_bits(chosen, np.unique(ids))
    wide = logits.astype(np.float64)
    p = np.exp(wide - wide.max(axis=1, keepdims=True))
    exact = np.take_along_axis(p / p.sum(axis=1, keepdims=True), ids, axis=1)
    if renormalize:
        exact = exact / exact.sum(axis=1, keepdims=True)
    assert (np.abs(host_weights - exact) <= expert_weights_bound(wide, ids, rule_of(renormalize))).all()
    assert sum(e.bytes for e in wafer.ledger.events() if e.kind == "stream") == gate.nbytes


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 2)])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([0, 0, 0, 0, 0], [0, 1, 2]),
        ([1, 2, 1, 2, 2], [1, 3, 4]),
        ([2, 1, 2, 1, 0], [0, 2, 1]),
        ([1, 1, 1, 1, 2], [4, 0, 1]),
    ],
)
def test_equal_scores_go_to_the_lowest_ids(grid: tuple[int, int], columns: list[int], expected: list[int]) -> None:
    """Experts with equal columns score equal bits, whatever the tokens; here the third feature alone speaks."""
    x = np.abs(normal(3, 4, 3))
    gate = np.zeros((3, 5), np.float32)
    gate[2] = columns

    def program(wafer: wse.Wafer) -> list[NDArray]:
        return decide(wafer, x, gate, 3, replay=np.array([expected] * 4))

    (ids, weights, *_), _ = agree(program, *grid)
    assert ids.tolist() == [expected] * 4
    assert (np.diff(weights, axis=1) <= 0).all()


@pytest.mark.parametrize("n_experts", [1, 31, 32, 33, 64, 100])
def test_the_reported_set_is_the_union_of_all_choices(n_experts: int) -> None:
    """Bit sets of several words; the last expert's bit, the sign of a word, included."""
    top_k = min(2, n_experts)
    x = normal(n_experts, 5, 3)
    gate = normal(n_experts + 1, 3, n_experts)
    gate[:, -1] += 4 * x.sum(axis=0)  # the last expert is chosen by some
    _, ids = by_definition(x, gate, top_k, Split.balanced(3, 2).offsets)
    assert n_experts - 1 in ids

    def program(wafer: wse.Wafer) -> list[NDArray]:
        return decide(wafer, x, gate, top_k, replay=ids)

    (*_, chosen, _), wafer = agree(program, 3, 2)
    assert chosen.tolist() == sorted(set(ids.ravel().tolist()))
    control = [e for e in wafer.ledger.events() if e.kind == "control"]
    assert [e.bytes for e in control] == [-(-n_experts // 32) * 4 * n for n in (2, 1)]  # merged over three rows, then out


def test_logits_are_probed_only_if_asked_for() -> None:
    x, gate = normal(0, 3, 4), normal(1, 4, 5)
    wafer = wse.Wafer(rows=2, cols=2)
    decide(wafer, x, gate, 2, probe=False)
    assert "router logits" not in {e.name for e in wafer.ledger.events()}


def test_the_score_block_of_a_meeting_core_is_reserved() -> None:
    """Seven tokens on one row of two columns: four meet on a core, with scores, probabilities, ids (two words) and weights."""
    wafer = wse.Wafer(rows=1, cols=2, executor="dry")
    decide(wafer, normal(0, 7, 4), normal(1, 4, 6), 2, replay=np.array([[0, 1]] * 7))
    assert ("router scores", 4 * (2 * 6 + 2 * 3) * 4) in wafer.sram.high_water_map.blocks


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (None, "needs a routing trace: it computes no scores"),
        ([[0, 1]], r"expected ids of shape \(3, 2\), got \(1, 2\)"),
        ([[0, 1, 2]] * 3, r"expected ids of shape \(3, 2\), got \(3, 3\)"),
        ([[0, 1], [0, 5], [0, 1]], r"token 1 chose \[0, 5\]; expected different experts in 0\.\.4"),
        ([[0, 1], [0, 1], [-1, 1]], r"token 2 chose \[-1, 1\]; expected different experts in 0\.\.4"),
        ([[3, 3], [0, 1], [0, 1]], r"token 0 chose \[3, 3\]; expected different experts in 0\.\.4"),
    ],
)
def test_a_trace_that_is_no_decision_of_this_layer_is_refused(replay: list[list[int]] | None, message: str) -> None:
    wafer = wse.Wafer(rows=2, cols=2, executor="dry")
    with pytest.raises(wse.TraceError, match=message):
        decide(wafer, normal(0, 3, 4), normal(1, 4, 5), 2, replay=None if replay is None else np.array(replay))
    assert not wafer.sram.live

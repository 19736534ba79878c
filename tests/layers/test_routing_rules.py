"""Routers of any rule as mesh programs: biases on their way, experts by number, ties that are refused; every executor, every grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.assigned_routing import assign
from wse_emu.layers.router import RouterWeights, route, router_code
from wse_emu.layers.stream import StreamedVector
from wse_emu.testing.routing_rules import random_rule
from wse_emu.wafer.placement import Split, TokenBands
from wse_kernels.routing import WORK_ROWS, route_tokens

from . import definitions
from .definitions import normal
from .programs import agree, assert_same_bits, look, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def weights_of(wafer: wse.Wafer, gate: F32, bias: F32 | None, correction: F32 | None) -> RouterWeights:
    vectors = [
        None if v is None else StreamedVector(name, None if wafer.is_dry else v)
        for name, v in (("bias", bias), ("correction", correction))
    ]
    return RouterWeights(streamed(wafer, gate, "router"), *vectors)


def decide(
    wafer: wse.Wafer, x: F32, gate: F32, rule: RoutingRule, top_k: int, bias: F32 | None, correction: F32 | None, replay: NDArray[np.int64]
) -> list[NDArray]:
    """Host's ids, weights and logits, and what lies on the cores."""
    bands = TokenBands(len(x), wafer.rows)
    with (
        tokens(wafer, x, bands) as placed,
        route(wafer, placed, weights_of(wafer, gate, bias, correction), bands, top_k, rule, chunk=3, probe=True, replay=replay) as routing,
    ):
        assert routing.logits is not None
        return [routing.topk_ids, routing.topk_weights, routing.logits, look(routing.ids), look(routing.weights)]


@pytest.mark.slow
@settings(max_examples=12)
@given(st.integers(0, 1 << 31), GRIDS, st.integers(1, 7), st.integers(1, 6))
@example(3, (4, 4), 1, 2)
@example(5, (3, 2), 7, 3)
def test_any_rule_decides_alike_on_every_executor_and_grid(seed: int, grid: tuple[int, int], m: int, hidden: int) -> None:
    rng = np.random.default_rng(seed)
    rule, n_experts, top_k = random_rule(rng)
    x, gate = normal(seed, m, hidden), normal(seed + 1, hidden, n_experts)
    bias = normal(seed + 2, n_experts) if rule.router_use_bias else None
    correction = normal(seed + 3, n_experts) if rule.e_score_correction_bias else None
    logits = definitions.product(x, gate, Split.balanced(hidden, grid[1]).offsets)
    ids, weights = np.zeros((m, top_k), np.int64), np.zeros((m, top_k), np.float32)
    given = [np.zeros((1, 1), np.float32) if v is None else v[None] for v in (bias, correction)]
    route_tokens(logits, *given, router_code(rule), np.empty((WORK_ROWS, n_experts), np.float32), ids, weights)

    def program(wafer: wse.Wafer) -> list[NDArray]:
        return decide(wafer, x, gate, rule, top_k, bias, correction, ids)

    (host_ids, host_weights, scores, on_cores, weights_on_cores), wafer = agree(program, *grid)
    assert_same_bits(scores, logits)
    for found in (host_ids, on_cores):
        assert_same_bits(found, ids)
    for found in (host_weights, weights_on_cores):
        assert_same_bits(found, weights)
    vectors = [e for e in wafer.ledger.events() if e.kind == "stream" and e.name != "router"]
    assert [e.name for e in vectors] == [n for n, v in (("bias", bias), ("correction", correction)) if v is not None]
    assert all(e.wavelets == n_experts * min(m, grid[1]) for e in vectors)  # once for every column on which tokens meet


@settings(max_examples=25)
@given(st.integers(0, 1 << 31), GRIDS, st.integers(1, 7))
@example(0, (4, 3), 1)
def test_experts_by_number_are_told_alike_on_every_executor(seed: int, grid: tuple[int, int], m: int) -> None:
    rng = np.random.default_rng(seed)
    rule, n_experts, top_k = random_rule(rng, algorithms=("hash", "uniform"))
    numbers = rng.integers(0, 1000, m)
    expected = (numbers[:, None] + np.arange(top_k)) % n_experts

    def program(wafer: wse.Wafer) -> list[NDArray]:
        bands = TokenBands(m, wafer.rows)
        with assign(wafer, numbers, bands, n_experts, top_k, rule, replay=expected) as routing:
            return [routing.topk_ids, routing.topk_weights, look(routing.ids), look(routing.weights)]

    (ids, weights, on_cores, weights_on_cores), wafer = agree(program, *grid)
    assert_same_bits(ids, expected)
    assert_same_bits(on_cores, expected)
    assert_same_bits(weights, np.full((m, top_k), np.float32(rule.routed_scaling_factor) / np.float32(top_k)))
    assert_same_bits(weights_on_cores, weights)
    (numbers_in,) = [e for e in wafer.ledger.events() if e.kind == "inject"]
    assert numbers_in.bytes == 8 * m * TokenBands(m, grid[0]).n_feature_bands


@pytest.mark.parametrize("executor", ["batched", "isolated", "interpreted"])
def test_a_rejected_tie_names_the_token_and_leaves_nothing_behind(executor: str) -> None:
    x, gate = np.ones((3, 2), np.float32), np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    x[1] = 0
    wafer = wse.Wafer(rows=2, cols=2, executor=executor)
    said = r"token 0 of this pass: experts \[0, 1\] score 0\.468.* alike \(logits \[2\.0, 2\.0\]\), and 1 of them is .*'lowest_id' or"
    with pytest.raises(wse.TieError, match=said):
        decide(wafer, x, gate, RoutingRule(tie_policy="reject"), 1, None, None, np.zeros((3, 1), np.int64))
    assert not wafer.sram.live


LOGITS = RoutingRule(router_selection_nonlinearity="none")


@pytest.mark.parametrize(
    ("rule", "logits", "top_k", "message"),
    [
        (
            RoutingRule(n_group=3, topk_group=1), [1, 4, 4, 2, 0, 3], 1,
            r"groups \[0, 1\] of 2 experts each score 0\.\d+ alike, and 1 of them may be open",
        ),
        (
            replace(LOGITS, n_group=3, topk_group=2, group_score="top2_sum"), [3, 0, 2, 1, 1, 2], 2,
            r"groups \[0, 1, 2\] of 2 experts each score 3\.0 alike, and 2 of them may be open",
        ),
        (replace(LOGITS, n_group=3, topk_group=2), [5, 2, 2, 4, 2, 1], 3, r"experts \[1, 2\] score 2\.0 alike .*, and 1 of them is"),
        (LOGITS, [1] * 12, 5, r"experts \[0, 1, 2, 3, 4, 5, 6, 7\] and 4 more score 1\.0 alike .*, and 5 of them are to be among the 5"),
        (RoutingRule(router_selection_nonlinearity="sinkhorn"), [1, 1, 0], 1, r"experts \[0, 1, 2\] score 1\.0 alike"),
        (replace(LOGITS, e_score_correction_bias=True), [4, 3, 0], 1, r"experts \[0, 1\] score 4\.0 alike \(logits \[4\.0, 3\.0\]\)"),
    ],
)  # fmt: skip
def test_a_rejected_tie_says_what_is_equal(rule: RoutingRule, logits: list[int], top_k: int, message: str) -> None:
    x, gate, wafer = np.ones((1, 1), np.float32), np.array([logits], np.float32), wse.Wafer(rows=1, cols=1)
    bands = TokenBands(1, 1)
    correction = np.array([0, 1, 0], np.float32) if rule.e_score_correction_bias else None
    router, rule = weights_of(wafer, gate, None, correction), replace(rule, tie_policy="reject")
    with tokens(wafer, x, bands) as placed, pytest.raises(wse.TieError, match=f"here: {message}"):
        route(wafer, placed, router, bands, top_k, rule, groups=(1,), where=lambda token: "here")

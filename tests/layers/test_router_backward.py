"""A whole mixture goes backward on the wafer, router and all: every executor, any rule, and on one column the bits of the kernels alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.ffn_backward import experts_ffn_backward
from wse_emu.layers.mixture_gradients import Decision, Mixture, Rules, mixture_gradients
from wse_emu.layers.router import RouterWeights, route
from wse_emu.layers.router_backward import RouterMatrices, router_backward, share_split
from wse_emu.layers.stream import StreamedVector
from wse_emu.testing.routing_rules import random_rule, random_rule_together
from wse_emu.wafer.placement import Split, TokenBands

from .definitions import normal
from .programs import agree, look, room, streamed, tokens
from .test_ffn_backward import close, net_of, on

F32 = NDArray[np.float32]


def check(seed: int, grid: tuple[int, int], m: int, rule: RoutingRule, n_experts: int, top_k: int) -> tuple[F32, Decision]:
    """Gradient of the gate, and the decision."""
    hidden, width, bands = 4, 3, TokenBands(m, grid[0])
    rule = replace(rule, router_use_bias=False, probability_before_ffn=False)
    values, d_values, gate = normal(seed, m, hidden), normal(seed + 9, m, hidden), normal(seed + 1, hidden, n_experts)
    correction = normal(seed + 2, n_experts) * np.float32(0.1) if rule.e_score_correction_bias else None
    nets = [net_of(seed + 10 * e, hidden, width) for e in range(1, n_experts + 1)]
    decided: dict[str, Any] = {}

    def program(wafer: wse.Wafer) -> list[F32]:
        slots = share_split(rule.slots(n_experts, top_k), wafer.cols)
        vector = None if correction is None else StreamedVector("correction", None if wafer.is_dry else correction)
        given = RouterWeights(streamed(wafer, gate, "router"), None, vector)
        with (
            tokens(wafer, values, bands) as x, tokens(wafer, d_values, bands, name="d out") as d_out,
            room(wafer, bands, Split.balanced(hidden, wafer.cols), "d x") as dx, room(wafer, bands, slots, "d weights") as d_share,
            route(
                wafer, x, given, bands, top_k, rule, groups=(m,), probe=True, replay=decided["ids"] if wafer.is_dry else None
            ) as routing,
        ):  # fmt: skip
            if not wafer.is_dry:
                decided.update(ids=routing.topk_ids, weights=routing.topk_weights, logits=routing.logits)
            experts = ((e, on(wafer, net, "silu", f"{e}.")) for e, net in enumerate(nets))
            experts_ffn_backward(wafer, x, routing, experts, width, d_out, dx, d_share, bands, "layer", n_experts=n_experts)
            matrices = RouterMatrices(streamed(wafer, gate, "router again"), streamed(wafer, np.ascontiguousarray(gate.T), "transposed"))
            found = router_backward(wafer, x, matrices, rule, routing, d_share, dx, bands, "router", chunk=3)
            return [look(dx), look(d_share), found]

    (dx, d_share, d_gate), wafer = agree(program, *grid)
    decision = Decision(decided["ids"], decided["weights"], decided["logits"])
    expected = mixture_gradients(values, Mixture(tuple(nets), gate), Rules(routing=rule), decision, d_values)
    close(d_share, expected.topk_weights, grid[1])
    # What comes from the experts' weights by differences is as exact as these.
    size = np.abs(expected.topk_weights).max() * rule.routed_scaling_factor
    if grid[1] == 1:
        close(dx, expected.x, 1)
        close(d_gate, expected.weights.router, 1)
    np.testing.assert_allclose(dx, expected.x, atol=3e-4 * max(1e-3, size, np.abs(expected.x).max()))
    np.testing.assert_allclose(d_gate, expected.weights.router, atol=3e-4 * max(1e-3, size, np.abs(expected.weights.router).max()))
    assert [e.bytes for e in wafer.ledger.events() if (e.kind, e.name) == ("drain", "router")] == [gate.nbytes]
    return d_gate, decision


V3 = replace(ROUTING_PRESETS["deepseek_v3"], n_group=2, topk_group=1)


@pytest.mark.parametrize(
    ("grid", "m", "rule", "top_k"),
    [
        ((3, 1), 5, RoutingRule(null_expert_bias=0.5), 2),
        ((2, 3), 5, V3, 2),
        ((4, 2), 2, RoutingRule(expert_weighting_normalization=False), 1),
        ((2, 2), 6, ROUTING_PRESETS["switch"], 1),
    ],
)
def test_a_whole_mixture_goes_backward(grid: tuple[int, int], m: int, rule: RoutingRule, top_k: int) -> None:
    d_gate, _ = check(3, grid, m, rule, 4, top_k)
    assert (d_gate != 0).any()


def test_a_dead_router_is_dead_on_the_wafer_too() -> None:
    d_gate, _ = check(3, (2, 2), 5, RoutingRule(), 4, 1)
    assert (d_gate == 0).all()


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 1 << 31), st.tuples(st.integers(1, 4), st.integers(1, 3)), st.integers(1, 5), st.booleans())
def test_any_rule_goes_backward(seed: int, grid: tuple[int, int], m: int, meet: bool) -> None:
    rule, n_experts, top_k = (random_rule_together if meet else random_rule)(np.random.default_rng(seed))
    check(seed, grid, m, rule, n_experts, top_k)


@pytest.mark.parametrize("rule", [RoutingRule(router_use_bias=True), RoutingRule(routing_algorithm="hash")])
def test_routers_that_are_not_covered_are_refused(rule: RoutingRule) -> None:
    wafer, bands = wse.Wafer(rows=1, cols=1), TokenBands(1, 1)
    matrices = RouterMatrices(streamed(wafer, normal(0, 2, 3)), streamed(wafer, normal(0, 3, 2)))
    with tokens(wafer, normal(1, 1, 2), bands) as x, pytest.raises(wse.SpecError, match="'learned' and `router_use_bias` False"):
        router_backward(wafer, x, matrices, rule, None, x, x, bands, "router")

"""Backward passes of feed-forward networks on the wafer: one result on every executor, and on one column that of the kernels alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.activations import Activation
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.ffn_backward import BackwardWeights, dense_ffn_backward, experts_ffn_backward
from wse_emu.layers.mixture_gradients import Decision, Mixture, Network, Rules, mixture_gradients
from wse_emu.layers.router import RouterWeights, route
from wse_emu.wafer.placement import Split, TokenBands

from .definitions import normal
from .programs import agree, assert_same_bits, look, room, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
CHUNKS = st.sampled_from([2, 3, 32])
SEEDS = st.integers(0, 1 << 32)
KINDS = st.sampled_from(["silu", "gelu_tanh"])


def net_of(seed: int, hidden: int, width: int) -> Network:
    return Network(normal(seed, hidden, 2 * width), normal(seed + 1, width, hidden))


def on(wafer: wse.Wafer, net: Network, activation: Activation, name: str) -> BackwardWeights:
    matrices = {"gate_up": net.gate_up, "down transposed": net.down.T, "gate_up transposed": net.gate_up.T}
    return BackwardWeights(*(streamed(wafer, np.ascontiguousarray(w), f"{name}{key}") for key, w in matrices.items()), activation)


def close(found: F32, expected: F32, cols: int) -> None:
    """On one column the same bits; on several, sums are chained in other places."""
    if cols == 1:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1e-3, np.abs(expected).max()))


@pytest.mark.parametrize(("grid", "m", "kind"), [((3, 1), 5, "silu"), ((4, 3), 2, "gelu_tanh")])
def test_a_dense_network_goes_backward_on_every_executor(grid: tuple[int, int], m: int, kind: Activation) -> None:
    check_dense(0, grid, m, 4, 5, 3, kind)


@pytest.mark.slow
@settings(max_examples=25)
@given(SEEDS, GRIDS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), CHUNKS, KINDS)
def test_any_dense_network_does(seed, grid, m, hidden, width, chunk, kind) -> None:
    check_dense(seed, grid, m, hidden, width, chunk, kind)


def check_dense(seed: int, grid: tuple[int, int], m: int, hidden: int, width: int, chunk: int, kind: Activation) -> None:
    values, d_values, net = normal(seed, m, hidden), normal(seed + 9, m, hidden), net_of(seed + 1, hidden, width)
    bands = TokenBands(m, grid[0])

    def program(wafer: wse.Wafer) -> list[F32]:
        split = Split.balanced(hidden, wafer.cols)
        with (
            tokens(wafer, values, bands) as x, tokens(wafer, d_values, bands, name="d out") as d_out,
            room(wafer, bands, split, "d x") as dx,
        ):  # fmt: skip
            found = dense_ffn_backward(wafer, x, on(wafer, net, kind, ""), d_out, dx, bands, "layer", chunk=chunk)
            return [look(dx), found.gate_up, found.down]

    (dx, d_gate_up, d_down), wafer = agree(program, *grid)
    # A mixture of one expert whose weight is 1.
    decision = Decision(np.zeros((m, 1), np.int64), np.ones((m, 1), np.float32))
    rules = Rules(routing=RoutingRule(routing_algorithm="hash"), activation=kind)
    expected = mixture_gradients(values, Mixture((net,)), rules, decision, d_values)
    close(dx, expected.x, grid[1])
    close(d_gate_up, expected.weights.experts[0].gate_up, grid[1])
    close(d_down, expected.weights.experts[0].down, grid[1])
    drained = {e.name: e.bytes for e in wafer.ledger.events() if e.kind == "drain"}
    assert drained == {"layer.gate_up": net.gate_up.nbytes, "layer.down": net.down.nbytes}
    streams = {e.name: e.bytes for e in wafer.ledger.events() if e.kind == "stream"}
    assert streams == {"gate_up": net.gate_up.nbytes, "down transposed": net.down.nbytes, "gate_up transposed": net.gate_up.nbytes}


@pytest.mark.parametrize(
    ("seed", "grid", "m", "width", "sorted_once"), [(0, (3, 1), 5, 3, False), (1, (4, 3), 2, 5, True), (2, (2, 4), 6, 2, False)]
)
def test_experts_go_backward_for_the_tokens_that_chose_them(
    seed: int, grid: tuple[int, int], m: int, width: int, sorted_once: bool
) -> None:
    check_experts(seed, grid, m, 4, width, 4, 3, sorted_once)


@pytest.mark.slow
@settings(max_examples=25)
@given(SEEDS, GRIDS, st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), CHUNKS, st.booleans())
def test_any_experts_do(seed, grid, m, hidden, width, n_experts, chunk, sorted_once) -> None:
    check_experts(seed, grid, m, hidden, width, n_experts, chunk, sorted_once)


def check_experts(
    seed: int, grid: tuple[int, int], m: int, hidden: int, width: int, n_experts: int, chunk: int, sorted_once: bool
) -> None:
    rng = np.random.default_rng(seed)
    top_k, bands = int(rng.integers(1, n_experts + 1)), TokenBands(m, grid[0])
    values, d_values, gate = normal(seed, m, hidden), normal(seed + 9, m, hidden), normal(seed + 1, hidden, n_experts)
    nets = [net_of(seed + 10 * e, hidden, width) for e in range(1, n_experts + 1)]
    decided: dict[str, NDArray] = {}

    def program(wafer: wse.Wafer) -> list[F32]:
        split, slots = Split.balanced(hidden, wafer.cols), Split.single(top_k, 0, wafer.cols)
        with (
            tokens(wafer, values, bands) as x, tokens(wafer, d_values, bands, name="d out") as d_out,
            room(wafer, bands, split, "d x") as dx, room(wafer, bands, slots, "d weights") as d_share,
            route(
                wafer, x, RouterWeights(streamed(wafer, gate, "router")), bands, top_k, RoutingRule(), chunk=chunk,
                replay=decided["ids"] if wafer.is_dry else None,
            ) as routing,
        ):  # fmt: skip
            if not wafer.is_dry:
                decided.update(ids=routing.topk_ids, weights=routing.topk_weights)
            experts = ((e, on(wafer, net, "silu", f"{e}.")) for e, net in enumerate(nets))
            way = "optimized" if sorted_once else "experimental"
            found = experts_ffn_backward(
                wafer, x, routing, experts, width, d_out, dx, d_share, bands, "layer", n_experts=n_experts, chunk=chunk, implementation=way
            )
            return [look(dx), look(d_share), *(part for e in range(n_experts) for part in (found[e].gate_up, found[e].down))]

    (dx, d_share, *parts), _ = agree(program, *grid)
    decision = Decision(decided["ids"], decided["weights"])
    rules = Rules(routing=RoutingRule(routing_algorithm="uniform"))  # the experts' part alone
    expected = mixture_gradients(values, Mixture(tuple(nets)), rules, decision, d_values)
    close(dx, expected.x, grid[1])
    close(d_share, expected.topk_weights, grid[1])
    for expert, network in enumerate(expected.weights.experts):
        close(parts[2 * expert], network.gate_up, grid[1])
        close(parts[2 * expert + 1], network.down, grid[1])
        if not (decision.topk_ids == expert).any():
            assert_same_bits(parts[2 * expert], np.zeros_like(network.gate_up))


def test_results_do_not_depend_on_the_number_of_rows() -> None:
    """The gradients of weights too: their sums over tokens are handed from row to row."""
    values, d_values, net = normal(0, 7, 6), normal(1, 7, 6), net_of(2, 6, 5)
    results = []
    for rows in (1, 2, 5, 9):
        wafer, bands = wse.Wafer(rows=rows, cols=3), TokenBands(7, rows)
        split = Split.balanced(6, 3)
        with tokens(wafer, values, bands) as x, tokens(wafer, d_values, bands) as d_out, room(wafer, bands, split) as dx:
            found = dense_ffn_backward(wafer, x, on(wafer, net, "silu", ""), d_out, dx, bands, "layer")
            results.append((look(dx), found.gate_up, found.down))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert_same_bits(ours, first)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_work_block_is_left_behind(rows: int) -> None:
    wafer, bands = wse.Wafer(rows=rows, cols=2, executor="isolated"), TokenBands(3, rows)
    with tokens(wafer, normal(0, 3, 4), bands) as x, room(wafer, bands, Split.balanced(4, 2)) as dx:
        dense_ffn_backward(wafer, x, on(wafer, net_of(1, 4, 3), "silu", ""), x, dx, bands, "layer")
    assert not wafer.sram.live


def test_another_implementation_is_refused() -> None:
    wafer, bands = wse.Wafer(rows=1, cols=1), TokenBands(1, 1)
    with tokens(wafer, normal(0, 1, 2), bands) as x, pytest.raises(wse.InputError, match="got 'functional'"):
        experts_ffn_backward(wafer, x, None, [], 2, x, x, x, bands, "layer", n_experts=1, implementation="functional")

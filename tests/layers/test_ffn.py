"""Feed-forward networks, dense and of experts: the stated sums on every executor, each expert for exactly the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.ffn import ExpertTaps, FfnWeights, dense_ffn, experts_ffn
from wse_emu.layers.router import RouterWeights, route
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor

from . import definitions
from .definitions import normal
from .programs import agree, assert_same_bits, look, room, streamed, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
CHUNKS = st.sampled_from([2, 3, 32])
SEEDS = st.integers(0, 1 << 32)


class Net(NamedTuple):
    """Gate and up columns alternating (hidden, 2 ffn), and down (ffn, hidden)."""

    gate_up: F32
    down: F32

    def on(self, wafer: wse.Wafer, name: str = "") -> FfnWeights:
        return FfnWeights(streamed(wafer, self.gate_up, name + "w_gate_up"), streamed(wafer, self.down, name + "w_down"))

    def hidden(self, x: F32, cols: int) -> F32:
        return definitions.swiglu(definitions.product(x, self.gate_up, Split.balanced(x.shape[1], cols).offsets))

    def out(self, h: F32, cols: int) -> F32:
        return definitions.product(h, self.down, Split.balanced(h.shape[1], cols).offsets)


def net_of(seed: int, hidden: int, width: int) -> Net:
    return Net(normal(seed, hidden, 2 * width), normal(seed + 1, width, hidden))


@settings(max_examples=25)
@given(SEEDS, GRIDS, st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), CHUNKS)
@example(0, (1, 1), 1, 1, 1, 32)
@example(1, (5, 5), 2, 3, 4, 2)
def test_dense_network_is_the_stated_sums_on_every_executor(seed, grid, m, hidden, width, chunk) -> None:
    values, net, bands = normal(seed, m, hidden), net_of(seed + 1, hidden, width), TokenBands(m, grid[0])

    def program(wafer: wse.Wafer) -> list[F32]:
        seen: list[F32] = []

        def probe(name: str, h: PlacedTensor) -> None:
            assert name == "ffn_hidden"
            seen.append(look(h))

        with tokens(wafer, values, bands) as x, room(wafer, bands, Split.balanced(hidden, grid[1])) as out:
            dense_ffn(wafer, x, net.on(wafer), out, bands, chunk=chunk, probe=probe)
            return [*seen, look(out)]

    (h, out), _ = agree(program, *grid)
    assert_same_bits(h, net.hidden(values, grid[1]))
    assert_same_bits(out, net.out(h, grid[1]))


class Mixture(NamedTuple):
    """Tokens, router and experts."""

    x: F32
    gate: F32
    top_k: int
    experts: tuple[Net, ...]
    renormalize: bool = True
    chunk: int = 32

    @property
    def width(self) -> int:
        return len(self.experts[0].down)


def mixture_of(seed: int, m: int, hidden: int, width: int, n_experts: int, **options) -> Mixture:
    top_k = int(np.random.default_rng(seed).integers(1, n_experts + 1))
    experts = tuple(net_of(seed + 10 * e, hidden, width) for e in range(1, n_experts + 1))
    return Mixture(normal(seed, m, hidden), normal(seed + 1, hidden, n_experts), top_k, experts, **options)


def run(
    wafer: wse.Wafer, mix: Mixture, streaming: str = "activated", replay: NDArray | None = None, *, probe: bool = False
) -> list[NDArray]:
    """Output, the decision, and with `probe` the experts' hidden layers and unweighted outputs."""
    (m, hidden), bands = mix.x.shape, TokenBands(len(mix.x), wafer.rows)
    taps = ExpertTaps(*(np.zeros((m, mix.top_k, n), np.float32) for n in (mix.width, hidden))) if probe else None
    with tokens(wafer, mix.x, bands) as x, room(wafer, bands, Split.balanced(hidden, wafer.cols)) as out:
        gate = streamed(wafer, mix.gate, "router")
        with route(
            wafer, x, RouterWeights(gate), bands, mix.top_k, RoutingRule(expert_weighting_normalization=mix.renormalize), chunk=mix.chunk,
            replay=replay if wafer.is_dry else None,
        ) as routing:  # fmt: skip
            names = np.unique(routing.topk_ids) if streaming == "activated" else range(len(mix.experts))

            def weights() -> Iterator[list[tuple[int, FfnWeights]]]:
                for expert in names:
                    yield [(int(expert), mix.experts[expert].on(wafer, f"experts.{expert}."))]

            experts_ffn(
                wafer, x, routing, weights(), mix.width, out, bands, n_experts=len(mix.experts), chunk=mix.chunk, taps=taps
            )  # fmt: skip
            values = [look(out), routing.topk_ids, routing.topk_weights]
    return values if taps is None else [*values, taps.hidden, taps.out]


def by_definition(mix: Mixture, ids: NDArray[np.int64], weights: F32, cols: int) -> tuple[F32, F32, F32]:
    """Output, hidden layers (T, k, ffn) and unweighted outputs (T, k, hidden): token by token, experts ascending, each added with fma."""
    m, hidden = mix.x.shape
    out = np.zeros((m, hidden), np.float32)
    hs, ys = np.zeros((m, mix.top_k, mix.width), np.float32), np.zeros((m, mix.top_k, hidden), np.float32)
    for t in range(m):
        for slot in np.argsort(ids[t]):
            net = mix.experts[ids[t, slot]]
            hs[t, slot] = net.hidden(mix.x[t : t + 1], cols)
            ys[t, slot] = net.out(hs[t, slot][None], cols)
            out[t] = definitions.combine(out[t : t + 1], weights[t, slot][None], ys[t, slot][None])
    return out, hs, ys


@settings(max_examples=25)
@given(SEEDS, GRIDS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans(), CHUNKS, st.booleans())
@example(0, (1, 1), 1, 1, 1, 1, True, 32, True)
@example(1, (5, 2), 2, 3, 4, 5, True, 2, True)
@example(2, (2, 5), 7, 2, 3, 4, False, 3, False)
def test_mixture_is_the_stated_sums_on_every_executor(seed, grid, m, hidden, width, n_experts, renormalize, chunk, probe) -> None:
    mix = mixture_of(seed, m, hidden, width, n_experts, renormalize=renormalize, chunk=chunk)
    _, ids, _ = run(wse.Wafer(rows=grid[0], cols=grid[1]), mix)[:3]
    (out, topk_ids, topk_weights, *taps), _ = agree(lambda wafer: run(wafer, mix, replay=ids, probe=probe), *grid)
    assert_same_bits(topk_ids, ids)
    expected, hs, ys = by_definition(mix, ids, topk_weights, grid[1])
    assert_same_bits(out, expected)
    if probe:
        assert_same_bits(taps[0], hs)
        assert_same_bits(taps[1], ys)


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (9, 2)])
def test_experts_that_nobody_chose_change_no_bit_when_they_stream_past(grid: tuple[int, int]) -> None:
    mix = mixture_of(4, 3, 5, 4, 9)._replace(top_k=1)
    few = run(wse.Wafer(rows=grid[0], cols=grid[1]), mix)
    (many, ids, _), wafer = agree(lambda wafer: run(wafer, mix, "all", replay=few[1]), *grid)
    assert_same_bits(many, few[0])
    chosen = set(ids.ravel().tolist())
    assert len(chosen) < 9
    work = {e.name: e for e in wafer.ledger.events() if e.kind in ("stream", "chain", "deliver")}
    for expert, net in enumerate(mix.experts):
        streams = [e for e in wafer.ledger.events() if e.kind == "stream" and e.name == f"experts.{expert}.w_gate_up"]
        assert [e.bytes for e in streams] == [net.gate_up.nbytes]
        assert (work[f"experts.{expert}.w_down"].count > 0) <= (expert in chosen)


def test_one_expert_for_all_tokens_and_all_experts_for_each() -> None:
    mix = mixture_of(6, 4, 3, 4, 3)
    same = mix._replace(gate=np.zeros_like(mix.gate), top_k=1)  # equal scores: the lowest id
    out, ids, weights = run(wse.Wafer(rows=2, cols=2), same)
    assert not ids.any()
    assert (weights == 1).all()
    assert_same_bits(out, mix.experts[0].out(mix.experts[0].hidden(mix.x, 2), 2) + np.float32(0))
    out, ids, weights = run(wse.Wafer(rows=2, cols=2), mix._replace(top_k=3))
    assert (np.sort(ids, axis=1) == [0, 1, 2]).all()
    assert_same_bits(out, by_definition(mix._replace(top_k=3), ids, weights, 2)[0])


def test_no_token_is_served_twice_or_left_out() -> None:
    """Multiply-adds of the ledger: every token visits exactly its `top_k` experts; rows that hold replicas of it share the work.

    Only its few scores are computed on every row that holds it.
    """
    mix = mixture_of(8, 6, 4, 5, 4)._replace(top_k=2)
    for rows in (1, 4, 6, 13):
        wafer = wse.Wafer(rows=rows, cols=3)
        run(wafer, mix)
        macs = {name: sum(e.macs for e in wafer.ledger.events() if e.name == name) for name in ("partial_matmul", "combine_into")}
        replicas = TokenBands(6, rows).n_feature_bands
        assert macs == {"partial_matmul": replicas * 6 * 4 * 4 + 6 * 2 * 4 * 5 * 3, "combine_into": 6 * 2 * 4}

"""Gradients of one mixture on the kernels: three ways with one result, against float64, in pieces, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.equivalence.gradient_bounds import mixture_gradients_bound
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.mixture_gradients import (
    Balance,
    Decision,
    Mixture,
    MixtureGradients,
    Network,
    Rules,
    balance_gradient,
    mixture_gradients,
)
from wse_emu.reference import ffn_gradients, routing
from wse_emu.reference.load_balance import batch_load_balancing_gradient, load_balancing_gradient
from wse_emu.reference.routing_gradients import scores_jacobian
from wse_emu.reference.tensors import Expert
from wse_kernels.errors import DTypeError, ShapeError
from wse_kernels.routing_backward import count_visits

from ..reference.blocks import Block, block_of, drawn, spec_of

F = np.float32
IMPLEMENTATIONS = ("functional", "experimental", "optimized")


def streamed(tensors: dict[tuple[str, Expert], np.ndarray], expert: Expert) -> Network:
    """A network as it streams, (in, out), gate and up alternating, from published order."""
    gate, up, down = (tensors[name, expert] for name in ("w_gate", "w_up", "w_down"))
    biases: list[np.ndarray | None] = [None, None]
    if ("b_down", expert) in tensors:
        biases = [np.stack([tensors["b_gate", expert], tensors["b_up", expert]], axis=1).reshape(1, -1), tensors["b_down", expert][None]]
    parts = [np.stack([gate, up], axis=1).reshape(-1, gate.shape[1]).T, down.T, *biases]
    return Network(*(None if part is None else np.ascontiguousarray(part, F) for part in parts))


def mixture(block_or_gradients: dict[tuple[str, Expert], np.ndarray], n_experts: int) -> Mixture:
    tensors = block_or_gradients
    turned = {name: np.ascontiguousarray(tensors[name, None].T, F) for name in ("router", "shared_gate") if (name, None) in tensors}
    bias = tensors["router_bias", None].astype(F)[None] if ("router_bias", None) in tensors else None
    return Mixture(
        tuple(streamed(tensors, e) for e in range(n_experts)), turned.get("router"), bias,
        streamed(tensors, "shared") if ("w_down", "shared") in tensors else None, turned.get("shared_gate"),
    )  # fmt: skip


def rules_of(block: Block) -> Rules:
    return Rules(routing=block.spec.routing, activation=block.spec.activation, clamped=block.spec.clamped_experts)


def decided(block: Block, x: np.ndarray, numbers: np.ndarray) -> Decision:
    """By the plain definition; logits and weights as float32 has them."""
    with np.errstate(all="ignore"):
        stages = block.forward(x, numbers)
        logits = stages.get("router_logits")
        if logits is None:
            return Decision(stages["topk_ids"], stages["topk_weights"].astype(F))
        logits = logits.astype(F)
        share = stages["topk_weights"]
        if not block.spec.routing.weighs_together:
            share = routing.weights(logits.astype(np.float64), stages["topk_ids"], block.spec.routing)
    return Decision(stages["topk_ids"], share.astype(F), logits)


def gradients(block: Block, x: np.ndarray, decision: Decision, d_out: np.ndarray, **more: object) -> MixtureGradients:
    return mixture_gradients(x.astype(F), mixture(block.tensors, block.spec.num_experts), rules_of(block), decision, d_out, **more)


def named(found: MixtureGradients) -> dict[str, np.ndarray]:
    first = {"x": found.x, "topk_weights": found.topk_weights} | ({} if found.logits is None else {"logits": found.logits})
    return first | found.weights.arrays()


def assert_same(found: MixtureGradients, expected: MixtureGradients) -> None:
    found, expected = named(found), named(expected)
    assert list(found) == list(expected)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def ways(block: Block) -> tuple[str, ...]:
    return IMPLEMENTATIONS[1:] if block.spec.routing.probability_before_ffn else IMPLEMENTATIONS


@settings(max_examples=25)
@given(st.integers(0, 1 << 31), st.integers(1, 6))
def test_any_mixture_agrees_with_float64_in_all_ways_and_in_pieces(seed: int, tokens: int) -> None:
    block, x, numbers = drawn(seed, tokens)
    rng = np.random.default_rng(seed)
    decision, d_out = decided(block, x, numbers), rng.standard_normal(x.shape).astype(F)
    first, *others = (gradients(block, x, decision, d_out, implementation=way) for way in ways(block))
    for other in others:
        assert_same(other, first)
    # Against float64.
    wide = [None if a is None else a.astype(np.float64) for a in (decision.topk_weights, d_out, decision.logits)]
    with np.errstate(all="ignore"):
        exact = ffn_gradients.mixture_gradients(block, 0, x, decision.topk_ids, *wide)
        bound = mixture_gradients_bound(block, 0, x, decision.topk_ids, *wide)
    n = block.spec.num_experts
    pairs = [("x", first.x, exact.x, bound.x), ("topk_weights", first.topk_weights, exact.topk_weights, bound.topk_weights)]
    if first.logits is not None:
        pairs.append(("logits", first.logits, exact.logits, bound.logits))
    arrays = [m.arrays() for m in (first.weights, mixture(exact.weights, n), mixture(bound.weights, n))]
    assert list(arrays[0]) == list(arrays[1])
    pairs += [(name, *(part[name] for part in arrays)) for name in arrays[0]]
    for name, ours, right, allowed in pairs:
        off = np.abs(ours.astype(np.float64) - right) - allowed * (1 + 1e-6) - 2.0**-24 * np.abs(right)  # turned to float32 to compare
        assert (off <= 0).all(), (name, off.max())
    # In two pieces, one after the other: the bits of the whole.
    cut = int(rng.integers(tokens + 1))
    into = None
    for piece in (slice(cut), slice(cut, tokens)):
        part = Decision(*(None if a is None else a[piece] for a in (decision.topk_ids, decision.topk_weights, decision.logits)))
        found = gradients(block, x[piece], part, d_out[piece], into=into, implementation=ways(block)[int(rng.integers(len(ways(block))))])
        np.testing.assert_array_equal(found.x, first.x[piece])
        into = found.weights
    for name, value in first.weights.arrays().items():
        np.testing.assert_array_equal(into.arrays()[name], value, err_msg=name)


def toy(rule: RoutingRule, top_k: int, tokens: int = 24) -> tuple[Block, np.ndarray, np.ndarray]:
    """A block of four experts, input, and a gradient of its output."""
    rng = np.random.default_rng(5)
    block = block_of(spec_of(rule, 4, top_k, hidden=8, width=6), rng)
    return block, rng.standard_normal((tokens, 8)).astype(F).astype(np.float64), rng.standard_normal((tokens, 8)).astype(F)


NUMBERS = np.arange(24)


@pytest.mark.parametrize(
    ("rule", "top_k", "dead"),
    [
        (RoutingRule(), 1, True),
        (RoutingRule(null_expert_bias=1.1), 1, False),
        (RoutingRule(null_expert_bias=10.0), 1, False),
        (RoutingRule(expert_weighting_normalization=False), 1, False),
        (RoutingRule(), 2, False),
        (ROUTING_PRESETS["switch"], 1, False),
        (RoutingRule(router_selection_nonlinearity="sinkhorn"), 1, True),
        (RoutingRule(router_selection_nonlinearity="sinkhorn"), 2, False),
        (RoutingRule(router_selection_nonlinearity="sinkhorn", expert_weighting_nonlinearity="sigmoid"), 1, True),
        (RoutingRule(router_selection_nonlinearity="sinkhorn", expert_weighting_normalization=False), 1, False),
        (RoutingRule(router_selection_nonlinearity="sinkhorn", expert_weighting_nonlinearity="sinkhorn"), 2, True),
    ],
)
@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_a_router_whose_weights_are_constant_gets_exactly_nothing(rule: RoutingRule, top_k: int, dead: bool, way: str) -> None:
    block, x, d_out = toy(rule, top_k)
    found = gradients(block, x, decided(block, x, NUMBERS), d_out, implementation=way)
    assert (np.abs(found.topk_weights) > 0).any()
    assert (np.linalg.norm(found.weights.router) == 0) == dead
    assert (found.logits == 0).all() == dead


@pytest.mark.parametrize(("algorithm", "top_k"), [("hash", 1), ("uniform", 2)])
def test_experts_by_number_have_no_router_to_train(algorithm: str, top_k: int) -> None:
    block, x, d_out = toy(RoutingRule(routing_algorithm=algorithm), top_k)
    found = gradients(block, x, decided(block, x, NUMBERS), d_out)
    assert found.logits is None
    assert "router" not in found.weights.arrays()
    assert all((array != 0).any() for array in found.weights.arrays().values())


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_an_expert_that_nobody_chose_gets_exactly_nothing(way: str) -> None:
    block, x, d_out = toy(RoutingRule(), 2)
    decision = decided(block, x, NUMBERS)
    ids = decision.topk_ids.copy()
    ids[(decision.topk_ids == 2).any(axis=1)] = [0, 1]
    found = gradients(block, x, replace(decision, topk_ids=ids), d_out, implementation=way)
    assert all((array == 0).all() for array in found.weights.experts[2].arrays().values())
    assert all((array != 0).any() for array in found.weights.experts[0].arrays().values())


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_an_expert_that_overflows_spoils_only_those_who_chose_it(way: str) -> None:
    block, x, d_out = toy(RoutingRule(), 1)
    block.tensors["w_gate", 3] = block.tensors["w_gate", 3] * 3e38
    block.tensors["w_up", 3] = block.tensors["w_up", 3] * 3e38
    logits = np.tile(np.array([3, 2, 1, 0], F), (24, 1))
    decision = Decision(np.array([[0]] * 12 + [[1]] * 12), np.ones((24, 1), F), logits)
    found = gradients(block, x, decision, d_out, implementation=way)
    assert all(np.isfinite(array).all() for array in named(found).values())


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
@pytest.mark.parametrize("rule", [RoutingRule(), ROUTING_PRESETS["switch"]])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(pieces: int, rule: RoutingRule) -> None:
    """Whatever the number of pieces: routing is per token (or per sequence), and sums go on where they stood."""
    block, x, d_out = toy(rule, 1 if rule.has_capacity else 2)
    decision = decided(block, x, NUMBERS)  # of the whole batch, as batch tiling has it
    whole, into = gradients(block, x, decision, d_out), None
    for piece in np.split(np.arange(24), pieces):
        part = Decision(decision.topk_ids[piece], decision.topk_weights[piece], decision.logits[piece])
        found = gradients(block, x[piece], part, d_out[piece], into=into)
        np.testing.assert_array_equal(found.x, whole.x[piece])
        np.testing.assert_array_equal(found.logits, whole.logits[piece])
        into = found.weights
    for name, value in whole.weights.arrays().items():
        np.testing.assert_array_equal(into.arrays()[name], value, err_msg=name)


@pytest.mark.parametrize(("over", "reference"), [("sequence", load_balancing_gradient), ("batch", batch_load_balancing_gradient)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "none"])
def test_a_loss_for_even_use_is_added_to_the_gradient_of_the_router(over: str, reference, kind: str) -> None:
    """Two layers, three sequences of eight tokens, some of which do not count."""
    rule = RoutingRule(router_selection_nonlinearity=kind)
    block, x, d_out = toy(rule, 2)
    inputs = x, np.roll(x, 1, axis=1)
    layers = [decided(block, each, NUMBERS) for each in inputs]
    mask = np.ones((3, 8), np.bool_)
    mask[1, :5], mask[2, 7:] = False, over == "batch"
    sequence = np.where(mask, np.arange(3)[:, None], -1).ravel()
    counts = np.zeros((2, 3, 4), np.int64)
    for layer, one in enumerate(layers):
        count_visits(one.topk_ids, sequence, counts[layer])
    rows = balance_gradient(counts, mask.sum(axis=1), 2.0, over=over)
    exact = 2.0 * reference(np.stack([one.topk_ids for one in layers]).reshape(2, 3, 8, 2), 4, mask).reshape(2, 24, 4)
    for layer, (one, each) in enumerate(zip(layers, inputs, strict=True)):
        plain, more = (gradients(block, each, one, d_out, balance=balance) for balance in (None, Balance(sequence, rows[layer])))
        jacobian = scores_jacobian(one.logits.astype(np.float64), "softmax" if kind == "none" else kind)
        right = np.einsum("ta,tae->te", exact[layer], jacobian)
        assert (right[~mask.ravel()] == 0).all()
        np.testing.assert_allclose(more.logits.astype(np.float64) - plain.logits, right, atol=4 * 2.0**-24 * np.abs(plain.logits).max())
        assert np.abs(right).max() > 1e-3
        difference = more.weights.router.astype(np.float64) - plain.weights.router
        np.testing.assert_allclose(difference, each.T @ right, atol=1e-5)
        np.testing.assert_array_equal(more.topk_weights, plain.topk_weights)


def test_a_dead_router_still_learns_to_balance() -> None:
    block, x, d_out = toy(RoutingRule(), 1)
    decision, sequence, counts = decided(block, x, NUMBERS), np.zeros(24, np.int64), np.zeros((1, 1, 4), np.int64)
    count_visits(decision.topk_ids, sequence, counts[0])
    balance = Balance(sequence, balance_gradient(counts, np.array([24]), 0.01)[0])
    assert np.linalg.norm(gradients(block, x, decision, d_out).weights.router) == 0
    assert np.linalg.norm(gradients(block, x, decision, d_out, balance=balance).weights.router) > 1e-4


def refused(block: Block, x: np.ndarray, decision: Decision, d_out: np.ndarray, error: type[Exception], match: str, **more: object) -> None:
    with pytest.raises(error, match=match):
        gradients(block, x, decision, d_out, **more)


def test_what_does_not_fit_is_refused() -> None:
    block, x, d_out = toy(RoutingRule(), 2)
    decision = decided(block, x, NUMBERS)
    ids = decision.topk_ids

    def with_id(row: list[int]) -> Decision:
        changed = ids.copy()
        changed[3] = row
        return replace(decision, topk_ids=changed)

    refused(block, x, with_id([0, 4]), d_out, wse.InputError, r"must lie in -1\.\.3, got 0\.\.4")
    refused(block, x, with_id([-2, 0]), d_out, wse.InputError, r"got -2\.\.3")
    refused(block, x, with_id([1, 1]), d_out, wse.InputError, "at most once")
    refused(block, x, with_id([-1, 1]), d_out, wse.InputError, "last slots only")
    refused(block, x, replace(decision, logits=None), d_out, wse.InputError, "`logits` and `router` must be given with `routing_algorithm`")
    refused(block, x, decision, d_out, wse.InputError, "one of functional, experimental, optimized", implementation="dense")
    refused(block, x, decision, d_out[:, :7], ShapeError, "axis `hidden` of `d_out` is 7")
    refused(block, x, decision, d_out.astype(np.float64), DTypeError, "`d_out` must be float32")
    refused(block, x, replace(decision, topk_ids=ids[:5]), d_out, ShapeError, "`topk_ids` must have axes")
    refused(block, x, replace(decision, topk_ids=ids.astype(np.int32)), d_out, DTypeError, "int64")
    other = toy(RoutingRule(router_use_bias=True), 2)[0]
    refused(block, x, decision, d_out, wse.InputError, "`into` must have", into=mixture(other.tensors, 4))
    before = toy(RoutingRule(probability_before_ffn=True), 2)[0]
    refused(before, x, decision, d_out, wse.SpecError, "not with 'functional'", implementation="functional")
    rows = np.zeros((1, 4), F)
    with pytest.raises(wse.InputError, match="`over` must be"):
        balance_gradient(np.ones((1, 1, 4), np.int64), np.array([3]), 1.0, over="layer")
    refused(block, x, decision, d_out, wse.InputError, r"`sequence` must lie in -1\.\.0, got -1\.\.1", balance=Balance(NUMBERS % 2, rows))
    sinkhorn = toy(RoutingRule(router_selection_nonlinearity="sinkhorn"), 2)[0]
    refused(sinkhorn, x, decision, d_out, wse.SpecError, "it has no gradient", balance=Balance(NUMBERS * 0, rows))
    weights = mixture(block.tensors, 4)
    short = replace(weights, experts=weights.experts[:3])
    with pytest.raises(wse.InputError, match="a column for each of 3 experts, got 4"):
        mixture_gradients(x.astype(F), short, Rules(), decision, d_out)
    narrow = replace(weights.experts[0], gate_up=np.zeros((8, 10), F))
    with pytest.raises(wse.InputError, match=r"2 \* 6 columns, as `down` has rows, got 10"):
        mixture_gradients(x.astype(F), replace(weights, experts=(narrow,) * 4), Rules(), decision, d_out)
    with pytest.raises(wse.InputError, match="belong to `clamped`"):
        mixture_gradients(x.astype(F), weights, Rules(clamped=ClampedExperts()), decision, d_out)

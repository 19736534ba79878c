"""What a mixture promises: no token lost without a capacity, 16 bits decide ties, and only what is visited need be streamed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.routing_rule import ROUTING_PRESETS

from .test_routing_rules import PROMPTS, SPEC, model_of


@pytest.mark.parametrize("preset", sorted(set(ROUTING_PRESETS) - {"switch"}))
def test_without_a_capacity_every_token_has_all_its_experts(preset: str) -> None:
    rule = ROUTING_PRESETS[preset]
    spec = replace(SPEC, num_experts=16, routing=rule)
    for ids in model_of(spec)(PROMPTS).topk_ids:
        assert np.bincount(ids.reshape(-1), minlength=16).sum() == PROMPTS.size * spec.top_k
        assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()


def test_probabilities_of_16_bits_decide_alike_in_any_piece_of_a_batch() -> None:
    """Rounded to 16 bits scores are often equal; the lowest id wins, whatever runs beside a token."""
    spec = replace(SPEC, num_experts=8, routing=MoEConfig(num_experts=8, top_k=2, fp16_type="cb16").routing)
    prompts = np.random.default_rng(2).integers(0, 41, (4, 9))
    whole = model_of(spec)(prompts)
    for i in range(4):
        alone = model_of(spec, rows=2, cols=2, prefill_chunk=2)(prompts[i : i + 1])
        for ours, theirs in zip(alone.topk_ids, whole.topk_ids, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[i])


def test_activated_experts_are_the_union_that_uniform_choice_expects() -> None:
    """Of E experts, T tokens with k random ones each visit ``E (1 - (1 - k / E)**T)`` in the mean; only those are streamed."""
    n_experts, top_k, n_tokens = 32, 2, 12
    spec = replace(SPEC, num_experts=n_experts, top_k=top_k, num_layers=1)
    seen = []
    for seed in range(60):
        trace = RoutingTrace.from_histogram([[1] * n_experts], n_tokens, top_k, seed)
        model = model_of(spec, executor="dry")
        model(np.zeros((1, n_tokens), np.int64), routing=trace)
        seen.append(len({e.name for e in model.wafer.ledger.events() if e.kind == "stream" and "experts." in e.name and "down" in e.name}))
    expected = n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)
    assert abs(np.mean(seen) - expected) < 4 * np.std(seen) / np.sqrt(len(seen))


def test_options_are_refused_with_the_rule() -> None:
    for options, message in (
        ({"top_k": 2, "routing": wse.RoutingRule(routing_algorithm="hash")}, "`top_k` must be 1 with `routing_algorithm` 'hash', got 2"),
        ({"routing": wse.RoutingRule(n_group=3)}, "`n_group` must divide the experts, got 3 groups of 4 experts"),
    ):
        with pytest.raises(wse.SpecError, match=message):
            replace(SPEC, **options)
    with pytest.raises(wse.SpecError, match="`load_balancing_loss_coef` must be 0 with `router_selection_nonlinearity` 'sinkhorn'"):
        MoEConfig(num_experts=4, router_selection_nonlinearity="sinkhorn", load_balancing_loss_coef=0.1)
    assert MoEConfig(num_experts=4, router_selection_nonlinearity="sinkhorn", sinkhorn_n_iters=3).routing.tokens_meet

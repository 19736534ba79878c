"""What a mixture promises: no token lost without a capacity, 16 bits decide ties, and only what is visited need be streamed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.routing_rule import ROUTING_PRESETS
from wse_emu.wafer.ledger import Event

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


def test_what_streams_is_the_union_of_what_the_routers_chose() -> None:
    """Of the experts those that some token visits, whole and once, in every layer of every pass; or all, with the same bits."""
    spec = replace(SPEC, num_experts=32, routing=wse.RoutingRule(router_selection_nonlinearity="sigmoid"))
    model, every = model_of(spec), model_of(spec, stream_experts="all")
    out = model(PROMPTS)
    np.testing.assert_array_equal(out.logits, every(PROMPTS).logits)
    one = 4 * 3 * spec.hidden_size * spec.moe_intermediate_size
    for layer, ids in enumerate(out.topk_ids):
        of_layers = [streamed_experts(of.wafer.ledger.events(), layer) for of in (model, every)]
        chosen = np.unique(ids).tolist()
        assert 2 < len(chosen) < 32
        assert of_layers == [dict.fromkeys(chosen, one), dict.fromkeys(range(32), one)]
    model.wafer.ledger.clear()
    model.generate(PROMPTS[:1], 3)
    bytes_in = sum(sum(streamed_experts(model.wafer.ledger.events(), layer).values()) for layer in range(spec.num_layers))
    assert bytes_in == one * sum(np.unique(ids).size for trace in model.recorded_routing for ids in trace.topk_ids)


def streamed_experts(events: Sequence[Event], layer: int) -> dict[int, int]:
    """Bytes that streamed of every expert of a layer."""
    found: dict[int, int] = {}
    for event in events:
        name = re.fullmatch(rf"layers\.{layer}\.experts\.(\d+)\..*", event.name)
        if event.kind == "stream" and name is not None:
            found[int(name[1])] = found.get(int(name[1]), 0) + event.bytes
    return found


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

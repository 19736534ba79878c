"""Models under any routing rule: every executor, the reference, and nobody's neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.testing.routing_rules import random_rule

SPEC = ModelSpec(
    family="mixtral", vocab_size=41, hidden_size=12, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64, num_experts=4, top_k=2, moe_intermediate_size=8,
)  # fmt: skip
PROMPTS = np.random.default_rng(0).integers(0, 41, (3, 5))


def spec_of(seed: int) -> ModelSpec:
    rule, num_experts, top_k = random_rule(np.random.default_rng(seed), algorithms=("learned",) * 6 + ("hash", "uniform"))
    return replace(SPEC, num_experts=num_experts, top_k=top_k, routing=rule)


def model_of(spec: ModelSpec, rows: int = 3, cols: int = 2, executor: str = "batched", **options) -> wse.WaferModel:
    return wse.from_config(spec, seed=1, wafer=wse.Wafer(rows=rows, cols=cols, executor=executor), **options)




@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 31))
@example(2)
@example(4)
def test_verify_passes_under_any_rule(seed: int) -> None:
    report = model_of(spec_of(seed)).verify(PROMPTS)
    assert report.passed, report


@pytest.mark.slow
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 31))
def test_grid_rows_chunks_and_neighbours_do_not_matter(seed: int) -> None:
    spec = spec_of(seed)
    whole = model_of(spec)(PROMPTS)
    for other in (
        model_of(spec, rows=7)(PROMPTS), model_of(spec, rows=1)(PROMPTS), model_of(spec, prefill_chunk=2)(PROMPTS),
        model_of(spec, stream_experts="all")(PROMPTS),
    ):  # fmt: skip
        np.testing.assert_array_equal(other.logits, whole.logits)
        for ours, theirs in zip(other.topk_ids, whole.topk_ids, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(model_of(spec)(prompt).logits[0], whole.logits[i])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 8])
def test_isolated_cores_give_the_same_bits_and_ledger(seed: int) -> None:
    spec = spec_of(seed)
    models = [model_of(spec, executor=executor) for executor in ("batched", "isolated")]
    outs = [model(PROMPTS[:1]) for model in models]
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()


@pytest.mark.parametrize("algorithm", ["hash", "uniform"])
def test_no_gate_is_streamed_where_scores_are_not_learned(algorithm: str) -> None:
    model = model_of(replace(SPEC, top_k=1, routing=RoutingRule(routing_algorithm=algorithm)))
    out = model(PROMPTS, output_router_logits=True)
    numbers = PROMPTS if algorithm == "hash" else np.broadcast_to(np.arange(5), (3, 5))
    for ids, weights in zip(out.topk_ids, out.topk_weights, strict=True):
        np.testing.assert_array_equal(ids[..., 0], numbers % 4)
        assert (weights == 1).all()
    assert out.router_logits == ()
    assert not [e for e in model.wafer.ledger.events() if "router" in e.name and e.kind == "stream"]


def test_cached_decode_goes_by_token_ids_and_positions_too() -> None:
    for algorithm in ("hash", "uniform"):
        model = model_of(replace(SPEC, top_k=1, routing=RoutingRule(routing_algorithm=algorithm)))
        ids = model.generate(PROMPTS, max_new_tokens=4)
        assert model.verify(ids, n_prompt=5).passed


def test_a_rule_that_config_json_cannot_say_is_not_lost_in_silence(tmp_path) -> None:
    model = model_of(replace(SPEC, routing=ROUTING_PRESETS["gpt_oss"]))
    with pytest.raises(wse.SaveError, match="cannot say this model's `routing`"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 31), st.integers(1, 4), st.integers(1, 3))
@example(2, 7, 2)
def test_three_implementations_give_the_same_bits(seed: int, rows: int, cols: int) -> None:
    spec = spec_of(seed)
    spec = replace(spec, routing=replace(spec.routing, probability_before_ffn=False))
    outs = [model_of(spec, rows, cols, moe_implementation=name)(PROMPTS) for name in ("functional", "experimental", "optimized")]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.logits, outs[0].logits)


@pytest.mark.parametrize("implementation", ["functional", "optimized"])
def test_an_implementation_leaves_one_ledger_on_every_executor_and_passes_verify(implementation: str) -> None:
    executors = ("batched", "isolated", "interpreted", "dry")
    models = [model_of(SPEC, executor=executor, moe_implementation=implementation) for executor in executors]
    outs = [model(PROMPTS[:1, :2]) for model in models[:3]]
    models[3](PROMPTS[:1, :2], routing=models[0].recorded_routing)
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    for model in models[1:]:
        assert model.wafer.ledger.events() == models[0].wafer.ledger.events()
        assert model.wafer.sram.high_water_bytes == models[0].wafer.sram.high_water_bytes
    report = models[0].verify(PROMPTS)
    assert report.passed, report


def test_implementations_are_counted_as_what_they_do() -> None:
    """Every expert for every token: num_experts / top_k times the experts' work. Sorting: one launch for all experts."""
    events = {}
    for name in ("functional", "experimental", "optimized"):
        model = model_of(SPEC, moe_implementation=name)
        model(PROMPTS)
        events[name] = [e for e in model.wafer.ledger.events() if e.stage == "experts"]

    def macs(name: str, launch: str) -> int:
        return sum(e.macs for e in events[name] if e.name == launch)

    assert macs("functional", "partial_matmul") == macs("experimental", "partial_matmul") * SPEC.num_experts // SPEC.top_k
    assert macs("optimized", "partial_matmul") == macs("experimental", "partial_matmul")
    assert macs("functional", "combine_rows") == macs("experimental", "combine_into")
    launches = {name: [e.name for e in of] for name, of in events.items()}
    assert launches["experimental"].count("select_expert") == SPEC.num_layers * SPEC.num_experts
    assert launches["optimized"].count("group_tokens") == SPEC.num_layers
    assert "select_expert" not in launches["optimized"]


def test_weights_before_the_expert_are_not_for_functional() -> None:
    spec = replace(SPEC, routing=RoutingRule(probability_before_ffn=True))
    with pytest.raises(wse.SpecError, match="with `probability_before_ffn` use 'experimental' or 'optimized'"):
        model_of(spec, moe_implementation="functional")  # before it is called
    with pytest.raises(wse.SpecError, match="`moe_implementation` must be one of functional, experimental, optimized, got 'fast'"):
        model_of(SPEC, moe_implementation="fast")


@pytest.mark.parametrize("implementation", ["experimental", "optimized"])
def test_weights_before_the_expert_on_isolated_cores(implementation: str) -> None:
    spec = replace(SPEC, routing=RoutingRule(probability_before_ffn=True, expert_weighting_normalization=False))
    models = [model_of(spec, executor=executor, moe_implementation=implementation) for executor in ("batched", "isolated")]
    outs = [model(PROMPTS[:2]) for model in models]
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    report = models[0].verify(PROMPTS)
    assert report.passed, report

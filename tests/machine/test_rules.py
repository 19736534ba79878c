"""What sets families apart from a Llama: the properties of the machine hold for it, and it is what the reference says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.inference import Engine
from wse_emu.engine.plan import sequences_of

from .models import RULES, VARIANTS, make_model
from .test_executors import assert_same, everything, prompt_of

FAMILIES = [*sorted(RULES), *VARIANTS]
VOCAB = 71
ONE_BY_ONE = [pytest.param(family, marks=() if family in ("qwen2_moe", "gemma2") else pytest.mark.slow) for family in FAMILIES]
LENGTHS = [9, 2]


def test_models_use_every_rule() -> None:
    specs = [make_model(family, 1, 1, "dry", rules=True).spec for family in FAMILIES]
    assert {spec.activation for spec in specs} == {"silu", "gelu_tanh"}
    assert {(spec.biases.qkv, spec.biases.out) for spec in specs} >= {(True, True), (True, False)}
    assert {spec.qk_norm.over for spec in specs if spec.qk_norm is not None} == {"head", "row"}
    assert {spec.qk_norm.after_rotary for spec in specs if spec.qk_norm is not None} == {True, False}
    assert {spec.rotary.interleaved for spec in specs} == {True, False}
    assert any(spec.rotary.skipped_layers for spec in specs)
    assert any(spec.query_temperature is not None and spec.chunk_size is not None for spec in specs)
    assert {spec.qk_norm.weighted for spec in specs if spec.qk_norm is not None} == {True, False}
    assert {spec.rotary.dim for spec in specs} == {None, 2, 4}
    assert {spec.shared_experts.gated for spec in specs if spec.shared_experts is not None} == {True, False}
    assert {spec.vocab_size for spec in specs} == {VOCAB}
    assert any(spec.norm.unit_offset and spec.norm.after for spec in specs)
    assert {(spec.norm.kind, spec.norm.bias) for spec in specs} == {("rms", False), ("layer", False), ("layer", True)}
    assert any(spec.biases.head for spec in specs)
    assert any(spec.shared_experts is not None and spec.shared_experts.gated for spec in specs)
    assert any(spec.clip_qkv is not None for spec in specs)
    assert any(spec.latent is not None and spec.latent.q_lora_rank is not None for spec in specs)
    assert any(spec.rotary.local_theta is not None for spec in specs)
    for name in ("embedding", "residual", "logits"):
        assert any(getattr(spec.scales, name) != 1 for spec in specs), name
    assert any(spec.scales.attention is not None for spec in specs)
    assert any(spec.attn_sinks and spec.sliding_window is not None for spec in specs)
    assert {spec.routing.probability_before_ffn for spec in specs if spec.clamped_experts is not None} == {True, False}
    assert any(spec.scales.logits_cap is not None and spec.scales.scores_cap is not None for spec in specs)


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_isolated_and_dry_runs_leave_the_ledger_of_the_batch(family: str) -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    batched, isolated = (make_model(family, 3, 5, executor, rules=True) for executor in ("batched", "isolated"))
    assert_same(everything(batched, ids, mask, 2), everything(isolated, ids, mask, 2))
    assert batched.wafer.ledger.events() == isolated.wafer.ledger.events()
    assert batched.wafer.sram.high_water_bytes == isolated.wafer.sram.high_water_bytes
    records = [model.record(ids, mask).stages for model in (batched, isolated)]
    assert list(records[0]) == list(records[1])
    assert_same(list(records[0].values()), list(records[1].values()))
    batched.wafer.ledger.clear()
    batched.generate(ids, 2, attention_mask=mask)
    dry = make_model(family, 3, 5, "dry", rules=True)
    dry.generate(ids, 2, attention_mask=mask, routing=batched.recorded_routing)
    assert dry.wafer.ledger.events() == batched.wafer.ledger.events()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_python_gives_the_bits_and_the_ledger(family: str) -> None:
    ids, mask = prompt_of([2], VOCAB)
    batched, interpreted = (make_model(family, 2, 3, executor, rules=True) for executor in ("batched", "interpreted"))
    assert_same([batched(ids, mask).logits], [interpreted(ids, mask).logits])
    assert batched.wafer.ledger.events() == interpreted.wafer.ledger.events()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_chunks_neighbours_and_the_cache_change_no_bit(family: str) -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    model = make_model(family, 4, 5, rules=True)
    whole = model(ids, mask).logits
    for rows, options in ((1, {}), (13, {}), (4, {"prefill_chunk": 2})):
        assert_same([whole], [make_model(family, rows, 5, rules=True, **options)(ids, mask).logits])
    np.testing.assert_array_equal(whole[1, -2:], model(ids[1, -2:]).logits[0])
    engine = Engine(model.wafer, model.store)
    cache = engine.new_cache([9])
    engine.forward(ids[0, :4], sequences_of([0], [4], [0]), cache, np.arange(4))
    for at in range(4, 9):
        step = engine.forward(ids[0, at : at + 1], sequences_of([0], [1], [at]), cache, np.arange(1))
        np.testing.assert_array_equal(step.logits[0], whole[0, at])
    cache.free()


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_shared_experts_come_first_and_biases_are_added_however_experts_are_run(family: str) -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    usual = make_model(family, 3, 5, rules=True)(ids, mask).logits
    for way in ("functional", "optimized"):
        model = make_model(family, 3, 5, rules=True, moe_implementation=way)
        np.testing.assert_array_equal(model(ids, mask).logits, usual)
        assert model.verify(ids, mask).passed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (16, 16)])
def test_every_stage_is_verified(family: str, grid: tuple[int, int]) -> None:
    ids, mask = prompt_of([17, 3], VOCAB)
    report = make_model(family, *grid, rules=True).verify(ids, mask)
    assert report.passed, report
    assert max(check.ratio for check in report.stages if check.kind == "local") > 0.3


@pytest.mark.slow
def test_latents_are_kept_in_a_window_and_for_queries_made_of_the_token() -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    spec = make_model("deepseek_v3", 1, 1, "dry", rules=True).spec
    latent = dataclasses.replace(spec.latent, q_lora_rank=None)
    spec = dataclasses.replace(spec, latent=latent, rotary=wse.RotarySpec()).with_attention(wse.AttentionPattern(window=3, sinks=1))
    models = [wse.from_config(spec, seed=3, wafer=wse.Wafer(wse.WSE3, rows=3, cols=5, executor=e)) for e in ("batched", "isolated")]
    assert_same(*(everything(model, ids, mask, 2) for model in models))
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    report = models[0].verify(ids, mask)
    assert report.passed, report


def test_an_indexer_that_takes_every_key_changes_no_bit_and_no_work_of_attention() -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    few = make_model("deepseek_v32", 3, 5, rules=True)
    every = make_model("deepseek_v32", 3, 5, rules=True, changes={"index_topk": 9})
    plain = wse.from_config({**RULES["deepseek_v32"], "model_type": "deepseek_v3"}, seed=3, wafer=wse.Wafer(wse.WSE3, rows=3, cols=5))
    logits = [model(ids, mask).logits for model in (few, every, plain)]
    assert_same([logits[1]], [logits[2]])
    assert not np.array_equal(logits[0], logits[1])
    rows = [model.wafer.ledger.totals(by=("stage", "name")) for model in (few, every, plain)]
    work = [{row["name"]: row for row in of if row["stage"] == "attention"} for of in rows]
    assert work[1] == work[2]
    for name, what in (("partial_scores", "macs"), ("softmax_accumulate", "macs"), ("scores", "bytes")):
        assert work[0][name][what] < work[1][name][what]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_chosen_keys_are_the_same_in_tiles_and_chunks(family: str) -> None:
    ids, mask = prompt_of(LENGTHS, VOCAB)
    usual = make_model(family, 3, 5, rules=True)
    for options in ({"bta_max_tile": 1}, {"prefill_chunk": 4}, {"bta_max_tile": 1, "prefill_chunk": 4}):
        models = [make_model(family, 3, 5, executor, rules=True, **options) for executor in ("batched", "isolated")]
        assert_same([usual.generate(ids, 3, attention_mask=mask)], [models[0].generate(ids, 3, attention_mask=mask)])
        models[0].wafer.ledger.clear()
        assert_same(*(everything(model, ids, mask, 2) for model in models))
        assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
        report = models[0].verify(ids, mask)
        assert report.passed, report
        models[0].wafer.ledger.clear()
        models[0].generate(ids, 2, attention_mask=mask)
        dry = make_model(family, 3, 5, "dry", rules=True, **options)
        dry.generate(ids, 2, attention_mask=mask, routing=models[0].recorded_routing)
        assert dry.wafer.ledger.events() == models[0].wafer.ledger.events()

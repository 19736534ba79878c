"""Another routing rule than the checkpoint's: what it must go with, that everything follows it, and that it is not saved in silence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.reference import routing

from .test_routing_rules import PROMPTS, SPEC, model_of

QWEN = replace(SPEC, family="qwen3_moe", num_experts=12, qk_norm=wse.QkNorm())
HIGHEST = wse.RoutingRule(tie_policy="highest_id", selection_dtype="cb16")  # of few probabilities many are equal
HASH = wse.MoEConfig(num_experts=12, routing_algorithm="hash")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wse.from_config(QWEN, seed=1).save(tmp_path_factory.mktemp("rules") / "model")


def opened(directory: Path, executor: str = "batched", **options) -> wse.WaferModel:
    wafer = wse.Wafer(rows=3, cols=2, executor=executor)
    return wse.from_pretrained(directory, wafer=wafer, cache_dir=directory.parent, **options)


@pytest.mark.parametrize(
    ("rule", "top_k"),
    [(HIGHEST, 2), ("switch", 2), (HASH, 1), (wse.MoEConfig(num_experts=12, top_k=3, router_selection_nonlinearity="sigmoid"), 3)],
    ids=["ties", "preset", "hash", "modelzoo"],
)
def test_a_checkpoint_runs_under_it_as_one_that_was_made_for_it(directory: Path, rule: wse.RoutingRule | str, top_k: int) -> None:
    model = opened(directory, routing=rule)
    there = wse.ROUTING_PRESETS[rule] if isinstance(rule, str) else getattr(rule, "routing", rule)
    assert (model.spec.routing, model.spec.top_k) == (there, top_k)
    out = model(PROMPTS[:2])
    made = model_of(replace(QWEN, routing=there, top_k=top_k))(PROMPTS[:2])
    np.testing.assert_array_equal(out.logits, made.logits)
    np.testing.assert_array_equal(out.topk_ids, made.topk_ids)
    assert not np.array_equal(out.logits, opened(directory)(PROMPTS[:2]).logits)
    dry = opened(directory, "dry", routing=rule)
    dry(PROMPTS[:2], routing=model.recorded_routing)
    assert dry.wafer.ledger.events() == model.wafer.ledger.events()
    report = model.verify(PROMPTS[:2])
    assert report.passed, report


def test_the_higher_of_equal_experts_is_taken_where_the_rule_says_so(directory: Path) -> None:
    low = opened(directory, routing=replace(HIGHEST, tie_policy="lowest_id"))
    high = opened(directory, "isolated", routing=HIGHEST)
    outs = [model(PROMPTS, output_router_logits=True) for model in (low, high)]
    ids = [out.topk_ids[0].reshape(-1, 2) for out in outs]
    tied = (np.sort(ids[0]) != np.sort(ids[1])).any(axis=1)
    assert tied.any()
    assert (ids[0][tied].sum(axis=1) < ids[1][tied].sum(axis=1)).all()
    report = high.verify(PROMPTS)
    assert report.passed, report
    assert report.routing.exact_ties >= tied.sum()
    for executor in ("batched", "isolated"):
        with pytest.raises(wse.TieError) as said:
            opened(directory, executor, routing=replace(HIGHEST, tie_policy="reject"))(PROMPTS)
        place, score = r"layer (\d+), sequence (\d+), position (\d+)", r"score ([\d.e-]+) alike"
        found = re.match(rf"{place}: experts (\[.*\]) {score} \(logits .*\), and \d+ of them (is|are) to be", str(said.value))
        layer, sequence, position = (int(part) for part in found.groups()[:3])
        token = np.ravel_multi_index((sequence, position), PROMPTS.shape)
        logits = outs[0].router_logits[layer].reshape(-1, 12).astype(np.float64)
        scores = routing.compared(logits, low.spec.routing, None).experts
        alike = np.flatnonzero(scores[token] == np.sort(scores[token])[-2])
        assert found.group(4) == str(alike.tolist())
        assert float(found.group(5)) == scores[token, alike[0]]
        undecided = [(row > v).sum() + (row == v).sum() > 2 for row, v in zip(scores, np.sort(scores, axis=1)[:, -2], strict=True)]
        assert (layer, token) == (0, np.flatnonzero(undecided)[0])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nope", "`routing` must be one of mixtral, qwen, .*, got 'nope'"),
        (3, "`routing` must be a RoutingRule, the name of a preset or a MoEConfig, got 3"),
        ("deepseek_v3", "`n_group` must divide the experts, got 8 groups of 12 experts"),
        ("gpt_oss", "`router_use_bias` True needs a bias of the gate, which this checkpoint's routers have not"),
        (wse.RoutingRule(e_score_correction_bias=True), "`e_score_correction_bias` True needs a correction bias, which this checkpoint"),
        (wse.RoutingRule(routing_algorithm="hash"), "`top_k` must be 1 with `routing_algorithm` 'hash', got 2"),
        (wse.RoutingRule(n_group=12, topk_group=1), "`topk_group` leaves 1 experts open, fewer than the 2 to choose"),
        (wse.MoEConfig(num_experts=8, top_k=2), "`num_experts` of the MoEConfig must be the model's, 12, got 8"),
        (wse.MoEConfig(), "`num_experts` of the MoEConfig must be the model's, 12, got 0"),
        (wse.MoEConfig(num_experts=12, num_shared_experts=1), "`num_shared_experts` of the MoEConfig must stand for .*, None, got 1"),
    ],
)
def test_what_does_not_go_with_the_checkpoint_is_refused_before_weights_are_read(directory: Path, rule: object, message: str) -> None:
    with pytest.raises(wse.SpecError, match=message):
        wse.from_pretrained(directory, routing=rule, cache_dir=directory / "no such place")


def test_a_dense_model_has_no_rule() -> None:
    dense = replace(QWEN, num_experts=0, top_k=0, moe_intermediate_size=0)
    with pytest.raises(wse.SpecError, match="`routing` is for models with experts; this qwen3_moe model is dense"):
        wse.from_config(dense, routing="mixtral")


def test_a_rule_is_saved_if_config_json_can_say_it(directory: Path, tmp_path: Path) -> None:
    model = opened(directory, routing=wse.RoutingRule(expert_weighting_normalization=False))
    again = opened(model.save(tmp_path / "said"))
    assert again.spec == model.spec != opened(directory).spec
    np.testing.assert_array_equal(again(PROMPTS).logits, model(PROMPTS).logits)
    with pytest.raises(wse.SaveError, match="cannot say this model's `routing`"):
        opened(directory, routing="switch").save(tmp_path / "lost")
    with pytest.raises(wse.SaveError, match="cannot say this model's `patterns`"):
        opened(directory, attention=wse.AttentionPattern(window=2)).save(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_random_weights_have_the_biases_that_a_rule_asks_for() -> None:
    rule = wse.RoutingRule(router_use_bias=True, e_score_correction_bias=True)
    config = {
        "model_type": "mixtral", "vocab_size": 41, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.5,
        "eos_token_id": None,
    }  # fmt: skip
    model = wse.from_config(config, routing=rule, wafer=wse.Wafer(rows=2, cols=2))
    assert model.checkpoint.tensors.shape("model.layers.0.block_sparse_moe.gate.bias") == (4,)
    assert np.abs(model.checkpoint.tensors.read("lm_head.weight")).max() > 1  # the range that the configuration names
    assert model.verify(PROMPTS).passed


def test_modelzoo_options_make_a_model_from_nothing() -> None:
    dense = replace(QWEN, num_experts=0, top_k=0, moe_intermediate_size=0)
    config = wse.MoEConfig(num_experts=4, top_k=2, num_shared_experts=2, router_use_bias=True, moe_implementation="optimized")
    spec = dense.with_moe(config)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size, spec.shared_experts.intermediate_size) == (4, 2, 8, 16)
    assert spec.with_moe(wse.MoEConfig(num_experts=1)) == dense
    model = wse.from_config(spec, routing=config, wafer=wse.Wafer(rows=2, cols=2))
    assert model.options.moe_implementation == "optimized"
    report = model.verify(PROMPTS)
    assert report.passed, report
    with pytest.raises(wse.SpecError, match="`moe_implementation` is 'functional', and 'optimized' in the MoEConfig"):
        wse.from_config(spec, routing=config, moe_implementation="functional")
    with pytest.raises(wse.SpecError, match="`config` must be a MoEConfig, got 'switch'"):
        dense.with_moe("switch")

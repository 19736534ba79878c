"""Models in which routing lets the tokens of a sequence meet: what still holds, and what the rule gives up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import DenseReference

from .test_routing_rules import PROMPTS, SPEC, model_of

RULES = {
    "sinkhorn": RoutingRule(router_selection_nonlinearity="sinkhorn", sinkhorn_n_iters=2),
    "sinkhorn in 16 bits": RoutingRule(
        router_selection_nonlinearity="sinkhorn", expert_weighting_nonlinearity="sinkhorn", selection_dtype="bfloat16"
    ),
    "switch": wse.ROUTING_PRESETS["switch"],
    "dropping": RoutingRule(capacity_factor=0.6, router_use_bias=True),
    "rerouting": RoutingRule(
        capacity_factor=1.0, overflow="reroute", probability_before_ffn=True, expert_weighting_nonlinearity="sinkhorn"
    ),
    "experts choose": RoutingRule(chooser="expert", expert_weighting_normalization=False),
}
ANY = pytest.mark.parametrize("name", sorted(RULES))


def spec_of(name: str) -> wse.ModelSpec:
    return replace(SPEC, routing=RULES[name], top_k=1 if name == "switch" else 2)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "dropping" else []) for name in sorted(RULES)])
def test_every_executor_gives_the_same_bits_and_ledger(name: str) -> None:
    models = [model_of(spec_of(name), executor=executor) for executor in ("batched", "isolated", "dry")]
    outs = [model(PROMPTS[:2, :4], output_router_logits=True) for model in models[:2]]
    models[2](PROMPTS[:2, :4], routing=models[0].recorded_routing)
    for ours, theirs in zip(outs[0].topk_ids + outs[0].topk_weights, outs[1].topk_ids + outs[1].topk_weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    computed = [e for e in models[0].wafer.ledger.events() if e.kind != "probe"]
    assert computed == [e for e in models[2].wafer.ledger.events() if e.kind != "probe"]
    assert len({model.wafer.sram.high_water_bytes for model in models}) == 1


@pytest.mark.slow
@ANY
def test_plain_python_gives_the_same_bits(name: str) -> None:
    outs = [model_of(spec_of(name), executor=executor)(PROMPTS[:2, :2]) for executor in ("batched", "interpreted")]
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)


@ANY
def test_rows_columns_padding_and_neighbours_do_not_matter(name: str) -> None:
    spec = spec_of(name)
    whole = model_of(spec)(PROMPTS)
    for rows in (1, 7):
        np.testing.assert_array_equal(model_of(spec, rows=rows)(PROMPTS).logits, whole.logits)
    mask = np.ones((2, 5), np.int64)
    mask[0, :2] = 0
    padded = model_of(spec)(PROMPTS[:2], mask)
    np.testing.assert_array_equal(padded.logits[1], whole.logits[1])
    np.testing.assert_array_equal(padded.logits[0, 2:], model_of(spec)(PROMPTS[0, 2:]).logits[0])


def test_prompt_chunks_matter_and_the_rule_says_so() -> None:
    """Tokens of one pass meet, so a capacity is counted, and sinkhorn's sums are taken, chunk by chunk."""
    ids = np.random.default_rng(3).integers(0, 41, (1, 16))
    assert not RoutingRule().tokens_meet
    for name, rule in RULES.items():
        assert rule.tokens_meet
        whole, cut = (model_of(spec_of(name), prefill_chunk=chunk)(ids).topk_ids for chunk in (None, 3))
        assert any(not np.array_equal(a, b) for a, b in zip(whole, cut, strict=True)), name


@ANY
def test_every_stage_is_verified_in_one_pass_and_in_chunks(name: str) -> None:
    for chunk in (None, 2):
        report = model_of(spec_of(name), prefill_chunk=chunk).verify(PROMPTS)
        assert report.passed, report


@ANY
def test_the_dense_reference_routes_alike(name: str) -> None:
    model = model_of(spec_of(name))
    out = model(PROMPTS[:1])
    stages = DenseReference(model.spec, model.checkpoint.tensors.read).forward(PROMPTS[0], np.zeros(5, np.int64), np.arange(5))
    for layer in range(2):
        np.testing.assert_array_equal(stages[layer, "topk_ids"], out.topk_ids[layer][0])
        np.testing.assert_allclose(stages[layer, "topk_weights"], out.topk_weights[layer][0], atol=1e-5)


def test_verification_sees_a_token_that_was_not_dropped(monkeypatch) -> None:
    model = model_of(spec_of("dropping"))
    record = model.record(PROMPTS)
    ids = record.stages[0, "topk_ids"]
    token, slot = (int(i) for i in np.argwhere(ids < 0)[0])
    ids[token, slot] = next(e for e in range(4) if e not in ids[token])
    monkeypatch.setattr(model, "record", lambda *args, **kwargs: record)
    report = model.verify(PROMPTS)
    assert not report.passed
    assert "by the scores of all tokens it is" in str(report)


def test_generated_tokens_are_not_compared_where_one_alone_is_routed_otherwise() -> None:
    model = model_of(spec_of("sinkhorn"))
    report = model.verify(model.generate(PROMPTS, 2), n_prompt=5)
    assert report.passed
    assert any("one that comes alone is routed otherwise" in note for note in report.notes)


@pytest.mark.parametrize("implementation", ["functional", "optimized"])
def test_tokens_that_visit_nobody_are_no_trouble_to_any_implementation(implementation: str) -> None:
    usual = model_of(spec_of("dropping"))(PROMPTS)
    assert any((ids < 0).any() for ids in usual.topk_ids)
    models = [model_of(spec_of("dropping"), executor=e, moe_implementation=implementation) for e in ("batched", "isolated")]
    for model in models:
        np.testing.assert_array_equal(model(PROMPTS).logits, usual.logits)
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "`capacity_factor` must be a finite number > 0 or None, got 0.0"),
        ({"sinkhorn_n_iters": 0}, "`sinkhorn_n_iters` must be an integer >= 1, got 0"),
        ({"overflow": "reroute"}, "`overflow` 'reroute' needs a `capacity_factor`"),
        ({"overflow": "spill"}, "`overflow` must be one of drop, reroute, got 'spill'"),
        ({"chooser": "expert"}, "with `chooser` 'expert' weights are the scores themselves"),
        ({"chooser": "expert", "n_group": 2, "expert_weighting_normalization": False}, "`n_group` must be 1 with `chooser` 'expert'"),
        ({"chooser": "expert", "tie_policy": "highest_id"}, "of equal scores the earlier token's is taken"),
        ({"capacity_factor": 1.0, "tie_policy": "reject"}, "`tie_policy` 'reject' does not go with `capacity_factor`"),
        ({"routing_algorithm": "hash", "capacity_factor": 1.0}, "need scores, `routing_algorithm` 'hash' has none"),
        ({"routing_algorithm": "uniform", "router_selection_nonlinearity": "sinkhorn"}, "need scores"),
        (
            {
                "expert_weighting_nonlinearity": "sparsemixer", "router_selection_nonlinearity": "none", "router_jitter_noise": 0.1,
                "expert_weighting_normalization": False, "capacity_factor": 1.0,
            },
            "sparsemixer weighs by the order of a token's own choices",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_at_construction(options: dict[str, object], message: str) -> None:
    with pytest.raises(wse.SpecError, match=message):
        RoutingRule(**options)


def test_a_trace_may_lack_experts_only_where_they_have_a_capacity() -> None:
    ids = np.array([[0, 1], [2, -1], [-1, -1]])
    model_of(spec_of("dropping"), executor="dry")(PROMPTS[:1, :3], routing=RoutingTrace((ids, ids)))
    with pytest.raises(wse.TraceError, match=r"token 1 chose \[2, -1\]"):
        model_of(SPEC, executor="dry")(PROMPTS[:1, :3], routing=RoutingTrace((ids, ids)))
    wrong = RoutingTrace((np.array([[0, 1], [2, -1], [-1, 0]]),) * 2)
    with pytest.raises(wse.TraceError, match=r"token 2 chose \[-1, 0\]"):
        model_of(spec_of("dropping"), executor="dry")(PROMPTS[:1, :3], routing=wrong)

"""A sound run passes; a fault in one place fails, and the report names that place."""

import json
from dataclasses import replace

import numpy as np
import pytest

from wse_emu.equivalence import tolerance, verify, verify_record
from wse_emu.equivalence.local import StageLocal
from wse_emu.equivalence.stages import expected_stages
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import DenseReference, formulas, tensors
from wse_emu.reference import routing as routing_reference

VALUES = [
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn_max", "attn_denominator", "attn_context", "attn_out", "attn_residual", "ffn_norm",
    "router_logits", "topk_weights", "expert_hidden", "expert_out", "ffn_out", "layer_out",
]  # fmt: skip
STAGES = [(None, "embedding"), *((layer, name) for layer in (0, 1) for name in VALUES), (None, "final_norm"), (None, "logits")]


def first(report):
    """(layer, stage, kind, token, expert, element) of the first failure."""
    assert not report.passed
    c = report.first_failure.check
    return c.layer, c.stage, c.kind, c.token, c.expert, c.element


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "llama"},
        {"routing": RoutingRule(expert_weighting_normalization=False)},
        {"top_k": 6},
        {"top_k": 1},
        {"tie_word_embeddings": True},
        {"num_kv_heads": 4},
        {"lengths": (1,)},
        {"lengths": (70,), "num_layers": 1},
        {"scale": 4.0},
        {"scale": 0.1},
        {"head_dim": 2, "hidden_size": 16},
    ],
    ids=str,
)
def test_a_sound_run_passes(make, changes, seed):
    case = make(seed=seed, **changes)
    report = case.verify()
    assert report.passed, report
    assert report.first_failure is None
    assert [(c.layer, c.stage) for c in report.stages if c.kind != "end to end"] == expected_stages(case.spec)


@pytest.mark.parametrize(("layer", "name"), STAGES, ids=lambda x: str(x))
def test_one_wrong_element_is_named(case, layer, name):
    value = case.record.stages[layer, name]
    token = 9
    element = tuple(n // 2 for n in value.shape[1:])
    value[(token, *element)] += 1e-3 * np.abs(value).max()
    report = case.verify(end_to_end=False)
    ids = case.record.stages.get((layer, "topk_ids"))
    expert = None
    if name == "router_logits":
        expert = element[0]
    elif name in ("topk_weights", "expert_hidden", "expert_out"):
        expert = int(ids[token, element[0]])
    assert first(report) == (layer, name, "local", (2, 1), expert, element)
    assert report.first_failure.check.n_failed == 1
    assert report.first_failure.row == 2


@pytest.mark.parametrize(("layer", "name"), STAGES[1:], ids=lambda x: str(x))
def test_the_bound_is_the_border(case, layer, name):
    expected, bound = StageLocal(case.record, case.spec, case.weights.__getitem__).check(layer, name)
    value = case.record.stages[layer, name]
    at = (9, *(n // 2 for n in value.shape[1:]))
    for factor, status in ((0.5, "passed"), (1.9, "failed")):  # one addition's bound is a single rounding: 1.9 is the next float
        value[at] = expected[at] + factor * bound[at]
        if name in ("attn_residual", "layer_out") and factor < 1:
            value[at] = np.float32(expected[at])
        report = case.verify(end_to_end=False)
        check = next(c for c in report.stages if (c.layer, c.stage) == (layer, name))
        assert check.status == status, check
    assert check.ratio == pytest.approx(1.9, rel=0.5)
    assert check.token_index == 9


def test_wrong_query_of_one_token_fails_there_and_in_nothing_before(case):
    case.record.stages[1, "q"][4, 3] *= 1.001
    report = case.verify()
    layer, stage, _, token, expert, element = first(report)
    assert (layer, stage, token, expert, element[0]) == (1, "q", (0, 4), None, 3)
    failed = [(c.layer, c.stage) for c in report.stages if c.status == "failed" and c.kind == "local"]
    assert failed == [(1, "q"), (1, "q_rope")]


def test_scaled_output_of_one_expert_names_the_expert(case):
    ids = case.record.stages[0, "topk_ids"]
    case.record.stages[0, "expert_out"][ids == 3] *= np.float32(1.0001)
    layer, stage, kind, _, expert, _ = first(case.verify(end_to_end=False))
    assert (layer, stage, kind, expert) == (0, "expert_out", "local", 3)


def test_weights_of_a_neighbouring_expert_name_the_expert(case):
    spec, weights, record = case.spec, case.weights, case.record
    ids, x = record.stages[1, "topk_ids"], record.stages[1, "ffn_norm"]
    token, slot = np.argwhere(ids == 2)[0]
    gate, up = (weights[tensors.layer_tensor(spec, 1, role, 3).name] for role in ("w_gate", "w_up"))
    record.stages[1, "expert_hidden"][token, slot] = formulas.glu(x[token] @ gate.T, x[token] @ up.T, "silu")
    layer, stage, _, where, expert, _ = first(case.verify(end_to_end=False))
    assert (layer, stage, where, expert) == (1, "expert_hidden", (record.seq[token], record.pos[token]), 2)


@pytest.mark.parametrize("name", ["attn_out", "v", "router_logits", "ffn_out"])
def test_a_dropped_term_of_a_sum_is_found(case, name):
    stages, token, out = case.record.stages, 11, 3
    if name == "ffn_out":
        stages[0, name][token, out] -= stages[0, "topk_weights"][token, 1] * stages[0, "expert_out"][token, 1, out]
        at = (out,)
    else:
        source, role = {"attn_out": ("attn_context", "w_o"), "v": ("attn_norm", "w_v"), "router_logits": ("ffn_norm", "router")}[name]
        weight = case.weights[tensors.layer_tensor(case.spec, 0, role).name]
        terms = stages[0, source][token] * weight[out]
        stages[0, name].reshape(20, -1)[token, out] -= np.sort(np.abs(terms))[len(terms) // 4] * np.sign(terms[0])  # a small one
        at = (0, 3) if name == "v" else (out,)
    layer, stage, kind, where, _, element = first(case.verify(end_to_end=False))
    assert (layer, stage, kind, where, element) == (0, name, "local", (2, 3), at)


@pytest.mark.parametrize("off", [1, -1], ids=["sees the next token", "misses itself"])
def test_a_mask_that_is_off_by_one_is_found_in_attention(make, monkeypatch, off):
    with monkeypatch.context() as patch:

        def wrong(seq, pos, window):
            mask = (seq[:, None] == seq) & (pos <= pos[:, None] + off)
            return mask | (np.eye(len(pos), dtype=bool) & (pos == 0))  # the first token sees itself, or its softmax is undefined

        patch.setattr(formulas, "visible", wrong)
        case = make()
    report = case.verify(end_to_end=False)
    layer, stage, kind, token, _, _ = first(report)
    assert (layer, kind) == (0, "local")
    assert stage in ("attn_max", "attn_denominator")
    assert token[0] != 1, "the sequence of one token has nothing to see or to miss"
    failed = {c.stage for c in report.stages if c.status == "failed"}
    assert failed == {"attn_max", "attn_denominator", "attn_context"}


def test_a_key_of_another_sequence_is_found(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(formulas, "visible", lambda seq, pos, window: pos <= pos[:, None])
        r = case.record
        joined = DenseReference(case.spec, case.weights.__getitem__, dtype=np.float32).forward(r.token_ids, 0 * r.seq, r.pos)
    r.stages[0, "attn_denominator"] = joined[0, "attn_denominator"]
    layer, stage, *_ = first(case.verify(end_to_end=False))
    assert (layer, stage) == (0, "attn_denominator")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("layer", "name"), [(1, "k"), (0, "expert_out"), (0, "attn_max"), (None, "logits"), (None, "embedding")])
def test_what_is_not_finite_is_named(case, layer, name, poison):
    value = case.record.stages[layer, name]
    element = tuple(n - 1 for n in value.shape[1:])
    value[(5, *element)] = poison
    report = case.verify()
    expert = int(case.record.stages[0, "topk_ids"][5, 1]) if name == "expert_out" else None
    assert first(report) == (layer, name, "structure", (0, 5), expert, element)
    assert f"holds {poison}" in str(report.first_failure)


def test_a_nan_that_spreads_is_named_where_it_began(make):
    case = make()
    case.weights["model.layers.1.self_attn.k_proj.weight"][5, 0] = np.nan
    broken = make(weights=case.weights)
    layer, stage, kind, token, _, element = first(broken.verify())
    assert (layer, stage, kind, token, element) == (1, "k", "structure", (0, 0), (0, 5))


def test_missing_and_foreign_stages_and_wrong_kinds_are_named(case):
    stages = case.record.stages
    del stages[1, "v"]
    stages[1, "ffn_norm"] = stages[1, "ffn_norm"].astype(np.float64)
    stages[1, "expert_out"] = stages[1, "expert_out"][:, :1]
    stages[0, "ffn_hidden"] = np.zeros((20, 40), np.float32)
    report = case.verify()
    messages = {(c.layer, c.stage): c.message for c in report.stages if c.kind == "structure"}
    assert messages == {
        (1, "v"): "the stage is missing",
        (1, "ffn_norm"): "must be float32 of shape (20, 32), is float64 of shape (20, 32)",
        (1, "expert_out"): "must be float32 of shape (20, 2, 32), is float32 of shape (20, 1, 32)",
        (0, "ffn_hidden"): "the stage does not belong to a mixtral model of this shape",
    }
    skipped = {(c.layer, c.stage) for c in report.stages if c.status == "skipped"}
    assert skipped == {(1, name) for name in ("attn_context", "router_logits", "topk_ids", "expert_hidden", "ffn_out")}
    assert report.first_failure.check.stage == "v"
    assert "not checked: 5 stages without usable inputs; first attn_context of layer 1, which needs v of layer 1" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.__setitem__((3, 1), 6), "expert id 6 must lie in 0..5"),
        (lambda ids: ids.__setitem__((3, 1), -1), "expert id -1 must lie in 0..5"),
        (lambda ids: ids.__setitem__((3, 1), ids[3, 0]), "is chosen twice"),
    ],
)
def test_impossible_expert_ids_are_named_and_stop_the_replay(case, change, message):
    change(case.record.stages[0, "topk_ids"])
    report = case.verify()
    layer, stage, kind, token, _, element = first(report)
    assert (layer, stage, kind, token, element) == (0, "topk_ids", "structure", (0, 3), (1,))
    assert message in report.first_failure.check.message
    assert report.notes == ("end to end: the routing of the run cannot be replayed",)
    assert "the routing of the run cannot be replayed" in str(report)


def test_a_swapped_expert_id_names_token_and_expert(case):
    ids = case.record.stages[1, "topk_ids"]
    wrong = int(np.setdiff1d(np.arange(6), ids[13])[0])
    ids[13, 1] = wrong
    report = case.verify()
    assert first(report) == (1, "topk_ids", "routing", (2, 5), wrong, (1,))
    assert (report.routing.swaps, report.routing.misordered) == (1, 1)
    assert "float64 scores put expert" in report.first_failure.check.message


def test_experts_in_ascending_order_of_probability_fail(case):
    stages = case.record.stages
    for name in ("topk_ids", "topk_weights", "expert_hidden", "expert_out"):  # consistently, so nothing else is wrong
        stages[0, name][2] = stages[0, name][2, ::-1].copy()
    report = case.verify()
    assert first(report) == (0, "topk_ids", "routing", (0, 2), int(stages[0, "topk_ids"][2, 0]), (0,))
    assert (report.routing.swaps, report.routing.misordered) == (0, 1)
    assert [c.stage for c in report.stages if c.status == "failed"] == ["topk_ids"]


def test_exact_ties_are_counted_and_the_higher_id_fails(make, pristine):
    weights = dict(pristine.weights)
    router = weights["model.layers.0.block_sparse_moe.gate.weight"].copy()
    router[4] = router[1]
    weights["model.layers.0.block_sparse_moe.gate.weight"] = router
    case = make(weights=weights)
    report = case.verify()
    assert report.passed
    assert report.routing.exact_ties > 0
    stages = case.record.stages
    token = int(np.flatnonzero((stages[0, "topk_ids"] == [1, 4]).all(axis=1))[0])
    for name in ("topk_ids", "topk_weights", "expert_hidden", "expert_out"):
        stages[0, name][token] = stages[0, name][token, ::-1].copy()
    layer, stage, _, where, expert, element = first(case.verify())
    assert (layer, stage, where, expert, element) == (0, "topk_ids", (case.record.seq[token], case.record.pos[token]), 4, (0,))


def test_a_near_tie_is_excused_counted_and_listed(make, pristine):
    """Experts 1 and 4 score alike in float64 up to 1e-8; the run's own float32 logits rank them the other way."""
    weights = dict(pristine.weights)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    weights[name] = router = weights[name].copy()
    router[4] = router[1]
    router[4, 0] = np.nextafter(router[4, 0], np.float32(9))
    router[[0, 2, 3, 5]] -= 10 * router[1]  # so that one of the two is taken, or both
    case = make(weights=weights, top_k=1)
    stages, r = case.record.stages, case.record
    logits = stages[0, "router_logits"]
    # the sign of the true difference is that of ffn_norm[:, 0]; decide every token the other way
    truth = stages[0, "ffn_norm"][:, 0] > 0
    top = logits.argmax(axis=1)
    tokens = np.flatnonzero(np.isin(top, [1, 4]))
    assert len(tokens) > 3
    for t in tokens:
        best = logits[t, [1, 4]].max()
        logits[t, 1], logits[t, 4] = (np.nextafter(best, np.float32(99)), best) if truth[t] else (best, np.nextafter(best, np.float32(99)))
    stages[0, "topk_ids"][:] = routing_reference.highest(logits, 1, "lowest_id")
    twin = DenseReference(case.spec, case.weights.__getitem__, dtype=np.float32)
    routing = {layer: stages[layer, "topk_ids"] for layer in (0, 1)}
    again = twin.forward(r.token_ids, r.seq, r.pos, routing=routing)
    again[0, "router_logits"] = logits
    routing[1] = routing_reference.highest(again[1, "router_logits"], 1, "lowest_id")
    stages.update(twin.forward(r.token_ids, r.seq, r.pos, routing=routing))
    stages[0, "router_logits"] = logits
    report = case.verify()
    assert report.passed, report
    assert [tie.token for tie in report.routing.near_ties] == [(int(r.seq[t]), int(r.pos[t])) for t in tokens]
    assert {tie.chosen + tie.ideal for tie in report.routing.near_ties} <= {(1, 4), (4, 1)}
    assert all(tie.gap <= tie.tolerance < 1e-4 for tie in report.routing.near_ties)
    assert f"{len(tokens)} near-ties excused" in str(report)


def test_a_bias_that_every_stage_alone_may_have_is_found_end_to_end(make, monkeypatch):
    """Every product errs upwards by half of its bound: no stage is to blame, the whole is."""
    linear = formulas.linear
    with monkeypatch.context() as patch:
        patch.setattr(
            formulas, "linear", lambda x, w: (linear(x, w).astype(np.float64) + 0.5 * tolerance.linear_bound(x, w)).astype(np.float32)
        )
        case = make(family="llama", hidden_size=128, num_layers=4, lengths=(40, 40))
    report = case.verify()
    kinds = {c.kind for c in report.stages if c.status == "failed"}
    assert kinds == {"end to end"}, report
    assert report.first_failure.check.kind == "end to end"
    assert case.verify(end_to_end=False).passed


def test_swapped_weights_fail_end_to_end_too(case):
    """The end-to-end check by itself finds a wrong stage."""
    case.record.stages[None, "logits"][3] *= np.float32(1.001)
    report = case.verify()
    failed = [(c.kind, c.token) for c in report.stages if c.status == "failed" and c.stage == "logits"]
    assert failed == [("local", (0, 3)), ("end to end", (0, 3))]


@pytest.mark.parametrize(("lengths", "copies"), [((1,), 64), ((7, 1, 12), 4), ((70,), 2)])
def test_the_twin_runs_on_nudged_copies_of_a_short_prompt(make, monkeypatch, lengths, copies):
    case, calls = make(lengths=lengths, num_layers=1), []

    class Spy(DenseReference):
        def stages(self, token_ids, seq, pos, **options):
            calls.append((self.dtype, seq, options["nudge"] if "nudge" in options else None))
            return super().stages(token_ids, seq, pos, **options)

    monkeypatch.setattr(verify, "DenseReference", Spy)
    assert case.verify().passed
    (wide, seq, no_nudge), (narrow, many, nudge) = calls
    n = len(case.record.seq)
    assert (wide, narrow, no_nudge) == (np.float64, np.float32, None)
    np.testing.assert_array_equal(seq, case.record.seq)
    assert len(many) == copies * n
    assert len(np.unique(many)) == copies * len(lengths), "copies must not see each other"
    assert (nudge[:n] == 1).all(), "the first copy is the plain twin"
    assert 0.5 * tolerance.U < np.abs(nudge[n:] - 1).mean() < 2 * tolerance.U


def test_each_tensor_is_read_once(case):
    names = []
    verify_record(case.record, case.spec, lambda name: names.append(name) or case.weights[name])
    assert sorted(names) == sorted(case.weights)


def test_only_the_chosen_experts_are_read_without_end_to_end(case):
    names = []
    verify_record(case.record, case.spec, lambda name: names.append(name) or case.weights[name], end_to_end=False)
    chosen = {(layer, e) for layer in (0, 1) for e in np.unique(case.record.stages[layer, "topk_ids"]).tolist()}
    read = {(int(n.split(".")[2]), int(n.split(".")[5])) for n in names if ".experts." in n}
    assert read == chosen


def test_report_is_json_and_a_narrow_table(case):
    good = case.verify()
    case.record.stages[0, "q"][2, 1, 3] = np.inf
    case.record.stages[None, "embedding"][0, 0] += 1
    bad = case.verify()
    for report in (good, bad):
        plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert plain["passed"] is report.passed
        assert len(plain["stages"]) == len(report.stages)
        assert max(len(line) for line in str(report).splitlines() if not line.startswith("first failure")) <= 100
    assert "PASSED" in str(good).splitlines()[0]
    text = str(bad)
    assert "FAILED" in text.splitlines()[0]
    assert "first failure: stage embedding (local), core (0, 0), token 0 of sequence 0, element [0]: error 1, allowed 0" in text
    assert json.loads(json.dumps(bad.to_dict()))["first_failure"]["check"]["stage"] == "embedding"


def test_the_judgement_is_the_same_every_time(case):
    assert case.verify().to_dict() == case.verify().to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": np.zeros(20, np.int32)}, "`record.seq` must be int64"),
        ({"token_ids": np.full(20, 50)}, r"`record.token_ids\[0\]` must lie in 0..49 \(`vocab_size`\), got 50"),
        ({"seq": np.arange(20)[::-1].copy(), "pos": np.zeros(20, int)}, "`record.seq` must not decrease"),
        ({"pos": np.arange(20)}, r"`record.pos\[7\]` must be 0 .*, got 7 in sequence 1"),
        ({"row_of_token": np.zeros(3, int)}, r"`record.row_of_token` must have shape \(20,\), got \(3,\)"),
    ],
)
def test_bad_records_are_refused_by_name(case, change, message):
    with pytest.raises(InputError, match=message):
        verify_record(replace(case.record, **change), case.spec, case.weights.__getitem__)


def test_an_empty_record_is_refused(case):
    nothing = np.zeros(0, np.int64)
    with pytest.raises(InputError, match="holds no token"):
        verify_record(replace(case.record, seq=nothing, pos=nothing, token_ids=nothing, row_of_token=None), case.spec, case.weights.get)

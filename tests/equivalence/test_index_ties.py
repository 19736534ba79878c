"""Choices of keys that equal scores leave open: counted, and settled for the earlier keys."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.equivalence import verify_record
from wse_emu.equivalence.local_index import judge_ties
from wse_emu.equivalence.report import IndexTies

CONFIG = {
    "model_type": "deepseek_v32", "vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "kv_lora_rank": 6, "q_lora_rank": 5,
    "intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "index_topk": 3, "index_head_dim": 4, "index_n_heads": 1,
    "max_position_embeddings": 32, "eos_token_id": None, "initializer_range": 0.4,
}  # fmt: skip


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.0]), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 7))
def test_a_choice_is_a_tie_where_another_set_scores_as_high(rows: list[list[float]], topk: int) -> None:
    scores, pos = np.array(rows, np.float32), np.arange(len(rows)) + 2
    n_choices = ties = zeros = 0
    for row, p in zip(rows, pos.tolist(), strict=True):
        admitted = sorted(row[: p + 1], reverse=True)
        if len(admitted) > topk:
            n_choices += 1
            ties += admitted[topk - 1] == admitted[topk]
            zeros += admitted[topk - 1] == admitted[topk] == 0
    assert judge_ties(scores, pos, topk) == IndexTies(n_choices=n_choices, ties=ties, zero_ties=zeros)


def test_verification_counts_them_and_refuses_the_later_of_equal_keys() -> None:
    model = wse.from_config(CONFIG, seed=1, wafer=wse.Wafer(rows=2, cols=2))
    record = model.record(np.random.default_rng(0).integers(0, 61, 14))
    scores, taken = record.stages[0, "index_scores"], record.stages[0, "index_keys"]
    report = verify_record(record, model.spec, model.checkpoint.tensors.read, end_to_end=False)
    assert report.passed, report
    assert (report.index.n_choices, report.index.ties > 0, report.index.zero_ties > 0) == (11, True, True)
    assert f"index keys: 11 choices, {report.index.ties} ties ({report.index.zero_ties} at score 0)" in str(report)
    assert report.to_dict()["index"]["ties"] == report.index.ties
    for token in range(3, 14):
        row, mine = scores[token, : token + 1], taken[token, : token + 1]
        last = row[mine].min()
        left = np.flatnonzero((row == last) & ~mine)
        if left.size:
            assert np.flatnonzero((row == last) & mine).max() < left[0]
            other = taken.copy()
            other[token, np.flatnonzero((row == last) & mine)[-1]], other[token, left[0]] = False, True
    wrong = dataclasses.replace(record, stages={**record.stages, (0, "index_keys"): other})
    report = verify_record(wrong, model.spec, model.checkpoint.tensors.read, end_to_end=False)
    assert report.first_failure is not None
    assert (report.first_failure.check.stage, report.first_failure.check.kind) == ("index_keys", "local")

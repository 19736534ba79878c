"""Query heads in groups: where work blocks of one token's heads would not fit, a tile goes its way once for each group; the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.inference import _heads
from wse_emu.layers import attention as attention_module
from wse_emu.layers import index_keys
from wse_emu.layers.attention import _tile_size
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.index_keys import index_heads

BASE = {
    "vocab_size": 71, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "max_position_embeddings": 64,
    "eos_token_id": None, "initializer_range": 0.3, "intermediate_size": 14,
}  # fmt: skip
MLA = {
    **BASE, "model_type": "deepseek_v3", "num_key_value_heads": 5, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "kv_lora_rank": 10, "q_lora_rank": 7, "moe_intermediate_size": 9, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SINKS = {
    **BASE, "model_type": "gpt_oss", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 9,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
}  # fmt: skip
IDS = np.random.default_rng(2).integers(0, 71, (2, 7))


def run(config: dict, executor: str, work_bytes: int, monkeypatch, **options) -> tuple[list[np.ndarray], wse.Wafer]:
    monkeypatch.setattr(attention_module, "_WORK_BYTES", work_bytes)
    model = wse.from_config(config, seed=3, wafer=wse.Wafer(rows=3, cols=4, executor=executor), **options)
    heads = _heads(model.spec, 4)
    assert (_tile_size(heads, 3, None)[1] < heads.queries_per_kv) == (work_bytes < 4096)
    record = model.record(IDS)
    return [record.stages[0, "attn_max"], record.stages[0, "attn_denominator"], record.stages[None, "logits"]], model.wafer


@pytest.mark.parametrize(
    ("config", "work_bytes", "level"),
    [
        (MLA, 160, 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((MLA, 4, 2), (MLA, 160, 2), (SINKS, 160, 0), (SINKS, 4, 2))),
    ],
)
def test_groups_of_heads_give_the_same_bits(config, work_bytes, level, monkeypatch) -> None:
    options = {"dtype": "bfloat16", "precision_opt_level": level} if level else {}
    whole, _ = run(config, "batched", 4096, monkeypatch, **options)
    (few, batched), (each, isolated) = (run(config, executor, work_bytes, monkeypatch, **options) for executor in ("batched", "isolated"))
    for ours, theirs, expected in zip(few, each, whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(theirs, expected)
    assert isolated.ledger.events() == batched.ledger.events()
    assert isolated.sram.high_water_bytes == batched.sram.high_water_bytes


@pytest.mark.parametrize("work_bytes", [200, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_of_an_indexers_heads_choose_the_same_keys(work_bytes, monkeypatch) -> None:
    config = {**MLA, "model_type": "deepseek_v32", "index_topk": 3, "index_head_dim": 6, "index_n_heads": 5}

    def run(executor: str, room: int) -> tuple[list[np.ndarray], wse.Wafer]:
        monkeypatch.setattr(index_keys, "_WORK_BYTES", room)
        model = wse.from_config(config, seed=3, wafer=wse.Wafer(rows=3, cols=4, executor=executor))
        assert (index_keys._tile_size(index_heads(model.spec.indexer, 4), 3)[1] < 5) == (room < 4096)
        record = model.record(IDS)
        return [record.stages[0, "index_scores"], record.stages[0, "index_keys"], record.stages[None, "logits"]], model.wafer

    whole, _ = run("batched", 4096)
    (few, batched), (each, isolated) = run("batched", work_bytes), run("isolated", work_bytes)
    for ours, theirs, expected in zip(few, each, whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(theirs, expected)
    assert isolated.ledger.events() == batched.ledger.events()
    assert isolated.sram.high_water_bytes == batched.sram.high_water_bytes


@given(st.integers(1, 128), st.sampled_from([2, 64, 128]), st.integers(1, 40), st.integers(1, 300))
def test_work_blocks_of_an_indexers_group_fit_the_room(q: int, head_dim: int, n_cols: int, keys: int) -> None:
    heads = HeadLayout(1, q, head_dim, n_cols, value_dim=0)
    n, most, words = index_keys._tile_size(heads, keys)
    # Packed queries and two times products of a group; of a token weights, scores, order numbers, and six words.
    assert n * (most * (2 * heads.max_part_units + 2 * keys) + q + 2 * keys + 6) <= words - 6 * keys
    assert most == q or n == 1
    assert 1 <= most <= q
    assert index_keys._tile_size(heads, max(1, keys - 1))[2] <= words


@given(st.integers(1, 3), st.integers(1, 128), st.sampled_from([2, 64, 576]), st.integers(1, 40), st.integers(1, 300))
def test_work_blocks_of_a_group_fit_the_room(n_kv: int, q: int, head_dim: int, n_cols: int, keys: int) -> None:
    heads = HeadLayout(n_kv, q, head_dim, n_cols)
    n, most, words = _tile_size(heads, keys, None)
    features, of_lists = 2 * heads.max_part_units, 4 * keys
    # Packed queries, two times scores, maximum and denominator and output, two times, and the context.
    needs = n * most * (features + 2 * keys + 2 * (1 + 1 + features) + features)
    assert needs <= words - of_lists
    assert most == q or n == 1
    assert 1 <= most <= q
    assert _tile_size(heads, max(1, keys - 1), None)[2] <= words

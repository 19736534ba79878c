"""Sparse attention in whole models: every executor, any split and chunk, cached decode, verification; and that work is skipped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_kernels.sparse_attention import flash_mla_sparse_fwd

from .models import CONFIGS, make_model
from .test_executors import assert_same, everything, prompt_of

PATTERNS = {
    "window": AttentionPattern(window=4),
    "window and sinks": AttentionPattern(window=3, sinks=2),
    "chunk": AttentionPattern(chunk=5),
    "columns": AttentionPattern(window=2, column_spacing=4, column_width=1),
    "everything": AttentionPattern(chunk=3, sinks=1, column_spacing=5, column_width=2),
    "blocks": AttentionPattern(block_size=4, blocks=((0,), (1,), (0, 2), (0, 1, 3), (2, 4), (5,), (0, 6))),
    "mask": AttentionPattern(mask=lambda q, k: ((q * 7 + k * 5) % 3 == 0) | (q == k)),
    "listed": AttentionPattern.listed(
        np.stack([np.arange(64), np.arange(64) // 2, np.arange(64) * 7 % 11, np.full(64, -1)], axis=1), np.arange(64) % 4 + 1
    ),
    "heads that share keys differ": AttentionPattern(
        heads=(AttentionPattern(window=2), FULL, AttentionPattern(chunk=3), AttentionPattern(window=2, sinks=1))
    ),
    "heads that forget": AttentionPattern.fixed_per_head(num_heads=4, num_verts=2, local_attn_ctx=4, vert_size=1),
}
NAMES = st.sampled_from(sorted(PATTERNS))


def model_of(
    pattern: AttentionPattern | list[AttentionPattern], rows: int, cols: int, executor: str = "batched", **options: Any
) -> wse.WaferModel:  # fmt: skip
    return make_model("mixtral", rows, cols, executor, attention=pattern, **options)


@settings(max_examples=4)
@given(NAMES, st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 11), min_size=1, max_size=2))
def test_executors_agree_and_leave_one_ledger(name, rows, cols, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS["mixtral"]["vocab_size"])
    models = [model_of(PATTERNS[name], rows, cols, executor) for executor in ("batched", "isolated")]
    assert_same(*(everything(model, ids, mask) for model in models))
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    dry = model_of(PATTERNS[name], rows, cols, "dry")
    models[0].wafer.ledger.clear()
    models[0](ids, mask)
    dry(ids, mask, routing=models[0].recorded_routing)
    assert dry.wafer.ledger.events() == models[0].wafer.ledger.events()


@pytest.mark.parametrize("name", ["window and sinks", "mask"])
def test_the_interpreter_agrees(name) -> None:
    ids, mask = prompt_of([3, 6], CONFIGS["mixtral"]["vocab_size"])
    changes = {"hidden_size": 6, "intermediate_size": 4, "vocab_size": 150, "num_hidden_layers": 1, "head_dim": 2}
    models = [model_of(PATTERNS[name], 3, 2, executor, changes=changes) for executor in ("batched", "interpreted")]
    assert_same(*(model(ids, mask).logits for model in models))
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()


@settings(max_examples=8)
@given(NAMES, st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.lists(st.integers(1, 14), min_size=1, max_size=3))
def test_rows_and_prompt_chunks_do_not_matter(name, rows, other, chunk, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS["mixtral"]["vocab_size"])
    whole, cut = model_of(PATTERNS[name], rows, 3), model_of(PATTERNS[name], other, 3, prefill_chunk=chunk)
    assert_same(everything(whole, ids, mask), everything(cut, ids, mask))


@settings(max_examples=8)
@given(NAMES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_cached_decode_is_full_recomputation_with_the_same_mask(name, rows, n_prompt, n_new) -> None:
    ids, _ = prompt_of([n_prompt], CONFIGS["mixtral"]["vocab_size"])
    model = model_of([PATTERNS[name], FULL], rows, 4)
    out = model.generate(ids[0], n_new)
    for n in range(n_prompt, n_prompt + n_new):
        assert model(out[:n]).logits[0, -1].argmax() == out[n]


def test_heads_with_one_pattern_each_are_that_pattern_bit_for_bit() -> None:
    ids, mask = prompt_of([13, 4], CONFIGS["mixtral"]["vocab_size"])
    pattern = PATTERNS["window and sinks"]
    one, each = model_of(pattern, 3, 4), model_of(AttentionPattern(heads=(pattern,) * 4), 3, 4)
    assert_same(everything(one, ids, mask), everything(each, ids, mask))
    assert one.wafer.ledger.events() == each.wafer.ledger.events()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma2"])
def test_heads_with_patterns_of_their_own_in_other_families(family) -> None:
    """Latent keys that all heads share, sinks, capped scores; on cores that run one at a time too."""
    ids, mask = prompt_of([9, 4], 71)
    pattern = AttentionPattern(heads=(AttentionPattern(window=2), FULL, AttentionPattern(window=2), AttentionPattern(chunk=4)))
    models = [make_model(family, 3, 4, executor, rules=True, attention=pattern) for executor in ("batched", "isolated")]
    assert_same(*(everything(model, ids, mask) for model in models))
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    assert models[0].verify(ids, attention_mask=mask).passed


def test_listed_keys_are_flash_mlas_result() -> None:
    """One layer's own queries, keys and values, as FlashMLA's form takes them; its sums have another order."""
    n, config = 24, CONFIGS["mixtral"]
    rng = np.random.default_rng(4)
    indices = np.where(rng.random((n, 6)) < 0.2, -1, rng.integers(0, n, (n, 6)))
    indices[:, 0] = np.arange(n)
    model = model_of(AttentionPattern.listed(indices), 3, 4, changes={"num_hidden_layers": 1})
    record = model.record(rng.integers(0, config["vocab_size"], n))
    group, dim = config["num_attention_heads"] // config["num_key_value_heads"], config["head_dim"]
    q, k, v = (record.stages[0, name] for name in ("q_rope", "k_rope", "v"))
    causal = [sorted({int(k) for k in row if 0 <= k <= i}) for i, row in enumerate(indices)]
    listed = np.array([row + [-1] * (6 - len(row)) for row in causal], np.int32)[:, None]
    # Roundings: a multiply-add for each element of a head and for each key, exponentials and a division; of numbers as large as these.
    bound = (dim + 6 + 8) * 2.0**-24
    for head in range(config["num_attention_heads"]):
        own_k, own_v = k[:, head // group], v[:, head // group]
        query = np.concatenate([np.zeros((n, dim), np.float32), q[:, head]], axis=1)[:, None]  # values are the first elements of a row
        out, maximum, _ = flash_mla_sparse_fwd(query, np.concatenate([own_v, own_k], axis=1)[:, None], listed, dim**-0.5, dim)
        sizes = np.abs(q[:, head]) @ np.abs(own_k).T
        np.testing.assert_allclose(record.stages[0, "attn_max"][:, head], maximum[:, 0], rtol=0, atol=bound * sizes.max())
        context = record.stages[0, "attn_context"].reshape(n, -1, dim)[:, head]
        np.testing.assert_allclose(context, out[:, 0], rtol=0, atol=bound * (1 + 2 * sizes.max()) * np.abs(own_v).max())


def test_work_falls_for_the_heads_that_admit_less() -> None:
    """Of four heads one is dense: its multiply-adds are a quarter of all, and the rest are the windows'."""
    ids = np.random.default_rng(0).integers(0, 150, 128)
    changes = {"max_position_embeddings": 256, "num_hidden_layers": 1}
    window = AttentionPattern(window=8)
    works = [
        attention_work(model_of(pattern, 8, 4, changes=changes), ids)
        for pattern in (FULL, window, AttentionPattern(heads=(FULL, window, window, window)))
    ]
    for name in ("partial_scores", "softmax_accumulate"):
        dense, sparse, mixed = (work[name] for work in works)
        assert mixed * 4 == dense + 3 * sparse
    assert works[1]["bytes"] < works[2]["bytes"] < works[0]["bytes"]


def test_a_pattern_that_holds_every_key_is_dense_bit_for_bit() -> None:
    ids, mask = prompt_of([13, 4], CONFIGS["mixtral"]["vocab_size"])
    dense = make_model("mixtral", 3, 4)
    for pattern in (AttentionPattern(window=16), AttentionPattern(chunk=16), AttentionPattern(window=1, sinks=15)):
        same = model_of(pattern, 3, 4)
        dense.wafer.ledger.clear()
        assert_same(everything(dense, ids, mask), everything(same, ids, mask))
        assert same.wafer.ledger.events() == dense.wafer.ledger.events()
    assert not np.array_equal(dense(ids, mask).logits, model_of(AttentionPattern(window=12), 3, 4)(ids, mask).logits)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_verification_passes_and_sees_another_mask(name, monkeypatch) -> None:
    ids, mask = prompt_of([15, 9], CONFIGS["mixtral"]["vocab_size"])
    model = model_of([PATTERNS[name], FULL], 3, 4)
    assert model.verify(ids, attention_mask=mask).passed
    record = model_of([FULL, FULL], 3, 4).record(ids, mask)
    monkeypatch.setattr(model, "record", lambda *args, **kwargs: record)
    report = model.verify(ids, attention_mask=mask)
    assert not report.passed
    assert "layer 0" in str(report)


def attention_work(model: wse.WaferModel, ids: np.ndarray) -> Counter[str]:
    """Multiply-adds and bytes of the attention stage of one forward pass."""
    model.wafer.ledger.clear()
    model(ids)
    out: Counter[str] = Counter()
    for event in model.wafer.ledger.events():
        if event.stage == "attention":
            out[event.name] += event.macs
            out["bytes"] += event.bytes
    return out


def test_work_and_traffic_fall_with_the_admitted_keys() -> None:
    """512 tokens, a window of 32: about a ninth of the pairs; tiles of queries see a few keys more than each of them."""
    ids = np.random.default_rng(0).integers(0, 150, 512)
    changes = {"max_position_embeddings": 1024, "num_hidden_layers": 1}
    dense = attention_work(make_model("mixtral", 32, 4, changes=changes), ids)
    sparse = attention_work(model_of(AttentionPattern(window=32), 32, 4, changes=changes), ids)
    pairs_dense, pairs_sparse = 512 * 513 // 2, 32 * 512 - 32 * 31 // 2
    assert sparse["softmax_accumulate"] * pairs_dense == dense["softmax_accumulate"] * pairs_sparse
    assert sparse["partial_scores"] < 1.7 * pairs_sparse / pairs_dense * dense["partial_scores"]
    assert sparse["bytes"] < 0.35 * dense["bytes"]
    columns = attention_work(model_of(AttentionPattern(window=32, column_spacing=64, column_width=1), 32, 4, changes=changes), ids)
    assert sparse["partial_scores"] < columns["partial_scores"] < 1.4 * sparse["partial_scores"]


def test_a_pattern_that_config_json_cannot_say_is_not_lost_in_silence(tmp_path) -> None:
    with pytest.raises(wse.SaveError, match=r"config\.json of a mixtral model cannot say this model's `patterns`"):
        model_of(AttentionPattern(window=5), 2, 2).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model_of(FULL, 2, 2).save(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()

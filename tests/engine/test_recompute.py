"""Keys and values made again of kept inputs: the same bits as kept ones; what is saved and what is spent, in the ledger and in plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.inference import Engine
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import kv_bytes, plan_model, sequences_of
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.precision import Precision
from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.kv_cache import KVCache
from wse_emu.layers.stream import StreamedMatrix

RECOMPUTE = EngineOptions(kv="recompute")
BASE = {
    "vocab_size": 71, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6,
    "max_position_embeddings": 256, "eos_token_id": None, "initializer_range": 0.3, "intermediate_size": 14,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "biases": {**BASE, "model_type": "llama", "attention_bias": True},
    "a norm over all heads, limits": {
        **BASE, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.8, "num_key_value_heads": 2,
    },
    "a norm over each head, two rotations": {
        **BASE, "model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2, "rope_local_base_freq": 20.0,
        "query_pre_attn_scalar": 9,
    },
    "layers without rotation, blocks": {
        **BASE, "model_type": "llama4_text", "intermediate_size_mlp": 14, "moe_layers": [0], "num_local_experts": 4,
        "num_experts_per_tok": 1, "no_rope_layers": [1, 0, 1], "attention_chunk_size": 4, "floor_scale": 3, "attn_scale": 0.4,
    },
}  # fmt: skip


def model_of(config: Any, kv: str, rows: int = 3, cols: int = 4, executor: str = "batched", **options) -> wse.WaferModel:
    return wse.from_config(config, seed=3, wafer=wse.Wafer(rows=rows, cols=cols, executor=executor), kv=kv, **options)


def prompts_of(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(lengths)
    ids = np.random.default_rng(sum(lengths)).integers(0, 71, (len(lengths), longest))
    return ids, np.array([[0] * (longest - n) + [1] * n for n in lengths])


def logits_of(model: wse.WaferModel, ids: np.ndarray, mask: np.ndarray, n_new: int) -> list[np.ndarray]:
    """Generated tokens, and the logits of the prompt in the model's chunks."""
    return [model.generate(ids, n_new, attention_mask=mask), model(ids, mask).logits]


@settings(max_examples=2)
@given(
    st.sampled_from(sorted(CONFIGS)), st.integers(1, 4), st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.none() | st.integers(1, 4), st.sampled_from(["shift", "concat"]), st.sampled_from([("float32", None), ("bfloat16", "cb16")]),
)  # fmt: skip
@example("a norm over each head, two rotations", 3, 2, [6, 3], 2, "shift", ("bfloat16", "cb16"))
@example("a norm over all heads, limits", 2, 3, [5, 7], None, "shift", ("float32", None))
def test_the_bits_are_those_of_kept_keys_and_values(name, rows, cols, lengths, prefill_chunk, growth, formats) -> None:
    options = {"prefill_chunk": prefill_chunk, "kv_growth": growth, "dtype": formats[0], "kv_dtype": formats[1]}
    options["precision_opt_level"] = int(formats[0] != "float32")
    models = [model_of(CONFIGS[name], kv, rows, cols, **options) for kv in ("store", "recompute")]
    ids, mask = prompts_of(*lengths)
    stored, again = (logits_of(model, ids, mask, 3) for model in models)
    for ours, theirs in zip(again, stored, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not models[1].wafer.sram.live
    assert {e.stage for e in models[0].wafer.ledger.events()}.isdisjoint({"recompute"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            "biases", {"attention": AttentionPattern(window=3, sinks=1), "dense_attention_layers": (1,), "prefill_chunk": 2},
            marks=pytest.mark.slow,
        ),
        ("biases", {"attention": AttentionPattern(window=3), "dense_attention_layers": (1, 2)}),
        pytest.param("layers without rotation, blocks", {"bta_max_tile": 1}, marks=pytest.mark.slow),
        pytest.param("a norm over all heads, limits", {"skip_zero_weights": True, "dtype": "cb16"}, marks=pytest.mark.slow),
        pytest.param("a norm over each head, two rotations", {"kv_growth": "concat"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_cores_of_their_own_make_them_of_what_they_hold(name, options) -> None:
    ids, mask = prompts_of(5, 3)
    models = {executor: model_of(CONFIGS[name], "recompute", executor=executor, **options) for executor in ("batched", "isolated")}
    found = {executor: logits_of(model, ids, mask, 3) for executor, model in models.items()}
    for ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    batched, isolated = (model.wafer for model in models.values())
    assert isolated.ledger.events() == batched.ledger.events()
    assert isolated.sram.high_water_bytes == batched.sram.high_water_bytes
    stored = model_of(CONFIGS[name], "store", **options)
    np.testing.assert_array_equal(stored.generate(ids, 3, attention_mask=mask), found["batched"][0])
    assert models["batched"].verify(ids, mask).passed


@pytest.mark.parametrize("name", ["biases", "layers without rotation, blocks"])
def test_keys_and_values_are_made_of_what_is_kept(name, monkeypatch) -> None:
    ids = prompts_of(6)[0][0]
    gather = KVCache.gather

    def changed(self, layer, sequences, earlier, out):
        gather(self, layer, sequences, earlier, out)
        out.flat[...] *= np.float32(-3.0)

    def last_logits() -> np.ndarray:
        model = model_of(CONFIGS[name], "recompute")
        engine = Engine(model.wafer, model.store, RECOMPUTE)
        cache = engine.new_cache([6])
        engine.forward(ids[:5], sequences_of([0], [5], [0]), cache, np.arange(5))
        return engine.forward(ids[5:], sequences_of([0], [1], [5]), cache, np.arange(1)).logits

    kept = last_logits()
    np.testing.assert_array_equal(kept[0], model_of(CONFIGS[name], "store")(ids).logits[0, 5])
    monkeypatch.setattr(KVCache, "gather", changed)
    assert not np.array_equal(last_logits(), kept)


# ---- the trade


def test_what_is_saved_and_what_is_spent_is_in_the_ledger() -> None:
    ids, mask = prompts_of(9)
    stored, again = (model_of(CONFIGS["biases"], kv) for kv in ("store", "recompute"))
    for model in (stored, again):
        model.generate(ids, 4, attention_mask=mask)
    hidden, n_kv, layers, earlier = 20, 2 * 4 * 6, 3, 9 + 10 + 11
    spent: Counter[tuple[str, str]] = Counter()
    for event in again.wafer.ledger.events():
        if event.stage == "recompute":
            spent[event.kind, event.name.rpartition(".")[2]] += event.macs if event.kind == "launch" else event.wavelets
    assert spent["launch", "partial_matmul"] == layers * earlier * hidden * n_kv
    assert spent["stream", "w_kv"] == layers * 3 * hidden * n_kv
    assert spent["stream", "b_kv"] == layers * 3 * n_kv

    def moved(model: wse.WaferModel, kind: str) -> int:
        events = [e for e in model.wafer.ledger.events() if (e.stage, e.kind) == ("kv_cache", kind)]
        return sum(e.wavelets for e in events)

    assert moved(stored, "shift") > 0
    assert moved(again, "shift") * n_kv == moved(stored, "shift") * hidden  # a token that shifts takes its input along, not its keys
    assert [e for e in again.wafer.ledger.events() if e.stage != "recompute" and e.kind == "launch" and e.macs] == [
        e for e in stored.wafer.ledger.events() if e.kind == "launch" and e.macs
    ]


@pytest.mark.parametrize(
    ("window", "n_prompt", "n_new", "batch", "prefill_chunk"),
    [(None, 9, 4, 2, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 9, 4, 1, 4), (None, 7, 3, 1, 2)))],
)
def test_the_plan_is_the_run(window, n_prompt, n_new, batch, prefill_chunk) -> None:
    spec = model_of(CONFIGS["biases"], "recompute").spec
    if window is not None:
        spec = spec.with_attention(AttentionPattern(window=window), (1,))
    shape = {"rows": 3, "cols": 4, "prompt_tokens": n_prompt, "batch": batch, "prefill_chunk": prefill_chunk, "options": RECOMPUTE}
    plan = plan_model(spec, new_tokens=n_new, **shape)
    for executor in ("batched", "dry"):
        model = model_of(spec, "recompute", executor=executor, prefill_chunk=prefill_chunk)
        model.generate(np.arange(batch * n_prompt).reshape(batch, n_prompt) % 70, n_new)
        assert model.wafer.sram.high_water_bytes == plan.peak_bytes
        streamed = sum(e.bytes for e in model.wafer.ledger.events() if e.kind == "stream")
        assert streamed == plan.stream_bytes_prefill + (n_new - 1) * plan.stream_bytes_token
    assert {"inputs of keys and values of layer 2", "keys and values of a layer"} <= {name for name, _ in plan.blocks}
    small = replace(wse.WSE3, sram_bytes_per_core=14000)
    longest = plan_model(spec, new_tokens=1, wafer_spec=small, **shape).max_context
    assert n_prompt < longest < 256
    assert plan_model(spec, new_tokens=longest - n_prompt, wafer_spec=small, **shape).fits
    assert not plan_model(spec, new_tokens=longest - n_prompt + 1, wafer_spec=small, **shape).fits


def test_bytes_that_are_kept() -> None:
    """Inputs of every layer and keys and values of one, each in its own format."""
    spec = model_of(CONFIGS["biases"], "store").spec
    precision = Precision(dtype="bfloat16", kv_dtype="float32")
    found = [kv_bytes(spec, wse.WSE3, 3, 4, [50, 7], EngineOptions(kv=kv, precision=precision)) for kv in ("store", "recompute")]
    assert found == [57 * 3 * 48 * 4, 57 * (3 * 20 * 2 + 48 * 4)]


@pytest.mark.parametrize(("n_in", "n_out"), [(3, 300), (5, 40)])
def test_some_columns_of_a_matrix_are_a_matrix(n_in: int, n_out: int) -> None:
    values = np.random.default_rng(0).standard_normal((n_in, n_out)).astype(np.float32)
    tiles = np.concatenate([values[:, at : at + TILE_COLS].reshape(-1) for at in range(0, n_out, TILE_COLS)])
    columns = np.arange(n_out).reshape(-1, 4)[:, 1:3].reshape(-1)
    some = StreamedMatrix("w", n_in, n_out, tiles, disk_bytes=2 * n_in * n_out + 1, skip_zeros=True).some("part", columns)
    assert (some.name, some.n_in, some.n_out, some.skip_zeros) == ("part", n_in, n_out // 2, True)
    np.testing.assert_array_equal(some.columns(0, n_out // 2), values[:, columns])
    assert some.n_bytes == n_in * n_out + 1
    assert StreamedMatrix("w", n_in, n_out, None).some("part", columns).n_bytes == 2 * n_in * n_out


# ---- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                **BASE, "model_type": "deepseek_v2", "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 9, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "first_k_dense_replace": 1,
            },
            "`kv` 'recompute' does not go with latent attention",
        ),
        (
            {**BASE, "model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "`kv` 'recompute' does not go with rotary scaling dynamic",
        ),
    ],
)  # fmt: skip
def test_models_whose_keys_an_input_does_not_tell_are_refused(config, message) -> None:
    with pytest.raises(wse.SpecError, match=message):
        model_of(config, "recompute")
    with pytest.raises(wse.SpecError, match=message):
        plan_model(model_of(config, "store").spec, rows=3, prompt_tokens=4, options=RECOMPUTE)


@pytest.mark.parametrize("kv", ["cache", None, ["store"]])
def test_another_way_of_keeping_is_refused(kv) -> None:
    with pytest.raises(wse.SpecError, match="`kv` must be 'store' or 'recompute', got"):
        model_of(CONFIGS["biases"], kv)


# ---- the page


@pytest.mark.slow
def test_the_figures_of_the_page() -> None:
    """What ``docs/how-the-wafer-works.md`` says."""
    page = (Path(__file__).parents[2] / "docs" / "how-the-wafer-works.md").read_text()
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
        "num_attention_heads": 4, "max_position_embeddings": 1024, "eos_token_id": None,
    }  # fmt: skip
    columns = []
    for n_kv, kv in ((4, "store"), (4, "recompute"), (1, "store"), (1, "recompute")):
        model = model_of({**config, "num_key_value_heads": n_kv}, kv, 8, 8)
        model.generate(np.arange(192), 129)
        passes, ledger = model.wafer.ledger.passes(), model.wafer.ledger
        last = ledger.events(passes[-1].start)
        shifted = sum(e.wavelets for e in ledger.events(passes[1].start) if e.kind == "shift")
        kept = kv_bytes(model.spec, wse.WSE3, 8, 8, [320], EngineOptions(kv=kv))
        streamed = sum(e.bytes for e in last if e.kind == "stream")
        columns.append([kept, model.wafer.sram.high_water_bytes, sum(e.macs for e in last), streamed, shifted])
    for row in zip(*columns, strict=True):
        assert " | ".join(f"{value:,}" for value in row) in page
    llama = wse.ModelSpec(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072,
    )  # fmt: skip
    older = replace(llama, vocab_size=32000, intermediate_size=11008, num_kv_heads=32, rope_theta=1e4)
    for spec in (older, llama):
        plans = [
            plan_model(
                spec, rows=1170, cols=755, prompt_tokens=2048, new_tokens=2048, prefill_chunk=512,
                options=EngineOptions(precision=Precision(dtype="bfloat16"), kv=kv),
            )
            for kv in ("store", "recompute")
        ]  # fmt: skip
        assert " | ".join(f"{plan.kv_bytes:,} bytes, {plan.max_context:,}" for plan in plans) in page


def test_columns_of_a_matrix_are_read_only_as_all_weights_are() -> None:
    """Kernels would be compiled a second time for others."""
    tiles = np.arange(12, dtype=np.float32)
    some = StreamedMatrix("w", 3, 4, tiles).some("part", np.array([3, 1]))
    assert not some.values.flags.writeable
    np.testing.assert_array_equal(some.columns(0, 2), tiles.reshape(3, 4)[:, [3, 1]])

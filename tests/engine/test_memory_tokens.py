"""Memory tokens of a model: put between the chunks of a text, with weights and an embedding of their own, in every way a model is run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import wse_emu as wse
from wse_emu.checkpoint import parse_config, published_names, to_config
from wse_emu.engine.plan import plan_model
from wse_emu.equivalence import verify_record
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.memory_tokens import is_memory, positions_with_memory

CHUNK, PER = 3, 2
MEMORY = {
    "attn_memory_chunk_size": CHUNK, "num_memory_tokens_per_chunk": PER, "add_qkv_memory_weights": True, "add_extra_embedding": True,
    "add_chunked_attn_mask": True, "memory_token_id": 7,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 10, "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "attention_bias": True, "initializer_range": 0.5,
    "eos_token_id": None, "pad_token_id": 0, "memory_tokens": MEMORY,
}  # fmt: skip
RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 61, (2, 9))
IDS[0, 2] = 7  # a token of the text with the id of memory tokens is none
MASK = np.array([[1] * 9, [0] * 5 + [1] * 4])


def model_of(
    rows: int = 4, cols: int = 3, executor: str = "batched", *, memory: dict[str, Any] | None = None, biased: bool = True, **options: Any
) -> wse.WaferModel:
    config = {**CONFIG, "attention_bias": biased, "memory_tokens": {**MEMORY, **(memory or {})}}
    return wse.from_config(config, seed=2, wafer=wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=executor), **options)


def everything(model: wse.WaferModel, ids: np.ndarray = IDS, mask: np.ndarray = MASK, new_tokens: int = 5) -> list[np.ndarray]:
    out = model(ids, mask, output_hidden_states=True)
    return [out.logits, *out.hidden_states, model.generate(ids, new_tokens, attention_mask=mask)]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- the properties of the machine


@pytest.mark.parametrize(
    ("rows", "cols", "columns", "new_tokens"), [(4, 2, slice(3, 9), 2), pytest.param(13, 3, slice(0, 9), 5, marks=pytest.mark.slow)]
)
def test_isolated_and_dry_runs_leave_the_bits_and_the_ledger_of_the_batch(rows: int, cols: int, columns: slice, new_tokens: int) -> None:
    """Several tokens on a row of cores; in decoding, several rows that share the features of a token."""
    batched, isolated, dry = (model_of(rows, cols, executor) for executor in ("batched", "isolated", "dry"))
    what = IDS[:, columns], MASK[:, columns], new_tokens
    assert_same(everything(batched, *what), everything(isolated, *what))
    everything(dry, *what)
    assert batched.wafer.ledger.events() == isolated.wafer.ledger.events() == dry.wafer.ledger.events()
    assert batched.wafer.sram.high_water_bytes == isolated.wafer.sram.high_water_bytes


@pytest.mark.slow
def test_plain_python_gives_the_bits_and_the_ledger() -> None:
    batched, interpreted = (model_of(2, 2, executor) for executor in ("batched", "interpreted"))
    assert_same([batched(IDS[0, :7]).logits], [interpreted(IDS[0, :7]).logits])
    assert batched.wafer.ledger.events() == interpreted.wafer.ledger.events()


OPTIONS: list[dict[str, Any]] = [
    {"prefill_chunk": 4}, {"bta_max_tile": 1}, {"kv": "recompute"}, {"kv_growth": "concat"}, {"skip_zero_weights": True}, {"rows": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_tiles_and_what_is_kept_change_no_bit(options: dict[str, Any]) -> None:
    assert_same(everything(model_of()), everything(model_of(**options)))


def test_neighbours_and_padding_change_no_bit_and_what_is_generated_is_what_the_text_before_predicts() -> None:
    model = model_of()
    whole = model(IDS, MASK).logits
    np.testing.assert_array_equal(model(IDS[1, 5:]).logits[0], whole[1, 5:])
    generated = model.generate(IDS, 8, attention_mask=MASK)
    assert generated.shape == (2, 17)
    for row, first in ((0, 0), (1, 5)):  # token by token, nothing cached; the chunks of the two end at different steps
        for at in range(9, 17):
            assert generated[row, at] == model(generated[row, first:at]).logits[0, -1].argmax()


# ---- against the reference


@pytest.mark.parametrize(
    ("dtype", "level", "biased"), [("float32", 0, True), ("bfloat16", 0, False), ("float16", 2, True), ("cb16", 1, True)]
)
def test_every_stage_is_verified_in_all_formats(dtype: Any, level: Any, biased: bool) -> None:
    model = model_of(dtype=dtype, precision_opt_level=level, biased=biased)
    generated = model.generate(IDS, 5, attention_mask=MASK)
    mask = np.concatenate([MASK, np.ones((2, 5), int)], axis=1)
    report = model.verify(generated, mask, n_prompt=9)
    assert report.passed, report
    assert report.n_tokens == 14 + PER * (13 // CHUNK) + 9 + PER * (8 // CHUNK)
    assert report.stages[-1].stage == "generated"


def without(name: str, other: str) -> Any:
    """What a checkpoint holds, one tensor taken for another."""

    def change(names: dict[str, str]) -> dict[str, str]:
        return {**names, name: names[other]}

    return change


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, str] | None, str]] = {
    "ordinary queries": ({}, ("layers.0.memory.w_q", "layers.0.w_q"), "q"),
    "ordinary keys": ({}, ("layers.1.memory.w_k", "layers.1.w_k"), "k"),
    "ordinary values": ({}, ("layers.0.memory.w_v", "layers.0.w_v"), "v"),
    "ordinary output projection": ({}, ("layers.0.memory.w_o", "layers.0.w_o"), "attn_out"),
    "ordinary bias of values": ({}, ("layers.1.memory.b_v", "layers.1.b_v"), "v"),
    "ordinary bias of the output": ({}, ("layers.1.memory.b_o", "layers.1.b_o"), "attn_out"),
    "no weights of their own": ({"add_qkv_memory_weights": False}, None, "q"),
    "no embedding of their own": ({"add_extra_embedding": False}, None, "embedding"),
    "memory tokens one place further": ({"attn_memory_chunk_size": CHUNK + 1, "num_memory_tokens_per_chunk": PER - 1}, None, "embedding"),
    "all keys seen": ({"add_chunked_attn_mask": False}, None, "attn_max"),
}  # fmt: skip


@pytest.fixture(scope="module")
def record() -> Any:
    return model_of().record(IDS, MASK)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verification_finds_mistakes(record: Any, mistake: str) -> None:
    fields, swapped, stage = MISTAKES[mistake]
    model = model_of(1, 1, "dry")
    spec = dataclasses.replace(model.spec, memory_tokens=wse.MemoryTokens(**{**MEMORY, **fields}))
    names = {t.name: t.name for t in published_names(model.spec).values()}
    if swapped is not None:
        wrong, right = (published_names(model.spec)[role].name for role in swapped)
        names[wrong] = right
    report = verify_record(record, spec, lambda name: model.checkpoint.tensors.read(names[name]), end_to_end=False)
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.check.stage == stage
    assert verify_record(record, model.spec, model.checkpoint.tensors.read, end_to_end=False).passed


def test_without_switches_they_are_ordinary_tokens_between_the_chunks() -> None:
    off = dict.fromkeys(("add_qkv_memory_weights", "add_extra_embedding", "add_chunked_attn_mask"), False)
    plain = wse.from_config({**CONFIG, "memory_tokens": None}, seed=2, wafer=wse.Wafer(wse.WSE3, rows=4, cols=3))
    with_memory = model_of(memory=off)
    text = IDS[0]
    whole = with_memory.spec.memory_tokens.insert(text)
    ordinary = ~is_memory(len(whole), chunk_size=CHUNK, per_chunk=PER)
    np.testing.assert_array_equal(with_memory(text).logits[0], plain(whole).logits[0, ordinary])
    masked = model_of(memory={**off, "add_chunked_attn_mask": True})
    pattern = AttentionPattern.memory(attn_memory_chunk_size=CHUNK, num_memory_tokens_per_chunk=PER)
    assert masked.spec.pattern(1) == pattern
    assert not np.array_equal(masked(text).logits, with_memory(text).logits)


# ---- what is streamed, multiplied and planned


def work_of(model: wse.WaferModel, first: int, stage: str, what: str) -> dict[str, int]:
    """Wavelets streamed or multiply-adds by name, from entry `first` of the ledger on."""
    out: dict[str, int] = {}
    for event in model.wafer.ledger.events()[first:]:
        if event.stage == stage and event.kind == what:
            name = event.name.split(".", 2)[-1]
            out[name] = out.get(name, 0) + (event.wavelets if what == "stream" else event.macs)
    return out


def test_a_token_meets_its_own_weights_only_and_others_stay_at_home() -> None:
    model = model_of(rows=1)
    h, n_qkv, n_o, layers, text = 10, (4 + 2 * 2) * 4, 16, 2, IDS[0]
    model(text)
    n = 9 + 2 * PER
    assert work_of(model, 0, "qkv", "launch")["partial_matmul"] == layers * n * h * n_qkv
    assert work_of(model, 0, "attention_out", "launch")["partial_matmul"] == layers * n * n_o * h
    every = {"w_qkv": layers * h * n_qkv, "b_qkv": layers * n_qkv}
    assert work_of(model, 0, "qkv", "stream") == every | {"memory." + name: words for name, words in every.items()}
    out = {"w_o": layers * n_o * h, "b_o": layers * h}
    assert work_of(model, 0, "attention_out", "stream") == out | {"memory." + name: words for name, words in out.items()}
    model.generate(text, 4)
    steps = [one for one in model.wafer.ledger.passes() if one.phase == "decode"]
    assert [one.n_tokens for one in steps] == [1 + PER, 1, 1]  # the prompt ends where a chunk does
    streamed = [{e.name for e in model.wafer.ledger.events()[one.start : one.stop] if e.kind == "stream"} for one in steps]
    assert [any(".memory." in name for name in names) for names in streamed] == [True, False, False]


def test_weights_of_memory_tokens_become_resident_with_them_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of(), list[str]()
    monkeypatch.setattr(model.store, "prepare", asked.extend)
    model(IDS[0, :CHUNK])
    assert not any(".memory." in name for name in asked)
    model(IDS[0, : CHUNK + 1])
    assert sorted({name for name in asked if ".memory." in name}) == sorted(
        f"layers.{layer}.memory.{name}" for layer in (0, 1) for name in ("w_qkv", "b_qkv", "w_o", "b_o")
    )


def test_a_plan_is_what_a_run_takes() -> None:
    for options in ({}, {"prefill_chunk": 4}):
        model = model_of(memory={"add_chunked_attn_mask": False}, **options)  # all keys are kept: as many in every pass
        spec = model.spec
        plan = plan_model(spec, rows=4, cols=3, prompt_tokens=8, new_tokens=5, **options)
        model.generate(IDS[0, :8], 5)
        assert plan.peak_bytes == model.wafer.sram.high_water_bytes
        passes = model.wafer.ledger.passes()
        streamed = [sum(e.bytes for e in model.wafer.ledger.events()[p.start : p.stop] if e.kind == "stream") for p in passes]
        prompt = [n for n, one in zip(streamed, passes, strict=True) if one.phase == "prompt"]
        assert plan.stream_bytes_prefill == sum(prompt)
        assert plan.stream_bytes_token == streamed[len(prompt) + 1] > streamed[len(prompt)]  # the ninth token fills a chunk
    assert plan.max_context == 64
    model = model_of(memory={"add_chunked_attn_mask": False, "num_memory_tokens_per_chunk": 9})
    plan = plan_model(model.spec, rows=4, cols=3, prompt_tokens=3, new_tokens=2)
    model.generate(IDS[0, :3], 2)  # the step takes in more tokens than the prompt had
    assert plan.peak_bytes == model.wafer.sram.high_water_bytes
    verified = plan_model(model.spec, rows=4, cols=3, prompt_tokens=9, new_tokens=0, verify=True)
    model = model_of(memory={"add_chunked_attn_mask": False, "num_memory_tokens_per_chunk": 9})
    model.record(IDS[0])
    assert verified.peak_bytes == model.wafer.sram.high_water_bytes
    many = dataclasses.replace(spec.memory_tokens, attn_memory_chunk_size=9, num_memory_tokens_per_chunk=500)
    few = {"rows": 1, "cols": 1, "prompt_tokens": 8, "new_tokens": 2}  # the ninth token still belongs to the first chunk
    assert plan_model(dataclasses.replace(spec, memory_tokens=many), **few).fits
    assert not plan_model(dataclasses.replace(spec, memory_tokens=many), **{**few, "new_tokens": 3}).fits
    assert positions_with_memory(64, chunk_size=CHUNK, per_chunk=PER) >= spec.sequence_length(64) == 64 + PER * 21


def test_the_prompt_may_take_all_positions_that_the_checkpoint_says() -> None:
    model = model_of(rows=8)
    text = np.zeros(64, int)
    assert model(text).logits.shape == (1, 64, 61)
    with pytest.raises(wse.InputError, match="more than the model's 64 positions"):
        model.generate(text, 1)


# ---- on disk


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_saved_model_is_the_same(tmp_path: Path, dtype: Any) -> None:
    first = model_of()
    first.save(tmp_path / "model", dtype=dtype)
    again = wse.from_pretrained(tmp_path / "model", wafer=wse.Wafer(wse.WSE3, rows=4, cols=3), cache_dir=tmp_path / "cache")
    assert again.spec == first.spec
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.memory_token_embedding.weight"].shape == (1, 10)
    for name, shape in (("q", (16, 10)), ("k", (8, 10)), ("v", (8, 10)), ("output", (10, 16))):
        assert stored[f"model.layers.1.self_attn.proj_{name}_memory_tokens_layer.weight"].shape == shape
        assert stored[f"model.layers.1.self_attn.proj_{name}_memory_tokens_layer.bias"].shape == shape[:1]
    assert sum(a.size for a in stored.values()) == first.spec.n_params
    if dtype is None:
        assert_same(everything(first), everything(again))
    assert again.verify(IDS, MASK).passed
    first.wafer.ledger.clear()
    again.wafer.ledger.clear()
    for model, size in ((first, 4), (again, 4 if dtype is None else 2)):
        model(IDS)
        streamed = [e.bytes for e in model.wafer.ledger.events() if e.kind == "stream" and e.name.endswith("memory.w_o")]
        assert streamed == [size * 16 * 10] * 2


def test_config_json_says_it_in_the_names_of_modelzoo() -> None:
    spec = parse_config(CONFIG)
    assert spec.memory_tokens == wse.MemoryTokens(**MEMORY)
    assert to_config(spec)["memory_tokens"] == MEMORY
    assert parse_config(to_config(spec)) == spec
    for nothing in ({}, {"attn_memory_chunk_size": None, "num_memory_tokens_per_chunk": None, "add_extra_embedding": True}):
        assert parse_config({**CONFIG, "memory_tokens": nothing}).memory_tokens is None
    assert "memory_tokens" not in to_config(parse_config({**CONFIG, "memory_tokens": None}))


# ---- rules


@pytest.mark.parametrize(
    ("memory", "rule"),
    [
        ({"attn_memory_chunk_size": 0}, "`attn_memory_chunk_size` must be an integer in 1.."),
        ({"num_memory_tokens_per_chunk": None}, "`num_memory_tokens_per_chunk` must be an integer in 1.."),
        ({"num_memory_tokens_per_chunk": 1 << 17}, "`num_memory_tokens_per_chunk` must be at most 4096, got 131072"),
        ({"attn_memory_chunk_size": 1 << 21}, "`attn_memory_chunk_size` must be at most 1048576, got 2097152"),
        ({"memory_token_id": 61}, "`memory_token_id` must lie in 0..60, got 61"),
        ({"memory_token_id": -1}, "`memory_token_id` must be an integer >= 0, got -1"),
        ({"add_extra_embedding": 1}, "`add_extra_embedding` must be True or False, got 1"),
        ({"chunk": 3}, "`chunk` is unknown; there are attn_memory_chunk_size"),
    ],
)
def test_what_config_json_cannot_mean_is_refused(memory: dict[str, Any], rule: str) -> None:
    with pytest.raises(wse.ConfigError, match=re.escape(rule)):
        parse_config({**CONFIG, "memory_tokens": {**MEMORY, **memory}})


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_position_embeddings": 1 << 31}, "`attn_memory_chunk_size` must be at least 2048 for a context of 2147483648 tokens, got 3"),
    ({"num_experts": 4, "top_k": 2, "moe_intermediate_size": 8}, "`num_experts` does not go with `memory_tokens`, got 4"),
    ({"rotary": wse.RotarySpec(skipped_layers=(1,))}, "`skipped_layers of rotary` does not go with `memory_tokens`, got (1,)"),
    ({"sliding_window": 4, "sliding_layers": (0,)}, "`sliding_window` does not go with `add_chunked_attn_mask`"),
    ({"chunk_size": 4, "chunked_layers": (0,)}, "`chunk_size` does not go with `add_chunked_attn_mask`"),
    ({"patterns": (AttentionPattern(window=4), AttentionPattern())}, "`patterns` does not go with `add_chunked_attn_mask`"),
    (
        {"num_kv_heads": 4, "latent": wse.LatentAttention(kv_lora_rank=4, qk_nope_head_dim=4, v_head_dim=4), "biases": wse.Biases()},
        "`latent` does not go with `memory_tokens`",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "rule"), CONTRADICTIONS, ids=str)
def test_what_does_not_go_with_memory_tokens_is_refused(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(wse.SpecError, match=re.escape(rule)):
        dataclasses.replace(parse_config(CONFIG), **fields)


def test_a_pattern_of_their_own_may_be_said_twice_and_without_the_mask_any_may_be_said() -> None:
    spec = parse_config(CONFIG)
    assert spec.memory_tokens is not None
    assert spec.with_attention(spec.memory_tokens.pattern).pattern(0) == spec.pattern(0)
    free = dataclasses.replace(spec, memory_tokens=dataclasses.replace(spec.memory_tokens, add_chunked_attn_mask=False))
    assert free.with_attention(AttentionPattern(window=4)).pattern(1) == AttentionPattern(window=4)


def test_lengths_positions_and_places_agree() -> None:
    memory = wse.MemoryTokens(attn_memory_chunk_size=CHUNK, num_memory_tokens_per_chunk=PER, memory_token_id=9)
    for n in range(1, 14):
        whole = memory.insert(np.arange(100, 100 + n))
        assert len(whole) == memory.length(n)
        at = memory.are_at(np.arange(len(whole)))
        assert (whole[at] == 9).all()
        assert whole[~at].tolist() == list(range(100, 100 + n))
        assert not at[-1]
        np.testing.assert_array_equal(at, is_memory(len(whole), chunk_size=CHUNK, per_chunk=PER))

"""What sets families apart, as their config.json says it: read, written and read again; and what none of them can say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import wse_emu as wse
from wse_emu.checkpoint import parse_config, random_checkpoint, save_checkpoint, to_config
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.errors import ConfigError, SaveError
from wse_emu.foundation.model_spec import ModelSpec

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 14, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
DOTS: dict[str, Any] = {
    **SHAPE, "model_type": "dots1", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 9, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "sliding_window": None,
}  # fmt: skip
GLM = {**DOTS, "model_type": "glm4_moe", "attention_bias": True}
HUNYUAN: dict[str, Any] = {**SHAPE, "model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2}
ERNIE: dict[str, Any] = {**SHAPE, "model_type": "ernie4_5_moe", "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 9}
MINIMAX: dict[str, Any] = {**SHAPE, "model_type": "minimax_m2", "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 6}
GRANITE: dict[str, Any] = {**SHAPE, "model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA: dict[str, Any] = {**SHAPE, "model_type": "gemma2"}
GPT_OSS: dict[str, Any] = {**SHAPE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
PHIMOE: dict[str, Any] = {**SHAPE, "model_type": "phimoe", "num_local_experts": 4}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, **MSCALES}
DBRX: dict[str, Any] = {
    "model_type": "dbrx", "vocab_size": 64, "d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 512,
    "attn_config": {"attn_pdrop": 0.0, "clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500_000, "model_type": ""},
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01, "ffn_act_fn": {"name": "silu"}},
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **DOTS, "model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 7, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 12, "v_head_dim": 8,
}  # fmt: skip
DEEPSEEK_V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "group_limited_greedy"}
LLAMA4: dict[str, Any] = {
    **SHAPE, "model_type": "llama4_text", "intermediate_size_mlp": 20, "num_local_experts": 4, "num_experts_per_tok": 1,
    "no_rope_layer_interval": 2, "interleave_moe_layer_step": 2, "attention_chunk_size": 5,
}  # fmt: skip
DEEPSEEK_V32 = {
    **DEEPSEEK, "model_type": "deepseek_v32", "index_topk": 5, "index_head_dim": 16, "index_n_heads": 3,
}  # fmt: skip
GLM_5 = {**DEEPSEEK_V32, "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1, "indexer_types": ["full", "shared", "shared", "full"]}
EVERY = [DEEPSEEK_V32, GLM_5, LLAMA4, DBRX, PHIMOE, GPT_OSS, DOTS, GLM, HUNYUAN, ERNIE, MINIMAX, GRANITE, GEMMA, DEEPSEEK, DEEPSEEK_V2]


def back(spec: ModelSpec) -> ModelSpec:
    return parse_config(json.loads(json.dumps(to_config(spec))))


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c["model_type"])
def test_a_spec_survives_the_way_to_a_file_and_back(config: dict[str, Any]) -> None:
    spec = parse_config(config)
    assert back(spec) == spec
    plain = replace(spec, scales=replace(spec.scales, attention=None))
    assert back(plain) == plain
    said = replace(spec, scales=replace(spec.scales, attention=spec.query_dim**-0.5))
    assert said == plain
    with pytest.raises(wse.SpecError, match="`head_dim` must be a positive integer, got 0"):
        replace(spec, head_dim=0)


def test_dots_has_groups_shared_experts_and_windows_from_a_layer_on() -> None:
    spec = parse_config(DOTS)
    assert (spec.num_experts, spec.top_k, spec.dense_layers) == (8, 3, (0, 1))
    assert spec.shared_experts == wse.SharedExperts(intermediate_size=18)
    assert (spec.routing.n_group, spec.routing.topk_group, spec.routing.group_score) == (4, 2, "top2_sum")
    assert spec.routing.e_score_correction_bias
    assert parse_config({**DOTS, "sliding_window": 5, "max_window_layers": 3}).sliding_layers == (3,)
    assert parse_config({**DOTS, "sliding_window": 5}).sliding_layers == ()
    every = parse_config({**DOTS, "first_k_dense_replace": 9})
    assert not every.is_moe
    assert every.shared_experts is None
    assert back(every) == every
    assert parse_config({**DOTS, "n_shared_experts": 0}).shared_experts is None
    for name in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts"):
        with pytest.raises(ConfigError, match=f"`{name}` is missing"):
            parse_config({k: v for k, v in DOTS.items() if k != name})
    with pytest.raises(ConfigError, match="`layer_types` names sliding layers, but `sliding_window` is null"):
        parse_config({**DOTS, "layer_types": ["sliding_attention"] * 4})
    with pytest.raises(ConfigError, match=r"`n_group` must divide the experts, got 3 groups of 8"):
        parse_config({**DOTS, "n_group": 3})


def test_glm_rotates_half_of_a_head_unless_it_says_otherwise() -> None:
    spec = parse_config(GLM)
    assert (spec.rotary.dim, spec.qk_norm, spec.biases.qkv, spec.biases.out) == (6, None, True, False)
    assert parse_config({**GLM, "partial_rotary_factor": 1.0}).rotary.dim is None
    assert parse_config({**GLM, "rope_parameters": {"partial_rotary_factor": 0.34, "rope_theta": 1e4}}).rotary.dim == 4
    for dim in range(2, 50, 2):
        odd = replace(spec, head_dim=50, rotary=wse.RotarySpec(dim=dim))
        assert back(odd) == odd
    with pytest.raises(ConfigError, match=r"rotated part of a head must be even and in 2\.\.12 elements, got 3"):
        parse_config({**GLM, "partial_rotary_factor": 0.25})
    with pytest.raises(ConfigError, match="`partial_rotary_factor` and `rotary_dim` disagree"):
        parse_config({**MINIMAX, "partial_rotary_factor": 1.0})


def test_alpha_stretches_the_base_once() -> None:
    spec = parse_config({**HUNYUAN, "rope_theta": 100.0, "rope_scaling": {"type": "dynamic", "alpha": 7.0, "factor": 1.0}})
    assert spec.rope_scaling is None
    assert spec.rope_theta == pytest.approx(100 * 7 ** (12 / 10))
    assert parse_config({**HUNYUAN, "rope_scaling": {"type": "dynamic", "factor": 2.0}}).rope_scaling is not None
    for rope, message in (
        ({"type": "dynamic", "alpha": 0.0}, "`alpha` must be positive"),
        ({"type": "dynamic", "alpha": 1e308}, "`alpha` must be positive and not absurdly large"),
        ({"type": "linear", "alpha": 2.0, "factor": 2.0}, "`alpha` belongs to rope_type 'dynamic'"),
        ({"type": "dynamic", "alpha": 2.0, "short_factor": []}, "'short_factor' is not known beside `alpha`"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**HUNYUAN, "rope_scaling": rope})
    with pytest.raises(ConfigError, match="'alpha' is not known for rope_type 'dynamic'"):
        parse_config({**GLM, "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 2.0}})
    dynamic = {"rope_type": "dynamic", "factor": 1.0}
    with pytest.raises(ConfigError, match="`rope_scaling` and `rope_parameters` disagree"):
        parse_config({**HUNYUAN, "rope_scaling": {**dynamic, "alpha": 2.0}, "rope_parameters": dynamic})


def test_a_list_for_every_layer_must_be_of_one_number() -> None:
    assert parse_config({**HUNYUAN, "moe_topk": [2] * 4}) == parse_config(HUNYUAN)
    for wrong in ([2, 2, 1, 2], [2] * 3, [0] * 4, []):
        with pytest.raises(ConfigError, match=r"`moe_topk` must be an integer in 1\.\.32768, or a list of 4 that are alike"):
            parse_config({**HUNYUAN, "moe_topk": wrong})


def test_ernie_has_mixtures_at_intervals() -> None:
    assert parse_config(ERNIE).moe_layers == (1, 2, 3)
    spec = parse_config({**ERNIE, "moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 2})
    assert spec.moe_layers == (1,)
    assert back(spec) == spec
    assert parse_config({**ERNIE, "moe_norm_min": 0.25}).routing.norm_min == 0.25
    assert parse_config(ERNIE).rotary.interleaved
    with pytest.raises(ConfigError, match="`use_bias` must be false"):
        parse_config({**ERNIE, "use_bias": True})


def test_gpt_oss_is_stretched_and_biased_unless_it_says_otherwise() -> None:
    spec = parse_config(GPT_OSS)
    assert spec.rope_scaling is not None
    assert (spec.rope_scaling.kind, spec.rope_scaling.factor, spec.rope_scaling.truncate) == ("yarn", 32.0, False)
    assert (spec.sliding_window, spec.sliding_layers) == (128, (0, 2))
    assert (spec.biases.qkv, spec.biases.out, spec.attn_sinks) == (True, True, True)
    assert spec.clamped_experts == ClampedExperts(alpha=1.702, limit=7.0)
    plain = parse_config({**GPT_OSS, "rope_parameters": {"rope_type": "default"}, "attention_bias": False, "swiglu_limit": 3})
    assert plain.rope_scaling is None
    assert not plain.biases.qkv
    assert back(plain) == plain
    with pytest.raises(ConfigError, match="`swiglu_limit` must be a positive finite number"):
        parse_config({**GPT_OSS, "swiglu_limit": -1})


def test_phimoe_has_layer_norms_and_a_factor_for_each_length() -> None:
    spec = parse_config(PHIMOE)
    assert (spec.norm.kind, spec.norm.bias, spec.top_k, spec.rope_theta) == ("layer", True, 2, 1e6)
    assert (spec.routing.router_jitter_noise, spec.biases) == (0.01, wse.Biases())
    full = parse_config({**PHIMOE, "attention_bias": True, "lm_head_bias": True, "rope_scaling": LONGROPE, "sliding_window": 7})
    assert full.biases == wse.Biases(qkv=True, out=True, head=True)
    assert full.rope_scaling is not None
    assert (full.rope_scaling.short_mscale, full.rope_scaling.long_mscale) == (1.1, 1.3)
    assert back(full) == full
    for change, message in (
        ({"num_experts_per_tok": 3}, "`num_experts_per_tok` must be 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, **MSCALES}}, "rope_type 'linear' is not supported for this family"),
        ({"rope_scaling": {k: v for k, v in LONGROPE.items() if k != "long_mscale"}}, "`long_mscale` is missing"),
        ({"rope_scaling": {**LONGROPE, "long_mscale": 0.0}}, "`long_mscale` must be positive, in float32"),
        ({"rope_scaling": {**LONGROPE, "attention_factor": 2.0}}, "`attention_factor` must be None beside"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**PHIMOE, **change})
    with pytest.raises(ConfigError, match="'long_mscale' is not known for rope_type 'longrope'"):
        parse_config({**GLM, "rope_scaling": LONGROPE})
    for fields in ({"kind": "other"}, {"bias": True}):
        with pytest.raises(wse.SpecError, match="of `norm`"):
            wse.NormSpec(**fields)
    with pytest.raises(wse.SpecError, match="`short_mscale` and `long_mscale` belong together"):
        replace(full.rope_scaling, long_mscale=None)


def test_deepseek_keeps_latents_and_scales_scores_by_mscale() -> None:
    spec = parse_config(DEEPSEEK)
    assert spec.latent == wse.LatentAttention(kv_lora_rank=10, q_lora_rank=7, qk_nope_head_dim=6, v_head_dim=8)
    assert (spec.head_dim, spec.query_dim, spec.value_dim, spec.cached_heads) == (12, 18, 8, 1)
    assert (spec.rotary.interleaved, spec.scales.attention) == (True, None)
    assert not parse_config({**DEEPSEEK, "rope_interleave": False}).rotary.interleaved
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    stretched = parse_config({**DEEPSEEK, "rope_scaling": yarn})
    assert stretched.scales.attention == pytest.approx(18**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert back(stretched) == stretched
    assert parse_config({**DEEPSEEK, "rope_scaling": {**yarn, "mscale_all_dim": 0}}).scales.attention is None
    with pytest.raises(ConfigError, match="`mscale_all_dim` must lie in 0"):
        parse_config({**DEEPSEEK, "rope_scaling": {**yarn, "mscale_all_dim": 1e200}})
    with pytest.raises(ConfigError, match="`factor` must be given with `mscale_all_dim`"):
        parse_config({**DEEPSEEK, "rope_scaling": {k: v for k, v in yarn.items() if k != "factor"}})
    bare = parse_config({k: v for k, v in DEEPSEEK.items() if k in SHAPE or k in ("model_type", "moe_intermediate_size")} | {
        "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 5})  # fmt: skip
    assert bare.latent == wse.LatentAttention(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, v_head_dim=128)
    assert (bare.num_experts, bare.top_k, bare.dense_layers, bare.routing.n_group) == (256, 8, (0, 1, 2), 8)
    second = parse_config(DEEPSEEK_V2)
    assert (second.routing.n_group, second.routing.group_score, second.routing.expert_weighting_normalization) == (4, "max", False)
    assert parse_config({**DEEPSEEK_V2, "topk_method": "greedy"}).routing.n_group == 1
    for change, message in (
        ({"kv_lora_rank": 9}, "`kv_lora_rank` must be an even integer >= 2, got 9"),
        ({"qk_rope_head_dim": 5, "head_dim": 5}, "`qk_rope_head_dim` must be even"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` must be `num_attention_heads` \\(4\\) with `latent`, got 2"),
        ({"attention_bias": True}, "`attention_bias` must be false"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "`topk_method` must be 'greedy' or 'group_limited_greedy'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**DEEPSEEK, **change})
    with pytest.raises(wse.SpecError, match="`clip_qkv` does not go with `latent`"):
        replace(spec, clip_qkv=1.0)
    with pytest.raises(wse.SpecError, match="`q_lora_rank` must be an integer >= 1 or None, got 0"):
        wse.LatentAttention(kv_lora_rank=2, q_lora_rank=0, qk_nope_head_dim=2, v_head_dim=2)


def test_dbrx_nests_its_fields() -> None:
    spec = parse_config(DBRX)
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (48, 4, 4, 2, 12)
    assert (spec.moe_intermediate_size, spec.num_experts, spec.top_k, spec.clip_qkv, spec.rope_theta) == (20, 4, 2, 8.0, 5e5)
    assert (spec.norm.kind, spec.norm.bias, spec.rms_norm_eps, spec.max_position_embeddings) == ("layer", False, 1e-5, 512)
    assert spec.routing.expert_weighting_normalization
    assert parse_config({**DBRX, "rope_theta": 123.0}).rope_theta == 123.0
    plain = parse_config({k: v for k, v in DBRX.items() if not k.endswith("_config")})
    assert (plain.moe_intermediate_size, plain.num_experts, plain.top_k, plain.num_kv_heads, plain.clip_qkv) == (3584, 4, 1, 1, None)
    raw = parse_config({**DBRX, "ffn_config": {**DBRX["ffn_config"], "moe_normalize_expert_weights": None}})
    assert not raw.routing.expert_weighting_normalization
    for each in (spec, plain, raw):
        assert back(each) == each
    for change, message in (
        ({"d_model": None}, "`d_model` must be an integer"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be false"),
        ({"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "`moe_normalize_expert_weights` must be 1 .* or null, got 2"),
        ({"ffn_config": {"ffn_act_fn": {"name": "relu"}}}, "`ffn_config`: `ffn_act_fn`: `name` must be"),
        ({"attn_config": 3}, "`attn_config` must be an object or null"),
        ({"attn_config": {"kv_n_heads": 0}}, "`attn_config`: `kv_n_heads` must be an integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**DBRX, **change})


def test_llama4_says_which_layers_turn_and_which_are_mixtures() -> None:
    spec = parse_config(LLAMA4)
    assert (spec.intermediate_size, spec.moe_intermediate_size, spec.dense_layers) == (20, 14, (0, 2))
    assert (spec.rotary.skipped_layers, spec.chunk_size, spec.chunked_layers) == ((1, 3), 5, (0, 2))
    assert (spec.shared_experts, spec.rotary.interleaved) == (wse.SharedExperts(intermediate_size=14), True)
    assert spec.query_temperature == wse.QueryTemperature(floor_scale=8192, attn_scale=0.1)
    assert (spec.qkv_suffixes(0), spec.qkv_suffixes(1)) == (("_rope", "_norm"), ("_tuned",))
    assert spec.routing.probability_before_ffn
    assert not spec.routing.expert_weighting_normalization
    given = parse_config({**LLAMA4, "no_rope_layers": [1, 1, 0, 1, 0], "moe_layers": [3], "layer_types": ["chunked_attention"] * 4})
    assert (given.rotary.skipped_layers, given.moe_layers, given.chunked_layers) == ((2,), (3,), (0, 1, 2, 3))
    free = parse_config({**LLAMA4, "attention_chunk_size": None, "attn_temperature_tuning": False, "use_qk_norm": False})
    assert (free.chunk_size, free.query_temperature, free.qk_norm) == (None, None, None)
    dense = parse_config({**LLAMA4, "moe_layers": []})
    assert (dense.is_moe, dense.intermediate_size) == (False, 20)
    alike = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    released = parse_config({**LLAMA4, "no_rope_layers": [], "rope_scaling": {**alike, "original_max_position_embeddings": 8192}})
    assert released.rotary == spec.rotary
    for each in (given, free, dense, released):
        assert back(each) == each
    for change, message in (
        ({"no_rope_layers": [1, 0]}, "`no_rope_layers` must hold 1 .rotated. or 0 for each of 4 layers"),
        ({"layer_types": ["full_attention"]}, "`layer_types` must name full_attention or chunked_attention for each of 4"),
        ({"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": None}, "`attention_chunk_size` is null"),
        ({"attn_scale": -1}, "`attn_scale` must be a number >= 0"),
        ({"moe_layers": [4]}, "`moe_layers` must be a list of layers in 0..3"),
        ({"intermediate_size_mlp": 0}, "`intermediate_size_mlp` must be an integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**LLAMA4, **change})
    for field, message in (
        ({"chunked_layers": ()}, "`chunk_size` and `chunked_layers` belong together"),
        ({"sliding_window": 3, "sliding_layers": (0,)}, "both name layer 0"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer >= 1"),
    ):
        with pytest.raises(wse.SpecError, match=message):
            replace(spec, **field)
    with pytest.raises(wse.SpecError, match="`floor_scale` of the queries' temperature must be an integer >= 1, got 0"):
        wse.QueryTemperature(floor_scale=0)
    for wrong, message in (({"over": "row"}, "over a row has weights"), ({"weighted": True}, "`weighted` must be false")):
        with pytest.raises(wse.SpecError, match=message):
            wse.QkNorm(**{"weighted": False, "rotated_only": True, **wrong})


def test_indexers_say_how_many_keys_are_taken_and_which_layers_share_them() -> None:
    spec = parse_config(DEEPSEEK_V32)
    assert spec.indexer == wse.Indexer(num_heads=3, head_dim=16, topk=5, interleaved=False)
    assert (spec.rotary.interleaved, spec.dense_layers, spec.indexer_layers) == (True, (0, 1), (0, 1, 2, 3))
    second = parse_config(GLM_5)
    assert second.indexer is not None
    assert (second.indexer.interleaved, second.indexer.shared_layers, second.indexer_layers) == (True, (1, 2), (0, 3))
    bare = parse_config({k: v for k, v in DEEPSEEK_V32.items() if not k.startswith("index_")} | {"head_dim": 12})
    assert bare.indexer == wse.Indexer(num_heads=64, head_dim=128, topk=2048)
    mixed = {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "layer_types": ["indexed_attention"] * 4}
    kinds = parse_config({**DEEPSEEK_V32, **mixed})
    assert kinds.dense_layers == (1, 3)
    letters = {k: v for k, v in GLM_5.items() if k != "indexer_types"}
    assert parse_config({**letters, "index_topk_pattern": "FSFS"}).indexer_layers == (0, 2)
    assert parse_config({**letters, "index_topk_freq": 2}).indexer_layers == (0, 1, 3)
    assert parse_config(letters).indexer_layers == (0, 1, 2, 3)
    for each in (bare, kinds, second):
        assert back(each) == each
    for config, change, message in (
        (DEEPSEEK_V32, {"q_lora_rank": None}, "`q_lora_rank` must be an integer for this family"),
        (DEEPSEEK_V32, {"index_topk": 0}, "`index_topk` must be an integer"),
        (DEEPSEEK_V32, {"index_head_dim": 8}, "`index_head_dim` must be at least that of the rotary key .12."),
        (DEEPSEEK_V32, {"index_head_dim": 13}, "`index_head_dim` must be even, got 13"),
        (DEEPSEEK_V32, {"layer_types": ["full_attention"] * 4}, "`layer_types` must name 'indexed_attention'"),
        (DEEPSEEK_V32, {"mlp_layer_types": ["dense"]}, "`mlp_layer_types` must name 'dense' or 'sparse' for each of 4"),
        (GLM_5, {"indexer_types": ["shared"] * 4}, "`indexer_types` must say for each of 4 layers .* the first one 'full'"),
        (letters, {"index_topk_pattern": "FX"}, "`index_topk_pattern` must say for each of 4 layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**config, **change})
    for field, message in (
        ({"indexer": wse.Indexer(num_heads=1, head_dim=16, topk=1, shared_layers=(4,))}, "`shared_layers` of `indexer` must lie in 1..3"),
        ({"latent": replace(spec.latent, q_lora_rank=None)}, "`indexer` needs `latent` with a `q_lora_rank`"),
        ({"sliding_window": 3, "sliding_layers": (0,)}, "`indexer` chooses among all keys"),
    ):
        with pytest.raises(wse.SpecError, match=message):
            replace(spec, **field)
    with pytest.raises(wse.SpecError, match="`shared_layers` of `indexer` must be ascending layers, the first layer not among them"):
        wse.Indexer(num_heads=1, head_dim=16, topk=1, shared_layers=(0,))


def test_rules_that_break_are_errors_of_the_file() -> None:
    for config, change, message in (
        (GRANITE, {"residual_multiplier": -1.0}, "`residual_multiplier` must be a positive number that float32 can hold"),
        (DOTS, {"topk_group": 5}, "`topk_group` must not exceed `n_group`"),
        (GEMMA, {"attn_logit_softcapping": 0.0}, "`attn_logit_softcapping` must be a positive number that float32 can hold"),
    ):
        with pytest.raises(ConfigError, match=f"config.json: {message}"):
            parse_config({**config, **change})


def test_what_a_family_cannot_say_is_not_saved(tmp_path: Path) -> None:
    spec = parse_config(ERNIE)
    for change, name in (
        ({"dense_layers": (2,)}, "dense_layers"),
        ({"clip_qkv": 2.0}, "clip_qkv"),
        ({"shared_experts": wse.SharedExperts(intermediate_size=5)}, "shared_experts"),
    ):
        with pytest.raises(SaveError, match=f"config.json of a ernie4_5_moe model cannot say this model's `{name}`"):
            save_checkpoint(random_checkpoint(replace(spec, **change)), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("config", "change", "message"), [
    (DBRX, {"ffn_config": {**DBRX["ffn_config"], "moe_top_k": 9}}, "`ffn_config`: `moe_top_k` must lie in 1..4 (`ffn_config`: `moe_num_ex"),
    (DBRX, {"attn_config": {**DBRX["attn_config"], "kv_n_heads": 3}}, "`n_heads` must be a multiple of `attn_config`: `kv_n_heads`"),
    (DBRX, {"attn_config": {**DBRX["attn_config"], "clip_qkv": -1}}, "`attn_config`: `clip_qkv` must be positive"),
    (ERNIE, {"moe_k": 9}, "`moe_k` must lie in 1..6 (`moe_num_experts`), got 9"),
    (ERNIE, {"num_experts_per_tok": 9, "moe_k": None}, "`num_experts_per_tok` must lie in 1..6 (`moe_num_experts`), got 9"),
    (HUNYUAN, {"moe_topk": 9}, "`moe_topk` must lie in 1..4 (`num_experts`), got 9"),
    (DEEPSEEK, {"num_experts_per_tok": 9}, "`num_experts_per_tok` must lie in 1..8 (`n_routed_experts`), got 9"),
    (GPT_OSS, {"swiglu_limit": 0}, "`swiglu_limit` must be a positive finite number"),
    (GPT_OSS, {"swiglu_alpha": -1}, "`swiglu_alpha` must be a positive finite number"),
    (GEMMA, {"attn_logit_softcapping": 0}, "`attn_logit_softcapping` must be a positive number"),
    (GEMMA, {"final_logit_softcapping": -2}, "`final_logit_softcapping` must be a positive number"),
    (GRANITE, {"logits_scaling": 0}, "`logits_scaling` must be a positive number"),
    (GRANITE, {"embedding_multiplier": 0}, "`embedding_multiplier` must be a positive number"),
    (DEEPSEEK_V32, {"index_head_dim": 13}, "`index_head_dim` must be even, got 13"),
    (LLAMA4, {"floor_scale": 1 << 40}, "`floor_scale` must be an integer in 1..2147483648"),
], ids=lambda x: x.get("model_type") if isinstance(x, dict) else "")  # fmt: skip
def test_errors_name_the_keys_of_the_file(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {re.escape(message)}"):
        parse_config({**config, **change})


def test_a_model_of_dense_layers_alone_needs_no_width_of_an_expert() -> None:
    for config in (DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V32, DOTS, GLM):
        dense = {**{name: value for name, value in config.items() if name != "moe_intermediate_size"}, "first_k_dense_replace": 4}
        spec = parse_config(dense)
        assert (spec.is_moe, spec.shared_experts, back(spec)) == (False, None, spec)
        with pytest.raises(ConfigError, match="`moe_intermediate_size` is missing"):
            parse_config({**dense, "first_k_dense_replace": 3})


def test_what_a_family_cannot_be_without_is_named_before_anything_is_made() -> None:
    for config, field in ((DEEPSEEK, "latent"), (DEEPSEEK_V2, "latent"), (DEEPSEEK_V32, "indexer"), (GLM_5, "indexer")):
        spec = parse_config(config)
        without = replace(spec, **dict.fromkeys(("indexer", field)))
        with pytest.raises(wse.SpecError, match=f"`{field}` must be given for family '{spec.family}'"):
            to_config(without)
        with pytest.raises(wse.SpecError, match=f"`{field}` must be given for family '{spec.family}'"):
            wse.from_config(without)

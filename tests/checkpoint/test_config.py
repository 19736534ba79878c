"""config.json in both styles, and everything that is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_emu.checkpoint import parse_config, read_config, to_config
from wse_emu.foundation.errors import ConfigError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.testing import contract_specs

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def test_released_and_transformers_5_styles_give_one_spec() -> None:
    released = {**MIXTRAL, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False}
    newer = {**MIXTRAL, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": None}
    spec = parse_config(released)
    assert spec == parse_config(newer)
    assert spec == ModelSpec(
        family="mixtral",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=172,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position_embeddings=512,
        num_experts=6,
        top_k=2,
        moe_intermediate_size=172,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_absent_fields_take_the_defaults_of_each_family() -> None:
    optional = (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
    )
    llama = parse_config(without(LLAMA, *optional, "bos_token_id", "eos_token_id", "hidden_act"))
    assert (llama.num_kv_heads, llama.max_position_embeddings, llama.rms_norm_eps, llama.rope_theta) == (8, 2048, 1e-6, 1e4)
    assert (llama.num_experts, llama.top_k, llama.tie_word_embeddings) == (0, 0, False)
    assert (llama.bos_token_id, llama.eos_token_ids, llama.pad_token_id) == (1, (2,), None)
    mixtral = parse_config(without(MIXTRAL, *optional))
    assert (mixtral.num_kv_heads, mixtral.max_position_embeddings, mixtral.rms_norm_eps, mixtral.rope_theta) == (8, 131_072, 1e-5, 1e6)
    assert (mixtral.num_experts, mixtral.top_k) == (8, 2)


def test_null_kv_heads_are_as_many_as_heads() -> None:
    assert parse_config({**MIXTRAL, "num_key_value_heads": None}).num_kv_heads == 8


def test_head_dim_need_not_divide_hidden() -> None:
    assert parse_config({**LLAMA, "hidden_size": 60, "head_dim": 10}).head_dim == 10
    with pytest.raises(ConfigError, match=r"`hidden_size` \(60\) must be a multiple of `num_attention_heads` \(8\)"):
        parse_config({**LLAMA, "hidden_size": 60})


def test_model_type_alone_names_the_family() -> None:
    assert parse_config(without(LLAMA, "architectures")).family == "llama"


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
@pytest.mark.parametrize(
    "value",
    [0, -1, True, 1.0, "8", None, [8], 1 << 40, 10**5000],
    ids=lambda v: f"{type(v).__name__}{str(v)[:3]}" if not isinstance(v, int) or v < 1 << 60 else "huge",
)
def test_sizes_of_wrong_type_or_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"somewhere: `{name}` must be an integer in") as e:
        parse_config({**LLAMA, name: value}, where="somewhere")
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_have_no_default(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is missing; it has no default"):
        parse_config(without(LLAMA, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            r"unknown architecture 'GPT2LMHeadModel'; known are LlamaForCausalLM .*MixtralForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification' has another head"),
        ({"architectures": []}, "`architectures` must be a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "`architectures` must be a list of names"),
        ({"architectures": ["MixtralForCausalLM"]}, "`model_type` must be 'mixtral'"),
        ({"architectures": None, "model_type": None}, "neither `architectures` nor `model_type`"),
        ({"architectures": None, "model_type": "qwen4"}, "unknown `model_type` 'qwen4'; known architectures are"),
        ({"architectures": None, "model_type": ["llama"]}, "unknown `model_type`"),
        ({"hidden_act": "gelu"}, "`hidden_act` must be .*, got 'gelu'"),
        ({"attention_bias": 1}, "`attention_bias` must be true or false"),
        ({"mlp_bias": True}, "`mlp_bias` must be false"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`: `quant_method` must be 'fp8' for this family; or use a float32"),
        ({"layer_types": ["sliding_attention"] * 3}, "`layer_types` must name 'full_attention' only"),
        ({"layer_types": ["full_attention"] * 2}, "`layer_types` must name full_attention or sliding_attention for each of 3 layers"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "`rope_scaling`: rope_type 'proportional' is not supported; known are"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' and 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type 3 is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "`rope_scaling`: `factor` is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rotary scaling linear: `factor` must be finite and at least 1, got 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "`rope_scaling`: `low_freq_factor` is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "`low_freq_factor` and `high_freq_factor` must be positive, the first not larger, got 4.0 and 1.0",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 3}},
            "`long_factor` must be a list of 4 finite numbers",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "`beta_slow` and `beta_fast` must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": 0}}, "`attention_factor` must be positive"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1.0, "mscale_all_dim": -10.0}}, "`mscale_all_dim` must lie in 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1e200, "mscale_all_dim": 1.0}}, "`mscale` must lie in 0"),
        ({"partial_rotary_factor": 1e308}, "`partial_rotary_factor` must lie above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": 3.5e38}}, "must be positive, in float32"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}, "rope_theta": 1}, "`rope_theta` must be above 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "`head_dim` must be at least 4"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
            "`rope_scaling` and `rope_parameters` disagree",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' is not known for rope_type 'default'"),
        ({"rope_parameters": [1]}, "`rope_parameters` must be an object or null"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4},
            "rotary bases disagree: rope_theta = 10000.0, rope_parameters.rope_theta",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor` must be 1"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1"),
        ({"rope_theta": 0}, "`rope_theta` must be positive"),
        ({"rope_theta": "1e4"}, "`rope_theta` must be a finite number"),
        ({"rope_theta": float("inf")}, "`rope_theta` must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be a finite number"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` must lie in"),
        ({"rms_norm_eps": True}, "`rms_norm_eps` must be a finite number"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` must be a multiple of `num_key_value_heads`"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"eos_token_id": 100}, r"`eos_token_id` must be null, a token id or a list of them, in 0\.\.99"),
        ({"eos_token_id": [2, True]}, "`eos_token_id` must be"),
        ({"eos_token_id": [[2]]}, "`eos_token_id` must be"),
        ({"bos_token_id": -1}, "`bos_token_id` must be null or a token id"),
        ({"pad_token_id": 100}, "`pad_token_id` must be null or a token id"),
        ({"hidden_size": 1 << 30, "intermediate_size": 1 << 30}, "parameters, at most"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**LLAMA, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 0}, "`sliding_window` must be an integer in 1"),
        ({"sliding_window": 9, "layer_types": ["full_attention"] * 3}, "`layer_types` must name 'sliding_attention' only"),
        ({"sliding_window": "all"}, "`sliding_window` must be an integer"),
        ({"num_local_experts": 0}, "`num_local_experts` must be an integer in 1"),
        ({"num_experts_per_tok": 7}, r"`num_experts_per_tok` must lie in 1\.\.6 \(`num_local_experts`\), got 7"),
        ({"num_hidden_layers": 60_000, "num_local_experts": 30_000}, "tensors"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MIXTRAL, **change})


@pytest.mark.parametrize("window", [None, 512, 4096])
def test_a_window_over_the_whole_context_is_no_window(window: int | None) -> None:
    assert parse_config({**MIXTRAL, "sliding_window": window}) == parse_config(MIXTRAL)


def test_a_short_window_is_that_of_every_layer_of_mistral_and_mixtral() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    for spec in (parse_config({**mistral, "sliding_window": 9}), parse_config({**MIXTRAL, "sliding_window": 9})):
        assert [spec.pattern(i).window for i in range(3)] == [9, 9, 9]
    assert parse_config({**mistral, "max_position_embeddings": 8192}).pattern(0).window == 4096
    assert parse_config({**mistral, "max_position_embeddings": 8192, "sliding_window": None}).pattern(0).window is None


QWEN: dict[str, Any] = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
QWEN_MOE: dict[str, Any] = {
    **without(QWEN, "intermediate_size"), "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 6,
    "num_experts_per_tok": 3, "moe_intermediate_size": 24,
}  # fmt: skip


def test_qwen3_has_head_norms_and_a_window_where_it_says_so() -> None:
    spec = parse_config({**QWEN, "sliding_window": 4, "max_window_layers": 1})
    assert spec.qk_norm
    assert (spec.sliding_window, spec.sliding_layers) == (None, ())
    assert parse_config(without(QWEN, "head_dim")).head_dim == 128
    window = {**QWEN, "use_sliding_window": True, "sliding_window": 4}
    assert parse_config({**window, "max_window_layers": 1}).sliding_layers == (1, 2)
    assert parse_config({**window, "max_window_layers": 3}).sliding_window is None
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse_config({**window, "layer_types": types}).sliding_layers == (0, 2)
    with pytest.raises(ConfigError, match="`layer_types` names sliding layers, but there is no window"):
        parse_config({**QWEN, "layer_types": types})


def test_qwen3_moe_mixes_dense_layers_and_mixtures() -> None:
    spec = parse_config(QWEN_MOE)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size, spec.routing, spec.dense_layers) == (
        6, 3, 24, RoutingRule(expert_weighting_normalization=False), (),
    )  # fmt: skip
    assert parse_config({**QWEN_MOE, "norm_topk_prob": True}).routing == RoutingRule()
    mixed = {**QWEN_MOE, "intermediate_size": 40, "num_hidden_layers": 4}
    assert parse_config({**mixed, "mlp_only_layers": [2, 0, 2]}).dense_layers == (0, 2)
    sparse = parse_config({**mixed, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert sparse.moe_layers == (1,)
    assert [sparse.ffn_width(i) for i in range(4)] == [40, 24, 40, 40]
    assert not parse_config({**mixed, "decoder_sparse_step": 5}).is_moe
    assert parse_config({**without(QWEN_MOE, "num_experts"), "num_local_experts": 6}) == spec
    assert parse_config({**QWEN_MOE, "use_sliding_window": True, "sliding_window": 7}).sliding_layers == (0, 1, 2)
    with pytest.raises(ConfigError, match="`intermediate_size` is missing"):
        parse_config({**QWEN_MOE, "mlp_only_layers": [0]})
    with pytest.raises(ConfigError, match="`num_experts` and `num_local_experts` disagree"):
        parse_config({**QWEN_MOE, "num_local_experts": 5})
    with pytest.raises(ConfigError, match=r"`mlp_only_layers` must be a list of layers in 0\.\.2"):
        parse_config({**QWEN_MOE, "mlp_only_layers": [3]})


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "truncate": False},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 256},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r["rope_type"])
def test_scaled_rotary_embeddings_are_read_in_both_styles_and_survive_the_way_back(rope: dict[str, Any]) -> None:
    old = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    spec = parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": old})
    assert spec == parse_config({**LLAMA, "rope_parameters": {**rope, "rope_theta": 5e5}})
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.kind == rope["rope_type"]
    assert spec.rope_scaling.factor == rope.get("factor", 512 / 256)
    assert parse_config(json.loads(json.dumps(to_config(spec)))) == spec


def test_a_scaling_lengthens_the_context() -> None:
    def context_of(**rope: Any) -> int:
        return parse_config({**LLAMA, "rope_scaling": rope}).context_length

    assert context_of(rope_type="default") == 512
    assert context_of(rope_type="linear", factor=4.0) == 2048
    assert context_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=100) == 512
    assert context_of(rope_type="yarn", factor=8.0, original_max_position_embeddings=100) == 800
    beside = {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 90}
    assert parse_config(beside).context_length == 720


MIXED = {**QWEN_MOE, "intermediate_size": 9, "mlp_only_layers": [1]}


@pytest.mark.parametrize("config", [QWEN, QWEN_MOE, MIXED], ids=["dense", "moe", "mixed"])
def test_qwen_specs_survive_the_way_through_config(config: dict[str, Any]) -> None:
    for window in ({}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}):
        spec = parse_config({**config, **window})
        assert parse_config(json.loads(json.dumps(to_config(spec)))) == spec


def test_eos_may_be_a_list_null_or_repeated() -> None:
    assert parse_config({**LLAMA, "eos_token_id": [7, 2, 7]}).eos_token_ids == (7, 2)
    assert parse_config({**LLAMA, "eos_token_id": None}).eos_token_ids == ()
    assert parse_config({**LLAMA, "pad_token_id": -1}).pad_token_id is None


def test_generation_config_gives_the_token_ids() -> None:
    generation = {"eos_token_id": [9, 8], "bos_token_id": None, "pad_token_id": 3, "temperature": 0.7}
    spec = parse_config(LLAMA, generation=generation)
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((9, 8), 1, 3)
    with pytest.raises(ConfigError, match=r"with generation_config\.json: `eos_token_id` must be"):
        parse_config(LLAMA, generation={"eos_token_id": 100})


@pytest.mark.parametrize("name", list(contract_specs()))
def test_a_spec_survives_the_way_through_config(name: str) -> None:
    spec = contract_specs()[name]
    assert parse_config(json.loads(json.dumps(to_config(spec)))) == spec


@given(
    st.dictionaries(
        st.sampled_from([*MIXTRAL, "rope_parameters", "rope_scaling", "rope_theta", "head_dim", "layer_types", "tie_word_embeddings"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), inner, max_size=2)
            ),
            max_leaves=4,
        ),
        max_size=4,
    )
)
@settings(deadline=None, max_examples=150)
def test_any_values_give_a_spec_or_a_named_error(changes: dict[str, Any]) -> None:
    try:
        spec = parse_config({**MIXTRAL, **changes})
    except ConfigError:
        return
    assert spec.num_heads * spec.head_dim > 0


def test_config_is_read_from_a_directory_or_a_file_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    config, spec = read_config(tmp_path)
    assert config == LLAMA
    assert spec.eos_token_ids == (5,)
    assert read_config(tmp_path / "config.json") == (config, spec)
    other = tmp_path / "sub" / "mixtral-8x7b.json"
    other.parent.mkdir()
    other.write_text(json.dumps(MIXTRAL))
    assert read_config(other)[1].family == "mixtral"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object, holds list"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' stands there twice"),
        (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * ((4 << 20) + 1), "bytes, at most 4194304 are allowed"),
    ],
    ids=["empty", "open", "list", "utf16", "duplicate", "nan", "digits", "deep", "large"],
)
def test_malformed_config_is_refused_with_its_path(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message) as e:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)


def test_a_file_in_the_place_of_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.safetensors: a file; a checkpoint is a directory"):
        read_config(tmp_path / "model.safetensors")


def test_missing_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: there is no such file"):
        read_config(tmp_path)

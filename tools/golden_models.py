"""Which checkpoints the golden files are made of: their config.json, and what follows from one."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

COMMON: Config = {
    "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.02, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
    "rms_norm_eps": 2e-3,  # larger than usual, or nothing would tell whether it is there
}  # fmt: skip
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 59, "hidden_size": 36, "intermediate_size": 44,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "rope_theta": 500.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 61, "hidden_size": 30, "intermediate_size": 38,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 1e5,
    "sliding_window": 13, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = COMMON | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6,
    "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 53, "hidden_size": 28, "intermediate_size": 34,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 1e6,
    "attention_bias": False, "use_sliding_window": True, "sliding_window": 11, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_MOE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 53, "hidden_size": 26, "intermediate_size": 34,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6,
    "attention_bias": False, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 15, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_MOE = COMMON | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 53, "hidden_size": 32, "intermediate_size": 26,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 13, "shared_expert_intermediate_size": 18, "norm_topk_prob": False,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
OLMOE = COMMON | {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 59, "hidden_size": 32, "intermediate_size": 14,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500.0, "num_experts": 6,
    "num_experts_per_tok": 3, "norm_topk_prob": False, "attention_bias": False, "clip_qkv": 1.75, "tie_word_embeddings": False,
}  # fmt: skip
GRANITEMOE = COMMON | {
    "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 14,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 1e5, "num_local_experts": 5,
    "num_experts_per_tok": 2, "attention_bias": False, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
    "attention_multiplier": 0.21, "logits_scaling": 3.0, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = COMMON | {
    "vocab_size": 57, "hidden_size": 28, "intermediate_size": 34, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "sliding_window": 11, "query_pre_attn_scalar": 17, "final_logit_softcapping": 12.0,
    "attn_logit_softcapping": 4.0, "tie_word_embeddings": True, "rope_theta": 1e5,
}  # fmt: skip
GEMMA2 = GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA3 = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_local_base_freq": 50.0,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip
DOTS1 = COMMON | {
    "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "vocab_size": 57, "hidden_size": 32, "intermediate_size": 26,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500.0,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 9, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.7, "attention_bias": False, "sliding_window": 11,
    "max_window_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
GLM4_MOE = COMMON | {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 59, "hidden_size": 36, "intermediate_size": 26,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 500.0,
    "partial_rotary_factor": 0.5, "use_qk_norm": True, "attention_bias": True, "n_routed_experts": 6, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 11, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.4, "tie_word_embeddings": False,
}  # fmt: skip
HUNYUAN = COMMON | {
    "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "vocab_size": 61, "hidden_size": 28,
    "intermediate_size": 13, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
    "rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "alpha": 30.0, "factor": 1.0}, "num_experts": 5, "moe_topk": [2, 2],
    "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
ERNIE = COMMON | {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "vocab_size": 53, "hidden_size": 32,
    "intermediate_size": 26, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rope_theta": 500.0, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 9,
    "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 0.6, "use_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
MINIMAX = COMMON | {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "vocab_size": 59, "hidden_size": 32, "intermediate_size": 13,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rotary_dim": 4, "rope_theta": 500.0,
    "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 59, "hidden_size": 32, "intermediate_size": 13,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 500.0,
    "max_position_embeddings": 120, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 1.2, "attention_bias": True,
    "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 24, "beta_fast": 3.0, "beta_slow": 0.4, "truncate": False,
    },
}  # fmt: skip
PHIMOE = COMMON | {
    "architectures": ["PhimoeForCausalLM"], "model_type": "phimoe", "vocab_size": 57, "hidden_size": 30, "intermediate_size": 14,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500.0,
    "max_position_embeddings": 120, "num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.2, "attention_bias": True,
    "lm_head_bias": True, "sliding_window": None, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "longrope", "factor": 5.0, "original_max_position_embeddings": 24, "short_mscale": 1.15, "long_mscale": 1.4,
        "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.7, 2.9, 4.4],
    },
}  # fmt: skip
LATENT = COMMON | {
    "vocab_size": 59, "hidden_size": 32, "intermediate_size": 26, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 10,
    "rope_theta": 500.0, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 9,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "attention_bias": False, "tie_word_embeddings": False,
    "max_position_embeddings": 120,
}  # fmt: skip
LATENT_STRETCHED: Config = {
    "q_lora_rank": 12,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 24, "beta_fast": 3.0, "beta_slow": 0.4, "mscale": 1.0,
        "mscale_all_dim": 0.6,
    },
}  # fmt: skip
DEEPSEEK_V2 = LATENT | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "norm_topk_prob": False,
}  # fmt: skip
DEEPSEEK_V3 = LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "norm_topk_prob": True, "n_group": 4, "topk_group": 2,
}  # fmt: skip
SPARSE = LATENT | LATENT_STRETCHED | {
    "norm_topk_prob": True, "index_topk": 9, "index_head_dim": 12, "index_n_heads": 10,
}  # fmt: skip
DEEPSEEK_V32 = SPARSE | {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "n_group": 4, "topk_group": 2,
}  # fmt: skip
GLM_MOE_DSA = SPARSE | {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1,
    "indexer_types": ["full", "shared", "full"],
}  # fmt: skip
DBRX_SIZES: Config = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500.0},
    "ffn_config": {"ffn_hidden_size": 14, "moe_num_experts": 6, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0},
}
DBRX = COMMON | DBRX_SIZES | {
    "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "vocab_size": 53, "hidden_size": 32, "intermediate_size": 14,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500.0,
    "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
"""As published, and under the names of the other families, by which the tools go."""
LLAMA4 = COMMON | {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "vocab_size": 57, "hidden_size": 28, "intermediate_size": 13,
    "intermediate_size_mlp": 26, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
    "rope_theta": 500.0, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_layers": [0, 2], "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": 11, "use_qk_norm": True, "attn_temperature_tuning": True, "floor_scale": 40, "attn_scale": 0.9,
    "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
"""No answer to the padded prompts reaches position 40: transformers counts padding as positions there."""
ROPE = LLAMA | {
    "torch_dtype": "float32", "hidden_size": 28, "intermediate_size": 34, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 120, "tie_word_embeddings": False,
}  # fmt: skip
ORIGINAL = 24
"""Context of the models with a stretched one, before it was stretched."""
STRETCHED = {"factor": 5.0, "original_max_position_embeddings": ORIGINAL}


def _scaled(kind: str, **values: Any) -> Config:
    return ROPE | {"rope_scaling": {"rope_type": kind, **values}}


def _in(dtype: str, *configs: Config) -> Config:
    merged: Config = {}
    for config in configs:
        merged |= config
    return merged | {"torch_dtype": dtype}


CHECKPOINTS: dict[str, Config] = {
    "llama-float32": _in("float32", LLAMA),
    "llama-bfloat16": _in("bfloat16", LLAMA),
    "llama-float16": _in("float16", LLAMA),
    "llama-linear": _scaled("linear", factor=3.0),
    "llama-dynamic": _scaled("dynamic", factor=5.0) | {"max_position_embeddings": ORIGINAL},
    "llama-yarn": _scaled("yarn", **STRETCHED),
    "llama-yarn-options": _scaled("yarn", **STRETCHED, beta_fast=3.0, beta_slow=0.4, truncate=False, mscale=1.0, mscale_all_dim=0.4),
    "llama-longrope": _scaled(
        "longrope", **STRETCHED,
        short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0], long_factor=[1.0, 1.3, 1.7, 2.2, 2.8, 3.5, 4.2, 5.0],
    ),
    "llama-llama3": _scaled("llama3", **STRETCHED, low_freq_factor=0.5, high_freq_factor=3.0),
    "mistral-float32": _in("float32", MISTRAL),
    "mistral-bfloat16": _in("bfloat16", MISTRAL),
    "mixtral-float32": _in("float32", MIXTRAL),
    "mixtral-bfloat16": _in("bfloat16", MIXTRAL),
    # The two ways in which some layers get the window.
    "qwen3-float32": _in("float32", QWEN3, {"max_window_layers": 1}),
    "qwen3-bfloat16": _in("bfloat16", QWEN3, {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe-normalized-float32": _in("float32", QWEN3_MOE),
    "qwen3_moe-normalized-bfloat16": _in("bfloat16", QWEN3_MOE),
    "qwen3_moe-raw-float32": _in("float32", QWEN3_MOE, {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 14}),
    "qwen3_moe-raw-bfloat16": _in("bfloat16", QWEN3_MOE, {"norm_topk_prob": False}),
    "qwen3_moe-raw-float16": _in("float16", QWEN3_MOE, {"norm_topk_prob": False}),
    # The two ways in which some layers are dense.
    "qwen3_moe-mixed-float32": _in("float32", QWEN3_MOE, {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen3_moe-mixed-bfloat16": _in("bfloat16", QWEN3_MOE, {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "qwen2_moe-float32": _in("float32", QWEN2_MOE),
    "qwen2_moe-bfloat16": _in("bfloat16", QWEN2_MOE, {"norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "olmoe-float32": _in("float32", OLMOE),
    "granitemoe-float32": _in("float32", GRANITEMOE),
    "gemma2-float32": _in("float32", GEMMA2),
    "gemma3_text-float32": _in("float32", GEMMA3),
    "dots1-float32": _in("float32", DOTS1),
    "glm4_moe-float32": _in("float32", GLM4_MOE),
    "hunyuan_v1_moe-float32": _in("float32", HUNYUAN),
    "ernie4_5_moe-float32": _in("float32", ERNIE),
    "minimax_m2-float32": _in("float32", MINIMAX),
    "gpt_oss-float32": _in("float32", GPT_OSS),
    "gpt_oss-mxfp4": _in("bfloat16", GPT_OSS, {
        "intermediate_size": 32, "num_local_experts": 4, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    }),
    "gpt_oss-bfloat16": _in("bfloat16", GPT_OSS, {"layer_types": ["full_attention", "sliding_attention"]}),
    "phimoe-float32": _in("float32", PHIMOE),
    # The two ways in which queries are made, experts chosen, and (of V3) rotary pairs laid out.
    "deepseek_v2-float32": _in("float32", DEEPSEEK_V2, {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2-groups-bfloat16": _in(
        "bfloat16", DEEPSEEK_V2, LATENT_STRETCHED, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3-float32": _in("float32", DEEPSEEK_V3, LATENT_STRETCHED, {"rope_interleave": True}),
    "deepseek_v3-halves-float32": _in("float32", DEEPSEEK_V3, {"q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3-fp8": _in("bfloat16", DEEPSEEK_V3, LATENT_STRETCHED, {
        "rope_interleave": True, "kv_lora_rank": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 4]},
    }),
    "dbrx-float32": _in("float32", DBRX),
    "llama4_text-float32": _in("float32", LLAMA4),
    "deepseek_v32-float32": _in("float32", DEEPSEEK_V32),
    "glm_moe_dsa-float32": _in("float32", GLM_MOE_DSA),
}  # fmt: skip
"""Directory under tests/golden to config.json."""


def follows_length(config: Config) -> bool:
    """Whether rotary frequencies depend on how long the sequence is."""
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type") in ("dynamic", "longrope") and "alpha" not in scaling


def n_experts(config: Config) -> int:
    """Experts of a mixture; 0 in a dense family."""
    return next((config[n] for n in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") if n in config), 0)


def expert_width(config: Config) -> int:
    """Width of one expert."""
    return int(config.get("moe_intermediate_size", config["intermediate_size"]))


def shared_width(config: Config) -> int:
    """Width of the shared experts together; 0 without any."""
    if config["model_type"] in ("hunyuan_v1_moe", "llama4_text"):
        return int(config["intermediate_size"])
    counted = config.get("n_shared_experts", config.get("moe_num_shared_experts", 0))
    return int(config.get("shared_expert_intermediate_size", counted * expert_width(config)))


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    if not n_experts(config):
        return False
    if "moe_layers" in config:
        return layer in config["moe_layers"]
    if "first_k_dense_replace" in config:
        return bool(layer >= config["first_k_dense_replace"])
    if "moe_layer_start_index" in config:
        last = config["moe_layer_end_index"] % config["num_hidden_layers"]
        return (layer + 1) % config["moe_layer_interval"] == 0 and config["moe_layer_start_index"] <= layer <= last
    return layer not in config.get("mlp_only_layers", ()) and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def has_dense(config: Config) -> bool:
    """Whether there are dense layers."""
    return not all(is_sparse(config, i) for i in range(config["num_hidden_layers"]))


def has_sparse(config: Config) -> bool:
    """Whether there are mixtures of experts."""
    return any(is_sparse(config, i) for i in range(config["num_hidden_layers"]))


def has_normed_heads(config: Config) -> bool:
    """Whether queries and keys are normalised."""
    normed = ("qwen3", "qwen3_moe", "olmoe", "gemma3_text", "dots1", "hunyuan_v1_moe", "minimax_m2")
    return config["model_type"] in normed or (config.get("use_qk_norm", False) and not is_llama4(config))


def is_llama4(config: Config) -> bool:
    """Whether heads have norms without weights, layers chunks of keys or no rotation, and experts their weights on the input."""
    return bool(config["model_type"] == "llama4_text")


def normed_over_row(config: Config) -> bool:
    """Whether that is done over all heads of a token together."""
    return config["model_type"] in ("olmoe", "minimax_m2")


def is_biased(config: Config) -> bool:
    """Whether queries, keys and values have biases."""
    return config["model_type"] == "qwen2_moe" or config.get("attention_bias", False)


def is_latent(config: Config) -> bool:
    """Whether keys and values are made of a latent."""
    return "kv_lora_rank" in config


def is_fp8(config: Config) -> bool:
    """Whether matrices are stored in eight bits."""
    return config.get("quantization_config", {}).get("quant_method") == "fp8"


def chooses_keys(config: Config) -> bool:
    """Whether indexers choose the keys that a token attends to."""
    return "index_topk" in config


def runs_indexer(config: Config, layer: int) -> bool:
    """Whether a layer has one of its own."""
    return chooses_keys(config) and config.get("indexer_types", ["full"] * (layer + 1))[layer] == "full"


def has_correction(config: Config) -> bool:
    """Whether routers have a correction bias."""
    return config["model_type"] in ("dots1", "glm4_moe", "ernie4_5_moe", "minimax_m2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")


def by_sigmoid(config: Config) -> bool:
    """Whether routers take the sigmoid of their logits."""
    return config["model_type"] in ("dots1", "glm4_moe", "minimax_m2", "deepseek_v3", "llama4_text", "deepseek_v32", "glm_moe_dsa")


def has_output_bias(config: Config) -> bool:
    """Whether the output of attention has a bias."""
    return config["model_type"] in ("gpt_oss", "phimoe")


def has_layer_norm(config: Config) -> bool:
    """Whether norms take the mean away first."""
    return config["model_type"] in ("phimoe", "dbrx")


def has_norm_bias(config: Config) -> bool:
    """Whether they have a bias."""
    return bool(config["model_type"] == "phimoe")

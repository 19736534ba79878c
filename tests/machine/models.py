"""Small models and grids for the tests of the machine as a whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import wse_emu as wse

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 150, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "num_local_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": None,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 131, "hidden_size": 22, "intermediate_size": 26, "moe_intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "mlp_only_layers": [1],
    "use_sliding_window": True, "sliding_window": 5, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {"mixtral": MIXTRAL, "llama": LLAMA, "qwen3_moe": QWEN3_MOE}
SHAPE = {
    "vocab_size": 71, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "max_position_embeddings": 64, "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
RULES = {
    "llama": {**SHAPE, "model_type": "llama", "intermediate_size": 14, "attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "qwen2_moe": {
        **SHAPE, "model_type": "qwen2_moe", "intermediate_size": 14, "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 9, "shared_expert_intermediate_size": 11,
    },
    "olmoe": {**SHAPE, "model_type": "olmoe", "intermediate_size": 9, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
    "granitemoe": {
        **SHAPE, "model_type": "granitemoe", "intermediate_size": 9, "num_local_experts": 4, "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 3.0,
    },
    "glm4_moe": {
        **SHAPE, "model_type": "glm4_moe", "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True,
        "head_dim": 8, "attention_bias": True,
    },
    "deepseek_v3": {
        **SHAPE, "model_type": "deepseek_v3", "num_key_value_heads": 4, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 8, "kv_lora_rank": 10, "q_lora_rank": 7, "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5,
        },
    },
    "deepseek_v32": {
        **SHAPE, "model_type": "deepseek_v32", "num_key_value_heads": 4, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 8, "kv_lora_rank": 10, "q_lora_rank": 7, "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "index_topk": 3,
        "index_head_dim": 8, "index_n_heads": 3,
    },
    "glm_moe_dsa": {
        **SHAPE, "model_type": "glm_moe_dsa", "num_key_value_heads": 4, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 8, "kv_lora_rank": 10, "q_lora_rank": 7, "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "index_topk": 4, "index_head_dim": 6,
        "index_n_heads": 2, "indexer_types": ["full", "shared"],
    },
    "gpt_oss": {
        **SHAPE, "model_type": "gpt_oss", "intermediate_size": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
        "swiglu_limit": 0.5, "swiglu_alpha": 1.5,
    },
    "phimoe": {
        **SHAPE, "model_type": "phimoe", "intermediate_size": 9, "num_local_experts": 4, "router_jitter_noise": 0.2, "attention_bias": True,
        "lm_head_bias": True,
        "rope_scaling": {
            "type": "longrope", "original_max_position_embeddings": 40, "short_mscale": 1.1, "long_mscale": 1.3,
            "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 1.9, 3.1],
        },
    },
    "dbrx": {
        **SHAPE, "model_type": "dbrx", "d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 500.0},
        "ffn_config": {"ffn_hidden_size": 9, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "llama4_text": {
        **SHAPE, "model_type": "llama4_text", "intermediate_size": 9, "intermediate_size_mlp": 14, "moe_layers": [0],
        "num_local_experts": 4, "num_experts_per_tok": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 4, "floor_scale": 3,
        "attn_scale": 0.4,
    },
    "gemma2": {
        **SHAPE, "model_type": "gemma2", "intermediate_size": 14, "sliding_window": 4, "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **SHAPE, "model_type": "gemma3_text", "intermediate_size": 14, "sliding_window": 4, "sliding_window_pattern": 2,
        "rope_local_base_freq": 20.0,
    },
}  # fmt: skip
"""What sets each family apart from a Llama, once."""
EVERY_FAMILY: dict[str, dict[str, Any]] = {
    **RULES, "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE,
    "mistral": {**SHAPE, "model_type": "mistral", "intermediate_size": 14, "sliding_window": 3},
    "qwen3": {
        **SHAPE, "model_type": "qwen3", "intermediate_size": 14, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1,
    },
    "dots1": {
        **SHAPE, "model_type": "dots1", "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": None,
    },
    "hunyuan_v1_moe": {
        **SHAPE, "model_type": "hunyuan_v1_moe", "intermediate_size": 9, "num_experts": 4, "moe_topk": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 9.0},
    },
    "ernie4_5_moe": {
        **SHAPE, "model_type": "ernie4_5_moe", "intermediate_size": 14, "moe_intermediate_size": 9, "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "minimax_m2": {
        **SHAPE, "model_type": "minimax_m2", "intermediate_size": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4,
    },
    "deepseek_v2": {
        **{k: v for k, v in RULES["deepseek_v3"].items() if k != "rope_scaling"}, "model_type": "deepseek_v2", "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
    },
}  # fmt: skip
"""One small model of every family."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "partly rotated": (
        "llama",
        {
            "rotary": wse.RotarySpec(dim=4, interleaved=True, skipped_layers=(1,)), "qk_norm": wse.QkNorm(after_rotary=True),
            "clip_qkv": 0.5, "activation": "silu",
        },
    ),
    "clamped experts, every way": (
        "gpt_oss",
        {"routing": wse.RoutingRule(probability_before_ffn=True, router_use_bias=True), "qk_norm": wse.QkNorm()},
    ),
    "half rotated": ("llama", {"rotary": wse.RotarySpec(dim=2), "qk_norm": wse.QkNorm(over="row")}),
}  # fmt: skip
"""What no family of `RULES` has: one of them, and other fields of its spec."""


def make_model(
    family: str, rows: int, cols: int, executor: str = "batched", *, changes: dict[str, Any] | None = None, rules: bool = False,
    **options: Any
) -> wse.WaferModel:  # fmt: skip
    """The same random model on any grid and executor."""
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=executor)
    if family in VARIANTS and rules:
        base, fields = VARIANTS[family]
        spec = dataclasses.replace(make_model(base, 1, 1, "dry", rules=True).spec, **fields)
        return wse.from_config(spec, seed=3, wafer=wafer, **options)
    return wse.from_config((RULES if rules else CONFIGS)[family] | (changes or {}), seed=3, wafer=wafer, **options)

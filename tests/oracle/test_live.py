"""The emulator against transformers, live, on checkpoints that transformers itself writes: uneven heads, odd widths, any top-k."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.foundation.rope_scaling import ROPE_KINDS

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Largest error allowed, in standard deviations of the array compared."""
NEW_TOKENS = 12

BASE: dict[str, Any] = {
    "vocab_size": 101, "max_position_embeddings": 128, "num_hidden_layers": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPE_SHAPE = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 41}
STRETCHED = {"original_max_position_embeddings": 16, "factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral uneven heads": {
        "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "intermediate_size": 37,
        "num_local_experts": 5, "num_experts_per_tok": 3, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    },
    "mixtral one expert chosen": {
        "hidden_size": 33, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 29,
        "num_local_experts": 4, "num_experts_per_tok": 1, "rope_theta": 500.0,
    },
    "mixtral all experts chosen": {
        "hidden_size": 24, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 4, "intermediate_size": 19,
        "num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True,
    },
    "mixtral many experts": {
        "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 11,
        "num_local_experts": 17, "num_experts_per_tok": 4, "num_hidden_layers": 3,
    },
    "mixtral window": {
        "hidden_size": 27, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 21,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
    },
    "llama uneven heads": {
        "hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 61,
    },
    "llama tied": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 23,
        "tie_word_embeddings": True, "rope_theta": 1e5,
    },
    "mistral window": {
        "hidden_size": 35, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 43,
        "sliding_window": 7, "rope_theta": 1e6,
    },
    # With a window of one, transformers 5.24 contradicts itself: its cache keeps what `[-window + 1:]` means to drop.
    "mistral window of two tokens": {
        "hidden_size": 26, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6, "intermediate_size": 31,
        "sliding_window": 2,
    },
    "mistral no window": {
        "hidden_size": 38, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 29,
        "sliding_window": None, "tie_word_embeddings": True,
    },
    "qwen3 no window": {
        "hidden_size": 37, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "intermediate_size": 45,
        "rope_theta": 1e6,
    },
    "qwen3 window in the last layers": {
        "hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 33,
        "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True,
    },
    "qwen3_moe normalized": {
        "hidden_size": 31, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
        "num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 13, "norm_topk_prob": True,
    },
    "qwen3_moe raw, window": {
        "hidden_size": 22, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40,
        "num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 17, "use_sliding_window": True, "sliding_window": 9,
    },
    "qwen3_moe mixed": {
        "hidden_size": 29, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 34,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 11, "norm_topk_prob": True,
        "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3],
    },
    "qwen3_moe yarn": {
        "hidden_size": 30, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 34,
        "num_experts": 6, "num_experts_per_tok": 6, "moe_intermediate_size": 12, "rope": {"rope_type": "yarn", **STRETCHED},
    },
    "llama biases": {
        "hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 27,
        "attention_bias": True, "hidden_act": "gelu_pytorch_tanh",
    },
    "qwen2_moe raw": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40, "num_experts": 7,
        "num_experts_per_tok": 3, "moe_intermediate_size": 13, "shared_expert_intermediate_size": 21,
    },
    "qwen2_moe mixed, normalized, window": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 23, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 9, "norm_topk_prob": True,
        "num_hidden_layers": 4, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3,
    },
    "qwen2_moe no biases": {
        "hidden_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 23, "num_experts": 4,
        "num_experts_per_tok": 1, "moe_intermediate_size": 17, "shared_expert_intermediate_size": 14, "qkv_bias": False,
    },
    "olmoe": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 17, "num_experts": 7,
        "num_experts_per_tok": 3,
    },
    "olmoe clipped, grouped": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 19, "num_experts": 5,
        "num_experts_per_tok": 2, "clip_qkv": 1.25, "norm_topk_prob": True,
    },
    "granitemoe": {
        "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 14, "num_local_experts": 6,
        "num_experts_per_tok": 3, "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2,
        "logits_scaling": 3.0, "tie_word_embeddings": True,
    },
    "granitemoe untied": {
        "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 22, "num_local_experts": 4,
        "num_experts_per_tok": 1, "embedding_multiplier": 1.5, "residual_multiplier": 1.3, "attention_multiplier": 0.5,
    },
    "gemma2": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 29,
        "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 13, "final_logit_softcapping": 40.0,
        "attn_logit_softcapping": 3.0,
    },
    "gemma2 no caps": {
        "hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 33,
        "sliding_window": 5, "query_pre_attn_scalar": 6, "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 29,
        "num_hidden_layers": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 9,
        "rope": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3_text capped": {
        "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 29,
        "num_hidden_layers": 3, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8, "final_logit_softcapping": 40.0,
    },
    "dots1": {
        "hidden_size": 34, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 29,
        "num_hidden_layers": 3, "n_routed_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 11, "n_shared_experts": 1,
        "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "sliding_window": None,
    },
    "dots1 raw, window, biases": {
        "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 29,
        "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2, "sliding_window": 6,
        "max_window_layers": 1, "attention_bias": True,
    },
    "glm4_moe": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 23,
        "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
    },
    "glm4_moe no norms, a quarter rotated": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 23,
        "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 13, "n_shared_experts": 2, "first_k_dense_replace": 0,
        "norm_topk_prob": False, "partial_rotary_factor": 0.25, "rope": {"rope_type": "yarn", **STRETCHED},
    },
    "hunyuan_v1_moe": {
        "hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 19,
        "num_experts": 6, "moe_topk": 3, "tie_word_embeddings": True, "rope": {"rope_type": "dynamic", "alpha": 90.0, "factor": 1.0},
    },
    "hunyuan_v1_moe biases": {
        "hidden_size": 26, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 21,
        "num_experts": 4, "moe_topk": [2, 2], "attention_bias": True,
    },
    "ernie4_5_moe": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 21, "moe_num_experts": 7, "moe_k": 3,
        "moe_intermediate_size": 11, "num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_interval": 2,
        "moe_num_shared_experts": 1, "moe_norm_min": 0.7,
    },
    "ernie4_5_moe nothing shared": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 21, "moe_num_experts": 4, "moe_k": 1,
        "moe_intermediate_size": 17, "moe_layer_start_index": 0, "moe_num_shared_experts": 0, "tie_word_embeddings": False,
    },
    "minimax_m2": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 14,
        "num_local_experts": 8, "num_experts_per_tok": 3, "partial_rotary_factor": 0.5,
    },
    "minimax_m2 whole heads": {
        "hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 22,
        "num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "hidden_size": 34, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 15,
        "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 2.0,
        "rope": {"rope_type": "yarn", **STRETCHED, "truncate": False},
    },
    "gpt_oss no attention biases, all full": {
        "hidden_size": 30, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 21,
        "num_local_experts": 4, "num_experts_per_tok": 1, "attention_bias": False, "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "phimoe": {
        "hidden_size": 33, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 15,
        "num_hidden_layers": 3, "num_local_experts": 7, "router_jitter_noise": 0.25, "attention_bias": True, "lm_head_bias": True,
        "rope": {
            "rope_type": "longrope", **STRETCHED, "short_mscale": 1.1, "long_mscale": 1.3,
            "short_factor": [1.0, 1.1, 1.2, 1.5, 1.9, 2.2], "long_factor": [1.1, 1.6, 2.3, 3.0, 3.8, 4.5],
        },
    },
    "phimoe plain, window": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 21, "num_local_experts": 2,
        "router_jitter_noise": 0.02, "sliding_window": 6, "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 23, "num_hidden_layers": 3, "kv_lora_rank": 18,
        "q_lora_rank": 11, "qk_nope_head_dim": 6, "qk_rope_head_dim": 10, "v_head_dim": 4, "n_routed_experts": 9,
        "num_experts_per_tok": 4, "moe_intermediate_size": 11, "n_shared_experts": 1, "topk_method": "group_limited_greedy", "n_group": 3,
        "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "rope": {"rope_type": "yarn", **STRETCHED, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v2 greedy, whole queries": {
        "hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 23, "kv_lora_rank": 10, "q_lora_rank": None,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 1,
        "moe_intermediate_size": 13, "n_shared_experts": 2,
    },
    "deepseek_v3": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 29, "num_hidden_layers": 3,
        "kv_lora_rank": 16, "q_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 10, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "rope": {"rope_type": "yarn", **STRETCHED, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3 halves, raw, whole queries": {
        "hidden_size": 27, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 29, "kv_lora_rank": 12,
        "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 0, "norm_topk_prob": False, "rope_interleave": False, "tie_word_embeddings": True,
    },
    "dbrx": {
        "d_model": 40, "n_heads": 4, "n_layers": 3, "num_hidden_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.25, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 13, "moe_num_experts": 7, "moe_top_k": 3, "moe_normalize_expert_weights": 1.0},
    },
    "dbrx weights as they are": {
        "d_model": 36, "n_heads": 6, "attn_config": {"kv_n_heads": 6, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 19, "moe_num_experts": 4, "moe_top_k": 1, "moe_normalize_expert_weights": None},
    },
    "llama4_text": {
        "hidden_size": 34, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 13,
        "intermediate_size_mlp": 29, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 7, "attn_temperature_tuning": False,
    },
    "llama4_text queries grow, two experts": {
        "hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 17,
        "num_local_experts": 3, "num_experts_per_tok": 2, "no_rope_layers": [0, 1], "attention_chunk_size": 5, "floor_scale": 4,
        "attn_scale": 0.4, "attention_bias": True, "tie_word_embeddings": True,
    },
    "llama4_text no norms, no chunks": {
        "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 21,
        "num_local_experts": 4, "num_experts_per_tok": 1, "no_rope_layers": [1, 1], "attention_chunk_size": None, "use_qk_norm": False,
        "rope": {"rope_type": "llama3", **STRETCHED, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    },
    "deepseek_v32": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 29, "num_hidden_layers": 3,
        "kv_lora_rank": 16, "q_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 10, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "index_topk": 6, "index_head_dim": 10, "index_n_heads": 9,
        "rope": {"rope_type": "yarn", **STRETCHED, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm_moe_dsa": {
        "hidden_size": 30, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 23, "num_hidden_layers": 3,
        "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 11, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 7, "index_head_dim": 8, "index_n_heads": 11,
        "indexer_types": ["full", "full", "shared"],
    },
    "llama linear": ROPE_SHAPE | {"rope": {"rope_type": "linear", "factor": 2.5}},
    "llama dynamic": ROPE_SHAPE | {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "llama yarn": ROPE_SHAPE | {
        "rope": {"rope_type": "yarn", **STRETCHED, "beta_fast": 2.0, "beta_slow": 0.3, "truncate": False, "attention_factor": 0.8},
    },
    "mistral longrope": ROPE_SHAPE | {
        "sliding_window": 20,
        "rope": {
            "rope_type": "longrope", **STRETCHED,
            "short_factor": [1.0, 1.1, 1.2, 1.5, 1.9, 2.2], "long_factor": [1.1, 1.6, 2.3, 3.0, 3.8, 4.5],
        },
    },
    "qwen3 llama3": ROPE_SHAPE | {"rope": {"rope_type": "llama3", **STRETCHED, "low_freq_factor": 0.3, "high_freq_factor": 2.0}},
}  # fmt: skip
"""Family and what is special, to the configuration."""
CASES = [(name, seed) for name in MODELS for seed in (0, 1)]
GRIDS = [(4, 4), (7, 5), (3, 11)]
LENGTHS = ((1,), (13,), (5, 18, 11))
EQUAL_LENGTHS = ((1,), (13,), (18, 18))
"""Where rotary frequencies follow the length, transformers goes by the longest sequence of the batch; where queries grow with their
position, it counts padding."""


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that made the golden files' answers."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("golden_oracle")


def written_by_transformers(directory: Path, name: str, seed: int, dtype: str, **options: Any) -> None:
    """Let transformers make and save a model whose attention and routing are far from uniform."""
    shape = dict(MODELS[name])
    rope = shape.pop("rope", {})
    if "full_attention" not in rope and not name.startswith("gemma3"):
        rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta", 10000.0)} | rope
    config = transformers.CONFIG_MAPPING[name.split()[0]](**BASE | shape | ({"rope_parameters": rope} if rope else {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(seed)
    corrections = [(name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for parameter, p in sorted([*model.named_parameters(), *corrections]):
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape))).float()
            if parameter.endswith("bias"):
                p.copy_((0.2 if "correction" in parameter else 0.5) * noise)
            elif parameter.endswith("sinks"):
                p.copy_(1 + noise)
            elif p.ndim == 1:
                p.copy_(1 + 0.3 * noise)
            elif "embed" in parameter:
                p.copy_(0.5 * noise)
            else:
                by_sigmoid = name.split()[0] in ("dots1", "glm4_moe", "minimax_m2", "llama4_text")
                gain = 2.0 if parameter.endswith(("gate.weight", "wg.weight", "router.weight")) and not by_sigmoid else 1.5
                p.copy_(gain * noise / p.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(directory, **options)


def assert_close(actual: NDArray[Any], expected: Any, what: str) -> None:
    expected = expected.double().numpy()
    assert actual.shape == expected.shape, what
    error, spread = np.abs(actual - expected).max(), expected.std()
    assert error <= TOLERANCE * spread, f"{what}: largest error {error:.2e}, standard deviation {spread:.2e}"


def consult_fairly(oracle: ModuleType, model: Any, lengths: tuple[int, ...], seed: int, padding: int = 0) -> tuple[Any, Any, Any]:
    """Ids, mask and the oracle's answer for prompts of these lengths, padded on the left, where nothing is chosen by a hair."""
    mask = torch.zeros((len(lengths), max(lengths) + padding), dtype=torch.int64)
    for row, n in zip(mask, lengths, strict=True):
        row[len(row) - n :] = 1
    rng = np.random.default_rng(100 + seed)
    for _ in range(1000):
        ids = torch.from_numpy(rng.integers(0, BASE["vocab_size"], tuple(mask.shape))) * mask
        answer = oracle.consult(model, ids, mask, new_tokens=NEW_TOKENS)
        try:
            answer.check_margins()
        except oracle.TooCloseError:
            continue
        return ids, mask, answer
    raise AssertionError("no prompt leaves the margins: the model's routing is degenerate")


def test_every_family_and_every_rotary_scaling_is_compared() -> None:
    assert {name.split()[0] for name in MODELS} == set(FAMILIES)
    assert {shape["rope"].get("rope_type", "linear") for shape in MODELS.values() if "rope" in shape} == set(ROPE_KINDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_forward_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, oracle: ModuleType, name: str, seed: int, dtype: str) -> None:
    written_by_transformers(tmp_path / "model", name, seed, dtype)
    oracle_model = oracle.load(tmp_path / "model")
    rows, cols = GRIDS[(seed + len(name)) % len(GRIDS)]
    model = wse.from_pretrained(tmp_path / "model", wafer=wse.Wafer(wse.WSE3, rows=rows, cols=cols), cache_dir=tmp_path)
    scaling = model.spec.rope_scaling
    follows, grows = scaling is not None and scaling.follows_length, model.spec.query_temperature is not None
    equal = follows or grows
    for lengths in EQUAL_LENGTHS if equal else LENGTHS:
        ids, mask, expected = consult_fairly(oracle, oracle_model, lengths, seed, padding=2 if follows else 0)
        real, what = mask.bool(), f"lengths {lengths}"
        here = real.numpy()
        is_moe = expected.router_logits is not None
        assert is_moe == model.spec.is_moe
        out = model(ids.numpy(), attention_mask=mask.numpy(), output_hidden_states=True, output_router_logits=is_moe)
        if is_moe:
            assert len(out.router_logits) == len(expected.router_logits)
            for i, router in enumerate(expected.router_logits):
                assert_close(out.router_logits[i][here], router[real], f"{what}: logits of router {i}")
                np.testing.assert_array_equal(out.topk_ids[i][here], expected.topk_ids[i][real].numpy(), err_msg=f"{what}: router {i}")
                weights = np.abs(out.topk_weights[i][here] - expected.topk_weights[i][real].numpy())
                assert weights.max() <= TOLERANCE, f"{what}: weights of router {i}"
        for i, hidden in enumerate(expected.hidden):
            assert_close(out.hidden_states[i][here], hidden[real], f"{what}: hidden state {i}")
        assert_close(out.logits[here], expected.logits[real], f"{what}: logits")
        actual = model.generate(ids.numpy(), max_new_tokens=NEW_TOKENS, attention_mask=mask.numpy())
        np.testing.assert_array_equal(actual, expected.generated.numpy(), err_msg=what)


@pytest.mark.parametrize("name", ["mixtral uneven heads", "qwen3_moe mixed"])
def test_a_grid_of_one_core_is_enough(tmp_path: Path, oracle: ModuleType, name: str) -> None:
    written_by_transformers(tmp_path / "model", name, 3, "float32")
    ids, _, expected = consult_fairly(oracle, oracle.load(tmp_path / "model"), (13,), 3)
    one = wse.Wafer(dataclasses.replace(wse.WSE3, sram_bytes_per_core=1 << 24), rows=1, cols=1)
    model = wse.from_pretrained(tmp_path / "model", wafer=one, cache_dir=tmp_path)
    assert_close(model(ids.numpy()).logits, expected.logits, "logits")
    np.testing.assert_array_equal(model.generate(ids.numpy(), max_new_tokens=NEW_TOKENS), expected.generated.numpy())


@pytest.mark.parametrize("name", ["mixtral uneven heads", "qwen3_moe normalized", "qwen3_moe mixed"])
def test_fused_experts_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    written_by_transformers(tmp_path / "fused", name, 0, "float32", save_original_format=False)
    with pytest.raises(wse.CheckpointError, match=r"experts are fused in this file.*save_original_format=True"):
        wse.from_pretrained(tmp_path / "fused", cache_dir=tmp_path)
    written_by_transformers(tmp_path / "way out", name, 0, "float32", save_original_format=True)
    wse.from_pretrained(tmp_path / "way out", cache_dir=tmp_path).close()

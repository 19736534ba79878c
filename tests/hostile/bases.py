"""Small valid checkpoints, one of each kind of directory, for others to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import wse_emu as wse
from wse_emu.checkpoint import random_checkpoint
from wse_emu.testing import write_checkpoint

IDS = [3, 14, 15, 9, 2]
PROMPT = "w3 w14 w15 w9 w2"
_COMMON: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": 1,
    "bos_token_id": 0, "pad_token_id": None, "initializer_range": 0.4, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "float32",
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, **_MOE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4},
    "llama": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "qwen3_moe": {
        **_COMMON, **_MOE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0],
        "decoder_sparse_step": 1, "moe_intermediate_size": 12, "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    },
    "mistral": {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 3},
}  # fmt: skip
_STORED: dict[str, tuple[Any, int]] = {
    "mixtral": ("bfloat16", 2), "llama": ("float32", 1), "qwen3_moe": ("float32", 2), "mistral": ("float16", 1),
}  # fmt: skip
"""Type of the weights, and in how many files."""


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of words ``w0`` to ``w59``."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(60)}, "unk_token": "w59"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 0, "content": "w0", **special}], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))


def write_base(kind: str, directory: Path) -> Path:
    """The checkpoint of this kind, complete: weights, tokenizer, generation_config.json."""
    dtype, n_shards = _STORED[kind]
    write_checkpoint(random_checkpoint(CONFIGS[kind], seed=3), directory, dtype=dtype, n_shards=n_shards)
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": False}))
    return directory


def small_wafer() -> wse.Wafer:
    """The one grid of all cases, so that nothing is compiled again."""
    return wse.Wafer(rows=2, cols=2)

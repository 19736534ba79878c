"""Which checkpoints the golden files are made of: their config.json, random weights under released names, and the prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Config = dict[str, Any]

NEW_TOKENS = 12
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
    "attn_logit_softcapping": None, "tie_word_embeddings": True, "rope_theta": 1e5,
}  # fmt: skip
GEMMA2 = GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA3 = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_local_base_freq": 50.0,
    "final_logit_softcapping": None,
}  # fmt: skip
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
}  # fmt: skip
"""Directory under tests/golden to config.json."""


def follows_length(config: Config) -> bool:
    """Whether rotary frequencies depend on how long the sequence is."""
    return (config.get("rope_scaling") or {}).get("rope_type") in ("dynamic", "longrope")


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    if config["model_type"] in ("mixtral", "olmoe", "granitemoe"):
        return True
    if config["model_type"] not in ("qwen3_moe", "qwen2_moe"):
        return False
    return layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0


def has_normed_heads(config: Config) -> bool:
    """Whether queries and keys are normalised."""
    return config["model_type"] in ("qwen3", "qwen3_moe", "olmoe", "gemma3_text")


def random_tensors(config: Config, seed: int) -> dict[str, Tensor]:
    """Tensors under the names of released checkpoints, in the dtype that `config` states.

    Drawn by NumPy, rounded to the stored dtype, and scaled so that neither attention nor routing is near uniform and every constant counts.
    """
    rng = np.random.default_rng(seed)
    h, d = config["hidden_size"], config["head_dim"]
    n_q, n_kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    family = config["model_type"]
    normed, gemma = has_normed_heads(config), family.startswith("gemma")
    over_row = family == "olmoe"
    tensors: dict[str, NDArray[np.float64]] = {}

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        tensors[name] = rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)

    def norm(name: str, size: int, middle: float = 1.0) -> None:
        tensors[name] = middle * (1 + 0.3 * rng.standard_normal(size)) - (1 if gemma else 0)

    def bias(name: str, size: int) -> None:
        tensors[name] = 0.5 * rng.standard_normal(size)

    def granite_experts(prefix: str, n: int, width: int) -> None:
        tensors[prefix + "input_linear.weight"] = rng.standard_normal((n, 2 * width, h)) * 1.5 / np.sqrt(h)
        tensors[prefix + "output_linear.weight"] = rng.standard_normal((n, h, width)) / np.sqrt(width)

    def ffn(prefix: str, gate: str, up: str, down: str, width: int) -> None:
        matrix(f"{prefix}{gate}.weight", width, h, 1.5)
        matrix(f"{prefix}{up}.weight", width, h, 1.5)
        matrix(f"{prefix}{down}.weight", h, width)

    tensors["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], h)) * 0.3
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        norm(p + "input_layernorm.weight", h)
        matrix(p + "self_attn.q_proj.weight", n_q, h, 0.3 if normed else 1.5)
        matrix(p + "self_attn.k_proj.weight", n_kv, h, 0.3 if normed else 1.5)
        matrix(p + "self_attn.v_proj.weight", n_kv, h)
        if normed:  # what is small before the norm shows its epsilon
            norm(p + "self_attn.q_norm.weight", n_q if over_row else d, 1.5)
            norm(p + "self_attn.k_norm.weight", n_kv if over_row else d, 1.5)
        if family == "qwen2_moe":
            for x, size in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                bias(f"{p}self_attn.{x}_proj.bias", size)
        matrix(p + "self_attn.o_proj.weight", h, n_q)
        norm(p + "post_attention_layernorm.weight", h)
        if gemma:
            norm(p + "pre_feedforward_layernorm.weight", h)
            norm(p + "post_feedforward_layernorm.weight", h)
        if not is_sparse(config, i):
            ffn(p + "mlp.", "gate_proj", "up_proj", "down_proj", config["intermediate_size"])
        elif config["model_type"] == "mixtral":
            matrix(p + "block_sparse_moe.gate.weight", config["num_local_experts"], h, 2.0)
            for e in range(config["num_local_experts"]):
                ffn(f"{p}block_sparse_moe.experts.{e}.", "w1", "w3", "w2", config["intermediate_size"])
        elif family == "granitemoe":
            matrix(p + "block_sparse_moe.router.layer.weight", config["num_local_experts"], h, 2.0)
            granite_experts(p + "block_sparse_moe.", config["num_local_experts"], config["intermediate_size"])
        else:
            matrix(p + "mlp.gate.weight", config["num_experts"], h, 2.0)
            for e in range(config["num_experts"]):
                width = config.get("moe_intermediate_size", config["intermediate_size"])
                ffn(f"{p}mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj", width)
            if family == "qwen2_moe":
                ffn(p + "mlp.shared_expert.", "gate_proj", "up_proj", "down_proj", config["shared_expert_intermediate_size"])
                matrix(p + "mlp.shared_expert_gate.weight", 1, h)
    norm("model.norm.weight", h)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], h)
    dtype = STORED[config["torch_dtype"]]
    return {name: torch.from_numpy(a).to(torch.float32).to(dtype).contiguous() for name, a in tensors.items()}


def prompts(config: Config, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Case to (input_ids, attention_mask): ``t1``, ``t17``, ``t96``, one sequence of that many tokens, and ``padded``, two of 21 and 8.

    Where frequencies follow the length, both of ``padded`` fill the original context to the last token instead, with padding beyond it: in
    transformers the longest sequence of a batch decides for all.
    """
    rng = np.random.default_rng(1000 + seed)
    cases = {}
    for t in (1, 17, 96):
        ids = torch.from_numpy(rng.integers(0, config["vocab_size"], (1, t)))
        cases[f"t{t}"] = (ids, torch.ones_like(ids))
    lengths = (ORIGINAL, ORIGINAL) if follows_length(config) else (21, 8)
    ids = torch.from_numpy(rng.integers(0, config["vocab_size"], (2, 27 if follows_length(config) else 21)))
    mask = torch.zeros_like(ids)
    for row, n in zip(mask, lengths, strict=True):
        row[len(row) - n :] = 1
    cases["padded"] = (ids * mask, mask)
    return cases

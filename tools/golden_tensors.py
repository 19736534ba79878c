"""What the golden files are made from: random weights under released names, and prompts."""

from __future__ import annotations

import numpy as np
import torch
from golden_models import (
    ORIGINAL,
    Config,
    by_sigmoid,
    expert_width,
    follows_length,
    has_norm_bias,
    has_normed_heads,
    has_output_bias,
    is_biased,
    is_latent,
    is_llama4,
    is_sparse,
    n_experts,
    normed_over_row,
    runs_indexer,
    shared_width,
)
from numpy.typing import NDArray
from torch import Tensor

NEW_TOKENS = 12
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROJECTIONS, W123 = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
HEAD_NORMS = {"hunyuan_v1_moe": ("query_layernorm", "key_layernorm")}
ROUTERS = {
    "mixtral": "block_sparse_moe.gate.weight",
    "minimax_m2": "block_sparse_moe.gate.weight",
    "phimoe": "block_sparse_moe.gate.weight",
    "granitemoe": "block_sparse_moe.router.layer.weight",
    "hunyuan_v1_moe": "mlp.gate.wg.weight",
    "gpt_oss": "mlp.router.weight",
    "llama4_text": "feed_forward.router.weight",
}
CORRECTIONS: dict[str, tuple[str, tuple[int, ...]]] = {
    "dots1": ("mlp.gate.e_score_correction_bias", ()),
    "glm4_moe": ("mlp.gate.e_score_correction_bias", ()),
    "ernie4_5_moe": ("mlp.moe_statics.e_score_correction_bias", (1,)),
    "minimax_m2": ("block_sparse_moe.e_score_correction_bias", ()),
    "deepseek_v3": ("mlp.gate.e_score_correction_bias", ()),
    "deepseek_v32": ("mlp.gate.e_score_correction_bias", ()),
    "glm_moe_dsa": ("mlp.gate.e_score_correction_bias", ()),
}
"""Name, and axes in front of the experts'."""
SHARED = {
    "qwen2_moe": "mlp.shared_expert.",
    "dots1": "mlp.shared_experts.",
    "glm4_moe": "mlp.shared_experts.",
    "ernie4_5_moe": "mlp.shared_experts.",
    "hunyuan_v1_moe": "mlp.shared_mlp.",
    "deepseek_v2": "mlp.shared_experts.",
    "deepseek_v3": "mlp.shared_experts.",
    "llama4_text": "feed_forward.shared_expert.",
    "deepseek_v32": "mlp.shared_experts.",
    "glm_moe_dsa": "mlp.shared_experts.",
}


def random_tensors(config: Config, seed: int) -> dict[str, Tensor]:
    """Tensors under the names of released checkpoints, in the dtype that `config` states.

    Drawn by NumPy, rounded to the stored dtype, and scaled so that neither attention nor routing is near uniform and every constant counts.
    """
    rng = np.random.default_rng(seed)
    h, d = config["hidden_size"], config["head_dim"]
    n_q, n_kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    family = config["model_type"]
    normed, gemma = has_normed_heads(config), family.startswith("gemma")
    small = normed or is_llama4(config)  # what is small before the norm shows its epsilon
    over_row = normed_over_row(config)
    tensors: dict[str, NDArray[np.float64]] = {}
    packed: dict[str, NDArray[np.uint8]] = {}

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        tensors[name] = rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)

    def norm(name: str, size: int, middle: float = 1.0) -> None:
        tensors[name] = middle * (1 + 0.3 * rng.standard_normal(size)) - (1 if gemma else 0)

    def residual_norm(name: str) -> None:
        norm(name + ".weight", h)
        if has_norm_bias(config):
            tensors[name + ".bias"] = 0.3 * rng.standard_normal(h)

    def bias(name: str, size: int, gain: float) -> None:
        tensors[name] = gain * rng.standard_normal(size)

    def granite_experts(prefix: str, n: int, width: int) -> None:
        tensors[prefix + "input_linear.weight"] = rng.standard_normal((n, 2 * width, h)) * 1.5 / np.sqrt(h)
        tensors[prefix + "output_linear.weight"] = rng.standard_normal((n, h, width)) / np.sqrt(width)

    def llama4_experts(prefix: str, n: int, width: int) -> None:
        tensors[prefix + "gate_up_proj"] = rng.standard_normal((n, h, 2 * width)) * 1.5 / np.sqrt(h)
        tensors[prefix + "down_proj"] = rng.standard_normal((n, width, h)) * 1.5 / np.sqrt(width)

    def mxfp4(name: str, n: int, n_out: int, n_in: int, middle: int) -> None:
        packed[name + "_blocks"] = rng.integers(0, 256, (n, n_out, n_in // 32, 16), np.uint8)
        packed[name + "_scales"] = rng.integers(middle - 2, middle + 2, (n, n_out, n_in // 32), np.uint8)

    def gpt_oss_experts(prefix: str, n: int, width: int) -> None:
        if "quantization_config" in config:
            mxfp4(prefix + "gate_up_proj", n, 2 * width, h, 124)
            mxfp4(prefix + "down_proj", n, h, width, 123)
            tensors[prefix + "gate_up_proj_bias"] = rng.standard_normal((n, 2 * width)) * 0.5
            tensors[prefix + "down_proj_bias"] = rng.standard_normal((n, h)) * 0.5
            return
        tensors[prefix + "gate_up_proj"] = rng.standard_normal((n, h, 2 * width)) * 1.5 / np.sqrt(h)
        tensors[prefix + "gate_up_proj_bias"] = rng.standard_normal((n, 2 * width)) * 0.5
        tensors[prefix + "down_proj"] = rng.standard_normal((n, width, h)) / np.sqrt(width)
        tensors[prefix + "down_proj_bias"] = rng.standard_normal((n, h)) * 0.5

    def ffn(prefix: str, gate: str, up: str, down: str, width: int) -> None:
        matrix(f"{prefix}{gate}.weight", width, h, 1.5)
        matrix(f"{prefix}{up}.weight", width, h, 1.5)
        matrix(f"{prefix}{down}.weight", h, width)

    def latent_attention(prefix: str) -> None:
        heads, rank, short = config["num_attention_heads"], config["kv_lora_rank"], config["q_lora_rank"]
        nope, of_value = config["qk_nope_head_dim"], config["v_head_dim"]
        if short is None:
            matrix(prefix + "q_proj.weight", heads * (nope + d), h, 1.5)
        else:  # what is small before the norm shows its epsilon
            matrix(prefix + "q_a_proj.weight", short, h, 0.1)
            norm(prefix + "q_a_layernorm.weight", short)
            matrix(prefix + "q_b_proj.weight", heads * (nope + d), short, 1.5)
        matrix(prefix + "kv_a_proj_with_mqa.weight", rank + d, h, 1.5)
        tensors[prefix + "kv_a_proj_with_mqa.weight"][:rank] *= 0.1
        norm(prefix + "kv_a_layernorm.weight", rank)
        matrix(prefix + "kv_b_proj.weight", heads * (nope + of_value), rank, 1.5)
        matrix(prefix + "o_proj.weight", h, heads * of_value)

    def indexer(prefix: str) -> None:
        n, size = config["index_n_heads"], config["index_head_dim"]
        matrix(prefix + "wq_b.weight", n * size, config["q_lora_rank"], 1.5)
        matrix(prefix + "wk.weight", size, h, 0.1)
        norm(prefix + "k_norm.weight", size)
        bias(prefix + "k_norm.bias", size, 0.3)
        matrix(prefix + "weights_proj.weight", n, h)

    def usual_attention(p: str) -> None:
        matrix(p + "self_attn.q_proj.weight", n_q, h, 0.3 if small else 1.5)
        matrix(p + "self_attn.k_proj.weight", n_kv, h, 0.3 if small else 1.5)
        matrix(p + "self_attn.v_proj.weight", n_kv, h)
        if normed:
            q_norm, k_norm = HEAD_NORMS.get(family, ("q_norm", "k_norm"))
            norm(f"{p}self_attn.{q_norm}.weight", n_q if over_row else d, 1.5)
            norm(f"{p}self_attn.{k_norm}.weight", n_kv if over_row else d, 1.5)
        if is_biased(config):
            for x, size in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                bias(f"{p}self_attn.{x}_proj.bias", size, 0.15 if normed else 0.5)
        matrix(p + "self_attn.o_proj.weight", h, n_q)
        if has_output_bias(config):
            bias(p + "self_attn.o_proj.bias", h, 0.5)
        if family == "gpt_oss":
            tensors[p + "self_attn.sinks"] = 1 + rng.standard_normal(config["num_attention_heads"])

    if family == "dbrx":
        return _dbrx_tensors(config, rng)
    tensors["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], h)) * 0.3
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        residual_norm(p + "input_layernorm")
        if is_latent(config):
            latent_attention(p + "self_attn.")
            if runs_indexer(config, i):
                indexer(p + "self_attn.indexer.")
        else:
            usual_attention(p)
        residual_norm(p + "post_attention_layernorm")
        if gemma:
            norm(p + "pre_feedforward_layernorm.weight", h)
            norm(p + "post_feedforward_layernorm.weight", h)
        if not is_sparse(config, i):
            network, width = ("feed_forward.", "intermediate_size_mlp") if is_llama4(config) else ("mlp.", "intermediate_size")
            ffn(p + network, *PROJECTIONS, config[width])
            continue
        matrix(p + ROUTERS.get(family, "mlp.gate.weight"), n_experts(config), h, 1.0 if by_sigmoid(config) else 2.0)
        if family in CORRECTIONS:
            name, axes = CORRECTIONS[family]
            tensors[p + name] = 0.2 * rng.standard_normal((*axes, n_experts(config)))
        if family == "gpt_oss":
            bias(p + "mlp.router.bias", n_experts(config), 0.5)
            gpt_oss_experts(p + "mlp.experts.", n_experts(config), expert_width(config))
        elif is_llama4(config):
            llama4_experts(p + "feed_forward.experts.", n_experts(config), expert_width(config))
        elif family == "granitemoe":
            granite_experts(p + "block_sparse_moe.", n_experts(config), expert_width(config))
        else:
            experts, matrices = ("block_sparse_moe", W123) if family in ("mixtral", "minimax_m2", "phimoe") else ("mlp", PROJECTIONS)
            for e in range(n_experts(config)):
                ffn(f"{p}{experts}.experts.{e}.", *matrices, expert_width(config))
        if family in SHARED:
            ffn(p + SHARED[family], *PROJECTIONS, shared_width(config))
        if family == "qwen2_moe":
            matrix(p + "mlp.shared_expert_gate.weight", 1, h)
    residual_norm("model.norm")
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], h)
    if config.get("lm_head_bias", False):
        bias("lm_head.bias", config["vocab_size"], 0.5)
    dtype = STORED[config["torch_dtype"]]
    plain = {name: torch.from_numpy(a).to(torch.float32).to(dtype).contiguous() for name, a in tensors.items()}
    return plain | {name: torch.from_numpy(a) for name, a in packed.items()}


def _dbrx_tensors(config: Config, rng: np.random.Generator) -> dict[str, Tensor]:
    """The same for DBRX; the residual stream is kept small, or its norms' constant epsilon would not show."""
    h, v, n, f = config["hidden_size"], config["vocab_size"], config["num_local_experts"], config["intermediate_size"]
    n_qkv = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"]
    shapes = {"transformer.wte.weight": ((v, h), 0.03)}
    for i in range(config["num_hidden_layers"]):
        p = f"transformer.blocks.{i}."
        shapes |= {
            p + "norm_attn_norm.norm_1.weight": ((h,), 0.3), p + "norm_attn_norm.attn.Wqkv.weight": ((n_qkv, h), 1.3 * h**-0.5),
            p + "norm_attn_norm.attn.out_proj.weight": ((h, h), 0.05 * h**-0.5), p + "norm_attn_norm.norm_2.weight": ((h,), 0.3),
            p + "ffn.router.layer.weight": ((n, h), 2 * h**-0.5), p + "ffn.experts.mlp.w1": ((n * f, h), 1.5 * h**-0.5),
            p + "ffn.experts.mlp.v1": ((n * f, h), 1.5 * h**-0.5), p + "ffn.experts.mlp.w2": ((n * f, h), 0.05 * f**-0.5),
        }  # fmt: skip
    shapes |= {"transformer.norm_f.weight": ((h,), 0.3), "lm_head.weight": ((v, h), h**-0.5)}
    dtype = STORED[config["torch_dtype"]]
    values = {name: (len(shape) == 1) + gain * rng.standard_normal(shape) for name, (shape, gain) in shapes.items()}
    return {name: torch.from_numpy(a).to(torch.float32).to(dtype).contiguous() for name, a in values.items()}


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

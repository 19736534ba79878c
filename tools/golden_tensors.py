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
    is_fp8,
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
FP8_TOP = 320.0
"""A number of eight bits (e4m3), below the largest of them."""
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
    if config["model_type"] == "dbrx":
        return _dbrx_tensors(config, rng)
    draw = _Drawing(config, rng)
    draw.tensors["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], draw.h)) * 0.3
    for i in range(config["num_hidden_layers"]):
        draw.layer(i)
    draw.residual_norm("model.norm")
    if not config["tie_word_embeddings"]:
        draw.matrix("lm_head.weight", config["vocab_size"], draw.h)
    if config.get("lm_head_bias", False):
        draw.bias("lm_head.bias", config["vocab_size"], 0.5)
    dtype = STORED[config["torch_dtype"]]
    plain = {name: torch.from_numpy(a).to(torch.float32).to(dtype).contiguous() for name, a in draw.tensors.items()}
    packed = {name: torch.from_numpy(a) for name, a in draw.packed.items()}
    return (_in_fp8(plain, config["quantization_config"]["weight_block_size"]) if is_fp8(config) else plain) | packed


def _in_fp8(plain: dict[str, Tensor], block: list[int]) -> dict[str, Tensor]:
    """Projections as codes of eight bits, the largest number of every block `FP8_TOP`, and their scales."""
    tensors = {}
    for name, weight in plain.items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        rows, cols = (n // b for n, b in zip(weight.shape, block, strict=True))
        blocks = weight.to(torch.float32).reshape(rows, block[0], cols, block[1])
        scales = blocks.abs().amax((1, 3)) / FP8_TOP
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors |= {name: codes.reshape(weight.shape), name + "_scale_inv": scales}
    return tensors


class _Drawing:
    """Tensors of one configuration, drawn one after another; a prefix names the part of the model that a method draws."""

    def __init__(self, config: Config, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.h, self.d = config["hidden_size"], config["head_dim"]
        self.n_q, self.n_kv = config["num_attention_heads"] * self.d, config["num_key_value_heads"] * self.d
        self.family: str = config["model_type"]
        self.normed, self.gemma = has_normed_heads(config), self.family.startswith("gemma")
        self.small = self.normed or is_llama4(config)  # what is small before the norm shows its epsilon
        self.over_row = normed_over_row(config)
        self.tensors: dict[str, NDArray[np.float64]] = {}
        self.packed: dict[str, NDArray[np.uint8]] = {}

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        self.tensors[name] = self.rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)

    def norm(self, name: str, size: int, middle: float = 1.0) -> None:
        self.tensors[name] = middle * (1 + 0.3 * self.rng.standard_normal(size)) - (1 if self.gemma else 0)

    def residual_norm(self, name: str) -> None:
        self.norm(name + ".weight", self.h)
        if has_norm_bias(self.config):
            self.tensors[name + ".bias"] = 0.3 * self.rng.standard_normal(self.h)

    def bias(self, name: str, size: int, gain: float) -> None:
        self.tensors[name] = gain * self.rng.standard_normal(size)

    def granite_experts(self, prefix: str, n: int, width: int) -> None:
        self.tensors[prefix + "input_linear.weight"] = self.rng.standard_normal((n, 2 * width, self.h)) * 1.5 / np.sqrt(self.h)
        self.tensors[prefix + "output_linear.weight"] = self.rng.standard_normal((n, self.h, width)) / np.sqrt(width)

    def llama4_experts(self, prefix: str, n: int, width: int) -> None:
        self.tensors[prefix + "gate_up_proj"] = self.rng.standard_normal((n, self.h, 2 * width)) * 1.5 / np.sqrt(self.h)
        self.tensors[prefix + "down_proj"] = self.rng.standard_normal((n, width, self.h)) * 1.5 / np.sqrt(width)

    def mxfp4(self, name: str, n: int, n_out: int, n_in: int, middle: int) -> None:
        self.packed[name + "_blocks"] = self.rng.integers(0, 256, (n, n_out, n_in // 32, 16), np.uint8)
        self.packed[name + "_scales"] = self.rng.integers(middle - 2, middle + 2, (n, n_out, n_in // 32), np.uint8)

    def gpt_oss_experts(self, prefix: str, n: int, width: int) -> None:
        if "quantization_config" in self.config:
            self.mxfp4(prefix + "gate_up_proj", n, 2 * width, self.h, 124)
            self.mxfp4(prefix + "down_proj", n, self.h, width, 123)
            self.tensors[prefix + "gate_up_proj_bias"] = self.rng.standard_normal((n, 2 * width)) * 0.5
            self.tensors[prefix + "down_proj_bias"] = self.rng.standard_normal((n, self.h)) * 0.5
            return
        self.tensors[prefix + "gate_up_proj"] = self.rng.standard_normal((n, self.h, 2 * width)) * 1.5 / np.sqrt(self.h)
        self.tensors[prefix + "gate_up_proj_bias"] = self.rng.standard_normal((n, 2 * width)) * 0.5
        self.tensors[prefix + "down_proj"] = self.rng.standard_normal((n, width, self.h)) / np.sqrt(width)
        self.tensors[prefix + "down_proj_bias"] = self.rng.standard_normal((n, self.h)) * 0.5

    def ffn(self, prefix: str, gate: str, up: str, down: str, width: int) -> None:
        self.matrix(f"{prefix}{gate}.weight", width, self.h, 1.5)
        self.matrix(f"{prefix}{up}.weight", width, self.h, 1.5)
        self.matrix(f"{prefix}{down}.weight", self.h, width)

    def latent_attention(self, prefix: str) -> None:
        heads, rank, short = self.config["num_attention_heads"], self.config["kv_lora_rank"], self.config["q_lora_rank"]
        nope, of_value = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        if short is None:
            self.matrix(prefix + "q_proj.weight", heads * (nope + self.d), self.h, 1.5)
        else:  # what is self.small before the norm shows its epsilon
            self.matrix(prefix + "q_a_proj.weight", short, self.h, 0.1)
            self.norm(prefix + "q_a_layernorm.weight", short)
            self.matrix(prefix + "q_b_proj.weight", heads * (nope + self.d), short, 1.5)
        self.matrix(prefix + "kv_a_proj_with_mqa.weight", rank + self.d, self.h, 1.5)
        self.tensors[prefix + "kv_a_proj_with_mqa.weight"][:rank] *= 0.1
        self.norm(prefix + "kv_a_layernorm.weight", rank)
        self.matrix(prefix + "kv_b_proj.weight", heads * (nope + of_value), rank, 1.5)
        self.matrix(prefix + "o_proj.weight", self.h, heads * of_value)

    def indexer(self, prefix: str) -> None:
        n, size = self.config["index_n_heads"], self.config["index_head_dim"]
        self.matrix(prefix + "wq_b.weight", n * size, self.config["q_lora_rank"], 1.5)
        self.matrix(prefix + "wk.weight", size, self.h, 0.1)
        self.norm(prefix + "k_norm.weight", size)
        self.bias(prefix + "k_norm.bias", size, 0.3)
        self.matrix(prefix + "weights_proj.weight", n, self.h)

    def usual_attention(self, p: str) -> None:
        self.matrix(p + "self_attn.q_proj.weight", self.n_q, self.h, 0.3 if self.small else 1.5)
        self.matrix(p + "self_attn.k_proj.weight", self.n_kv, self.h, 0.3 if self.small else 1.5)
        self.matrix(p + "self_attn.v_proj.weight", self.n_kv, self.h)
        if self.normed:
            q_norm, k_norm = HEAD_NORMS.get(self.family, ("q_norm", "k_norm"))
            self.norm(f"{p}self_attn.{q_norm}.weight", self.n_q if self.over_row else self.d, 1.5)
            self.norm(f"{p}self_attn.{k_norm}.weight", self.n_kv if self.over_row else self.d, 1.5)
        if is_biased(self.config):
            for x, size in (("q", self.n_q), ("k", self.n_kv), ("v", self.n_kv)):
                self.bias(f"{p}self_attn.{x}_proj.bias", size, 0.15 if self.normed else 0.5)
        self.matrix(p + "self_attn.o_proj.weight", self.h, self.n_q)
        if has_output_bias(self.config):
            self.bias(p + "self_attn.o_proj.bias", self.h, 0.5)
        if self.family == "gpt_oss":
            self.tensors[p + "self_attn.sinks"] = 1 + self.rng.standard_normal(self.config["num_attention_heads"])

    def layer(self, i: int) -> None:
        p = f"model.layers.{i}."
        self.residual_norm(p + "input_layernorm")
        if is_latent(self.config):
            self.latent_attention(p + "self_attn.")
            if runs_indexer(self.config, i):
                self.indexer(p + "self_attn.indexer.")
        else:
            self.usual_attention(p)
        self.residual_norm(p + "post_attention_layernorm")
        if self.gemma:
            self.norm(p + "pre_feedforward_layernorm.weight", self.h)
            self.norm(p + "post_feedforward_layernorm.weight", self.h)
        if not is_sparse(self.config, i):
            network, width = ("feed_forward.", "intermediate_size_mlp") if is_llama4(self.config) else ("mlp.", "intermediate_size")
            self.ffn(p + network, *PROJECTIONS, self.config[width])
            return
        self.mixture(p)

    def mixture(self, p: str) -> None:
        gain = 1.0 if by_sigmoid(self.config) else 2.0
        self.matrix(p + ROUTERS.get(self.family, "mlp.gate.weight"), n_experts(self.config), self.h, gain)
        if self.family in CORRECTIONS:
            name, axes = CORRECTIONS[self.family]
            self.tensors[p + name] = 0.2 * self.rng.standard_normal((*axes, n_experts(self.config)))
        if self.family == "gpt_oss":
            self.bias(p + "mlp.router.bias", n_experts(self.config), 0.5)
            self.gpt_oss_experts(p + "mlp.experts.", n_experts(self.config), expert_width(self.config))
        elif is_llama4(self.config):
            self.llama4_experts(p + "feed_forward.experts.", n_experts(self.config), expert_width(self.config))
        elif self.family == "granitemoe":
            self.granite_experts(p + "block_sparse_moe.", n_experts(self.config), expert_width(self.config))
        else:
            experts, matrices = ("block_sparse_moe", W123) if self.family in ("mixtral", "minimax_m2", "phimoe") else ("mlp", PROJECTIONS)
            for e in range(n_experts(self.config)):
                self.ffn(f"{p}{experts}.experts.{e}.", *matrices, expert_width(self.config))
        if self.family in SHARED:
            self.ffn(p + SHARED[self.family], *PROJECTIONS, shared_width(self.config))
        if self.family == "qwen2_moe":
            self.matrix(p + "mlp.shared_expert_gate.weight", 1, self.h)


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

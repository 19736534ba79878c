"""Published (Hugging Face) names and shapes of the tensors that the reference reads, and where a role lies in a larger tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.model_spec import ModelSpec

Expert = int | Literal["shared"] | None


@dataclass(frozen=True, slots=True)
class Published:
    """One published tensor: its name and shape, ``(out, in)`` or ``(n,)``; or what `pick` takes of a larger one."""

    name: str
    shape: tuple[int, ...]
    whole: tuple[int, ...] | None = None
    """Shape of the larger one."""
    pick: Callable[[NDArray[Any]], NDArray[Any]] | None = None


def embed_tokens(spec: ModelSpec) -> Published:
    """Token embedding, (vocab, hidden)."""
    name = "transformer.wte.weight" if spec.family == "dbrx" else "model.embed_tokens.weight"
    return Published(name, (spec.vocab_size, spec.hidden_size))


def memory_embedding(spec: ModelSpec) -> Published:
    """Embedding of memory tokens, (1, hidden)."""
    return Published("model.memory_token_embedding.weight", (1, spec.hidden_size))


def final_norm(spec: ModelSpec) -> Published:
    """Weight of the last norm, (hidden,)."""
    return Published("transformer.norm_f.weight" if spec.family == "dbrx" else "model.norm.weight", (spec.hidden_size,))


def final_norm_bias(spec: ModelSpec) -> Published:
    """Bias of the last norm, (hidden,)."""
    return Published("model.norm.bias", (spec.hidden_size,))


def lm_head_bias(spec: ModelSpec) -> Published:
    """Bias of the output projection, (vocab,)."""
    return Published("lm_head.bias", (spec.vocab_size,))


def lm_head(spec: ModelSpec) -> Published:
    """Output projection, (vocab, hidden): the embedding itself where the two are tied."""
    return embed_tokens(spec) if spec.tie_word_embeddings else Published("lm_head.weight", embed_tokens(spec).shape)


_GEMMA = {
    "attn_after_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_after_norm": "post_feedforward_layernorm.weight",
}
_OTHER_NAMES: dict[str, dict[str, str]] = {
    "mixtral": {
        "router": "block_sparse_moe.gate.weight",
        "router_bias": "block_sparse_moe.gate.bias",
        "e_score_correction_bias": "block_sparse_moe.gate.e_score_correction_bias",
    },
    "granitemoe": {"router": "block_sparse_moe.router.layer.weight"},
    "qwen2_moe": {"shared_gate": "mlp.shared_expert_gate.weight"},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "hunyuan_v1_moe": {
        "q_norm": "self_attn.query_layernorm.weight",
        "k_norm": "self_attn.key_layernorm.weight",
        "router": "mlp.gate.wg.weight",
    },
    "gpt_oss": {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"},
    "phimoe": {"router": "block_sparse_moe.gate.weight"},
    "llama4_text": {"router": "feed_forward.router.weight"},
    "minimax_m2": {
        "router": "block_sparse_moe.gate.weight",
        "e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
    },
}
"""Family to the names of roles that differ from a Llama's."""
_SHARED = {
    "qwen2_moe": "mlp.shared_expert.", "hunyuan_v1_moe": "mlp.shared_mlp.", "llama4_text": "feed_forward.shared_expert.",
}  # fmt: skip
"""Family to what stands before the names of shared experts, where it is not ``mlp.shared_experts.``."""


def layer_tensor(spec: ModelSpec, layer: int, role: str, expert: Expert = None) -> Published:
    """Tensor of one layer by its role.

    Parameters
    ----------
    role : str
        "attn_norm", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "q_norm", "k_norm", "w_o", "b_o", "attn_after_norm", "ffn_norm", "router",
        "router_bias", "e_score_correction_bias", "shared_gate", "ffn_after_norm", "sinks", "attn_norm_bias", "ffn_norm_bias", of latent
        attention "w_q_a", "q_a_norm", "w_q_b", "w_kv_a", "kv_a_norm", "w_kv_b", of an indexer "index_w_q",
        "index_w_k", "index_k_norm", "index_k_norm_bias", "index_weights", or "w_gate", "w_up", "w_down" (with `expert` in a layer
        with a mixture) and an expert's "b_gate", "b_up", "b_down"; "w_q", "w_k", "w_v", "w_o" and their biases of memory tokens with
        "memory." before.
    """
    prefix = f"model.layers.{layer}."
    if spec.family == "dbrx":
        return _dbrx(spec, f"transformer.blocks.{layer}.", role, expert)
    if role in ("b_gate", "b_up", "b_down"):
        assert isinstance(expert, int)
        return _gpt_oss_bias(spec, prefix + "mlp.experts.", role, expert)
    if role in ("w_gate", "w_up", "w_down"):
        return _ffn_tensor(spec, layer, role, expert)
    h, d = spec.hidden_size, spec.head_dim
    n_q, n_kv = spec.num_heads * d, spec.num_kv_heads * d
    if spec.indexer is not None and role in _INDEXER:
        return Published(prefix + "self_attn.indexer." + _INDEXER[role], _indexer_shape(spec, spec.indexer, role))
    if spec.latent is not None and role in _LATENT:
        return Published(prefix + "self_attn." + _LATENT[role] + ".weight", _latent_shape(spec, spec.latent, role))
    if role.startswith("memory."):
        return _of_memory_tokens(layer_tensor(spec, layer, role.removeprefix("memory.")))
    whole_row = spec.qk_norm is not None and spec.qk_norm.over == "row"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm.weight", (h,)),
        "attn_norm_bias": ("input_layernorm.bias", (h,)),
        "w_q": ("self_attn.q_proj.weight", (n_q, h)),
        "w_k": ("self_attn.k_proj.weight", (n_kv, h)),
        "w_v": ("self_attn.v_proj.weight", (n_kv, h)),
        "b_q": ("self_attn.q_proj.bias", (n_q,)),
        "b_k": ("self_attn.k_proj.bias", (n_kv,)),
        "b_v": ("self_attn.v_proj.bias", (n_kv,)),
        "q_norm": ("self_attn.q_norm.weight", (n_q if whole_row else d,)),
        "k_norm": ("self_attn.k_norm.weight", (n_kv if whole_row else d,)),
        "w_o": ("self_attn.o_proj.weight", (h, spec.num_heads * spec.value_dim)),
        "b_o": ("self_attn.o_proj.bias", (h,)),
        "sinks": ("self_attn.sinks", (spec.num_heads,)),
        "ffn_norm": ("post_attention_layernorm.weight", (h,)),
        "ffn_norm_bias": ("post_attention_layernorm.bias", (h,)),
        "attn_after_norm": ("", (h,)),
        "ffn_after_norm": ("", (h,)),
        "router": ("mlp.gate.weight", (spec.num_experts, h)),
        "router_bias": ("mlp.gate.bias", (spec.num_experts,)),
        "e_score_correction_bias": ("mlp.gate.e_score_correction_bias", (spec.num_experts,)),
        "shared_gate": ("", (1, h)),
    }
    name, shape = shapes[role]
    if spec.family == "ernie4_5_moe" and role == "e_score_correction_bias":  # room for several groups of experts, of which there is one
        return Published(prefix + "mlp.moe_statics.e_score_correction_bias", shape, (1, *shape), lambda whole: whole[0])
    return Published(prefix + _OTHER_NAMES.get(spec.family, {}).get(role, name), shape)


def _of_memory_tokens(ordinary: Published) -> Published:
    """What memory tokens have in place of a projection's weight or bias."""
    prefix, _, name = ordinary.name.rpartition("self_attn.")
    projection, _, kind = name.partition("_proj.")
    module = {"q": "proj_q", "k": "proj_k", "v": "proj_v", "o": "proj_output"}[projection]
    return Published(f"{prefix}self_attn.{module}_memory_tokens_layer.{kind}", ordinary.shape)


_LATENT = {
    "w_q": "q_proj",
    "w_q_a": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "w_q_b": "q_b_proj",
    "w_kv_a": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "w_kv_b": "kv_b_proj",
}
"""Roles of latent attention."""


_INDEXER = {
    "index_w_q": "wq_b.weight",
    "index_w_k": "wk.weight",
    "index_k_norm": "k_norm.weight",
    "index_k_norm_bias": "k_norm.bias",
    "index_weights": "weights_proj.weight",
}
"""Roles of an indexer."""


def _indexer_shape(spec: ModelSpec, indexer: Indexer, role: str) -> tuple[int, ...]:
    short = 0 if spec.latent is None else spec.latent.q_lora_rank or 0
    return {
        "index_w_q": (indexer.num_heads * indexer.head_dim, short),
        "index_w_k": (indexer.head_dim, spec.hidden_size),
        "index_k_norm": (indexer.head_dim,),
        "index_k_norm_bias": (indexer.head_dim,),
        "index_weights": (indexer.num_heads, spec.hidden_size),
    }[role]


def _latent_shape(spec: ModelSpec, latent: LatentAttention, role: str) -> tuple[int, ...]:
    h, heads, rank, short = spec.hidden_size, spec.num_heads, latent.kv_lora_rank, latent.q_lora_rank or 0
    query = heads * (latent.qk_nope_head_dim + spec.head_dim)
    return {
        "w_q": (query, h),
        "w_q_a": (short, h),
        "q_a_norm": (short,),
        "w_q_b": (query, short),
        "w_kv_a": (rank + spec.head_dim, h),
        "kv_a_norm": (rank,),
        "w_kv_b": (heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank),
    }[role]


def _ffn_tensor(spec: ModelSpec, layer: int, role: str, expert: Expert) -> Published:
    h, f, prefix = spec.hidden_size, spec.ffn_width(layer), f"model.layers.{layer}."
    if expert == "shared":
        assert spec.shared_experts is not None
        f = spec.shared_experts.intermediate_size
    shape = (h, f) if role == "w_down" else (f, h)
    if expert == "shared":
        network = _SHARED.get(spec.family, "mlp.shared_experts.")
        return Published(f"{prefix}{network}{role[2:]}_proj.weight", shape)
    if expert is None:
        network = "feed_forward" if spec.family == "llama4_text" else "mlp"
        return Published(f"{prefix}{network}.{role[2:]}_proj.weight", shape)
    if spec.family in ("mixtral", "minimax_m2", "phimoe"):
        matrix = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}[role]
        return Published(f"{prefix}block_sparse_moe.experts.{expert}.{matrix}.weight", shape)
    if spec.family == "gpt_oss":
        return _gpt_oss_expert(spec, prefix + "mlp.experts.", role, expert)
    if spec.family == "llama4_text":
        return _llama4_expert(spec, prefix + "feed_forward.experts.", role, expert)
    if spec.family == "granitemoe":
        return _granite_expert(spec, prefix + "block_sparse_moe.", role, expert)
    return Published(f"{prefix}mlp.experts.{expert}.{role[2:]}_proj.weight", shape)


def _granite_expert(spec: ModelSpec, prefix: str, role: str, expert: int) -> Published:
    """All experts in one tensor, the gate above the up projection."""
    e, h, f = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    if role == "w_down":
        return Published(prefix + "output_linear.weight", (h, f), (e, h, f), lambda whole: whole[expert])
    half = 0 if role == "w_gate" else 1
    return Published(prefix + "input_linear.weight", (f, h), (e, 2 * f, h), lambda whole: whole[expert].reshape(2, f, h)[half])


def _llama4_expert(spec: ModelSpec, prefix: str, role: str, expert: int) -> Published:
    """All experts in one tensor, (in, out); the gate's columns before those of the up projection."""
    e, h, f = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    if role == "w_down":
        return Published(prefix + "down_proj", (h, f), (e, f, h), lambda whole: whole[expert].T)
    half = 0 if role == "w_gate" else 1
    return Published(prefix + "gate_up_proj", (f, h), (e, h, 2 * f), lambda whole: whole[expert].reshape(h, 2, f)[:, half].T)


def _gpt_oss_expert(spec: ModelSpec, prefix: str, role: str, expert: int) -> Published:
    """All experts in one tensor, (in, out); columns of gate and up alternate."""
    e, h, f = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    if role == "w_down":
        return Published(prefix + "down_proj", (h, f), (e, f, h), lambda whole: whole[expert].T)
    parity = 0 if role == "w_gate" else 1
    return Published(prefix + "gate_up_proj", (f, h), (e, h, 2 * f), lambda whole: whole[expert].reshape(h, f, 2)[:, :, parity].T)


def _gpt_oss_bias(spec: ModelSpec, prefix: str, role: str, expert: int) -> Published:
    """The biases of such experts."""
    e, h, f = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    if role == "b_down":
        return Published(prefix + "down_proj_bias", (h,), (e, h), lambda whole: whole[expert])
    parity = 0 if role == "b_gate" else 1
    return Published(prefix + "gate_up_proj_bias", (f,), (e, 2 * f), lambda whole: whole[expert].reshape(f, 2)[:, parity])


def _dbrx(spec: ModelSpec, prefix: str, role: str, expert: Expert) -> Published:
    """Queries, keys and values one below the other; of every expert's matrices the rows, one expert below the other, down as (in, out)."""
    e, h, f, d = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size, spec.head_dim
    n_q, n_kv = spec.num_heads * d, spec.num_kv_heads * d
    if role in ("w_q", "w_k", "w_v"):
        start, stop = {"w_q": (0, n_q), "w_k": (n_q, n_q + n_kv), "w_v": (n_q + n_kv, n_q + 2 * n_kv)}[role]
        whole = (n_q + 2 * n_kv, h)
        return Published(prefix + "norm_attn_norm.attn.Wqkv.weight", (stop - start, h), whole, lambda all_rows: all_rows[start:stop])
    if expert == "shared":
        assert spec.shared_experts is not None
        f = spec.shared_experts.intermediate_size
        return Published(f"{prefix}mlp.shared_experts.{role[2:]}_proj.weight", (h, f) if role == "w_down" else (f, h))
    if role in ("w_gate", "w_up", "w_down"):
        assert isinstance(expert, int)
        name = prefix + "ffn.experts.mlp." + {"w_gate": "w1", "w_up": "v1", "w_down": "w2"}[role]
        if role == "w_down":
            return Published(name, (h, f), (e * f, h), lambda all_rows: all_rows.reshape(e, f, h)[expert].T)
        return Published(name, (f, h), (e * f, h), lambda all_rows: all_rows.reshape(e, f, h)[expert])
    name, shape = {
        "attn_norm": ("norm_attn_norm.norm_1.weight", (h,)),
        "w_o": ("norm_attn_norm.attn.out_proj.weight", (h, n_q)),
        "ffn_norm": ("norm_attn_norm.norm_2.weight", (h,)),
        "router": ("ffn.router.layer.weight", (e, h)),
        "router_bias": ("mlp.gate.bias", (e,)),
        "e_score_correction_bias": ("mlp.gate.e_score_correction_bias", (e,)),
    }[role]
    return Published(prefix + name, shape)

"""Published (Hugging Face) names and shapes of the tensors that the reference reads."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Published:
    """One published tensor: its name and its shape, ``(out, in)`` or ``(n,)``."""

    name: str
    shape: tuple[int, ...]


def embed_tokens(spec: ModelSpec) -> Published:
    """Token embedding, (vocab, hidden)."""
    return Published("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))


def final_norm(spec: ModelSpec) -> Published:
    """Weight of the last RMSNorm, (hidden,)."""
    return Published("model.norm.weight", (spec.hidden_size,))


def lm_head(spec: ModelSpec) -> Published:
    """Output projection, (vocab, hidden): the embedding itself where the two are tied."""
    return embed_tokens(spec) if spec.tie_word_embeddings else Published("lm_head.weight", embed_tokens(spec).shape)


def layer_tensor(spec: ModelSpec, layer: int, role: str, expert: int | None = None) -> Published:
    """Tensor of one layer by its role.

    Parameters
    ----------
    role : str
        "attn_norm", "w_q", "w_k", "w_v", "w_o", "ffn_norm", "router", or "w_gate", "w_up", "w_down" (with `expert` in MoE models).
    """
    h, f = spec.hidden_size, spec.intermediate_size
    n_q, n_kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    prefix = f"model.layers.{layer}."
    if role in ("w_gate", "w_up", "w_down"):
        of_ffn = (h, f) if role == "w_down" else (f, h)
        if expert is None:
            return Published(f"{prefix}mlp.{role[2:]}_proj.weight", of_ffn)
        number = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}[role]
        return Published(f"{prefix}block_sparse_moe.experts.{expert}.{number}.weight", of_ffn)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm.weight", (h,)),
        "w_q": ("self_attn.q_proj.weight", (n_q, h)),
        "w_k": ("self_attn.k_proj.weight", (n_kv, h)),
        "w_v": ("self_attn.v_proj.weight", (n_kv, h)),
        "w_o": ("self_attn.o_proj.weight", (h, n_q)),
        "ffn_norm": ("post_attention_layernorm.weight", (h,)),
        "router": ("block_sparse_moe.gate.weight", (spec.num_experts, h)),
    }
    name, shape = shapes[role]
    return Published(prefix + name, shape)

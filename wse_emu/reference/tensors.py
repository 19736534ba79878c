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
        "attn_norm", "w_q", "w_k", "w_v", "q_norm", "k_norm", "w_o", "ffn_norm", "router", "router_bias",
        "e_score_correction_bias", or "w_gate", "w_up", "w_down" (with `expert` in a layer with a
        mixture).
    """
    h, f, d = spec.hidden_size, spec.ffn_width(layer), spec.head_dim
    n_q, n_kv = spec.num_heads * d, spec.num_kv_heads * d
    prefix = f"model.layers.{layer}."
    if role in ("w_gate", "w_up", "w_down"):
        of_ffn = (h, f) if role == "w_down" else (f, h)
        if expert is None:
            return Published(f"{prefix}mlp.{role[2:]}_proj.weight", of_ffn)
        return Published(f"{prefix}{_moe_block(spec)}experts.{expert}.{_expert_matrix(spec, role)}.weight", of_ffn)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm.weight", (h,)),
        "w_q": ("self_attn.q_proj.weight", (n_q, h)),
        "w_k": ("self_attn.k_proj.weight", (n_kv, h)),
        "w_v": ("self_attn.v_proj.weight", (n_kv, h)),
        "q_norm": ("self_attn.q_norm.weight", (d,)),
        "k_norm": ("self_attn.k_norm.weight", (d,)),
        "w_o": ("self_attn.o_proj.weight", (h, n_q)),
        "ffn_norm": ("post_attention_layernorm.weight", (h,)),
        "router": (f"{_moe_block(spec)}gate.weight", (spec.num_experts, h)),
        "router_bias": (f"{_moe_block(spec)}gate.bias", (spec.num_experts,)),
        "e_score_correction_bias": (f"{_moe_block(spec)}gate.e_score_correction_bias", (spec.num_experts,)),
    }
    name, shape = shapes[role]
    return Published(prefix + name, shape)


def _moe_block(spec: ModelSpec) -> str:
    return "block_sparse_moe." if spec.family == "mixtral" else "mlp."


def _expert_matrix(spec: ModelSpec, role: str) -> str:
    if spec.family == "mixtral":
        return {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}[role]
    return f"{role[2:]}_proj"

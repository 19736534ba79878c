"""Which published tensor plays which role, per family: names and shapes as in released checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wse_emu.checkpoint.families import FAMILIES
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import layer_prefix, router_vectors

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_VECTORS = {"router_bias": "bias", "e_score_correction_bias": "e_score_correction_bias"}


@dataclass(frozen=True, slots=True)
class PublishedTensor:
    """Name and shape of one tensor of a checkpoint; matrices are (out, in)."""

    name: str
    shape: tuple[int, ...]


def published_tensors(spec: ModelSpec) -> Iterator[tuple[str, PublishedTensor]]:
    """Canonical role and published tensor of every weight, embedding first, head last.

    Roles: ``"embed"``, ``"layers.N."`` followed by ``attn_norm w_q w_k w_v``, ``q_norm k_norm`` where heads are normalised,
    ``w_o ffn_norm`` and ``w_gate w_up w_down`` (dense) or ``router`` (and
    ``router_bias``, ``e_score_correction_bias`` where the routing rule has them) and ``experts.E.`` with ``w_gate w_up w_down``, then
    ``"final_norm"`` and ``"lm_head"``. A tied head names the embedding's tensor.
    """
    h, d = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    yield "embed", PublishedTensor(EMBED, (spec.vocab_size, h))
    for layer in range(spec.num_layers):
        role, hf = layer_prefix(layer), f"model.layers.{layer}."
        yield role + "attn_norm", PublishedTensor(hf + "input_layernorm.weight", (h,))
        yield role + "w_q", PublishedTensor(hf + "self_attn.q_proj.weight", (q, h))
        yield role + "w_k", PublishedTensor(hf + "self_attn.k_proj.weight", (kv, h))
        yield role + "w_v", PublishedTensor(hf + "self_attn.v_proj.weight", (kv, h))
        if spec.qk_norm:
            yield role + "q_norm", PublishedTensor(hf + "self_attn.q_norm.weight", (d,))
            yield role + "k_norm", PublishedTensor(hf + "self_attn.k_norm.weight", (d,))
        yield role + "w_o", PublishedTensor(hf + "self_attn.o_proj.weight", (h, q))
        yield role + "ffn_norm", PublishedTensor(hf + "post_attention_layernorm.weight", (h,))
        yield from _ffn_tensors(spec, layer, role, hf)
    yield "final_norm", PublishedTensor("model.norm.weight", (h,))
    yield "lm_head", PublishedTensor(EMBED if spec.tie_word_embeddings else LM_HEAD, (spec.vocab_size, h))


def _ffn_tensors(spec: ModelSpec, layer: int, role: str, hf: str) -> Iterator[tuple[str, PublishedTensor]]:
    h, f = spec.hidden_size, spec.ffn_width(layer)
    rules = FAMILIES[spec.family].moe
    if rules is None or not spec.is_moe_layer(layer):
        yield role + "w_gate", PublishedTensor(hf + "mlp.gate_proj.weight", (f, h))
        yield role + "w_up", PublishedTensor(hf + "mlp.up_proj.weight", (f, h))
        yield role + "w_down", PublishedTensor(hf + "mlp.down_proj.weight", (h, f))
        return
    if spec.routing.is_learned:
        yield role + "router", PublishedTensor(f"{hf}{rules.block}gate.weight", (spec.num_experts, h))
    for name in router_vectors(spec.routing):
        yield role + name, PublishedTensor(f"{hf}{rules.block}gate.{_VECTORS[name]}", (spec.num_experts,))
    for e in range(spec.num_experts):
        expert, published = f"{role}experts.{e}.", f"{hf}{rules.block}experts.{e}."
        yield expert + "w_gate", PublishedTensor(f"{published}{rules.gate}.weight", (f, h))
        yield expert + "w_up", PublishedTensor(f"{published}{rules.up}.weight", (f, h))
        yield expert + "w_down", PublishedTensor(f"{published}{rules.down}.weight", (h, f))


def published_names(spec: ModelSpec) -> dict[str, PublishedTensor]:
    """`published_tensors` as a dictionary from role to tensor."""
    return dict(published_tensors(spec))

"""Qwen 3, dense and with experts, and Qwen 2 with experts."""

from __future__ import annotations

from typing import Any

from wse_emu.checkpoint.dense_layers import by_steps, steps_config
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.routers import softmax_routing, softmax_routing_config
from wse_emu.checkpoint.windows import every_other_below, switched, switched_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import QkNorm
from wse_emu.foundation.shared_experts import SharedExperts


def _normed_heads(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Every head's queries and keys are normalised."""
    return {"qk_norm": QkNorm()}


def _read_qwen2_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    shared = SharedExperts(intermediate_size=fields.integer("shared_expert_intermediate_size", 5632), gated=True)
    return {"biases": Biases(qkv=fields.boolean("qkv_bias", True)), "shared_experts": shared}


def _write_qwen2_moe(spec: ModelSpec) -> dict[str, Any]:
    width = {} if spec.shared_experts is None else {"shared_expert_intermediate_size": spec.shared_experts.intermediate_size}
    return {"qkv_bias": spec.biases.qkv, **width}


QWEN3 = Family(
    model_type="qwen3", architecture="Qwen3ForCausalLM", head_dim=128, max_position_embeddings=32_768,
    attention_bias=Biases(qkv=True, out=True), read=_normed_heads, windows=switched(first="max_window_layers"),
    window_config=switched_window,
)  # fmt: skip


QWEN3_MOE = Family(
    model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", num_kv_heads=4, max_position_embeddings=32_768,
    attention_bias=Biases(qkv=True, out=True), read=_normed_heads, windows=switched(first=None), window_config=switched_window,
    moe=MoeRules(
        count="num_experts", default_num_experts=128, default_top_k=8, width="moe_intermediate_size",
        dense=by_steps, dense_config=steps_config, routing=softmax_routing, routing_config=softmax_routing_config,
    ),
)  # fmt: skip


QWEN2_MOE = Family(
    model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", num_kv_heads=16, max_position_embeddings=32_768,
    windows=every_other_below("max_window_layers", 28), window_config=switched_window,
    moe=MoeRules(
        count="num_experts", default_num_experts=60, default_top_k=4, width="moe_intermediate_size",
        dense=by_steps, dense_config=steps_config, routing=softmax_routing, routing_config=softmax_routing_config,
    ),
    read=_read_qwen2_moe, write=_write_qwen2_moe,
    names=named(**ffn_names("shared.", "mlp.shared_expert."), shared__gate="mlp.shared_expert_gate.weight"),
)  # fmt: skip

"""Phi-3.5-MoE: LayerNorm with biases, biases of attention and of the head, sparsemixer routing, longrope with a factor for each length."""

from __future__ import annotations

from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.windows import every_layer, plain_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import NormSpec
from wse_emu.foundation.routing_rule import RoutingRule


def _routing(fields: Fields) -> RoutingRule:
    if fields.integer("num_experts_per_tok", 2) != 2:
        raise fields.fail("num_experts_per_tok", "must be 2: sparsemixer chooses a first and a second expert")
    return RoutingRule(
        router_selection_nonlinearity="none", expert_weighting_nonlinearity="sparsemixer", expert_weighting_normalization=False,
        router_jitter_noise=fields.number("router_jitter_noise", 0.01),
    )  # fmt: skip


def _routing_config(rule: RoutingRule) -> dict[str, Any]:
    return {"router_jitter_noise": rule.router_jitter_noise}


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    biased = fields.boolean("attention_bias", False)
    biases = Biases(qkv=biased, out=biased, head=fields.boolean("lm_head_bias", False))
    return {"norm": NormSpec(kind="layer", bias=True), "biases": biases}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"attention_bias": spec.biases.qkv, "lm_head_bias": spec.biases.head}


PHIMOE = Family(
    model_type="phimoe", architecture="PhimoeForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
    rope_theta=1e6, rope_mscales=True, bos_token_id=1, eos_token_id=2, attention_bias=Biases(qkv=True, out=True),
    windows=every_layer(None), window_config=plain_window,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=16, default_top_k=2, width="intermediate_size", routing=_routing,
        routing_config=_routing_config,
    ),
    read=_read, write=_write,
    names=named(
        router="block_sparse_moe.gate.weight", **ffn_names("experts.", "block_sparse_moe.experts.{e}.", gate="w1", up="w3", down="w2"),
    ),
)  # fmt: skip

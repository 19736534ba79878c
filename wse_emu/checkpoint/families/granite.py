"""Granite with experts."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import Part, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING
from wse_emu.foundation.scales import Scales

_SCALES = {
    "embedding": "embedding_multiplier", "residual": "residual_multiplier", "attention": "attention_multiplier", "logits": "logits_scaling",
}  # fmt: skip


def _read_granite(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"scales": Scales(**{name: fields.number(field, 1.0) for name, field in _SCALES.items()})}


def _write_granite(spec: ModelSpec) -> dict[str, Any]:
    scales = spec.scales
    return {
        "embedding_multiplier": scales.embedding, "residual_multiplier": scales.residual, "attention_multiplier": spec.attention_scale,
        "logits_scaling": scales.logits,
    }  # fmt: skip


GRANITEMOE = Family(
    model_type="granitemoe", architecture="GraniteMoeForCausalLM", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    attention_bias=Biases(qkv=True, out=True), windows=full, window_config=no_window,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=8, default_top_k=2, width="intermediate_size",
        routing=fixed_routing(MIXTRAL_ROUTING), routing_config=fixed_routing_config,
    ),
    read=_read_granite, write=_write_granite,
    published=MappingProxyType({f"`{name}` of `scales`": f"`{published}`" for name, published in _SCALES.items()}),
    names=named(
        router="block_sparse_moe.router.layer.weight",
        experts__w_gate=Part(name="block_sparse_moe.input_linear.weight", stacked=("w_gate", "w_up"), experts="axis"),
        experts__w_up=Part(name="block_sparse_moe.input_linear.weight", stacked=("w_gate", "w_up"), experts="axis"),
        experts__w_down=Part(name="block_sparse_moe.output_linear.weight", experts="axis"),
    ),
)  # fmt: skip

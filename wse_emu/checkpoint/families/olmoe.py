"""OLMoE."""

from __future__ import annotations

from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.routers import softmax_routing, softmax_routing_config
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import QkNorm


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"qk_norm": QkNorm(over="row"), "clip_qkv": fields.optional_number("clip_qkv")}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"clip_qkv": spec.clip_qkv}


OLMOE = Family(
    model_type="olmoe", architecture="OlmoeForCausalLM", max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=50_279,
    attention_bias=Biases(qkv=True, out=True), windows=full, window_config=no_window,
    moe=MoeRules(
        count="num_experts", default_num_experts=64, default_top_k=8, width="intermediate_size", routing=softmax_routing,
        routing_config=softmax_routing_config,
    ),
    read=_read, write=_write,
)  # fmt: skip

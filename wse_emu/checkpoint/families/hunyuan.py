"""Hunyuan with experts: queries and keys are normalised after the rotation; a shared network; alpha stretches the base."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.norm_spec import QkNorm
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING
from wse_emu.foundation.shared_experts import SharedExperts


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    shared = SharedExperts(intermediate_size=fields.integer("intermediate_size"))
    return {"qk_norm": QkNorm(after_rotary=True), "shared_experts": shared}


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe", architecture="HunYuanMoEV1ForCausalLM", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_alpha=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
    attention_bias=Biases(qkv=True, out=True), windows=full, window_config=no_window,
    moe=MoeRules(
        count="num_experts", default_num_experts=1, top_k="moe_topk", default_top_k=1, width="intermediate_size",
        routing=fixed_routing(MIXTRAL_ROUTING), routing_config=fixed_routing_config,
    ),
    read=_read,
    unread=MappingProxyType(
        {
            "use_cla": (False,), "use_mla": (False,), "use_qk_norm": (True,), "norm_topk_prob": (True,), "num_shared_expert": (1,),
            "use_mixed_mlp_moe": (True,), "moe_layer_num_skipped": (0,),
        }
    ),
    names=named(
        q_norm="self_attn.query_layernorm.weight", k_norm="self_attn.key_layernorm.weight", router="mlp.gate.wg.weight",
        **ffn_names("shared.", "mlp.shared_mlp."),
    ),
)  # fmt: skip

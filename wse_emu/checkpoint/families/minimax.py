"""MiniMax-M2: part of a head is rotated; queries and keys are normalised over the row; sigmoid routing with a correction bias."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import QkNorm
from wse_emu.foundation.routing_rule import RoutingRule


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"qk_norm": QkNorm(over="row")}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"rotary_dim": spec.rotary.rotated(spec.head_dim)}


MINIMAX_M2 = Family(
    model_type="minimax_m2", architecture="MiniMaxM2ForCausalLM", num_kv_heads=8, head_dim=128, max_position_embeddings=196_608,
    rope_theta=5e6, partial_rotary=1.0, bos_token_id=200_034, eos_token_id=200_020, windows=full, window_config=no_window,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=256, default_top_k=8, width="intermediate_size",
        routing=fixed_routing(
            RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True)
        ),
        routing_config=fixed_routing_config,
    ),
    ignored=(r"(model\.)?mtp\..*",),
    read=_read, write=_write,
    unread=MappingProxyType(
        {
            "use_routing_bias": (True,), "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",),
            "shared_intermediate_size": (0,),
        }
    ),
    names=named(
        router="block_sparse_moe.gate.weight", e_score_correction_bias="block_sparse_moe.e_score_correction_bias",
        **ffn_names("experts.", "block_sparse_moe.experts.{e}.", gate="w1", up="w3", down="w2"),
    ),
)  # fmt: skip

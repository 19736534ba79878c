"""ERNIE 4.5 with experts: neighbours are the rotary pairs; softmax routing with a correction bias; shared experts; some layers dense."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.dense_layers import interval_config, outside_interval
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import Part, ffn_names, named
from wse_emu.checkpoint.shared import n_shared_config, read_n_shared
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.routing_rule import RoutingRule


def _routing(fields: Fields) -> RoutingRule:
    return RoutingRule(e_score_correction_bias=True, norm_min=fields.number("moe_norm_min", 1e-12))


def _routing_config(rule: RoutingRule) -> dict[str, Any]:
    return {"moe_norm_min": rule.norm_min}


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.boolean("use_bias", False):
        raise fields.fail("use_bias", "must be false; biases of feed-forward networks are not supported")
    return {"rotary": RotarySpec(interleaved=True), "shared_experts": read_n_shared(fields, "moe_num_shared_experts", 2)}


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe", architecture="Ernie4_5_MoeForCausalLM", num_kv_heads=4, max_position_embeddings=131_072, rms_norm_eps=1e-5,
    rope_theta=5e5, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True, windows=full, window_config=no_window,
    moe=MoeRules(
        count="moe_num_experts", default_num_experts=64, top_k="moe_k", default_top_k=6, width="moe_intermediate_size",
        routing=_routing, routing_config=_routing_config, dense=outside_interval, dense_config=interval_config,
    ),
    read=_read, write=n_shared_config("moe_num_shared_experts"),
    names=named(
        e_score_correction_bias=Part(name="mlp.moe_statics.e_score_correction_bias", one_row=True),
        **ffn_names("shared.", "mlp.shared_experts."),
    ),
    ignored=(".*mtp.*",), unread=MappingProxyType({"moe_gate": ("topk",), "moe_use_aux_free": (True,)}),
)  # fmt: skip

"""GLM-4.5 and its kin: half of a head is rotated; sigmoid routing with a correction bias, shared experts, the first layers dense."""

from __future__ import annotations

from typing import Any

from wse_emu.checkpoint.dense_layers import first_config, first_ones
from wse_emu.checkpoint.families.deepseek import UNREAD
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.rope import partial_config
from wse_emu.checkpoint.routers import grouped_sigmoid_config, grouped_sigmoid_routing
from wse_emu.checkpoint.shared import n_shared_config, read_n_shared
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import QkNorm


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    qk_norm = QkNorm() if fields.boolean("use_qk_norm", False) else None
    return {"qk_norm": qk_norm, "shared_experts": read_n_shared(fields, "n_shared_experts", 1)}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"use_qk_norm": spec.qk_norm is not None, **partial_config(spec), **n_shared_config("n_shared_experts")(spec)}


GLM4_MOE = Family(
    model_type="glm4_moe", architecture="Glm4MoeForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
    partial_rotary=0.5, attention_bias=Biases(qkv=True), windows=full, window_config=no_window,
    moe=MoeRules(
        count="n_routed_experts", default_num_experts=128, default_top_k=8, width="moe_intermediate_size",
        routing=grouped_sigmoid_routing(normalized=True), routing_config=grouped_sigmoid_config, dense=first_ones(1),
        dense_config=first_config,
    ),
    read=_read, write=_write, names=named(**ffn_names("shared.", "mlp.shared_experts.")), predicts_further=True, unread=UNREAD,
)  # fmt: skip

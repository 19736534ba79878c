"""dots.llm1: sigmoid routing with a correction bias, shared experts, the first layers dense."""

from __future__ import annotations

from typing import Any

from wse_emu.checkpoint.dense_layers import first_config, first_ones
from wse_emu.checkpoint.families.deepseek import UNREAD
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import ABSENT, Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.routers import grouped_sigmoid_config, grouped_sigmoid_routing
from wse_emu.checkpoint.shared import n_shared_config, read_n_shared
from wse_emu.checkpoint.windows import from_layer, from_layer_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.norm_spec import QkNorm


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"qk_norm": QkNorm(), "shared_experts": read_n_shared(fields, "n_shared_experts", ABSENT)}


DOTS1 = Family(
    model_type="dots1", architecture="Dots1ForCausalLM", num_kv_heads=32, max_position_embeddings=2048,
    attention_bias=Biases(qkv=True, out=True), windows=from_layer("max_window_layers", 62), window_config=from_layer_window,
    moe=MoeRules(
        count="n_routed_experts", width="moe_intermediate_size", routing=grouped_sigmoid_routing(normalized=False),
        routing_config=grouped_sigmoid_config, dense=first_ones(0), dense_config=first_config,
    ),
    read=_read, write=n_shared_config("n_shared_experts"), names=named(**ffn_names("shared.", "mlp.shared_experts.")),
    unread=UNREAD,
)  # fmt: skip

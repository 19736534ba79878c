"""DeepSeek V2 and V3: keys and values from one latent a token, groups of experts, shared experts, the first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.dense_layers import first_config, first_ones
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.rope import yarn_mscale
from wse_emu.checkpoint.routers import greedy_softmax_config, greedy_softmax_routing, grouped_sigmoid_config, grouped_sigmoid_routing
from wse_emu.checkpoint.shared import n_shared_config, read_n_shared
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.scales import Scales


def latent_fields(fields: Fields) -> dict[str, Any]:
    """What all families with latent attention read: sizes, and the scale of the scores, which a stretched context changes."""
    given = fields.get("q_lora_rank", 1536)
    latent = LatentAttention(
        kv_lora_rank=fields.integer("kv_lora_rank", 512), q_lora_rank=None if given is None else fields.integer("q_lora_rank", 1536),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 128), v_head_dim=fields.integer("v_head_dim", 128),
    )  # fmt: skip
    scale = (latent.qk_nope_head_dim + fields.integer("qk_rope_head_dim", 64)) ** -0.5 * yarn_mscale(fields) ** 2
    return {"latent": latent, "scales": Scales(attention=scale)}


def _read_v2(fields: Fields, num_layers: int) -> dict[str, Any]:
    shared = read_n_shared(fields, "n_shared_experts", 2)
    return {**latent_fields(fields), "rotary": RotarySpec(interleaved=True), "shared_experts": shared}


def _read_v3(fields: Fields, num_layers: int) -> dict[str, Any]:
    rotary = RotarySpec(interleaved=fields.boolean("rope_interleave", True))
    return {**latent_fields(fields), "rotary": rotary, "shared_experts": read_n_shared(fields, "n_shared_experts", 1)}


def latent_config(spec: ModelSpec) -> dict[str, Any]:
    """What they write."""
    latent = spec.latent
    if latent is None:
        raise SpecError(f"`latent` must be given for family {spec.family!r}: its config.json has no other attention")
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")
    return {
        **{name: getattr(latent, name) for name in sizes}, "qk_rope_head_dim": spec.head_dim, **n_shared_config("n_shared_experts")(spec),
    }  # fmt: skip


def _write_v3(spec: ModelSpec) -> dict[str, Any]:
    return {**latent_config(spec), "rope_interleave": spec.rotary.interleaved}


LATENT_NAMES = named(
    w_q_a="self_attn.q_a_proj.weight", q_a_norm="self_attn.q_a_layernorm.weight", w_q_b="self_attn.q_b_proj.weight",
    w_kv_a="self_attn.kv_a_proj_with_mqa.weight", kv_a_norm="self_attn.kv_a_layernorm.weight", w_kv_b="self_attn.kv_b_proj.weight",
    **ffn_names("shared.", "mlp.shared_experts."),
)  # fmt: skip
"""Names that they share."""

UNREAD: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
)
"""What transformers does not look at in DeepSeek-V3 and its kin: their rule is fixed."""

PUBLISHED = MappingProxyType({"`head_dim`": "`qk_rope_head_dim`"})

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", head_dim=64, head_dim_field="qk_rope_head_dim",
    max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, windows=full, window_config=no_window,
    moe=MoeRules(
        count="n_routed_experts", default_num_experts=64, width="moe_intermediate_size", routing=greedy_softmax_routing,
        routing_config=greedy_softmax_config, dense=first_ones(0), dense_config=first_config,
    ),
    read=_read_v2, write=latent_config, names=LATENT_NAMES, published=PUBLISHED,
    unread=MappingProxyType({"scoring_func": ("softmax",), "norm_topk_prob": (False,), "moe_layer_freq": (1,)}),
)  # fmt: skip

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM", num_kv_heads=128, head_dim=64, head_dim_field="qk_rope_head_dim",
    max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, windows=full, window_config=no_window,
    moe=MoeRules(
        count="n_routed_experts", default_num_experts=256, default_top_k=8, width="moe_intermediate_size",
        routing=grouped_sigmoid_routing(normalized=True, n_group=8, topk_group=4, scale=2.5), routing_config=grouped_sigmoid_config,
        dense=first_ones(3), dense_config=first_config,
    ),
    read=_read_v3, write=_write_v3, names=LATENT_NAMES, published=PUBLISHED, predicts_further=True, unread=UNREAD,
)  # fmt: skip

"""DeepSeek V3.2 and GLM-5: DeepSeek V3 with an indexer that chooses the keys a token attends to (DeepSeek Sparse Attention)."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.dense_layers import first_ones
from wse_emu.checkpoint.families.deepseek import LATENT_NAMES, UNREAD, latent_config, latent_fields
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.routers import grouped_sigmoid_config, grouped_sigmoid_routing
from wse_emu.checkpoint.shared import read_n_shared
from wse_emu.checkpoint.windows import Windows, no_window
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rotary_spec import RotarySpec

_OWN, _SHARED = "full", "shared"


def _every_layer(fields: Fields, num_layers: int) -> Windows:
    """Every layer has what the indexer chooses."""
    kinds = fields.get("layer_types", None)
    if kinds is not None and kinds != ["indexed_attention"] * num_layers:
        raise fields.fail("layer_types", f"must name 'indexed_attention' for each of {num_layers} layers")
    return None, ()


def _dense(fields: Fields, num_layers: int) -> tuple[int, ...]:
    kinds = fields.get("mlp_layer_types", None)
    if kinds is None:
        return first_ones(3)(fields, num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise fields.fail("mlp_layer_types", f"must name 'dense' or 'sparse' for each of {num_layers} layers")
    return tuple(i for i, kind in enumerate(kinds) if kind == "dense")


def _dense_config(spec: ModelSpec) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if spec.is_moe_layer(i) else "dense" for i in range(spec.num_layers)]}


def _read(fields: Fields, index_heads: int, *, interleaved: bool) -> dict[str, Any]:
    if fields.get("q_lora_rank", 1536) is None:
        raise fields.fail("q_lora_rank", "must be an integer for this family: the indexer's queries are made of that short vector")
    indexer = Indexer(
        num_heads=fields.integer("index_n_heads", index_heads), head_dim=fields.integer("index_head_dim", 128),
        topk=fields.integer("index_topk", 2048), interleaved=interleaved,
    )  # fmt: skip
    shared = read_n_shared(fields, "n_shared_experts", 1)
    return {**latent_fields(fields), "rotary": RotarySpec(interleaved=True), "indexer": indexer, "shared_experts": shared}


def _read_v32(fields: Fields, num_layers: int) -> dict[str, Any]:
    return _read(fields, 64, interleaved=False)


def _read_glm(fields: Fields, num_layers: int) -> dict[str, Any]:
    own = _read(fields, 32, interleaved=True)
    return {**own, "indexer": replace(own["indexer"], shared_layers=_sharing(fields, num_layers))}


def _sharing(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers that attend to what the layer before them chose: as a list says, as letters do, or all but each so many from an offset on."""
    kinds, letters = fields.get("indexer_types", None), fields.get("index_topk_pattern", None)
    if kinds is None and letters is not None:
        kinds = [{"F": _OWN, "S": _SHARED}.get(c) for c in letters] if isinstance(letters, str) else letters
    if kinds is None:
        every, offset = max(fields.integer("index_topk_freq", 1, low=0), 1), fields.integer("index_skip_topk_offset", 2, low=0)
        return tuple(i for i in range(num_layers) if max(i - offset + 1, 0) % every)
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(k not in (_OWN, _SHARED) for k in kinds) or kinds[0] == _SHARED:
        name = "index_topk_pattern" if fields.get("indexer_types", None) is None else "indexer_types"
        raise fields.fail(name, f"must say for each of {num_layers} layers that it is {_OWN!r} or {_SHARED!r}, the first one {_OWN!r}")
    return tuple(i for i, kind in enumerate(kinds) if kind == _SHARED)


def _write(spec: ModelSpec) -> dict[str, Any]:
    indexer = spec.indexer
    if indexer is None:
        raise SpecError(f"`indexer` must be given for family {spec.family!r}: its config.json has no attention to all keys")
    sizes = {"index_n_heads": indexer.num_heads, "index_head_dim": indexer.head_dim, "index_topk": indexer.topk}
    return {**latent_config(spec), **sizes}


def _write_glm(spec: ModelSpec) -> dict[str, Any]:
    return {**_write(spec), "indexer_types": [_OWN if spec.runs_indexer(i) else _SHARED for i in range(spec.num_layers)]}


_NAMES = {
    **LATENT_NAMES, "index_w_q": "self_attn.indexer.wq_b.weight", "index_w_k": "self_attn.indexer.wk.weight",
    "index_k_norm": "self_attn.indexer.k_norm.weight", "index_k_norm_bias": "self_attn.indexer.k_norm.bias",
    "index_weights": "self_attn.indexer.weights_proj.weight",
}  # fmt: skip


_UNREAD = MappingProxyType({**UNREAD, "rope_interleave": (True,)})


_PUBLISHED = MappingProxyType(
    {
        "`head_dim` of `indexer`": "`index_head_dim`", "`num_heads` of `indexer`": "`index_n_heads`", "`topk` of `indexer`": "`index_topk`",
        "`head_dim`": "`qk_rope_head_dim`",
    }
)


def _experts(n_group: int, topk_group: int) -> MoeRules:
    return MoeRules(
        count="n_routed_experts", default_num_experts=256, default_top_k=8, width="moe_intermediate_size",
        routing=grouped_sigmoid_routing(normalized=True, n_group=n_group, topk_group=topk_group, scale=2.5),
        routing_config=grouped_sigmoid_config, dense=_dense, dense_config=_dense_config,
    )  # fmt: skip


DEEPSEEK_V32 = Family(
    model_type="deepseek_v32", architecture="DeepseekV32ForCausalLM", num_kv_heads=128, head_dim=64, head_dim_field="qk_rope_head_dim",
    max_position_embeddings=163_840, bos_token_id=0, eos_token_id=1, windows=_every_layer, window_config=no_window, moe=_experts(8, 4),
    read=_read_v32, write=_write, names=_NAMES, published=_PUBLISHED, predicts_further=True, unread=_UNREAD,
)  # fmt: skip

GLM_MOE_DSA = Family(
    model_type="glm_moe_dsa", architecture="GlmMoeDsaForCausalLM", num_kv_heads=64, head_dim=64, head_dim_field="qk_rope_head_dim",
    max_position_embeddings=202_752, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, windows=_every_layer, window_config=no_window,
    moe=_experts(1, 1), read=_read_glm, write=_write_glm, names=_NAMES, published=_PUBLISHED, predicts_further=True,
    unread=MappingProxyType({**_UNREAD, "indexer_rope_interleave": (True,)}),
)  # fmt: skip

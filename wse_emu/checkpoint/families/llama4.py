"""Llama 4, text: one expert a token beside a shared one, chunks of keys in rotated layers, queries that grow in the others."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import Part, ffn_names, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import QkNorm
from wse_emu.foundation.query_temperature import QueryTemperature
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.foundation.shared_experts import SharedExperts

_FULL, _CHUNKED = "full_attention", "chunked_attention"


def _flatten(fields: Fields) -> dict[str, Any]:
    """`intermediate_size` is an expert's width, `intermediate_size_mlp` that of a dense layer."""
    wide, narrow = fields.integer("intermediate_size_mlp", 16384), fields.integer("intermediate_size", 8192)
    return {"intermediate_size": wide, "moe_intermediate_size": narrow}


def _nest(config: dict[str, Any]) -> dict[str, Any]:
    """The reverse."""
    wide = config["intermediate_size"]
    out = {**config, "intermediate_size_mlp": wide, "intermediate_size": config.get("moe_intermediate_size", wide)}
    out.pop("moe_intermediate_size", None)
    return out


def _dense(fields: Fields, num_layers: int) -> tuple[int, ...]:
    if fields.given("moe_layers"):
        sparse: set[int] = set(fields.layers("moe_layers", num_layers))
    else:
        step = fields.integer("interleave_moe_layer_step", 1)
        sparse = set(range(step - 1, num_layers, step))
    return tuple(i for i in range(num_layers) if i not in sparse)


def _dense_config(spec: ModelSpec) -> dict[str, Any]:
    return {"moe_layers": list(spec.moe_layers)}


def _still_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers without rotation: where `no_rope_layers` says 0, or each `no_rope_layer_interval`-th."""
    turns = fields.get("no_rope_layers", None)
    if not turns:
        every = fields.integer("no_rope_layer_interval", 4)
        return tuple(i for i in range(num_layers) if (i + 1) % every == 0)
    if not isinstance(turns, list) or len(turns) < num_layers or any(type(t) is not int or t not in (0, 1) for t in turns):
        raise fields.fail("no_rope_layers", f"must hold 1 (rotated) or 0 for each of {num_layers} layers")
    return tuple(i for i in range(num_layers) if not turns[i])


def _chunks(fields: Fields, num_layers: int, still: tuple[int, ...]) -> dict[str, Any]:
    """Blocks of keys: of the rotated layers, or of those that `layer_types` names."""
    size = None if fields.get("attention_chunk_size", 8192) is None else fields.integer("attention_chunk_size", 8192)
    kinds = fields.get("layer_types", None)
    if kinds is None:
        kinds = [_FULL if i in still or size is None else _CHUNKED for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (_FULL, _CHUNKED) for kind in kinds):
        raise fields.fail("layer_types", f"must name {_FULL} or {_CHUNKED} for each of {num_layers} layers")
    layers = tuple(i for i, kind in enumerate(kinds) if kind == _CHUNKED)
    if layers and size is None:
        raise fields.fail("layer_types", f"names {_CHUNKED}, but `attention_chunk_size` is null")
    return {"chunk_size": size, "chunked_layers": layers} if layers else {}


def _temperature(fields: Fields) -> QueryTemperature | None:
    if not fields.boolean("attn_temperature_tuning", True):
        return None
    return QueryTemperature(floor_scale=fields.integer("floor_scale", 8192), attn_scale=fields.number("attn_scale", 0.1))


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    still = _still_layers(fields, num_layers)
    norm = QkNorm(after_rotary=True, weighted=False, rotated_only=True) if fields.boolean("use_qk_norm", True) else None
    shared = SharedExperts(intermediate_size=fields.integer("moe_intermediate_size"))
    return {
        "rotary": RotarySpec(interleaved=True, skipped_layers=still), "qk_norm": norm, "query_temperature": _temperature(fields),
        "shared_experts": shared, **_chunks(fields, num_layers, still),
    }  # fmt: skip


def _write(spec: ModelSpec) -> dict[str, Any]:
    tuned = spec.query_temperature or QueryTemperature()
    return {
        "no_rope_layers": [int(spec.rotates(i)) for i in range(spec.num_layers)], "use_qk_norm": spec.qk_norm is not None,
        "attention_chunk_size": spec.chunk_size,
        "layer_types": [_FULL if spec.chunk(i) is None else _CHUNKED for i in range(spec.num_layers)],
        "attn_temperature_tuning": spec.query_temperature is not None, "floor_scale": tuned.floor_scale, "attn_scale": tuned.attn_scale,
    }  # fmt: skip


_GATE_UP = Part(name="feed_forward.experts.gate_up_proj", stacked=("w_gate", "w_up"), experts="axis", transposed=True)

LLAMA4_TEXT = Family(
    model_type="llama4_text", architecture="Llama4ForCausalLM", num_kv_heads=8, head_dim=128, max_position_embeddings=131_072,
    rms_norm_eps=1e-5, rope_theta=5e5, bos_token_id=1, eos_token_id=2, attention_bias=Biases(qkv=True, out=True),
    windows=lambda fields, num_layers: (None, ()), window_config=lambda spec: {}, flatten=_flatten, nest=_nest,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=16, default_top_k=1, width="moe_intermediate_size",
        routing=fixed_routing(
            RoutingRule(
                router_selection_nonlinearity="none", expert_weighting_nonlinearity="sigmoid", expert_weighting_normalization=False,
                probability_before_ffn=True,
            )
        ),
        routing_config=fixed_routing_config, dense=_dense, dense_config=_dense_config,
    ),
    read=_read, write=_write,
    published=MappingProxyType(
        {
            "`intermediate_size`": "`intermediate_size_mlp`", "`moe_intermediate_size`": "`intermediate_size`",
            "`chunk_size`": "`attention_chunk_size`",
            **{f"`{name}` of the queries' temperature": f"`{name}`" for name in ("floor_scale", "attn_scale")},
        }
    ),
    names=named(
        router="feed_forward.router.weight", experts__w_gate=_GATE_UP, experts__w_up=_GATE_UP,
        experts__w_down=Part(name="feed_forward.experts.down_proj", experts="axis", transposed=True),
        **ffn_names("", "feed_forward."), **ffn_names("shared.", "feed_forward.shared_expert."),
    ),
)  # fmt: skip

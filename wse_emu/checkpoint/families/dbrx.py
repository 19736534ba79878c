"""DBRX: LayerNorm without biases, queries, keys and values in one matrix and within a limit, all experts in three; a nested config.json."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import ABSENT, Fields
from wse_emu.checkpoint.naming import Part, named
from wse_emu.checkpoint.windows import full, no_window
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import NormSpec
from wse_emu.foundation.routing_rule import RoutingRule

_EPS = 1e-5
"""Of every norm; config.json does not say it."""
_SIZES = {
    "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers", "max_seq_len": "max_position_embeddings",
}  # fmt: skip
_FFN = {"ffn_hidden_size": "intermediate_size", "moe_num_experts": "num_local_experts", "moe_top_k": "num_experts_per_tok"}
_FFN_DEFAULTS = {"ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1}


def _flatten(fields: Fields) -> dict[str, Any]:
    """What `attn_config` and `ffn_config` say, under the names of other families."""
    attention, ffn = (fields.object(name) or Fields({}, f"{fields.where}: `{name}`") for name in ("attn_config", "ffn_config"))
    out: dict[str, Any] = {"rms_norm_eps": _EPS, "head_dim": None}
    for name, common in _SIZES.items():
        out[common] = fields.integer(name, 2048 if name == "max_seq_len" else ABSENT)
    out |= {common: ffn.integer(name, _FFN_DEFAULTS[name]) for name, common in _FFN.items()}
    out |= {"num_key_value_heads": attention.integer("kv_n_heads", 1), "clip_qkv": attention.optional_number("clip_qkv")}
    activation = ffn.object("ffn_act_fn")
    out["hidden_act"] = "silu" if activation is None else activation.get("name", "silu")
    if attention.given("rope_theta") and not fields.given("rope_theta") and not fields.given("rope_parameters"):
        out["rope_theta"] = attention.number("rope_theta")
    power = ffn.get("moe_normalize_expert_weights", 1.0)
    if power is not None and power != 1:
        raise ConfigError(f"{ffn.where}: `moe_normalize_expert_weights` must be 1 (divide by the sum) or null, got {show(power)}")
    return out | {"norm_topk_prob": power is not None}


def _nest(config: dict[str, Any]) -> dict[str, Any]:
    """The reverse."""
    out = {name: config[common] for name, common in _SIZES.items()}
    for name in ("architectures", "model_type", "vocab_size", "tie_word_embeddings", "torch_dtype", "rope_theta", "rope_scaling"):
        out[name] = config[name]
    out |= {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    attention = {"kv_n_heads": config["num_key_value_heads"], "clip_qkv": config["clip_qkv"], "rope_theta": config["rope_theta"]}
    ffn = {name: config[common] for name, common in _FFN.items() if common in config}
    ffn |= {
        "ffn_act_fn": {"name": config["hidden_act"]}, "moe_normalize_expert_weights": 1.0 if config.get("norm_topk_prob", True) else None,
    }  # fmt: skip
    return out | {"attn_config": attention, "ffn_config": ffn}


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.boolean("tie_word_embeddings", False):
        raise fields.fail("tie_word_embeddings", "must be false for this family")
    return {"norm": NormSpec(kind="layer"), "clip_qkv": fields.optional_number("clip_qkv")}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"clip_qkv": spec.clip_qkv}


def _routing(fields: Fields) -> RoutingRule:
    return RoutingRule(expert_weighting_normalization=fields.boolean("norm_topk_prob", True))


def _routing_config(rule: RoutingRule) -> dict[str, Any]:
    return {"norm_topk_prob": rule.expert_weighting_normalization}


_QKV = Part(name="norm_attn_norm.attn.Wqkv.weight", stacked=("w_q", "w_k", "w_v"))

DBRX = Family(
    model_type="dbrx", architecture="DbrxForCausalLM", max_position_embeddings=2048, rms_norm_eps=_EPS, windows=full,
    window_config=no_window, flatten=_flatten, nest=_nest,
    moe=MoeRules(count="num_local_experts", width="intermediate_size", routing=_routing, routing_config=_routing_config),
    read=_read, write=_write,
    published=MappingProxyType(
        {
            **{f"`{common}`": f"`{name}`" for name, common in _SIZES.items()},
            **{f"`{common}`": f"`ffn_config`: `{name}`" for name, common in _FFN.items()},
            "`num_key_value_heads`": "`attn_config`: `kv_n_heads`", "`clip_qkv`": "`attn_config`: `clip_qkv`",
            "`hidden_act`": "`ffn_config`: `ffn_act_fn`: `name`", "`moe_intermediate_size`": "`ffn_config`: `ffn_hidden_size`",
        }
    ),
    names=named(
        embed="transformer.wte.weight", layer="transformer.blocks.{n}.", final_norm="transformer.norm_f.weight",
        attn_norm="norm_attn_norm.norm_1.weight", ffn_norm="norm_attn_norm.norm_2.weight", w_q=_QKV, w_k=_QKV, w_v=_QKV,
        w_o="norm_attn_norm.attn.out_proj.weight", router="ffn.router.layer.weight",
        experts__w_gate=Part(name="ffn.experts.mlp.w1", experts="rows"), experts__w_up=Part(name="ffn.experts.mlp.v1", experts="rows"),
        experts__w_down=Part(name="ffn.experts.mlp.w2", experts="rows", transposed=True),
    ),
)  # fmt: skip

"""Model families as Hugging Face publishes them: what sets one apart, declared; how to read config.json and name tensors follows from it.

Defaults of absent fields are those of the families' configuration classes in transformers 5, but the sizes that define a model have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import Part, ffn_names, named
from wse_emu.checkpoint.windows import (
    every_layer,
    every_other_below,
    full,
    no_window,
    pattern_config,
    pattern_of,
    plain_window,
    switched,
    switched_window,
)  # fmt: skip
from wse_emu.foundation.arguments import show
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.errors import ConfigError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import NormSpec, QkNorm
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.foundation.scales import Scales
from wse_emu.foundation.shared_experts import SharedExperts


def _normed_heads(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Every head's queries and keys are normalised."""
    return {"qk_norm": QkNorm()}


def _read_qwen2_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    shared = SharedExperts(intermediate_size=fields.integer("shared_expert_intermediate_size", 5632), gated=True)
    return {"biases": Biases(qkv=fields.boolean("qkv_bias", True)), "shared_experts": shared}


def _write_qwen2_moe(spec: ModelSpec) -> dict[str, Any]:
    width = {} if spec.shared_experts is None else {"shared_expert_intermediate_size": spec.shared_experts.intermediate_size}
    return {"qkv_bias": spec.biases.qkv, **width}


def _read_olmoe(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"qk_norm": QkNorm(over="row"), "clip_qkv": fields.optional_number("clip_qkv")}


def _write_olmoe(spec: ModelSpec) -> dict[str, Any]:
    return {"clip_qkv": spec.clip_qkv}


def _read_granite(fields: Fields, num_layers: int) -> dict[str, Any]:
    published = {"embedding": "embedding_multiplier", "residual": "residual_multiplier", "attention": "attention_multiplier"}
    values = {name: fields.number(field, 1.0) for name, field in published.items()}
    return {"scales": Scales(**values, logits=fields.number("logits_scaling", 1.0))}


def _write_granite(spec: ModelSpec) -> dict[str, Any]:
    scales = spec.scales
    return {
        "embedding_multiplier": scales.embedding, "residual_multiplier": scales.residual, "attention_multiplier": spec.attention_scale,
        "logits_scaling": scales.logits,
    }  # fmt: skip


def _read_gemma(fields: Fields, num_layers: int, logits_cap: float | None, scores_cap: float | None) -> dict[str, Any]:
    if fields.get("use_bidirectional_attention", None):
        raise fields.fail("use_bidirectional_attention", "must be false: attention is causal")
    if fields.get("attn_logit_softcapping", scores_cap) is not None:
        raise fields.fail("attn_logit_softcapping", "must be null; a cap of the scores is not supported")
    if fields.get("final_logit_softcapping", logits_cap) is not None:
        logits_cap = fields.number("final_logit_softcapping", logits_cap)
    else:
        logits_cap = None
    embedding, attention = float(fields.integer("hidden_size")) ** 0.5, fields.number("query_pre_attn_scalar", 256) ** -0.5
    scales = Scales(embedding=embedding, attention=attention, logits_cap=logits_cap)
    return {"norm": NormSpec(unit_offset=True, after=True), "scales": scales}


def _read_gemma2(fields: Fields, num_layers: int) -> dict[str, Any]:
    return _read_gemma(fields, num_layers, 30.0, 50.0)


def _read_gemma3(fields: Fields, num_layers: int) -> dict[str, Any]:
    rope = fields.object("rope_parameters")
    local = None if rope is None else rope.object("sliding_attention")
    if local is not None and local.get("rope_type", "default") != "default":
        raise local.fail("rope_type", "must be 'default' in layers with a window")
    theta = fields.number("rope_local_base_freq", 1e4) if local is None else local.number("rope_theta", 1e4)
    rotary = RotarySpec(local_theta=theta if pattern_of(6)(fields, num_layers)[1] else None)
    return {**_read_gemma(fields, num_layers, None, None), "qk_norm": QkNorm(), "rotary": rotary}


def _write_gemma(spec: ModelSpec) -> dict[str, Any]:
    scalar = round(spec.attention_scale**-2, 9)
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": spec.scales.logits_cap}
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, **caps}


def _write_gemma3(spec: ModelSpec) -> dict[str, Any]:
    local = {} if spec.rotary.local_theta is None else {"rope_local_base_freq": spec.rotary.local_theta}
    return {**_write_gemma(spec), **local}


_GEMMA = named(
    attn_after_norm="post_attention_layernorm.weight", ffn_norm="pre_feedforward_layernorm.weight",
    ffn_after_norm="post_feedforward_layernorm.weight",
)  # fmt: skip


def _mixtral_routing(fields: Fields) -> RoutingRule:
    return ROUTING_PRESETS["mixtral"]


def _fixed_routing(rule: RoutingRule) -> dict[str, Any]:
    """Nothing of the rule is written: the family has one only."""
    return {}


def _qwen_routing(fields: Fields) -> RoutingRule:
    return RoutingRule(expert_weighting_normalization=fields.boolean("norm_topk_prob", False))


def _qwen_routing_config(rule: RoutingRule) -> dict[str, Any]:
    return {"norm_topk_prob": rule.expert_weighting_normalization}


def _by_type(*families: Family) -> Mapping[str, Family]:
    return MappingProxyType({family.model_type: family for family in families})


FAMILIES: Mapping[str, Family] = _by_type(
    Family(
        model_type="llama", architecture="LlamaForCausalLM", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        attention_bias=True, windows=full, window_config=no_window,
    ),
    Family(
        model_type="mistral", architecture="MistralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, bos_token_id=1,
        eos_token_id=2, windows=every_layer(4096), window_config=plain_window,
    ),
    Family(
        model_type="mixtral", architecture="MixtralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_theta=1e6, bos_token_id=1, eos_token_id=2, windows=every_layer(None), window_config=plain_window,
        moe=MoeRules(
            count="num_local_experts", default_num_experts=8, default_top_k=2, width="intermediate_size", routing=_mixtral_routing,
            routing_config=_fixed_routing,
        ),
        names=named(
            router="block_sparse_moe.gate.weight", router_bias="block_sparse_moe.gate.bias",
            e_score_correction_bias="block_sparse_moe.gate.e_score_correction_bias",
            **ffn_names("experts.", "block_sparse_moe.experts.{e}.", gate="w1", up="w3", down="w2"),
        ),
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", head_dim=128, max_position_embeddings=32_768, attention_bias=True,
        read=_normed_heads,
        windows=switched(first="max_window_layers"), window_config=switched_window,
    ),
    Family(
        model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", num_kv_heads=4, max_position_embeddings=32_768,
        attention_bias=True, read=_normed_heads,
        windows=switched(first=None), window_config=switched_window,
        moe=MoeRules(
            count="num_experts", default_num_experts=128, default_top_k=8, width="moe_intermediate_size", mixed=True,
            routing=_qwen_routing, routing_config=_qwen_routing_config,
        ),
    ),
    Family(
        model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", num_kv_heads=16, max_position_embeddings=32_768,
        windows=every_other_below("max_window_layers", 28), window_config=switched_window,
        moe=MoeRules(
            count="num_experts", default_num_experts=60, default_top_k=4, width="moe_intermediate_size", mixed=True,
            routing=_qwen_routing, routing_config=_qwen_routing_config,
        ),
        read=_read_qwen2_moe, write=_write_qwen2_moe,
        names=named(**ffn_names("shared.", "mlp.shared_expert."), shared__gate="mlp.shared_expert_gate.weight"),
    ),
    Family(
        model_type="olmoe", architecture="OlmoeForCausalLM", max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=50_279,
        attention_bias=True, windows=full, window_config=no_window,
        moe=MoeRules(
            count="num_experts", default_num_experts=64, default_top_k=8, width="intermediate_size", routing=_qwen_routing,
            routing_config=_qwen_routing_config,
        ),
        read=_read_olmoe, write=_write_olmoe,
    ),
    Family(
        model_type="granitemoe", architecture="GraniteMoeForCausalLM", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        attention_bias=True, windows=full, window_config=no_window,
        moe=MoeRules(
            count="num_local_experts", default_num_experts=8, default_top_k=2, width="intermediate_size", routing=_mixtral_routing,
            routing_config=_fixed_routing,
        ),
        read=_read_granite, write=_write_granite,
        names=named(
            router="block_sparse_moe.router.layer.weight",
            experts__w_gate=Part(name="block_sparse_moe.input_linear.weight", stacked=("w_gate", "w_up"), experts="axis"),
            experts__w_up=Part(name="block_sparse_moe.input_linear.weight", stacked=("w_gate", "w_up"), experts="axis"),
            experts__w_down=Part(name="block_sparse_moe.output_linear.weight", experts="axis"),
        ),
    ),
    Family(
        model_type="gemma2", architecture="Gemma2ForCausalLM", num_kv_heads=4, head_dim=256, max_position_embeddings=8192, bos_token_id=2,
        eos_token_id=1, attention_bias=True, tie_word_embeddings=True, activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows=pattern_of(2), window_config=pattern_config, read=_read_gemma2, write=_write_gemma, names=_GEMMA,
    ),
    Family(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", num_kv_heads=4, head_dim=256, max_position_embeddings=131_072,
        rope_theta=1e6, rope_by_type=True, bos_token_id=2, eos_token_id=1, attention_bias=True, tie_word_embeddings=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"), windows=pattern_of(6), window_config=pattern_config,
        read=_read_gemma3, write=_write_gemma3, names=_GEMMA,
    ),
)  # fmt: skip
"""``model_type`` to family."""

ARCHITECTURES: Mapping[str, str] = MappingProxyType({family.architecture: family.model_type for family in FAMILIES.values()})
"""Architecture (``architectures`` of config.json) to family (``model_type``)."""


def family_of(fields: Fields) -> Family:
    """Family that a config.json names, by ``architectures`` or else by ``model_type``.

    Raises
    ------
    ConfigError
        If it names none that is known, or two; the message lists the known ones.
    """
    known = ", ".join(f"{a} ({f})" for a, f in ARCHITECTURES.items())
    model_type = fields.get("model_type", None)
    architectures = fields.get("architectures", None)
    if architectures is not None:
        if not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
            raise fields.fail("architectures", "must be a list of names")
        unknown = [a for a in architectures if a not in ARCHITECTURES]
        if unknown:
            raise ConfigError(f"{fields.where}: unknown architecture {show(unknown[0])}; known are {known}")
        families = {ARCHITECTURES[a] for a in architectures}
        if len(families) > 1:
            raise fields.fail("architectures", "must name one family")
        family = families.pop()
        if model_type is not None and model_type != family:
            raise fields.fail("model_type", f"must be {family!r} for architecture {architectures[0]}")
        return FAMILIES[family]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type is None:
            raise ConfigError(f"{fields.where}: neither `architectures` nor `model_type` is there; known architectures are {known}")
        raise ConfigError(f"{fields.where}: unknown `model_type` {show(model_type)}; known architectures are {known}")
    return FAMILIES[model_type]

"""Gemma 2 and 3, text."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import named
from wse_emu.checkpoint.windows import pattern_config, pattern_of
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.norm_spec import NormSpec, QkNorm
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.scales import Scales


def _read_gemma(fields: Fields, num_layers: int, logits_cap: float | None, scores_cap: float | None) -> dict[str, Any]:
    if fields.get("use_bidirectional_attention", None):
        raise fields.fail("use_bidirectional_attention", "must be false: attention is causal")
    if scores_cap is None and fields.given("attn_logit_softcapping"):
        raise fields.fail("attn_logit_softcapping", "must be null: scores of this family have no cap")
    of_scores, of_logits = ("attn_logit_softcapping", scores_cap), ("final_logit_softcapping", logits_cap)
    scores_cap, logits_cap = (None if fields.get(*of) is None else fields.number(*of) for of in (of_scores, of_logits))
    embedding, attention = float(fields.integer("hidden_size")) ** 0.5, fields.number("query_pre_attn_scalar", 256) ** -0.5
    scales = Scales(embedding=embedding, attention=attention, scores_cap=scores_cap, logits_cap=logits_cap)
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
    caps = {"attn_logit_softcapping": spec.scales.scores_cap, "final_logit_softcapping": spec.scales.logits_cap}
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, **caps}


def _write_gemma3(spec: ModelSpec) -> dict[str, Any]:
    local = {} if spec.rotary.local_theta is None else {"rope_local_base_freq": spec.rotary.local_theta}
    return {**_write_gemma(spec), **local}


_PUBLISHED = MappingProxyType(
    {
        "`scores_cap` of `scales`": "`attn_logit_softcapping`", "`logits_cap` of `scales`": "`final_logit_softcapping`",
        "`attention` of `scales`": "`query_pre_attn_scalar` to the power of -0.5", "`local_theta`": "`rope_local_base_freq`",
    }
)
_GEMMA = named(
    attn_after_norm="post_attention_layernorm.weight", ffn_norm="pre_feedforward_layernorm.weight",
    ffn_after_norm="post_feedforward_layernorm.weight",
)  # fmt: skip


GEMMA2 = Family(
    model_type="gemma2", architecture="Gemma2ForCausalLM", num_kv_heads=4, head_dim=256, max_position_embeddings=8192, bos_token_id=2,
    eos_token_id=1, attention_bias=Biases(qkv=True, out=True), tie_word_embeddings=True,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    windows=pattern_of(2), window_config=pattern_config, read=_read_gemma2, write=_write_gemma, names=_GEMMA,
    published=_PUBLISHED,
)  # fmt: skip


GEMMA3_TEXT = Family(
    model_type="gemma3_text", architecture="Gemma3ForCausalLM", num_kv_heads=4, head_dim=256, max_position_embeddings=131_072,
    rope_theta=1e6, rope_by_type=True, bos_token_id=2, eos_token_id=1, attention_bias=Biases(qkv=True, out=True), tie_word_embeddings=True,
    activation=("hidden_activation", "gelu_pytorch_tanh"), windows=pattern_of(6), window_config=pattern_config,
    read=_read_gemma3, write=_write_gemma3, names=_GEMMA,
    published=_PUBLISHED,
)  # fmt: skip

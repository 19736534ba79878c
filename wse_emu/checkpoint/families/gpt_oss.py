"""gpt-oss: attention sinks, a window in every other layer, biases everywhere, experts whose gate is clamped."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import Part, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.checkpoint.windows import pattern_config, pattern_of
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import ROUTING_PRESETS


def _read(fields: Fields, num_layers: int) -> dict[str, Any]:
    biased = fields.boolean("attention_bias", True)
    clamped = ClampedExperts(alpha=fields.number("swiglu_alpha", 1.702), limit=fields.number("swiglu_limit", 7.0))
    return {"attn_sinks": True, "biases": Biases(qkv=biased, out=biased), "clamped_experts": clamped}


def _write(spec: ModelSpec) -> dict[str, Any]:
    clamped = spec.clamped_experts or ClampedExperts()
    return {"swiglu_alpha": clamped.alpha, "swiglu_limit": clamped.limit}


_GATE_UP = Part(name="mlp.experts.gate_up_proj", stacked=("w_gate", "w_up"), interleaved=True, experts="axis", transposed=True)
_GATE_UP_BIAS = Part(name="mlp.experts.gate_up_proj_bias", stacked=("b_gate", "b_up"), interleaved=True, experts="axis")

GPT_OSS = Family(
    model_type="gpt_oss", architecture="GptOssForCausalLM", num_kv_heads=8, head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5,
    rope_theta=150_000.0,
    rope_scaling=MappingProxyType(
        {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    ),
    attention_bias=Biases(qkv=True, out=True), windows=pattern_of(2, window=128), window_config=pattern_config,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=128, default_top_k=4, width="intermediate_size",
        routing=fixed_routing(ROUTING_PRESETS["gpt_oss"]), routing_config=fixed_routing_config,
    ),
    read=_read, write=_write,
    published=MappingProxyType({f"`{name}` of `clamped_experts`": f"`swiglu_{name}`" for name in ("alpha", "limit")}),
    quant_methods=("mxfp4", "fp8"),
    names=named(
        sinks="self_attn.sinks", router="mlp.router.weight", router_bias="mlp.router.bias",
        experts__w_gate=_GATE_UP, experts__w_up=_GATE_UP, experts__b_gate=_GATE_UP_BIAS, experts__b_up=_GATE_UP_BIAS,
        experts__w_down=Part(name="mlp.experts.down_proj", experts="axis", transposed=True),
        experts__b_down=Part(name="mlp.experts.down_proj_bias", experts="axis"),
    ),
)  # fmt: skip

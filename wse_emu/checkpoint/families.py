"""Model families as Hugging Face publishes them: what sets one apart, declared; how to read config.json and name tensors follows from it.

Defaults of absent fields are those of the families' configuration classes in transformers 5, but the sizes that define a model have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeRules:
    """How a family writes its mixtures of experts."""

    block: str
    """Prefix of a layer's router and experts, below ``model.layers.N.``."""
    gate: str
    up: str
    down: str
    """Names of one expert's three matrices."""
    count: str
    """Field that released configurations use for the number of experts; ``num_local_experts`` and ``num_experts`` are read alike."""
    default_num_experts: int
    default_top_k: int
    width: str
    """Field that holds the width of one expert."""
    routing: Callable[[Fields], RoutingRule]
    """Reads the routing rule."""
    routing_config: Callable[[RoutingRule], dict[str, Any]]
    """Writes what of it is not the family's own."""
    mixed: bool = False
    """Whether ``mlp_only_layers`` and ``decoder_sparse_step`` may make layers dense."""


Windows = tuple[int | None, tuple[int, ...]]
"""Sliding window and the layers that have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family: what sets it apart from a Llama."""

    model_type: str
    architecture: str
    num_kv_heads: int | None = None
    """Default; None is as many as query heads."""
    head_dim: int | None = None
    """Default; None follows from ``hidden_size``."""
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    windows: Callable[[Fields, int], Windows]
    """Reads the sliding window and its layers; takes the fields and the number of layers."""
    window_config: Callable[[ModelSpec], dict[str, Any]]
    """Writes them."""
    qk_norm: bool = False
    moe: MoeRules | None = None


def _layer_types(fields: Fields, num_layers: int) -> tuple[int, ...] | None:
    """Layers that ``layer_types`` calls sliding, None where the field is absent."""
    types = fields.get("layer_types", None)
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(t not in known for t in types):
        raise fields.fail("layer_types", f"must name {' or '.join(known)} for each of {num_layers} layers")
    return tuple(i for i, t in enumerate(types) if t == "sliding_attention")


def _full(fields: Fields, num_layers: int) -> Windows:
    """Every layer sees everything."""
    if _layer_types(fields, num_layers):
        raise fields.fail("layer_types", "must name 'full_attention' only for this family")
    return None, ()


def _every_layer(default: int | None) -> Callable[[Fields, int], Windows]:
    """One window for all layers, if there is one."""

    def read(fields: Fields, num_layers: int) -> Windows:
        window = None if fields.get("sliding_window", default) is None else fields.integer("sliding_window", default)
        layers = () if window is None else tuple(range(num_layers))
        if _layer_types(fields, num_layers) not in (None, layers):
            kind = "sliding_attention" if layers else "full_attention"
            raise fields.fail("layer_types", f"must name {kind!r} only: `sliding_window` is {show(window)}")
        return window, layers

    return read


def _switched(*, first: str | None) -> Callable[[Fields, int], Windows]:
    """A window only if ``use_sliding_window`` says so: from layer `first` (a field) on, or as ``layer_types`` says; None is all layers."""

    def read(fields: Fields, num_layers: int) -> Windows:
        types = _layer_types(fields, num_layers)
        if not fields.boolean("use_sliding_window", False) or fields.get("sliding_window", 4096) is None:
            if types:
                raise fields.fail("layer_types", "names sliding layers, but there is no window (`use_sliding_window`, `sliding_window`)")
            return None, ()
        window = fields.integer("sliding_window", 4096)
        layers = tuple(range(0 if first is None else min(num_layers, fields.integer(first, 28, low=0)), num_layers))
        if types is not None and first is None and types != layers:
            raise fields.fail("layer_types", "must name 'sliding_attention' only for this family with `use_sliding_window`")
        layers = layers if types is None else types
        return (window, layers) if layers else (None, ())

    return read


def _no_window(spec: ModelSpec) -> dict[str, Any]:
    return {}


def _plain_window(spec: ModelSpec) -> dict[str, Any]:
    return {"sliding_window": spec.sliding_window}


def _switched_window(spec: ModelSpec) -> dict[str, Any]:
    kinds = ["sliding_attention" if spec.window(i) is not None else "full_attention" for i in range(spec.num_layers)]
    return {"use_sliding_window": spec.sliding_window is not None, "sliding_window": spec.sliding_window, "layer_types": kinds}


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
        windows=_full, window_config=_no_window,
    ),
    Family(
        model_type="mistral", architecture="MistralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, bos_token_id=1,
        eos_token_id=2, windows=_every_layer(4096), window_config=_plain_window,
    ),
    Family(
        model_type="mixtral", architecture="MixtralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_theta=1e6, bos_token_id=1, eos_token_id=2, windows=_every_layer(None), window_config=_plain_window,
        moe=MoeRules(
            block="block_sparse_moe.", gate="w1", up="w3", down="w2", count="num_local_experts", default_num_experts=8, default_top_k=2,
            width="intermediate_size", routing=_mixtral_routing, routing_config=_fixed_routing,
        ),
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", head_dim=128, max_position_embeddings=32_768, qk_norm=True,
        windows=_switched(first="max_window_layers"), window_config=_switched_window,
    ),
    Family(
        model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", num_kv_heads=4, max_position_embeddings=32_768, qk_norm=True,
        windows=_switched(first=None), window_config=_switched_window,
        moe=MoeRules(
            block="mlp.", gate="gate_proj", up="up_proj", down="down_proj", count="num_experts", default_num_experts=128, default_top_k=8,
            width="moe_intermediate_size", mixed=True, routing=_qwen_routing, routing_config=_qwen_routing_config,
        ),
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

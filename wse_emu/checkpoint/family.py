"""What sets one family of models apart from a Llama, as a declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.dense_layers import never
from wse_emu.checkpoint.fields import Fields
from wse_emu.checkpoint.naming import LLAMA, Names
from wse_emu.checkpoint.windows import Windows
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import RoutingRule


def nothing_read(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Nothing more than any Llama has."""
    return {}


def nothing_written(spec: ModelSpec) -> dict[str, Any]:
    """Nothing more than any Llama has."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeRules:
    """How a family writes its mixtures of experts."""

    count: str
    """Field that released configurations use for the number of experts; ``num_local_experts`` and ``num_experts`` are read alike."""
    default_num_experts: int | None = None
    """None: the field must be there."""
    top_k: str = "num_experts_per_tok"
    """Field that released configurations use for the experts of a token; ``num_experts_per_tok`` is read alike."""
    default_top_k: int | None = None
    """None: the field must be there."""
    width: str
    """Field that holds the width of one expert."""
    routing: Callable[[Fields], RoutingRule]
    """Reads the routing rule."""
    routing_config: Callable[[RoutingRule], dict[str, Any]]
    """Writes what of it is not the family's own."""
    dense: Callable[[Fields, int], tuple[int, ...]] = never
    """Reads which layers are dense; takes the fields and the number of layers."""
    dense_config: Callable[[ModelSpec], dict[str, Any]] = nothing_written
    """Writes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family: what sets it apart from a Llama."""

    model_type: str
    architecture: str
    num_kv_heads: int | None = None
    """Default; None is as many as query heads."""
    head_dim: int | None = None
    """Default; None follows from ``hidden_size``."""
    head_dim_field: str = "head_dim"
    """Field that holds it; where that is another one, transformers does not look at ``head_dim``."""
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    windows: Callable[[Fields, int], Windows]
    """Reads the sliding window and its layers; takes the fields and the number of layers."""
    window_config: Callable[[ModelSpec], dict[str, Any]]
    """Writes them."""
    rope_scaling: Mapping[str, Any] | None = None
    """Default ``rope_scaling``; None is none."""
    rope_by_type: bool = False
    """Whether ``rope_parameters`` may hold those of each kind of layer."""
    partial_rotary: float | None = None
    """Default share of a head that is rotated; None: all of it, whatever the fields say."""
    rope_alpha: bool = False
    """Whether ``alpha`` of a "dynamic" scaling stretches the base once for all lengths (Hunyuan)."""
    rope_mscales: bool = False
    """Whether ``longrope`` is the only kind of scaling, with ``short_mscale`` and ``long_mscale``."""
    attention_bias: Biases | None = None
    """Biases that ``attention_bias`` gives; None: it must be false."""
    tie_word_embeddings: bool = False
    """Default."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Field that holds the activation, and its default."""
    moe: MoeRules | None = None
    read: Callable[[Fields, int], dict[str, Any]] = nothing_read
    """What else sets it apart: takes the fields and the number of layers, gives fields of a `ModelSpec`."""
    write: Callable[[ModelSpec], dict[str, Any]] = nothing_written
    """The same in config.json."""
    flatten: Callable[[Fields], dict[str, Any]] | None = None
    """Fields that config.json has under other names or in objects of its own, under the usual names; None: it has the usual ones."""
    nest: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """The reverse, of a whole config.json."""
    names: Names = field(default_factory=lambda: LLAMA)
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that transformers ignores too."""
    published: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """How errors about a spec call a thing, to how config.json does, where the two differ; text between backquotes and around."""
    unread: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Fields that transformers does not look at, each with the values that say what it computes; others are named."""
    quant_methods: tuple[str, ...] = ("fp8",)
    """What ``quant_method`` of ``quantization_config`` may say."""
    predicts_further: bool = False
    """Whether there may be layers behind the last one, which predict further tokens: transformers leaves them out."""

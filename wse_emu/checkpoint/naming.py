"""How a family names its tensors: a name for every role, or the part of a tensor that several roles share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A role that lies in a larger tensor."""

    name: str
    """Of the tensor, below the layer's prefix."""
    stacked: tuple[str, ...] = ()
    """Roles whose outputs follow one another in it, this one included; () where it holds one role."""
    interleaved: bool = False
    """Whether their outputs alternate instead."""
    experts: Literal["", "axis", "rows"] = ""
    """Whether it holds all experts: on a first axis of its own, or their rows one below the other."""
    one_row: bool = False
    """Whether a vector lies in it as a matrix of one row."""
    transposed: bool = False
    """Whether it is stored (in, out); published matrices are (out, in) otherwise."""


Names = Mapping[str, "str | Part"]
"""Role (``experts.`` and ``shared.`` before those of experts) to its name below ``layer``; ``{e}`` in it is the expert."""

_GATED = ("gate", "up", "down")


def ffn_names(role: str, prefix: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, str | Part]:
    """Names of the three matrices of a feed-forward network."""
    return {f"{role}w_{kind}": f"{prefix}{name}.weight" for kind, name in zip(_GATED, (gate, up, down), strict=True)}


_MEMORY = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
"""Projections of memory tokens, as ModelZoo names its modules."""

LLAMA: Names = MappingProxyType(
    {
        "embed": "model.embed_tokens.weight",
        "memory_embed": "model.memory_token_embedding.weight",
        "layer": "model.layers.{n}.",
        "final_norm": "model.norm.weight",
        "final_norm_bias": "model.norm.bias",
        "lm_head": "lm_head.weight",
        "lm_head_bias": "lm_head.bias",
        "attn_norm": "input_layernorm.weight",
        "attn_norm_bias": "input_layernorm.bias",
        **{f"w_{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"b_{x}": f"self_attn.{x}_proj.bias" for x in "qkvo"},
        **{f"memory.w_{x}": f"self_attn.proj_{name}_memory_tokens_layer.weight" for x, name in _MEMORY},
        **{f"memory.b_{x}": f"self_attn.proj_{name}_memory_tokens_layer.bias" for x, name in _MEMORY},
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "ffn_norm_bias": "post_attention_layernorm.bias",
        **ffn_names("", "mlp."),
        "router": "mlp.gate.weight",
        "router_bias": "mlp.gate.bias",
        "e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        **ffn_names("experts.", "mlp.experts.{e}."),
        **ffn_names("shared.", "mlp.shared_experts."),
    }
)
"""What most families share."""


def named(**changes: str | Part) -> Names:
    """`LLAMA` with other names; in a role's name ``__`` stands for the dot."""
    return MappingProxyType({**LLAMA, **{role.replace("__", "."): name for role, name in changes.items()}})

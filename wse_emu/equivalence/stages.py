"""Which stages a record must hold, of which shape, from which inputs, and where on the wafer their elements lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import Stage, TapRecord

PROJECTED = ("attn_norm", "q", "k", "v")
HEAD_NORMS = ("q_norm", "k_norm")
ATTENTION = (
    "q_rope", "k_rope", "attn_max", "attn_denominator", "attn_context", "attn_out", "attn_residual", "ffn_norm",
)  # fmt: skip
MOE = ("router_logits", "topk_ids", "topk_weights", "expert_hidden", "expert_out", "ffn_out", "layer_out")
DENSE = ("ffn_hidden", "ffn_out", "layer_out")

INPUTS: Mapping[str, tuple[str, ...]] = {
    "embedding": (),
    "attn_norm": ("input",),
    "q": ("attn_norm",),
    "k": ("attn_norm",),
    "v": ("attn_norm",),
    "q_norm": ("q",),
    "k_norm": ("k",),
    "attn_max": ("q_rope", "k_rope"),
    "attn_denominator": ("q_rope", "k_rope", "attn_max"),
    "attn_context": ("q_rope", "k_rope", "v", "attn_max", "attn_denominator"),
    "attn_out": ("attn_context",),
    "attn_residual": ("input", "attn_out"),
    "ffn_norm": ("attn_residual",),
    "router_logits": ("ffn_norm",),
    "topk_ids": ("ffn_norm", "router_logits"),
    "topk_weights": ("router_logits", "topk_ids"),
    "expert_hidden": ("ffn_norm", "topk_ids"),
    "expert_out": ("expert_hidden", "topk_ids"),
    "ffn_hidden": ("ffn_norm",),
    "layer_out": ("attn_residual", "ffn_out"),
    "final_norm": ("input",),
    "logits": ("final_norm",),
}
"""Stage to the stages it is computed from; "input" is what enters the layer. Those of "q_rope", "k_rope", "ffn_out" and, where
scores are not learned, the decision depend on the model: `inputs_of`."""

HIDDEN = frozenset(("embedding", "attn_norm", "attn_out", "attn_residual", "ffn_norm", "expert_out", "ffn_out", "layer_out", "final_norm"))
"""Stages whose last axis is the hidden one."""


def expected_stages(spec: ModelSpec) -> list[Stage]:
    """Every stage of a forward pass, in the order in which they run."""
    out: list[Stage] = [(None, "embedding")]
    for layer in range(spec.num_layers):
        network = (MOE if spec.routing.is_learned else MOE[1:]) if spec.is_moe_layer(layer) else DENSE
        names = PROJECTED + (HEAD_NORMS if spec.qk_norm else ()) + ATTENTION + network
        out.extend((layer, name) for name in names)
    return [*out, (None, "final_norm"), (None, "logits")]


def stage_shape(spec: ModelSpec, name: str, n_tokens: int) -> tuple[int, ...]:
    """Shape of a stage's value; the first axis is the tokens."""
    if name in HIDDEN and name != "expert_out":
        return (n_tokens, spec.hidden_size)
    return (
        n_tokens,
        *{
            "q": (spec.num_heads, spec.head_dim),
            "k": (spec.num_kv_heads, spec.head_dim),
            "v": (spec.num_kv_heads, spec.head_dim),
            "q_norm": (spec.num_heads, spec.head_dim),
            "k_norm": (spec.num_kv_heads, spec.head_dim),
            "q_rope": (spec.num_heads, spec.head_dim),
            "k_rope": (spec.num_kv_heads, spec.head_dim),
            "attn_max": (spec.num_heads,),
            "attn_denominator": (spec.num_heads,),
            "attn_context": (spec.num_heads * spec.head_dim,),
            "router_logits": (spec.num_experts,),
            "topk_ids": (spec.top_k,),
            "topk_weights": (spec.top_k,),
            "expert_hidden": (spec.top_k, spec.moe_intermediate_size),
            "expert_out": (spec.top_k, spec.hidden_size),
            "ffn_hidden": (spec.intermediate_size,),
            "logits": (spec.vocab_size,),
        }[name],
    )


def stage_dtype(name: str) -> np.dtype[Any]:
    """Dtype of a stage's value: int64 for expert ids, float32 for all else."""
    return np.dtype(np.int64 if name == "topk_ids" else np.float32)


def inputs_of(spec: ModelSpec, stage: Stage) -> tuple[Stage, ...]:
    """Stages that `stage` is computed from."""
    layer, name = stage
    if name == "ffn_out":
        assert layer is not None
        names: tuple[str, ...] = ("topk_ids", "topk_weights", "expert_out") if spec.is_moe_layer(layer) else ("ffn_hidden",)
    elif name == "expert_hidden" and spec.routing.probability_before_ffn:
        names = ("ffn_norm", "topk_ids", "topk_weights")
    elif name in ("topk_ids", "topk_weights") and not spec.routing.is_learned:
        names = () if name == "topk_ids" else ("topk_ids",)
    elif name in ("q_rope", "k_rope"):
        names = (name[0] + "_norm" if spec.qk_norm else name[0],)
    else:
        names = INPUTS[name]
    entering = spec.num_layers if layer is None else layer
    before: Stage = (None, "embedding") if entering == 0 else (entering - 1, "layer_out")
    return tuple(before if n == "input" else (layer, n) for n in names)


def expert_of(name: str, element: tuple[int, ...], topk_ids: NDArray[np.int64] | None, token: int) -> int | None:
    """Expert that an element (indices after the token axis) of a stage belongs to, None where there is none."""
    if name == "router_logits":
        return element[0]
    if name in ("topk_ids", "topk_weights", "expert_hidden", "expert_out") and topk_ids is not None:
        return int(topk_ids[token, element[0]])
    return None


def core_of(record: TapRecord, spec: ModelSpec, name: str, token: int, element: tuple[int, ...]) -> tuple[int | None, int | None]:
    """(row, col) of the core that holds an element of a stage; None where the record, or the stage, does not say.

    A row follows from the token; a column from the axis of the stage. Scores' maxima and denominators belong to a whole head: their column
    is the first that holds a part of it. Router stages have a row only: their tokens are spread over its cores.
    """
    row = None if record.row_of_token is None else int(record.row_of_token[token])
    found = _axis_index(spec, name, element)
    if found is None or found[0] not in record.col_starts:
        return row, None
    axis, index = found
    return row, int(np.searchsorted(record.col_starts[axis], index, side="right")) - 1  # of equal starts the last: the others are empty


def _axis_index(spec: ModelSpec, name: str, element: tuple[int, ...]) -> tuple[str, int] | None:
    """Axis of the wafer layout that a stage is split along, and the element's index on it ("heads": row of ``w_o``)."""
    d, half, group = spec.head_dim, spec.head_dim // 2, spec.queries_per_kv
    if name in HIDDEN:
        return "hidden", element[-1]
    if name in ("expert_hidden", "ffn_hidden"):
        return "expert" if name == "expert_hidden" else "ffn", element[-1]
    if name == "logits":
        return "vocab", element[0]
    if name in ("k", "k_norm", "k_rope", "v"):
        return "heads", (element[0] * half + element[1] % half) * group * 2
    if name in ("q", "q_norm", "q_rope", "attn_context", "attn_max", "attn_denominator"):
        head, i = element if len(element) == 2 else divmod(element[0], d) if name == "attn_context" else (element[0], 0)
        return "heads", ((head // group * half + i % half) * group + head % group) * 2 + i // half
    return None

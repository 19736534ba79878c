"""Which stages a record must hold, of which shape, from which inputs, and where on the wafer their elements lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import Stage, TapRecord

PROJECTED = ("attn_norm", "q", "k", "v")
INDEXER = ("index_query", "index_key_a", "index_key", "index_weights", "index_query_rope", "index_key_rope", "index_scores", "index_keys")
"""Of an indexer, behind the other stages of latent attention before attention itself."""
LATENT = ("latent_a", "latent", "query_rope", "rope_key", "query_latent")
"""Of latent attention, before attention itself; queries come first."""
TOUCHED: Mapping[str, str] = {"_norm": "qk", "_clip": "qkv", "_rope": "qk", "_tuned": "q"}
"""What each of `ModelSpec.qkv_suffixes` changes."""
ATTENTION = ("attn_max", "attn_denominator", "attn_context", "attn_out")
ROUTER = ("router_logits", "topk_ids", "topk_weights")
ROUTER_OF_ALL = ("router_logits", "router_scores", "topk_ids", "topk_weights")
"""Where tokens meet: what is compared is a stage of its own."""
SHARED = ("shared_hidden", "shared_out")
EXPERTS = ("expert_hidden", "expert_out")

INPUTS: Mapping[str, tuple[str, ...]] = {
    "embedding": (),
    "attn_norm": ("input",),
    "q": ("attn_norm",),
    "k": ("attn_norm",),
    "v": ("attn_norm",),
    "query_a": ("attn_norm",),
    "query_a_norm": ("query_a",),
    "latent_a": ("attn_norm",),
    "latent": ("latent_a",),
    "query_rope": ("query",),
    "rope_key": ("latent_a",),
    "query_latent": ("query",),
    "index_query": ("query_a_norm",),
    "index_key_a": ("attn_norm",),
    "index_key": ("index_key_a",),
    "index_weights": ("attn_norm",),
    "index_query_rope": ("index_query",),
    "index_key_rope": ("index_key",),
    "index_scores": ("index_query_rope", "index_key_rope", "index_weights"),
    "index_keys": ("index_scores",),
    "attn_out": ("attn_context",),
    "attn_after_norm": ("attn_out",),
    "ffn_norm": ("attn_residual",),
    "router_logits": ("ffn_norm",),
    "router_scores": ("router_logits",),
    "topk_ids": ("ffn_norm", "router_logits"),
    "topk_weights": ("router_logits", "topk_ids"),
    "expert_hidden": ("ffn_norm", "topk_ids"),
    "expert_out": ("expert_hidden", "topk_ids"),
    "ffn_hidden": ("ffn_norm",),
    "shared_hidden": ("ffn_norm",),
    "shared_out": ("shared_hidden",),
    "shared_gate": ("ffn_norm",),
    "ffn_after_norm": ("ffn_out",),
    "final_norm": ("input",),
    "logits": ("final_norm",),
}
"""Stage to the stages it is computed from; "input" is what enters the layer. Those of others depend on the model: `inputs_of`."""

HIDDEN = frozenset(
    (
        "embedding", "attn_norm", "attn_out", "attn_after_norm", "attn_residual", "ffn_norm", "expert_out", "shared_out", "ffn_out",
        "ffn_after_norm", "layer_out", "final_norm",
    )
)  # fmt: skip
"""Stages whose last axis is the hidden one."""


FLOAT32_STAGES = frozenset(
    (
        "attn_max", "attn_denominator", "router_logits", "router_scores", "topk_weights", "shared_out", "shared_gate", "expert_out",
        "logits", "index_scores",
    )
)  # fmt: skip
"""Stages whose values are float32 whatever activations are stored in: sums that are not whole yet, and what leaves the wafer."""


SOFTMAX_STAGES = ("attn_max", "attn_denominator")
"""Of those, the ones that have 16 bits where the state of softmax has."""


def is_stored(name: str) -> bool:
    """Whether a stage's values are stored in the format of activations."""
    return name not in FLOAT32_STAGES and name not in ("topk_ids", "index_keys")


def expected_stages(spec: ModelSpec) -> list[Stage]:
    """Every stage of a forward pass, in the order in which they run."""
    out: list[Stage] = [(None, "embedding")]
    for layer in range(spec.num_layers):
        names = [*PROJECTED] if spec.latent is None else [*_latent(spec.latent)]
        names += INDEXER if spec.runs_indexer(layer) else ()
        for suffix in spec.qkv_suffixes(layer) if spec.latent is None else ():
            names += [name + suffix for name in TOUCHED[suffix]]
        after = spec.norm.after
        names += ATTENTION if spec.latent is None else (*ATTENTION[:2], "attn_latent", *ATTENTION[2:])
        names += [*(["attn_after_norm"] if after else []), "attn_residual", "ffn_norm"]
        names += _mixture(spec) if spec.is_moe_layer(layer) else ["ffn_hidden"]
        names += ["ffn_out", *(["ffn_after_norm"] if after else []), "layer_out"]
        out.extend((layer, name) for name in names)
    return [*out, (None, "final_norm"), (None, "logits")]


def _latent(latent: LatentAttention) -> tuple[str, ...]:
    return ("attn_norm", *(() if latent.q_lora_rank is None else ("query_a", "query_a_norm")), "query", *LATENT)


def _mixture(spec: ModelSpec) -> list[str]:
    shared = [] if spec.shared_experts is None else [*SHARED, *(["shared_gate"] if spec.shared_experts.gated else [])]
    router = ROUTER_OF_ALL if spec.routing.tokens_meet else ROUTER
    return [*(router if spec.routing.is_learned else ROUTER[1:]), *shared, *EXPERTS]


def attended(spec: ModelSpec, layer: int) -> tuple[str, str, str]:
    """Stages of the queries, keys and values that attention uses."""
    q, k, v = (["", *(s for s in spec.qkv_suffixes(layer) if name in TOUCHED[s])][-1] for name in "qkv")
    return "q" + q, "k" + k, "v" + v


def stage_shape(spec: ModelSpec, name: str, n_tokens: int, n_keys: int = 0) -> tuple[int, ...]:
    """Shape of a stage's value; the first axis is the tokens. The longest sequence has `n_keys`."""
    if name in HIDDEN and name != "expert_out":
        return (n_tokens, spec.hidden_size)
    if spec.latent is not None and name in (*_latent(spec.latent), "attn_latent"):
        return (n_tokens, *_latent_shape(spec, spec.latent, name))
    if spec.indexer is not None and name in INDEXER:
        return (n_tokens, *_index_shape(spec.indexer, name, n_keys))
    if of_heads(name):
        return (n_tokens, spec.num_heads if name[0] == "q" else spec.num_kv_heads, spec.head_dim)
    shared = 0 if spec.shared_experts is None else spec.shared_experts.intermediate_size
    return (
        n_tokens,
        *{
            "attn_max": (spec.num_heads,),
            "attn_denominator": (spec.num_heads,),
            "attn_context": (spec.num_heads * spec.value_dim,),
            "router_logits": (spec.num_experts,),
            "router_scores": (spec.num_experts,),
            "topk_ids": (spec.n_slots,),
            "topk_weights": (spec.n_slots,),
            "expert_hidden": (spec.n_slots, spec.moe_intermediate_size),
            "expert_out": (spec.n_slots, spec.hidden_size),
            "ffn_hidden": (spec.intermediate_size,),
            "shared_hidden": (shared,),
            "shared_gate": (1,),
            "logits": (spec.vocab_size,),
        }[name],
    )


def _latent_shape(spec: ModelSpec, latent: LatentAttention, name: str) -> tuple[int, ...]:
    rank, rope, heads = latent.kv_lora_rank, spec.head_dim, spec.num_heads
    if name in ("query_a", "query_a_norm"):
        return (latent.q_lora_rank or 0,)
    return {
        "query": (heads, spec.query_dim),
        "latent_a": (rank + rope,),
        "latent": (rank,),
        "query_rope": (heads, rope),
        "rope_key": (rope,),
        "query_latent": (heads, rank),
        "attn_latent": (heads, rank),
    }[name]


def _index_shape(indexer: Indexer, name: str, n_keys: int) -> tuple[int, ...]:
    if name.startswith("index_query"):
        return (indexer.num_heads, indexer.head_dim)
    if name == "index_weights":
        return (indexer.num_heads,)
    return (n_keys,) if name in ("index_scores", "index_keys") else (indexer.head_dim,)


def of_heads(name: str) -> bool:
    """Whether a stage holds queries, keys or values."""
    return name.partition("_")[0] in ("q", "k", "v")


def stage_dtype(name: str) -> np.dtype[Any]:
    """Dtype of a stage's value: int64 for expert ids, booleans for chosen keys, float32 for all else."""
    return np.dtype({"topk_ids": np.int64, "index_keys": np.bool_}.get(name, np.float32))


def inputs_of(spec: ModelSpec, stage: Stage) -> tuple[Stage, ...]:
    """Stages that `stage` is computed from."""
    layer, name = stage
    names = INPUTS.get(name)
    if name == "expert_hidden" and spec.routing.probability_before_ffn:
        names = ("ffn_norm", "topk_ids", "topk_weights")
    elif name in ("topk_ids", "topk_weights") and not spec.routing.is_learned:
        names = () if name == "topk_ids" else ("topk_ids",)
    elif name == "topk_ids" and spec.routing.tokens_meet:
        names = ("router_scores",)
    if names is None:
        assert layer is not None
        names = _inputs_in_layer(spec, layer, name)
    chosen: tuple[Stage, ...] = ()
    if spec.indexer is not None and layer is not None and name in ("attn_max", "attn_denominator", "attn_latent"):
        chosen = ((chosen_in(spec, layer), "index_keys"),)
    entering = spec.num_layers if layer is None else layer
    before: Stage = (None, "embedding") if entering == 0 else (entering - 1, "layer_out")
    return (*(before if n == "input" else (layer, n) for n in names), *chosen)


def chosen_in(spec: ModelSpec, layer: int) -> int:
    """Layer whose indexer chose the keys that a layer's tokens attend to: itself, or the last one before that has one."""
    return max(i for i in spec.indexer_layers if i <= layer)


def _inputs_in_layer(spec: ModelSpec, layer: int, name: str) -> tuple[str, ...]:
    """The same for stages whose inputs depend on the model."""
    after = spec.norm.after
    if name == "attn_residual":
        return "input", "attn_after_norm" if after else "attn_out"
    if name == "layer_out":
        return "attn_residual", "ffn_after_norm" if after else "ffn_out"
    if name == "ffn_out":
        if not spec.is_moe_layer(layer):
            return ("ffn_hidden",)
        shared = () if spec.shared_experts is None else ("shared_out", *(("shared_gate",) if spec.shared_experts.gated else ()))
        return ("topk_ids", "topk_weights", "expert_out", *shared)
    if spec.latent is not None and name not in ("attn_residual", "layer_out", "ffn_out"):
        return _inputs_of_latent(spec.latent, name)
    q, k, v = attended(spec, layer)
    if name in ATTENTION:
        return {"attn_max": (q, k), "attn_denominator": (q, k, "attn_max"), "attn_context": (q, k, v, "attn_max", "attn_denominator")}[name]
    head, _, suffix = name.partition("_")
    steps = [s for s in spec.qkv_suffixes(layer) if head in TOUCHED[s]]
    at = steps.index("_" + suffix)
    return (head + (steps[at - 1] if at else ""),)


def _inputs_of_latent(latent: LatentAttention, name: str) -> tuple[str, ...]:
    """The same in latent attention."""
    if name == "query":
        return ("attn_norm" if latent.q_lora_rank is None else "query_a_norm",)
    if name == "attn_context":
        return ("attn_latent",)
    read = ("query_latent", "query_rope", "latent", "rope_key")
    return {"attn_max": read, "attn_denominator": (*read, "attn_max"), "attn_latent": (*read, "attn_max", "attn_denominator")}[name]


def expert_of(name: str, element: tuple[int, ...], topk_ids: NDArray[np.int64] | None, token: int) -> int | None:
    """Expert that an element (indices after the token axis) of a stage belongs to, None where there is none."""
    if name in ("router_logits", "router_scores"):
        return element[0]
    if name in ("topk_ids", "topk_weights", "expert_hidden", "expert_out") and topk_ids is not None:
        expert = int(topk_ids[token, element[0]])
        return None if expert < 0 else expert
    return None


def core_of(record: TapRecord, spec: ModelSpec, name: str, token: int, element: tuple[int, ...]) -> tuple[int | None, int | None]:
    """(row, col) of the core that holds an element of a stage; None where the record, or the stage, does not say.

    A row follows from the token; a column from the axis of the stage. Scores' maxima and denominators belong to a whole head: their column
    is the first that holds a part of it. Router stages have a row only: their tokens are spread over its cores.
    """
    in_attention = of_heads(name) or (name != "attn_residual" and name.startswith(("attn_", "query", "latent", "rope_key", "index_")))
    rows = record.row_in_attention if in_attention and record.row_in_attention is not None else record.row_of_token
    row = None if rows is None else int(rows[token])
    found = _axis_index(spec, name, element)
    if found is None or found[0] not in record.col_starts:
        return row, None
    axis, index = found
    return row, int(np.searchsorted(record.col_starts[axis], index, side="right")) - 1  # of equal starts the last: the others are empty


def columns_of(record: TapRecord, spec: ModelSpec, name: str, n: int) -> NDArray[np.int64]:
    """(n,) column of cores of each of the first n elements of a stage; of a stage of heads, of every head's."""
    heads = () if name not in ("query", "attn_latent") else (0,)
    found = [_axis_index(spec, name, (*heads, i)) for i in range(n)]
    starts = {axis[0]: record.col_starts[axis[0]] for axis in found if axis is not None}
    columns = [int(np.searchsorted(starts[axis[0]], axis[1], side="right")) - 1 for axis in found if axis is not None]
    assert len(columns) == n, name
    return np.array(columns, np.int64)


def _axis_index(spec: ModelSpec, name: str, element: tuple[int, ...]) -> tuple[str, int] | None:
    """Axis of the wafer layout that a stage is split along, and the element's index on it ("heads": row of ``w_o``)."""
    d, group = spec.head_dim, spec.queries_per_kv
    if name in HIDDEN:
        return "hidden", element[-1]
    if name in ("expert_hidden", "ffn_hidden", "shared_hidden"):
        return name.removesuffix("_hidden"), element[-1]
    if name == "logits":
        return "vocab", element[0]
    if spec.latent is not None:
        return _axis_of_latent(spec, spec.latent, name, element)
    if of_heads(name) or name in ("attn_context", "attn_max", "attn_denominator"):
        head, i = element if len(element) == 2 else divmod(element[0], d) if name == "attn_context" else (element[0], 0)
        unit, half = (int(x) for x in np.argwhere(spec.rotary.pairs(d) == i)[0])
        if name[0] in "kv":
            return "heads", (head * d // 2 + unit) * group * 2
        return "heads", ((head // group * d // 2 + unit) * group + head % group) * 2 + half
    return None


def _axis_of_latent(spec: ModelSpec, latent: LatentAttention, name: str, element: tuple[int, ...]) -> tuple[str, int] | None:
    """The same in latent attention: "heads" are the pair units of the latent, each with all heads."""
    rank, heads = latent.kv_lora_rank, spec.num_heads
    if name in ("query_a", "query_a_norm"):
        return "query_a", element[0]
    if name in ("attn_max", "attn_denominator"):
        return "heads", 0
    if name == "query" and element[1] < latent.qk_nope_head_dim:
        return "query", element[1]
    if name in ("query_latent", "attn_latent"):
        head, i = element
        return "heads", (i // 2 * heads + head) * 2 + i % 2
    if name in ("latent", "latent_a") and element[0] < rank:
        return "heads", element[0] // 2 * heads * 2
    if name == "attn_context":
        head, i = divmod(element[0], latent.v_head_dim)
        return "values", (i // 2 * heads + head) * 2 + i % 2
    return None

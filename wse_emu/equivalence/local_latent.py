"""The stages of latent attention, each from the run's own inputs, in the absorbed form that the machine computes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.products import Products
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import formulas, rotary, tensors
from wse_emu.reference.weights import PublishedWeights

F64 = NDArray[np.float64]
Bounded = tuple[F64, F64]
"""Exact value and bound of the error, of one shape."""

PROJECTIONS = {"query_a": "w_q_a", "query": "w_q", "latent_a": "w_kv_a"}
"""Stage to the matrix that it is a product with."""


def latent_stage(
    record: TapRecord, spec: ModelSpec, weights: PublishedWeights, products: Products, layer: int, name: str, inputs: list[F64]
) -> Bounded | None:
    """Expected value and bound of one stage of latent attention up to what attention reads, and of "attn_context"; None for any other.

    Parameters
    ----------
    record : TapRecord
    spec : ModelSpec
    weights : PublishedWeights
    products : Products
    layer : int
    name : str
    inputs : list of ndarray, float64
        The run's own inputs of the stage.
    """
    latent = spec.latent
    if latent is None:
        return None
    x, rank, nope = inputs[0], latent.kv_lora_rank, latent.qk_nope_head_dim
    if name in PROJECTIONS:
        role = "w_q_b" if name == "query" and latent.q_lora_rank is not None else PROJECTIONS[name]
        weight = weights.raw(tensors.layer_tensor(spec, layer, role))
        source = "query_a_norm" if role == "w_q_b" else "attn_norm"
        value, bound = products.linear(source, x, weight)
        shape = (len(x), spec.num_heads, spec.query_dim) if name == "query" else value.shape
        return value.reshape(shape), bound.reshape(shape)
    if name in ("query_a_norm", "latent"):
        role, part = ("q_a_norm", x) if name == "query_a_norm" else ("kv_a_norm", x[:, :rank])
        norm = formulas.rms_norm(part, weights.norm(layer, role), latent.norm_eps).astype(np.float64)
        return norm, tolerance.rms_norm_bound(norm)
    if name in ("query_rope", "rope_key"):
        part = x[..., nope:] if name == "query_rope" else x[:, None, rank:]
        angles, factor = rotary.rotary_angles(spec, record.seq, record.pos)
        turned = formulas.rotate(part, angles, factor, interleaved=spec.rotary.interleaved).astype(np.float64)
        bound = tolerance.rotary_bound(part, angles, factor, interleaved=spec.rotary.interleaved)
        return (turned, bound) if name == "query_rope" else (turned[:, 0], bound[:, 0])
    if name == "query_latent":
        return products.per_head("query", x[..., :nope], _of_heads(weights, spec, layer)[:, :nope].transpose(0, 2, 1))
    if name == "attn_context":
        value, bound = products.per_head("attn_latent", x, _of_heads(weights, spec, layer)[:, nope:])
        return value.reshape(len(x), -1), bound.reshape(len(x), -1)
    return None


def attended(record: TapRecord, layer: int) -> tuple[F64, F64, F64]:
    """What attention reads: queries (T, heads, rank + rope), keys (T, 1, rank + rope) and values (T, 1, rank)."""
    stages = {name: record.stages[layer, name].astype(np.float64) for name in ("query_latent", "query_rope", "latent", "rope_key")}
    keys = np.concatenate([stages["latent"], stages["rope_key"]], axis=1)[:, None]
    return np.concatenate([stages["query_latent"], stages["query_rope"]], axis=2), keys, stages["latent"][:, None]


def _of_heads(weights: PublishedWeights, spec: ModelSpec, layer: int) -> F64:
    """``kv_b_proj`` by heads, (heads, nope + v_head_dim, rank)."""
    tensor = weights.layer(layer, "w_kv_b")
    return tensor.reshape(spec.num_heads, -1, tensor.shape[1]).astype(np.float64)

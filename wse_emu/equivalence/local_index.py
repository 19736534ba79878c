"""The stages of a lightning indexer, each from the run's own inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.products import Products
from wse_emu.equivalence.report import IndexTies
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import Precision
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import formulas, rotary, tensors
from wse_emu.reference.indexer import highest
from wse_emu.reference.storage import rounded
from wse_emu.reference.weights import PublishedWeights

F64 = NDArray[np.float64]
Bounded = tuple[F64, F64]
"""Exact value and bound of the error, of one shape."""

PROJECTIONS = {"index_query": "index_w_q", "index_key_a": "index_w_k", "index_weights": "index_weights"}
"""Stage to the matrix that it is a product with."""


def index_stage(
    record: TapRecord, spec: ModelSpec, weights: PublishedWeights, products: Products, layer: int, name: str, inputs: list[F64],
    precision: Precision,
) -> Bounded | None:
    """Expected value and bound of one stage of an indexer; None for any other.

    The keys that are chosen follow from the run's own scores without another rounding: nothing is allowed there.
    """
    own = spec.indexer
    if own is None or not name.startswith("index_"):
        return None
    x = inputs[0]
    if name in PROJECTIONS:
        weight = weights.raw(tensors.layer_tensor(spec, layer, PROJECTIONS[name]))
        value, bound = products.linear("query_a_norm" if name == "index_query" else "attn_norm", x, weight)
        shape = (len(x), own.num_heads, own.head_dim) if name == "index_query" else value.shape
        return value.reshape(shape), bound.reshape(shape)
    if name == "index_key":
        weight, added = (weights.layer(layer, role).astype(np.float64) for role in ("index_k_norm", "index_k_norm_bias"))
        value = formulas.layer_norm(x, weight, None, own.norm_eps).astype(np.float64)
        bound = tolerance.stored_bound(value, tolerance.layer_norm_bound(x, weight, own.norm_eps), precision.dtype)
        return value + added, bound + tolerance.add_bound(np.abs(value + added) + bound)  # written, then the bias is added
    if name in ("index_query_rope", "index_key_rope"):
        heads = x if name == "index_query_rope" else x[:, None]
        angles, factor = rotary.rotary_angles(spec, record.seq, record.pos)
        turned = formulas.rotate(heads, angles, factor, interleaved=own.interleaved).astype(np.float64)
        bound = tolerance.rotary_bound(heads, angles, factor, interleaved=own.interleaved)
        return turned.reshape(x.shape), bound.reshape(x.shape)
    if name == "index_scores":
        query, key, of_heads = inputs
        return _scores(record, own, query, rounded(key, precision.kv).astype(np.float64), of_heads)
    taken = highest(x, record.pos, own.topk).astype(np.float64)
    return taken, np.zeros_like(taken)


def judge_ties(scores: NDArray[np.float32], pos: NDArray[np.int64], topk: int) -> IndexTies:
    """Count, of scores (T, keys) of tokens at `pos`, the choices that equal scores leave open."""
    chooses = pos >= topk
    if not chooses.any():
        return IndexTies()
    admitted = np.arange(scores.shape[1]) <= pos[:, None]
    ranked = -np.sort(-np.where(admitted, scores, -np.inf)[chooses], axis=1)
    last = ranked[:, topk - 1]
    tied = ranked[:, topk] == last
    return IndexTies(n_choices=int(chooses.sum()), ties=int(tied.sum()), zero_ties=int((tied & (last == 0)).sum()))


def _scores(record: TapRecord, own: Indexer, query: F64, key: F64, of_heads: F64) -> Bounded:
    value = np.zeros((len(query), int(record.pos.max()) + 1))
    bound = np.zeros_like(value)
    for s in np.unique(record.seq):
        at = np.flatnonzero(record.seq == s)
        q, k, w, n = query[at], key[at], of_heads[at] * own.weight_scale, len(at)
        total, size, error = (np.zeros((n, n)) for _ in range(3))
        for h in range(own.num_heads):
            terms = w[:, h, None] * np.maximum(own.score_scale * (q[:, h] @ k.T), 0)
            total += terms
            size += np.abs(terms)
            error += np.abs(w[:, h, None]) * tolerance.score_bound(q[:, h], k, own.score_scale)
        past, where = np.tri(n, dtype=bool), np.ix_(at, np.arange(n))
        value[where] = np.where(past, total, 0)
        bound[where] = np.where(past, tolerance.index_bound(size, error, own.num_heads), 0)
    return value, bound

"""The lightning indexer, densely: a score for every key of every token, and the keys that score highest.

References
----------
DeepSeek-AI, "DeepSeek-V3.2: Pushing the frontier of open large language models", 2025, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.reference import formulas, rotary
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.weights import PublishedWeights


def indexer(
    weights: PublishedWeights, layer: int, norm: Floats, short: Floats, seq: Ints, pos: Ints
) -> Iterator[tuple[str, NDArray[Any]]]:  # fmt: skip
    """Stages from the normalised residual stream `norm` (T, hidden) and queries' short vector (T, q_lora_rank) to "index_keys"."""
    spec, own = weights.spec, weights.spec.indexer
    assert own is not None
    query = weights.stored(weights.product(short, weights.layer(layer, "index_w_q"))).reshape(len(norm), own.num_heads, own.head_dim)
    yield "index_query", query
    raw = weights.stored(weights.product(norm, weights.layer(layer, "index_w_k")))
    yield "index_key_a", raw
    key = weights.stored(formulas.layer_norm(raw, weights.layer(layer, "index_k_norm"), None, own.norm_eps))
    key = weights.stored(key + weights.layer(layer, "index_k_norm_bias"))
    yield "index_key", key
    of_heads = weights.stored(weights.product(norm, weights.layer(layer, "index_weights")))
    yield "index_weights", of_heads
    angles, factor = rotary.rotary_angles(spec, seq, pos)
    query = weights.stored(formulas.rotate(query, angles, factor, interleaved=own.interleaved))
    key = weights.stored(formulas.rotate(key[:, None], angles, factor, interleaved=own.interleaved)[:, 0])
    yield "index_query_rope", query
    yield "index_key_rope", key
    key = weights.kept(key)
    scores = np.zeros((len(pos), int(pos.max()) + 1), norm.dtype)
    for s in np.unique(seq):
        at = np.flatnonzero(seq == s)
        one = np.zeros((len(at), len(at)), norm.dtype)
        for head in range(own.num_heads):  # one (T, T) matrix at a time
            product = query[at, head] @ key[at].T * own.score_scale
            one += of_heads[at, head, None] * own.weight_scale * np.maximum(product, 0)
        scores[np.ix_(at, pos[at])] = np.where(pos[at][None, :] <= pos[at][:, None], one, 0)
    yield "index_scores", scores
    yield "index_keys", highest(scores, pos, own.topk)


def highest(scores: Floats, pos: Ints, topk: int) -> NDArray[np.bool_]:
    """Which keys of (T, keys) scores each token at `pos` takes: of those up to its own the `topk` highest, of equal ones the first."""
    admitted = np.arange(scores.shape[1]) <= pos[:, None]
    best = np.argsort(-np.where(admitted, scores, -np.inf), axis=1, kind="stable")[:, :topk]
    taken = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(taken, best, np.take_along_axis(admitted, best, axis=1), axis=1)
    return taken

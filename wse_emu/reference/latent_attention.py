"""Multi-head latent attention, densely: keys and values of every head are made of the latent, as the paper defines them.

The machine works in the absorbed form, on latents; what only that form has ("query_latent", "attn_latent") is computed here from its own
formula, and all else without it.

References
----------
DeepSeek-AI, "DeepSeek-V2: A strong, economical, and efficient mixture-of-experts language model", 2024, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.reference import formulas, rotary
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.indexer import indexer
from wse_emu.reference.weights import PublishedWeights


def latent_attention(
    weights: PublishedWeights, layer: int, norm: Floats, seq: Ints, pos: Ints, chosen: dict[int, NDArray[np.bool_]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Stages from the normalised residual stream `norm` (T, hidden) to "attn_context" (T, heads * v_head_dim)."""
    spec, latent = weights.spec, weights.spec.latent
    assert latent is not None
    heads, nope, rank = spec.num_heads, latent.qk_nope_head_dim, latent.kv_lora_rank
    source, role = norm, "w_q"
    if latent.q_lora_rank is not None:
        short = weights.stored(weights.product(norm, weights.layer(layer, "w_q_a")))
        yield "query_a", short
        source, role = weights.stored(formulas.rms_norm(short, weights.norm(layer, "q_a_norm"), latent.norm_eps)), "w_q_b"
        yield "query_a_norm", source
    query = weights.stored(weights.product(source, weights.layer(layer, role))).reshape(len(norm), heads, -1)
    yield "query", query
    both = weights.stored(weights.product(norm, weights.layer(layer, "w_kv_a")))
    yield "latent_a", both
    kept = weights.stored(formulas.rms_norm(both[:, :rank], weights.norm(layer, "kv_a_norm"), latent.norm_eps))
    yield "latent", kept
    angles, factor = rotary.rotary_angles(spec, seq, pos)
    turned, key = (
        weights.stored(formulas.rotate(x, angles, factor, interleaved=spec.rotary.interleaved))
        for x in (query[..., nope:], both[:, None, rank:])
    )
    yield "query_rope", turned
    yield "rope_key", key[:, 0]
    of_heads = weights.layer(layer, "w_kv_b").reshape(heads, nope + latent.v_head_dim, rank)
    absorbed = weights.stored(weights.product_per_head(query[..., :nope], of_heads[:, :nope].transpose(0, 2, 1)))
    yield "query_latent", absorbed
    if spec.runs_indexer(layer):
        for name, value in indexer(weights, layer, norm, source, seq, pos):
            if name == "index_keys":
                value = chosen.setdefault(layer, value)
            yield name, value
    t = len(norm)
    kept, key = weights.kept(kept), weights.kept(key)
    expanded = formulas.linear(kept, of_heads.reshape(-1, rank)).reshape(t, heads, -1)
    q = np.concatenate([query[..., :nope], turned], axis=2)
    k = np.concatenate([expanded[..., :nope], np.broadcast_to(key, (t, heads, key.shape[2]))], axis=2)
    v = expanded[..., nope:]
    maximum, denominator = np.empty((t, heads), weights.dtype), np.empty((t, heads), weights.dtype)
    context, mixed = np.empty_like(v), np.empty((t, heads, rank), weights.dtype)
    for s in np.unique(seq):
        at = np.flatnonzero(seq == s)
        mask = formulas.visible(seq[at], pos[at], spec.pattern(layer))
        if spec.indexer is not None:
            mask &= chosen[max(i for i in spec.indexer_layers if i <= layer)][at][:, pos[at]]
        of_all = np.broadcast_to(kept[at, None], (len(at), heads, rank))
        cap, nearest = spec.scales.scores_cap, weights.in_softmax
        *_, mixed[at] = formulas.attention(q[at], k[at], of_all, mask, spec.attention_scale, cap, nearest=nearest)
        maximum[at], denominator[at], context[at] = formulas.attention(
            q[at], k[at], v[at], mask, spec.attention_scale, cap, nearest=nearest
        )  # fmt: skip
    yield "attn_max", maximum
    yield "attn_denominator", denominator
    yield "attn_latent", weights.stored(mixed)
    yield "attn_context", weights.stored(context.reshape(t, -1))

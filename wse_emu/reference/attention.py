"""The attention half of a layer, densely: full score matrices with explicit masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wse_emu.reference import formulas, rotary
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.weights import PublishedWeights


def attention_block(weights: PublishedWeights, layer: int, x: Floats, seq: Ints, pos: Ints) -> Iterator[tuple[str, Floats]]:
    """Stages of ``x + attention(norm(x)) @ w_o``; `x` (T, hidden), the last stage is "attn_residual"."""
    spec, d = weights.spec, weights.spec.head_dim
    norm = formulas.rms_norm(x, weights.layer(layer, "attn_norm"), spec.rms_norm_eps)
    yield "attn_norm", norm
    q = formulas.linear(norm, weights.layer(layer, "w_q")).reshape(-1, spec.num_heads, d)
    yield "q", q
    k = formulas.linear(norm, weights.layer(layer, "w_k")).reshape(-1, spec.num_kv_heads, d)
    yield "k", k
    v = formulas.linear(norm, weights.layer(layer, "w_v")).reshape(-1, spec.num_kv_heads, d)
    yield "v", v
    if spec.qk_norm:
        q = formulas.rms_norm(q, weights.layer(layer, "q_norm"), spec.rms_norm_eps)
        yield "q_norm", q
        k = formulas.rms_norm(k, weights.layer(layer, "k_norm"), spec.rms_norm_eps)
        yield "k_norm", k
    angles, factor = rotary.rotary_angles(spec, seq, pos)
    q, k = formulas.rotate(q, angles, factor), formulas.rotate(k, angles, factor)
    yield "q_rope", q
    yield "k_rope", k
    maximum, denominator, context = np.empty(q.shape[:2], weights.dtype), np.empty(q.shape[:2], weights.dtype), np.empty_like(q)
    for s in np.unique(seq):  # tokens of different sequences never meet, so each has a matrix of its own
        t = np.flatnonzero(seq == s)
        mask = formulas.visible(seq[t], pos[t], spec.window(layer))
        maximum[t], denominator[t], context[t] = formulas.attention(q[t], k[t], v[t], mask)
    yield "attn_max", maximum
    yield "attn_denominator", denominator
    flat = context.reshape(len(x), -1)
    yield "attn_context", flat
    out = formulas.linear(flat, weights.layer(layer, "w_o"))
    yield "attn_out", out
    yield "attn_residual", x + out

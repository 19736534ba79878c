"""The attention half of a layer, densely: full score matrices with explicit masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.reference import formulas, rotary
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.latent_attention import latent_attention
from wse_emu.reference.weights import PublishedWeights


def attention_block(
    weights: PublishedWeights, layer: int, x: Floats, seq: Ints, pos: Ints, chosen: dict[int, NDArray[np.bool_]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Stages of ``x + attention(norm(x)) @ w_o``; `x` (T, hidden), the last stage is "attn_residual".

    `chosen` holds what indexers chose, (T, keys) by layer: what is there already is replayed.
    """
    spec = weights.spec
    norm = weights.normed(layer, "attn_norm", x)
    yield "attn_norm", norm
    flat = norm
    stages = _attend(weights, layer, norm, seq, pos) if spec.latent is None else latent_attention(weights, layer, norm, seq, pos, chosen)
    for name, flat in stages:
        yield name, flat
    out = _project(weights, layer, "o", flat, pos, biased=spec.biases.out)
    yield "attn_out", out
    yield from joined(weights, layer, x, out, "attn_after_norm", "attn_residual")


def _attend(weights: PublishedWeights, layer: int, norm: Floats, seq: Ints, pos: Ints) -> Iterator[tuple[str, Floats]]:
    """Stages from the normalised residual stream to "attn_context"."""
    spec = weights.spec
    now: dict[str, Floats] = {}
    for name, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        y = _project(weights, layer, name, norm, pos, biased=spec.biases.qkv)
        now[name] = y.reshape(-1, heads, spec.head_dim)
        yield name, now[name]
    steps = {"_norm": _normalise, "_clip": _clip, "_rope": _rotate, "_tuned": _tune}
    for suffix in spec.qkv_suffixes(layer):
        for name in {"_clip": "qkv", "_tuned": "q"}.get(suffix, "qk"):
            now[name] = weights.stored(steps[suffix](weights, layer, name, now[name], seq, pos))
            yield name + suffix, now[name]
    q, k, v = now["q"], weights.kept(now["k"]), weights.kept(now["v"])
    maximum, denominator, context = np.empty(q.shape[:2], weights.dtype), np.empty(q.shape[:2], weights.dtype), np.empty_like(q)
    cap, sinks = spec.scales.scores_cap, weights.layer(layer, "sinks") if spec.attn_sinks else None
    for s in np.unique(seq):  # tokens of different sequences never meet, so each has a matrix of its own
        t = np.flatnonzero(seq == s)
        mask = formulas.visible(seq[t], pos[t], spec.pattern(layer))
        maximum[t], denominator[t], context[t] = formulas.attention(
            q[t], k[t], v[t], mask, spec.attention_scale, cap, sinks, weights.in_softmax
        )  # fmt: skip
    yield "attn_max", maximum
    yield "attn_denominator", denominator
    yield "attn_context", weights.stored(context.reshape(len(norm), -1))


def _project(weights: PublishedWeights, layer: int, name: str, x: Floats, pos: Ints, *, biased: bool) -> Floats:
    """``x @ w + b``, (T, out); memory tokens have weights of their own where the model says so."""

    def once(x: Floats, kind: str) -> Floats:
        y = weights.stored(weights.product(x, weights.layer(layer, f"{kind}w_{name}")))
        return weights.stored(y + weights.layer(layer, f"{kind}b_{name}")) if biased else y

    y, memory = once(x, ""), weights.spec.memory_tokens
    if memory is not None and memory.add_qkv_memory_weights:
        own = formulas.are_memory(memory, pos)
        y[own] = once(x[own], "memory.")
    return y


def joined(weights: PublishedWeights, layer: int, x: Floats, out: Floats, after_norm: str, stage: str) -> Iterator[tuple[str, Floats]]:
    """Stages of ``x + out``, the output of half a layer, normalised and scaled before where the model does that."""
    spec = weights.spec
    if spec.norm.after:
        out = weights.normed(layer, after_norm, out)
        yield after_norm, out
    yield stage, weights.stored(x + out * out.dtype.type(spec.scales.residual))


def _normalise(weights: PublishedWeights, layer: int, name: str, x: Floats, seq: Ints, pos: Ints) -> Floats:
    spec, weight = weights.spec, weights.norm(layer, name + "_norm")
    assert spec.qk_norm is not None
    if spec.qk_norm.over == "head":
        return formulas.rms_norm(x, weight, spec.rms_norm_eps)
    return formulas.rms_norm(x.reshape(len(x), -1), weight, spec.rms_norm_eps).reshape(x.shape)


def _clip(weights: PublishedWeights, layer: int, name: str, x: Floats, seq: Ints, pos: Ints) -> Floats:
    assert weights.spec.clip_qkv is not None
    return np.clip(x, -weights.spec.clip_qkv, weights.spec.clip_qkv)


def _tune(weights: PublishedWeights, layer: int, name: str, x: Floats, seq: Ints, pos: Ints) -> Floats:
    assert weights.spec.query_temperature is not None
    return x * formulas.cast(formulas.temperature(weights.spec.query_temperature, pos), x.dtype)[:, None, None]


def _rotate(weights: PublishedWeights, layer: int, name: str, x: Floats, seq: Ints, pos: Ints) -> Floats:
    spec = weights.spec
    angles, factor = rotary.rotary_angles(spec, seq, pos, local=spec.rotates_locally(layer))
    return formulas.rotate(x, angles, factor, interleaved=spec.rotary.interleaved)

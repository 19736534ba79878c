"""The feed-forward half of a layer, densely: one network for all tokens, or every expert for every token, then masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.reference import formulas
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.weights import PublishedWeights


def dense_ffn(weights: PublishedWeights, layer: int, x: Floats, expert: int | None = None) -> Iterator[tuple[str, Floats]]:
    """Stages of one feed-forward network, a layer's own or one expert's; the last is "ffn_out"."""
    gate = formulas.linear(x, weights.layer(layer, "w_gate", expert))
    hidden = formulas.swiglu(gate, formulas.linear(x, weights.layer(layer, "w_up", expert)))
    yield "ffn_hidden", hidden
    yield "ffn_out", formulas.linear(hidden, weights.layer(layer, "w_down", expert))


def experts_ffn(weights: PublishedWeights, layer: int, x: Floats, replay: Ints | None) -> Iterator[tuple[str, NDArray[Any]]]:
    """Stages of a mixture: every expert for every token, then masked; `replay` (T, k) takes the place of the choice."""
    spec, n_tokens = weights.spec, len(x)
    logits = formulas.linear(x, weights.layer(layer, "router"))
    yield "router_logits", logits
    ids = formulas.top_k(logits, spec.top_k) if replay is None else replay
    yield "topk_ids", ids
    share = formulas.expert_weights(logits, ids, spec.renormalize)
    yield "topk_weights", share
    hidden = np.empty((n_tokens, spec.top_k, spec.moe_intermediate_size), weights.dtype)
    outs = np.empty((n_tokens, spec.top_k, spec.hidden_size), weights.dtype)
    combined = np.zeros_like(x)
    for expert in range(spec.num_experts):
        mask = ids == expert  # (T, k), at most one slot of a token
        stage = dict(dense_ffn(weights, layer, x, expert))  # every token, chosen or not
        t, slot = np.nonzero(mask)
        hidden[t, slot] = stage["ffn_hidden"][t]
        outs[t, slot] = stage["ffn_out"][t]
        factor = np.where(mask, share, 0).sum(axis=1, keepdims=True)
        combined += np.where(mask.any(axis=1, keepdims=True), factor * stage["ffn_out"], 0)
    yield "expert_hidden", hidden
    yield "expert_out", outs
    yield "ffn_out", combined

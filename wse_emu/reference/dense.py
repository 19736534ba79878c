"""A dense transformer forward pass in NumPy and SciPy: float64 as the reference, float32 as its naive twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wse_emu.foundation.errors import InputError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.foundation.taps import Stage
from wse_emu.reference import formulas, tensors
from wse_emu.reference.attention import attention_block, joined
from wse_emu.reference.ffn import dense_ffn, experts_ffn, routing_numbers
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.weights import PublishedWeights, Reader

Routing = Mapping[int, NDArray[np.integer[Any]]]
"""Layer to the experts chosen there, (T, top_k) integers in slot order."""


class DenseReference:
    """The model computed densely: every expert for every token, then masked; full score matrices with explicit masks.

    Parameters
    ----------
    spec : ModelSpec
        Shape of the model.
    read : callable
        ``read(name)`` returns one published tensor. Tensors are read layer by layer, where they are needed, and not kept.
    dtype : dtype
        float64 for the reference. float32 gives the *naive twin*: the same formulas in plain float32 NumPy, whose distance from the
        reference is what a straightforward implementation of that precision loses.
    precision : Precision
        For the twin: formats to which it rounds what its stages give, keys and values, and sums that are handed on. The reference itself
        rounds nothing.
    n_columns : int
        Parts of a sum that the twin adds one after another where these are handed on in 16 bits.

    Raises
    ------
    InputError
        If `dtype` is neither.
    """

    def __init__(
        self, spec: ModelSpec, read: Reader, *, dtype: DTypeLike = np.float64, precision: Precision = FLOAT32, n_columns: int = 1
    ) -> None:  # fmt: skip
        self.spec = spec
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float64), np.dtype(np.float32)):
            raise InputError(f"`dtype` of the reference must be float64 or float32, got {self.dtype}")
        if self.dtype == np.float64 and precision != FLOAT32:
            raise InputError(f"`precision` is for the naive twin, with `dtype` float32; got {precision} with {self.dtype}")
        self._weights = PublishedWeights(spec, read, self.dtype, precision, n_columns)

    def forward(
        self, token_ids: NDArray[Any], seq: NDArray[Any], pos: NDArray[Any], *, routing: Routing | None = None
    ) -> dict[Stage, NDArray[Any]]:
        """Every stage of one forward pass; see `stages`."""
        return dict(self.stages(token_ids, seq, pos, routing=routing))

    def stages(
        self,
        token_ids: NDArray[Any],
        seq: NDArray[Any],
        pos: NDArray[Any],
        *,
        routing: Routing | None = None,
        routing_weights: Mapping[int, Floats] | None = None,
        chosen_keys: Mapping[int, NDArray[np.bool_]] | None = None,
        nudge: NDArray[np.floating[Any]] | None = None,
    ) -> Iterator[tuple[Stage, NDArray[Any]]]:
        """Stages of one forward pass, one by one, in the order in which they run.

        Parameters
        ----------
        token_ids, seq, pos : ndarray, (T,), integer
            Token, its sequence and its position there; unpadded. A token sees the tokens of its sequence at its own or an earlier position.
        routing : mapping of layer to ndarray, (T, top_k), integer, optional
            Expert choices to replay. Weights are still computed from this pass's own logits.
        routing_weights : mapping of layer to ndarray, (T, top_k), floating, optional
            Weights to replay as well, for rules under which they jump: where scores are rounded to 16 bits, or shut out at a threshold.
        chosen_keys : mapping of layer to ndarray, (T, keys), bool, optional
            Keys by position that each token attends to, of layers with an indexer, to replay.
        nudge : ndarray, (T, hidden), optional
            Factor on every element of the embedding, to see how the model answers to a small change of its input.

        Yields
        ------
        stage : (layer or None, name)
        value : ndarray
            In published order: "embedding" (T, h); per layer "attn_norm" (T, h), "q" (T, heads, d), "k", "v" (T, kv_heads, d), then of what
            the model does with them "q_norm", "k_norm", "q_clip", "k_clip", "v_clip", "q_rope", "k_rope", in its order
            (`ModelSpec.qkv_suffixes`); with latent attention instead "query_a" and "query_a_norm" (T, q_lora_rank) where queries have them,
            "query" (T, heads, nope + rope), "latent_a" (T, kv_lora_rank + rope), "latent" (T, kv_lora_rank), "query_rope"
            (T, heads, rope), "rope_key" (T, rope), "query_latent" (T, heads, kv_lora_rank), with an indexer of n heads of di elements
            "index_query" (T, n, di), "index_key_a", "index_key" (T, di), "index_weights" (T, n), "index_query_rope", "index_key_rope",
            "index_scores" (T, keys), "index_keys" (T, keys) bool, and before "attn_context" "attn_latent", of the shape of
            "query_latent"; "attn_max", "attn_denominator" (T, heads), "attn_context" (T, heads * d), "attn_out",
            "attn_after_norm" where there is that norm, "attn_residual", "ffn_norm" (T, h), then "router_logits" (T, E) where they are
            learned, "router_scores" (T, E) where tokens meet, "topk_ids" (T, k) int64, "topk_weights" (T, k),
            "shared_hidden" (T, fs), "shared_out" (T, h), "shared_gate" (T, 1) where there are shared experts,
            "expert_hidden" (T, k, f), "expert_out" (T, k, h) in a layer with a mixture, "ffn_hidden" (T, f) in a dense one, "ffn_out",
            "ffn_after_norm", "layer_out" (T, h); last "final_norm" (T, h), "logits" (T, vocab).

        Raises
        ------
        InputError
            If the tokens or the routing do not fit the model.
        CheckpointError
            If `read` returns a tensor of another shape or kind than the model's.
        """
        token_ids, seq, pos = self._check_tokens(token_ids, seq, pos)
        if nudge is not None and nudge.shape != (len(token_ids), self.spec.hidden_size):
            raise InputError(f"`nudge` must have shape {(len(token_ids), self.spec.hidden_size)}, got {nudge.shape}")
        replay = None if routing is None else self._check_routing(routing, len(token_ids))
        return self._run(token_ids, seq, pos, replay, routing_weights or {}, dict(chosen_keys or {}), nudge)

    def _run(
        self, token_ids: Ints, seq: Ints, pos: Ints, replay: dict[int, Ints] | None, shares: Mapping[int, Floats],
        chosen: dict[int, NDArray[np.bool_]], nudge: Floats | None,
    ) -> Iterator[tuple[Stage, NDArray[Any]]]:  # fmt: skip
        spec, weights = self.spec, self._weights
        embed = weights.raw(tensors.embed_tokens(spec))
        x = formulas.cast(embed[token_ids], self.dtype)
        del embed
        if spec.memory_tokens is not None and spec.memory_tokens.add_extra_embedding:
            x[formulas.are_memory(spec.memory_tokens, pos)] = weights.tensor(tensors.memory_embedding(spec))
        if spec.scales.embedding != 1:  # the factor is rounded to float32, and so is what the run starts from
            x = formulas.cast((x * np.float32(spec.scales.embedding)).astype(np.float32), self.dtype)
        if nudge is not None:
            x = formulas.cast(x * nudge, self.dtype)
        x = weights.stored(x)
        yield (None, "embedding"), x
        for layer in range(spec.num_layers):
            for name, value in attention_block(weights, layer, x, seq, pos, chosen):
                x = value if name == "attn_residual" else x
                yield (layer, name), value
            residual = x
            norm = weights.normed(layer, "ffn_norm", residual)
            yield (layer, "ffn_norm"), norm
            moe = spec.is_moe_layer(layer)
            if moe:
                numbers = routing_numbers(spec.routing, token_ids, pos)
                ffn = experts_ffn(weights, layer, norm, numbers, None if replay is None else replay[layer], shares.get(layer), seq)
            else:
                ffn = dense_ffn(weights, layer, norm)
            for name, value in ffn:
                yield (layer, name), value
                x = value  # the last one is "ffn_out"
            for name, value in joined(weights, layer, residual, x, "ffn_after_norm", "layer_out"):
                yield (layer, name), value
                x = value
        x = weights.normed(None, "final_norm", x)
        yield (None, "final_norm"), x
        logits = formulas.linear(x, weights.tensor(tensors.lm_head(spec)))
        if spec.biases.head:
            logits = logits + weights.tensor(tensors.lm_head_bias(spec))
        if spec.scales.logits != 1:
            logits = formulas.cast(logits / spec.scales.logits, self.dtype)
        yield (None, "logits"), formulas.capped(logits, spec.scales.logits_cap)

    def _check_tokens(self, token_ids: NDArray[Any], seq: NDArray[Any], pos: NDArray[Any]) -> tuple[Ints, Ints, Ints]:
        for name, a in (("token_ids", token_ids), ("seq", seq), ("pos", pos)):
            if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer):
                raise InputError(f"`{name}` must be a one-dimensional integer array, got {a.dtype} of shape {a.shape}")
            if len(a) != len(token_ids):
                raise InputError(f"`{name}` must have one entry per token, got {len(a)} for {len(token_ids)} tokens")
        if not len(token_ids):
            raise InputError("`token_ids` is empty: there is nothing to compute")
        bad = np.flatnonzero((token_ids < 0) | (token_ids >= self.spec.vocab_size))
        if len(bad):
            raise InputError(f"`token_ids[{bad[0]}]` must lie in 0..{self.spec.vocab_size - 1} (`vocab_size`), got {token_ids[bad[0]]}")
        if (pos < 0).any():
            raise InputError(f"`pos` must be >= 0, got {pos.min()}")
        return token_ids.astype(np.int64), seq.astype(np.int64), pos.astype(np.int64)

    def _check_routing(self, routing: Routing, n_tokens: int) -> dict[int, Ints]:
        spec = self.spec
        if not spec.is_moe:
            raise InputError("`routing` was given, but the model is dense: it has no experts")
        shape, none = (n_tokens, spec.n_slots), -1 if spec.routing.has_capacity else 0
        for layer in spec.moe_layers:
            if layer not in routing:
                raise InputError(f"`routing` has no entry for layer {layer}")
            ids = routing[layer]
            if ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
                raise InputError(f"`routing[{layer}]` must hold integers of shape {shape}, got {ids.dtype} of shape {ids.shape}")
            if (ids < none).any() or (ids >= spec.num_experts).any():
                raise InputError(f"`routing[{layer}]` must name experts 0..{spec.num_experts - 1}, got {ids.min()}..{ids.max()}")
            ranked = np.sort(ids, axis=1)
            if ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
                raise InputError(f"`routing[{layer}]` names an expert twice for one token")
        return {layer: routing[layer].astype(np.int64) for layer in spec.moe_layers}

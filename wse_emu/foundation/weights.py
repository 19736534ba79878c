"""Names, shapes and order of the weights as MemoryX holds them: the *wafer layout*.

A matrix is ``[in, out]`` so that ``x @ w``; its columns are ordered so that every split of the wafer is one contiguous range:

``w_qkv`` ``(hidden, num_kv_heads * head_dim/2 * (q + 2) * 2)`` with ``q = num_heads / num_kv_heads``
    Column ``((g * d/2 + u) * (q + 2) + s) * 2 + e`` is element ``u + e * d/2`` of: query head ``g * q + s`` for ``s < q``, key head ``g``
    for ``s = q``, value head ``g`` for ``s = q + 1``. So the two halves ``(u, u + d/2)`` of a rotary pair (a *pair unit*) are neighbours,
    and a pair unit of a key/value head keeps its queries beside it.
    Where the published pairs are neighbours, or only part of a head is rotated, ``(u, u + d/2)`` stands for `RotarySpec.pairs`.
``b_qkv``, the biases of those columns
``q_norm``, ``k_norm`` ``(head_dim,)``, where a head's queries and keys are normalised
    Element ``2 u + e`` is published element ``u + e * d/2``, as in a pair unit. Over a row: ``(num_heads * head_dim,)`` in the order of
    the rows of ``w_o`` and ``(num_kv_heads * head_dim,)`` in the order of the keys in ``w_qkv``.
``w_o`` ``(num_kv_heads * head_dim/2 * q * 2, hidden)``
    Row ``((g * d/2 + u) * q + s) * 2 + e`` is row ``(g * q + s) * d + u + e * d/2`` of the published matrix (transposed).
With `LatentAttention` there are, in place of ``w_qkv``, ``n`` being ``hidden`` or ``q_lora_rank``:

``w_q_a`` ``(hidden, q_lora_rank)`` and ``q_a_norm``, where queries are made of a short vector
``w_q_nope`` ``(n, num_heads * nope)``, ``w_q_rope`` ``(n, num_heads * rope)``
    Column ``(u * num_heads + s) * 2 + e`` is element ``2 u + e`` of head ``s``'s query, counted from the first that is (not) rotated; of
    those that are, element ``RotarySpec.pairs[u, e]``.
``w_kv_a`` ``(hidden, kv_lora_rank)`` and ``kv_a_norm``; ``w_k_rope`` ``(hidden, rope)``, column ``2 u + e`` as in ``w_q_rope``
``w_uk`` ``(num_heads, nope, kv_lora_rank)``, ``w_uv`` ``(num_heads, kv_lora_rank, v_head_dim)``
    One matrix for each head, in its order as published; both are parts of the published ``kv_b_proj``.
``index_w_q`` ``(q_lora_rank, index heads * d)``, ``index_w_k`` ``(hidden, d)``, ``index_k_norm`` and its bias, of an indexer
    Column ``(u * heads + s) * 2 + e`` is element ``[u, e]`` of the pairs of head ``s``: those that are rotated, then the others.
``index_weights`` ``(hidden, index heads)``
``w_o`` ``(num_heads * v_head_dim, hidden)``
    Row ``(u * num_heads + s) * 2 + e`` is row ``s * v_head_dim + 2 u + e`` of the published matrix (transposed).

``w_gate_up`` ``(hidden, 2 * intermediate)``
    Column ``2 f`` is the gate's column ``f``, column ``2 f + 1`` is the up projection's.
``sinks`` ``(num_heads,)``, a score for every query head, where they have one
``b_gate_up``, the biases of those columns, and ``b_down``, where experts have them
``attn_norm_bias`` and the like of every norm of the residual stream, ``lm_head_bias``, where they have one
``shared.gate`` ``(hidden, 1)``, where the shared experts' output has a gate
``memory.w_qkv``, ``memory.w_o`` and their biases, as those without ``memory.``, where memory tokens have weights of their own

Weights of norms are stored as they are applied: ``1 + w`` where the family means that. ``embed`` is multiplied by ``scales.embedding`` and
``lm_head``, with its bias, divided by ``scales.logits``, each product rounded to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import RoutingRule

TILE_COLS = 128
"""Columns of one tile of the layout file; a tile is one C-contiguous ``(n_in, <= TILE_COLS)`` block."""


@dataclass(frozen=True, slots=True)
class WeightShape:
    """One tensor of the wafer layout: its canonical name and its shape, ``(n_in, n_out)``, ``(n,)`` or ``(heads, n_in, n_out)``."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n


def layer_prefix(layer: int) -> str:
    """Canonical prefix of a layer's tensors, for instance ``"layers.3."``."""
    return f"layers.{layer}."


def router_vectors(rule: RoutingRule) -> tuple[str, ...]:
    """Vectors of a router, one number for each expert."""
    wanted = {"router_bias": rule.router_use_bias, "e_score_correction_bias": rule.e_score_correction_bias}
    return tuple(name for name, there in wanted.items() if there)


def layer_weights(spec: ModelSpec, layer: int) -> list[WeightShape]:
    """Tensors of one layer, in the order in which they are streamed."""
    p = layer_prefix(layer)
    h, d = spec.hidden_size, spec.head_dim
    n_q, n_kv = spec.num_heads * d, spec.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = _norm("attn_norm", spec)
    shapes |= {s + "w_qkv": (h, n_q + 2 * n_kv) for s in spec.weight_sets} if spec.latent is None else _latent(spec, spec.latent)
    if spec.indexer is not None and spec.runs_indexer(layer):
        shapes |= _indexer(spec, spec.indexer)
    if spec.biases.qkv:
        shapes |= {s + "b_qkv": (n_q + 2 * n_kv,) for s in spec.weight_sets}
    if spec.qk_norm is not None and spec.qk_norm.weighted:
        shapes |= {"q_norm": (d,), "k_norm": (d,)} if spec.qk_norm.over == "head" else {"q_norm": (n_q,), "k_norm": (n_kv,)}
    if spec.attn_sinks:
        shapes["sinks"] = (spec.num_heads,)
    shapes |= {s + "w_o": (spec.num_heads * spec.value_dim, h) for s in spec.weight_sets}
    if spec.biases.out:
        shapes |= {s + "b_o": (h,) for s in spec.weight_sets}
    if spec.norm.after:
        shapes |= _norm("attn_after_norm", spec)
    shapes |= _norm("ffn_norm", spec)
    if not spec.is_moe_layer(layer):
        shapes |= _ffn("", h, spec.intermediate_size)
    else:
        if spec.routing.is_learned:
            shapes["router"] = (h, spec.num_experts)
        shapes |= dict.fromkeys(router_vectors(spec.routing), (spec.num_experts,))
        if spec.shared_experts is not None:
            shapes |= _ffn("shared.", h, spec.shared_experts.intermediate_size)
            if spec.shared_experts.gated:
                shapes["shared.gate"] = (h, 1)
        for e in range(spec.num_experts):
            shapes |= _ffn(f"experts.{e}.", h, spec.moe_intermediate_size, biased=spec.clamped_experts is not None)
    if spec.norm.after:
        shapes |= _norm("ffn_after_norm", spec)
    return [WeightShape(p + name, shape) for name, shape in shapes.items()]


def _norm(name: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    names = (name, name + "_bias") if spec.norm.bias else (name,)
    return dict.fromkeys(names, (spec.hidden_size,))


def _latent(spec: ModelSpec, latent: LatentAttention) -> dict[str, tuple[int, ...]]:
    h, heads, rank = spec.hidden_size, spec.num_heads, latent.kv_lora_rank
    n = h if latent.q_lora_rank is None else latent.q_lora_rank
    short: dict[str, tuple[int, ...]] = {} if latent.q_lora_rank is None else {"w_q_a": (h, n), "q_a_norm": (n,)}
    return short | {
        "w_q_nope": (n, heads * latent.qk_nope_head_dim), "w_q_rope": (n, heads * spec.head_dim), "w_kv_a": (h, rank),
        "w_k_rope": (h, spec.head_dim), "kv_a_norm": (rank,), "w_uk": (heads, latent.qk_nope_head_dim, rank),
        "w_uv": (heads, rank, latent.v_head_dim),
    }  # fmt: skip


def _indexer(spec: ModelSpec, indexer: Indexer) -> dict[str, tuple[int, ...]]:
    assert spec.latent is not None
    assert spec.latent.q_lora_rank is not None
    h, d, heads = spec.hidden_size, indexer.head_dim, indexer.num_heads
    return {
        "index_w_q": (spec.latent.q_lora_rank, heads * d), "index_w_k": (h, d), "index_k_norm": (d,), "index_k_norm_bias": (d,),
        "index_weights": (h, heads),
    }  # fmt: skip


def _ffn(prefix: str, hidden: int, width: int, *, biased: bool = False) -> dict[str, tuple[int, ...]]:
    biases: dict[str, tuple[int, ...]] = {prefix + "b_gate_up": (2 * width,), prefix + "b_down": (hidden,)} if biased else {}
    return {prefix + "w_gate_up": (hidden, 2 * width), prefix + "w_down": (width, hidden), **biases}


def all_weights(spec: ModelSpec) -> Iterator[WeightShape]:
    """Every tensor of the wafer layout, in file order; ``embed`` is ``(vocab, hidden)``, row-major, never tiled.

    Where memory tokens have an embedding of their own, it is one row more, the last.
    """
    yield WeightShape("embed", (spec.embedding_rows, spec.hidden_size))
    for layer in range(spec.num_layers):
        yield from layer_weights(spec, layer)
    yield from head_weights(spec)


def head_weights(spec: ModelSpec) -> list[WeightShape]:
    """Tensors behind the last layer, in the order in which they are streamed."""
    shapes: dict[str, tuple[int, ...]] = {**_norm("final_norm", spec), "lm_head": (spec.hidden_size, spec.vocab_size)}
    if spec.biases.head:
        shapes["lm_head_bias"] = (spec.vocab_size,)
    return [WeightShape(name, shape) for name, shape in shapes.items()]

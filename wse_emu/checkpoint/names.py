"""Which published tensor, or which part of one, plays which role, per family: names and shapes as in released checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.families import FAMILIES
from wse_emu.checkpoint.naming import Part
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import layer_prefix, router_vectors

if TYPE_CHECKING:
    from wse_emu.checkpoint.source import TensorSource


@dataclass(frozen=True, slots=True)
class PublishedTensor:
    """A tensor of a checkpoint, or the part of one that plays a role; matrices are (out, in)."""

    name: str
    shape: tuple[int, ...]
    """Of the role, (out, in) or (n,)."""
    stored: tuple[int, ...] = ()
    """Of the whole tensor, where that is another; () is `shape`."""
    index: int | None = None
    """Entry of the first axis that is meant: an expert."""
    first: int = 0
    step: int = 1
    """Where the outputs lie on their axis."""
    first_in: int = 0
    """Where the inputs begin on theirs."""
    transposed: bool = False
    """Whether it is stored (in, out)."""

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the tensor as it is stored."""
        return self.stored or self.shape

    def key(self, start: int, stop: int) -> tuple[int | slice, ...]:
        """Indices of outputs ``start:stop`` in the stored tensor."""
        outs = slice(self.first + start * self.step, max(self.first, self.first + (stop - 1) * self.step + 1), self.step)
        axes: list[int | slice] = [outs]
        if len(self.shape) == 2:
            axes.append(slice(self.first_in, self.first_in + self.shape[1]))
        if self.transposed:
            axes.reverse()
        return (*([] if self.index is None else [self.index]), *axes)


def read_part(source: TensorSource, tensor: PublishedTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Outputs ``start:stop`` of a role, float32, C-contiguous, (stop - start, in) or (stop - start,); only they are read."""
    if not tensor.stored:
        return source.read_rows(tensor.name, start, stop)
    values = source.read_part(tensor.name, tensor.key(start, stop))
    return np.ascontiguousarray(values.T if tensor.transposed else values)


def published_tensors(spec: ModelSpec) -> Iterator[tuple[str, PublishedTensor]]:
    """Canonical role and published tensor of every weight, embedding first, head last.

    Roles: ``"embed"``, ``"memory_embed"``, ``"layers.N."`` followed by ``attn_norm w_q w_k w_v``, their biases ``b_q b_k b_v``,
    ``q_norm k_norm``, ``sinks`` (with latent attention ``w_q``, or ``w_q_a q_a_norm w_q_b``, then ``w_kv_a kv_a_norm w_kv_b``, and of an
    indexer ``index_w_q index_w_k index_k_norm index_k_norm_bias index_weights``), ``w_o``, ``b_o`` and, of memory tokens, the same
    projections and biases with ``memory.`` before, ``attn_after_norm``, ``ffn_norm`` and ``w_gate w_up w_down`` (dense) or ``router``,
    ``router_bias``, ``e_score_correction_bias``, ``shared.`` and ``experts.E.`` with ``w_gate w_up w_down``, their biases
    ``b_gate b_up b_down``, ``shared.gate``, ``ffn_after_norm``, each where the model has it, then ``"final_norm"``, ``"lm_head"`` and
    ``"lm_head_bias"``. A norm's bias is named as
    the norm, with ``_bias``. A tied head names the embedding's tensor.
    """
    names = FAMILIES[spec.family].names
    h = spec.hidden_size
    yield "embed", PublishedTensor(_plain(names["embed"]), (spec.vocab_size, h))
    if spec.embedding_rows > spec.vocab_size:
        yield "memory_embed", PublishedTensor(_plain(names["memory_embed"]), (1, h))
    for layer in range(spec.num_layers):
        shapes = dict(layer_roles(spec, layer))
        for role, shape in shapes.items():
            yield layer_prefix(layer) + role, _in_layer(spec, layer, role, shape, shapes)
    for role, shape in _norm("final_norm", spec):
        yield role, PublishedTensor(_plain(names[role]), shape)
    yield "lm_head", PublishedTensor(_plain(names["embed" if spec.tie_word_embeddings else "lm_head"]), (spec.vocab_size, h))
    if spec.biases.head:
        yield "lm_head_bias", PublishedTensor(_plain(names["lm_head_bias"]), (spec.vocab_size,))


def own_head(spec: ModelSpec) -> PublishedTensor:
    """The head's own tensor, which a tied checkpoint may bring too."""
    return PublishedTensor(_plain(FAMILIES[spec.family].names["lm_head"]), (spec.vocab_size, spec.hidden_size))


def layer_roles(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Roles of a layer's tensors and their shapes, matrices (out, in)."""
    h, d = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    yield from _norm("attn_norm", spec)
    if spec.latent is not None:
        yield from _latent(spec, spec.latent)
        if spec.indexer is not None and spec.runs_indexer(layer):
            yield from _indexer(spec, spec.indexer)
        q = spec.num_heads * spec.value_dim
    else:
        for s in spec.weight_sets:
            yield from ((s + "w_q", (q, h)), (s + "w_k", (kv, h)), (s + "w_v", (kv, h)))
    for s in spec.weight_sets if spec.biases.qkv else ():
        yield from ((s + "b_q", (q,)), (s + "b_k", (kv,)), (s + "b_v", (kv,)))
    if spec.qk_norm is not None and spec.qk_norm.weighted:
        of_head = spec.qk_norm.over == "head"
        yield from (("q_norm", (d if of_head else q,)), ("k_norm", (d if of_head else kv,)))
    if spec.attn_sinks:
        yield "sinks", (spec.num_heads,)
    yield from ((s + "w_o", (h, q)) for s in spec.weight_sets)
    if spec.biases.out:
        yield from ((s + "b_o", (h,)) for s in spec.weight_sets)
    if spec.norm.after:
        yield from _norm("attn_after_norm", spec)
    yield from _norm("ffn_norm", spec)
    if not spec.is_moe_layer(layer):
        yield from _ffn("", h, spec.intermediate_size)
    else:
        if spec.routing.is_learned:
            yield "router", (spec.num_experts, h)
        for name in router_vectors(spec.routing):
            yield name, (spec.num_experts,)
        if spec.shared_experts is not None:
            yield from _ffn("shared.", h, spec.shared_experts.intermediate_size)
            if spec.shared_experts.gated:
                yield "shared.gate", (1, h)
        for e in range(spec.num_experts):
            yield from _ffn(f"experts.{e}.", h, spec.moe_intermediate_size)
            if spec.clamped_experts is not None:
                for name, size in (("b_gate", spec.moe_intermediate_size), ("b_up", spec.moe_intermediate_size), ("b_down", h)):
                    yield f"experts.{e}.{name}", (size,)
    if spec.norm.after:
        yield from _norm("ffn_after_norm", spec)


def _norm(role: str, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield role, (spec.hidden_size,)
    if spec.norm.bias:
        yield role + "_bias", (spec.hidden_size,)


def _latent(spec: ModelSpec, latent: LatentAttention) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, heads, rank, short = spec.hidden_size, spec.num_heads, latent.kv_lora_rank, latent.q_lora_rank
    if short is None:
        yield "w_q", (heads * spec.query_dim, h)
    else:
        yield from (("w_q_a", (short, h)), ("q_a_norm", (short,)), ("w_q_b", (heads * spec.query_dim, short)))
    yield from (("w_kv_a", (rank + spec.head_dim, h)), ("kv_a_norm", (rank,)))
    yield "w_kv_b", (heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank)


def _indexer(spec: ModelSpec, indexer: Indexer) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert spec.latent is not None
    assert spec.latent.q_lora_rank is not None
    h, d, heads = spec.hidden_size, indexer.head_dim, indexer.num_heads
    yield from (("index_w_q", (heads * d, spec.latent.q_lora_rank)), ("index_w_k", (d, h)))
    yield from (("index_k_norm", (d,)), ("index_k_norm_bias", (d,)), ("index_weights", (heads, h)))


def _ffn(prefix: str, h: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((prefix + "w_gate", (f, h)), (prefix + "w_up", (f, h)), (prefix + "w_down", (h, f)))


def _plain(name: str | Part) -> str:
    assert isinstance(name, str)
    return name


def _in_layer(
    spec: ModelSpec, layer: int, role: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> PublishedTensor:  # fmt: skip
    """Tensor of a role of one layer, by the family's table."""
    names = FAMILIES[spec.family].names
    expert = int(role.split(".")[1]) if role.startswith("experts.") else None
    general = role if expert is None else "experts." + role.split(".", 2)[2]
    entry, prefix = names[general], _plain(names["layer"]).format(n=layer)
    if isinstance(entry, str):
        return PublishedTensor(prefix + entry.format(e=expert), shape)
    role_prefix = role.removesuffix(general.rpartition(".")[2])
    together = [shapes[role_prefix + r] for r in entry.stacked] or [shape]
    before = [shapes[role_prefix + r][0] for r in entry.stacked[: entry.stacked.index(general.rpartition(".")[2])]] if entry.stacked else []
    first, step = (len(before), len(together)) if entry.interleaved else (sum(before), 1)
    stored = [sum(s[0] for s in together), *shape[1:]]
    first_in = 0
    if entry.experts == "rows":
        assert expert is not None
        axis = 1 if entry.transposed else 0
        if entry.transposed:
            first_in = expert * shape[1]
        else:
            first += expert * stored[0]
        stored[axis] *= spec.num_experts
    if entry.transposed:
        stored.reverse()
    outer = [spec.num_experts] if entry.experts == "axis" else [1] if entry.one_row else []
    index = (expert or 0) if outer else None
    return PublishedTensor(prefix + entry.name, shape, (*outer, *stored), index, first, step, first_in, entry.transposed)


def published_names(spec: ModelSpec) -> dict[str, PublishedTensor]:
    """`published_tensors` as a dictionary from role to tensor."""
    return dict(published_tensors(spec))


def is_unused_expert(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor belongs to the experts, the router or the shared experts of a layer that is dense: transformers leaves it out."""
    names = FAMILIES[spec.family].names
    before, _, behind = _plain(names["layer"]).partition("{n}")
    number, _, rest = name.removeprefix(before).partition(behind)
    if not name.startswith(before) or not number.isdecimal() or len(number) > 9:
        return False
    layer = int(number)
    if layer >= spec.num_layers or spec.is_moe_layer(layer) or FAMILIES[spec.family].moe is None:
        return False
    own = {_below(names[role]) for role, _ in layer_roles(spec, layer)}
    others = {_below(entry) for role, entry in names.items() if role.startswith(_MIXTURE)} - own
    return any(re.fullmatch(re.escape(other).replace(re.escape("{e}"), r"\d+"), rest) for other in others)


_MIXTURE = ("experts.", "shared.", "router", "e_score_correction_bias")
"""How roles begin that a dense layer has not."""


def _below(entry: str | Part) -> str:
    """Name of a tensor below its layer."""
    return entry if isinstance(entry, str) else entry.name


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, once, in the order of use: name to the shape it is stored in."""
    return {t.name: t.whole for _, t in published_tensors(spec)}

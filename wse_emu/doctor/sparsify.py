"""Which layers of a model may attend sparsely: every layer's sensitivity, and what a growing set of sparse layers costs and saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import kv_bytes
from wse_emu.foundation.arguments import show
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.key_ranges import n_keys_of
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.pattern_json import pattern_text, pattern_to_json
from wse_emu.wafer.wafer import Wafer

Measure = Callable[[tuple[int, ...]], tuple[float, int]]
"""Sparse layers, ascending, to the loss of the text and the bytes of keys and values at its end."""


class Model(Protocol):
    """What is measured: a `wse_emu.model.WaferModel`."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes, and the patterns as they are."""

    @property
    def options(self) -> EngineOptions:
        """How it runs."""

    @property
    def wafer(self) -> Wafer:
        """Where it runs."""

    def __call__(self, input_ids: ArrayLike, /) -> Any:
        """Run a text."""

    def with_attention(self, attention: Sequence[AttentionPattern], /) -> Model:
        """The same model with these patterns, one for each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyStep:
    """A model with some layers sparse."""

    sparse_layers: tuple[int, ...]
    """Ascending; the others are as the model has them."""
    added: int | None
    """The layer that the step before did not have."""
    loss: float
    """Mean cross entropy of the text's tokens after the first, in nats."""
    kv_bytes: int
    """Keys and values of all layers at the end of the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyReport:
    """Which layers to keep dense, and why."""

    attention: AttentionPattern
    """Of sparse layers."""
    n_tokens: int
    """Of the text."""
    loss: float
    """Of the model as it is."""
    kv_bytes: int
    sensitivity: tuple[float | None, ...]
    """Per layer: by how much the loss rises when that layer alone is sparse; None if it would lose no key and was not tried."""
    steps: tuple[SparsifyStep, ...]
    """From no sparse layer to all that lose keys, the least sensitive first."""
    dense_layers: tuple[int, ...]
    """The proposal: the most sensitive ones, ascending."""

    @property
    def proposed(self) -> SparsifyStep:
        """The step at which those are dense."""
        return self.steps[len(self.steps) - 1 - len(self.dense_layers)]

    @property
    def untried_layers(self) -> tuple[int, ...]:
        """Layers that would lose no key, for they have a pattern of their own that is as narrow: they stay as they are. Ascending."""
        return tuple(layer for layer, rise in enumerate(self.sensitivity) if rise is None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("attention", "steps")}
        steps = [{f.name: getattr(step, f.name) for f in fields(step)} for step in self.steps]
        return {"attention": pattern_to_json(self.attention), **plain, "steps": steps, "untried_layers": self.untried_layers}

    def __str__(self) -> str:
        lines = [f"sparse: {pattern_text(self.attention)}; {self.n_tokens:,} tokens", ""]
        lines.append("sparse layers  added  loss rises alone      loss    keys and values, bytes")
        for step in self.steps:
            rise = None if step.added is None else self.sensitivity[step.added]
            alone = "" if rise is None else f"{rise:+.6f}"
            mark = "  <- proposed" if step is self.proposed else ""
            added = "" if step.added is None else step.added
            lines.append(f"{len(step.sparse_layers):>13}  {added:>5}  {alone:>17}  {step.loss:>8.5f}  {step.kv_bytes:>24,}{mark}")
        lines.append(f"keep dense: {', '.join(map(str, self.dense_layers)) or 'none'}")
        if self.untried_layers:
            layers = ", ".join(map(str, self.untried_layers))
            lines.append(f"stay as they are, for they have patterns of their own that are as narrow: {layers}")
        return "\n".join(lines)


def sparsify(model: Model, input_ids: ArrayLike, attention: AttentionPattern, *, keep_dense: int = 1) -> SparsifyReport:
    """Measure the loss of a text with every layer sparse alone, then let the least sensitive ones become sparse one after the other.

    Parameters
    ----------
    model : WaferModel
        As it is; it stays so, and weights and wafer are its own.
    input_ids : integers, (tokens,)
        The text: longer than what `attention` admits.
    attention : AttentionPattern
        What a sparse layer attends to.
    keep_dense : int
        How many of the layers that lose keys the proposal leaves as they are. Of layers that are equally sensitive the earlier ones become
        sparse first.

    Raises
    ------
    InputError
        If no layer would lose a key, or there are fewer such layers than `keep_dense`; if `input_ids` are no text of two tokens or more.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"`input_ids` must be the integers of one text, (tokens,), got {ids.dtype} of shape {ids.shape}")
    layers = check_sparsify(model.spec, attention, ids.size, keep_dense)

    def measure(sparse: tuple[int, ...]) -> tuple[float, int]:
        spec = model.spec.with_sparse_layers(attention, sparse)
        tried = model.with_attention(spec.patterns) if sparse else model
        loss = next_token_loss(tried(ids).logits[0], ids)
        return loss, kv_bytes(spec, model.wafer.spec, model.wafer.rows, model.wafer.cols, [spec.sequence_length(ids.size)], model.options)

    return rank_layers(model.spec.num_layers, layers, keep_dense, measure, attention=attention, n_tokens=ids.size)


def check_sparsify(spec: ModelSpec, attention: AttentionPattern, n_tokens: int, keep_dense: int) -> tuple[int, ...]:
    """Layers of which something can be measured: those that would lose keys, ascending.

    Such a layer admits fewer pairs of a query and a key of the text than with its own pattern, and keeps no more keys at the end.

    Raises
    ------
    InputError
        As `sparsify`; nothing runs.
    SpecError
        If the model chooses its keys itself, or a pattern does not describe so many positions.
    """
    if n_tokens < 2:
        raise InputError(f"a loss needs two tokens of text, got {n_tokens}")
    spec.with_sparse_layers(attention, range(spec.num_layers))  # refuses what the model cannot have
    n = spec.sequence_length(n_tokens)
    now = {pattern: _keys(pattern, n, spec.num_heads) for pattern in {*map(spec.pattern, range(spec.num_layers)), attention}}
    pairs, held = now[attention]
    own = [now[spec.pattern(layer)] for layer in range(spec.num_layers)]
    layers = tuple(layer for layer, (own_pairs, own_held) in enumerate(own) if pairs < own_pairs and held <= own_held)
    if not layers:
        dense = all(spec.pattern(layer).is_full for layer in range(spec.num_layers))
        why = "admits every key" if dense else "is no narrower than the patterns that the layers have"
        raise InputError(
            f"no layer would lose a key: {pattern_text(attention)} {why} ({n_tokens} tokens of text); "
            "give a longer text, or a narrower pattern"
        )
    if type(keep_dense) is not int or not 0 <= keep_dense <= len(layers):
        raise InputError(f"`keep_dense` must be an integer in 0..{len(layers)} (layers that would lose keys), got {show(keep_dense)}")
    return layers


def _keys(pattern: AttentionPattern, n: int, num_heads: int) -> tuple[int, int]:
    """Pairs of a query and a key of all heads in a sequence of n, and keys that are kept at its end."""
    positions = np.arange(n, dtype=np.int64)
    heads = pattern.heads or (pattern,) * num_heads
    of_layout = {layout: layout.ranges(positions).n_admitted for layout in pattern.layouts}
    return sum(of_layout[head] for head in heads), n_keys_of(pattern.held_after(n))


def rank_layers(
    n_layers: int, layers: Sequence[int], keep_dense: int, measure: Measure, *, attention: AttentionPattern, n_tokens: int
) -> SparsifyReport:
    """The report on `layers` of a model of `n_layers`, with losses and bytes from `measure`, which is asked for no set of layers twice."""
    loss, held = measure(())
    alone = {layer: measure((layer,)) for layer in layers}
    order = sorted(layers, key=lambda layer: (alone[layer][0] - loss, layer))
    steps = [SparsifyStep(sparse_layers=(), added=None, loss=loss, kv_bytes=held)]
    for n in range(1, len(order) + 1):
        sparse = tuple(sorted(order[:n]))
        found = alone[sparse[0]] if n == 1 else measure(sparse)
        steps.append(SparsifyStep(sparse_layers=sparse, added=order[n - 1], loss=found[0], kv_bytes=found[1]))
    return SparsifyReport(
        attention=attention, n_tokens=n_tokens, loss=loss, kv_bytes=held,
        sensitivity=tuple(alone[layer][0] - loss if layer in alone else None for layer in range(n_layers)),
        steps=tuple(steps), dense_layers=tuple(sorted(order[len(order) - keep_dense :])),
    )  # fmt: skip


def next_token_loss(logits: NDArray[np.float32], ids: NDArray[np.integer[Any]]) -> float:
    """Mean cross entropy of every token but the first, in nats: logits (T, vocab) and ids (T,).

    Raises
    ------
    InputError
        If there is no second token.
    """
    if len(ids) < 2:
        raise InputError(f"a loss needs two tokens of text, got {len(ids)}")
    wide = logits[:-1].astype(np.float64)
    return float((logsumexp(wide, axis=1) - np.take_along_axis(wide, ids[1:, None], axis=1)[:, 0]).mean())

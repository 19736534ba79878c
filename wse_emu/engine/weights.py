"""The weights of a model as a pass over its layers asks for them: by role, on their way to the wafer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.options import EngineOptions
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import HalfType
from wse_emu.foundation.weights import head_weights, layer_prefix, layer_weights, router_vectors
from wse_emu.layers.clamped_experts import ClampedWeights
from wse_emu.layers.ffn import FfnWeights
from wse_emu.layers.router import RouterWeights
from wse_emu.layers.stream import StreamedHeads, StreamedMatrix, StreamedVector
from wse_emu.memoryx.store import WeightStore


class ModelWeights:
    """Weights of one store.

    Parameters
    ----------
    store : WeightStore
    spec : ModelSpec
    options : EngineOptions
    shapes_only : bool
        Whether values are never asked for (the ``dry`` executor).
    disk_bytes : callable, optional
        Bytes of a matrix as the checkpoint holds it; float32 by default.
    """

    def __init__(
        self, store: WeightStore, spec: ModelSpec, options: EngineOptions, *, shapes_only: bool,
        disk_bytes: Callable[[str], int] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.spec, self.options, self.shapes_only = store, spec, options, shapes_only
        self._disk_bytes = disk_bytes
        self._layer_names: dict[int, tuple[str, ...]] = {}

    def layer_names(self, layer: int) -> tuple[str, ...]:
        """Tensors of a layer that are needed whatever is chosen, and whichever tokens there are."""
        names = self._layer_names.get(layer)
        if names is None:
            left_out = (".memory.",) if self.options.stream_experts == "all" else (".memory.", ".experts.")
            names = tuple(w.name for w in layer_weights(self.spec, layer) if not any(part in w.name for part in left_out))
            self._layer_names[layer] = names
        return names

    def memory_names(self, layer: int) -> tuple[str, ...]:
        """Tensors of a layer that memory tokens alone go through."""
        return tuple(w.name for w in layer_weights(self.spec, layer) if ".memory." in w.name)

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """Tensors behind the last layer."""
        return tuple(w.name for w in head_weights(self.spec))

    def expert_names(self, layer: int, expert: int) -> list[str]:
        """Names of one expert's matrices and biases."""
        prefix = f"{layer_prefix(layer)}experts.{expert}."
        biases = [] if self.spec.clamped_experts is None else [prefix + "b_gate_up", prefix + "b_down"]
        return [prefix + "w_gate_up", prefix + "w_down", *biases]

    def matrix(self, name: str, n_in: int, n_out: int) -> StreamedMatrix:
        """A matrix of the store, on its way to the wafer."""
        return StreamedMatrix(name, n_in, n_out, *self._at_rest(name))

    def score_matrix(self, name: str, n_in: int, n_out: int) -> StreamedMatrix:
        """A matrix whose products decide or leave the wafer: their sums are float32 whatever the precision."""
        return replace(self.matrix(name, n_in, n_out), sums=None)

    def _at_rest(self, name: str) -> tuple[NDArray[np.float32] | None, int | None, bool, HalfType | None]:
        """Values, bytes on disk, whether zeros stay behind, and the format in which sums are handed on."""
        tiles, options = None if self.shapes_only else self.store.tiles(name), self.options
        return tiles, None if self._disk_bytes is None else self._disk_bytes(name), options.skip_zero_weights, options.precision.sums

    def heads(self, name: str, n_in: int, n_out: int) -> StreamedHeads:
        """A matrix for every query head."""
        return StreamedHeads(name, self.spec.num_heads, n_in, n_out, *self._at_rest(name))

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A vector of the store; None where only shapes are streamed."""
        return None if self.shapes_only else self.store.vector(name)

    def ffn(self, prefix: str, width: int) -> FfnWeights:
        """Gate/up and down matrices of the network of `width` features whose names begin with `prefix`."""
        h, f = self.spec.hidden_size, width
        return FfnWeights(self.matrix(prefix + "w_gate_up", h, 2 * f), self.matrix(prefix + "w_down", f, h), self.spec.activation)

    def expert(self, layer: int, expert: int) -> FfnWeights:
        """Weights of one expert."""
        prefix, clamped = f"{layer_prefix(layer)}experts.{expert}.", self.spec.clamped_experts
        weights = self.ffn(prefix, self.spec.moe_intermediate_size)
        if clamped is None:
            return weights
        b_gate_up, b_down = (StreamedVector(prefix + name, self.vector(prefix + name)) for name in ("b_gate_up", "b_down"))
        return replace(weights, clamped=ClampedWeights(b_gate_up, b_down, np.float32(clamped.alpha), np.float32(clamped.limit)))

    def router(self, layer: int) -> RouterWeights:
        """Gate and biases of a layer's router."""
        spec, prefix = self.spec, layer_prefix(layer)
        there = router_vectors(spec.routing)
        vectors = [
            StreamedVector(prefix + name, self.vector(prefix + name)) if name in there else None
            for name in ("router_bias", "e_score_correction_bias")
        ]
        gate = replace(self.score_matrix(prefix + "router", spec.hidden_size, spec.num_experts), skip_zeros=False)
        return RouterWeights(gate, *vectors)

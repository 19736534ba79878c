"""Decisions given instead of computed, of routers and of indexers: for the ``dry`` executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.foundation.errors import TraceError


@dataclass(frozen=True)
class RoutingTrace:
    """Chosen experts of every MoE layer, and chosen keys of every indexer, for the new tokens of one forward pass."""

    topk_ids: tuple[NDArray[np.int64], ...]
    """One (T, top_k) array for each MoE layer."""
    chosen_keys: tuple[NDArray[np.uint8], ...] = ()
    """One (T, keys / 8) array for each layer with an indexer: bits of the positions that each token attends to; () are the newest."""

    def layer(self, number: int) -> NDArray[np.int64]:
        """The decision of one MoE layer, counted from 0.

        Raises
        ------
        TraceError
            If the trace has no such layer.
        """
        if not 0 <= number < len(self.topk_ids):
            raise TraceError(f"the routing trace holds {len(self.topk_ids)} MoE layers, number {number} was asked for")
        return self.topk_ids[number]

    def keys(self, number: int) -> NDArray[np.uint8] | None:
        """What one indexer chose, counted from 0; None if the trace says nothing of keys.

        Raises
        ------
        TraceError
            If it does, but of fewer.
        """
        if self.chosen_keys and number >= len(self.chosen_keys):
            raise TraceError(f"the routing trace holds {len(self.chosen_keys)} indexers' choices, number {number} was asked for")
        return self.chosen_keys[number] if self.chosen_keys else None

    @staticmethod
    def recorded(topk_ids: Sequence[ArrayLike]) -> RoutingTrace:
        """From decisions that a run gave back: one (T, top_k) or (batch, tokens, top_k) array for each MoE layer, padding left out."""
        layers = []
        for i, ids in enumerate(topk_ids):
            array = np.asarray(ids)
            if array.dtype.kind not in "iu" or array.ndim < 2:
                raise TraceError(f"layer {i}: a routing trace holds integers of two axes, got {array.dtype} with {array.ndim}")
            layers.append(np.ascontiguousarray(array.reshape(-1, array.shape[-1]), np.int64))
        return RoutingTrace(tuple(layers))

    @staticmethod
    def worst_case(n_layers: int, n_tokens: int, n_experts: int, top_k: int) -> RoutingTrace:
        """As many different experts as the tokens can choose: most weights streamed."""
        ids = np.arange(n_tokens * top_k, dtype=np.int64).reshape(n_tokens, top_k) % n_experts
        return RoutingTrace((ids,) * n_layers)

    @staticmethod
    def from_histogram(
        counts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]], n_tokens: int, top_k: int, seed: int = 0
    ) -> RoutingTrace:
        """Decisions drawn so that experts are chosen as often, relatively, as in a measured histogram.

        Parameters
        ----------
        counts : sequence of sequences of int, or mapping from layer to one
            For each layer, how often each expert was chosen.
        n_tokens, top_k : int
        seed : int

        Raises
        ------
        TraceError
            If a layer has fewer than `top_k` experts with a count above zero, or a negative count, or a mapping leaves out a layer.
        """
        if isinstance(counts, Mapping):
            if set(counts) != set(range(len(counts))):
                raise TraceError(f"the histogram must name the layers 0..{len(counts) - 1}, got {sorted(counts)}")
            counts = [counts[layer] for layer in range(len(counts))]
        rng = np.random.default_rng(seed)
        layers = []
        for i, row in enumerate(counts):
            weight = np.asarray(row, np.float64)
            if weight.ndim != 1 or (weight < 0).any() or np.count_nonzero(weight) < top_k:
                raise TraceError(f"layer {i}: the histogram must have at least {top_k} (`top_k`) experts above zero and none below")
            with np.errstate(divide="ignore"):
                keys = np.log(weight) + rng.gumbel(size=(n_tokens, weight.size))
            layers.append(np.argsort(-keys, axis=1)[:, :top_k].astype(np.int64))
        return RoutingTrace(tuple(layers))

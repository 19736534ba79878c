"""State of one forward pass: where tokens lie, what has been asked for, and what is given back."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.engine.weights import ModelWeights
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.key_ranges import KeyRanges
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import TapRecord, joined
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.elementwise import bias
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.layers.layer_norm import layer_norm
from wse_emu.layers.linear import Selection
from wse_emu.layers.norm import add_residual, rms_norm
from wse_emu.layers.router import Routing
from wse_emu.memoryx.layout import qkv_to_published
from wse_emu.wafer.placement import Ints, Placement, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer

Kinds = tuple[tuple[str, Selection | None], ...]
"""Prefix of the projections around attention (`ModelSpec.weight_sets`) to the tokens that go through them; None is all."""

_ONE_KIND: Kinds = (("", None),)


def kinds_of(spec: ModelSpec, positions: Ints, split: Split) -> Kinds:
    """Which tokens at these positions, on rows of cores split by `split`, go through which projections; kinds without a token are none."""
    if len(spec.weight_sets) == 1 or spec.memory_tokens is None:
        return _ONE_KIND
    memory = spec.memory_tokens.are_at(positions)
    ordinary, own = np.flatnonzero(~memory), np.flatnonzero(memory)
    if not own.size or not ordinary.size:
        return (("memory." if own.size else "", None),)
    return tuple((kind, Selection.of_tokens(rows, split)) for kind, rows in zip(spec.weight_sets, (ordinary, own), strict=True))


@dataclass(slots=True)
class ForwardResult:
    """What one forward pass gives back, for the new tokens in the order of `Sequences`."""

    logits: NDArray[np.float32]
    """(m, vocab) of the wanted tokens."""
    topk_ids: list[NDArray[np.int64]] = field(default_factory=list)
    """Per MoE layer (T, top_k)."""
    topk_weights: list[NDArray[np.float32]] = field(default_factory=list)
    router_logits: list[NDArray[np.float32]] = field(default_factory=list)
    """Per MoE layer (T, n_experts), if asked for."""
    hidden_states: list[NDArray[np.float32]] = field(default_factory=list)
    """Embedding output, then every layer's output (T, hidden), if asked for."""
    chosen_keys: list[NDArray[np.uint8]] = field(default_factory=list)
    """Per layer with an indexer (T, keys / 8): bits of the positions that each token attends to, packed."""
    taps: TapRecord | None = None


@dataclass(slots=True)
class AttentionTile:
    """A part of the batch on its way through attention."""

    run: ForwardPass
    first: int
    """First of its tokens among all of the pass."""
    tables: dict[bool, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    """Rotary tables at the host, which come in anew with every tile."""
    factors: NDArray[np.float32] | None = None
    """The queries' temperature at the host, likewise."""


class ForwardPass:
    """State of one forward pass.

    Parameters
    ----------
    wafer : Wafer
    weights : ModelWeights
    token_ids : ndarray of int64, (T,)
    sequences : Sequences
        The new tokens.
    cache : KVCache
    bands : TokenBands
        How they lie over rows.
    hidden_states, router_logits : bool
        What to read over the probe channel.
    trace : RoutingTrace, optional
        With the ``dry`` executor: chosen experts.
    whole : bool
        All sequences go through attention together, whatever the options say.
    """

    def __init__(
        self, wafer: Wafer, weights: ModelWeights, token_ids: Ints, sequences: Sequences, cache: KVCache, bands: TokenBands,
        *, hidden_states: bool, router_logits: bool, trace: RoutingTrace | None, whole: bool = False,
    ) -> None:  # fmt: skip
        self.wafer, self.weights, self.spec, self.options = wafer, weights, weights.spec, weights.options
        self.token_ids, self.sequences, self.bands, self.trace = token_ids, sequences, bands, trace
        self.cache, self.heads = cache, cache.heads
        self.want_hidden, self.want_router = hidden_states, router_logits
        self.result = ForwardResult(np.zeros((0, self.spec.vocab_size), np.float32))
        columns = Split.balanced(self.spec.hidden_size, wafer.cols)
        self.place = wafer.placement((bands.n_tokens, self.spec.hidden_size), ("row", bands.split), ("col", columns))
        """Where the residual stream lies."""
        self.kinds = _ONE_KIND if len(self.spec.weight_sets) == 1 else kinds_of(self.spec, sequences.positions, bands.split)
        """Which tokens go through which projections."""
        self.needs_memory_weights = len(self.spec.weight_sets) > 1 and (self.kinds[-1][0] != "" or self.options.kv == "recompute")
        """Whether memory tokens are among them, or may be among those whose keys are made again."""
        self.tables: dict[bool, tuple[PlacedTensor, PlacedTensor]] = {}
        """Rotary cosines and sines, of the layers that turn locally and of the others."""
        self.factors: PlacedTensor | None = None
        """Factor of each token's queries in layers without rotation, where there is one."""
        self.index_tables: tuple[PlacedTensor, PlacedTensor] | None = None
        """Rotary cosines and sines of the indexers."""
        self.earlier_tables: dict[tuple[AttentionPattern, bool], tuple[PlacedTensor, PlacedTensor]] = {}
        """Rotary cosines and sines of earlier tokens whose keys are made again, of the layers with a pattern that turn (locally)."""
        self.chosen: KeyRanges | None = None
        """Keys that tokens attend to, as the last indexer chose them; None is all."""
        self.kept_keys: KeptKeys | None = None
        """The same as every core was told, for this layer and those that share them."""
        self.replay: NDArray[np.uint8] | None = None
        """With the ``dry`` executor, of a tile: what the layer's indexer chooses, as `ForwardResult.chosen_keys` has it."""
        self.layer: int | None = None
        """Layer that runs; None before the first and after the last."""
        self.tiles = [] if whole or self.options.bta_max_tile is None else self._cut(self.options.bta_max_tile)
        """Passes over parts of the batch, for attention."""

    def _cut(self, most: int) -> list[AttentionTile]:
        """Tiles of sequences whose slots belong together."""
        of = self.sequences.slot // most
        edges = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), of.size]
        if len(edges) == 2:
            return []
        tiles = []
        for begin, end in pairwise(edges):
            sequences, first = self.sequences.part(begin, end), int(self.sequences.first_token[begin])
            tokens, bands = self.token_ids[first : first + sequences.n_tokens], TokenBands(sequences.n_tokens, self.wafer.rows)
            tile = ForwardPass(
                self.wafer, self.weights, tokens, sequences, self.cache, bands, hidden_states=False, router_logits=False, trace=None,
                whole=True,
            )  # fmt: skip
            tiles.append(AttentionTile(tile, first))
        return tiles

    def empty(self, name: str, placement: Placement) -> PlacedTensor:
        """Room for what a stage stores, in the format of activations."""
        return self.wafer.empty(name, placement, stored=self.options.precision.stored)

    @property
    def current_layer(self) -> int:
        """Layer that runs."""
        assert self.layer is not None
        return self.layer

    def note_routing(self, routing: Routing) -> None:
        """Keep a layer's decision."""
        self.result.topk_ids.append(routing.topk_ids)
        self.result.topk_weights.append(routing.topk_weights)
        stages = {} if self.result.taps is None else self.result.taps.stages
        if routing.logits is not None:
            self.result.router_logits.append(routing.logits)
            stages[self.layer, "router_logits"] = routing.logits
        if routing.scores is not None:
            stages[self.layer, "router_scores"] = routing.scores
        stages[self.layer, "topk_ids"], stages[self.layer, "topk_weights"] = routing.topk_ids, routing.topk_weights

    def note_keys(self, taken: NDArray[np.bool_], ranges: KeyRanges | None) -> None:
        """Keep what an indexer chose."""
        self.chosen = ranges
        self.result.chosen_keys.append(np.packbits(taken, axis=1))

    def give_up_keys(self) -> None:
        """Give back the SRAM of keys that layers attended to, of tiles too."""
        for run in (self, *(tile.run for tile in self.tiles)):
            if run.kept_keys is not None:
                run.kept_keys.free()
                run.kept_keys = None

    def give_up_tables(self) -> None:
        """Give back the SRAM of earlier tokens' rotary tables."""
        for tables in self.earlier_tables.values():
            for table in tables:
                table.free()
        self.earlier_tables.clear()

    def replayed_keys(self, n_keys: int) -> NDArray[np.bool_] | None:
        """With the ``dry`` executor: the next indexer's choice among `n_keys` positions, if the trace holds it."""
        packed = self.replay
        if packed is None and self.trace is not None:
            packed = self.trace.keys(len(self.result.chosen_keys))
        return None if packed is None else np.unpackbits(packed, axis=1)[:, :n_keys].astype(np.bool_)

    def replay_of(self, tile: AttentionTile) -> NDArray[np.uint8] | None:
        """A tile's part of the current layer's choice, if the layer has an indexer of its own."""
        if self.trace is None or not self.spec.runs_indexer(self.current_layer):
            return None
        packed = self.trace.keys(len(self.result.chosen_keys) - (tile.first > 0))  # the first tile has entered its part
        return None if packed is None else packed[tile.first : tile.first + tile.run.bands.n_tokens]

    def join_keys(self, tile: AttentionTile) -> None:
        """Add what a tile's indexer chose to the choice of the whole pass."""
        if not self.spec.runs_indexer(self.current_layer):
            return
        part = tile.run.result.chosen_keys[-1]
        if tile.first == 0:
            self.result.chosen_keys.append(part)
        else:
            self.result.chosen_keys[-1] = joined([self.result.chosen_keys[-1], part])

    def scope(self, stage: str) -> AbstractContextManager[None]:
        """Ledger scope of a stage of the current layer."""
        return self.wafer.ledger.scope(stage, self.layer)

    def tap(self, name: str, tensor: PlacedTensor) -> None:
        """Record a stage, if taps were asked for."""
        if self.result.taps is not None:
            self.result.taps.stages[self.layer, name] = self.wafer.drain(tensor, kind="probe")

    def tap_qkv(self, qkv: PlacedTensor, suffix: str, which: str) -> None:
        """Record queries, keys and values, those that `which` names, in published order."""
        if self.result.taps is not None:
            values = dict(zip("qkv", qkv_to_published(self.wafer.drain(qkv, kind="probe"), self.spec), strict=True))
            for name in which:
                self.result.taps.stages[self.layer, name + suffix] = values[name]

    def norm(self, name: str, x: PlacedTensor, out: PlacedTensor, scope: str) -> None:
        """``out = norm(x)`` with the weight of that name of the current layer; without a layer, of the model."""
        full = name if self.layer is None else layer_prefix(self.layer) + name
        with self.scope(scope):
            kind = self.spec.norm
            norm = layer_norm if kind.kind == "layer" else rms_norm
            norm(self.wafer, x, full, self.weights.vector(full), self.spec.rms_norm_eps, out, self.bands)
            if kind.bias:
                bias(self.wafer, out, full + "_bias", self.weights.vector(full + "_bias"), self.bands)
            self.tap(name, out)

    def join(self, x: PlacedTensor, y: PlacedTensor, after_norm: str, stage: str, scope: str) -> None:
        """``x = x + y``, the output of half a layer, normalised and scaled before where the model does that."""
        with ExitStack() as stack:
            if self.spec.norm.after:
                normal = stack.enter_context(self.empty("normalised output", self.place))
                self.norm(after_norm, y, normal, after_norm)
                y = normal
            with self.scope(scope):
                add_residual(self.wafer, x, y, self.spec.scales.residual)
                self.tap(stage, x)

    def rotary(self, layer: int) -> tuple[PlacedTensor, PlacedTensor]:
        """Rotary tables of a layer."""
        return self.tables[self.spec.rotates_locally(layer)]

    def note_hidden(self, x: PlacedTensor) -> None:
        """Keep the residual stream, if hidden states were asked for."""
        if self.want_hidden:
            with self.wafer.ledger.scope("probe", self.layer):
                self.result.hidden_states.append(self.wafer.drain(x, kind="probe"))

"""One forward pass: embed, then layer by layer stream the weights past the activations, then the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal

import numpy as np

from wse_emu.engine.attention_block import attention_block
from wse_emu.engine.ffn_block import ffn_block
from wse_emu.engine.forward_pass import ForwardPass, ForwardResult
from wse_emu.engine.index_projection import place_index_rotary
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.engine.weights import ModelWeights
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import half_of
from wse_emu.foundation.taps import TapRecord
from wse_emu.layers.edges import logits
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.index_keys import index_heads
from wse_emu.layers.kept_inputs import InputLayout
from wse_emu.layers.key_rows import ConcatenatedRows
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.layers.linear import Selection
from wse_emu.layers.query_temperature import place_factors, temperature_factors
from wse_emu.layers.rotary import place_rotary
from wse_emu.layers.stream import StreamedVector
from wse_emu.memoryx.prefetch import LayerStream
from wse_emu.memoryx.store import ShapeStore, WeightStore
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.wafer import Wafer

Phase = Literal["prompt", "decode"]


class Engine:
    """Runs a model's layers on a wafer, with its weights streamed from a store.

    Parameters
    ----------
    wafer : Wafer
    store : WeightStore
        May hold shapes only (`ShapeStore`) with the ``dry`` executor.
    options : EngineOptions
    spec : ModelSpec, optional
        The store's own by default; may differ from it in the patterns of attention and in the routing rule.
    disk_bytes : callable, optional
        Bytes of a matrix of the layout as the checkpoint holds it; float32 by default.
    """

    def __init__(
        self, wafer: Wafer, store: WeightStore, options: EngineOptions | None = None, *, spec: ModelSpec | None = None,
        disk_bytes: Callable[[str], int] | None = None,
    ) -> None:  # fmt: skip
        self.wafer = wafer
        self.store = store
        self.spec: ModelSpec = store.spec if spec is None else spec
        self.options = options or EngineOptions()
        self.options.check_model(self.spec)
        self.heads = _heads(self.spec, wafer.cols)
        self.weights = ModelWeights(store, self.spec, self.options, shapes_only=wafer.is_dry, disk_bytes=disk_bytes)
        self._stream: LayerStream | None = None

    def new_cache(
        self, capacity: Sequence[int] | Ints, *, prompts: Sequence[int] | None = None, of: ModelSpec | None = None,
        aliases: Sequence[int] | None = None,
    ) -> KVCache:  # fmt: skip
        """Key/value cache for sequences of at most `capacity` tokens each, `prompts` of them prompt (by default all).

        Where this engine has one layer of each kind of a larger model `of`, the cache is that model's, and the engine's layer i stands for
        its layer ``aliases[i]``.
        """
        stored = half_of(self.options.precision.kv)
        spec, most = of or self.spec, np.asarray(capacity, np.int64)
        lies = None
        if self.options.kv_growth == "concat":
            lies = ConcatenatedRows(self.wafer.rows, most.tolist() if prompts is None else prompts)
        patterns, index = [spec.pattern(layer) for layer in range(spec.num_layers)], None
        if spec.indexer is not None:
            own, all_layers = None, spec.indexer_layers
            if aliases is not None:
                own = [all_layers.index(aliases[layer]) for layer in self.spec.indexer_layers]
            heads = index_heads(spec.indexer, self.wafer.cols)
            index = KVCache(self.wafer, heads, len(all_layers), most, aliases=own, stored=stored, lies=lies)
        if self.options.kv == "recompute":
            layout, of_inputs = InputLayout(spec.hidden_size, self.wafer.cols), half_of(self.options.precision.dtype)
            inputs = KVCache(self.wafer, layout, spec.num_layers, most, patterns, aliases=aliases, stored=of_inputs, lies=lies)
            kinds = list(dict.fromkeys(patterns))
            ours = [kinds.index(self.spec.pattern(layer)) for layer in range(self.spec.num_layers)]
            try:
                return KVCache(self.wafer, self.heads, len(kinds), most, kinds, aliases=ours, stored=stored, inputs=inputs, lies=lies)
            except BaseException:
                inputs.free()
                raise
        return KVCache(self.wafer, self.heads, spec.num_layers, most, patterns, aliases=aliases, stored=stored, index=index, lies=lies)

    def forward(
        self, token_ids: Ints, sequences: Sequences, cache: KVCache, wanted: Ints,
        *, hidden_states: bool = False, router_logits: bool = False, taps: bool = False, trace: RoutingTrace | None = None,
        phase: Phase = "prompt",
    ) -> ForwardResult:  # fmt: skip
        """Run the new tokens through all layers; their keys and values join the cache.

        Parameters
        ----------
        token_ids : ndarray of int64, (T,)
            New tokens, sequence by sequence.
        sequences : Sequences
        cache : KVCache
        wanted : ndarray of int64
            Ascending indices of tokens whose logits are computed.
        hidden_states, router_logits, taps : bool
            What to read over the probe channel.
        trace : RoutingTrace, optional
            With the ``dry`` executor: chosen experts.
        phase : {"prompt", "decode"}
            Name of the pass in the ledger.
        """
        cache.check(sequences)
        bands = TokenBands(sequences.n_tokens, self.wafer.rows)
        run = ForwardPass(
            self.wafer, self.weights, np.asarray(token_ids, np.int64), sequences, cache, bands, hidden_states=hidden_states,
            router_logits=router_logits or taps, trace=trace,
        )  # fmt: skip
        if taps:
            run.result.taps = self._new_record(run)
        with ExitStack() as stack:
            stream = self._stream if self._stream is not None else stack.enter_context(self._new_stream(0))
            self.wafer.pending.check = self.store.check_readable
            stack.push(self._no_more)
            with self.wafer.ledger.forward_pass(phase, sequences.new_tokens):
                _execute(run, token_ids, wanted, stream, stack)
        cache.advance(sequences)
        return run.result

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Keep one prefetch thread for all forward passes inside the block; without it weights are made resident as they are used."""
        with self._new_stream(0 if self.wafer.is_dry else self.options.prefetch_depth) as stream:
            self._stream = stream
            try:
                yield
            finally:
                self._stream = None

    def _new_stream(self, depth: int) -> LayerStream:
        """Weights that are let go of when what reads them is computed; without prefetch, before the next ones are asked for."""
        pending = self.wafer.pending
        return LayerStream(self.store, depth=depth, behind=pending.behind if depth else pending.now)

    def _no_more(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A pass ends with all of it computed; one that failed, with nobody at it."""
        pending = self.wafer.pending
        try:
            if kind is None:
                pending.finish()
        finally:
            pending.abandon()  # nothing, where all went well
            pending.check = None

    def _new_record(self, run: ForwardPass) -> TapRecord:
        widths = {
            "hidden": self.spec.hidden_size, "ffn": self.spec.intermediate_size, "expert": self.spec.moe_intermediate_size,
            "vocab": self.spec.vocab_size, "shared": 0 if self.spec.shared_experts is None else self.spec.shared_experts.intermediate_size,
        }  # fmt: skip
        starts = {name: Split.balanced(n, self.wafer.cols).starts for name, n in widths.items() if n}
        starts["heads"] = self.heads.context.starts
        latent = self.spec.latent
        if latent is not None:
            starts["query"] = Split.balanced(latent.qk_nope_head_dim // 2, self.wafer.cols).scaled(2).starts
            starts["values"] = Split.balanced(latent.v_head_dim // 2, self.wafer.cols).scaled(2 * self.spec.num_heads).starts
            if latent.q_lora_rank is not None:
                starts["query_a"] = Split.balanced(latent.q_lora_rank, self.wafer.cols).starts
        sequences, rows = run.sequences, run.bands.split.owner
        in_attention = np.concatenate([tile.run.bands.split.owner for tile in run.tiles]) if run.tiles else rows
        return TapRecord(
            seq=np.repeat(sequences.slot, sequences.n_new), pos=sequences.positions, token_ids=run.token_ids,
            row_of_token=rows, row_in_attention=in_attention, col_starts=starts,
        )  # fmt: skip


def _execute(run: ForwardPass, token_ids: Ints, wanted: Ints, stream: LayerStream, stack: ExitStack) -> None:
    """Embedding, layers, head."""
    wafer, spec, weights, ledger = run.wafer, run.spec, run.weights, run.wafer.ledger
    x = stack.enter_context(run.empty("residual stream", run.place))
    with ledger.scope("embedding"):
        wafer.inject(x, None if wafer.is_dry else weights.store.embed(_embedding_rows(run, token_ids)))
        kinds = {spec.rotates_locally(i) for i in range(spec.num_layers) if spec.rotates(i)}
        for local in [] if run.tiles else sorted(kinds):  # tiles have their own
            run.tables[local] = place_rotary(wafer, spec, run.sequences, run.heads, run.bands, local=local)
            for table in run.tables[local]:
                stack.enter_context(table)
        if spec.indexer is not None and not run.tiles:
            place_index_rotary(run, stack)
        tuned = spec.query_temperature
        if tuned is not None and not run.tiles and not all(map(spec.rotates, range(spec.num_layers))):
            factors = None if wafer.is_dry else temperature_factors(tuned, run.sequences)
            run.factors = stack.enter_context(place_factors(wafer, run.heads, run.bands, factors))
        run.tap("embedding", x)
        run.note_hidden(x)
    for layer in range(spec.num_layers):
        run.layer = layer
        last = layer + 1 == spec.num_layers
        then = weights.head_names if last else weights.layer_names(layer + 1)
        with stream.layer(weights.layer_names(layer), then):
            if run.needs_memory_weights:
                with stream.layer(weights.memory_names(layer)):
                    attention_block(run, x)
            else:
                attention_block(run, x)
            ffn_block(run, x, stream)
        run.note_hidden(x)
    run.give_up_keys()
    run.give_up_tables()
    run.layer = None
    with stream.layer(weights.head_names, weights.layer_names(0)), run.empty("normalised", run.place) as normal:
        run.norm("final_norm", x, normal, "final_norm")
        with ledger.scope("lm_head"):
            head = weights.score_matrix("lm_head", spec.hidden_size, spec.vocab_size)
            selection = Selection.of_tokens(np.asarray(wanted, np.int64), run.bands.split)
            offset = StreamedVector("lm_head_bias", weights.vector("lm_head_bias")) if spec.biases.head else None
            run.result.logits = logits(
                wafer, normal, head, selection, run.bands, chunk=run.options.piece, cap=spec.scales.logits_cap, bias=offset
            )  # fmt: skip
    if run.result.taps is not None:
        run.result.taps.stages[None, "logits"] = run.result.logits


def _embedding_rows(run: ForwardPass, token_ids: Ints) -> Ints:
    """Rows of the embedding of the new tokens."""
    spec = run.spec
    if spec.memory_tokens is None or not spec.memory_tokens.add_extra_embedding:
        return token_ids
    return np.where(spec.memory_tokens.are_at(run.sequences.positions), spec.vocab_size, token_ids)


def _heads(spec: ModelSpec, n_cols: int) -> HeadLayout:
    """How a model's heads lie over columns; latents and rotary keys are the keys of one head that all queries share."""
    scale, cap, latent = spec.attention_scale, spec.scales.scores_cap, spec.latent
    if latent is None:
        return HeadLayout(spec.num_kv_heads, spec.queries_per_kv, spec.head_dim, n_cols, scale, cap)
    rank = latent.kv_lora_rank
    return HeadLayout(1, spec.num_heads, rank + spec.head_dim, n_cols, scale, cap, value_dim=rank)


def shape_engine(
    wafer: Wafer, spec: ModelSpec, options: EngineOptions | None = None, *, disk_bytes: Callable[[str], int] | None = None
) -> Engine:
    """An engine without weights, for the ``dry`` executor."""
    return Engine(wafer, ShapeStore(spec), options, disk_bytes=disk_bytes)

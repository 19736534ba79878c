"""One forward pass: embed, then layer by layer stream the weights past the activations, then the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import TapRecord
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.attention import attention
from wse_emu.layers.edges import logits
from wse_emu.layers.ffn import ExpertTaps, FfnWeights, dense_ffn, experts_ffn
from wse_emu.layers.head_norm import head_norm
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.layers.linear import DEFAULT_CHUNK, Selection, all_gather_bands, matmul
from wse_emu.layers.norm import add_residual, rms_norm
from wse_emu.layers.rotary import ROTATE_QK, place_rotary
from wse_emu.layers.router import Routing, report_chosen, route
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.memoryx.layout import context_to_published, qkv_to_published
from wse_emu.memoryx.prefetch import LayerStream
from wse_emu.memoryx.store import ShapeStore, WeightStore
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer

StreamExperts = Literal["activated", "all"]
Phase = Literal["prompt", "decode"]
CHUNKS = (DEFAULT_CHUNK, 16, 8, 4, 2)
"""Sizes of streamed pieces that are tried in turn: smaller ones need less SRAM and more messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How the program is run; no option changes a value of the result."""

    stream_experts: StreamExperts = "activated"
    """Stream only experts that some token chose, or all."""
    chunk: int | None = None
    """Most output columns of one streamed piece of a matrix; None takes the largest of `CHUNKS` that fits (see `wse_emu.engine.plan`)."""
    prefetch_depth: int = 1
    """Layers made resident ahead of use; 0 starts no thread."""

    def __post_init__(self) -> None:
        if self.stream_experts not in ("activated", "all"):
            raise SpecError(f"`stream_experts` must be 'activated' or 'all', got {self.stream_experts!r}")
        if self.chunk is not None and (type(self.chunk) is not int or self.chunk < 2):
            raise SpecError(f"`chunk` must be an integer >= 2 or None, got {self.chunk!r}")
        if type(self.prefetch_depth) is not int or self.prefetch_depth < 0:
            raise SpecError(f"`prefetch_depth` must be an integer >= 0, got {self.prefetch_depth!r}")

    @property
    def piece(self) -> int:
        """Columns of a streamed piece, with the default filled in."""
        return DEFAULT_CHUNK if self.chunk is None else self.chunk


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
    taps: TapRecord | None = None


class Engine:
    """Runs a model's layers on a wafer, with its weights streamed from a store.

    Parameters
    ----------
    wafer : Wafer
    store : WeightStore
        May hold shapes only (`ShapeStore`) with the ``dry`` executor.
    options : EngineOptions
    """

    def __init__(self, wafer: Wafer, store: WeightStore, options: EngineOptions | None = None) -> None:
        self.wafer = wafer
        self.store = store
        self.spec: ModelSpec = store.spec
        self.options = options or EngineOptions()
        self.heads = HeadLayout(self.spec.num_kv_heads, self.spec.queries_per_kv, self.spec.head_dim, wafer.cols)
        self._hidden = Split.balanced(self.spec.hidden_size, wafer.cols)
        self._stream: LayerStream | None = None

    def new_cache(self, capacity: Sequence[int] | Ints) -> KVCache:
        """Key/value cache for sequences of at most `capacity` tokens each."""
        return KVCache(self.wafer, self.heads, self.spec.num_layers, np.asarray(capacity, np.int64))

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
        run = _Pass(self, sequences, cache, bands, hidden_states, router_logits or taps, trace)
        if taps:
            run.result.taps = self._new_record(token_ids, sequences, bands)
        with ExitStack() as stack:
            stream = self._stream if self._stream is not None else stack.enter_context(LayerStream(self.store, depth=0))
            with self.wafer.ledger.forward_pass(phase, sequences.new_tokens):
                run.execute(token_ids, wanted, stream, stack)
        cache.advance(sequences)
        return run.result

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Keep one prefetch thread for all forward passes inside the block; without it weights are made resident as they are used."""
        depth = 0 if self.wafer.is_dry else self.options.prefetch_depth
        with LayerStream(self.store, depth=depth) as stream:
            self._stream = stream
            try:
                yield
            finally:
                self._stream = None

    def _new_record(self, token_ids: Ints, sequences: Sequences, bands: TokenBands) -> TapRecord:
        widths = {
            "hidden": self.spec.hidden_size, "ffn": self.spec.intermediate_size, "expert": self.spec.moe_intermediate_size,
            "vocab": self.spec.vocab_size,
        }  # fmt: skip
        starts = {name: Split.balanced(n, self.wafer.cols).starts for name, n in widths.items() if n}
        starts["heads"] = self.heads.context.starts
        return TapRecord(
            seq=np.repeat(sequences.slot, sequences.n_new), pos=sequences.positions, token_ids=np.asarray(token_ids, np.int64),
            row_of_token=bands.split.owner, col_starts=starts,
        )  # fmt: skip

    def layer_names(self, layer: int) -> list[str]:
        """Tensors of a layer that are needed whatever is chosen."""
        moe = self.spec.is_moe_layer(layer)
        names = ["attn_norm", "w_qkv", *(("q_norm", "k_norm") if self.spec.qk_norm else ()), "w_o", "ffn_norm"]
        names += ["router"] if moe else ["w_gate_up", "w_down"]
        prefix = layer_prefix(layer)
        out = [prefix + name for name in names]
        if moe and self.options.stream_experts == "all":
            for expert in range(self.spec.num_experts):
                out += expert_names(layer, expert)
        return out

    def matrix(self, name: str, n_in: int, n_out: int) -> StreamedMatrix:
        """A matrix of the store, on its way to the wafer."""
        return StreamedMatrix(name, n_in, n_out, None if self.wafer.is_dry else self.store.tiles(name))

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A vector of the store; None with the ``dry`` executor."""
        return None if self.wafer.is_dry else self.store.vector(name)

    def ffn(self, prefix: str, width: int) -> FfnWeights:
        """Gate/up and down matrices of the network of `width` features whose names begin with `prefix`."""
        h, f = self.spec.hidden_size, width
        return FfnWeights(self.matrix(prefix + "w_gate_up", h, 2 * f), self.matrix(prefix + "w_down", f, h))


def expert_names(layer: int, expert: int) -> list[str]:
    """Names of one expert's matrices."""
    prefix = f"{layer_prefix(layer)}experts.{expert}."
    return [prefix + "w_gate_up", prefix + "w_down"]


class _Pass:
    """State of one forward pass."""

    def __init__(
        self, engine: Engine, sequences: Sequences, cache: KVCache, bands: TokenBands, hidden_states: bool, router_logits: bool,
        trace: RoutingTrace | None,
    ) -> None:  # fmt: skip
        self.engine, self.wafer, self.spec, self.options = engine, engine.wafer, engine.spec, engine.options
        self.sequences, self.cache, self.bands, self.trace = sequences, cache, bands, trace
        self.want_hidden, self.want_router = hidden_states, router_logits
        self.result = ForwardResult(np.zeros((0, self.spec.vocab_size), np.float32))
        self.place = self.wafer.placement((bands.n_tokens, self.spec.hidden_size), ("row", bands.split), ("col", engine._hidden))
        self.layer: int | None = None

    def execute(self, token_ids: Ints, wanted: Ints, stream: LayerStream, stack: ExitStack) -> None:
        """Embedding, layers, head."""
        ledger = self.wafer.ledger
        x = stack.enter_context(self.wafer.empty("residual stream", self.place))
        with ledger.scope("embedding"):
            self.wafer.inject(x, None if self.wafer.is_dry else self.engine.store.embed(token_ids))
            cos, sin = place_rotary(self.wafer, self.spec, self.sequences, self.engine.heads, self.bands)
            stack.enter_context(cos)
            stack.enter_context(sin)
            self.tap("embedding", x)
            self.note_hidden(x)
        for layer in range(self.spec.num_layers):
            self.layer = layer
            last = layer + 1 == self.spec.num_layers
            then = ["final_norm", "lm_head"] if last else self.engine.layer_names(layer + 1)
            with stream.layer(self.engine.layer_names(layer), then):
                self.attention_block(x, cos, sin)
                self.ffn_block(x, stream)
            self.note_hidden(x)
        self.layer = None
        with stream.layer(["final_norm", "lm_head"], self.engine.layer_names(0)), self.wafer.empty("normalised", self.place) as normal:
            with ledger.scope("final_norm"):
                rms_norm(self.wafer, x, "final_norm", self.engine.vector("final_norm"), self.spec.rms_norm_eps, normal, self.bands)
                self.tap("final_norm", normal)
            with ledger.scope("lm_head"):
                head = self.engine.matrix("lm_head", self.spec.hidden_size, self.spec.vocab_size)
                selection = Selection.of_tokens(np.asarray(wanted, np.int64), self.bands.split)
                self.result.logits = logits(self.wafer, normal, head, selection, self.bands, chunk=self.options.piece)
        if self.result.taps is not None:
            self.result.taps.stages[None, "logits"] = self.result.logits

    def attention_block(self, x: PlacedTensor, cos: PlacedTensor, sin: PlacedTensor) -> None:
        """``x = x + attention(norm(x)) @ w_o``."""
        engine, wafer, spec, layer = self.engine, self.wafer, self.spec, self.layer
        assert layer is not None
        heads, prefix, rows = engine.heads, layer_prefix(layer), self.place.axis0
        n = self.bands.n_tokens
        with ExitStack() as stack:
            qkv = stack.enter_context(
                wafer.empty("queries, keys and values", wafer.placement((n, heads.qkv.total), rows, ("col", heads.qkv)))
            )
            with wafer.empty("normalised", self.place) as normal:
                with self.scope("attention_norm"):
                    rms_norm(wafer, x, prefix + "attn_norm", engine.vector(prefix + "attn_norm"), spec.rms_norm_eps, normal, self.bands)
                    self.tap("attn_norm", normal)
                with self.scope("qkv"):
                    w_qkv = engine.matrix(prefix + "w_qkv", spec.hidden_size, heads.qkv.total)
                    matmul(wafer, normal, w_qkv, qkv, self.bands, chunk=self.options.piece)
                    all_gather_bands(wafer, qkv, self.bands)
                    self.tap_qkv(qkv, "")
            if spec.qk_norm:
                with self.scope("head_norm"):
                    names = (prefix + "q_norm", prefix + "k_norm")
                    weights = None if wafer.is_dry else (engine.store.vector(names[0]), engine.store.vector(names[1]))
                    head_norm(wafer, qkv, heads, names, weights, spec.rms_norm_eps, self.bands)
                    self.tap_qkv(qkv, "_norm")
            with self.scope("rotary"):
                wafer.launch(ROTATE_QK, qkv=qkv, cos=cos, sin=sin, q_slots=spec.queries_per_kv)
                self.tap_qkv(qkv, "_rope")
            with self.scope("kv_cache"):
                self.cache.append(layer, qkv, self.sequences, self.bands)
            context = stack.enter_context(
                wafer.empty("attention context", wafer.placement((n, heads.context.total), rows, ("col", heads.context)))
            )
            with self.scope("attention"):
                record = self.result.taps
                statistics = attention(
                    wafer, qkv, context, self.cache, layer, self.sequences, self.bands, window=spec.window(layer), probe=record is not None
                )
                if record is not None and statistics is not None:
                    record.stages[layer, "attn_max"], record.stages[layer, "attn_denominator"] = statistics
                    record.stages[layer, "attn_context"] = context_to_published(wafer.drain(context, kind="probe"), spec)
            with self.scope("attention_out"), wafer.empty("attention output", self.place) as y:
                matmul(
                    wafer,
                    context,
                    engine.matrix(prefix + "w_o", heads.context.total, spec.hidden_size),
                    y,
                    self.bands,
                    chunk=self.options.piece,
                )
                all_gather_bands(wafer, y, self.bands)
                self.tap("attn_out", y)
                add_residual(wafer, x, y)
                self.tap("attn_residual", x)

    def ffn_block(self, x: PlacedTensor, stream: LayerStream) -> None:
        """``x = x + ffn(norm(x))``, dense or a mixture of experts."""
        engine, wafer, spec, layer = self.engine, self.wafer, self.spec, self.layer
        assert layer is not None
        prefix = layer_prefix(layer)
        with wafer.empty("normalised", self.place) as normal, wafer.empty("ffn output", self.place) as y:
            with self.scope("ffn_norm"):
                rms_norm(wafer, x, prefix + "ffn_norm", engine.vector(prefix + "ffn_norm"), spec.rms_norm_eps, normal, self.bands)
                self.tap("ffn_norm", normal)
            moe = spec.is_moe_layer(layer)
            if moe:
                self.experts(normal, y, stream)
            else:
                with self.scope("ffn"):
                    dense_ffn(
                        wafer, normal, engine.ffn(prefix, spec.ffn_width(layer)), y, self.bands, chunk=self.options.piece,
                        probe=self.tap if self.result.taps is not None else None,
                    )  # fmt: skip
            with self.scope("experts" if moe else "ffn"):
                self.tap("ffn_out", y)
                add_residual(wafer, x, y)
                self.tap("layer_out", x)

    def experts(self, normal: PlacedTensor, y: PlacedTensor, stream: LayerStream) -> None:
        """Route, then let the chosen (or all) experts stream past."""
        engine, wafer, spec, layer = self.engine, self.wafer, self.spec, self.layer
        assert layer is not None
        with ExitStack() as stack:
            with self.scope("router"):
                gate = engine.matrix(layer_prefix(layer) + "router", spec.hidden_size, spec.num_experts)
                replay = self.trace.layer(len(self.result.topk_ids)) if self.trace is not None else None
                routing = route(
                    wafer, normal, gate, self.bands, spec.top_k, spec.renormalize, chunk=self.options.piece, probe=self.want_router,
                    replay=replay,
                )  # fmt: skip
                stack.enter_context(routing)
                self.note_routing(routing)
                chosen: Sequence[int] = range(spec.num_experts)
                if self.options.stream_experts == "activated":
                    chosen = report_chosen(wafer, routing, self.bands, spec.num_experts).tolist()
            taps = self.expert_taps()
            with self.scope("experts"):
                experts_ffn(
                    wafer, normal, routing, self.stream_experts(chosen, stream), spec.moe_intermediate_size, y, self.bands,
                    n_experts=spec.num_experts, chunk=self.options.piece, taps=taps,
                )  # fmt: skip
        if self.result.taps is not None and taps is not None:
            stages = self.result.taps.stages
            stages[layer, "expert_hidden"], stages[layer, "expert_out"] = taps.hidden, taps.out

    def note_routing(self, routing: Routing) -> None:
        """Keep a layer's decision."""
        self.result.topk_ids.append(routing.topk_ids)
        self.result.topk_weights.append(routing.topk_weights)
        if routing.logits is None:
            return
        self.result.router_logits.append(routing.logits)
        if self.result.taps is not None:
            stages, layer = self.result.taps.stages, self.layer
            stages[layer, "router_logits"] = routing.logits
            stages[layer, "topk_ids"], stages[layer, "topk_weights"] = routing.topk_ids, routing.topk_weights

    def expert_taps(self) -> ExpertTaps | None:
        """Room for what the experts give, if taps were asked for."""
        if self.result.taps is None:
            return None
        shape = (self.bands.n_tokens, self.spec.top_k)
        sizes = (self.spec.moe_intermediate_size, self.spec.hidden_size)
        return ExpertTaps(*(np.zeros((*shape, n), np.float32) for n in sizes))

    def stream_experts(self, chosen: Sequence[int], stream: LayerStream) -> Iterator[tuple[int, FfnWeights]]:
        """Experts in ascending order; those that are not resident yet are made so one at a time."""
        layer = self.layer
        assert layer is not None
        resident = self.options.stream_experts == "all"
        for expert in chosen:
            with ExitStack() as stack:
                if not resident:
                    stack.enter_context(stream.layer(expert_names(layer, expert)))
                yield expert, self.engine.ffn(f"{layer_prefix(layer)}experts.{expert}.", self.spec.moe_intermediate_size)

    # ---- probes

    def scope(self, stage: str) -> AbstractContextManager[None]:
        """Ledger scope of a stage of the current layer."""
        return self.wafer.ledger.scope(stage, self.layer)

    def tap(self, name: str, tensor: PlacedTensor) -> None:
        """Record a stage, if taps were asked for."""
        if self.result.taps is not None:
            self.result.taps.stages[self.layer, name] = self.wafer.drain(tensor, kind="probe")

    def tap_qkv(self, qkv: PlacedTensor, suffix: str) -> None:
        """Record queries, keys and values in published order."""
        if self.result.taps is not None:
            q, k, v = qkv_to_published(self.wafer.drain(qkv, kind="probe"), self.spec)
            self.result.taps.stages[self.layer, "q" + suffix] = q
            self.result.taps.stages[self.layer, "k" + suffix] = k
            if not suffix:
                self.result.taps.stages[self.layer, "v"] = v

    def note_hidden(self, x: PlacedTensor) -> None:
        """Keep the residual stream, if hidden states were asked for."""
        if self.want_hidden:
            with self.wafer.ledger.scope("probe", self.layer):
                self.result.hidden_states.append(self.wafer.drain(x, kind="probe"))


def shape_engine(wafer: Wafer, spec: ModelSpec, options: EngineOptions | None = None) -> Engine:
    """An engine without weights, for the ``dry`` executor."""
    return Engine(wafer, ShapeStore(spec), options)

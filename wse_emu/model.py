"""The face for people: a model on a wafer, called and generated from as Hugging Face's models are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.checkpoint import MAX_SHARD_BYTES, Checkpoint, StorageType, open_checkpoint, random_checkpoint, save_checkpoint
from wse_emu.engine.forward_pass import ForwardResult
from wse_emu.engine.inference import Engine, Phase
from wse_emu.engine.options import EngineOptions, KvKeeping, StreamExperts
from wse_emu.engine.plan import Workload, prompt_chunks, sequences_of, settle, smallest_square
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.equivalence import VerifyReport, check_continuation, verify_record
from wse_emu.foundation.arguments import check_callable, check_flag, show
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import InputError, SpecError, SramOverflowError, TraceError
from wse_emu.foundation.memory_tokens import MemoryTokens
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.precision import DType, Precision, PrecisionOptLevel
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.foundation.taps import TapRecord, joined
from wse_emu.foundation.wafer_spec import WSE3
from wse_emu.layers.ffn import MoeImplementation
from wse_emu.layers.key_rows import KvGrowth
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.memoryx import RESIDENT_BYTES, ArrayStore, DiskBytes, ShapeStore, WeightStore, open_store
from wse_emu.sampling import Sampler
from wse_emu.wafer.turn import Turn
from wse_emu.wafer.wafer import Wafer

Ints = NDArray[np.int64]
Attention = AttentionPattern | Sequence[AttentionPattern]
"""One pattern for all layers, or one for each."""
RoutingChoice = RoutingRule | MoEConfig | str
"""A rule, ModelZoo's options, or a preset's name."""
_DEFAULT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a forward pass gives back, of the tokens that were given; padding positions hold zeros."""

    logits: NDArray[np.float32]
    """(batch, tokens, vocab)."""
    hidden_states: tuple[NDArray[np.float32], ...] | None = None
    """Embedding output, then the output of every layer, (batch, tokens, hidden), if asked for."""
    router_logits: tuple[NDArray[np.float32], ...] | None = None
    """One (batch, tokens, experts) array per MoE layer, if asked for."""
    topk_ids: tuple[NDArray[np.int64], ...] = ()
    """Chosen experts, one (batch, tokens, k) array per MoE layer, most probable first."""
    topk_weights: tuple[NDArray[np.float32], ...] = ()
    """Their weights, likewise."""


def from_pretrained(
    path: str | os.PathLike[str], *, wafer: Wafer | None = None, max_tokens: int | None = None, routing: RoutingChoice | None = None,
    stream_experts: StreamExperts = "activated", moe_implementation: MoeImplementation | None = None, prefill_chunk: int | None = None,
    chunk: int | None = None,
    prefetch_depth: int = 1, resident_bytes: int = RESIDENT_BYTES, bta_max_tile: int | None = None,
    attention: Attention | None = None, dense_attention_layers: Sequence[int] = (), dtype: DType = "float32",
    kv_dtype: DType | None = None, precision_opt_level: PrecisionOptLevel = 0, kv_growth: KvGrowth = "shift", kv: KvKeeping = "store",
    skip_zero_weights: bool = False, cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WaferModel:  # fmt: skip
    """Open a Hugging Face directory; its weights stay in MemoryX.

    The first time, the weights are rewritten into a checksummed wafer-layout file in the cache directory, which is then mapped.

    Parameters
    ----------
    path : path
        Directory with config.json and safetensors files (float32, float16 or bfloat16).
    wafer : Wafer, optional
        Where to run. By default the smallest square grid of a WSE-3 on which model, prompt and new tokens fit, chosen when they are known.
    max_tokens : int, optional
        Tokens of the longest sequence; the default grid is then chosen at once.
    routing : RoutingRule, str or MoEConfig, optional
        Another rule than the checkpoint's: which experts a token visits, with which weights; or the name of one of `ROUTING_PRESETS`. A
        configuration in ModelZoo's names also says `top_k` and `moe_implementation`. It must go with the experts that there are, and may
        ask for no bias that the checkpoint has not; a bias that it does not ask for is left aside.
    stream_experts : {"activated", "all"}
        Stream only experts that some token chose, or all.
    moe_implementation : {"functional", "experimental", "optimized"}, optional
        How experts find their tokens: every expert computed for every token, then masked; searched expert by expert (the default); sorted
        once. Never changes a value.
    prefill_chunk : int, optional
        Prompt tokens of each sequence per forward pass; all at once by default.
    chunk : int, optional
        Most output columns of one streamed piece of a matrix; by default 32, or fewer if only that fits. Never changes a value.
    prefetch_depth : int
        Layers made resident ahead of use.
    resident_bytes : int
        Mapped weight pages that may stay in the process behind the layer (1 GiB); 0 drops every layer's pages as soon as it is done. They
        belong to the system's file cache.
    bta_max_tile : int, optional
        Batch tiling on attention: sequences that go through attention together, all by default. Less SRAM there, and its weights stream
        once for each tile; experts still see the whole batch at once. Must divide every batch. Never changes a value.
    attention : AttentionPattern or a sequence of them, optional
        Which keys the queries of all layers, or of each, admit; by default what the checkpoint says.
    dense_attention_layers : sequence of int
        Layers that `attention` leaves dense.
    dtype : {"float32", "bfloat16", "float16", "cb16"}
        Format of activations: what a stage stores is rounded to it (to nearest, ties to even) where SRAM is written, and takes two bytes
        there but for float32. Arithmetic is float32. A number beyond the format's largest raises `NumberOverflowError`.
    kv_dtype : the same, optional
        Format of keys and values; by default `dtype`.
    precision_opt_level : {0, 1, 2}
        Which sums a format of 16 bits reaches. 0: none. 1: what a row of cores hands on of a matrix product is rounded to `dtype`; inside
        a core sums are float32. 2: the state of softmax too, after every key. Not with float32.
    kv_growth : {"shift", "concat"}
        Where keys and values of new tokens go: all rows of cores stay balanced, older tokens shifting; or nothing moves, and all that is
        generated comes to lie on the last row. Never changes a value.
    kv : {"store", "recompute"}
        Keep the keys and values of every layer; or keep the inputs that they are made of, ``hidden_size`` numbers a token in `dtype`, and
        make them again in every forward pass, one layer at a time. Never changes a value. Not with latent attention.
    skip_zero_weights : bool
        Leave zeros of matrices behind when they stream. Never changes a value.
    cache_dir : path, optional
        Where layout files are kept.
    progress : callable, optional
        Called with (bytes done, bytes in all) while the layout file is made.

    Returns
    -------
    WaferModel

    Raises
    ------
    ConfigError, CheckpointError, StoreError
        If the directory, its tensors or the cache cannot be used.
    SpecError
        If an argument breaks its rule, or one that it has with another or with the model.
    SramOverflowError
        If `max_tokens` fit no grid.
    """
    options = _options(
        wafer, max_tokens, prefill_chunk, stream_experts, _implementation(moe_implementation, routing), chunk, prefetch_depth, bta_max_tile,
        Precision(dtype=dtype, kv_dtype=kv_dtype, precision_opt_level=precision_opt_level), kv_growth, kv, skip_zero_weights,
    )  # fmt: skip
    check_callable("progress", progress)
    checkpoint = open_checkpoint(path)
    dry = wafer is not None and wafer.is_dry
    store: WeightStore = ShapeStore(checkpoint.spec)
    try:
        spec = _with_attention(checkpoint.spec, attention, dense_attention_layers)
        if routing is not None:
            spec = spec.with_routing(routing, learned=True)
        options.check_model(spec)
        if not dry:
            store = open_store(checkpoint, cache_dir=cache_dir, progress=progress, resident_bytes=resident_bytes)
        return WaferModel(checkpoint, store, wafer, max_tokens, prefill_chunk, options, spec)
    except BaseException:
        store.close()
        checkpoint.close()
        raise


def from_config(
    config: Mapping[str, Any] | ModelSpec, *, seed: int = 0, wafer: Wafer | None = None, max_tokens: int | None = None,
    routing: RoutingChoice | None = None, stream_experts: StreamExperts = "activated",
    moe_implementation: MoeImplementation | None = None, prefill_chunk: int | None = None, chunk: int | None = None,
    prefetch_depth: int = 1, bta_max_tile: int | None = None, attention: Attention | None = None,
    dense_attention_layers: Sequence[int] = (), dtype: DType = "float32", kv_dtype: DType | None = None,
    precision_opt_level: PrecisionOptLevel = 0, kv_growth: KvGrowth = "shift", kv: KvKeeping = "store", skip_zero_weights: bool = False,
) -> WaferModel:  # fmt: skip
    """Make a model with random weights, each made when it is first needed and then held in memory.

    Parameters
    ----------
    config : mapping or ModelSpec
        What config.json would hold, or the specification itself.
    seed : int
        The same seed gives the same weights.
    routing : RoutingRule, str or MoEConfig, optional
        Another rule than the one in `config`, as for `from_pretrained`; biases that it asks for are made.
    wafer, max_tokens, stream_experts, moe_implementation, prefill_chunk, chunk, prefetch_depth, bta_max_tile, attention
        As for `from_pretrained`.
    dense_attention_layers, dtype, kv_dtype, precision_opt_level, kv_growth, kv, skip_zero_weights
        As for `from_pretrained`.

    Returns
    -------
    WaferModel
    """
    options = _options(
        wafer, max_tokens, prefill_chunk, stream_experts, _implementation(moe_implementation, routing), chunk, prefetch_depth, bta_max_tile,
        Precision(dtype=dtype, kv_dtype=kv_dtype, precision_opt_level=precision_opt_level), kv_growth, kv, skip_zero_weights,
    )  # fmt: skip
    checkpoint = random_checkpoint(config, seed, None if routing is None else lambda spec: spec.with_routing(routing))
    spec = _with_attention(checkpoint.spec, attention, dense_attention_layers)
    options.check_model(spec)
    dry = wafer is not None and wafer.is_dry
    store: WeightStore = ShapeStore(checkpoint.spec) if dry else ArrayStore(checkpoint)
    return WaferModel(checkpoint, store, wafer, max_tokens, prefill_chunk, options, spec)


def _implementation(given: MoeImplementation | None, routing: RoutingChoice | None) -> MoeImplementation:
    """How experts are run: as asked for, or as ModelZoo's configuration says."""
    said = routing.moe_implementation if isinstance(routing, MoEConfig) else None
    if given is not None and said is not None and given != said:
        raise SpecError(f"`moe_implementation` is {show(given)}, and {said!r} in the MoEConfig; give one")
    return (said or "experimental") if given is None else given


def _with_attention(spec: ModelSpec, attention: Attention | None, dense_layers: Sequence[int]) -> ModelSpec:
    if attention is not None:
        return spec.with_attention(attention, dense_layers)
    if dense_layers:
        raise SpecError("`dense_attention_layers` names layers that `attention` leaves dense: give `attention` too")
    return spec


def _options(
    wafer: Wafer | None, max_tokens: int | None, prefill_chunk: int | None, stream_experts: StreamExperts,
    moe_implementation: MoeImplementation, chunk: int | None, prefetch_depth: int, bta_max_tile: int | None, precision: Precision,
    kv_growth: KvGrowth, kv: KvKeeping, skip_zero_weights: bool,
) -> EngineOptions:  # fmt: skip
    """Options of the engine; all that a model is made with is checked before any file is touched."""
    if wafer is not None and not isinstance(wafer, Wafer):
        raise SpecError(f"`wafer` must be a Wafer or None, got {show(wafer)}")
    for name, value in (("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and (type(value) is not int or value < 1):
            raise SpecError(f"`{name}` must be an integer >= 1 or None, got {show(value)}")
    return EngineOptions(
        stream_experts=stream_experts, moe_implementation=moe_implementation, chunk=chunk, prefetch_depth=prefetch_depth,
        bta_max_tile=bta_max_tile, precision=precision, kv_growth=kv_growth, kv=kv, skip_zero_weights=skip_zero_weights,
    )  # fmt: skip


class WaferModel:
    """A model whose weights rest in MemoryX and whose activations live on a wafer; made by `from_pretrained` and `from_config`."""

    def __init__(
        self, checkpoint: Checkpoint, store: WeightStore, wafer: Wafer | None, max_tokens: int | None, prefill_chunk: int | None,
        options: EngineOptions, spec: ModelSpec | None = None,
    ) -> None:  # fmt: skip
        self.spec = checkpoint.spec if spec is None else spec
        """Shapes and constants of the model."""
        self.checkpoint = checkpoint
        self.store = store
        self.prefill_chunk = prefill_chunk
        self.options = options
        self.recorded_routing: list[RoutingTrace] = []
        """Routing of every forward pass of the last call, for replay with the ``dry`` executor."""
        self.recorded_kv: Ints | None = None
        """(n_layers, n_sequences, n_rows) tokens in the key/value cache at the end of the last call, by row of cores."""
        self.recorded_from = 0
        """Index of the last call's first event in the wafer's ledger."""
        self.turn = Turn()
        """One thread at a time runs the model; the others wait."""
        self._chosen_grid = wafer is None
        self._wafer = wafer
        self._engine: Engine | None = None
        self._disk_bytes = DiskBytes(checkpoint.tensors.stored_bytes, checkpoint.spec)
        if wafer is None and max_tokens is not None:
            limit = min(max_tokens, self.spec.most_tokens)
            self._choose_grid(Workload.of((limit,), 0, prefill_chunk, memory=self.spec.memory_tokens))

    def __repr__(self) -> str:
        where = "no wafer chosen yet" if self._wafer is None else repr(self._wafer)
        return f"WaferModel({self.spec.family}, {self.spec.n_params:,} parameters, {where})"

    @property
    def wafer(self) -> Wafer:
        """The wafer; if none was given and none chosen yet, the smallest square grid for 512 tokens (or the model's positions)."""
        with self.turn.lock:
            if self._wafer is None:
                limit = min(_DEFAULT_TOKENS, self.spec.most_tokens)
                self._choose_grid(Workload.of((limit,), 0, self.prefill_chunk, memory=self.spec.memory_tokens))
            assert self._wafer is not None
            return self._wafer

    def with_attention(self, attention: Attention, dense_layers: Sequence[int] = ()) -> WaferModel:
        """The same model with other patterns of attention: on the same wafer, with the same weights, which are let go of but once.

        Parameters
        ----------
        attention, dense_layers
            As `from_pretrained` takes `attention` and `dense_attention_layers`.

        Raises
        ------
        SpecError
            If there is not one pattern for each layer, or a layer is not there.
        """
        spec = self.spec.with_attention(attention, dense_layers)
        return WaferModel(self.checkpoint, self.store, self._wafer, None, self.prefill_chunk, self.options, spec)

    def close(self) -> None:
        """Let go of the weights."""
        self.store.close()

    def __call__(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, output_hidden_states: bool = False,
        output_router_logits: bool = False, routing: RoutingTrace | Sequence[RoutingTrace] | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Logits of every token.

        Parameters
        ----------
        input_ids : integers, (batch, tokens) or (tokens,)
            The text. A model's memory tokens (`MemoryTokens`) are put in here, and what they give is left out again.
        attention_mask : 0 or 1, same shape, optional
            0 marks padding, on the left only.
        output_hidden_states, output_router_logits : bool
            Also give back the residual stream, the router's scores.
        routing : RoutingTrace or a sequence of them (one per prompt chunk), optional
            With the ``dry`` executor; by default the worst case.

        Returns
        -------
        ModelOutput
            Always with a batch axis.

        Raises
        ------
        InputError
            If ids or mask break a rule, or `routing` is given to an executor that computes its own.
        TraceError
            If `routing` is not for these tokens and layers.
        SramOverflowError
            If it does not fit, before the first layer starts.
        """
        check_flag("output_hidden_states", output_hidden_states, InputError)
        check_flag("output_router_logits", output_router_logits, InputError)
        prompts = _Prompts.read(input_ids, attention_mask, self.spec)
        with _session(self, "a model", prompts, 0, routing) as session:
            result = session.prefill(prompts, every=True, hidden_states=output_hidden_states, router_logits=output_router_logits)
        spread = prompts.spread
        return ModelOutput(
            logits=spread(result.logits),
            hidden_states=tuple(map(spread, result.hidden_states)) if output_hidden_states else None,
            router_logits=tuple(map(spread, result.router_logits)) if output_router_logits else None,
            topk_ids=tuple(map(spread, result.topk_ids)),
            topk_weights=tuple(map(spread, result.topk_weights)),
        )

    def generate(
        self, input_ids: ArrayLike, max_new_tokens: int = 24, *, sampler: Sampler | None = None, attention_mask: ArrayLike | None = None,
        on_token: Callable[[int, Ints], None] | None = None, routing: RoutingTrace | Sequence[RoutingTrace] | None = None,
    ) -> Ints:  # fmt: skip
        """Continue the prompts token by token, keys and values cached on the wafer.

        A model's memory tokens (`MemoryTokens`) are put into the prompt and, whenever a chunk is full, before the token that follows it:
        one pass takes in both. They count as no token here, neither of the prompt nor new; positions and keys they take.

        Parameters
        ----------
        input_ids : integers, (batch, tokens) or (tokens,)
        max_new_tokens : int
        sampler : Sampler, optional
            Greedy by default.
        attention_mask : 0 or 1, same shape, optional
            0 marks padding, on the left only.
        on_token : callable, optional
            Called with (step, ids (batch,)) after each step.
        routing : RoutingTrace or a sequence of them (one for every forward pass), optional
            With the ``dry`` executor; by default the worst case.

        Returns
        -------
        ndarray of int64
            Prompt and new tokens, (batch, tokens + new) or, for a prompt of one axis, (tokens + new,). A sequence that ended is filled up
            with the padding token (or, without one, the end token); generation stops when all have ended. The ``dry`` executor
            "generates" zeros and never ends early.

        Raises
        ------
        InputError
            If ids, mask or `max_new_tokens` break a rule, the sequence would pass the model's positions, or `routing` is given to an
            executor that computes its own.
        TraceError
            If `routing` is not for these tokens and layers.
        SramOverflowError
            If it does not fit, before the first layer starts.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise InputError(f"`max_new_tokens` must be an integer >= 1, got {show(max_new_tokens)}")
        _check_sampler(sampler)
        check_callable("on_token", on_token, InputError)
        prompts = _Prompts.read(input_ids, attention_mask, self.spec, int(max_new_tokens))
        sampler = sampler or Sampler(greedy=True)
        batch = len(prompts.lengths)
        streams = sampler.streams(batch)
        alive = list(range(batch))
        fill = self.spec.pad_token_id if self.spec.pad_token_id is not None else (self.spec.eos_token_ids or (0,))[0]
        columns: list[Ints] = []
        with _session(self, "`generate`", prompts, int(max_new_tokens), routing) as session:
            result = session.prefill(prompts, every=False)
            for step in range(int(max_new_tokens)):
                if self.wafer.is_dry:
                    chosen = np.zeros(len(alive), np.int64)
                else:
                    chosen = sampler.sample(result.logits, [streams[i] for i in alive])
                column = np.full(batch, fill, np.int64)
                column[alive] = chosen
                columns.append(column)
                if on_token is not None:
                    on_token(step, column.copy())
                ended = np.isin(chosen, self.spec.eos_token_ids) & (not self.wafer.is_dry)
                alive = [i for i, end in zip(alive, ended, strict=True) if not end]
                if not alive or step + 1 == max_new_tokens:
                    break
                result = session.decode(alive, column[alive])
        out = np.concatenate([prompts.ids, np.stack(columns, axis=1)], axis=1)
        return out if prompts.batched else out[0]

    def verify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, n_prompt: int | None = None, sampler: Sampler | None = None
    ) -> VerifyReport:  # fmt: skip
        """Run a prompt and hold every stage against the dense float64 reference.

        Parameters
        ----------
        input_ids : integers, (batch, tokens) or (tokens,)
        attention_mask : 0 or 1, same shape, optional
        n_prompt : int, optional
            Columns of `input_ids` that were a prompt; the others are what `generate` made of it. Each is then drawn again from the verified
            logits and must be the same token. Where rotary frequencies follow the length, keys in the cache keep the rotation they were
            given, and where a routing rule lets tokens meet, this check is left out with a note.
        sampler : Sampler, optional
            As given to `generate`; greedy by default.

        Returns
        -------
        VerifyReport
            ``passed``, and a table to print; a failure names the first stage, core, token and expert. Memory tokens are verified as all
            others are, and positions count them.
        """
        prompts = _Prompts.read(input_ids, attention_mask, self.spec)
        if n_prompt is not None and (type(n_prompt) is not int or not 1 <= n_prompt <= prompts.ids.shape[1]):
            raise InputError(f"`n_prompt` must be an integer in 1..{prompts.ids.shape[1]} (columns of `input_ids`), got {show(n_prompt)}")
        _check_sampler(sampler)
        record = self.record(input_ids, attention_mask)
        report = verify_record(record, self.spec, self.checkpoint.tensors.read, precision=self.options.precision)
        if n_prompt is None:
            return report
        if self.spec.is_moe and self.spec.routing.tokens_meet:
            note = "generated tokens: the routing rule lets tokens of a pass meet, one that comes alone is routed otherwise"
            return replace(report, notes=(*report.notes, note))
        if self.spec.rope_scaling is not None and self.spec.rope_scaling.follows_length:
            note = f"generated tokens: rotary scaling {self.spec.rope_scaling.kind} follows the length, the cache keeps older rotations"
            return replace(report, notes=(*report.notes, note))
        given = tuple(int(n) for n in prompts.mask[:, :n_prompt].sum(axis=1))
        memory = None if self.spec.memory_tokens is None else self.spec.memory_tokens.are_at(record.pos)
        check = check_continuation(record, given, sampler or Sampler(greedy=True), self.spec.eos_token_ids, memory=memory)
        return report.with_check(check)

    def record(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> TapRecord:
        """Every stage of a forward pass, of memory tokens too, through the probe channel; see `wse_emu.foundation.taps`."""
        prompts = _Prompts.read(input_ids, attention_mask, self.spec)
        if self._wafer is not None and self._wafer.is_dry:
            raise InputError("the `dry` executor computes no values to record; use another executor")
        with _session(self, "`record`", prompts, 0, None, probe=True) as session:
            result = session.prefill(prompts, every=True, taps=True)
        assert result.taps is not None
        return result.taps

    def save(
        self, path: str | os.PathLike[str], *, dtype: StorageType | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False, progress: Callable[[int, int], None] | None = None,
    ) -> Path:  # fmt: skip
        """Write the model as a Hugging Face directory that `from_pretrained` and transformers read.

        Memory holds a few MB of it at a time, however large it is, and it need not have run.

        Parameters
        ----------
        path : str or path
            The directory: made with its parents, or empty. It appears whole or, after an error or Ctrl-C, not at all.
        dtype : {"float32", "bfloat16", "float16"}, optional
            Stored type; values are rounded to nearest, ties to even. By default every tensor keeps the type that it has (random weights:
            float32).
        max_shard_bytes : int
            Most bytes of tensors in one file; with more, files are numbered and an index names them. A larger tensor has a file of its own.
        overwrite : bool
            Replace a checkpoint that is there; a directory that holds anything else is never replaced.
        progress : callable, optional
            Called with bytes written and bytes in all.

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        SpecError
            If `dtype` or `max_shard_bytes` is not one of those.
        SaveError
            If `path` is taken, the file system refuses or has too little space; if the model's attention or routing is not what a
            config.json of its family can say.
        CheckpointError
            If a value is not finite, or is beyond the largest value of `dtype`; it is named.
        """
        spec, published = self.spec, self.checkpoint.spec
        if all(spec.pattern(layer) == published.pattern(layer) for layer in range(spec.num_layers)):
            spec = replace(spec, patterns=published.patterns)
        checkpoint = replace(self.checkpoint, spec=spec)
        return save_checkpoint(checkpoint, path, dtype=dtype, max_shard_bytes=max_shard_bytes, overwrite=overwrite, progress=progress)

    # ---- where it runs

    def _choose_grid(self, work: Workload) -> None:
        side = smallest_square(self.spec, WSE3, work, self.options)
        if side is None:
            side = min(WSE3.usable_rows, WSE3.usable_cols)
            settle(self.spec, WSE3, side, side, work, self.options)  # raises, with the map of the worst core
        self._wafer = Wafer(WSE3, rows=side, cols=side)
        self._engine = None

    def _engine_for(self, work: Workload) -> Engine:
        """The engine, on a grid that holds the workload; raises `SramOverflowError` before anything runs."""
        if self._wafer is None:
            self._choose_grid(work)
        try:
            settled = self._settled(work)
        except SramOverflowError:
            if not self._chosen_grid:
                raise
            self._choose_grid(work)
            settled = self._settled(work)
        if self._engine is None or self._engine.options != settled:
            self._engine = Engine(self.wafer, self.store, settled, spec=self.spec, disk_bytes=self._disk_bytes)
        return self._engine

    def _settled(self, work: Workload) -> EngineOptions:
        wafer = self.wafer
        return settle(self.spec, wafer.spec, wafer.rows, wafer.cols, work, self.options)[0]


def _check_sampler(sampler: Any) -> None:
    if sampler is not None and not isinstance(sampler, Sampler):
        raise InputError(f"`sampler` must be a Sampler or None, got {show(sampler)}")


@dataclass(frozen=True)
class _Prompts:
    """Checked token ids of a batch."""

    ids: Ints
    """(batch, tokens)."""
    mask: NDArray[np.bool_]
    batched: bool
    memory: MemoryTokens | None

    @property
    def given(self) -> tuple[int, ...]:
        """Real tokens of each sequence."""
        return tuple(int(n) for n in self.mask.sum(axis=1))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The same with its memory tokens."""
        return self.given if self.memory is None else tuple(map(self.memory.length, self.given))

    def sequence(self, i: int) -> Ints:
        """Real tokens of one sequence, and its memory tokens."""
        tokens: Ints = self.ids[i][self.mask[i]]
        return tokens if self.memory is None else self.memory.insert(tokens)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the real tokens, by (sequence, position), at their places; zeros at padding."""
        out = np.zeros((*self.ids.shape, *values.shape[1:]), values.dtype)
        out[self.mask] = values
        return out

    @staticmethod
    def read(input_ids: ArrayLike, attention_mask: ArrayLike | None, spec: ModelSpec, new_tokens: int = 0) -> _Prompts:
        """Check ids and mask."""
        try:
            ids = np.asarray(input_ids)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                "`input_ids` must be a rectangle of integers; pad shorter prompts on the left and give `attention_mask`"
            ) from error
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
            raise InputError(
                f"`input_ids` must be integers (batch, tokens) or (tokens,), at least one; got {ids.dtype} of shape {ids.shape}"
            )
        batched = ids.ndim == 2
        ids = np.atleast_2d(ids)
        mask = np.ones(ids.shape, np.bool_)
        if attention_mask is not None:
            try:
                given = np.atleast_2d(np.asarray(attention_mask))
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"`attention_mask` must be a rectangle of shape {ids.shape}") from error
            if given.shape != ids.shape or given.dtype.kind not in "iub" or not np.isin(given, (0, 1)).all():
                raise InputError(f"`attention_mask` must hold 0 or 1 and have shape {ids.shape}, got {given.dtype} of shape {given.shape}")
            mask = given.astype(np.bool_)
            for i in np.flatnonzero((np.diff(mask.astype(np.int8), axis=1) < 0).any(axis=1) | ~mask.any(axis=1)).tolist():
                raise InputError(f"`attention_mask`: sequence {i} must be padded on the left only and keep at least one token")
        bad = mask & ((ids < 0) | (ids >= spec.vocab_size))
        if bad.any():
            i, t = (int(v[0]) for v in np.nonzero(bad))
            raise InputError(
                f"`input_ids`: sequence {i}, token {t}: id {int(ids[i, t])} lies outside the vocabulary 0..{spec.vocab_size - 1}"
            )
        spec.check_length(int(mask.sum(axis=1).max()), new_tokens)
        return _Prompts(ids.astype(np.int64), mask, batched, spec.memory_tokens)


@contextmanager
def _session(
    model: WaferModel, name: str, prompts: _Prompts, new_tokens: int, routing: RoutingTrace | Sequence[RoutingTrace] | None,
    *, probe: bool = False,
) -> Iterator[_Session]:  # fmt: skip
    """One call of a model, alone on its wafer; whatever ends it, what it placed there is gone afterwards."""
    if routing is not None and not (model._wafer is not None and model._wafer.is_dry):
        raise InputError("`routing` is replayed by the `dry` executor only; every other one computes its own decisions")
    if routing is not None and not isinstance(routing, RoutingTrace):
        if not isinstance(routing, Sequence) or not all(isinstance(trace, RoutingTrace) for trace in routing):
            raise TraceError(f"`routing` must be a RoutingTrace or a sequence of them, got {show(routing)}")
    traces = [routing] if isinstance(routing, RoutingTrace) else routing
    model.options.check_batch(len(prompts.given))
    work = Workload.of(prompts.given, new_tokens, model.prefill_chunk, probe=probe, memory=prompts.memory)
    with model.turn.program(name):
        engine = model._engine_for(work)
        with engine.wafer.turn.program(name), engine.wafer.all_or_nothing():
            model.recorded_routing, model.recorded_kv, model.recorded_from = [], None, len(engine.wafer.ledger)
            cache = engine.new_cache(work.capacity, prompts=work.prompts)
            with engine.streaming():
                yield _Session(model, engine, cache, traces)
            model.recorded_kv = cache.tokens_by_row
            cache.free()


class _Session:
    """The forward passes of one call, and its cache on the wafer."""

    def __init__(self, model: WaferModel, engine: Engine, cache: KVCache, traces: Sequence[RoutingTrace] | None) -> None:
        self._model, self._engine, self._cache, self._traces = model, engine, cache, traces

    def prefill(
        self, prompts: _Prompts, *, every: bool, hidden_states: bool = False, router_logits: bool = False, taps: bool = False
    ) -> ForwardResult:
        """Run the prompts, in chunks if the model says so.

        Returns
        -------
        ForwardResult
            With `every`, values of all tokens that were given, by (sequence, position), or just the taps, of memory tokens too; else
            logits of each sequence's last token, by sequence.
        """
        memory = prompts.memory
        results: list[ForwardResult] = []
        where: list[tuple[int, int]] = []
        done = [0] * len(prompts.lengths)
        last: dict[int, NDArray[np.float32]] = {}
        for chunk in prompt_chunks(prompts.lengths, self._model.prefill_chunk):
            slots, n_new = [i for i, _ in chunk], [n for _, n in chunk]
            start = [done[i] for i in slots]
            tokens = np.concatenate([prompts.sequence(i)[s : s + n] for i, n, s in zip(slots, n_new, start, strict=True)])
            ends = np.cumsum(n_new) - 1
            final = [j for j, i in enumerate(slots) if start[j] + n_new[j] == prompts.lengths[i]]
            sequences = sequences_of(slots, n_new, start, [prompts.lengths[i] for i in slots])
            wanted = np.arange(tokens.size) if every else ends[final]
            if memory is not None and every and not taps:  # nothing is predicted from memory tokens
                wanted = np.flatnonzero(~memory.are_at(sequences.positions))
            result = self._forward(tokens, sequences, wanted, hidden_states=hidden_states, router_logits=router_logits, taps=taps)
            if every:
                results.append(result)
            else:
                last.update({slots[j]: result.logits[row] for row, j in enumerate(final)})
            for j, i in enumerate(slots):
                where += [(i, start[j] + t) for t in range(n_new[j])]
                done[i] += n_new[j]
        if not every:
            return ForwardResult(np.stack([last[i] for i in range(len(done))]))
        order = np.array(sorted(range(len(where)), key=where.__getitem__), np.int64)
        merged = _merged(results, order)
        if taps:
            return merged
        given = np.ones(order.size, np.bool_) if memory is None else ~memory.are_at(np.array([at for _, at in where], np.int64))
        rows = order[given[order]]
        return ForwardResult(
            merged.logits[np.cumsum(given)[rows] - 1], [ids[rows] for ids in merged.topk_ids], [w[rows] for w in merged.topk_weights],
            [scores[rows] for scores in merged.router_logits], [x[rows] for x in merged.hidden_states],
        )  # fmt: skip

    def decode(self, slots: list[int], tokens: Ints) -> ForwardResult:
        """One more token for each of the sequences `slots`, behind memory tokens where their place is."""
        start, memory, n_new = self._cache.lengths[slots], self._model.spec.memory_tokens, np.ones(len(slots), np.int64)
        if memory is not None:
            n_new += memory.num_memory_tokens_per_chunk * memory.are_at(start)
        last = np.cumsum(n_new) - 1
        every = np.full(int(n_new.sum()), 0 if memory is None else memory.memory_token_id, np.int64)
        every[last] = tokens
        return self._forward(every, sequences_of(slots, n_new.tolist(), start.tolist()), last, phase="decode")

    def _forward(
        self, tokens: Ints, sequences: Sequences, wanted: Ints, *, hidden_states: bool = False, router_logits: bool = False,
        taps: bool = False, phase: Phase = "prompt",
    ) -> ForwardResult:  # fmt: skip
        model, spec = self._model, self._model.spec
        trace = None
        if model.wafer.is_dry and (spec.is_moe or (spec.indexer is not None and self._traces is not None)):
            n = len(model.recorded_routing)
            if self._traces is None:
                trace = RoutingTrace.worst_case(len(spec.moe_layers), tokens.size, spec.num_experts, spec.n_slots)
            elif n < len(self._traces):
                trace = self._traces[n]
            else:
                raise TraceError(f"`routing` holds {len(self._traces)} forward passes, pass {n} was asked for")
        result = self._engine.forward(
            tokens, sequences, self._cache, np.asarray(wanted, np.int64),
            hidden_states=hidden_states, router_logits=router_logits, taps=taps, trace=trace, phase=phase,
        )  # fmt: skip
        model.recorded_routing.append(RoutingTrace(tuple(result.topk_ids), tuple(result.chosen_keys)))
        return result


def _merged(results: list[ForwardResult], order: Ints) -> ForwardResult:
    """Values of several chunks, chunk after chunk; taps are put in the order of (sequence, position)."""

    def join(name: str) -> list[NDArray[Any]]:
        return [joined(parts) for parts in zip(*(getattr(r, name) for r in results), strict=True)]

    merged = ForwardResult(
        np.concatenate([r.logits for r in results]), join("topk_ids"), join("topk_weights"), join("router_logits"), join("hidden_states"),
        join("chosen_keys"),
    )  # fmt: skip
    records = [r.taps for r in results if r.taps is not None]
    if records:
        first = records[0]
        rows = [r.row_of_token for r in records if r.row_of_token is not None]
        in_attention = [r.row_in_attention for r in records if r.row_in_attention is not None]
        seq, pos, tokens = (np.concatenate([getattr(r, name) for r in records])[order] for name in ("seq", "pos", "token_ids"))
        passes = np.repeat(np.arange(len(records)), [len(r.seq) for r in records])[order]
        stages = {key: joined([r.stages[key] for r in records])[order] for key in first.stages}
        merged.taps = TapRecord(
            seq, pos, tokens, stages, row_of_token=np.concatenate(rows)[order], row_in_attention=np.concatenate(in_attention)[order],
            pass_of_token=passes, col_starts=first.col_starts,
        )
    return merged

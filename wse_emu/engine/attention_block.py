"""The attention half of a layer: normalise, project, rotate, attend, project back, add to the residual stream."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from wse_emu.engine.forward_pass import AttentionTile, ForwardPass
from wse_emu.engine.index_projection import index_choice, index_projection, index_tensors, keys_are_done, place_index_rotary
from wse_emu.engine.latent_projection import latent_queries, latent_values, tap_mixed, value_units
from wse_emu.engine.projection import project
from wse_emu.engine.qkv_norm import normalise
from wse_emu.engine.recompute import recomputed
from wse_emu.foundation.taps import TapRecord, joined
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.attention import attention
from wse_emu.layers.elementwise import clip
from wse_emu.layers.query_temperature import TUNE_QUERIES, place_factors, temperature_factors
from wse_emu.layers.rotary import ROTATE_QK, place_rotary, rotary_tables
from wse_emu.layers.stream import StreamedVector
from wse_emu.layers.tiles import move_tokens
from wse_emu.memoryx.layout import context_to_published
from wse_emu.wafer.tensor import PlacedTensor


def attention_block(run: ForwardPass, x: PlacedTensor) -> None:
    """``x = x + attention(norm(x)) @ w_o``, for the whole batch or tile by tile."""
    if not run.tiles:
        _attention_block(run, x)
        return
    for tile in run.tiles:
        part, n = tile.run, tile.run.bands.n_tokens
        part.layer = run.layer
        part.replay = run.replay_of(tile)
        if run.result.taps is not None:
            part.result.taps = TapRecord(part.sequences.slot, part.sequences.positions, part.token_ids)
        with run.empty("tile of the residual stream", part.place) as own, ExitStack() as stack:
            with run.scope("attention_tile"):
                move_tokens(run.wafer, x, run.bands, tile.first, own, part.bands, 0, n)
                _place_tables(run, tile, stack)
            _attention_block(part, own)
            run.join_keys(tile)
            part.give_up_tables()
            with run.scope("attention_tile"):
                move_tokens(run.wafer, own, part.bands, 0, x, run.bands, tile.first, n)
    if run.result.taps is not None:
        records = [tile.run.result.taps.stages for tile in run.tiles if tile.run.result.taps is not None]
        run.result.taps.stages |= {stage: joined([stages[stage] for stages in records]) for stage in records[0]}


def _place_tables(run: ForwardPass, tile: AttentionTile, stack: ExitStack) -> None:
    """Rotary tables of a tile, for the layer that runs."""
    spec, part = run.spec, tile.run
    if not spec.rotates(run.current_layer):
        if spec.query_temperature is not None:
            if tile.factors is None and not run.wafer.is_dry:
                tile.factors = temperature_factors(spec.query_temperature, part.sequences)
            part.factors = stack.enter_context(place_factors(run.wafer, run.heads, part.bands, tile.factors))
        return
    local = spec.rotates_locally(run.current_layer)
    if local not in tile.tables and not run.wafer.is_dry:
        tile.tables[local] = rotary_tables(spec, part.sequences, local=local)
    part.tables[local] = place_rotary(
        run.wafer, spec, part.sequences, run.heads, part.bands, local=local, values=tile.tables.get(local)
    )  # fmt: skip
    for table in part.tables[local]:
        stack.enter_context(table)
    if spec.indexer is not None:
        place_index_rotary(part, stack, tile.tables.get(local))


def _attention_block(run: ForwardPass, x: PlacedTensor) -> None:
    """The same for all tokens of a pass, or of a tile."""
    wafer, spec, layer, weights, heads, bands = run.wafer, run.spec, run.current_layer, run.weights, run.heads, run.bands
    prefix, rows, n = layer_prefix(layer), run.place.axis0, bands.n_tokens
    with ExitStack() as stack:
        qkv = stack.enter_context(
            run.empty("queries, keys and values", wafer.placement((n, heads.qkv.total), rows, ("col", heads.qkv)))
        )
        with run.empty("normalised", run.place) as normal:
            run.norm("attn_norm", x, normal, "attention_norm")
            if spec.latent is None:
                _project(run, normal, qkv)
                if run.cache.inputs is not None:
                    with run.scope("kv_cache"):
                        run.cache.inputs.append(layer, normal, run.sequences, bands)
            else:
                with ExitStack() as inner:
                    index = index_tensors(run, inner)
                    latent_queries(run, normal, qkv, None if index is None else partial(index_projection, run, normal=normal, index=index))
                    if index is not None:
                        index_choice(run, index)
        if spec.latent is None:
            _prepare(run, qkv)
        with recomputed(run) as again, run.scope("kv_cache"):
            run.cache.append(layer, qkv, run.sequences, bands, again=again)
        context = stack.enter_context(
            run.empty("attention context", wafer.placement((n, heads.context.total), rows, ("col", heads.context)))
        )
        with run.scope("attention"):
            record = run.result.taps
            sink = StreamedVector(prefix + "sinks", weights.vector(prefix + "sinks")) if spec.attn_sinks else None
            statistics = attention(
                wafer, qkv, context, run.cache, layer, run.sequences, bands, pattern=spec.pattern(layer), chosen=run.chosen,
                kept=run.kept_keys, sink=sink, probe=record is not None, softmax=run.options.precision.softmax,
            )  # fmt: skip
            if record is not None and statistics is not None:
                record.stages[layer, "attn_max"], record.stages[layer, "attn_denominator"] = statistics
                if spec.latent is None:
                    record.stages[layer, "attn_context"] = context_to_published(wafer.drain(context, kind="probe"), spec)
                else:
                    tap_mixed(run, context)
        with run.scope("kv_cache"):
            run.cache.forget(layer, run.sequences, bands)
            if run.cache.inputs is not None:
                run.cache.inputs.forget(layer, run.sequences, bands)
        if spec.indexer is not None:
            keys_are_done(run)
        if spec.latent is not None:
            n_values, split = spec.num_heads * spec.value_dim, value_units(run).scaled(2 * spec.num_heads)
            mixed = context
            context = stack.enter_context(run.empty("values of all heads", wafer.placement((n, n_values), rows, ("col", split))))
            latent_values(run, mixed, context)
        with run.empty("attention output", run.place) as y:
            with run.scope("attention_out"):
                project(run, context, "o", y, biased=spec.biases.out)
                run.tap("attn_out", y)
            run.join(x, y, "attn_after_norm", "attn_residual", "attention_out")


def _project(run: ForwardPass, normal: PlacedTensor, qkv: PlacedTensor) -> None:
    """Queries, keys and values of every head, with their biases."""
    with run.scope("qkv"):
        project(run, normal, "qkv", qkv, biased=run.spec.biases.qkv)
        run.tap_qkv(qkv, "", "qkv")


def _prepare(run: ForwardPass, qkv: PlacedTensor) -> None:
    """What happens to queries, keys and values between the projection and the cache, in the model's order."""
    spec, layer = run.spec, run.current_layer
    for suffix in spec.qkv_suffixes(layer):
        if suffix == "_norm":
            with run.scope("head_norm"):
                normalise(run, qkv, run.heads, run.bands)
                run.tap_qkv(qkv, suffix, "qk")
        elif suffix == "_clip":
            assert spec.clip_qkv is not None
            with run.scope("clip"):
                clip(run.wafer, qkv, spec.clip_qkv)
                run.tap_qkv(qkv, suffix, "qkv")
        elif suffix == "_tuned":
            assert run.factors is not None
            with run.scope("query_temperature"):
                run.wafer.launch(TUNE_QUERIES, qkv=qkv, factor=run.factors, q_slots=spec.queries_per_kv)
                run.tap_qkv(qkv, suffix, "q")
        else:
            cos, sin = run.rotary(layer)
            with run.scope("rotary"):
                run.wafer.launch(ROTATE_QK, qkv=qkv, cos=cos, sin=sin, q_slots=spec.queries_per_kv)
                run.tap_qkv(qkv, suffix, "qk")

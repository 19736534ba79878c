"""The attention half of a layer: normalise, project, rotate, attend, project back, add to the residual stream."""

from __future__ import annotations

from contextlib import ExitStack

from wse_emu.engine.forward_pass import ForwardPass
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.attention import attention
from wse_emu.layers.head_norm import head_norm
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.layers.norm import add_residual, rms_norm
from wse_emu.layers.rotary import ROTATE_QK
from wse_emu.memoryx.layout import context_to_published
from wse_emu.wafer.tensor import PlacedTensor


def attention_block(run: ForwardPass, x: PlacedTensor, cos: PlacedTensor, sin: PlacedTensor) -> None:
    """``x = x + attention(norm(x)) @ w_o``."""
    wafer, spec, layer, weights, heads, bands = run.wafer, run.spec, run.current_layer, run.weights, run.heads, run.bands
    prefix, rows, n, chunk = layer_prefix(layer), run.place.axis0, bands.n_tokens, run.options.piece
    with ExitStack() as stack:
        qkv = stack.enter_context(
            wafer.empty("queries, keys and values", wafer.placement((n, heads.qkv.total), rows, ("col", heads.qkv)))
        )
        with wafer.empty("normalised", run.place) as normal:
            with run.scope("attention_norm"):
                rms_norm(wafer, x, prefix + "attn_norm", weights.vector(prefix + "attn_norm"), spec.rms_norm_eps, normal, bands)
                run.tap("attn_norm", normal)
            with run.scope("qkv"):
                w_qkv = weights.matrix(prefix + "w_qkv", spec.hidden_size, heads.qkv.total)
                matmul(wafer, normal, w_qkv, qkv, bands, chunk=chunk)
                all_gather_bands(wafer, qkv, bands)
                run.tap_qkv(qkv, "")
        if spec.qk_norm:
            with run.scope("head_norm"):
                names = (prefix + "q_norm", prefix + "k_norm")
                head_weights = None if wafer.is_dry else (weights.store.vector(names[0]), weights.store.vector(names[1]))
                head_norm(wafer, qkv, heads, names, head_weights, spec.rms_norm_eps, bands)
                run.tap_qkv(qkv, "_norm")
        with run.scope("rotary"):
            wafer.launch(ROTATE_QK, qkv=qkv, cos=cos, sin=sin, q_slots=spec.queries_per_kv)
            run.tap_qkv(qkv, "_rope")
        with run.scope("kv_cache"):
            run.cache.append(layer, qkv, run.sequences, bands)
        context = stack.enter_context(
            wafer.empty("attention context", wafer.placement((n, heads.context.total), rows, ("col", heads.context)))
        )
        with run.scope("attention"):
            record = run.result.taps
            statistics = attention(
                wafer, qkv, context, run.cache, layer, run.sequences, bands, window=spec.window(layer), probe=record is not None
            )
            if record is not None and statistics is not None:
                record.stages[layer, "attn_max"], record.stages[layer, "attn_denominator"] = statistics
                record.stages[layer, "attn_context"] = context_to_published(wafer.drain(context, kind="probe"), spec)
        with run.scope("attention_out"), wafer.empty("attention output", run.place) as y:
            matmul(
                wafer,
                context,
                weights.matrix(prefix + "w_o", heads.context.total, spec.hidden_size),
                y,
                bands,
                chunk=chunk,
            )
            all_gather_bands(wafer, y, bands)
            run.tap("attn_out", y)
            add_residual(wafer, x, y)
            run.tap("attn_residual", x)

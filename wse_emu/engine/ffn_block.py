"""The feed-forward half of a layer, dense or a mixture of experts: normalise, apply, add to the residual stream."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from wse_emu.engine.forward_pass import ForwardPass
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.assigned_routing import assign
from wse_emu.layers.elementwise import COPY, gate_rows
from wse_emu.layers.ffn import Experts, ExpertTaps, dense_ffn, experts_ffn, experts_together
from wse_emu.layers.router import Routing, report_chosen, route
from wse_emu.memoryx.prefetch import LayerStream
from wse_emu.wafer.tensor import PlacedTensor


def ffn_block(run: ForwardPass, x: PlacedTensor, stream: LayerStream) -> None:
    """``x = x + ffn(norm(x))``, dense or a mixture of experts."""
    wafer, spec, layer, weights = run.wafer, run.spec, run.current_layer, run.weights
    prefix = layer_prefix(layer)
    moe = spec.is_moe_layer(layer)
    # A sum over experts is float32 until its last term.
    room = wafer.empty("ffn output", run.place) if moe else run.empty("ffn output", run.place)
    with run.empty("normalised", run.place) as normal, room as y:
        run.norm("ffn_norm", x, normal, "ffn_norm")
        scope = "experts" if moe else "ffn"
        if moe:
            _experts(run, normal, y, stream)
        else:
            with run.scope("ffn"):
                dense_ffn(
                    wafer, normal, weights.ffn(prefix, spec.ffn_width(layer)), y, run.bands, chunk=run.options.piece,
                    probe=run.tap if run.result.taps is not None else None,
                )  # fmt: skip
        with run.scope(scope):
            if y.stored != normal.stored:  # what the experts read is done with
                wafer.launch(COPY, x=y, out=normal)
                y = normal
            run.tap("ffn_out", y)
        run.join(x, y, "ffn_after_norm", "layer_out", scope)


def _shared(run: ForwardPass, normal: PlacedTensor, y: PlacedTensor) -> None:
    """``y = shared experts of normal``, times their gate where they have one."""
    spec, prefix, shared = run.spec, layer_prefix(run.current_layer) + "shared.", run.spec.shared_experts
    assert shared is not None
    probe = run.tap if run.result.taps is not None else None
    with run.scope("shared_experts"):
        dense_ffn(
            run.wafer, normal, run.weights.ffn(prefix, shared.intermediate_size), y, run.bands, chunk=run.options.piece,
            probe=None if probe is None else lambda _, h: probe("shared_hidden", h),
        )  # fmt: skip
        run.tap("shared_out", y)
        if shared.gated:
            gate = run.weights.score_matrix(prefix + "gate", spec.hidden_size, 1)
            logits = gate_rows(run.wafer, normal, gate, y, run.bands, chunk=run.options.piece)
            if run.result.taps is not None:
                run.result.taps.stages[run.layer, "shared_gate"] = logits


def _experts(run: ForwardPass, normal: PlacedTensor, y: PlacedTensor, stream: LayerStream) -> None:
    """Route, then let the chosen (or all) experts stream past."""
    wafer, spec, layer = run.wafer, run.spec, run.current_layer
    with ExitStack() as stack:
        with run.scope("router"):
            routing = _route(run, normal)
            stack.enter_context(routing)
            run.note_routing(routing)
            chosen: Sequence[int] = range(spec.num_experts)
            if run.options.stream_experts == "activated" and run.options.moe_implementation != "functional":
                chosen = report_chosen(wafer, routing, run.bands, spec.num_experts).tolist()
        if spec.shared_experts is not None:
            _shared(run, normal, y)
        taps = _expert_taps(run)
        with run.scope("experts"), closing(_stream_experts(run, chosen, stream)) as experts:
            experts_ffn(
                wafer, normal, routing, experts, spec.moe_intermediate_size, y, run.bands,
                n_experts=spec.num_experts, chunk=run.options.piece, taps=taps, implementation=run.options.moe_implementation,
                before=spec.routing.probability_before_ffn, begun=spec.shared_experts is not None,
            )  # fmt: skip
    if run.result.taps is not None and taps is not None:
        stages = run.result.taps.stages
        stages[layer, "expert_hidden"], stages[layer, "expert_out"] = taps.hidden, taps.out


def _route(run: ForwardPass, normal: PlacedTensor) -> Routing:
    """Choose experts: by learned scores, by token ids or by positions."""
    spec, rule = run.spec, run.spec.routing
    replay = run.trace.layer(len(run.result.topk_ids)) if run.trace is not None else None
    if not rule.is_learned:
        numbers = run.token_ids if rule.routing_algorithm == "hash" else run.sequences.positions
        return assign(run.wafer, numbers, run.bands, spec.num_experts, spec.top_k, rule, replay=replay)
    return route(
        run.wafer, normal, run.weights.router(run.current_layer), run.bands, spec.top_k, rule,
        groups=tuple(run.sequences.n_new.tolist()), chunk=run.options.piece, probe=run.want_router, replay=replay,
        where=partial(_where, run),
    )  # fmt: skip


def _where(run: ForwardPass, token: int) -> str:
    """What to call a token of a pass."""
    sequence = int(np.repeat(run.sequences.slot, run.sequences.n_new)[token])
    return f"layer {run.current_layer}, sequence {sequence}, position {int(run.sequences.positions[token])}"


def _expert_taps(run: ForwardPass) -> ExpertTaps | None:
    """Room for what the experts give, if taps were asked for."""
    if run.result.taps is None:
        return None
    shape = (run.bands.n_tokens, run.spec.n_slots)
    sizes = (run.spec.moe_intermediate_size, run.spec.hidden_size)
    return ExpertTaps(*(np.zeros((*shape, n), np.float32) for n in sizes))


def _stream_experts(run: ForwardPass, chosen: Sequence[int], stream: LayerStream) -> Generator[Experts, None, None]:
    """Experts in ascending order; those that are not resident yet are made so one at a time, or those together that few tokens chose."""
    layer, size = run.current_layer, experts_together(run.bands.n_tokens)
    resident = run.options.stream_experts == "all"
    for first in range(0, len(chosen), size):
        some = chosen[first : first + size]
        with ExitStack() as stack:
            if not resident:
                stack.enter_context(stream.layer([name for expert in some for name in run.weights.expert_names(layer, expert)]))
            yield [(expert, run.weights.expert(layer, expert)) for expert in some]

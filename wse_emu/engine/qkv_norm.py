"""Norm of queries and keys, as the model has it: over a head, or over all of a token's."""

from __future__ import annotations

from wse_emu.engine.forward_pass import ForwardPass
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.head_norm import head_norm
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.qk_norm import qk_norm
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor


def normalise(run: ForwardPass, qkv: PlacedTensor, heads: HeadLayout, bands: TokenBands) -> None:
    """Normalise the queries and keys of tokens that lie as `bands` says, with the current layer's weights."""
    spec, store, prefix = run.spec, run.weights.store, layer_prefix(run.current_layer)
    assert spec.qk_norm is not None
    if not spec.qk_norm.weighted:
        head_norm(run.wafer, qkv, heads, None, None, spec.rms_norm_eps, bands)
        return
    names = (prefix + "q_norm", prefix + "k_norm")
    head_weights = None if run.wafer.is_dry else (store.vector(names[0]), store.vector(names[1]))
    norm = head_norm if spec.qk_norm.over == "head" else qk_norm
    norm(run.wafer, qkv, heads, names, head_weights, spec.rms_norm_eps, bands)

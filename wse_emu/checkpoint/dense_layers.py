"""Layers of a model with experts that are dense instead, as config.json says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.model_spec import ModelSpec

Layers = tuple[int, ...]


def never(fields: Fields, num_layers: int) -> Layers:
    """Every layer is a mixture."""
    return ()


def _dense(spec: ModelSpec) -> Layers:
    """Dense layers, also of a model where all are."""
    return spec.dense_layers if spec.is_moe else tuple(range(spec.num_layers))


def by_steps(fields: Fields, num_layers: int) -> Layers:
    """Those of ``mlp_only_layers``, and all but each ``decoder_sparse_step``-th."""
    step = fields.integer("decoder_sparse_step", 1)
    only = set(fields.layers("mlp_only_layers", num_layers))
    return tuple(i for i in range(num_layers) if i in only or (i + 1) % step)


def steps_config(spec: ModelSpec) -> dict[str, Any]:
    """Write them all by name."""
    return {"mlp_only_layers": list(_dense(spec)), "decoder_sparse_step": 1}


def first_ones(default: int) -> Callable[[Fields, int], Layers]:
    """The first ``first_k_dense_replace``, `default` of them if absent."""

    def read(fields: Fields, num_layers: int) -> Layers:
        return tuple(range(min(num_layers, fields.integer("first_k_dense_replace", default, low=0))))

    return read


def first_config(spec: ModelSpec) -> dict[str, Any]:
    """Write how many."""
    return {"first_k_dense_replace": len(_dense(spec))}


def outside_interval(fields: Fields, num_layers: int) -> Layers:
    """All but each ``moe_layer_interval``-th between ``moe_layer_start_index`` and ``moe_layer_end_index``, -1 of which is the last."""
    step, first = fields.integer("moe_layer_interval", 1), fields.integer("moe_layer_start_index", 1, low=0)
    last = fields.integer("moe_layer_end_index", -1, low=-1)
    last = num_layers - 1 if last == -1 else last
    return tuple(i for i in range(num_layers) if (i + 1) % step or not first <= i <= last)


def interval_config(spec: ModelSpec) -> dict[str, Any]:
    """Write bounds and interval."""
    layers = spec.moe_layers or (spec.num_layers,)
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return {"moe_layer_interval": step, "moe_layer_start_index": layers[0], "moe_layer_end_index": layers[-1]}

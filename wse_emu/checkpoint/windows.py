"""Sliding windows of config.json: which layers have one, as each family says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.arguments import show
from wse_emu.foundation.model_spec import ModelSpec

Windows = tuple[int | None, tuple[int, ...]]
"""Sliding window and the layers that have it."""


def layer_types(fields: Fields, num_layers: int) -> tuple[int, ...] | None:
    """Layers that ``layer_types`` calls sliding, None where the field is absent."""
    types = fields.get("layer_types", None)
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(t not in known for t in types):
        raise fields.fail("layer_types", f"must name {' or '.join(known)} for each of {num_layers} layers")
    return tuple(i for i, t in enumerate(types) if t == "sliding_attention")


def full(fields: Fields, num_layers: int) -> Windows:
    """Every layer sees everything."""
    if layer_types(fields, num_layers):
        raise fields.fail("layer_types", "must name 'full_attention' only for this family")
    return None, ()


def every_layer(default: int | None) -> Callable[[Fields, int], Windows]:
    """One window for all layers, if there is one."""

    def read(fields: Fields, num_layers: int) -> Windows:
        window = None if fields.get("sliding_window", default) is None else fields.integer("sliding_window", default)
        layers = () if window is None else tuple(range(num_layers))
        if layer_types(fields, num_layers) not in (None, layers):
            kind = "sliding_attention" if layers else "full_attention"
            raise fields.fail("layer_types", f"must name {kind!r} only: `sliding_window` is {show(window)}")
        return window, layers

    return read


def switched(*, first: str | None) -> Callable[[Fields, int], Windows]:
    """A window only if ``use_sliding_window`` says so: from layer `first` (a field) on, or as ``layer_types`` says; None is all layers."""

    def read(fields: Fields, num_layers: int) -> Windows:
        types = layer_types(fields, num_layers)
        if not fields.boolean("use_sliding_window", False) or fields.get("sliding_window", 4096) is None:
            if types:
                raise fields.fail("layer_types", "names sliding layers, but there is no window (`use_sliding_window`, `sliding_window`)")
            return None, ()
        window = fields.integer("sliding_window", 4096)
        layers = tuple(range(0 if first is None else min(num_layers, fields.integer(first, 28, low=0)), num_layers))
        if types is not None and first is None and types != layers:
            raise fields.fail("layer_types", "must name 'sliding_attention' only for this family with `use_sliding_window`")
        layers = layers if types is None else types
        return (window, layers) if layers else (None, ())

    return read


def from_layer(first: str, default: int) -> Callable[[Fields, int], Windows]:
    """A window, unless it is null, from layer `first` (a field) on; or as ``layer_types`` says."""

    def read(fields: Fields, num_layers: int) -> Windows:
        layers = layer_types(fields, num_layers)
        if fields.get("sliding_window", 4096) is None:
            if layers:
                raise fields.fail("layer_types", "names sliding layers, but `sliding_window` is null")
            return None, ()
        if layers is None:
            layers = tuple(range(min(num_layers, fields.integer(first, default, low=0)), num_layers))
        return (fields.integer("sliding_window", 4096), layers) if layers else (None, ())

    return read


def every_other_below(limit: str, default: int) -> Callable[[Fields, int], Windows]:
    """Even layers below the field `limit` have a window if ``use_sliding_window`` says so; or as ``layer_types`` says."""

    def read(fields: Fields, num_layers: int) -> Windows:
        layers = layer_types(fields, num_layers)
        if layers is None:
            layers = tuple(range(0, min(num_layers, fields.integer(limit, default, low=0)), 2))
        elif layers and not fields.boolean("use_sliding_window", False):
            raise fields.fail("layer_types", "names sliding layers, but `use_sliding_window` is false")
        if not fields.boolean("use_sliding_window", False) or not layers:
            return None, ()
        return fields.integer("sliding_window", 4096), layers

    return read


def pattern_of(period: int, window: int = 4096) -> Callable[[Fields, int], Windows]:
    """Every layer has a window but each `period`-th (``sliding_window_pattern``); or as ``layer_types`` says."""

    def read(fields: Fields, num_layers: int) -> Windows:
        layers = layer_types(fields, num_layers)
        if layers is None:
            every = fields.integer("sliding_window_pattern", period)
            layers = tuple(i for i in range(num_layers) if (i + 1) % every)
        return (fields.integer("sliding_window", window), layers) if layers else (None, ())

    return read


def pattern_config(spec: ModelSpec) -> dict[str, Any]:
    """Write the window and its layers."""
    kinds = ["sliding_attention" if spec.window(i) is not None else "full_attention" for i in range(spec.num_layers)]
    return {"sliding_window": spec.sliding_window or 4096, "layer_types": kinds}


def no_window(spec: ModelSpec) -> dict[str, Any]:
    """Write nothing."""
    return {}


def plain_window(spec: ModelSpec) -> dict[str, Any]:
    """Write the window of all layers."""
    return {"sliding_window": spec.sliding_window}


def from_layer_window(spec: ModelSpec) -> dict[str, Any]:
    """Write the window, null without one, and its layers."""
    return {"sliding_window": spec.sliding_window, "layer_types": pattern_config(spec)["layer_types"]}


def switched_window(spec: ModelSpec) -> dict[str, Any]:
    """Write the window, its switch and its layers."""
    kinds = ["sliding_attention" if spec.window(i) is not None else "full_attention" for i in range(spec.num_layers)]
    return {"use_sliding_window": spec.sliding_window is not None, "sliding_window": spec.sliding_window, "layer_types": kinds}

"""Rotary parameters of config.json, of released checkpoints and of transformers 5: the base, and how frequencies are stretched."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError, SpecError
from wse_emu.foundation.rope_scaling import ROPE_KINDS, RopeScaling

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_EXTRA: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
        "yarn": frozenset(
            {
                "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                "truncate",
            }
        ),
        "longrope": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}),
        "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
    }
)  # fmt: skip
"""Keys that each kind knows beside the common ones."""


def read_rope(
    fields: Fields, default_theta: float, max_positions: int, head_dim: int, *, by_type: bool = False
) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from ``rope_theta``, ``rope_scaling`` and ``rope_parameters``.

    With `by_type` the last may hold those of each kind of layer; these are the ones of layers with full attention.

    Raises
    ------
    ConfigError
        If bases or kinds disagree, a kind or a key of it is unknown, or only part of a head is rotated.
    """
    _whole_head(fields)
    thetas: dict[str, float] = {}
    if fields.given("rope_theta"):
        thetas["rope_theta"] = fields.number("rope_theta")
    scalings: list[RopeScaling | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.object(name)
        if inner is None:
            continue
        if by_type:
            inner = inner.object("full_attention") or inner
        _whole_head(inner)
        if inner.given("rope_theta"):
            thetas[f"{name}.rope_theta"] = inner.number("rope_theta")
        scalings.append(_scaling(fields, inner, max_positions, head_dim))
    if len(set(thetas.values())) > 1:
        raise ConfigError(f"{fields.where}: rotary bases disagree: {', '.join(f'{k} = {v}' for k, v in thetas.items())}")
    if len(set(scalings)) > 1:
        raise ConfigError(f"{fields.where}: `rope_scaling` and `rope_parameters` disagree")
    return next(iter(thetas.values()), default_theta), scalings[0] if scalings else None


def _whole_head(fields: Fields) -> None:
    if fields.given("partial_rotary_factor") and fields.number("partial_rotary_factor") != 1.0:
        raise fields.fail("partial_rotary_factor", "must be 1 (rotary embedding over the whole head)")


def _scaling(fields: Fields, inner: Fields, max_positions: int, head_dim: int) -> RopeScaling | None:
    kinds = {inner.get(key) for key in ("rope_type", "type") if isinstance(inner.get(key, None), str)} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in _EXTRA or any(inner.given(key) and not isinstance(inner.get(key), str) for key in ("rope_type", "type")):
        given = " and ".join(show(inner.get(key)) for key in ("rope_type", "type") if key in inner.values)
        raise ConfigError(f"{inner.where}: rope_type {given} is not supported; known are default, {', '.join(ROPE_KINDS)}")
    extra = sorted(set(inner.values) - _COMMON - _EXTRA[kind], key=str)
    if extra:
        known = ", ".join(sorted(_COMMON | _EXTRA[kind]))
        raise ConfigError(f"{inner.where}: {show(extra[0])} is not known for rope_type {kind!r}; known are {known}")
    if kind == "default":
        return None
    original = max_positions
    if kind != "linear" and kind != "dynamic":
        # Phi-3 and its kin write it beside the rotary parameters; transformers lets that one win.
        holder = fields if fields.given("original_max_position_embeddings") else inner
        original = holder.integer("original_max_position_embeddings", max_positions)
    values: dict[str, Any] = {name: inner.number(name) for name in ("low_freq_factor", "high_freq_factor") if kind == "llama3"}
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        values[name] = inner.optional_number(name)
    for name in ("beta_fast", "beta_slow"):
        if inner.given(name):
            values[name] = inner.number(name)
    if inner.given("truncate"):
        values["truncate"] = inner.boolean("truncate", True)
    if kind == "longrope":
        values |= {name: inner.numbers(name, head_dim // 2) for name in ("short_factor", "long_factor")}
    default_factor = max_positions / original if kind in ("yarn", "longrope") else None
    factor = inner.number("factor") if inner.given("factor") or default_factor is None else max(1.0, default_factor)
    try:
        return RopeScaling(kind=kind, factor=factor, original_max_position_embeddings=original, **values)
    except SpecError as e:
        raise ConfigError(f"{inner.where}: {e}") from e


def rope_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json; None without scaling."""
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind not in ("linear", "dynamic"):
        out["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    for name in sorted(_EXTRA[scaling.kind] - set(out) - {"original_max_position_embeddings"}):
        value = getattr(scaling, name)
        if value is not None:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out

"""Rotary parameters of config.json, of released checkpoints and of transformers 5: the base, and how frequencies are stretched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError, SpecError
from wse_emu.foundation.model_spec import ModelSpec
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
_ALPHA = frozenset({"alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor"})
"""Keys that stand beside ``alpha``, which alone counts."""
_MSCALES = frozenset({"short_mscale", "long_mscale"})
"""Keys that Phi-3.5-MoE has beside those of longrope."""


class Rope(NamedTuple):
    """What config.json says of rotation."""

    theta: float
    scaling: RopeScaling | None
    dim: int | None
    """Elements of a head that are rotated; None is all."""


def read_rope(
    fields: Fields, default_theta: float, max_positions: int, head_dim: int, *, by_type: bool = False, partial: float | None = None,
    alpha: bool = False, mscales: bool = False,
) -> Rope:  # fmt: skip
    """Rotary base, scaling and rotated part, from ``rope_theta``, ``rope_scaling``, ``rope_parameters`` and ``partial_rotary_factor``.

    Parameters
    ----------
    by_type : bool
        Whether ``rope_parameters`` may hold those of each kind of layer; these are the ones of layers with full attention.
    partial : float, optional
        Default share of a head that is rotated; None refuses any but 1.
    alpha : bool
        Whether ``alpha`` of a "dynamic" scaling is known: it multiplies the base by ``alpha**(d / (d - 2))`` and stretches nothing else.
    mscales : bool
        Whether ``longrope`` is the only kind, and must have ``short_mscale`` and ``long_mscale``.

    Raises
    ------
    ConfigError
        If bases, kinds or shares disagree, or a kind or a key of it is unknown.
    """
    holders = {name: h for name in ("rope_scaling", "rope_parameters") if (h := _inner(fields, name, by_type)) is not None}
    dim = _rotated(fields, list(holders.values()), head_dim, partial)
    thetas: dict[str, float] = {}
    if fields.given("rope_theta"):
        thetas["rope_theta"] = fields.number("rope_theta")
    scalings: list[RopeScaling | None] = []
    stretches: list[float] = []
    for name, inner in holders.items():
        if inner.given("rope_theta"):
            thetas[f"{name}.rope_theta"] = inner.number("rope_theta")
        if alpha and inner.given("alpha"):
            stretches.append(_base_stretch(inner, dim or head_dim))
            scalings.append(None)
        else:
            scalings.append(_scaling(fields, inner, max_positions, dim or head_dim, mscales=mscales))
    if len(set(thetas.values())) > 1:
        raise ConfigError(f"{fields.where}: rotary bases disagree: {', '.join(f'{k} = {v}' for k, v in thetas.items())}")
    if len(set(scalings)) > 1 or len(set(stretches)) > 1 or len(stretches) not in (0, len(holders)):
        raise ConfigError(f"{fields.where}: `rope_scaling` and `rope_parameters` disagree")
    theta = next(iter(thetas.values()), default_theta) * (stretches[0] if stretches else 1.0)
    return Rope(theta, scalings[0] if scalings else None, None if dim == head_dim else dim)


def yarn_mscale(fields: Fields) -> float:
    """``1 + 0.1 mscale_all_dim ln(factor)`` of a stretched rotation, by whose square DeepSeek scales the scores; 1 without that key."""
    for holder in (fields.object("rope_scaling"), fields.object("rope_parameters")):
        if holder is None or holder.get("rope_type", holder.get("type", "default")) == "default":
            continue
        share = holder.number("mscale_all_dim") if holder.given("mscale_all_dim") else 0.0
        if share and not holder.given("factor"):
            raise holder.fail("factor", "must be given with `mscale_all_dim`")
        factor = holder.number("factor") if share else 1.0
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0
    return 1.0


def _inner(fields: Fields, name: str, by_type: bool) -> Fields | None:
    inner = fields.object(name)
    return (inner.object("full_attention") or inner) if inner is not None and by_type else inner


def _rotated(fields: Fields, holders: list[Fields], head_dim: int, default: float | None) -> int:
    """Elements of a head that are rotated, as ``partial_rotary_factor`` or ``rotary_dim`` says."""
    given = [h for h in (fields, *holders) if h.given("partial_rotary_factor")]
    for holder in given:
        if not 0 < holder.number("partial_rotary_factor") <= 1:
            raise holder.fail("partial_rotary_factor", "must lie above 0 and be at most 1")
    dims = {int(head_dim * h.number("partial_rotary_factor")) for h in given}
    if default is not None and fields.given("rotary_dim"):
        dims.add(fields.integer("rotary_dim"))
    dim = int(head_dim * (default or 1.0)) if not dims else dims.pop()
    if default is None and dim != head_dim:
        raise given[0].fail("partial_rotary_factor", "must be 1 (rotary embedding over the whole head)")
    if dims:
        raise ConfigError(f"{fields.where}: `partial_rotary_factor` and `rotary_dim` disagree, where they are given")
    if dim != head_dim and (not 2 <= dim < head_dim or dim % 2):
        raise ConfigError(f"{fields.where}: the rotated part of a head must be even and in 2..{head_dim} elements, got {dim}")
    return dim


def _base_stretch(inner: Fields, dim: int) -> float:
    """What ``alpha`` makes of the base."""
    if inner.get("rope_type", inner.get("type", None)) != "dynamic":
        raise inner.fail("alpha", "belongs to rope_type 'dynamic'")
    extra = sorted(set(inner.values) - _COMMON - _ALPHA, key=str)
    if extra:
        raise ConfigError(f"{inner.where}: {show(extra[0])} is not known beside `alpha`; known are {', '.join(sorted(_COMMON | _ALPHA))}")
    value = inner.number("alpha")
    if value <= 0 or dim < 4 or math.log(value) * dim / (dim - 2) > 700:
        raise inner.fail("alpha", "must be positive and not absurdly large, and `head_dim` at least 4")
    return float(value ** (dim / (dim - 2)))


def partial_config(spec: ModelSpec) -> dict[str, Any]:
    """``partial_rotary_factor`` of config.json, which times ``head_dim``, cut to an integer, is the rotated part again."""
    dim = spec.rotary.rotated(spec.head_dim)
    factor = dim / spec.head_dim
    return {"partial_rotary_factor": factor if int(spec.head_dim * factor) == dim else math.nextafter(factor, 2.0)}


def _scaling(fields: Fields, inner: Fields, max_positions: int, rotated: int, *, mscales: bool) -> RopeScaling | None:
    kinds = {inner.get(key) for key in ("rope_type", "type") if isinstance(inner.get(key, None), str)} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in _EXTRA or any(inner.given(key) and not isinstance(inner.get(key), str) for key in ("rope_type", "type")):
        given = " and ".join(show(inner.get(key)) for key in ("rope_type", "type") if key in inner.values)
        raise ConfigError(f"{inner.where}: rope_type {given} is not supported; known are default, {', '.join(ROPE_KINDS)}")
    if mscales and kind not in ("default", "longrope"):
        raise ConfigError(f"{inner.where}: rope_type {kind!r} is not supported for this family; known are default, longrope")
    own = _EXTRA[kind] | (_MSCALES if mscales else set())
    extra = sorted(set(inner.values) - _COMMON - own, key=str)
    if extra:
        known = ", ".join(sorted(_COMMON | own))
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
        values |= {name: inner.numbers(name, rotated // 2) for name in ("short_factor", "long_factor")}
        values |= {name: inner.number(name) for name in ("short_mscale", "long_mscale") if mscales}
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
    mscales = _MSCALES if scaling.short_mscale is not None else set()
    for name in sorted((_EXTRA[scaling.kind] | mscales) - set(out) - {"original_max_position_embeddings"}):
        value = getattr(scaling, name)
        if value is not None:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out

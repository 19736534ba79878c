"""Rotary position embedding: cosines and sines come in over the edge, once for all layers; the rotation is one launch."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rope_scaling import RopeScaling
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import Sequences
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.rope import rotate_qk

ROTATE_QK = Kernel(
    body=rotate_qk,
    params=("qkv", "cos", "sin", "q_slots"),
    inout=("qkv",),
    code_bytes=256,
    macs=lambda s: 2 * s["cos"][0] * s["cos"][1] * (s["q_slots"] + 1),
)

F64 = NDArray[np.float64]


def place_rotary(
    wafer: Wafer, spec: ModelSpec, sequences: Sequences, heads: HeadLayout, bands: TokenBands, *, local: bool = False,
    values: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> tuple[PlacedTensor, PlacedTensor]:  # fmt: skip
    """Bring the rotary tables of the new tokens to the cores that own the pair units; kept for all layers.

    `local` is for the layers with a window of a spec whose rotation differs there; `values` are `rotary_tables` if they are known already.
    """
    place = wafer.placement((bands.n_tokens, heads.rotary_units.total), ("row", bands.split), ("col", heads.rotary_units))
    tables = (None, None) if wafer.is_dry else values or rotary_tables(spec, sequences, local=local)
    kind = "local rotary" if local else "rotary"
    cos, sin = wafer.empty(f"{kind} cosines", place), wafer.empty(f"{kind} sines", place)
    for tensor, value in zip((cos, sin), tables, strict=True):
        wafer.inject(tensor, value)
    return cos, sin


def rotary_tables(spec: ModelSpec, sequences: Sequences, *, local: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every new token's angle for every pair unit of every key/value head that is cached.

    Parameters
    ----------
    spec : ModelSpec
    sequences : Sequences
        Where frequencies follow the length of the sequence, that is ``sequences.length``; keys that are in the cache stay as they are.
    local : bool
        Of the layers with a window, where they differ.

    Returns
    -------
    cos, sin : ndarray, (T, ModelSpec.cached_heads * head_dim / 2), float32
        Of ``position * frequency``, times the scaling's factor, computed in float64 and rounded once; 1 and 0 for units that are not
        rotated, which then keep their values.
    """
    scaling = None if local else spec.rope_scaling
    angle = np.concatenate(
        [
            np.outer(np.arange(start, start + n, dtype=np.float64), _frequencies(spec, _counted(scaling, int(length)), local))
            for start, n, length in zip(sequences.start, sequences.n_new, sequences.length, strict=True)
        ]
    )
    factor = np.repeat([attention_factor(scaling, int(length)) for length in sequences.length], sequences.n_new)[:, None]
    still = (spec.head_dim - spec.rotary.rotated(spec.head_dim)) // 2
    cos, sin = (_padded((f(angle) * factor).astype(np.float32), still, end) for f, end in ((np.cos, 1), (np.sin, 0)))
    return np.tile(cos, (1, spec.cached_heads)), np.tile(sin, (1, spec.cached_heads))


def _padded(table: NDArray[np.float32], n: int, value: float) -> NDArray[np.float32]:
    """A table with `n` more columns of one value."""
    return np.pad(table, ((0, 0), (0, n)), constant_values=value) if n else table


def _counted(scaling: RopeScaling | None, length: int) -> int:
    """The length if frequencies follow it, else 0."""
    return length if scaling is not None and scaling.kind in ("dynamic", "longrope") else 0


@lru_cache(maxsize=64)
def _frequencies(spec: ModelSpec, length: int, local: bool) -> F64:
    """`frequencies`, kept."""
    return frequencies(spec, length, local=local)


def frequencies(spec: ModelSpec, length: int, *, local: bool = False) -> F64:
    """Radians per position of each rotary pair, (rotated elements / 2,), for a sequence of `length` tokens."""
    half = spec.rotary.rotated(spec.head_dim) // 2
    exponent = np.arange(half, dtype=np.float64) / half
    if local:
        assert spec.rotary.local_theta is not None
        unstretched: F64 = spec.rotary.local_theta**-exponent
        return unstretched
    plain: F64 = spec.rope_theta**-exponent
    scaling = spec.rope_scaling
    if scaling is None:
        return plain
    original = scaling.original_max_position_embeddings
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "dynamic":
        stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
        stretched: F64 = (spec.rope_theta * stretch ** (half / (half - 1))) ** -exponent
        return stretched
    if scaling.kind == "longrope":
        is_long = length > original and scaling.long_mscale is None
        plain /= np.array(scaling.long_factor if is_long else scaling.short_factor)
        return plain
    kept = _kept_by_turns(scaling, plain) if scaling.kind == "llama3" else _kept_by_index(scaling, spec.rope_theta, half)
    return plain * (kept + (1 - kept) / scaling.factor)


def _kept_by_turns(scaling: RopeScaling, plain: F64) -> F64:
    """Llama 3: how much of each frequency is kept, by how often the pair turns in the original context."""
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    if scaling.low_freq_factor == scaling.high_freq_factor:
        return (turns >= scaling.low_freq_factor).astype(np.float64)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept: F64 = np.minimum(np.maximum(share, 0.0), 1.0)
    return kept


def _kept_by_index(scaling: RopeScaling, theta: float, half: int) -> F64:
    """YaRN: all of the pairs that turn at least `beta_fast` times, none of those below `beta_slow`, linear in the index between."""

    def index_of(turns: float) -> float:
        return half * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # a step, as the published implementations make it
    kept: F64 = 1.0 - np.minimum(np.maximum((np.arange(half) - low) / (high - low), 0.0), 1.0)
    return kept


def attention_factor(scaling: RopeScaling | None, length: int) -> float:
    """Factor of cosine and sine, for a sequence of `length` tokens."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.short_mscale is not None and scaling.long_mscale is not None:
        return scaling.long_mscale if length > scaling.original_max_position_embeddings else scaling.short_mscale
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    stretch = math.log(scaling.factor)  # at least 0
    if scaling.kind == "longrope":
        return math.sqrt(1 + stretch / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return (1 + 0.1 * scaling.mscale * stretch) / (1 + 0.1 * scaling.mscale_all_dim * stretch)
    return 1 + 0.1 * stretch

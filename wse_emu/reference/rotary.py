"""Rotary angles, plain and stretched, always in float64: (T,) positions to (T, rotated elements / 2) angles.

References
----------
Su et al., "RoFormer", 2021, section 3.2; the scaled kinds as `wse_emu.foundation.rope_scaling.RopeScaling` cites them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rope_scaling import RopeScaling

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]


def rotary_angles(spec: ModelSpec, seq: Ints, pos: Ints, *, local: bool = False) -> tuple[F64, F64]:
    """Angle of every rotary pair of every token, and the factor of cosine and sine.

    Parameters
    ----------
    seq, pos : ndarray, (T,), int64
        Sequence and position of each token; a sequence is as long as its last position says.
    local : bool
        Of the layers with a window, where they turn by a base of their own and are not stretched.

    Returns
    -------
    angles : ndarray, (T, rotated elements / 2), float64
        Radians.
    factor : ndarray, (T, 1), float64
    """
    d, scaling, theta = spec.head_dim if spec.rotary.dim is None else spec.rotary.dim, spec.rope_scaling, spec.rope_theta
    if local:
        assert spec.rotary.local_theta is not None
        scaling, theta = None, spec.rotary.local_theta
    pairs = np.arange(d // 2) * 2.0 / d
    length = np.array([pos[seq == s].max() + 1 for s in seq]) if scaling is not None and scaling.follows_length else pos + 1
    frequency = np.broadcast_to(theta**-pairs, (len(pos), d // 2))
    factor = np.ones((len(pos), 1))
    if scaling is not None:
        frequency = _stretched(scaling, frequency, theta, pairs, length)
        factor = factor * _attention_factor(scaling)
        if scaling.short_mscale is not None and scaling.long_mscale is not None:
            beyond = length[:, None] > scaling.original_max_position_embeddings
            factor = np.where(beyond, scaling.long_mscale, scaling.short_mscale)
    return pos[:, None] * frequency, factor


def _stretched(scaling: RopeScaling, plain: F64, theta: float, pairs: F64, length: Ints) -> F64:
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    if scaling.kind == "linear":
        return plain / factor
    if scaling.kind == "dynamic":
        d = 2 * len(pairs)
        growth = factor * np.maximum(length, original) / original - (factor - 1)
        return (theta * growth[:, None] ** (d / (d - 2))) ** -pairs
    if scaling.kind == "longrope":
        if scaling.short_mscale is not None:  # Phi-3.5-MoE in transformers
            short: F64 = plain / np.array(scaling.short_factor)
            return short
        return plain / np.where(length[:, None] > original, scaling.long_factor, scaling.short_factor)
    turns = original * plain / (2 * math.pi)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        keep = np.where(turns < low, 0.0, 1.0) if low == high else np.clip((turns - low) / (high - low), 0, 1)
    else:
        # YaRN: linear in the pair's index between the pairs that turn beta_fast and beta_slow times.
        first, last = (_pair_of(turning, original, theta, len(pairs)) for turning in (scaling.beta_fast, scaling.beta_slow))
        first, last = (math.floor(first), math.ceil(last)) if scaling.truncate else (first, last)
        first, last = max(first, 0), min(last, 2 * len(pairs) - 1)
        last = last + 0.001 if first == last else last
        keep = 1 - np.clip((np.arange(len(pairs)) - first) / (last - first), 0, 1)
    return keep * plain + (1 - keep) * plain / factor


def _pair_of(turns: float, original: int, theta: float, n_pairs: int) -> float:
    """Index (not whole) of the pair that turns so many times in the original context."""
    return n_pairs * math.log(original / (2 * math.pi * turns)) / math.log(theta)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
    upper, lower = scaling.mscale, scaling.mscale_all_dim
    if upper and lower:
        return (0.1 * upper * math.log(scaling.factor) + 1) / (0.1 * lower * math.log(scaling.factor) + 1)
    return 0.1 * math.log(scaling.factor) + 1

"""Queries that grow with their position: the factor of each token comes in over the edge, once for all layers; one launch multiplies."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.query_temperature import QueryTemperature
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import Sequences
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.query_temperature import tune_queries

TUNE_QUERIES = Kernel(body=tune_queries, params=("qkv", "factor", "q_slots"), inout=("qkv",), code_bytes=160)


def place_factors(wafer: Wafer, heads: HeadLayout, bands: TokenBands, values: NDArray[np.float32] | None) -> PlacedTensor:
    """Bring the factor of every new token, (T, 1) float32, to the cores that hold its queries; None with the ``dry`` executor."""
    columns = Split.everywhere(1, wafer.cols, at=heads.units.used)
    factors = wafer.empty("temperature of queries", wafer.placement((bands.n_tokens, 1), ("row", bands.split), ("col", columns)))
    wafer.inject(factors, values)
    return factors


def temperature_factors(tuned: QueryTemperature, sequences: Sequences) -> NDArray[np.float32]:
    """``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))`` of every new token, (T, 1), in float64 and rounded once."""
    steps = (sequences.positions + 1) // tuned.floor_scale
    return np.array([[1 + tuned.attn_scale * math.log1p(step)] for step in steps.tolist()], np.float32)

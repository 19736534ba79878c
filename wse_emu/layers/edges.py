"""What crosses the wafer's edge with the tokens: embeddings and rotary angles in, logits out by chunks of the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.ffn import read_compact
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.linear import DEFAULT_CHUNK, Selection, all_gather_bands, matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer import costs
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Ints, Split, TokenBands
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
_LOGIT_BYTES = 8192
"""SRAM that the logits of one pass over the vocabulary may take on a core."""


def rotary_tables(positions: Ints, heads: HeadLayout, theta: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every token's angle for every pair unit of every key/value head.

    Parameters
    ----------
    positions : ndarray of int64, (T,)
    heads : HeadLayout
    theta : float
        Base of the frequencies.

    Returns
    -------
    cos, sin : ndarray, (T, n_kv_heads * head_dim / 2), float32
        Of ``position * theta**(-2 u / head_dim)``, computed in float64 and rounded once.
    """
    half = heads.head_dim // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = positions[:, None].astype(np.float64) * frequency
    repeat = (1, heads.n_kv_heads)
    return np.tile(np.cos(angle).astype(np.float32), repeat), np.tile(np.sin(angle).astype(np.float32), repeat)


def place_rotary(wafer: Wafer, positions: Ints, heads: HeadLayout, theta: float, bands: TokenBands) -> tuple[PlacedTensor, PlacedTensor]:
    """Bring the rotary tables of the new tokens to the cores that own the pair units; kept for all layers."""
    place = wafer.placement((bands.n_tokens, heads.units.total), ("row", bands.split), ("col", heads.units))
    values = (None, None) if wafer.is_dry else rotary_tables(positions, heads, theta)
    cos, sin = wafer.empty("rotary cosines", place), wafer.empty("rotary sines", place)
    for tensor, value in zip((cos, sin), values, strict=True):
        wafer.inject(tensor, value)
    return cos, sin


def vocabulary_passes(wafer: Wafer, vocab_size: int, bands: TokenBands) -> list[tuple[int, int]]:
    """Ranges of the vocabulary whose logits are on the wafer at one time."""
    per_core = max(1, _LOGIT_BYTES // 4 // max(1, bands.split.max_size))
    step = -(-per_core * wafer.cols // TILE_COLS) * TILE_COLS
    return [(first, min(first + step, vocab_size)) for first in range(0, vocab_size, step)]


def logits(
    wafer: Wafer, x: PlacedTensor, head: StreamedMatrix, wanted: Selection, bands: TokenBands, *, chunk: int = DEFAULT_CHUNK
) -> NDArray[np.float32]:
    """Logits of the wanted tokens, drained to the host pass by pass.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, hidden), float32
        Normalised.
    head : StreamedMatrix, (hidden, vocab)
    wanted : Selection
        Tokens to compute.
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.

    Returns
    -------
    ndarray, (m, vocab), float32
    """
    out = np.zeros((wanted.n_tokens, head.n_out), np.float32)
    for first, last in vocabulary_passes(wafer, head.n_out, bands):
        n = last - first
        place = wafer.placement((bands.n_tokens, n), x.placement.axis0, ("col", Split.balanced(n, wafer.cols)))
        with wafer.empty("logits", place) as y:
            matmul(wafer, x, head.slice(first, last), y, bands, take=wanted, chunk=chunk)
            all_gather_bands(wafer, y, bands, wanted)
            _drain(wafer, y, wanted, bands)
            if not wafer.is_dry:
                out[:, first:last] = read_compact(y, bands, wanted)
    return out


def _drain(wafer: Wafer, y: PlacedTensor, wanted: Selection, bands: TokenBands) -> None:
    """Send the wanted rows of every band out at the north edge."""
    rows = bands.split.representatives
    if wafer.cores is None:
        words = np.zeros(wafer.rows, np.int64)
        words[rows] = wanted.counts[rows]
        wafer.record(costs.edge("drain", "logits", words, y.placement.col_factor))
        return
    traffic = wafer.cores.traffic()
    for row in rows.tolist():
        for col in np.flatnonzero(y.placement.col_factor).tolist():
            if wanted.counts[row]:
                wafer.cores.to_edge(traffic, y.held[row, col], slice(0, int(wanted.counts[row])))
    wafer.record(traffic.event("drain", "logits", costs.COLORS["drain"]))

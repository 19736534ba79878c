"""What crosses the wafer's edge with the tokens: embeddings and rotary angles in, logits out by chunks of the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.ffn import read_compact
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.linear import DEFAULT_CHUNK, Selection, matmul
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
            out[:, first:last] = _drain(wafer, y, wanted, bands)
    return out


def _drain(wafer: Wafer, y: PlacedTensor, wanted: Selection, bands: TokenBands) -> NDArray[np.float32]:
    """Send the wanted tokens' logits out at the north edge, every feature band its own share of the columns."""
    n_bands, split = bands.n_feature_bands, y.placement.axis1[1]
    if wafer.cores is None:
        band = np.arange(wafer.rows) % n_bands
        events = []
        for size in np.unique(split.sizes[split.used]).tolist():
            words = wanted.counts * (size * (band + 1) // n_bands - size * band // n_bands)
            events.append(costs.edge("drain", "logits", words, (split.sizes == size).astype(np.int64)))
        wafer.record(costs.merge("drain", "logits", events))
        return read_compact(y, bands, wanted)
    out, traffic = np.zeros((wanted.n_tokens, split.total), np.float32), wafer.cores.traffic()
    done = np.cumsum(wanted.counts[::n_bands]) - wanted.counts[::n_bands]
    for row in np.flatnonzero(wanted.counts).tolist():
        at, m = int(done[row // n_bands]), int(wanted.counts[row])
        for col in split.used.tolist():
            width, part = int(split.sizes[col]), row % n_bands
            low, high = width * part // n_bands, width * (part + 1) // n_bands
            piece = wafer.cores.to_edge(traffic, y.held[row, col], (slice(0, m), slice(low, high)))
            out[at : at + m, split.starts[col] + low : split.starts[col] + high] = piece
    wafer.record(traffic.event("drain", "logits", costs.COLORS["drain"]))
    return out

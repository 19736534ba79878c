"""The language-model head: logits leave over the wafer's edge by chunks of the vocabulary."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.elementwise import bias as add_bias
from wse_emu.layers.elementwise import cap as soft_cap
from wse_emu.layers.ffn import FILL_ZERO, read_compact
from wse_emu.layers.linear import DEFAULT_CHUNK, Selection, matmul
from wse_emu.layers.stream import StreamedMatrix, StreamedVector
from wse_emu.wafer import costs
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer

_LOGIT_BYTES = 8192
"""SRAM that the logits of one pass over the vocabulary may take on a core."""


def vocabulary_passes(wafer: Wafer, vocab_size: int, bands: TokenBands) -> list[tuple[int, int]]:
    """Ranges of the vocabulary whose logits are on the wafer at one time: whole tiles, at least one."""
    step = _pass_columns(wafer, bands.split.max_size)
    return [(first, min(first + step, vocab_size)) for first in range(0, vocab_size, step)]


def _pass_columns(wafer: Wafer, n_tokens: int) -> int:
    """Columns of the head in one pass, for a core that holds so many tokens."""
    per_core = _LOGIT_BYTES // 4 // max(1, n_tokens)
    return max(1, per_core * wafer.cols // TILE_COLS) * TILE_COLS


def _pass_width(wafer: Wafer, vocab_size: int, n_tokens: int) -> int:
    """Most of them on one column of cores."""
    return Split.balanced(min(_pass_columns(wafer, n_tokens), vocab_size), wafer.cols).max_size


def _unused_words(wafer: Wafer, vocab_size: int, bands: TokenBands, k_split: Split, chunk: int) -> int:
    """Words of a core's room for logits, and for the work of computing them, that whole tiles leave over.

    They are reserved too: fewer tokens (a shorter prompt, a sequence that ended) then never need more SRAM than many. Many tokens go
    through the vocabulary in more passes, whose pieces may be narrower than those of few.
    """
    n_tokens, n_bands = bands.split.max_size, bands.n_feature_bands
    widest = Split.balanced(vocab_size, wafer.cols).max_size
    first, last = vocabulary_passes(wafer, vocab_size, bands)[0]
    block = Split.balanced(last - first, wafer.cols).max_size
    room = min(_LOGIT_BYTES // 4, n_tokens * widest)
    piece, widest_piece = (min(max(1, chunk), -(-width // n_bands)) for width in (block, widest))
    work = max(0, min(room, n_tokens * widest_piece) - n_tokens * piece)
    slabs = 2 * k_split.max_size * (widest_piece - piece)
    return max(0, room - n_tokens * block) + 3 * work + slabs  # partial, incoming and delivered sums


def logits(
    wafer: Wafer, x: PlacedTensor, head: StreamedMatrix, wanted: Selection, bands: TokenBands, *, chunk: int = DEFAULT_CHUNK,
    cap: float | None = None, bias: StreamedVector | None = None,
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
    cap : float, optional
        They become ``cap * tanh(x / cap)``.
    bias : StreamedVector, optional
        (vocab,); added before that.

    Returns
    -------
    ndarray, (m, vocab), float32
        With the ``dry`` executor one zero seen everywhere, read-only: a long prompt's logits would take gigabytes.
    """
    shape = (wanted.n_tokens, head.n_out)
    out = np.broadcast_to(np.float32(0), shape) if wafer.is_dry else np.zeros(shape, np.float32)
    words = _unused_words(wafer, head.n_out, bands, x.placement.axis1[1], chunk)
    if bias is not None:  # as wide as it is for a single token, whose passes are the widest
        words += _pass_width(wafer, head.n_out, 1) - _pass_width(wafer, head.n_out, bands.split.max_size)
    unused = np.full(wafer.cols, words)
    with wafer.sram.reserved("room for more logits", np.ones(wafer.rows, np.int64), unused, 4):
        for first, last in vocabulary_passes(wafer, head.n_out, bands):
            n = last - first
            place = wafer.placement((bands.n_tokens, n), x.placement.axis0, ("col", Split.balanced(n, wafer.cols)))
            with wafer.empty("logits", place) as y:
                if cap is not None or bias is not None:
                    wafer.launch(FILL_ZERO, x=y)  # the limit is taken of the whole block, and the bias added on all columns
                matmul(wafer, x, head.slice(first, last), y, bands, take=wanted, chunk=chunk)
                if bias is not None:
                    add_bias(wafer, y, bias.name, None if bias.values is None else bias.values[first:last], bands, wanted)
                if cap is not None:
                    soft_cap(wafer, y, cap)
                drained = _drain(wafer, y, wanted, bands)
                if not wafer.is_dry:
                    out[:, first:last] = drained
    return out


def _drain(wafer: Wafer, y: PlacedTensor, wanted: Selection, bands: TokenBands) -> NDArray[np.float32]:
    """Send the wanted tokens' logits out at the north edge, every feature band its own share of the columns."""
    n_bands, split = bands.n_feature_bands, y.placement.axis1[1]
    if wafer.cores is None:
        wafer.record(_drained(n_bands, wanted.counts.tobytes(), split))
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


@lru_cache(maxsize=256)
def _drained(n_bands: int, count_bytes: bytes, split: Split) -> Event:
    """What sending out logits split over columns comes to, for so many wanted tokens (int64) on each row."""
    counts, events = np.frombuffer(count_bytes, np.int64), []
    band = np.arange(counts.size) % n_bands
    for size in np.unique(split.sizes[split.used]).tolist():
        words = counts * (size * (band + 1) // n_bands - size * band // n_bands)
        events.append(costs.edge("drain", "logits", words, (split.sizes == size).astype(np.int64)))
    return costs.merge("drain", "logits", events)

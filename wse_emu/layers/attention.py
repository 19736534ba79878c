"""Attention over keys and values that lie over the rows of the wafer.

Queries go to the keys: a tile of queries (tokens of one sequence on one row of cores) is sent along the columns to every row that holds
keys it may see. There each core of the head's column group computes partial scores, which are chained west to east and sent back; the
running maximum is handed from row to row and its final value returned to all; then the accumulators (denominator and output) are handed
from row to row in ascending order of keys; the last row divides and sends the context back. Prefill and decode are the same program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.key_ranges import KeyRanges
from wse_emu.foundation.precision import HalfType
from wse_emu.layers.attention_cores import attend_on_cores
from wse_emu.layers.attention_kernels import ACCUMULATE, ACCUMULATE_ROUNDED, CAP_SCORES, CODE_BYTES, NO_SINK
from wse_emu.layers.attention_plan import AttentionPlan, plan_attention
from wse_emu.layers.head_groups import query_groups
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.layers.norm import stream_vector
from wse_emu.layers.stream import StreamedVector
from wse_emu.wafer import costs
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.storage import ROUNDINGS, beyond_largest, overflow
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.attention_mesh import mesh_attention
from wse_kernels.attention_rounded import mesh_attention_rounded

_MAX_TILE_TOKENS = 16
_WORK_BYTES = 4096
"""SRAM that the work blocks of one query tile may take, lists of keys apart; the tile holds at least one query head of one token."""
_WORDS_PER_KEY = 4
"""Of the lists of keys: its row and the tokens that admit it, a 64-bit word each."""


def attention(
    wafer: Wafer, qkv: PlacedTensor, context: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands,
    *, pattern: AttentionPattern = FULL, chosen: KeyRanges | None = None, kept: KeptKeys | None = None,
    sink: StreamedVector | None = None, probe: bool = False, softmax: HalfType | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:  # fmt: skip
    """Context of every new token: softmax of its scaled scores over the keys that the pattern admits, times the values.

    Rows of cores that hold no key that some token of a tile admits are not visited, and on a visited row only those keys are worked on.
    Query heads with keys of their own (`AttentionPattern.heads`) are worked on layout by layout.

    Parameters
    ----------
    wafer : Wafer
    qkv : PlacedTensor, (T, n_qkv), float32
        Queries rotated, complete on every row of the token's band.
    context : PlacedTensor, (T, num_heads * value width), float32
        Written, in the wafer layout's order.
    cache : KVCache
        Holds the keys and values of all tokens, the new ones included.
    layer : int
    sequences : Sequences
    bands : TokenBands
    pattern : AttentionPattern
        Keys that each token admits; all up to its own by default.
    chosen : KeyRanges, optional
        Those of them that each attends to, if not all.
    kept : KeptKeys, optional
        The same, on the cores that hold the keys: of cores that run one at a time, each works on those that it was told.
    sink : StreamedVector, (num_heads,), optional
        A score of every query head that no key has; it is streamed to all rows, for any may hold a token's first key.
    probe : bool
        Also return the maximum and the denominator of every token and query head, (T, num_heads), through the probe channel.
    softmax : {"bfloat16", "float16", "cb16"}, optional
        Format of maximum, exponentials, denominator and output, which are rounded to it after every key (`wse_kernels.attention_rounded`)
        and handed on in two bytes; float32 by default.
    """
    heads = cache.heads
    rows_per_core = cache.keys_per_core(layer)
    n_heads = heads.n_kv_heads * heads.queries_per_kv
    shape = (bands.n_tokens, n_heads) if probe else (0, 0)
    m, denominator = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    with (
        _streamed(wafer, sink, heads, bands) as sinks,
        wafer.working((attention, heads, rows_per_core, softmax), lambda: _work(wafer, heads, rows_per_core, softmax)),
    ):
        plans = _plans(cache, layer, sequences, bands, pattern, chosen, softmax) if wafer.counts_visits else ()
        events: list[Event] = []
        for plan in plans:
            if wafer.cores is not None:
                events += attend_on_cores(wafer, qkv, context, cache, layer, sequences, bands, plan, m, denominator, sinks, kept, softmax)
                continue
            events += plan.events if softmax is None else map(_rounding, plan.events)
            if not wafer.is_dry:
                _attend(wafer, qkv, context, cache, layer, sequences, plan, _values(sink), m, denominator, softmax)
        if wafer.cores is None and not wafer.is_dry:
            context.settle()
    wafer.record(*events)
    if not probe:
        return None
    wafer.pending.finish()
    wafer.record(costs.moved("probe", "softmax statistics", count=2, words=2 * m.size, hops=0, max_link=0, max_hops=0))
    return m, denominator


def _plans(
    cache: KVCache, layer: int, sequences: Sequences, bands: TokenBands, pattern: AttentionPattern, chosen: KeyRanges | None,
    softmax: HalfType | None,
) -> tuple[AttentionPlan, ...]:  # fmt: skip
    """Of every layout of the pattern; made once for a pass, unless keys were chosen."""
    tile_tokens, largest, _ = _tile_size(cache.heads, cache.keys_per_core(layer), softmax)

    def make() -> tuple[AttentionPlan, ...]:
        return tuple(
            plan_attention(cache, layer, sequences, bands, layout, tile_tokens, groups, chosen)
            for layout, groups in zip(pattern.layouts, query_groups(cache.heads, pattern, largest), strict=True)
        )

    return make() if chosen is not None else cache.attention_plans(sequences, pattern, make)


def _attend(
    wafer: Wafer, qkv: PlacedTensor, context: PlacedTensor, cache: KVCache, layer: int, sequences: Sequences, plan: AttentionPlan,
    sinks: NDArray[np.float32], m: NDArray[np.float32], denominator: NDArray[np.float32], softmax: HalfType | None,
) -> None:  # fmt: skip
    """What all cores do for one layout, at once."""
    heads = cache.heads
    k, v, base, capacity = cache.buffers(layer, sequences)
    args = (
        qkv.unsettled, heads.units.offsets, heads.queries_per_kv, plan.groups.array, heads.head_dim, heads.scale, heads.cap, sinks,
        plan.admitted.first, plan.admitted.ranges, sequences.first_token, sequences.n_new, base, capacity, k, v,
        context.unsettled, m, denominator,
    )  # fmt: skip
    if softmax is None:
        mesh_attention(*args, run=wafer.pending.run)
        return
    wafer.pending.finish()
    beyond = beyond_largest(mesh_attention_rounded(*args, ROUNDINGS[softmax]), softmax)
    if beyond is not None:
        raise overflow(wafer.ledger.where("softmax"), beyond, softmax)


def _rounding(event: Event) -> Event:
    """An entry of the ledger where the state of softmax has 16 bits."""
    return event._replace(name=ACCUMULATE_ROUNDED.name) if event.name == ACCUMULATE.name else event


@contextmanager
def _work(wafer: Wafer, heads: HeadLayout, rows_per_core: int, softmax: HalfType | None) -> Iterator[None]:
    """Hold the code and the work blocks of attention."""
    words = np.where(heads.units.sizes > 0, _tile_size(heads, rows_per_core, softmax)[2], 0)
    code_bytes = CODE_BYTES + (0 if softmax is None else ACCUMULATE_ROUNDED.code_bytes - ACCUMULATE.code_bytes)
    with (
        wafer.sram.reserved("attention work", np.ones(wafer.rows, np.int64), words, 4),
        wafer.sram.code("attention", code_bytes + (0 if heads.score_cap is None else CAP_SCORES.code_bytes)),
    ):
        yield


def _values(sink: StreamedVector | None) -> NDArray[np.float32]:
    """Sinks of all query heads; empty where there are none."""
    if sink is None:
        return NO_SINK
    assert sink.values is not None
    return sink.values.copy()  # writable, as `NO_SINK` is: one compiled specialisation


@contextmanager
def _streamed(wafer: Wafer, sink: StreamedVector | None, heads: HeadLayout, bands: TokenBands) -> Iterator[PlacedTensor | None]:
    """The sinks on the cores: of every part of a head, those of its query heads."""
    if sink is None:
        yield None
        return
    q = heads.queries_per_kv
    values = None if sink.values is None else sink.values.reshape(-1, q)[heads.part_heads].reshape(-1)
    with stream_vector(wafer, sink.name, values, heads.parts.scaled(q), bands, n_rows=wafer.rows) as placed:
        yield placed


def _tile_size(heads: HeadLayout, rows_per_core: int, softmax: HalfType | None) -> tuple[int, int, int]:
    """Tokens of a query tile, most query heads of a key/value head that go together, and the words of a core's room for its work blocks.

    The room is whole, so that fewer keys never need more of it. Heads are cut where one token's would not fit it.
    """
    features, values = 2 * heads.max_part_units, 2 * heads.value_units.max_size if heads.values_in_keys else 2 * heads.max_part_units
    # Of a query head: packed queries, own and incoming scores, maximum, denominator and output (own and incoming), context.
    state = 2 + 2 * (1 + values)
    per_head = features + 2 * rows_per_core + (state if softmax is None else state // 2) + values
    most, q = _WORK_BYTES // 4, heads.queries_per_kv
    n = min(_MAX_TILE_TOKENS, max(1, most // (q * per_head)))
    largest = min(q, max(1, most // per_head))
    words = min(_MAX_TILE_TOKENS * q * per_head, max(most, per_head)) + _WORDS_PER_KEY * rows_per_core
    return n, largest, words + (softmax is not None)

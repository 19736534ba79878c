"""The lightning indexer of a layer: its queries, its key and the weights of its heads, of the new tokens; and the keys that it chooses."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.forward_pass import ForwardPass
from wse_emu.engine.latent_projection import place, product
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.elementwise import bias
from wse_emu.layers.head_products import PUT_SLOTS, ROTATE_SLOTS
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.index_keys import choose_keys, weights_column
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.layers.kv_cache import KVCache
from wse_emu.layers.layer_norm import layer_norm
from wse_emu.layers.rotary import rotary_tables
from wse_emu.memoryx.layout import pairs_to_published
from wse_emu.wafer.placement import Split
from wse_emu.wafer.tensor import PlacedTensor


@dataclass(frozen=True, slots=True)
class IndexTensors:
    """What the indexer computes with."""

    qk: PlacedTensor
    """(T, units * (heads + 1) * 2): of every pair unit the queries of all heads, then the key."""
    weights: PlacedTensor
    """(T, heads), on one column."""


def index_tensors(run: ForwardPass, stack: ExitStack) -> IndexTensors | None:
    """Room for them; None where the layer has no indexer of its own."""
    if not run.spec.runs_indexer(run.current_layer):
        return None
    indexer, heads = _indexer(run), _heads(run)
    single = Split.single(indexer.num_heads, weights_column(heads), run.wafer.cols)
    return IndexTensors(
        place(run, "index queries and key", heads.qkv.total, heads.qkv, stack),
        place(run, "weights of index heads", indexer.num_heads, single, stack),
    )


def place_index_rotary(
    run: ForwardPass, stack: ExitStack, values: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
) -> None:
    """Bring the indexer's rotary tables in: those of attention, and 1 and 0 for elements that are not rotated; kept for all layers."""
    spec, heads, wafer = run.spec, _heads(run), run.wafer
    tables: tuple[NDArray[np.float32] | None, ...] = (None, None)
    if not wafer.is_dry:
        still = ((0, 0), (0, heads.units.total - spec.head_dim // 2))
        known = values or rotary_tables(spec, run.sequences)
        tables = tuple(np.pad(table, still, constant_values=end) for table, end in zip(known, (1, 0), strict=True))
    where = wafer.placement((run.bands.n_tokens, heads.units.total), run.place.axis0, ("col", heads.units))
    placed = [stack.enter_context(wafer.empty(f"index rotary {kind}", where)) for kind in ("cosines", "sines")]
    for tensor, table in zip(placed, tables, strict=True):
        wafer.inject(tensor, table)
    run.index_tables = placed[0], placed[1]


def index_projection(run: ForwardPass, source: PlacedTensor, normal: PlacedTensor, index: IndexTensors) -> None:
    """Queries of the short vector that attention's queries are made of, `source`; key and weights of the normalised residual stream."""
    indexer, heads, n, name = _indexer(run), _heads(run), _indexer(run).num_heads, layer_prefix(run.current_layer) + "index_k_norm"
    width = heads.units.scaled(2)
    with run.scope("indexer"), ExitStack() as stack:
        queries = place(run, "index queries", indexer.head_dim * n, heads.units.scaled(2 * n), stack)
        product(run, source, "index_w_q", queries)
        _tap(run, "index_query", queries, n)
        _rotate(run, queries)
        _tap(run, "index_query_rope", queries, n)
        run.wafer.launch(PUT_SLOTS, x=queries, n=n, slot=0, n_slots=n + 1, last=0, out=index.qk)
        key = place(run, "index key", indexer.head_dim, width, stack)
        out = place(run, "normalised index key", indexer.head_dim, width, stack)
        product(run, normal, "index_w_k", key)
        _tap(run, "index_key_a", key, 1)
        layer_norm(run.wafer, key, name, run.weights.vector(name), indexer.norm_eps, out, run.bands)
        bias(run.wafer, out, name + "_bias", run.weights.vector(name + "_bias"), run.bands)
        _tap(run, "index_key", out, 1)
        _rotate(run, out)
        _tap(run, "index_key_rope", out, 1)
        run.wafer.launch(PUT_SLOTS, x=out, n=1, slot=n, n_slots=n + 1, last=0, out=index.qk)
        product(run, normal, "index_weights", index.weights)
        run.tap("index_weights", index.weights)


def index_choice(run: ForwardPass, index: IndexTensors) -> None:
    """Keep the new keys, and note which keys the layer's tokens, and those of layers that share them, attend to."""
    layer, cache = run.spec.indexer_layers.index(run.current_layer), _cache(run)
    with run.scope("kv_cache"):
        cache.append(layer, index.qk, run.sequences, run.bands)
    record, n_keys = run.result.taps, int((run.sequences.start + run.sequences.n_new).max())
    some = n_keys > _indexer(run).topk
    _make_room(run, some)
    with run.scope("indexer"):
        found = choose_keys(
            run.wafer, index.qk, index.weights, cache, layer, run.sequences, run.bands, _indexer(run), run.heads.units,
            kept=run.kept_keys, probe=record is not None, replay=run.replayed_keys(n_keys),
        )  # fmt: skip
    if record is not None:
        assert found.scores is not None
        record.stages[run.layer, "index_scores"], record.stages[run.layer, "index_keys"] = found.scores, found.taken
    run.note_keys(found.taken, found.ranges if some else None)


def keys_are_done(run: ForwardPass) -> None:
    """Give up what the layer's indexer chose, after it attended, unless the next layer attends to the same keys."""
    if run.spec.runs_indexer(min(run.current_layer + 1, run.spec.num_layers - 1)):
        run.give_up_keys()


def _make_room(run: ForwardPass, some: bool) -> None:
    """Where tokens attend to some keys only, every core keeps which."""
    run.give_up_keys()
    if not some:
        return
    sequences, cache = run.sequences, _cache(run)
    slots, held = sequences.slot.tolist(), cache.keys_in_pass(0, sequences)
    splits = [cache.split(slot, keys) for slot, keys in zip(slots, held, strict=True)]
    run.kept_keys = KeptKeys(run.wafer, run.heads.units, splits, sequences.n_new.tolist())


def _indexer(run: ForwardPass) -> Indexer:
    assert run.spec.indexer is not None
    return run.spec.indexer


def _cache(run: ForwardPass) -> KVCache:
    assert run.cache.index is not None
    return run.cache.index


def _heads(run: ForwardPass) -> HeadLayout:
    return _cache(run).heads


def _rotate(run: ForwardPass, x: PlacedTensor) -> None:
    assert run.index_tables is not None
    cos, sin = run.index_tables
    run.wafer.launch(ROTATE_SLOTS, x=x, cos=cos, sin=sin)


def _tap(run: ForwardPass, stage: str, x: PlacedTensor, n_slots: int) -> None:
    """Record heads in published order."""
    if run.result.taps is not None:
        pairs = _indexer(run).pairs(run.spec.head_dim)
        values = pairs_to_published(run.wafer.drain(x, kind="probe"), n_slots, pairs)
        run.result.taps.stages[run.layer, stage] = values if stage.startswith("index_query") else np.ascontiguousarray(values[:, 0])

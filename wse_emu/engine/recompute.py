"""Keys and values of earlier tokens made again of their inputs, for models whose cache keeps these in their place.

The input, a token's normalised residual stream, is kept as the layer's norm stored it. When the layer runs, the columns of ``w_qkv`` that
make keys and values stream once more, past the tokens on the rows that hold them; biases, norms, limits and the rotation follow as for a
new token. Every sum has the order that it has there, so keys and values are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.forward_pass import ForwardPass, kinds_of
from wse_emu.engine.projection import project_with
from wse_emu.engine.qkv_norm import normalise
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.elementwise import clip
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kept_inputs import EarlierTokens
from wse_emu.layers.kv_cache import Sequences
from wse_emu.layers.rotary import ROTATE_QK, rotary_tables
from wse_emu.layers.stream import StreamedMatrix, StreamedVector
from wse_emu.wafer.placement import Ints
from wse_emu.wafer.tensor import PlacedTensor


@contextmanager
def recomputed(run: ForwardPass) -> Iterator[PlacedTensor | None]:
    """Keys and values of the tokens that the layer holds beside the new ones, (n, n_kv); None if there are none, or they are kept.

    Of every pair unit the key, then the value; complete on the rows that hold the inputs.
    """
    cache = run.cache
    if cache.inputs is None:
        yield None
        return
    layer, wafer = run.current_layer, run.wafer
    earlier = cache.earlier(layer, run.sequences)
    if not earlier.n_tokens:
        yield None
        return
    heads, split = _without_queries(run.heads), earlier.bands.split
    where = wafer.placement((earlier.n_tokens, heads.qkv.total), ("row", split), ("col", heads.qkv))
    with run.empty("keys and values of earlier tokens", where) as kv:
        features = wafer.placement((earlier.n_tokens, run.spec.hidden_size), ("row", split), run.place.axis1)
        with run.scope("recompute"):
            with run.empty("inputs of earlier tokens", features) as x:
                cache.inputs.gather(layer, run.sequences, earlier, x)
                _project(run, x, kv, heads, earlier)
            _prepare(run, kv, heads, earlier)
        yield kv


def _without_queries(heads: HeadLayout) -> HeadLayout:
    """The same keys and values over the same columns."""
    return HeadLayout(heads.n_kv_heads, 0, heads.head_dim, heads.n_cols, heads.sm_scale, heads.score_cap)


def _columns(heads: HeadLayout) -> Ints:
    """Columns of ``w_qkv`` that make keys and values."""
    width = 2 * (heads.queries_per_kv + heads.kv_slots)
    columns: Ints = np.arange(heads.qkv.total).reshape(-1, width)[:, 2 * heads.queries_per_kv :].reshape(-1)
    return columns


def _project(run: ForwardPass, x: PlacedTensor, kv: PlacedTensor, heads: HeadLayout, earlier: EarlierTokens) -> None:
    spec, columns = run.spec, _columns(run.heads)

    def matrix(kind: str) -> StreamedMatrix:
        prefix = layer_prefix(run.current_layer) + kind
        return run.weights.matrix(prefix + "w_qkv", spec.hidden_size, run.heads.qkv.total).some(prefix + "w_kv", columns)

    def vector(kind: str) -> StreamedVector:
        prefix = layer_prefix(run.current_layer) + kind
        values = run.weights.vector(prefix + "b_qkv")
        return StreamedVector(prefix + "b_kv", None if values is None else values[columns])

    kinds = kinds_of(spec, earlier.positions, earlier.bands.split)
    project_with(run, x, matrix, vector if spec.biases.qkv else None, kv, earlier.bands, kinds)


def _prepare(run: ForwardPass, kv: PlacedTensor, heads: HeadLayout, earlier: EarlierTokens) -> None:
    """What happens between the projection and the cache, in the model's order."""
    for suffix in run.spec.qkv_suffixes(run.current_layer):
        if suffix == "_norm":
            normalise(run, kv, heads, earlier.bands)
        elif suffix == "_clip":
            assert run.spec.clip_qkv is not None
            clip(run.wafer, kv, run.spec.clip_qkv)
        elif suffix == "_rope":
            _rotate(run, kv, heads, earlier)


def _rotate(run: ForwardPass, kv: PlacedTensor, heads: HeadLayout, earlier: EarlierTokens) -> None:
    """Turn the keys by their positions; the tables come in once for all layers that hold the same tokens."""
    pattern, local = run.spec.pattern(run.current_layer), run.spec.rotates_locally(run.current_layer)
    if (pattern, local) not in run.earlier_tables:
        run.earlier_tables[pattern, local] = _place_tables(run, heads, earlier, local=local)
    cos, sin = run.earlier_tables[pattern, local]
    run.wafer.launch(ROTATE_QK, qkv=kv, cos=cos, sin=sin, q_slots=0)


def _place_tables(run: ForwardPass, heads: HeadLayout, earlier: EarlierTokens, *, local: bool) -> tuple[PlacedTensor, PlacedTensor]:
    wafer = run.wafer
    tables: tuple[NDArray[np.float32] | None, ...] = (None, None)
    if not wafer.is_dry:
        last = int(earlier.positions.max()) + 1
        whole = Sequences(*(np.array([n], np.int64) for n in (0, last, 0, 0, last)))
        tables = tuple(table[earlier.positions] for table in rotary_tables(run.spec, whole, local=local))
    where = wafer.placement((earlier.n_tokens, heads.units.total), ("row", earlier.bands.split), ("col", heads.units))
    cos, sin = (wafer.empty(f"{kind} of earlier tokens", where) for kind in ("cosines", "sines"))
    for tensor, table in zip((cos, sin), tables, strict=True):
        wafer.inject(tensor, table)
    return cos, sin

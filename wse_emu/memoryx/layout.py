"""Published tensors to the wafer layout and back: transposed, columns reordered (`wse_emu.foundation.weights`), cut into tiles.

A *tiled* matrix is one flat float32 array: tile ``t`` holds columns ``[128 t, min(128 t + 128, N))`` as a C-contiguous ``(K, w)`` block and
starts at element ``128 t K``. Tensors are converted tile by tile, so a build needs little memory however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint import TensorSource, published_names
from wse_emu.checkpoint.finite import first_not_finite
from wse_emu.checkpoint.names import PublishedTensor, own_head, read_part
from wse_emu.foundation.errors import CheckpointError, StoreError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import TILE_COLS, WeightShape, all_weights

LAYOUT_VERSION = 2
"""Changes whenever the bytes of a layout file would change for the same checkpoint."""

_EMBED_CHUNK_ELEMENTS = 1 << 20

F32 = NDArray[np.float32]


def layout_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensors in the wafer layout, without header and padding; a tied head is stored too."""
    return 4 * sum(w.size for w in all_weights(spec))


def qkv_to_published(qkv: NDArray[Any], spec: ModelSpec) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values in published order from columns in the order of ``w_qkv``.

    Parameters
    ----------
    qkv : ndarray, (T, (num_heads + 2 num_kv_heads) * head_dim)
    spec : ModelSpec

    Returns
    -------
    q, k, v : ndarray, (T, num_heads, head_dim) and (T, num_kv_heads, head_dim) twice, C-contiguous, dtype of `qkv`

    Raises
    ------
    StoreError
        If `qkv` has another number of columns.
    """
    d, kv, q = spec.head_dim, spec.num_kv_heads, spec.queries_per_kv
    _check_columns("qkv", qkv, (spec.num_heads + 2 * kv) * d)
    t, pairs = qkv.shape[0], spec.rotary.pairs(d).T  # (element of the pair, unit)
    heads = np.empty((t, kv, q + 2, d), qkv.dtype)
    heads[..., pairs] = qkv.reshape(t, kv, d // 2, q + 2, 2).transpose(0, 1, 3, 4, 2)
    queries = np.ascontiguousarray(heads[:, :, :q]).reshape(t, spec.num_heads, d)
    return queries, np.ascontiguousarray(heads[:, :, q]), np.ascontiguousarray(heads[:, :, q + 1])


def pairs_to_published(x: NDArray[Any], n_slots: int, pairs: NDArray[np.int64]) -> NDArray[Any]:
    """Heads in published order from columns in the order of pair units, slots, elements.

    Parameters
    ----------
    x : ndarray, (T, n_units * n_slots * 2)
    n_slots : int
    pairs : ndarray, (n_units, 2), int64
        Published element of each element of a pair unit.

    Returns
    -------
    ndarray, (T, n_slots, 2 n_units), C-contiguous, dtype of `x`

    Raises
    ------
    StoreError
        If `x` has another number of columns.
    """
    _check_columns("x", x, pairs.size * n_slots)
    out = np.empty((len(x), n_slots, pairs.size), x.dtype)
    out[..., pairs] = x.reshape(len(x), -1, n_slots, 2).transpose(0, 2, 1, 3)
    return out


def context_to_published(context: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    """Attention context in published order (head, element) from the order of the rows of ``w_o``.

    Parameters
    ----------
    context : ndarray, (T, num_heads * head_dim)
    spec : ModelSpec

    Returns
    -------
    ndarray, (T, num_heads * head_dim), C-contiguous, dtype of `context`

    Raises
    ------
    StoreError
        If `context` has another number of columns.
    """
    _check_columns("context", context, spec.num_heads * spec.head_dim)
    out = np.empty(context.shape, context.dtype)
    out[:, context_order(spec)] = context
    return out


def _check_columns(name: str, array: NDArray[Any], columns: int) -> None:
    if array.ndim != 2 or array.shape[1] != columns:
        raise StoreError(f"`{name}` must have shape (T, {columns}), got {array.shape}")


def context_order(spec: ModelSpec) -> NDArray[np.int64]:
    """Published index (head * value_dim + element) of every row of ``w_o``, int64, (num_heads * value_dim,)."""
    d, kv = spec.value_dim, spec.cached_heads
    pairs = spec.rotary.pairs(d) if spec.latent is None else np.arange(d).reshape(-1, 2)
    published = np.arange(spec.num_heads * d, dtype=np.int64).reshape(kv, -1, d)[:, :, pairs]  # (head, slot, unit, 2)
    return np.ascontiguousarray(published.transpose(0, 2, 1, 3)).reshape(-1)


def key_order(spec: ModelSpec) -> NDArray[np.int64]:
    """Published index (head * head_dim + element) of every key element of the layout, int64, (num_kv_heads * head_dim,)."""
    d, kv = spec.head_dim, spec.num_kv_heads
    return np.ascontiguousarray(np.arange(kv * d, dtype=np.int64).reshape(kv, d)[:, spec.rotary.pairs(d)]).reshape(-1)


def variant(spec: ModelSpec) -> str:
    """What of a spec changes the bytes of a layout beside the tensors and their shapes; empty for a Llama."""
    parts = {"unit offset": spec.norm.unit_offset, "embedding": spec.scales.embedding, "logits": spec.scales.logits}
    parts |= {"rotated": spec.rotary.rotated(spec.head_dim), "interleaved": spec.rotary.interleaved}
    usual = {"unit offset": False, "embedding": 1.0, "logits": 1.0, "rotated": spec.head_dim, "interleaved": False}
    return "".join(f"|{name}={value}" for name, value in parts.items() if value != usual[name])


def tile_matrix(matrix: F32) -> F32:
    """Flat tiled form of a whole matrix (n_in, n_out), float32, read-only."""
    n_in, n_out = matrix.shape
    flat = np.empty(n_in * n_out, dtype=np.float32)
    for j in range(0, n_out, TILE_COLS):
        w = min(TILE_COLS, n_out - j)
        flat[j * n_in : (j + w) * n_in].reshape(n_in, w)[...] = matrix[:, j : j + w]
    flat.flags.writeable = False
    return flat


def untile_matrix(flat: F32, n_in: int, n_out: int) -> F32:
    """Matrix (n_in, n_out), C-contiguous, from its flat tiled form; inverse of `tile_matrix`."""
    if flat.shape != (n_in * n_out,):
        raise StoreError(f"a tiled {n_in} x {n_out} matrix has shape ({n_in * n_out},), got {flat.shape}")
    out = np.empty((n_in, n_out), dtype=np.float32)
    for j in range(0, n_out, TILE_COLS):
        w = min(TILE_COLS, n_out - j)
        out[:, j : j + w] = flat[j * n_in : (j + w) * n_in].reshape(n_in, w)
    return out


class Layout:
    """The wafer layout of one checkpoint, made on demand in bounded pieces."""

    def __init__(self, tensors: TensorSource, spec: ModelSpec, where: str) -> None:
        self._tensors = tensors
        self._spec = spec
        self._where = where
        self._published = published_names(spec)
        self._own_head = own_head(spec)
        self._kept: list[tuple[PublishedTensor, F32]] = []
        """The last two roles that were read whole: gate and up take turns."""

    def chunks(self, weight: WeightShape) -> Iterator[F32]:
        """Flat pieces of one tensor of the layout, float32, in file order; together ``weight.size`` elements.

        Raises
        ------
        CheckpointError
            If a value is NaN or infinite, or a tied checkpoint brings a head of its own that differs from the embedding.
        """
        prefix, _, kind = weight.name.rpartition(".")
        prefix = prefix + "." if prefix else ""
        if kind == "b_qkv":
            yield np.concatenate([bias.reshape(-1) for bias in self._qkv_columns(prefix, "b_", ())])
        elif kind == "b_gate_up":
            gate, up = (self._published[prefix + name] for name in ("b_gate", "b_up"))
            yield np.stack([self._rows(of, 0, of.shape[0]) for of in (gate, up)], axis=1).reshape(-1)
        elif len(weight.shape) == 1:
            yield self._vector(weight.name, kind)
        elif kind == "embed":
            yield from self._embed()
        elif kind == "w_qkv":
            yield from _tiles(self._qkv_columns(prefix, "w_", (weight.shape[0],)), weight.shape[0], weight.shape[1])
        elif len(weight.shape) == 3:
            yield from self._of_heads(prefix, kind, weight.shape)
        elif kind in ("w_q_nope", "w_q_rope", "w_kv_a", "w_k_rope"):
            yield from _tiles(self._latent_columns(prefix, kind), weight.shape[0], weight.shape[1])
        elif kind in ("index_w_q", "index_w_k"):
            yield from _tiles(self._index_columns(prefix, kind), weight.shape[0], weight.shape[1])
        elif kind == "w_gate_up":
            yield from _tiles(self._gate_up_columns(prefix), weight.shape[0], weight.shape[1])
        else:
            order = context_order(self._spec) if kind == "w_o" else None
            yield from _tiles(self._plain_columns(weight.name, order), weight.shape[0], weight.shape[1])

    def _vector(self, name: str, kind: str) -> F32:
        """A norm's weight as it is applied, in the order of what it is applied to, or a bias."""
        spec, tensor = self._spec, self._published[name]
        values = self._rows(tensor, 0, tensor.shape[0])
        if kind.endswith("norm") and spec.norm.unit_offset:
            values = values + np.float32(1.0)
        if kind in ("q_norm", "k_norm") and spec.qk_norm is not None:
            of_head = spec.rotary.pairs(spec.head_dim).reshape(-1)
            order = of_head if spec.qk_norm.over == "head" else context_order(spec) if kind == "q_norm" else key_order(spec)
            values = values[order]
        if spec.indexer is not None and kind.startswith("index_k_norm"):
            values = values[spec.indexer.pairs(spec.head_dim).reshape(-1)]
        return self._scaled(kind, values)

    def _brings_own_head(self, role: str) -> bool:
        return role == "lm_head" and self._spec.tie_word_embeddings and self._own_head.name in self._tensors.names()

    def _rows(self, tensor: PublishedTensor, start: int, stop: int) -> F32:
        if not tensor.transposed:
            rows = read_part(self._tensors, tensor, start, stop)
        else:  # its outputs lie across all of its rows: read once, kept while the next is read
            whole = next((values for of, values in self._kept if of is tensor), None)
            if whole is None:
                whole = read_part(self._tensors, tensor, 0, tensor.shape[0])
                self._kept = [*self._kept[-1:], (tensor, whole)]
            rows = whole[start:stop]
        at = first_not_finite(rows, start)
        if at is not None:
            value, index = rows[at[0] - start, *at[1:]], ", ".join(map(str, at))
            raise CheckpointError(f"{self._where}: {tensor.name}[{index}] is {value}; weights must be finite, the checkpoint is damaged")
        return rows

    def _embed(self) -> Iterator[F32]:
        tensor = self._published["embed"]
        step = max(1, _EMBED_CHUNK_ELEMENTS // tensor.shape[1])
        for i in range(0, tensor.shape[0], step):
            yield self._scaled("embed", self._rows(tensor, i, min(i + step, tensor.shape[0]))).reshape(-1)
        if "memory_embed" in self._published:
            yield self._scaled("embed", self._rows(self._published["memory_embed"], 0, 1)).reshape(-1)

    def _scaled(self, role: str, values: F32) -> F32:
        """Values of the embedding or the head (and its bias) with the factor that belongs to all of them; each product is rounded."""
        scales = self._spec.scales
        if role == "embed" and scales.embedding != 1:
            return values * np.float32(scales.embedding)
        if role in ("lm_head", "lm_head_bias") and scales.logits != 1:
            return values / np.float32(scales.logits)
        return values

    def _qkv_columns(self, prefix: str, kind: str, inner: tuple[int, ...]) -> Iterator[F32]:
        """Columns of ``w_qkv``, as rows (n, hidden), or their biases (n,): one key/value head with its query heads at a time."""
        spec = self._spec
        d, q = spec.head_dim, spec.queries_per_kv
        pairs = spec.rotary.pairs(d)
        for g in range(spec.num_kv_heads):
            group = np.empty((d // 2, q + 2, 2, *inner), dtype=np.float32)
            heads = [("q", g * q + s, s) for s in range(q)] + [("k", g, q), ("v", g, q + 1)]
            for name, head, slot in heads:
                group[:, slot] = self._rows(self._published[prefix + kind + name], head * d, (head + 1) * d)[pairs]
            yield group.reshape(-1, *inner)

    def _latent_columns(self, prefix: str, kind: str) -> Iterator[F32]:
        """Columns of the products that latent attention begins with, as rows (n, n_in)."""
        spec, latent = self._spec, self._spec.latent
        assert latent is not None
        rope, rank = spec.rotary.pairs(spec.head_dim).reshape(-1), latent.kv_lora_rank
        if kind in ("w_kv_a", "w_k_rope"):
            tensor = self._published[prefix + "w_kv_a"]
            if kind == "w_k_rope":
                yield self._rows(tensor, rank, rank + rope.size)[rope]
                return
            for i in range(0, rank, TILE_COLS):
                yield self._rows(tensor, i, min(i + TILE_COLS, rank))
            return
        tensor = self._published[prefix + ("w_q" if latent.q_lora_rank is None else "w_q_b")]
        elements = rope + latent.qk_nope_head_dim if kind == "w_q_rope" else np.arange(latent.qk_nope_head_dim)
        for pair in elements.reshape(-1, 2).tolist():
            yield np.stack([self._every(tensor, element, spec.query_dim) for element in pair], axis=1).reshape(-1, tensor.shape[1])

    def _index_columns(self, prefix: str, kind: str) -> Iterator[F32]:
        """Columns of the indexer's products, as rows (n, n_in)."""
        indexer, tensor = self._spec.indexer, self._published[prefix + kind]
        assert indexer is not None
        pairs = indexer.pairs(self._spec.head_dim)
        if kind == "index_w_k":
            yield self._rows(tensor, 0, tensor.shape[0])[pairs.reshape(-1)]
            return
        for pair in pairs.tolist():
            yield np.stack([self._every(tensor, element, indexer.head_dim) for element in pair], axis=1).reshape(-1, tensor.shape[1])

    def _every(self, tensor: PublishedTensor, first: int, step: int) -> F32:
        """Every `step`-th row of a matrix, from `first` on."""
        some = replace(tensor, shape=(tensor.shape[0] // step, tensor.shape[1]), stored=tensor.shape, first=first, step=step)
        return self._rows(some, 0, some.shape[0])

    def _of_heads(self, prefix: str, kind: str, shape: tuple[int, ...]) -> Iterator[F32]:
        """Tiles of the matrices ``w_uk`` or ``w_uv`` of all heads."""
        latent, tensor = self._spec.latent, self._published[prefix + "w_kv_b"]
        assert latent is not None
        nope, both = latent.qk_nope_head_dim, latent.qk_nope_head_dim + latent.v_head_dim
        for head in range(shape[0]):
            if kind == "w_uk":
                columns = np.ascontiguousarray(self._rows(tensor, head * both, head * both + nope).T)
            else:
                columns = self._rows(tensor, head * both + nope, (head + 1) * both)
            yield from _tiles(iter((columns,)), shape[1], shape[2])

    def _gate_up_columns(self, prefix: str) -> Iterator[F32]:
        """Columns of ``w_gate_up``, as rows (n, hidden): gate and up alternate."""
        gate, up = self._published[prefix + "w_gate"], self._published[prefix + "w_up"]
        half = TILE_COLS // 2
        for i in range(0, gate.shape[0], half):
            stop = min(i + half, gate.shape[0])
            both = np.empty((stop - i, 2, gate.shape[1]), dtype=np.float32)
            both[:, 0] = self._rows(gate, i, stop)
            both[:, 1] = self._rows(up, i, stop)
            yield both.reshape(-1, gate.shape[1])

    def _plain_columns(self, role: str, order: NDArray[np.int64] | None) -> Iterator[F32]:
        """Columns of a matrix whose columns keep their order, as rows (n, n_in); `order` permutes the rows of the layout."""
        tensor = self._published[role]
        own_head = self._brings_own_head(role)
        for i in range(0, tensor.shape[0], TILE_COLS):
            stop = min(i + TILE_COLS, tensor.shape[0])
            rows = self._rows(tensor, i, stop)
            if own_head and not np.array_equal(rows, read_part(self._tensors, self._own_head, i, stop)):
                raise CheckpointError(
                    f"{self._where}: `tie_word_embeddings` is true, but {self._own_head.name} differs from {tensor.name} "
                    f"in rows {i}..{stop - 1}; set it to false in config.json, or remove one of the tensors"
                )
            rows = self._scaled(role, rows)
            yield rows if order is None else rows[:, order]


def _tiles(columns: Iterator[F32], n_in: int, n_out: int) -> Iterator[F32]:
    """Flat tiles (n_in * w,) from columns that come as rows (n, n_in) of any number at a time."""
    buffer = np.empty((TILE_COLS, n_in), dtype=np.float32)
    filled, done = 0, 0
    for rows in columns:
        taken = 0
        while taken < len(rows):
            width = min(TILE_COLS, n_out - done)
            n = min(width - filled, len(rows) - taken)
            buffer[filled : filled + n] = rows[taken : taken + n]
            taken += n
            filled += n
            if filled == width:
                yield np.ascontiguousarray(buffer[:width].T).reshape(-1)
                done += width
                filled = 0

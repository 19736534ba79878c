"""Data of the mesh benchmarks: one layer of a mid-size mixture of experts, placed on a wafer and in the layouts of its peers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

import wse_emu as wse
from benchmarks.cases import F32, normal
from wse_emu.engine.plan import sequences_of
from wse_emu.foundation.weights import TILE_COLS
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import KVCache, Sequences
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor

EPS = 1e-5


def streamed(w: F32, name: str = "w") -> StreamedMatrix:
    """A matrix (n_in, n_out) at rest: tiles of `TILE_COLS` columns, each contiguous."""
    tiles = np.concatenate([w[:, j : j + TILE_COLS].ravel() for j in range(0, w.shape[1], TILE_COLS)])
    tiles.flags.writeable = False
    return StreamedMatrix(name, *w.shape, tiles)


def alternate(gate: F32, up: F32) -> F32:
    """Gate and up projection in alternate columns, as they are streamed."""
    both = np.empty((gate.shape[0], 2 * gate.shape[1]), np.float32)
    both[:, ::2], both[:, 1::2] = gate, up
    return both


def put(wafer: wse.Wafer, values: F32, split: Split | None = None, name: str = "x") -> PlacedTensor:
    """Activations (T, n) on the wafer: tokens over rows, features by `split` (balanced by default)."""
    tensor = room(wafer, len(values), split or Split.balanced(values.shape[1], wafer.cols), name)
    wafer.inject(tensor, values)
    return tensor


def room(wafer: wse.Wafer, n_tokens: int, split: Split, name: str = "out") -> PlacedTensor:
    """Undefined activations, placed likewise."""
    bands = TokenBands(n_tokens, wafer.rows)
    return wafer.empty(name, wafer.placement((n_tokens, split.total), ("row", bands.split), ("col", split)))


def gathered(tensor: PlacedTensor) -> NDArray[Any]:
    """The whole tensor on the host."""
    return tensor.wafer.drain(tensor, kind="probe")


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer and of the tokens that go through it."""

    n_tokens: int
    n_cached: int
    """Tokens whose keys and values are there already."""
    rows: int = 32
    cols: int = 32
    hidden: int = 1024
    n_kv: int = 4
    q: int = 4
    """Query heads for each key/value head."""
    head_dim: int = 64
    n_experts: int = 32
    top_k: int = 4
    ffn: int = 512
    vocab: int = 8192

    @staticmethod
    def prefill(smoke: bool) -> Layer:
        """A prompt of 512 tokens."""
        return Layer.tiny(6, 0) if smoke else Layer(512, 0)

    @staticmethod
    def decode(smoke: bool) -> Layer:
        """One more token."""
        return Layer.tiny(1, 6) if smoke else Layer(1, 512)

    @staticmethod
    def tiny(n_tokens: int, n_cached: int) -> Layer:
        """For smoke runs."""
        return Layer(n_tokens, n_cached, 2, 6, hidden=16, n_kv=2, q=2, head_dim=8, n_experts=4, top_k=2, ffn=8, vocab=160)

    @property
    def half(self) -> int:
        """Rotary pairs of a head."""
        return self.head_dim // 2

    @property
    def heads(self) -> HeadLayout:
        """How heads lie over columns."""
        return HeadLayout(self.n_kv, self.q, self.head_dim, self.cols)

    @property
    def bands(self) -> TokenBands:
        """How the new tokens lie over rows."""
        return TokenBands(self.n_tokens, self.rows)

    def wafer(self) -> wse.Wafer:
        """A fresh one."""
        return wse.Wafer(wse.WSE3, rows=self.rows, cols=self.cols)

    @cached_property
    def x(self) -> F32:
        """Activations (T, hidden)."""
        return normal(self.n_tokens, self.hidden)

    @cached_property
    def qkv(self) -> F32:
        """Projections of all tokens, cached ones first, (n_cached + T, n_qkv), in the wafer's order of pair units."""
        return normal(self.n_cached + self.n_tokens, self.heads.qkv.total, seed=1)

    def published(self, rows: F32) -> tuple[F32, F32, F32]:
        """Queries (T, heads, d), keys and values (T, kv heads, d), the pair units apart again; each contiguous."""
        parts = rows.reshape(len(rows), self.n_kv, self.half, self.q + 2, 2).transpose(0, 1, 3, 4, 2)
        whole = np.ascontiguousarray(parts).reshape(len(rows), self.n_kv, self.q + 2, self.head_dim)
        queries = np.ascontiguousarray(whole[:, :, : self.q]).reshape(len(rows), self.n_kv * self.q, self.head_dim)
        return queries, np.ascontiguousarray(whole[:, :, self.q]), np.ascontiguousarray(whole[:, :, self.q + 1])

    def context_heads(self, context: F32) -> F32:
        """Context (T, n) of the wafer's order as (T, heads, d)."""
        parts = context.reshape(-1, self.n_kv, self.half, self.q, 2).transpose(0, 1, 3, 4, 2)
        return parts.reshape(len(context), -1, self.head_dim)

    def cache_with(self, wafer: wse.Wafer) -> tuple[KVCache, Sequences]:
        """A cache that holds the earlier tokens, and the new ones, not appended yet."""
        cache = KVCache(wafer, self.heads, 1, np.array([self.n_cached + self.n_tokens]))
        if self.n_cached:
            earlier = sequences_of([0], [self.n_cached], [0])
            with put(wafer, self.qkv[: self.n_cached], self.heads.qkv, "qkv") as placed:
                cache.append(0, placed, earlier, TokenBands(self.n_cached, self.rows))
            cache.advance(earlier)
        return cache, sequences_of([0], [self.n_tokens], [self.n_cached])

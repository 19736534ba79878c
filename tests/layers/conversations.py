"""Batches of sequences that grow pass by pass: what the KV cache and attention are given, and where it lies in the wafer layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from wse_emu.engine.plan import sequences_of
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import Sequences

from .definitions import normal

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Conversation:
    """New tokens of every sequence in every forward pass (0 leaves it out), and the projections of all tokens."""

    seed: int
    n_kv: int
    q: int
    half: int
    passes: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence at the end."""
        return tuple(np.sum(self.passes, axis=0).tolist())

    @property
    def width(self) -> int:
        """Columns of the projections."""
        return self.n_kv * self.half * (self.q + 2) * 2

    def heads(self, n_cols: int) -> HeadLayout:
        """Layout over `n_cols` columns of cores."""
        return HeadLayout(self.n_kv, self.q, 2 * self.half, n_cols)

    def qkv(self, slot: int) -> F32:
        """Projections of all tokens of one sequence, in the wafer layout's order."""
        return normal(self.seed + slot, self.lengths[slot], self.width)

    def steps(self) -> list[tuple[Sequences, F32]]:
        """Forward passes with the projections of their new tokens."""
        done = np.zeros(len(self.lengths), np.int64)
        out = []
        for counts in self.passes:
            slot = np.flatnonzero(counts)
            n = np.array(counts, np.int64)[slot]
            sequences = sequences_of(slot.tolist(), n.tolist(), done[slot].tolist())
            out.append((sequences, np.concatenate([self.qkv(s)[done[s] : done[s] + counts[s]] for s in slot])))
            done += counts
        return out

    def published(self, slot: int) -> tuple[F32, F32, F32]:
        """Queries (T, heads, d), keys and values (T, kv heads, d) of one sequence: pair units are split into two halves again."""
        n = self.lengths[slot]
        parts = (
            self.qkv(slot).reshape(n, self.n_kv, self.half, self.q + 2, 2).transpose(0, 1, 3, 4, 2).reshape(n, self.n_kv, self.q + 2, -1)
        )
        return parts[:, :, : self.q].reshape(n, self.n_kv * self.q, -1), parts[:, :, self.q], parts[:, :, self.q + 1]


def context_to_heads(context: F32, n_kv: int, q: int, half: int) -> F32:
    """Context (T, n) in the wafer layout's order as (T, heads, d)."""
    return context.reshape(-1, n_kv, half, q, 2).transpose(0, 1, 3, 4, 2).reshape(-1, n_kv * q, 2 * half)


@st.composite
def conversations(draw: st.DrawFn, max_sequences: int = 3, max_passes: int = 4, max_new: int = 5) -> Conversation:
    """Any batch; every sequence and every pass has a token."""
    n = draw(st.integers(1, max_sequences))
    counts = st.lists(st.integers(0, max_new), min_size=n, max_size=n).filter(any).map(tuple)
    passes = draw(st.lists(counts, min_size=1, max_size=max_passes))
    missing = tuple(0 if total else 1 for total in np.sum(passes, axis=0))
    if any(missing):
        passes.append(missing)
    return Conversation(draw(st.integers(0, 1 << 30)), *draw(st.tuples(*[st.integers(1, 3)] * 3)), tuple(passes))

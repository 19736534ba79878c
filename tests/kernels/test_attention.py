"""Attention: the driver, the cores in any split and the definition, one scalar at a time, give the same bits; and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config

from wse_kernels import attention_mesh, attention_tile, threads
from wse_kernels._jit import plain
from wse_kernels.attention import (
    cap_scores,
    finish,
    pack_queries,
    partial_scores,
    score_max,
    softmax_accumulate,
    start_denominator,
    start_max,
    store_kv,
)
from wse_kernels.attention_mesh import mesh_attention, mesh_store_kv
from wse_kernels.attention_rounded import softmax_accumulate_rounded
from wse_kernels.exp import exp32, tanh32
from wse_kernels.fma import fma
from wse_kernels.storage import round_to

F = np.float32
U = 2.0**-24
ALL = 1 << 40
"""Window that holds every key."""
NO_SINK = np.zeros(0, F)
NOJIT = bool(config.DISABLE_JIT)
MANY = settings(max_examples=25 if NOJIT else 60, deadline=None)


def unit_starts(n_heads: int, half: int, n_cols: int) -> np.ndarray:
    """Whole heads on every column, or every head on a group of columns; balanced, with empty columns where there are too many."""
    if n_cols <= n_heads:
        return np.arange(n_cols + 1) * n_heads // n_cols * half
    starts = [0]
    for g in range(n_heads):
        n = (g + 1) * n_cols // n_heads - g * n_cols // n_heads
        starts += [g * half + i * half // n for i in range(1, n + 1)]
    return np.array(starts, np.int64)


@dataclass(frozen=True)
class Mesh:
    """Sequences with their new tokens' projections (keys rotated), and caches that hold the keys and values before them."""

    n_heads: int
    q: int
    half: int
    starts: np.ndarray
    nt: np.ndarray
    pos0: np.ndarray
    cap: np.ndarray
    qkv: np.ndarray
    k: np.ndarray
    v: np.ndarray
    window: int = ALL
    density: float = 1.0
    """Share of the keys in the window that are admitted, drawn for each pair of positions; a query's own key always is."""
    sink: np.ndarray = field(default_factory=lambda: NO_SINK)
    """Score of each query head's sink, (n_heads * q,) or none."""
    limit: np.float32 = field(default=F(0))
    """Soft cap of the scaled scores; 0 is none."""

    def admits(self, q: int, k: int) -> bool:
        """Whether a query at position q admits the key at position k."""
        drawn = (q * 2_654_435_761 + k * 40_503) % 1000 < 1000 * self.density
        return 0 <= q - k < self.window and (q == k or drawn)

    def keys(self, s: int, i: int) -> list[int]:
        """Keys that token i of sequence s admits."""
        q = int(self.pos0[s]) + i
        return [k for k in range(q + 1) if self.admits(q, k)]

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The same as ranges, token by token."""
        first, ranges = [0], []
        for s in range(self.nt.size):
            for i in range(int(self.nt[s])):
                for k in self.keys(s, i):
                    if len(ranges) > first[-1] and ranges[-1][1] == k:
                        ranges[-1][1] = k + 1
                    else:
                        ranges.append([k, k + 1])
                first.append(len(ranges))
        return np.array(first, np.int64), np.array(ranges, np.int64)

    @property
    def t0(self) -> np.ndarray:
        return np.cumsum(self.nt) - self.nt

    @property
    def base(self) -> np.ndarray:
        return (np.cumsum(self.cap) - self.cap) * 2 * self.starts[-1]

    @property
    def n_tokens(self) -> int:
        return int(self.nt.sum())

    @property
    def scale(self) -> np.float32:
        return F(1 / np.sqrt(2 * self.half))

    def panel(self, flat: np.ndarray, c: int, per_unit: int) -> np.ndarray:
        """All tokens' rows of column c of a flat placed tensor."""
        a, b = (self.n_tokens * per_unit * int(self.starts[i]) for i in (c, c + 1))
        return flat[a:b].reshape(self.n_tokens, -1) if b > a else np.empty((self.n_tokens, 0), flat.dtype)

    def cached(self, flat: np.ndarray, s: int, c: int) -> np.ndarray:
        """Rows of sequence s in the cache of column c."""
        a, b = (int(self.base[s] + self.cap[s] * 2 * self.starts[i]) for i in (c, c + 1))
        return flat[a:b].reshape(int(self.cap[s]), -1) if b > a else np.empty((int(self.cap[s]), 0), flat.dtype)

    def pieces(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Column, first unit in it, number of units, of the columns that hold units of a head."""
        for c, (a, b) in enumerate(pairwise(self.starts.tolist())):
            lo, hi = max(a, head * self.half), min(b, (head + 1) * self.half)
            if lo < hi:
                yield c, lo - a, hi - lo


def make(n_heads: int, q: int, half: int, n_cols: int, lengths: list[tuple[int, int]], seed: int, spread: float = 1.0) -> Mesh:
    """`lengths` are (tokens in the cache, new tokens) of every sequence; what a cache has no token for is NaN."""
    rng = np.random.default_rng(seed)
    starts = unit_starts(n_heads, half, n_cols)
    pos0, nt = np.array(lengths, np.int64).T.copy()
    cap = pos0 + nt + rng.integers(0, 3, nt.size)
    n_kv = int(cap.sum() * 2 * starts[-1])
    qkv = (spread * rng.standard_normal(int(nt.sum() * starts[-1] * (q + 2) * 2))).astype(F)
    m = Mesh(n_heads, q, half, starts, nt, pos0, cap, qkv, np.full(n_kv, np.nan, F), np.full(n_kv, np.nan, F))
    for s in range(nt.size):
        for c in range(starts.size - 1):
            for flat in (m.k, m.v):
                rows = m.cached(flat, s, c)[: pos0[s]]
                rows[:] = rng.standard_normal(rows.shape)
    mesh_store_kv(m.qkv, m.starts, m.q, m.t0, m.nt, m.pos0, m.base, m.cap, m.k, m.v)
    return m


def with_sinks(m: Mesh, sinks: bool) -> Mesh:
    """The same, with a sink for each query head or none."""
    return replace(m, sink=np.random.default_rng(1).standard_normal(m.n_heads * m.q).astype(F) if sinks else NO_SINK)


Result = tuple[np.ndarray, np.ndarray, np.ndarray]


def results(m: Mesh) -> Result:
    """Context, maxima and denominators, not yet written."""
    shape = m.n_tokens, m.n_heads * m.q
    return np.full(m.n_tokens * int(m.starts[-1]) * m.q * 2, np.nan, F), np.full(shape, np.nan, F), np.full(shape, np.nan, F)


def whole_heads(m: Mesh) -> np.ndarray:
    """All query heads of each key/value head as one group."""
    return np.array([(head, 0, m.q) for head in range(m.n_heads)], np.int64)


def driver(m: Mesh, *calls: np.ndarray) -> Result:
    """What the driver writes, called with each array of groups."""
    out = results(m)
    for groups in calls or (whole_heads(m),):
        mesh_attention(
            m.qkv, m.starts, m.q, groups, 2 * m.half, m.scale, m.limit, m.sink, *m.ranges(), m.t0, m.nt, m.base, m.cap, m.k, m.v, *out
        )  # fmt: skip
    return out


def cuts(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    at = sorted({0, n, *rng.integers(0, n + 1, int(rng.integers(0, 4))).tolist()})
    return list(pairwise(at))


def cores(m: Mesh, seed: int, *, interpreted: bool = False, fmt: int | None = None) -> Result:
    """What the cores do: every body on its own blocks, tokens and keys cut at random; blocks that a body writes start as NaN.

    With `fmt` the state of softmax is of that format, and rounded where it is written.
    """
    bodies = (pack_queries, partial_scores, start_max, cap_scores, score_max, start_denominator, softmax_accumulate, finish)
    accumulate_rounded = plain(softmax_accumulate_rounded) if interpreted else softmax_accumulate_rounded
    pack, partial, begin_max, hold, raise_max, begin_denominator, accumulate, divide = (plain(f) if interpreted else f for f in bodies)
    rng = np.random.default_rng(seed)
    context, top, denominators = results(m)
    for s in range(m.nt.size):
        for i0, i1 in cuts(rng, int(m.nt[s])):
            t, row0 = i1 - i0, int(m.t0[s]) + i0
            blocks = cuts(rng, int(m.pos0[s] + m.nt[s]))
            bits = np.zeros(int(m.pos0[s] + m.nt[s]), np.int64)
            for i in range(t):
                bits[m.keys(s, i0 + i)] |= 1 << i
            keys = [np.flatnonzero(bits[j0:j1]) for j0, j1 in blocks]
            admitted = [bits[j0:j1][of_block] for (j0, j1), of_block in zip(blocks, keys, strict=True)]
            for g in range(m.n_heads):
                sink = m.sink[g * m.q : (g + 1) * m.q]
                peak = np.full(m.q * t, np.nan, F)
                begin_max(sink, peak)
                scores = []
                for (j0, j1), of_block in zip(blocks, keys, strict=True):
                    chain = None
                    for c, u0, n in m.pieces(g):
                        q_t = np.full((2 * n, m.q * t), np.nan, F)
                        pack(m.panel(m.qkv, c, (m.q + 2) * 2), 0, m.q, 2, row0, u0, q_t)
                        p = np.full((of_block.size, m.q * t), np.nan, F)
                        partial(m.cached(m.k, s, c)[j0:j1], 2 * u0, of_block, q_t, p)
                        chain = p if chain is None else chain + p
                    assert chain is not None
                    scores.append(chain)
                for b in rng.permutation(len(blocks)):
                    if m.limit:
                        hold(scores[b], m.scale, m.limit)
                    raise_max(scores[b], F(1) if m.limit else m.scale, m.q, admitted[b], peak)
                    if fmt is not None:
                        round_to(peak, fmt)
                for c, u0, n in m.pieces(g):
                    denom, o_t = np.full(m.q * t, np.nan, F), np.zeros((2 * n, m.q * t), F)
                    begin_denominator(sink, peak, denom)
                    if fmt is not None:
                        round_to(denom, fmt)
                    for b, (j0, j1) in enumerate(blocks):
                        v = m.cached(m.v, s, c)[j0:j1]
                        if fmt is None:
                            accumulate(scores[b].copy(), m.q, keys[b], admitted[b], peak, v, 2 * u0, denom, o_t)
                        else:
                            none = np.zeros(1, np.int32)
                            accumulate_rounded(scores[b].copy(), m.q, keys[b], admitted[b], peak, v, 2 * u0, fmt, none, denom, o_t)
                    divide(o_t, denom, m.q, row0, u0, m.panel(context, c, m.q * 2))
                    top[row0 : row0 + t, g * m.q : (g + 1) * m.q] = peak.reshape(m.q, t).T
                    denominators[row0 : row0 + t, g * m.q : (g + 1) * m.q] = denom.reshape(m.q, t).T
    return context, top, denominators


def definition(m: Mesh, stored: Callable[[np.float32], np.float32] = lambda x: x) -> Result:
    """The law of the sums, one scalar at a time; `stored` is how the state of softmax is written."""
    context, top, denominators = results(m)
    for s in range(m.nt.size):
        for i in range(int(m.nt[s])):
            row, keys = int(m.t0[s]) + i, m.keys(s, i)
            for g, slot in np.ndindex(m.n_heads, m.q):
                scaled = []
                for j in keys:
                    score = None
                    for c, u0, n in m.pieces(g):
                        p = F(0)
                        for u in range(u0, u0 + n):
                            for e in range(2):
                                a = m.panel(m.qkv, c, (m.q + 2) * 2)[row, (u * (m.q + 2) + slot) * 2 + e]
                                p = fma(a, m.cached(m.k, s, c)[j, 2 * u + e], p)
                        score = p if score is None else score + p
                    scaled.append(m.limit * plain(tanh32)(score * m.scale / m.limit) if m.limit else score * m.scale)
                own = m.sink[g * m.q + slot : g * m.q + slot + 1]
                peak = stored(max([*scaled, *own]))
                weights = [stored(plain(exp32)(x - peak)) for x in scaled]
                denom = stored(plain(exp32)(own[0] - peak)) if own.size else F(0)
                for p in weights:
                    denom = stored(denom + p)
                for c, u0, n in m.pieces(g):
                    for u in range(u0, u0 + n):
                        for e in range(2):
                            o = F(0)
                            for j, p in zip(keys, weights, strict=True):
                                o = stored(fma(p, m.cached(m.v, s, c)[j, 2 * u + e], o))
                            m.panel(context, c, m.q * 2)[row, (u * m.q + slot) * 2 + e] = o / denom
                top[row, g * m.q + slot], denominators[row, g * m.q + slot] = peak, denom
    return context, top, denominators


def heads_of(m: Mesh, flat: np.ndarray, per_unit: int) -> np.ndarray:
    """A placed tensor as (tokens, heads, slots, head_dim), elements in pair-unit order."""
    whole = np.concatenate([m.panel(flat, c, per_unit) for c in range(m.starts.size - 1)], axis=1)
    return (
        whole.reshape(m.n_tokens, m.n_heads, m.half, per_unit // 2, 2)
        .transpose(0, 1, 3, 2, 4)
        .reshape(m.n_tokens, m.n_heads, -1, 2 * m.half)
    )


def same(a: Result, b: Result) -> bool:
    return all(np.array_equal(x.view(np.int32), y.view(np.int32)) for x, y in zip(a, b, strict=True))


@st.composite
def meshes(draw: st.DrawFn, most_tokens: int = 24, most_cached: int = 40) -> Mesh:
    small = NOJIT
    window = draw(st.one_of(st.just(ALL), st.integers(1, 70)))
    lengths = st.tuples(st.integers(0, 2 if small else most_cached), st.integers(1, 3 if small else most_tokens))
    m = make(
        n_heads=draw(st.integers(1, 3)),
        q=draw(st.integers(1, 2 if small else 5)),
        half=draw(st.integers(1, 2 if small else 12)),
        n_cols=draw(st.integers(1, 9)),
        lengths=draw(st.lists(lengths, min_size=1, max_size=2 if small else 3)),
        seed=draw(st.integers(0, 10_000)),
        spread=draw(st.sampled_from([0.01, 1.0, 6.0])),
    )
    density = draw(st.sampled_from([1.0, 1.0, 0.6, 0.1]))
    limit = draw(st.sampled_from([F(0), F(0), F(1.5)]))
    return with_sinks(replace(m, window=window, density=density, limit=limit), draw(st.booleans()))


@pytest.mark.nojit
@MANY
@given(meshes(), st.integers(0, 10_000))
def test_driver_gives_the_bits_of_the_cores_in_any_split(m: Mesh, seed: int) -> None:
    got = driver(m)
    assert not np.isnan(got[0]).any()
    assert same(got, cores(m, seed))


@pytest.mark.parametrize("window", [ALL, 1, 7, 40])
@pytest.mark.parametrize(
    ("n_heads", "q", "half", "n_cols", "lengths"),
    [
        (2, 70, 2, 3, [(3, 2)]),  # more query slots than a task has lanes
        (1, 4, 32, 8, [(100, 45)]),  # several tasks of one head, several runs of keys
        (2, 3, 9, 4, [(0, 70), (66, 1), (0, 1)]),  # a head dimension that no tile divides
        (2, 2, 4, 24, [(5, 9)]),  # more columns than pair units
        (4, 1, 16, 3, [(0, 33), (31, 2)]),  # several whole heads on a column, unevenly
    ],
)
def test_driver_gives_the_bits_of_the_cores_at_the_edges_of_its_tiles(
    n_heads: int, q: int, half: int, n_cols: int, lengths: list[tuple[int, int]], window: int
) -> None:
    m = replace(make(n_heads, q, half, n_cols, lengths, 5), window=window)
    assert same(driver(m), cores(m, 6))
    m = with_sinks(replace(m, density=0.3, limit=F(0.75)), True)
    assert same(driver(m), cores(m, 6))


@pytest.mark.nojit
@pytest.mark.parametrize("window", [ALL, 2])
@pytest.mark.parametrize(
    ("n_heads", "q", "half", "n_cols", "lengths"),
    [(1, 2, 2, 1, [(0, 3)]), (2, 1, 3, 5, [(2, 2)]), (3, 1, 1, 2, [(0, 1), (3, 1)]), (1, 1, 4, 3, [(1, 2)])],
)
def test_cores_driver_and_plain_python_obey_the_definition(
    n_heads: int, q: int, half: int, n_cols: int, lengths: list[tuple[int, int]], window: int
) -> None:
    plainly = replace(make(n_heads, q, half, n_cols, lengths, 7), window=window)
    for m in (replace(plainly, limit=F(1.25)), with_sinks(plainly, True), with_sinks(replace(plainly, density=0.4), True)):
        expected = definition(m)
        assert same(driver(m), expected)
        assert same(cores(m, 8), expected)
        assert same(cores(m, 9, interpreted=True), expected)


@pytest.mark.parametrize(("window", "density"), [(ALL, 1.0), (20, 1.0), (ALL, 0.3)])
@pytest.mark.parametrize(("half", "n_cols", "spread"), [(4, 2, 1.0), (32, 2, 1.0), (32, 16, 1.0), (32, 16, 4.0), (16, 64, 1.0)])
def test_result_agrees_with_softmax_in_float64(half: int, n_cols: int, spread: float, window: int, density: float) -> None:
    m = with_sinks(replace(make(2, 3, half, n_cols, [(90, 60), (0, 75)], 11, spread), window=window, density=density), density < 1)
    context, top, denominators = driver(m)
    d = 2 * half
    qkv, out = heads_of(m, m.qkv, (m.q + 2) * 2).astype(np.float64), heads_of(m, context, m.q * 2)
    for s in range(2):
        rows = slice(int(m.t0[s]), int(m.t0[s] + m.nt[s]))
        n_keys = int(m.pos0[s] + m.nt[s])
        k, v = (
            np.concatenate([m.cached(flat, s, c) for c in range(n_cols)], axis=1)[:n_keys].astype(np.float64).reshape(n_keys, 2, d)
            for flat in (m.k, m.v)
        )
        admitted = np.array([[m.admits(int(m.pos0[s]) + i, j) for j in range(n_keys)] for i in range(int(m.nt[s]))])
        for g, slot in np.ndindex(2, m.q):
            q = qkv[rows, g, slot]
            scores = np.where(admitted, q @ k[:, g].T * float(m.scale), -np.inf)
            sink = float(m.sink[g * m.q + slot]) if m.sink.size else -np.inf
            peak = np.maximum(scores.max(axis=1, keepdims=True), sink)
            weights = np.exp(scores - peak)
            total = weights.sum(axis=1, keepdims=True) + np.exp(sink - peak)
            # First order in u. Score: a sum of d terms over the group, and the scaling. Weight, relative: the error of its exponent
            # (score, maximum, their difference, what exp32 takes for 0) and 1 ulp of exp32, at most 2 u.
            e_score = np.where(admitted, (2 * np.sqrt(d) * np.abs(q) @ np.abs(k[:, g]).T * float(m.scale) + np.abs(scores)) * U, 0)
            e_peak = e_score.max(axis=1, keepdims=True)
            e_weight = np.where(
                admitted, weights * (e_score + e_peak + U * (peak - np.where(admitted, scores, peak)) + 2 * U) + 2.0**-126, 0
            )
            e_sum = 2 * np.sqrt(n_keys) * U
            e_own = np.exp(sink - peak) * (e_peak + U * np.where(np.isinf(sink), 0, peak - sink) + 2 * U)  # the sink's weight
            e_total = e_weight.sum(axis=1, keepdims=True) + e_own + e_sum * total
            expected = weights @ v[:, g] / total
            e_context = (e_weight @ np.abs(v[:, g]) + e_sum * (weights @ np.abs(v[:, g])) + np.abs(expected) * e_total) / total
            h = g * m.q + slot
            assert np.all(np.abs(top[rows, h] - peak[:, 0]) <= e_peak[:, 0])
            assert np.all(np.abs(denominators[rows, h] - total[:, 0]) <= e_total[:, 0])
            assert np.all(np.abs(out[rows, g, slot] - expected) <= e_context + U * np.abs(expected))


def one_sequence(m: Mesh, s: int, first: int, n: int, k: np.ndarray, v: np.ndarray) -> Mesh:
    """`n` new tokens of sequence s from its `first` new one on, with caches of its own."""
    rows = slice(int(m.t0[s]) + first, int(m.t0[s]) + first + n)
    qkv = np.concatenate([m.panel(m.qkv, c, (m.q + 2) * 2)[rows].ravel() for c in range(m.starts.size - 1)])
    return replace(m, nt=np.array([n]), pos0=m.pos0[s : s + 1] + first, cap=m.cap[s : s + 1], qkv=qkv, k=k, v=v)


@pytest.mark.nojit
@MANY
@given(meshes(), st.integers(0, 10_000))
def test_chunks_and_neighbours_do_not_matter(m: Mesh, seed: int) -> None:
    """Every sequence alone, in chunks down to one token, each stored into the cache before it attends."""
    rng = np.random.default_rng(seed)
    whole = heads_of(m, driver(m)[0], m.q * 2)
    for s in range(m.nt.size):
        k, v = np.full((2, int(m.cap[s] * 2 * m.starts[-1])), np.nan, F)
        alone = one_sequence(m, s, 0, int(m.nt[s]), k, v)
        for c in range(m.starts.size - 1):
            for mine, theirs in ((k, m.k), (v, m.v)):
                alone.cached(mine, 0, c)[: m.pos0[s]] = m.cached(theirs, s, c)[: m.pos0[s]]
        steps = cuts(rng, int(m.nt[s])) if seed % 2 else [(i, i + 1) for i in range(int(m.nt[s]))]
        for i0, i1 in steps:
            chunk = one_sequence(m, s, i0, i1 - i0, k, v)
            mesh_store_kv(chunk.qkv, chunk.starts, m.q, chunk.t0, chunk.nt, chunk.pos0, chunk.base, chunk.cap, k, v)
            got = heads_of(chunk, driver(chunk)[0], m.q * 2)
            assert np.array_equal(got.view(np.int32), whole[m.t0[s] + i0 : m.t0[s] + i1].view(np.int32))


@pytest.mark.nojit
@MANY
@given(meshes())
def test_mesh_store_is_the_store_of_every_core(m: Mesh) -> None:
    k, v = np.full_like(m.k, np.nan), np.full_like(m.v, np.nan)
    mesh_store_kv(m.qkv, m.starts, m.q, m.t0, m.nt, m.pos0, m.base, m.cap, k, v)
    k_cores, v_cores = np.full_like(m.k, np.nan), np.full_like(m.v, np.nan)
    for s in range(m.nt.size):
        new = slice(int(m.pos0[s]), int(m.pos0[s] + m.nt[s]))
        for c in range(m.starts.size - 1):
            qkv = m.panel(m.qkv, c, (m.q + 2) * 2)
            store_kv(qkv, m.q, int(m.t0[s]), m.cached(k_cores, s, c)[new], m.cached(v_cores, s, c)[new])
            slots = qkv[m.t0[s] : m.t0[s] + m.nt[s]].reshape(m.nt[s], -1, m.q + 2, 2)
            assert np.array_equal(m.cached(k, s, c)[new], slots[:, :, m.q].reshape(m.nt[s], -1))
            assert np.array_equal(m.cached(v, s, c)[new], slots[:, :, m.q + 1].reshape(m.nt[s], -1))
    assert np.array_equal(k.view(np.int32), k_cores.view(np.int32))
    assert np.array_equal(v.view(np.int32), v_cores.view(np.int32))


def test_keys_that_are_not_admitted_are_never_touched() -> None:
    m = make(2, 3, 8, 4, [(20, 37)], 13)
    clean = driver(m)
    later = 20 + 30
    for c in range(4):
        m.cached(m.k, 0, c)[later:] = np.nan
        m.cached(m.v, 0, c)[later:] = np.inf
    dirty, split = driver(m), cores(m, 14)
    for before, after, other in zip(clean, dirty, split, strict=True):
        before, after, other = (x.reshape(37, -1) if x.ndim == 2 else heads_of(m, x, m.q * 2) for x in (before, after, other))
        assert np.array_equal(before[:30], after[:30])
        assert np.array_equal(before[:30], other[:30])
        assert np.isnan(after[30:]).all()
        assert np.isnan(other[30:]).all()


def test_nan_in_a_query_stays_with_its_head_and_token() -> None:
    m = make(2, 2, 8, 4, [(10, 12)], 15)
    clean = driver(m)
    m.panel(m.qkv, 1, 8)[5, 2] = np.nan  # column 1: second half of head 0; slot 1
    dirty, split = driver(m), cores(m, 16)
    hit = np.zeros((12, 4), bool)
    hit[5, 1] = True
    for before, after, other in zip(clean, dirty, split, strict=True):
        before, after, other = (x if x.ndim == 2 else heads_of(m, x, 4).reshape(12, 4, 16) for x in (before, after, other))
        assert np.array_equal(before[~hit], after[~hit])
        assert np.isnan(after[hit]).all()
        assert np.isnan(other[hit]).all()


def test_keys_before_the_window_are_never_touched() -> None:
    m = replace(make(2, 3, 8, 4, [(20, 37)], 13), window=9)
    clean = driver(m)
    first = 20 + 30 - 9 + 1  # what the last seven tokens see
    for c in range(4):
        m.cached(m.k, 0, c)[:first] = np.nan
        m.cached(m.v, 0, c)[:first] = np.inf
    for before, after, other in zip(clean, driver(m), cores(m, 14), strict=True):
        before, after, other = (x.reshape(37, -1) if x.ndim == 2 else heads_of(m, x, m.q * 2) for x in (before, after, other))
        assert np.array_equal(before[30:], after[30:])
        assert np.array_equal(before[30:], other[30:])
        assert np.isnan(after[:22]).all()
        assert np.isnan(other[:22]).all()


@pytest.mark.nojit
def test_window_that_holds_every_key_is_no_window() -> None:
    m = make(2, 3, 8, 4, [(20, 17), (0, 5)], 27)
    assert same(driver(m), driver(replace(m, window=37)))
    assert not same(driver(m), driver(replace(m, window=36)))


@pytest.mark.nojit
def test_maximum_of_zeros_is_plus_zero_in_any_order() -> None:
    zeros = np.array([[-0.0], [0.0], [-0.0]], F)
    for order in ([0, 1, 2], [1, 0, 2], [0, 2]):
        m = np.full(1, -np.inf, F)
        score_max(zeros[order], F(1), 1, np.ones(len(order), np.int64), m)
        assert m.view(np.int32)[0] == 0
    # The smallest products round to -0: every score of the driver is one.
    mesh = make(1, 1, 1, 1, [(0, 2)], 17)
    mesh.qkv[:] = 1e-30
    mesh.k[:] = -1e-30
    assert (driver(mesh)[1].view(np.int32) == 0).all()


@pytest.mark.nojit
@pytest.mark.parametrize("sinks", [False, True])
def test_groups_of_query_heads_give_the_bits_of_whole_heads_and_touch_no_other(sinks: bool) -> None:
    m = with_sinks(make(2, 5, 3, 4, [(3, 4), (0, 2)], 31), sinks)
    whole = driver(m)
    some, others = np.array([[0, 1, 2], [1, 4, 1]]), np.array([[1, 0, 4], [0, 3, 2], [0, 0, 1]])
    assert same(driver(m, some, others), whole)
    context, m_out, denominator = driver(m, some)
    written = np.zeros(10, np.bool_)
    written[[1, 2, 9]] = True
    for got, expected in ((m_out, whole[1]), (denominator, whole[2])):
        np.testing.assert_array_equal(got[:, written], expected[:, written])
        assert np.isnan(got[:, ~written]).all()
    of_heads, expected = (heads_of(m, flat, 2 * m.q).reshape(m.n_tokens, 2 * m.q, -1) for flat in (context, whole[0]))
    np.testing.assert_array_equal(of_heads[:, written], expected[:, written])
    assert np.isnan(of_heads[:, ~written]).all()


@pytest.mark.nojit
def test_rows_of_no_sequence_stay_as_they_are_and_statistics_may_be_left_out() -> None:
    m = make(1, 2, 2, 2, [(0, 2), (1, 1)], 19)
    full, part = driver(m), results(m)
    none = np.empty((0, 0), F)
    a = slice(1, 2)
    mesh_attention(
        m.qkv, m.starts, m.q, whole_heads(m), 4, m.scale, F(0), NO_SINK, *m.ranges(), m.t0[a], m.nt[a], m.base[a], m.cap[a], m.k, m.v,
        part[0], none, none,
    )  # fmt: skip
    got, expected = heads_of(m, part[0], 4), heads_of(m, full[0], 4)
    assert np.isnan(got[:2]).all()
    assert np.array_equal(got[2:], expected[2:])


@pytest.mark.nojit
def test_a_core_without_tokens_or_keys_has_nothing_to_do() -> None:
    qkv, none = np.ones((3, 8), F), np.empty(0, np.int64)
    q_t, m, denom, o_t = np.empty((4, 0), F), np.empty(0, F), np.empty(0, F), np.empty((4, 0), F)
    pack_queries(qkv, 0, 2, 2, 0, 0, q_t)
    s_t, keys, admitted = np.empty((3, 0), F), np.arange(3), np.zeros(3, np.int64)
    partial_scores(np.ones((3, 4), F), 0, keys, q_t, s_t)
    start_max(NO_SINK, m)
    score_max(s_t, F(1), 2, admitted, m)
    start_denominator(NO_SINK, m, denom)
    softmax_accumulate(s_t, 2, keys, admitted, m, np.ones((3, 4), F), 0, denom, o_t)
    finish(o_t, denom, 2, 0, 0, np.empty((0, 8), F))
    top, total, o_t = np.full(2, np.nan, F), np.full(2, np.nan, F), np.zeros((4, 2), F)
    start_max(NO_SINK, top)
    score_max(np.empty((0, 2), F), F(1), 2, none, top)
    start_denominator(NO_SINK, top, total)
    softmax_accumulate(np.empty((0, 2), F), 2, none, none, top, np.empty((0, 4), F), 0, total, o_t)
    assert np.isneginf(top).all()
    assert not total.any()
    assert not o_t.any()


@pytest.mark.skipif(NOJIT, reason="plain Python starts no threads")
def test_number_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    m = make(2, 3, 16, 8, [(0, 100), (70, 3), (5, 1)], 21)
    answers = []
    for n in (1, 2, 3, 7):
        with threads.limit_threads(n):
            answers.append(driver(m))
    assert all(same(answers[0], other) for other in answers[1:])


@pytest.mark.skipif(NOJIT, reason="nothing is compiled")
def test_driver_has_one_specialisation() -> None:
    driver(make(1, 1, 2, 1, [(0, 1)], 23))
    assert len(attention_mesh._mesh_attention.signatures) == 1
    assert len(mesh_store_kv.signatures) == 1


@numba.njit(error_model="numpy")
def _use_tile(array: np.ndarray, a: np.ndarray, stride: int, lanes: np.int32, x: np.float32, out: np.ndarray) -> None:
    p = attention_tile.load_tile(array, 3, 17)
    p = attention_tile.fma_step(p, a, 1, stride, array, 5)
    p = attention_tile.fma_step_where(lanes, p, a, 2, stride, array, 7)
    p = attention_tile.add_tiles(p, attention_tile.fill_tile(x))
    p = attention_tile.divide_tile(attention_tile.scale_tile(p, x), array, 2)
    attention_tile.store_tile(p, out, 1, 18)


@numba.njit(error_model="numpy")
def _use_max(m: np.ndarray, array: np.ndarray, stride: int) -> None:
    attention_tile.raise_max(m, 3, attention_tile.load_tile(array, 2, stride))


@pytest.mark.skipif(NOJIT, reason="compares with compiled code")
@pytest.mark.parametrize("stride", [0, 16, 17])
def test_maxima_of_a_tile_take_what_is_higher_and_keep_nan(stride: int) -> None:
    rng = np.random.default_rng(26)
    some = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1.0, -1.0, 1e-45, 3e38], F)
    for _ in range(40):
        array, m = rng.choice(some, 200), rng.choice(some, 24)
        compiled, interpreted = m.copy(), m.copy()
        _use_max(compiled, array, stride)
        _use_max.py_func(interpreted, array, stride)
        assert np.array_equal(compiled.view(np.int32), interpreted.view(np.int32))
        assert np.array_equal(compiled[[0, 1, 2, 19, 20]].view(np.int32), m[[0, 1, 2, 19, 20]].view(np.int32))


@pytest.mark.skipif(NOJIT, reason="compares with compiled code")
@pytest.mark.parametrize("stride", [0, 1, 5])
@pytest.mark.parametrize("lanes", [0, 1, 0xFFFF, 0x8000, 0x0FF0, 0x5A5A, 0x7FFF])
def test_compiled_tile_is_its_definition(stride: int, lanes: int) -> None:
    rng = np.random.default_rng(25)
    array, a = rng.standard_normal(200).astype(F), rng.standard_normal(60).astype(F)
    compiled, interpreted = np.zeros((2, 200), F)
    _use_tile(array, a, stride, np.int32(lanes), F(0.3), compiled)
    _use_tile.py_func(array, a, stride, np.int32(lanes), F(0.3), interpreted)
    assert np.array_equal(compiled.view(np.int32), interpreted.view(np.int32))
    assert compiled.any()

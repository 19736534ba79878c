"""Attention over listed keys: the definition in float64, masks of every kind, sinks, and the bits of plain Python and of cores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.equivalence import tolerance
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.placement import Split
from wse_kernels._jit import plain
from wse_kernels.errors import DTypeError, ShapeError
from wse_kernels.sparse_attention import attend_listed, flash_mla_sparse_fwd

F, I32 = np.float32, np.int32


def definition(q, kv, indices, sm_scale, d_v, attn_sink=None, topk_length=None):
    """Scores of the listed keys that count, their softmax with the sink in the denominator; float64, and the bound of every result."""
    s_q, h_q, _ = q.shape
    group = h_q // kv.shape[1]
    out, m, lse = np.zeros((s_q, h_q, d_v)), np.full((s_q, h_q), -np.inf), np.full((s_q, h_q), np.inf)
    e_out, e_m, e_lse = np.zeros_like(out), np.zeros_like(m), np.zeros_like(m)
    for i in range(s_q):
        for h in range(h_q):
            listed = indices[i, h // group][: indices.shape[2] if topk_length is None else max(topk_length[i], 0)]
            listed = listed[(listed >= 0) & (listed < len(kv))]
            if not len(listed):
                continue
            keys = kv[listed, h // group].astype(np.float64)
            row = q[i, h].astype(np.float64)
            scores = float(F(sm_scale)) * (keys @ row)
            e_score = tolerance.score_bound(row[None], keys, float(F(sm_scale)))[0]
            top = scores.max()
            p = np.exp(scores - top)
            m[i, h], lse[i, h] = top, top + np.log(p.sum())
            share = 1.0 if attn_sink is None else p.sum() / (p.sum() + np.exp(np.float64(attn_sink[h]) - top))
            out[i, h] = p / p.sum() @ keys[:, :d_v] * share
            worst = e_score.max()
            relative = np.expm1(2 * worst) + tolerance.U * (8 + np.abs(scores - top).max() + 4 * len(listed))
            e_m[i, h] = worst + tolerance.U * abs(top)
            e_lse[i, h] = relative + worst + 4 * tolerance.U * (1 + abs(lse[i, h]) + abs(top))
            e_out[i, h] = 4 * relative * (p / p.sum() @ np.abs(keys[:, :d_v])) + tolerance.SMALLEST_NORMAL
    return (out, m, lse), (e_out, e_m, e_lse)


def drawn(seed: int, s_q: int, h_kv: int, group: int, s_kv: int, topk: int):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 9))
    q, kv = rng.standard_normal((s_q, h_kv * group, d)).astype(F), rng.standard_normal((s_kv, h_kv, d)).astype(F)
    indices = rng.integers(-1, s_kv + 1, (s_q, h_kv, topk)).astype(I32)
    sink = rng.choice([-np.inf, -1.0, 0.5, 3.0], h_kv * group).astype(F) if rng.integers(2) else None
    length = rng.integers(0, topk + 1, s_q).astype(I32) if rng.integers(2) else None
    return q, kv, indices, 0.7, int(rng.integers(1, d + 1)), sink, length


@settings(max_examples=60)
@given(st.integers(0, 1 << 31), st.integers(1, 5), st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7))
def test_it_is_its_definition_in_float64(seed: int, s_q: int, h_kv: int, group: int, s_kv: int, topk: int) -> None:
    case = drawn(seed, s_q, h_kv, group, s_kv, topk)
    for found, exact, bound in zip(flash_mla_sparse_fwd(*case), *definition(*case), strict=True):
        with np.errstate(invalid="ignore"):
            assert ((found == exact) | (np.abs(found - exact) <= bound)).all()


def test_masks_lengths_and_sinks_do_what_the_form_says() -> None:
    q, kv = np.ones((3, 2, 2), F), np.array([[[1, 0]], [[0, 2]], [[3, 3]]], F)
    indices = np.array([[[0, -1, 7]], [[-1, -1, -1]], [[1, 0, 2]]], I32)
    out, m, lse = flash_mla_sparse_fwd(q, kv, indices, 1.0, 2)
    np.testing.assert_array_equal(out[0], [[1, 0], [1, 0]])
    assert (m[0] == 1).all()
    assert (lse[0] == 1).all()
    assert (out[1] == 0).all()
    assert (m[1] == -np.inf).all()
    assert (lse[1] == np.inf).all()
    short, _, _ = flash_mla_sparse_fwd(q, kv, indices, 1.0, 2, None, np.array([3, 3, 1], I32))
    np.testing.assert_array_equal(short[2], [[0, 2], [0, 2]])
    sunk, m2, lse2 = flash_mla_sparse_fwd(q, kv, indices, 1.0, 2, np.array([-np.inf, np.inf], F))
    np.testing.assert_array_equal(sunk[:, 0], out[:, 0])
    assert (sunk[:, 1] == 0).all()
    np.testing.assert_array_equal(m2, m)
    np.testing.assert_array_equal(lse2, lse)
    half, _, _ = flash_mla_sparse_fwd(q, kv, indices, 1.0, 2, np.array([1, 1], F))  # the score of the only key
    np.testing.assert_array_equal(half[0], [[0.5, 0], [0.5, 0]])
    twice, _, twice_lse = flash_mla_sparse_fwd(q, kv, np.zeros((3, 1, 2), I32), 1.0, 1)
    np.testing.assert_array_equal(twice, np.ones((3, 2, 1)))
    np.testing.assert_allclose(twice_lse, 1 + np.log(2), rtol=1e-6)


@given(st.integers(0, 1 << 31))
@settings(max_examples=20)
def test_tokens_do_not_meet_and_plain_python_gives_the_bits(seed: int) -> None:
    q, kv, indices, scale, d_v, sink, length = drawn(seed, 4, 1, 3, 6, 5)
    whole = flash_mla_sparse_fwd(q, kv, indices, scale, d_v, sink, length)
    for i in range(4):
        one = flash_mla_sparse_fwd(q[i : i + 1], kv, indices[i : i + 1], scale, d_v, sink, None if length is None else length[i : i + 1])
        for ours, theirs in zip(one, whole, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[i])
    made = np.empty((4, 3 * d_v), F), np.empty((4, 3), F), np.empty((4, 3), F)
    lengths, sinks = np.zeros(0, I32) if length is None else length, np.zeros(0, F) if sink is None else sink
    with np.errstate(all="ignore"):
        plain(attend_listed)(
            q.reshape(4, -1), kv[:, 0], indices[:, 0], lengths, sinks, F(scale), np.empty((q.shape[2] + d_v + 5, 3), F), *made
        )
    for ours, theirs in zip(made, whole, strict=True):
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)


def test_every_executor_gives_the_same_bits_on_cores() -> None:
    """Tokens over rows, the keys on every core: a program of one's own."""
    q, kv, indices, scale, d_v, _, _ = drawn(3, 7, 1, 2, 6, 4)
    sink, length = np.array([0.5, -1], F), np.array([4, 0, 1, 2, 3, 4, 4], I32)
    d = q.shape[2]
    body = Kernel(
        body=attend_listed,
        params=("q", "kv", "indices", "topk_length", "attn_sink", "sm_scale", "work", "out", "max_logits", "lse"),
        out=("out", "max_logits", "lse"), scratch=("work",), code_bytes=1600,
    )  # fmt: skip
    results = []
    for executor in ("batched", "isolated", "interpreted"):
        wafer = wse.Wafer(rows=3, cols=1, executor=executor)
        rows = ("row", Split.balanced(7, 3))
        places = {n: wafer.placement((7, w), rows, (None, None)) for n, w in (("q", 2 * d), ("indices", 4), ("out", 2 * d_v), ("m", 2))}
        given_q, given_kv = wafer.empty("q", places["q"]), wafer.empty("kv", wafer.placement((6, d), (None, None), (None, None)))
        lists = wafer.empty("indices", places["indices"], I32)
        wafer.inject(given_q, q.reshape(7, -1))
        wafer.inject(given_kv, np.ascontiguousarray(kv[:, 0]))
        wafer.inject(lists, np.ascontiguousarray(indices[:, 0]))
        lengths = wafer.empty("topk_length", wafer.placement((1, 7), (None, None), rows), I32, ndim=1)
        sinks = wafer.empty("attn_sink", wafer.placement((1, 2), (None, None), (None, None)), ndim=1)
        wafer.inject(lengths, length)
        wafer.inject(sinks, sink)
        made = [wafer.empty(n, places[p]) for n, p in (("out", "out"), ("max_logits", "m"), ("lse", "m"))]
        wafer.launch(
            body, q=given_q, kv=given_kv, indices=lists, topk_length=lengths, attn_sink=sinks, sm_scale=F(scale),
            work=wse.scratch((d + d_v + 4, 2)), out=made[0], max_logits=made[1], lse=made[2],
        )  # fmt: skip
        results.append([wafer.drain(tensor) for tensor in made])
    whole = flash_mla_sparse_fwd(q, kv, indices, scale, d_v, sink, length)
    for result in results:
        for ours, theirs in zip(result, whole, strict=True):
            np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)


def test_what_does_not_fit_is_refused_by_name() -> None:
    q, kv, indices = np.zeros((2, 4, 3), F), np.zeros((5, 2, 3), F), np.zeros((2, 2, 6), I32)
    with pytest.raises(DTypeError, match="`indices` must be int32, got int64"):
        flash_mla_sparse_fwd(q, kv, indices.astype(np.int64), 1.0, 3)
    with pytest.raises(ShapeError, match=r"`indices` must have axes \(2, 2, topk\), got shape \(2, 1, 6\)"):
        flash_mla_sparse_fwd(q, kv, indices[:, :1], 1.0, 3)
    with pytest.raises(ShapeError, match=r"a multiple of 2 heads .* got 3"):
        flash_mla_sparse_fwd(q[:, :3], kv, indices, 1.0, 3)
    with pytest.raises(ShapeError, match=r"`d_v` must lie in 1\.\.3 .* got 4"):
        flash_mla_sparse_fwd(q, kv, indices, 1.0, 4)
    with pytest.raises(ShapeError, match="`attn_sink`"):
        flash_mla_sparse_fwd(q, kv, indices, 1.0, 3, np.zeros(3, F))

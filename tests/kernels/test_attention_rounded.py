"""Softmax with a state of 16 bits: the driver, the cores in any split and the definition, one scalar at a time, give the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_kernels import threads
from wse_kernels.attention_rounded import mesh_attention_rounded
from wse_kernels.formats import BF16, CB16, F16, FloatFormat, decode, encode
from wse_kernels.storage import TO_BF16, TO_CB16, TO_F16

from .test_attention import ALL, NOJIT, Mesh, Result, cores, definition, make, meshes, results, same, whole_heads, with_sinks
from .test_attention import driver as plain_driver

F = np.float32
FORMATS = {TO_BF16: BF16, TO_F16: F16, TO_CB16: CB16}


def nearest(x: np.float32, fmt: FloatFormat) -> np.float32:
    return decode(encode(np.array([x], F), fmt), fmt)[0]


def driver(m: Mesh, fmt: int) -> tuple[Result, int]:
    out = results(m)
    largest = mesh_attention_rounded(
        m.qkv, m.starts, m.q, whole_heads(m), 2 * m.half, m.scale, m.limit, m.sink, *m.ranges(), m.t0, m.nt, m.base, m.cap, m.k, m.v, *out,
        fmt,
    )  # fmt: skip
    return out, largest


@pytest.mark.nojit
@settings(max_examples=8 if NOJIT else 40, deadline=None)
@given(meshes(), st.integers(0, 10_000), st.sampled_from(list(FORMATS)))
def test_driver_gives_the_bits_of_the_cores_in_any_split(m: Mesh, seed: int, fmt: int) -> None:
    assert same(driver(m, fmt)[0], cores(m, seed, fmt=fmt))


@pytest.mark.parametrize(
    ("n_heads", "q", "half", "n_cols", "lengths"),
    [(2, 70, 2, 3, [(3, 2)]), (1, 4, 32, 8, [(100, 45)]), (2, 3, 9, 4, [(0, 70), (66, 1), (0, 1)])],
)
def test_the_same_at_the_edges_of_its_tiles(n_heads: int, q: int, half: int, n_cols: int, lengths: list[tuple[int, int]]) -> None:
    m = make(n_heads, q, half, n_cols, lengths, 5)
    for fmt, window in zip(FORMATS, (ALL, 7, 40), strict=True):
        one = with_sinks(replace(m, window=window, density=0.3 if window == 7 else 1.0), window == 40)
        assert same(driver(one, fmt)[0], cores(one, 6, fmt=fmt))


@pytest.mark.nojit
@pytest.mark.parametrize("fmt", FORMATS)
def test_cores_driver_and_plain_python_obey_the_definition(fmt: int) -> None:
    m = make(2, 1, 3, 5, [(2, 2), (0, 3)], 7)
    for one in (replace(m, limit=F(1.25)), with_sinks(replace(m, density=0.4), True)):
        expected = definition(one, lambda x: nearest(x, FORMATS[fmt]))
        assert same(driver(one, fmt)[0], expected)
        assert same(cores(one, 8, interpreted=True, fmt=fmt), expected)
        assert not same(plain_driver(one), expected)


def alike(n: int) -> Mesh:
    """One query that sees n keys with the same score and values of 1."""
    m = make(1, 1, 1, 1, [(n - 1, 1)], 3)
    m.qkv[:] = 0
    m.k[:], m.v[:] = 0, 1
    return m


@pytest.mark.parametrize(("fmt", "most"), [(TO_BF16, 256), (TO_CB16, 1024), (TO_F16, 2048)])
def test_a_sum_of_ones_stops_where_the_format_has_no_next_number(fmt: int, most: int) -> None:
    for n in (most - 1, most, most + 300):
        (context, top, denominator), _ = driver(alike(n), fmt)
        assert (top[0, 0], denominator[0, 0]) == (0, min(n, most))
        assert (context == 1).all()


def test_lanes_without_a_query_tell_nothing_and_those_with_one_tell_their_largest_number() -> None:
    m = alike(9)
    m.v[:] = 20000
    (context, _, _), largest = driver(m, TO_F16)
    assert np.int32(largest).view(F) == 4 * 20000 > F16.max_finite, "the first sum that is too large; behind it there is infinity"
    assert np.isinf(context).all()
    m.v[:] = 1000
    assert np.int32(driver(m, TO_F16)[1]).view(F) == 9000, "fifteen lanes without a query"
    m = make(2, 1, 1, 1, [(70, 1)], 3)
    m = replace(m, window=1)
    m.v[: 2 * 70] = 60000  # of keys that are not admitted
    assert np.int32(driver(m, TO_F16)[1]).view(F) < 100


@pytest.mark.skipif(NOJIT, reason="plain Python starts no threads")
def test_number_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    m = make(2, 3, 16, 8, [(0, 60), (30, 3), (5, 1)], 21)
    answers = []
    for n in (1, 2, 5):
        with threads.limit_threads(n):
            answers.append(driver(m, TO_CB16))
    assert all(same(answers[0][0], other[0]) and answers[0][1] == other[1] for other in answers[1:])

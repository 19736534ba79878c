"""`fma` rounds once: against exact rational arithmetic, compiled and in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import config
from numba.core.errors import TypingError

from wse_kernels._jit import kernel, plain
from wse_kernels.fma import count_fma, fma

F = np.float32
INF, NAN, ZERO, ONE = F(np.inf), F(np.nan), F(0), F(1)
TINY = F(2.0**-149)
MAX = np.finfo(F).max

pytestmark = pytest.mark.nojit


@kernel(cache=False)
def fma_array(a, b, c, out):
    for i in range(out.shape[0]):
        out[i] = fma(a[i], b[i], c[i])


def rounded(exact: Fraction) -> np.float32:
    """Nearest float32 of a nonzero rational, ties to even, from integers alone."""
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 23)
    steps = round(size / step)  # Fraction rounds half to even
    value = steps * step
    result = F(np.inf) if value >= Fraction(2) ** 128 else F(float(value))
    return -result if exact < 0 else result


def expected(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    # An exact zero has the sign that float64, where nothing here over- or underflows, gives it.
    return rounded(exact) if exact else F(float(a) * float(b) + float(c))


def same_bits(x: np.ndarray | np.float32, y: np.ndarray | np.float32) -> bool:
    x, y = np.atleast_1d(x), np.atleast_1d(y)
    both_nan = np.isnan(x) & np.isnan(y)
    return bool(np.all(both_nan | (x.view(np.int32) == y.view(np.int32))))


def compiled(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    out = np.empty(1, F)
    fma_array(np.array([a]), np.array([b]), np.array([c]), out)
    return out[0]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False).map(F)


@given(floats, floats, floats)
@example(ONE, TINY, ONE)
@example(F(2.0**-100), F(2.0**-100), TINY)
@example(F(2.0**-75), F(2.0**-75), ZERO)  # half of the smallest number: to even, 0
@example(F(2.0**-75), F(2.0**-75), TINY)  # one and a half: to even, 2
@example(F(2.0**-126), F(1 - 2.0**-24), ZERO)
@example(MAX, ONE, F(2.0**103))  # the middle between the largest number and 2**128
@example(MAX, ONE, F(2.0**103 - 2.0**79))
@example(MAX, MAX, -MAX)
@settings(deadline=None, max_examples=400)
def test_any_finite_operands_are_rounded_once(a, b, c):
    want = expected(a, b, c)
    assert same_bits(fma(a, b, c), want)
    assert same_bits(compiled(a, b, c), want)


@given(
    st.integers(1 << 23, (1 << 24) - 1),
    st.integers(1 << 23, (1 << 24) - 1),
    st.integers(-130, 60),
    st.integers(-3, 3),
    st.booleans(),
)
@settings(deadline=None, max_examples=400)
def test_cancellation_leaves_the_exact_error_of_the_product(m, n, exponent, off, negative):
    a, b = F(m * 2.0**-23), F(math.ldexp(n, exponent - 23))
    product = F(float(a) * float(b))
    c = F(-product + F(off) * np.spacing(product))
    if negative:
        a, c = -a, -c
    want = expected(a, b, c)
    assert same_bits(fma(a, b, c), want)
    assert same_bits(compiled(a, b, c), want)


def beside_a_tie(k: int, i: int, exponent: int) -> tuple[np.float32, np.float32, np.float32]:
    """Addend ``k * 2**exponent`` and a product just under half a step of it: by ``i**2 * 2**-46`` of it, which float64 loses in the sum."""
    low = (exponent - 1) // 2
    a, b = math.ldexp(1 + i * 2.0**-23, low), math.ldexp(1 - i * 2.0**-23, exponent - 1 - low)
    return F(a), F(b), F(math.ldexp(k, exponent))


@given(st.integers(1, (1 << 24) - 1), st.integers(0, 1 << 11), st.integers(-149, 103), st.booleans(), st.booleans())
@example((1 << 23) + 1, 1, -23, False, False)  # to float64 first: the tie itself, and then to the wrong, even neighbour
@example((1 << 23) + 2, 1, -23, True, False)
@example(1, 1, -149, False, False)
@example((1 << 24) - 1, 1, 103, False, True)  # just under the middle between the largest number and 2**128
@settings(deadline=None, max_examples=400)
def test_a_hair_beside_a_tie_decides_it(k, i, exponent, negative_product, negative):
    a, b, c = beside_a_tie(k, i, exponent)
    a = -a if negative_product != negative else a
    c = -c if negative else c
    want = expected(a, b, c)
    assert same_bits(fma(a, b, c), want)
    assert same_bits(compiled(a, b, c), want)


def triples(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands of every kind: any bits at all, products near the addend, sums just beside a tie."""
    rng = np.random.default_rng(7)
    a, b, c = (rng.integers(0, 1 << 32, n, dtype=np.uint32).view(F) for _ in range(3))
    half = n // 2
    a[:half] = rng.standard_normal(half).astype(F)
    b[:half] = (rng.standard_normal(half) * np.exp2(rng.integers(-149, 100, half))).astype(F)
    near = a[:half].astype(np.float64) * b[:half] * (1 + rng.standard_normal(half) * np.exp2(rng.integers(-48, 24, half)))
    c[:half] = (near * rng.choice([-1, 1], half)).astype(F)
    for j in range(0, half, 10):
        a[j], b[j], c[j] = beside_a_tie(int(rng.integers(1, 1 << 24)), int(rng.integers(0, 1 << 11)), int(rng.integers(-149, 100)))
    return a, b, c


def test_compiled_and_plain_agree_on_every_kind_of_operand():
    a, b, c = triples(20_000)
    fast, slow = np.empty_like(a), np.empty_like(a)
    fma_array(a, b, c, fast)
    plain(fma_array)(a, b, c, slow)
    assert same_bits(fast, slow)
    finite = np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))[::5]
    want = np.array([expected(a[i], b[i], c[i]) for i in finite], F)
    assert same_bits(fast[finite], want)
    with np.errstate(over="ignore"):
        twice = (a[finite].astype(np.float64) * b[finite] + c[finite]).astype(F)
    assert np.any(twice != want)  # the sample holds cases that two roundings get wrong


@pytest.mark.parametrize(
    ("a", "b", "c", "want"),
    [
        (INF, ONE, ONE, INF),
        (-INF, ONE, ONE, -INF),
        (INF, ZERO, ONE, NAN),
        (INF, ONE, -INF, NAN),
        (INF, ONE, INF, INF),
        (ONE, ONE, -INF, -INF),
        (NAN, ONE, ONE, NAN),
        (ONE, ONE, NAN, NAN),
        (MAX, MAX, ZERO, INF),
        (MAX, -MAX, ZERO, -INF),
        (MAX, MAX, -INF, -INF),
        (ONE, ONE, -ONE, ZERO),
        (-ONE, ZERO, ZERO, ZERO),
        (-ONE, ZERO, -ZERO, -ZERO),
        (TINY, -TINY, ZERO, -ZERO),
        (TINY, TINY, ONE, ONE),
    ],
)
def test_special_values_follow_ieee_754(a, b, c, want):
    assert same_bits(fma(a, b, c), want)
    assert same_bits(compiled(a, b, c), want)


def test_same_bits_at_any_length_and_offset():
    a, b, c = triples(256)
    whole = np.empty_like(a)
    fma_array(a, b, c, whole)
    for start in range(20):
        for n in (1, 3, 7, 8, 15, 16, 31, 33):
            part = np.empty(n, F)
            fma_array(a[start : start + n], b[start : start + n], c[start : start + n], part)
            assert same_bits(part, whole[start : start + n])


@pytest.mark.parametrize("operands", [(1.0, ONE, ONE), (ONE, np.float64(1), ONE), (ONE, ONE, 1), (ONE, np.float16(1), ONE)])
def test_plain_fma_refuses_other_types(operands):
    with pytest.raises(TypeError, match="fma takes three float32 scalars"):
        fma(*operands)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="typing errors are the compiler's")
def test_compiled_fma_refuses_float64():
    a = np.ones(2, F)
    with pytest.raises(TypingError, match="fma"):
        fma_array(a, a, np.ones(2), a)


def test_plain_fma_returns_float32():
    assert type(fma(ONE, ONE, ONE)) is np.float32


def test_count_fma_counts_plain_calls_and_nests():
    x = np.ones(5, F)
    with count_fma() as outer:
        plain(fma_array)(x, x, x, np.empty_like(x))
        with count_fma() as inner:
            fma(ONE, ONE, ONE)
        assert (outer.n, inner.n) == (6, 1)
    fma(ONE, ONE, ONE)
    assert (outer.n, inner.n) == (6, 1)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="nothing is compiled")
def test_count_fma_does_not_see_compiled_calls():
    x = np.ones(5, F)
    with count_fma() as count:
        fma_array(x, x, x, np.empty_like(x))
    assert count.n == 0

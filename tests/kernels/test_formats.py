"""bfloat16, float16 and cb16: definitions against ml_dtypes and NumPy, kernels against definitions, on every code and at every tie."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numba import config

from wse_kernels import formats
from wse_kernels._jit import plain
from wse_kernels.errors import DTypeError
from wse_kernels.formats import BF16, CB16, F16, FloatFormat, decode, encode

F, U = np.float32, np.uint16
NOJIT = bool(config.DISABLE_JIT)
EVERY = np.arange(1 << 16, dtype=U)
PEERS = {BF16: ml_dtypes.bfloat16, F16: np.float16}

pytestmark = pytest.mark.nojit
each_format = pytest.mark.parametrize("fmt", [BF16, F16, CB16], ids=lambda fmt: fmt.name)
SHORT = {BF16: "bf16", F16: "f16", CB16: "cb16"}


def kernels(fmt: FloatFormat):
    return getattr(formats, f"decode_{SHORT[fmt]}"), getattr(formats, f"encode_{SHORT[fmt]}")


def helpers(fmt: FloatFormat):
    return getattr(formats, f"f32_of_{SHORT[fmt]}"), getattr(formats, f"{SHORT[fmt]}_of_f32")


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32 if x.dtype == F else U)


def numbers(fmt: FloatFormat) -> np.ndarray:
    """Float32 of every kind: any bits, the format's own range, and every neighbour of every tie between two codes."""
    rng = np.random.default_rng(5)
    n = 1 << 9 if NOJIT else 1 << 19
    low = np.log2(fmt.min_subnormal) - 2
    own = rng.standard_normal(n) * np.exp2(rng.uniform(max(low, -126), min(np.log2(fmt.max_finite) + 2, 126), n))
    codes = EVERY[: fmt.inf_code : 64 if NOJIT else 1]
    values = decode(codes, fmt).astype(np.float64)
    above = decode(codes + U(1), fmt).astype(np.float64)
    above[np.isinf(above)] = 2.0 ** (fmt.bias + 1)
    ties = ((values + above) / 2).astype(F)
    near = np.concatenate([ties, np.nextafter(ties, F(0)), np.nextafter(ties, F(np.inf)), values.astype(F)])
    return np.concatenate([rng.integers(0, 1 << 32, n, dtype=np.uint32).view(F), own.astype(F), near, -near])


@each_format
def test_every_code_survives_the_way_to_float32_and_back(fmt):
    assert np.array_equal(encode(decode(EVERY, fmt), fmt), EVERY)


@pytest.mark.parametrize("fmt", PEERS, ids=lambda fmt: fmt.name)
def test_definition_decodes_every_code_as_the_peer_does(fmt):
    want = EVERY.view(PEERS[fmt]).astype(F)
    got = decode(EVERY, fmt)
    number = ~np.isnan(want)
    assert np.array_equal(bits(got[number]), bits(want[number]))
    assert np.all(np.isnan(got[~number]))


@pytest.mark.parametrize("fmt", PEERS, ids=lambda fmt: fmt.name)
def test_definition_rounds_as_the_peer_does(fmt):
    x = numbers(fmt)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = x.astype(PEERS[fmt])
    number = ~np.isnan(x)
    assert np.array_equal(encode(x, fmt)[number], want[number].view(U))
    assert np.all(np.isnan(decode(encode(x[~number], fmt), fmt)))


@each_format
def test_kernel_decodes_every_code_as_defined(fmt):
    codes = EVERY[:: 37 if NOJIT else 1]
    out = np.empty(codes.size, F)
    kernels(fmt)[0](codes, out)
    assert np.array_equal(bits(out), bits(decode(codes, fmt)))


@each_format
def test_kernel_rounds_as_defined(fmt):
    x = numbers(fmt)
    out = np.empty(x.size, U)
    kernels(fmt)[1](x, out)
    assert np.array_equal(out, encode(x, fmt))


@each_format
def test_plain_kernels_have_the_same_bits(fmt):
    codes = np.concatenate([EVERY[::61], EVERY[fmt.inf_code - 2 : fmt.inf_code + 3], EVERY[: 1 << fmt.mantissa_bits : 5]])
    values, back = np.empty(codes.size, F), np.empty(codes.size, U)
    plain(kernels(fmt)[0])(codes, values)
    assert np.array_equal(bits(values), bits(decode(codes, fmt)))
    plain(kernels(fmt)[1])(values, back)
    assert np.array_equal(back, codes)
    x = numbers(fmt)[::997]
    out = np.empty(x.size, U)
    plain(kernels(fmt)[1])(x, out)
    assert np.array_equal(out, encode(x, fmt))


@each_format
def test_helpers_return_typed_scalars(fmt):
    to_f32, of_f32 = helpers(fmt)
    assert type(to_f32(U(1))) is np.float32
    assert type(of_f32(F(1))) is np.uint16
    assert to_f32(of_f32(F(-1.5))) == -1.5


@each_format
def test_encoding_is_nearest_by_distance_and_ties_go_to_the_even_code(fmt):
    """The rule itself, with no rounding function: no other code is nearer, and of two equally near the even one is taken."""
    x = numbers(fmt)
    x = np.abs(x[np.isfinite(x) & (np.abs(x) < fmt.max_finite)])[::7].astype(np.float64)
    code = encode(x.astype(F), fmt).astype(np.int64)
    values = np.append(decode(EVERY[: fmt.inf_code], fmt).astype(np.float64), 2.0 ** (fmt.bias + 1))
    distance = np.abs(values[code] - x)
    for other in (np.maximum(code - 1, 0), code + 1):
        gap = np.abs(values[other] - x)
        tie = (gap == distance) & (other != code)
        assert np.all(gap >= distance)
        assert np.all(code[tie] % 2 == 0)


@each_format
def test_overflow_starts_half_a_step_beyond_the_largest_value(fmt):
    limit = fmt.max_finite + (fmt.max_finite * 2.0**-fmt.mantissa_bits) / (2 - 2.0**-fmt.mantissa_bits) / 2
    first = F(limit)
    assert float(first) == limit
    x = np.array([fmt.max_finite, np.nextafter(first, F(0)), first, np.finfo(F).max, np.inf, -first], F)
    largest = fmt.inf_code - 1
    want = [largest, largest, fmt.inf_code, fmt.inf_code, fmt.inf_code, fmt.inf_code | 0x8000]
    assert encode(x, fmt).tolist() == want
    out = np.empty(x.size, U)
    kernels(fmt)[1](x, out)
    assert out.tolist() == want


@each_format
def test_underflow_keeps_the_sign_and_rounds_half_of_the_smallest_to_zero(fmt):
    half = F(fmt.min_subnormal / 2)
    x = np.array([half, -half, np.nextafter(half, F(1)), 3 * half, 0.0, -0.0], F)
    assert encode(x, fmt).tolist() == [0, 0x8000, 1, 2, 0, 0x8000]


@each_format
def test_nan_keeps_sign_and_payload_and_stays_nan(fmt):
    lost = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF], np.uint32).view(F)
    out = np.empty(4, U)
    kernels(fmt)[1](lost, out)
    quiet = fmt.inf_code | 1 << (fmt.mantissa_bits - 1)
    assert out.tolist() == [quiet, quiet | 0x8000, quiet, 0xFFFF]


def test_figures_of_the_formats():
    for fmt, peer in PEERS.items():
        info = ml_dtypes.finfo(peer)
        assert (fmt.max_finite, fmt.min_normal, fmt.min_subnormal) == (info.max, info.smallest_normal, info.smallest_subnormal)
    assert (CB16.bias, CB16.inf_code) == (31, 0x7E00)
    assert (CB16.max_finite, CB16.min_normal, CB16.min_subnormal) == ((2 - 2**-9) * 2.0**31, 2.0**-30, 2.0**-39)
    assert "assumed" in CB16.source


def test_definitions_keep_the_shape_and_take_any_layout():
    x = np.arange(12, dtype=F).reshape(3, 4).T
    assert np.array_equal(decode(encode(x, CB16), CB16), x)
    assert encode(np.full((), 1.5, F), F16).shape == ()


def test_definitions_refuse_other_types():
    with pytest.raises(DTypeError, match="`x` must be an ndarray of float32, got float64"):
        encode(np.zeros(3), CB16)
    with pytest.raises(DTypeError, match="`codes` must be an ndarray of uint16, got list"):
        decode([1, 2], CB16)


@pytest.mark.parametrize(("exponent", "mantissa"), [(8, 8), (1, 14), (15, 0)])
def test_impossible_format_raises(exponent, mantissa):
    with pytest.raises(ValueError, match=f"got {exponent} and {mantissa}"):
        FloatFormat("odd", exponent, mantissa, "test")

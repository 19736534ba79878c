"""Storage formats of 16 bits: bfloat16, float16 and cb16, to float32 and back, on their bits.

Arithmetic is float32; these formats round where memory is written, to nearest with ties to even. Codes are uint16, for NumPy has no
bfloat16 and Numba compiles no float16 for CPUs. `decode` and `encode` are the definitions, by value, in NumPy; the helpers and kernels
compute the same from bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32, f32_of_bits
from wse_kernels.errors import DTypeError


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary format of 16 bits, IEEE 754 style: sign, exponent, mantissa; subnormal numbers, signed zeros, infinities and NaN."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    """Explicit bits, the leading one not counted."""
    source: str

    def __post_init__(self) -> None:
        if self.exponent_bits < 2 or self.mantissa_bits < 1 or self.exponent_bits + self.mantissa_bits != 15:
            raise ValueError(
                "a format of 16 bits has at least 2 exponent bits and 1 mantissa bit, and 15 of both together, "
                f"got {self.exponent_bits} and {self.mantissa_bits}"
            )

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def inf_code(self) -> int:
        """Code of +infinity; NaN codes are above it."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def max_finite(self) -> float:
        """Largest finite value."""
        return (2.0 - 2.0**-self.mantissa_bits) * 2.0**self.bias

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)


BF16 = FloatFormat("bfloat16", 8, 7, "float32 without its lower 16 bits")
F16 = FloatFormat("float16", 5, 10, "IEEE 754 binary16")
CB16 = FloatFormat(
    "cb16",
    6,
    9,
    "Cerebras documentation: 1 sign, 6 exponent and 9 mantissa bits; assumed, for it is unpublished: bias 31, and subnormal numbers, "
    "infinities, NaN and rounding as in IEEE 754",
)


def decode(codes: NDArray[np.uint16], fmt: FloatFormat) -> NDArray[np.float32]:
    """Return the values of codes: the definition.

    Parameters
    ----------
    codes : ndarray, any shape, uint16
    fmt : FloatFormat

    Returns
    -------
    ndarray, same shape, float32
        Exact. A NaN keeps its sign and payload.

    Raises
    ------
    DTypeError
        If `codes` is not uint16.
    """
    _require(codes, np.uint16, "codes")
    field = codes.astype(np.int32)
    exponent = (field >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    mantissa = field & ((1 << fmt.mantissa_bits) - 1)
    leading = np.where(exponent > 0, 1 << fmt.mantissa_bits, 0)
    magnitude = np.ldexp((leading + mantissa).astype(np.float64), np.maximum(exponent, 1) - fmt.bias - fmt.mantissa_bits)
    special = exponent == (1 << fmt.exponent_bits) - 1
    bits = np.where(special, 0.0, magnitude).astype(np.float32).view(np.uint32)
    bits = np.where(special, 0x7F800000 | (mantissa << (23 - fmt.mantissa_bits)), bits.astype(np.int64))
    signed: NDArray[np.float32] = (bits | (field.astype(np.int64) >> 15 << 31)).astype(np.uint32).view(np.float32)
    return signed


def encode(x: NDArray[np.float32], fmt: FloatFormat) -> NDArray[np.uint16]:
    """Return the codes of the nearest values, ties to the even code: the definition.

    Parameters
    ----------
    x : ndarray, any shape, float32
    fmt : FloatFormat

    Returns
    -------
    ndarray, same shape, uint16
        From half a step beyond `FloatFormat.max_finite` on: infinity. A NaN keeps its sign and the upper bits of its payload; where these
        are all zero it becomes the NaN whose uppermost mantissa bit alone is set. So ``encode(decode(codes)) == codes`` for every code.

    Raises
    ------
    DTypeError
        If `x` is not float32.
    """
    _require(x, np.float32, "x")
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape).astype(np.int64)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    is_inf = (bits & 0x7FFFFFFF) == 0x7F800000
    magnitude = np.where(is_nan | is_inf, np.float32(0), np.abs(x)).astype(np.float64)
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, 1 - fmt.bias), 1 - fmt.bias)
    steps = np.rint(np.ldexp(magnitude, fmt.mantissa_bits - exponent)).astype(np.int64)
    # A normal number counts its leading one in `steps`, so that a carry moves into the exponent.
    finite = np.minimum(((exponent.astype(np.int64) + fmt.bias - 1) << fmt.mantissa_bits) + steps, fmt.inf_code)
    payload = (bits & 0x7FFFFF) >> (23 - fmt.mantissa_bits)
    nan = fmt.inf_code | np.where(payload == 0, 1 << (fmt.mantissa_bits - 1), payload)
    code = np.where(is_nan, nan, np.where(is_inf, fmt.inf_code, finite))
    signed: NDArray[np.uint16] = (code | (bits >> 31 << 15)).astype(np.uint16)
    return signed


def _require(array: NDArray[Any], dtype: type[np.generic], name: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(f"`{name}` must be an ndarray of {np.dtype(dtype)}, got {found}")


_MAGNITUDE = np.int32(0x7FFFFFFF)
_F32_INF = np.int32(0x7F800000)
_SIGN_16 = np.int32(0x8000)
_BODY_16 = np.int32(0x7FFF)
_I0 = np.int32(0)
_I1 = np.int32(1)
_I16 = np.int32(16)

_BF16_HALF = np.int32(0x7FFF)
_BF16_INF = np.int32(BF16.inf_code)
_BF16_NAN = np.int32(BF16.inf_code | 1 << (BF16.mantissa_bits - 1))


class _Narrow(NamedTuple):
    """Constants of a format with fewer exponent bits than float32, typed for kernels."""

    shift: np.int32
    """Mantissa bits that float32 has more."""
    half: np.int32
    """Half a step of the format in float32's bits, less one."""
    rebias: np.int32
    """Difference of the biases, in float32's exponent field."""
    min_normal: np.int32
    """Bits of the float32 that is the format's smallest normal number."""
    hidden: np.int32
    """Code of the smallest normal number."""
    inf: np.int32
    nan: np.int32
    """Code of the NaN for payloads without a bit left."""
    step: np.float32
    """Smallest positive value."""
    round: np.float32
    """The float32 whose own step is the format's smallest: adding it rounds a subnormal number as the format does."""


def _narrow(fmt: FloatFormat) -> _Narrow:
    shift = 23 - fmt.mantissa_bits
    return _Narrow(
        shift=np.int32(shift),
        half=np.int32((1 << (shift - 1)) - 1),
        rebias=np.int32((127 - fmt.bias) << 23),
        min_normal=np.int32((128 - fmt.bias) << 23),
        hidden=np.int32(1 << fmt.mantissa_bits),
        inf=np.int32(fmt.inf_code),
        nan=np.int32(fmt.inf_code | 1 << (fmt.mantissa_bits - 1)),
        step=np.float32(fmt.min_subnormal),
        round=np.float32(fmt.min_subnormal * 2.0**23),
    )


_F16 = _narrow(F16)
_CB16 = _narrow(CB16)


@helper
def _f32_of_narrow(code: np.uint16, f: _Narrow) -> np.float32:
    bits = np.int32(code)
    body = np.int32(bits & _BODY_16)
    normal = np.int32(np.int32(body << f.shift) + f.rebias)
    special = np.int32(np.int32(body << f.shift) | _F32_INF)
    subnormal = bits_of_f32(np.float32(body) * f.step)
    value = subnormal if body < f.hidden else normal
    value = special if body >= f.inf else value
    return f32_of_bits(np.int32(value | np.int32(np.int32(bits & _SIGN_16) << _I16)))


@helper
def _narrow_of_f32(x: np.float32, f: _Narrow) -> np.uint16:
    bits = bits_of_f32(x)
    size = np.int32(bits & _MAGNITUDE)
    payload = np.int32(np.int32(size >> f.shift) & np.int32(f.hidden - _I1))
    nan = np.int32(f.inf | payload) if payload != _I0 else f.nan
    small = f32_of_bits(size if size < f.min_normal else _I0) + f.round
    subnormal = np.int32(bits_of_f32(small) - bits_of_f32(f.round))
    scaled = np.int32((size if size < _F32_INF else _F32_INF) - f.rebias)
    odd = np.int32(np.int32(scaled >> f.shift) & _I1)
    normal = np.int32(np.int32(scaled + f.half + odd) >> f.shift)
    normal = normal if normal < f.inf else f.inf
    code = subnormal if size < f.min_normal else normal
    code = nan if size > _F32_INF else code
    return np.uint16(code | np.int32(np.int32(bits >> _I16) & _SIGN_16))


@helper
def f32_of_bf16(code: np.uint16) -> np.float32:
    """Return the value of a bfloat16 code, exactly."""
    return f32_of_bits(np.int32(np.int32(code) << _I16))


@helper
def bf16_of_f32(x: np.float32) -> np.uint16:
    """Return the bfloat16 code nearest to `x`, as `encode` defines it."""
    bits = bits_of_f32(x)
    size = np.int32(bits & _MAGNITUDE)
    upper = np.int32(size >> _I16)
    nan = upper if upper > _BF16_INF else _BF16_NAN
    number = size if size < _F32_INF else _F32_INF
    rounded = np.int32(np.int32(number + _BF16_HALF + np.int32(np.int32(number >> _I16) & _I1)) >> _I16)
    code = nan if size > _F32_INF else rounded
    return np.uint16(code | np.int32(np.int32(bits >> _I16) & _SIGN_16))


@helper
def f32_of_f16(code: np.uint16) -> np.float32:
    """Return the value of a float16 code, exactly."""
    return _f32_of_narrow(code, _F16)


@helper
def f16_of_f32(x: np.float32) -> np.uint16:
    """Return the float16 code nearest to `x`, as `encode` defines it."""
    return _narrow_of_f32(x, _F16)


@helper
def f32_of_cb16(code: np.uint16) -> np.float32:
    """Return the value of a cb16 code, exactly."""
    return _f32_of_narrow(code, _CB16)


@helper
def cb16_of_f32(x: np.float32) -> np.uint16:
    """Return the cb16 code nearest to `x`, as `encode` defines it."""
    return _narrow_of_f32(x, _CB16)


@kernel()
def decode_bf16(codes: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Write the values of bfloat16 `codes`, (n,) uint16, to `out`, (n,) float32."""
    for i in range(codes.shape[0]):
        out[i] = f32_of_bf16(codes[i])


@kernel()
def encode_bf16(x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Write the nearest bfloat16 codes of `x`, (n,) float32, to `out`, (n,) uint16."""
    for i in range(x.shape[0]):
        out[i] = bf16_of_f32(x[i])


@kernel()
def decode_f16(codes: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Write the values of float16 `codes`, (n,) uint16, to `out`, (n,) float32."""
    for i in range(codes.shape[0]):
        out[i] = f32_of_f16(codes[i])


@kernel()
def encode_f16(x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Write the nearest float16 codes of `x`, (n,) float32, to `out`, (n,) uint16."""
    for i in range(x.shape[0]):
        out[i] = f16_of_f32(x[i])


@kernel()
def decode_cb16(codes: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Write the values of cb16 `codes`, (n,) uint16, to `out`, (n,) float32."""
    for i in range(codes.shape[0]):
        out[i] = f32_of_cb16(codes[i])


@kernel()
def encode_cb16(x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Write the nearest cb16 codes of `x`, (n,) float32, to `out`, (n,) uint16."""
    for i in range(x.shape[0]):
        out[i] = cb16_of_f32(x[i])

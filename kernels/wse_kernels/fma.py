"""Fused multiply-add in float32: LLVM's instruction in compiled code, an exact twin in plain Python.

A product that is rounded before it is added, and one that is not, differ in the last bit. Left to the compiler, the choice differs between
a vector loop and its tail; so kernels ask for it by name, and the same name gives the same bits everywhere.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import types
from numba.extending import lower_builtin, type_callable

_lower_builtin: Any = lower_builtin  # Numba's own annotations stop here

_F32 = np.float32
_PACK_F64 = struct.Struct("<d").pack
_UNPACK_I64 = struct.Struct("<q").unpack
# From the middle between the largest float32 and 2**128 on, rounding to nearest even gives infinity.
_OVERFLOW = 2.0**128 - 2.0**103


class _Calls(threading.local):
    """Calls of this thread."""

    n = 0


_calls = _Calls()


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Return ``a * b + c`` with one rounding (IEEE 754 fusedMultiplyAdd, to nearest even).

    Parameters
    ----------
    a, b, c : float32
        Nothing else is converted: float64, Python's float and integers are refused, compiled (a typing error) as well as here.

    Returns
    -------
    float32
        Subnormal numbers, signed zeros, infinities and NaN as IEEE 754 has them (the bits of a NaN are not specified). No warnings.

    Raises
    ------
    TypeError
        If an argument is not a NumPy float32 scalar.

    References
    ----------
    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008: float64 holds the
    product of two float32 exactly; the sum rounded to odd in float64 keeps what the second rounding, to float32, needs.
    """
    _calls.n += 1
    return fma_uncounted(a, b, c)


def fma_uncounted(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Return what `fma` returns, outside the count of `count_fma`: for the inside of `exp32`, which is no multiply-add of a kernel."""
    if not (type(a) is _F32 and type(b) is _F32 and type(c) is _F32):
        raise TypeError(f"fma takes three float32 scalars, got {type(a).__name__}, {type(b).__name__}, {type(c).__name__}")
    product = float(a) * float(b)
    addend = float(c)
    total = product + addend
    # Error of the sum, exact (Knuth's TwoSum); NaN where an operand is infinite or NaN.
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    if (error > 0.0 or error < 0.0) and not _UNPACK_I64(_PACK_F64(total))[0] & 1:
        total = math.nextafter(total, math.inf if error > 0.0 else -math.inf)
    if total >= _OVERFLOW:
        return _F32(math.inf)
    if total <= -_OVERFLOW:
        return _F32(-math.inf)
    return _F32(total)


class FmaCount:
    """How many times the plain-Python `fma` was called inside a `count_fma` block."""

    def __init__(self) -> None:
        self._start = _calls.n
        self._stop: int | None = None

    @property
    def n(self) -> int:
        """Calls so far; fixed when the block ends."""
        return (_calls.n if self._stop is None else self._stop) - self._start

    def _close(self) -> None:
        self._stop = _calls.n


@contextmanager
def count_fma() -> Iterator[FmaCount]:
    """Count the calls of the plain-Python `fma` in this thread: the multiply-adds that an interpreted kernel really did.

    Compiled calls are not seen. Blocks may nest.

    Examples
    --------
    >>> with count_fma() as count:
    ...     _ = fma(np.float32(2), np.float32(3), np.float32(4))
    >>> count.n
    1
    """
    count = FmaCount()
    try:
        yield count
    finally:
        count._close()


def _type_fma(context: Any) -> Callable[..., Any]:
    def typer(a: types.Type, b: types.Type, c: types.Type) -> types.Type | None:
        return types.float32 if a == b == c == types.float32 else None

    return typer


def _lower_fma(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.fma(*args)


for _function in (fma, fma_uncounted):
    type_callable(_function)(_type_fma)
    _lower_builtin(_function, types.float32, types.float32, types.float32)(_lower_fma)

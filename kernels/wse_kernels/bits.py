"""A float32 and its bits: a bitcast in compiled code, a view in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import lower_builtin, type_callable

_lower_builtin: Any = lower_builtin  # Numba's own annotations stop here


def bits_of_f32(x: np.float32) -> np.int32:
    """Return the bits of a float32 as int32; an LLVM bitcast when compiled."""
    return x.view(np.int32)


def f32_of_bits(bits: np.int32) -> np.float32:
    """Return the float32 with these bits; an LLVM bitcast when compiled."""
    return bits.view(np.float32)


def _type_bits_of_f32(context: Any) -> Callable[..., Any]:
    return lambda x: types.int32 if x == types.float32 else None


def _type_f32_of_bits(context: Any) -> Callable[..., Any]:
    return lambda bits: types.float32 if bits == types.int32 else None


def _lower_bits_of_f32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(args[0], ir.IntType(32))


def _lower_f32_of_bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(args[0], ir.FloatType())


type_callable(bits_of_f32)(_type_bits_of_f32)
type_callable(f32_of_bits)(_type_f32_of_bits)
_lower_builtin(bits_of_f32, types.float32)(_lower_bits_of_f32)
_lower_builtin(f32_of_bits, types.int32)(_lower_f32_of_bits)

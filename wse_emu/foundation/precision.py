"""In which number formats a program keeps what it computes; arithmetic is float32 everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import SpecError

HalfType = Literal["bfloat16", "float16", "cb16"]
"""Formats of 16 bits."""
DType = Literal["float32", "bfloat16", "float16", "cb16"]
DTYPES: Final[tuple[str, ...]] = get_args(DType)


def half_of(dtype: DType) -> HalfType | None:
    """The format of 16 bits, or None for float32."""
    return None if dtype == "float32" else dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Formats of what lies in SRAM; the only options of a program that change values of its result."""

    dtype: DType = "float32"
    """Of activations: what a stage stores is rounded to it (nearest, ties to even) where SRAM is written, and takes its bytes there.
    Sums are kept in float32 until they are whole: partial sums, the state of softmax, a token's sum over its experts, norms' sums of
    squares. Router logits and weights of experts, rotary tables, logits and weights in flight are float32 too."""
    kv_dtype: DType | None = None
    """Of keys and values; None is `dtype`."""

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("kv_dtype", self.kv_dtype)):
            if not (value is None and name == "kv_dtype") and not (isinstance(value, str) and value in DTYPES):
                raise SpecError(f"`{name}` must be one of {', '.join(DTYPES)}, got {show(value)}")

    @property
    def stored(self) -> HalfType | None:
        """Format of activations where it has 16 bits."""
        return half_of(self.dtype)

    @property
    def kv(self) -> DType:
        """Format of keys and values."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    def __str__(self) -> str:
        return self.dtype if self.kv == self.dtype else f"{self.dtype}, keys and values {self.kv}"


FLOAT32: Final = Precision()

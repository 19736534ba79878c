"""In which number formats a program keeps and hands on what it computes; arithmetic is float32 everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import SpecError

HalfType = Literal["bfloat16", "float16", "cb16"]
"""Formats of 16 bits."""
DType = Literal["float32", "bfloat16", "float16", "cb16"]
DTYPES: Final[tuple[str, ...]] = get_args(DType)
PrecisionOptLevel = Literal[0, 1, 2]
OPT_LEVELS: Final[tuple[int, ...]] = get_args(PrecisionOptLevel)


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
    precision_opt_level: PrecisionOptLevel = 0
    """0: sums are float32. 1: inside a core they are, and what a row of cores hands on of a matrix product is rounded to `dtype`; scores
    that decide (of routers, of shared experts' gates, logits), attention and norms are summed in float32 all the same. 2: of softmax, too,
    maximum, exponentials, denominator and output are rounded to `dtype`, after every key."""

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("kv_dtype", self.kv_dtype)):
            if not (value is None and name == "kv_dtype") and not (isinstance(value, str) and value in DTYPES):
                raise SpecError(f"`{name}` must be one of {', '.join(DTYPES)}, got {show(value)}")
        level = self.precision_opt_level
        if type(level) is not int or level not in OPT_LEVELS:
            raise SpecError(f"`precision_opt_level` must be one of {', '.join(map(str, OPT_LEVELS))}, got {show(level)}")
        if level and self.stored is None:
            raise SpecError(
                f"`precision_opt_level` {level} hands sums on in the 16 bits of `dtype`, which is float32: "
                f"give `dtype` 'bfloat16', 'float16' or 'cb16', or level 0"
            )

    @property
    def stored(self) -> HalfType | None:
        """Format of activations where it has 16 bits."""
        return half_of(self.dtype)

    @property
    def sums(self) -> HalfType | None:
        """Format in which partial sums of matrix products are handed along a row of cores; None is float32."""
        return self.stored if self.precision_opt_level >= 1 else None

    @property
    def softmax(self) -> HalfType | None:
        """Format of the state of softmax; None is float32."""
        return self.stored if self.precision_opt_level >= 2 else None

    @property
    def kv(self) -> DType:
        """Format of keys and values."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    def __str__(self) -> str:
        formats = self.dtype if self.kv == self.dtype else f"{self.dtype}, keys and values {self.kv}"
        return f"{formats}, precision_opt_level {self.precision_opt_level}" if self.precision_opt_level else formats


FLOAT32: Final = Precision()

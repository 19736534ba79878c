"""FP8: matrices of numbers of eight bits (e4m3), a scale for every block of rows and columns; read as the numbers that they stand for.

A matrix ``X.weight`` (out, in) of type F8_E4M3 comes with ``X.weight_scale_inv`` (out / 128, in / 128), rounded up where blocks at the
edges are partial; scales are floating-point numbers, or exponents of type F8_E8M0. An element is its code's number times the scale of its
block, the product rounded to float32: what transformers makes of it where blocks divide the matrix. At partial edges blocks keep their size
here; transformers takes those of another size, or none.

References
----------
Micikevicius et al., "FP8 formats for deep learning", 2022, section 3 (e4m3: no infinities, a NaN for each sign). DeepSeek-AI, "DeepSeek-V3
technical report", 2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.mxfp4 import Codes
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import CheckpointError, ConfigError

_SCALES = "_scale_inv"
_STORED = "F8_E4M3"
_POWERS = "F8_E8M0"
"""Type of scales that are stored as exponents."""


def _numbers() -> NDArray[np.float32]:
    """The number that each code stands for: a sign, four bits of exponent with bias 7, three of mantissa."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), np.ldexp(1 + mantissa / 8.0, exponent - 7))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


NUMBERS = _numbers()
"""Code to number; 127 and 255 stand for none."""

POWERS = np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(np.float32)
"""Code of a scale of type F8_E8M0 to the power of two that it stands for; 255 stands for none."""


def fp8_block(config: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where a config.json says that matrices are stored in FP8; None where it does not.

    Raises
    ------
    ConfigError
        If it says so of another form of it.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    for name, values in (("fmt", ("e4m3",)), ("scale_fmt", ("float", "ue8m0")), ("expert_dtype", ("fp8",))):
        if quantization.get(name, values[0]) not in values:
            raise ConfigError(
                f"{where}: `quantization_config`: `{name}` must be {' or '.join(map(repr, values))}, got {show(quantization[name])}"
            )
    block = quantization.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 <= n <= 1 << 20 for n in block):
        raise ConfigError(f"{where}: `quantization_config`: `weight_block_size` must be two positive integers, got {show(block)}")
    return block[0], block[1]


def fp8_powers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that scales are powers of two."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("scale_fmt") == "ue8m0"


class Fp8Tensors:
    """Tensors of a source, matrices of codes and their scales as one matrix of their numbers; a `TensorSource`.

    Parameters
    ----------
    source : Codes
    block : tuple of int
        Rows and columns that share a scale.
    where : str
        What to call it in messages.
    powers : bool
        Whether every scale must be a power of two (``ue8m0``).

    Raises
    ------
    CheckpointError
        If scales are missing, or do not fit their matrix; on reading, if one is no power of two where it must be.
    """

    def __init__(self, source: Codes, block: tuple[int, int], where: str, *, powers: bool = False) -> None:
        self._source, self._block, self._where, self._powers = source, block, where, powers
        names = set(source.names())
        self._coded = {name for name in names if source.dtype(name) == _STORED}
        for name in sorted(self._coded):
            self._check(name, names)
        self._names = sorted(names - {name + _SCALES for name in self._coded})

    def _check(self, name: str, names: set[str]) -> None:
        shape = self._source.shape(name)
        if name + _SCALES not in names:
            raise CheckpointError(f"{self._where}: {name} is stored as {_STORED}, but its scales {name + _SCALES} are missing")
        scales = self._source.shape(name + _SCALES)
        expected = tuple(-(-n // b) for n, b in zip(shape, self._block, strict=False))
        if len(shape) != 2 or scales != expected:
            rule = f"one scale for every {self._block[0]} x {self._block[1]} elements of a matrix"
            raise CheckpointError(f"{self._where}: {name} has shape {shape} and scales of shape {scales}; {rule}")

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted; scales go with their matrix."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published."""
        return self._source.shape(name)

    def dtype(self, name: str) -> str:
        """Stored type; of a matrix in FP8 ``"float32"``, which its numbers are rounded to."""
        return "float32" if name in self._coded else self._source.dtype(name)

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes; of a matrix in FP8 those of its codes and of its scales."""
        return self._source.stored_bytes(name) + (self._source.stored_bytes(name + _SCALES) if name in self._coded else 0)

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""
        return self.read_rows(name, 0, self.shape(name)[0]) if name in self._coded else self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""
        return self.read_part(name, (slice(start, stop), slice(None))) if name in self._coded else self._source.read_rows(name, start, stop)

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only; of a matrix in FP8 two slices."""
        if name not in self._coded:
            return self._source.read_part(name, key)
        outs, ins = (np.arange(n)[k] for n, k in zip(self.shape(name), key, strict=True))
        scales = self._scales(name + _SCALES)[np.ix_(outs // self._block[0], ins // self._block[1])]
        if self._powers and (np.frexp(scales)[0] != 0.5).any():
            other = scales[np.frexp(scales)[0] != 0.5][0]
            raise CheckpointError(f"{self._where}: {name + _SCALES}: with `scale_fmt` 'ue8m0' scales are powers of two, got {other}")
        with np.errstate(all="ignore"):  # what is not finite is named by whoever asked
            values: NDArray[np.float32] = NUMBERS[self._source.read_codes(name, key)] * scales
        values.flags.writeable = False
        return values

    def _scales(self, name: str) -> NDArray[np.float32]:
        """All scales of a matrix."""
        if self._source.dtype(name) != _POWERS:
            return self._source.read(name)
        scales: NDArray[np.float32] = POWERS[self._source.read_codes(name, (slice(None), slice(None)))]
        return scales

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()

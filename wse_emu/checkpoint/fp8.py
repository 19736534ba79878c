"""FP8: matrices of numbers of eight bits (e4m3), a scale for every block of rows and columns; read as the numbers that they stand for.

A matrix ``X.weight`` (out, in) of type F8_E4M3 comes with ``X.weight_scale_inv`` (out / 128, in / 128), rounded up where blocks at the
edges are partial; scales are floating-point numbers, or exponents: of type F8_E8M0, or bytes (U8). Without blocks there is one scale for a
matrix. Of experts in one tensor, the last two axes are matrices. An element is its code's number times the scale of its block, the product
rounded to float32: what transformers makes of it where blocks divide the matrix. At partial edges blocks keep their size here, as in
transformers' products; its dequantisation takes blocks of another size, or none. The type of a stored tensor says whether it is in FP8:
what is stored in full is read as it is. Scales of activations (``activation_scale``) are not used: activations here are not in FP8.

References
----------
Micikevicius et al., "FP8 formats for deep learning", 2022, section 3 (e4m3: no infinities, a NaN for each sign). DeepSeek-AI, "DeepSeek-V3
technical report", 2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.fp8_config import Fp8Format
from wse_emu.checkpoint.mxfp4 import Codes
from wse_emu.foundation.errors import CheckpointError

_SCALES = "_scale_inv"
_ACTIVATION = "activation_scale"
_STORED = "F8_E4M3"
_NUMBERS = ("float32", "float16", "bfloat16")
"""Types of scales that are numbers."""
_POWERS = ("F8_E8M0", "U8")
"""Types of scales that are stored as exponents."""


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


class Fp8Tensors:
    """Tensors of a source, matrices of codes and their scales as one matrix of their numbers; a `TensorSource`.

    Parameters
    ----------
    source : Codes
    form : Fp8Format
    where : str
        What to call it in messages.

    Raises
    ------
    CheckpointError
        If scales are missing, or do not fit their matrix; if nothing is stored in FP8, or what config.json says is stored in full; on
        reading, if a scale is no power of two where it must be.
    """

    def __init__(self, source: Codes, form: Fp8Format, where: str) -> None:
        self._source, self._form, self._where = source, form, where
        names = set(source.names())
        self._coded = {name for name in names if source.dtype(name) == _STORED}
        if not self._coded:
            rule = "config.json says that matrices are stored in FP8, but none is"
            raise CheckpointError(f"{where}: {rule}; if they are stored in full, take out `quantization_config`")
        for name in sorted(self._coded):
            self._check(name, names)
        stems = {name.removesuffix("weight") if name.endswith(".weight") else name + "_" for name in self._coded}
        self.left_out = tuple(sorted(names & {stem + _ACTIVATION for stem in stems}))
        """Scales of activations, which are not used."""
        self._names = sorted(names - {name + _SCALES for name in self._coded} - set(self.left_out))

    def _check(self, name: str, names: set[str]) -> None:
        shape = self._source.shape(name)
        if name.removesuffix(".weight") in self._form.kept:
            rule = "but by config.json (`modules_to_not_convert`) it is stored in full"
            raise CheckpointError(f"{self._where}: {name} is stored as {_STORED}, {rule}; one of the two is wrong")
        if name + _SCALES not in names:
            raise CheckpointError(f"{self._where}: {name} is stored as {_STORED}, but its scales {name + _SCALES} are missing")
        scales = self._source.shape(name + _SCALES)
        stored = self._source.dtype(name + _SCALES)
        if stored not in (*_NUMBERS, *_POWERS):
            raise CheckpointError(f"{self._where}: {name + _SCALES} is stored as {stored}; readable are {', '.join((*_NUMBERS, *_POWERS))}")
        block = self._form.block
        if len(shape) < 2 or scales not in self._grids(shape):
            rule = "one scale for every matrix" if block is None else f"one scale for every {block[0]} x {block[1]} elements of a matrix"
            raise CheckpointError(f"{self._where}: {name} has shape {shape} and scales of shape {scales}; {rule}")

    def _grids(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that the scales of a matrix of that shape may have."""
        if self._form.block is None:
            return ((*shape[:-2], 1, 1), shape[:-2], *([(1,)] if len(shape) == 2 else []))
        return ((*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], self._form.block, strict=True))),)

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
        if name not in self._coded:
            return self._source.read_rows(name, start, stop)
        return self.read_part(name, (slice(start, stop), *[slice(None)] * (len(self.shape(name)) - 1)))

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only; of a matrix in FP8 two slices, behind what selects among matrices."""
        if name not in self._coded:
            return self._source.read_part(name, key)
        shape = self.shape(name)
        outs, ins = (np.arange(n)[k] // b for n, k, b in zip(shape[-2:], key[-2:], self._form.block or shape[-2:], strict=True))
        scales = self._scales(name, key[:-2])[..., outs[:, None], ins]
        if self._form.powers and (np.frexp(scales)[0] != 0.5).any():
            other = scales[np.frexp(scales)[0] != 0.5][0]
            raise CheckpointError(f"{self._where}: {name + _SCALES}: with `scale_fmt` 'ue8m0' scales are powers of two, got {other}")
        with np.errstate(all="ignore"):  # what is not finite is named by whoever asked
            values: NDArray[np.float32] = NUMBERS[self._source.read_codes(name, key)] * scales
        values.flags.writeable = False
        return values

    def _scales(self, name: str, lead: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """All scales of the matrices that `lead` selects, on two axes behind the others."""
        scales, shape = name + _SCALES, self._source.shape(name + _SCALES)
        of_matrices = len(shape) < len(self.shape(name))  # one for each
        key = (slice(None),) * len(shape) if of_matrices else (*lead, slice(None), slice(None))
        if self._source.dtype(scales) in _POWERS:
            found: NDArray[np.float32] = POWERS[self._source.read_codes(scales, key)]
        else:
            found = self._source.read(scales) if of_matrices else self._source.read_part(scales, key)
        return found.reshape(*self.shape(name)[:-2], 1, 1)[lead] if of_matrices else found

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()

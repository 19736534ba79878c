"""MXFP4: 32 numbers of four bits share a power of two; read as the numbers that they stand for.

A matrix ``X`` of every expert, (experts, in, out), is published as ``X_blocks`` (experts, out, in / 32, 16) and ``X_scales`` (experts, out,
in / 32), bytes. Byte j of a block holds elements 2 j (low half) and 2 j + 1; a scale s stands for ``2**(s - 127)``.

References
----------
Open Compute Project, "OCP Microscaling formats (MX) specification", version 1.0, 2023, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.source import TensorSource
from wse_emu.foundation.errors import CheckpointError

BLOCK = 32
"""Numbers that share a scale."""
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_NOT_A_NUMBER = 255
"""The scale that stands for none."""
_SUFFIXES = ("_blocks", "_scales")


class Codes(TensorSource, Protocol):
    """A source that also gives bytes as they are."""

    def read_codes(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.uint8]:
        """Elements that `key` selects of a tensor of bytes."""


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that experts are stored in MXFP4."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Numbers of blocks (..., 16) with scales (...): (..., 32) float32, exactly; infinite beyond the largest."""
    codes = np.stack([blocks & 0x0F, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    with np.errstate(over="ignore"):
        values: NDArray[np.float32] = np.ldexp(_VALUES[codes], scales.astype(np.int32)[..., None] - 127)
    return values


class Mxfp4Tensors:
    """Tensors of a source, pairs of blocks and scales as one matrix of their numbers; a `TensorSource`.

    Parameters
    ----------
    source : Codes
    where : str
        What to call it in messages.

    Raises
    ------
    CheckpointError
        If blocks come without scales or the reverse, or do not fit each other.
    """

    def __init__(self, source: Codes, where: str) -> None:
        self._source, self._where = source, where
        names = set(source.names())
        stems = {n.removesuffix(suffix) for n in names for suffix in _SUFFIXES if n.endswith(suffix)}
        for stem in sorted(stems):
            for there, other in (_SUFFIXES, _SUFFIXES[::-1]):
                if stem + other not in names:
                    raise CheckpointError(f"{where}: {stem}{there} is there, but {stem}{other} is missing; MXFP4 is a pair of both")
        self._shapes = {stem: self._shape_of(stem) for stem in sorted(stems)}
        self._names = sorted((names - {stem + suffix for stem in self._shapes for suffix in _SUFFIXES}) | set(self._shapes))

    def _shape_of(self, stem: str) -> tuple[int, ...]:
        blocks, scales = (self._source.shape(stem + suffix) for suffix in _SUFFIXES)
        for suffix in _SUFFIXES:
            if self._source.dtype(stem + suffix) != "U8":
                raise CheckpointError(f"{self._where}: {stem}{suffix} is stored as {self._source.dtype(stem + suffix)}; MXFP4 is bytes, U8")
        if len(blocks) != 4 or blocks[-1] != BLOCK // 2 or scales != blocks[:-1]:
            rule = f"blocks must have shape (experts, out, in / 32, {BLOCK // 2}), scales the same without the last axis"
            raise CheckpointError(f"{self._where}: {stem}: {rule}, got {blocks} and {scales}")
        return blocks[0], blocks[2] * BLOCK, blocks[1]

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted; a pair goes by its common name."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape; of a pair (experts, in, out)."""
        return self._shapes[name] if name in self._shapes else self._source.shape(name)

    def dtype(self, name: str) -> str:
        """Stored type; of a pair ``"bfloat16"``, which holds its numbers exactly."""
        return "bfloat16" if name in self._shapes else self._source.dtype(name)

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes; of a pair those of its blocks and of its scales."""
        parts = [name + suffix for suffix in _SUFFIXES] if name in self._shapes else [name]
        return sum(map(self._source.stored_bytes, parts))

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""
        return self.read_rows(name, 0, self._shapes[name][0]) if name in self._shapes else self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""
        if name not in self._shapes:
            return self._source.read_rows(name, start, stop)
        everything = (slice(None), slice(None))
        out = np.empty((stop - start, *self._shapes[name][1:]), np.float32)
        for expert in range(start, stop):
            out[expert - start] = self.read_part(name, (expert, *everything))
        out.flags.writeable = False
        return out

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only; of a pair (expert, in, out), of which only those outputs are read."""
        if name not in self._shapes:
            return self._source.read_part(name, key)
        expert, ins, outs = key
        blocks, scales = (self._source.read_codes(name + suffix, (expert, outs)) for suffix in _SUFFIXES)
        if (scales == _NOT_A_NUMBER).any():
            out, group = (int(i[0]) for i in np.nonzero(scales == _NOT_A_NUMBER))
            where = f"{self._where}: {name}_scales[{expert}]"
            raise CheckpointError(f"{where}: output {out} of those read, block {group}: 255 stands for no number; it is damaged")
        values = decode(blocks, scales)
        part: NDArray[np.float32] = values.reshape(len(values), -1)[:, ins].T
        part.flags.writeable = False
        return part

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()

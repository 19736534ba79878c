"""Checkpoints with random weights, made tensor by tensor on demand: the same config and seed give the same bits in any order of reading."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.config import parse_config, to_config
from wse_emu.checkpoint.names import published_tensors, stored_shapes
from wse_emu.checkpoint.source import Checkpoint
from wse_emu.foundation.arguments import MAX_SEED, show
from wse_emu.foundation.errors import CheckpointError, ConfigError
from wse_emu.foundation.model_spec import ModelSpec

_BLOCK_ELEMENTS = 1 << 15


class RandomTensors:
    """Tensors drawn from seeded normal distributions; a `TensorSource` that holds no data.

    A matrix is ``initializer_range * normal``, a norm's weight ``1 + 0.1 * normal`` (about 0 where it means ``1 + w``), a bias ``0.1 *
    normal``, so that no weight equals its usual default.
    Block ``b`` of the rows of tensor ``n`` comes from a generator of its own, keyed by (seed, n, b).
    """

    def __init__(self, spec: ModelSpec, seed: int, initializer_range: float) -> None:
        self._shapes = stored_shapes(spec)
        self._middle = {t.name: _middle(spec, role) for role, t in published_tensors(spec) if len(t.shape) == 1}
        self._seed = seed
        self._scale = np.float32(initializer_range)
        key = json.dumps([sorted(self._shapes.items()), seed, initializer_range])
        self._fingerprint = "random-" + hashlib.sha256(key.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Text that changes with the seed, the shapes and the scale."""
        return self._fingerprint

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published; matrices are (out, in)."""
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"random weights: there is no tensor {name!r}") from None

    def dtype(self, name: str) -> str:
        """Stored type, always ``"float32"``."""
        self.shape(name)
        return "float32"

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return 4 * math.prod(self.shape(name))

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""
        shape = self.shape(name)
        if not 0 <= start <= stop <= shape[0]:
            raise CheckpointError(f"random weights: {name} has {shape[0]} rows, {start}:{stop} asked")
        below = math.prod(shape[1:-1])
        return self._rows(name, start * below, stop * below).reshape(stop - start, *shape[1:])

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only."""
        first, *rest = key
        if isinstance(first, int) and len(rest) == 1:  # one row of a matrix
            part: NDArray[np.float32] = self.read_rows(name, first, first + 1)[0][rest[0]]
        elif isinstance(first, int) and isinstance(rest[0], slice):  # one expert's rows, out of all experts'
            rows = range(self.shape(name)[1])[rest[0]]
            base = first * self.shape(name)[1]
            part = self._rows(name, base + rows.start, base + rows.stop)[:: rows.step, *rest[1:]]
        else:
            assert isinstance(first, slice)
            rows = range(self.shape(name)[0])[first]
            part = self.read_rows(name, rows.start, rows.stop)[:: rows.step, *rest]
        return part

    def _rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` with all axes but the last taken as one; of a vector, its elements."""
        shape = self.shape(name)
        ends = shape[-1:] if len(shape) > 1 else ()
        n_rows = math.prod(shape) // math.prod(ends)
        out = np.empty((stop - start, *ends), dtype=np.float32)
        rows = max(1, _BLOCK_ELEMENTS // math.prod(ends))
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
        for block in range(start // rows, -(-stop // rows)):
            first, last = block * rows, min((block + 1) * rows, n_rows)
            values = np.random.default_rng([self._seed, *words, block]).standard_normal((last - first, *ends), dtype=np.float32)
            if name in self._middle:
                values *= np.float32(0.1)
                values += self._middle[name]
            else:
                values *= self._scale
            a, b = max(first, start), min(last, stop)
            out[a - start : b - start] = values[a - first : b - first]
        out.flags.writeable = False
        return out

    def close(self) -> None:
        """Nothing is held."""


def _middle(spec: ModelSpec, role: str) -> np.float32:
    """What a vector's elements lie about."""
    is_norm = role.endswith("norm")
    return np.float32(1.0 if is_norm and not spec.norm.unit_offset else 0.0)


def random_checkpoint(
    config: Mapping[str, Any] | ModelSpec, seed: int = 0, change: Callable[[ModelSpec], ModelSpec] | None = None
) -> Checkpoint:
    """Checkpoint with random weights, made on demand and never stored.

    Parameters
    ----------
    config : mapping or ModelSpec
        config.json as parsed, or a spec. ``initializer_range`` of a mapping (default 0.02) scales the matrices.
    seed : int
        From 0 to 2**128 - 1; equal seeds and configs give equal bits (under one NumPy version).
    change : callable, optional
        Makes another model of the one that `config` describes.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ConfigError
        If `parse_config` refuses the config, or seed or ``initializer_range`` are out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < MAX_SEED:
        raise ConfigError(f"`seed` must be an integer in 0..2**128 - 1, got {show(seed)}")
    if not isinstance(config, Mapping | ModelSpec):
        raise ConfigError(f"config: must be a mapping (what config.json holds) or a ModelSpec, got {show(config)}")
    given = to_config(config) if isinstance(config, ModelSpec) else dict(config)
    spec = config if isinstance(config, ModelSpec) else parse_config(given, where="config")
    spec = spec if change is None else change(spec)
    scale = given.get("initializer_range", 0.02)
    if type(scale) not in (int, float) or not 0 < scale <= 1:
        raise ConfigError(f"config: `initializer_range` must lie in (0, 1], got {show(scale)}")
    tensors = RandomTensors(spec, int(seed), float(scale))
    key = json.dumps([tensors.fingerprint, repr(spec)])
    return Checkpoint(
        name=f"random weights (seed {int(seed)})",
        spec=spec,
        config=given,
        tensors=tensors,
        fingerprint="random-" + hashlib.sha256(key.encode()).hexdigest(),
    )

"""What MemoryX offers the engine, and the stores that need no file: arrays in memory, and shapes without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint import Checkpoint
from wse_emu.foundation.errors import InputError, StoreError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import WeightShape, all_weights
from wse_emu.memoryx.layout import Layout


class WeightStore(Protocol):
    """Weights at rest, in the wafer layout of `wse_emu.foundation.weights`; every array is float32 and read-only."""

    @property
    def spec(self) -> ModelSpec:
        """The model whose weights these are."""

    @property
    def name(self) -> str:
        """What to call the store in messages."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """Norm weight (n,). Raises `StoreError` for an unknown name and for a store that is closed or holds no values."""

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Matrix in its flat tiled form (n_in * n_out,). Raises as `vector` does."""

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden). Raises `InputError` for an id outside the vocabulary."""

    def prepare(self, names: Sequence[str]) -> None:
        """Make tensors resident, waiting until they are; may run in another thread."""

    def drop(self, names: Sequence[str]) -> None:
        """Let go of resident pages; the tensors may be asked for again."""

    def close(self) -> None:
        """Let go of everything; arrays handed out stay valid. May be called twice."""


class Tensors:
    """Prebuilt arrays by name: what the stores with values share."""

    def __init__(self, name: str, embed: NDArray[np.float32], arrays: dict[str, NDArray[np.float32]], matrices: frozenset[str]) -> None:
        self._name = name
        self._embed: NDArray[np.float32] | None = embed
        self._matrices = {n: a for n, a in arrays.items() if n in matrices}
        self._vectors = {n: a for n, a in arrays.items() if n not in matrices}

    def vector(self, name: str) -> NDArray[np.float32]:
        """Norm weight (n,), read-only."""
        try:
            return self._vectors[name]
        except KeyError:
            self._unknown(name, "vector")

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Flat tiled matrix, read-only."""
        try:
            return self._matrices[name]
        except KeyError:
            self._unknown(name, "tiled matrix")

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden)."""
        if self._embed is None:
            self._unknown("embed", "embedding")
        check_ids(ids, len(self._embed))
        return self._embed[ids]

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `StoreError` for a name that is neither a vector nor a matrix."""
        for name in names:
            if name not in self._vectors and name not in self._matrices:
                self._unknown(name, "vector or tiled matrix")

    def clear(self) -> None:
        """Forget every array."""
        self._embed = None
        self._vectors, self._matrices = {}, {}

    def _unknown(self, name: str, kind: str) -> NoReturn:
        if self._embed is None:
            raise StoreError(f"{self._name}: `{name}` was asked for after the store was closed")
        raise StoreError(f"{self._name}: there is no {kind} `{name}`")


def check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise `InputError` unless `ids` is one-dimensional, integer and inside the vocabulary."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"token ids must be a one-dimensional integer array, got {ids.dtype} of shape {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"token id {bad} lies outside the vocabulary, 0..{vocab_size - 1}")


def _names_of(weights: Sequence[WeightShape]) -> frozenset[str]:
    return frozenset(w.name for w in weights if len(w.shape) == 2)


class ArrayStore:
    """Weights in memory; made from a checkpoint, of which no file is needed afterwards.

    Parameters
    ----------
    checkpoint : Checkpoint
        Read once, tensor by tensor.

    Raises
    ------
    CheckpointError
        If a weight is not finite.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec = checkpoint.spec
        self.name = checkpoint.name
        layout = Layout(checkpoint.tensors, checkpoint.spec, checkpoint.name)
        weights = list(all_weights(checkpoint.spec))
        arrays: dict[str, NDArray[np.float32]] = {}
        for weight in weights:
            flat = np.empty(weight.size, dtype=np.float32)
            at = 0
            for chunk in layout.chunks(weight):
                flat[at : at + chunk.size] = chunk
                at += chunk.size
            flat.flags.writeable = False
            arrays[weight.name] = flat
        embed = arrays.pop("embed").reshape(self.spec.vocab_size, self.spec.hidden_size)
        self._tensors = Tensors(self.name, embed, arrays, _names_of(weights))

    def vector(self, name: str) -> NDArray[np.float32]:
        """Norm weight (n,), read-only."""
        return self._tensors.vector(name)

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Flat tiled matrix (n_in * n_out,), read-only."""
        return self._tensors.tiles(name)

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden)."""
        return self._tensors.embed(ids)

    def prepare(self, names: Sequence[str]) -> None:
        """Check the names; everything is resident."""
        self._tensors.check_names(names)

    def drop(self, names: Sequence[str]) -> None:
        """Check the names; memory has nowhere to forget to."""
        self._tensors.check_names(names)

    def close(self) -> None:
        """Let go of the arrays."""
        self._tensors.clear()


class ShapeStore:
    """A store without values, for runs that compute nothing (dry runs, plans)."""

    def __init__(self, spec: ModelSpec, name: str = "a model without weights") -> None:
        self.spec = spec
        self.name = name
        self._names = frozenset(w.name for w in all_weights(spec)) - {"embed"}

    def vector(self, name: str) -> NDArray[np.float32]:
        """Raise `StoreError`: there are no values."""
        self._no_values(name)

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Raise `StoreError`: there are no values."""
        self._no_values(name)

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raise `StoreError`: there are no values."""
        self._no_values("embed")

    def prepare(self, names: Sequence[str]) -> None:
        """Check the names."""
        self.drop(names)

    def drop(self, names: Sequence[str]) -> None:
        """Check the names."""
        for name in names:
            if name not in self._names:
                raise StoreError(f"{self.name}: there is no vector or tiled matrix `{name}`")

    def close(self) -> None:
        """Nothing is held."""

    def _no_values(self, name: str) -> NoReturn:
        raise StoreError(f"{self.name}: `{name}` has a shape but no values here; only the dry executor runs without weights")

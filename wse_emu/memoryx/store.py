"""What MemoryX offers the engine, and the stores that need no file: arrays in memory, and shapes without values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint import Checkpoint
from wse_emu.foundation.errors import InputError, StoreError
from wse_emu.foundation.forks import note_forks
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
        """Matrix, or one for each head, in flat tiled form (n_in * n_out,). Raises as `vector` does."""

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden). Raises `InputError` for an id outside the vocabulary."""

    def prepare(self, names: Sequence[str]) -> None:
        """Make tensors resident, waiting until they are; may run in another thread."""

    def is_ready(self, names: Sequence[str]) -> bool:
        """Whether `prepare` would have nothing to do for tensors that nobody uses now."""

    def drop(self, names: Sequence[str]) -> None:
        """Let go of resident pages; the tensors may be asked for again."""

    def check_readable(self) -> None:
        """Raise `StoreError` if arrays that were handed out cannot be read to their end any more."""

    def close(self) -> None:
        """Let go of everything; arrays handed out stay valid. May be called twice."""


class Tensors:
    """Arrays by name, each made when it is first asked for and then kept: what the stores with values share.

    Parameters
    ----------
    name : str
        What to call the store in messages.
    spec : ModelSpec
    make : callable
        Takes a tensor of the wafer layout and returns it flat, read-only; called once for each, by one thread at a time.
    """

    def __init__(self, name: str, spec: ModelSpec, make: Callable[[WeightShape], NDArray[np.float32]]) -> None:
        self._name = name
        self._weights = {w.name: w for w in all_weights(spec)}
        self._embed_shape = self._weights["embed"].shape
        self._streamed = frozenset(self._weights) - {"embed"}
        self._make: Callable[[WeightShape], NDArray[np.float32]] | None = make
        self._made: dict[str, NDArray[np.float32]] = {}
        self.after_fork()
        note_forks(self)

    def after_fork(self) -> None:
        """Begin with a free lock: no thread that may have held it came along, and what it guards is whole at any moment."""
        self._lock = threading.Lock()

    def vector(self, name: str) -> NDArray[np.float32]:
        """Norm weight (n,), read-only."""
        return self._array(self._weight(name, "vector", (1,)))

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Flat tiled matrix, read-only."""
        return self._array(self._weight(name, "tiled matrix", (2, 3)))

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden)."""
        if self._make is None:
            self._unknown("embed", "embedding")
        check_ids(ids, self._embed_shape[0])
        return self._array(self._weights["embed"]).reshape(self._embed_shape)[ids]

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `StoreError` for a name that is neither a vector nor a matrix."""
        if self._make is not None and self._streamed.issuperset(names):
            return
        for name in names:
            self._weight(name, "vector or tiled matrix", (1, 2, 3))

    def make(self, names: Sequence[str]) -> None:
        """Make what is not there yet."""
        for name in names:
            self._array(self._weight(name, "vector or tiled matrix", (1, 2, 3)))

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of them were made."""
        return all(name in self._made for name in names)

    def clear(self) -> None:
        """Forget every array."""
        self._make = None
        self._made = {}

    def _weight(self, name: str, kind: str, n_axes: tuple[int, ...]) -> WeightShape:
        weight = self._weights.get(name)
        if self._make is None or weight is None or name == "embed" or len(weight.shape) not in n_axes:
            self._unknown(name, kind)
        return weight

    def _array(self, weight: WeightShape) -> NDArray[np.float32]:
        array = self._made.get(weight.name)
        if array is not None:
            return array
        with self._lock:
            if self._make is None:
                self._unknown(weight.name, "tensor")
            if weight.name not in self._made:
                self._made[weight.name] = self._make(weight)
            return self._made[weight.name]

    def _unknown(self, name: str, kind: str) -> NoReturn:
        if self._make is None:
            raise StoreError(f"{self._name}: `{name}` was asked for after the store was closed")
        raise StoreError(f"{self._name}: there is no {kind} `{name}`")


def check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise `InputError` unless `ids` is one-dimensional, integer and inside the vocabulary."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"token ids must be a one-dimensional integer array, got {ids.dtype} of shape {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"token id {bad} lies outside the vocabulary, 0..{vocab_size - 1}")


class ArrayStore:
    """Weights in memory, each made from the checkpoint when it is first needed: a model that is not run takes none.

    Parameters
    ----------
    checkpoint : Checkpoint
        Read tensor by tensor; stays in use until every weight was made.

    Raises
    ------
    CheckpointError
        From `prepare` and from whatever asks for a weight, if it is not finite.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec = checkpoint.spec
        self.name = checkpoint.name
        self._layout = Layout(checkpoint.tensors, checkpoint.spec, checkpoint.name)
        self._tensors = Tensors(self.name, self.spec, self._make)

    def _make(self, weight: WeightShape) -> NDArray[np.float32]:
        flat = np.empty(weight.size, dtype=np.float32)
        at = 0
        for chunk in self._layout.chunks(weight):
            flat[at : at + chunk.size] = chunk
            at += chunk.size
        flat.flags.writeable = False
        return flat

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
        """Make the tensors, unless they are there."""
        self._tensors.make(names)

    def is_ready(self, names: Sequence[str]) -> bool:
        """Whether they were made."""
        return self._tensors.has(names)

    def drop(self, names: Sequence[str]) -> None:
        """Check the names; memory has nowhere to forget to."""
        self._tensors.check_names(names)

    def check_readable(self) -> None:
        """Memory stays."""

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

    def is_ready(self, names: Sequence[str]) -> bool:
        """Always: there is nothing to wait for."""
        return True

    def drop(self, names: Sequence[str]) -> None:
        """Check the names."""
        for name in names:
            if name not in self._names:
                raise StoreError(f"{self.name}: there is no vector or tiled matrix `{name}`")

    def check_readable(self) -> None:
        """There is nothing to read."""

    def close(self) -> None:
        """Nothing is held."""

    def _no_values(self, name: str) -> NoReturn:
        raise StoreError(f"{self.name}: `{name}` has a shape but no values here; only the dry executor runs without weights")

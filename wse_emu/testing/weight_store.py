"""What every weight store must do, as a pytest class."""

# ruff: noqa: D102 - the names of the tests tell the rule

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wse_emu.checkpoint import Checkpoint, published_names, random_checkpoint
from wse_emu.foundation.errors import InputError, StoreError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import TILE_COLS, WeightShape, all_weights, layer_weights
from wse_emu.memoryx import LayerStream, WeightStore

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 20,
    "intermediate_size": 67,
    "num_layers": 2,
    "num_heads": 12,
    "num_kv_heads": 4,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
}
"""Sizes of which none divides a tile, so that narrow last tiles and tiles across heads occur in every matrix."""


def contract_specs() -> dict[str, ModelSpec]:
    """Models that the contract uses: a mixture of experts, and a dense one with a tied head and one query head per key head."""
    dense = {**_SIZES, "num_heads": 4, "tie_word_embeddings": True}
    return {
        "mixtral": ModelSpec(family="mixtral", num_experts=3, top_k=2, moe_intermediate_size=_SIZES["intermediate_size"], **_SIZES),  # type: ignore[arg-type]
        "llama-tied": ModelSpec(family="llama", **dense),  # type: ignore[arg-type]
    }


class WeightStoreContract(ABC):
    """Derive a class, say how to open the store, and pytest runs the contract.

    Attributes
    ----------
    holds_values : bool
        False for a store of shapes only: asking it for values must raise `StoreError`, all else holds.

    Examples
    --------
    >>> class TestArrayStore(WeightStoreContract):
    ...     def open(self, checkpoint, directory):
    ...         return ArrayStore(checkpoint)
    """

    holds_values = True

    @abstractmethod
    def open(self, checkpoint: Checkpoint, directory: Path) -> WeightStore:
        """Return a store of the checkpoint's weights; `directory` is empty and the store's own."""

    @pytest.fixture(params=list(contract_specs()))
    def checkpoint(self, request: pytest.FixtureRequest) -> Checkpoint:
        """Random weights of one of the contract's models."""
        return random_checkpoint(contract_specs()[request.param], seed=7)

    @pytest.fixture
    def store(self, checkpoint: Checkpoint, tmp_path: Path) -> Iterator[WeightStore]:
        """The store under test, closed afterwards."""
        store = self.open(checkpoint, tmp_path)
        yield store
        store.close()

    def test_spec_is_the_checkpoints(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        assert store.spec == checkpoint.spec
        assert isinstance(store.name, str)
        assert store.name

    def test_vectors_are_published_vectors(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        published = published_names(checkpoint.spec)
        for weight in all_weights(checkpoint.spec):
            if len(weight.shape) != 1:
                continue
            if not self.holds_values:
                with pytest.raises(StoreError, match=re.escape(weight.name)):
                    store.vector(weight.name)
                continue
            value = store.vector(weight.name)
            _check_array(value, weight)
            np.testing.assert_array_equal(value, checkpoint.tensors.read(published[weight.name].name))

    def test_tiles_hold_the_wafer_layout(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        for weight in all_weights(checkpoint.spec):
            if len(weight.shape) != 2 or weight.name == "embed":
                continue
            if not self.holds_values:
                with pytest.raises(StoreError, match=re.escape(weight.name)):
                    store.tiles(weight.name)
                continue
            flat = store.tiles(weight.name)
            _check_array(flat, weight)
            n_in, n_out = weight.shape
            expected = layout_matrix(checkpoint, weight.name)
            for start in range(0, n_out, TILE_COLS):
                width = min(TILE_COLS, n_out - start)
                tile = flat[start * n_in : (start + width) * n_in].reshape(n_in, width)
                np.testing.assert_array_equal(tile, expected[:, start : start + width], err_msg=f"{weight.name}, tile at {start}")

    def test_embed_returns_rows_in_the_order_asked_as_a_copy(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        ids = np.array([5, 0, checkpoint.spec.vocab_size - 1, 5], dtype=np.int64)
        if not self.holds_values:
            with pytest.raises(StoreError, match="embed"):
                store.embed(ids)
            return
        rows = store.embed(ids)
        table = checkpoint.tensors.read(published_names(checkpoint.spec)["embed"].name)
        np.testing.assert_array_equal(rows, table[ids])
        assert rows.dtype == np.float32
        assert rows.flags.writeable
        rows[...] = 0
        np.testing.assert_array_equal(store.embed(ids), table[ids])
        assert store.embed(ids[:0]).shape == (0, checkpoint.spec.hidden_size)

    @pytest.mark.parametrize("bad", [-1, 131, 1 << 40])
    def test_id_outside_the_vocabulary_raises(self, store: WeightStore, bad: int) -> None:
        if self.holds_values:
            with pytest.raises(InputError, match=f"token id {bad} "):
                store.embed(np.array([0, bad], dtype=np.int64))

    def test_unknown_names_raise(self, store: WeightStore) -> None:
        for call in (store.vector, store.tiles, lambda n: store.prepare([n]), lambda n: store.drop([n])):
            with pytest.raises(StoreError, match=r"layers\.99\.w_o"):
                call("layers.99.w_o")

    def test_a_matrix_is_not_a_vector_and_a_vector_is_not_tiled(self, store: WeightStore) -> None:
        with pytest.raises(StoreError, match="w_o"):
            store.vector("layers.0.w_o")
        with pytest.raises(StoreError, match="attn_norm"):
            store.tiles("layers.0.attn_norm")

    def test_lookup_gives_the_same_array_each_time(self, store: WeightStore) -> None:
        if self.holds_values:
            assert store.tiles("layers.0.w_o") is store.tiles("layers.0.w_o")
            assert store.vector("final_norm") is store.vector("final_norm")

    def test_dropping_a_layer_loses_nothing(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        names = [w.name for w in layer_weights(checkpoint.spec, 1)]
        before = self._snapshot(store, checkpoint.spec)
        for _ in range(3):
            store.prepare(names)
            store.drop(names)
        store.drop(names[::-1])
        store.prepare([])
        assert store.is_ready([])
        _assert_equal(self._snapshot(store, checkpoint.spec), before)

    def test_streaming_every_layer_changes_no_value(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        spec = checkpoint.spec
        before = self._snapshot(store, spec)
        layers = [[w.name for w in layer_weights(spec, n)] for n in range(spec.num_layers)]
        for depth in (0, 1, 2):
            with LayerStream(store, depth=depth) as stream:
                for n, names in enumerate(layers * 2):
                    with stream.layer(names, then=layers[(n + 1) % len(layers)]):
                        pass
        _assert_equal(self._snapshot(store, spec), before)

    def test_prepare_and_drop_from_another_thread(self, store: WeightStore, checkpoint: Checkpoint) -> None:
        names = [w.name for w in layer_weights(checkpoint.spec, 0)]
        before = self._snapshot(store, checkpoint.spec)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(20):
                    store.prepare(names)
                    store.drop(names)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            _assert_equal(self._snapshot(store, checkpoint.spec), before)
        for thread in threads:
            thread.join()
        assert not errors

    def test_arrays_outlive_the_store(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        store = self.open(checkpoint, tmp_path)
        if self.holds_values:
            value = store.vector("final_norm")
            copy = value.copy()
            store.close()
            np.testing.assert_array_equal(value, copy)
        else:
            store.close()
        store.close()
        with pytest.raises(StoreError):
            store.vector("final_norm")
        with pytest.raises(StoreError):
            store.embed(np.zeros(1, dtype=np.int64))

    def _snapshot(self, store: WeightStore, spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
        if not self.holds_values:
            return {}
        out = {"embed": store.embed(np.arange(spec.vocab_size))}
        for weight in all_weights(spec):
            if weight.name != "embed":
                out[weight.name] = (store.vector if len(weight.shape) == 1 else store.tiles)(weight.name).copy()
        return out


def layout_matrix(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Matrix (n_in, n_out) of the wafer layout, written element by element from the definition; slow, shares nothing with a store.

    Parameters
    ----------
    checkpoint : Checkpoint
    name : str
        Canonical name of a matrix of the wafer layout.

    Returns
    -------
    ndarray, (n_in, n_out), float32
    """
    spec = checkpoint.spec
    published = published_names(spec)
    prefix, _, kind = name.rpartition(".")

    def read(role: str) -> NDArray[np.float32]:
        return checkpoint.tensors.read(published[f"{prefix}.{role}" if prefix else role].name)

    d, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    if kind == "w_qkv":
        query, key, value = read("w_q"), read("w_k"), read("w_v")
        out = np.full((spec.hidden_size, (spec.num_heads + 2 * spec.num_kv_heads) * d), np.nan, dtype=np.float32)
        for g in range(spec.num_kv_heads):
            for u in range(d // 2):
                for e in range(2):
                    base = (g * (d // 2) + u) * (group + 2)
                    for s in range(group):
                        out[:, (base + s) * 2 + e] = query[(g * group + s) * d + u + e * (d // 2)]
                    out[:, (base + group) * 2 + e] = key[g * d + u + e * (d // 2)]
                    out[:, (base + group + 1) * 2 + e] = value[g * d + u + e * (d // 2)]
        return out
    if kind == "w_o":
        transposed = read("w_o").T
        out = np.full_like(transposed, np.nan)
        for g in range(spec.num_kv_heads):
            for u in range(d // 2):
                for s in range(group):
                    for e in range(2):
                        out[((g * (d // 2) + u) * group + s) * 2 + e] = transposed[(g * group + s) * d + u + e * (d // 2)]
        return out
    if kind == "w_gate_up":
        out = np.full((spec.hidden_size, 2 * spec.intermediate_size), np.nan, dtype=np.float32)
        out[:, 0::2] = read("w_gate").T
        out[:, 1::2] = read("w_up").T
        return out
    return read(kind).T


def _check_array(array: NDArray[np.float32], weight: WeightShape) -> None:
    assert array.dtype == np.float32
    assert array.shape == (weight.size,)
    assert array.flags.c_contiguous
    assert array.flags.aligned
    assert not array.flags.writeable


def _assert_equal(actual: dict[str, NDArray[np.float32]], expected: dict[str, NDArray[np.float32]]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)

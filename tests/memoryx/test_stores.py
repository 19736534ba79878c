"""Every store runs the same contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wse_emu.checkpoint import Checkpoint, TensorSource
from wse_emu.foundation.errors import StoreError
from wse_emu.memoryx import ArrayStore, MappedStore, ShapeStore, WeightStore, open_store
from wse_emu.testing import WeightStoreContract


class TestArrayStore(WeightStoreContract):
    def open(self, checkpoint: Checkpoint, directory: Path) -> WeightStore:
        return ArrayStore(checkpoint)

    def test_only_what_was_asked_for_is_made(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        plain = type(checkpoint.tensors).read_rows

        def read_rows(self: TensorSource, name: str, start: int, stop: int) -> NDArray[np.float32]:
            read.append(name)
            return plain(self, name, start, stop)

        monkeypatch.setattr(type(checkpoint.tensors), "read_rows", read_rows)
        store = ArrayStore(checkpoint)
        store.drop(["layers.1.w_o"])
        assert not read
        store.prepare(["layers.1.w_o", "final_norm"])
        assert set(read) == {"model.layers.1.self_attn.o_proj.weight", "model.norm.weight"}
        n = len(read)
        store.prepare(["layers.1.w_o"])
        store.tiles("layers.1.w_o")
        assert len(read) == n


class TestMappedStore(WeightStoreContract):
    def open(self, checkpoint: Checkpoint, directory: Path) -> WeightStore:
        return open_store(checkpoint, cache_dir=directory)

    def test_every_tensor_starts_at_a_page(self, store: MappedStore) -> None:
        for name in ("layers.0.attn_norm", "layers.0.w_qkv", "lm_head"):
            array = store.vector(name) if name.endswith("norm") else store.tiles(name)
            assert array.ctypes.data % 4096 == 0

    def test_prepare_after_close_raises(self, store: MappedStore) -> None:
        store.close()
        with pytest.raises(StoreError, match="after the store was closed"):
            store.prepare(["final_norm"])
        with pytest.raises(StoreError, match="closed"):
            store.check()


class TestShapeStore(WeightStoreContract):
    holds_values = False

    def open(self, checkpoint: Checkpoint, directory: Path) -> WeightStore:
        return ShapeStore(checkpoint.spec)

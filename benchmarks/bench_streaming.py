"""Weights from MemoryX past one token on the wafer, beside what the disk, the system's file cache and memory give on their own.

    pytest benchmarks/bench_streaming.py --benchmark-only

All matrices of a dense model, layer by layer as the engine asks for them, each multiplied with one token: the weights are the work. Once
with their pages mapped in the process already, once in the system's file cache only (mapped layer by layer and let go of again), once on
the disk only (dropped from the file cache by ``posix_fadvise`` before every call, and the system asked whether it is gone). Peers read the
same file into a buffer, from where it then lies, or copy as many bytes from memory to memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import wse_emu as wse
from benchmarks.cases import F32, normal
from benchmarks.mesh import gathered, put, room
from benchmarks.racing import Call, Race, Work
from wse_emu.checkpoint import open_checkpoint
from wse_emu.equivalence.tolerance import linear_bound
from wse_emu.foundation.weights import TILE_COLS, WeightShape, all_weights, layer_prefix
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.memoryx import LayerStream, MappedStore, open_store
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor

BUFFER_BYTES = 8 << 20


class Streamed(NamedTuple):
    """A model's matrices in the order in which they are streamed, and the file they lie in."""

    directory: Path
    groups: list[list[WeightShape]]
    grid: tuple[int, int]

    @property
    def n_bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(4 * weight.size for group in self.groups for weight in group)

    def store(self, resident_bytes: int) -> MappedStore:
        """The layout file, mapped."""
        with open_checkpoint(self.directory / "model") as checkpoint:
            return open_store(checkpoint, cache_dir=self.directory, resident_bytes=resident_bytes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, smoke: bool) -> Iterator[Streamed]:
    """A dense model of half a gigabyte, saved and laid out."""
    directory = tmp_path_factory.mktemp("streaming")
    hidden, n_layers = (16, 2) if smoke else (1024, 8)
    config = {
        "model_type": "llama", "vocab_size": 8 * hidden, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "head_dim": 8 if smoke else 64, "num_hidden_layers": n_layers, "num_attention_heads": 2 if smoke else 16,
        "num_key_value_heads": 2 if smoke else 4, "max_position_embeddings": 64, "rope_theta": 1e4,
    }  # fmt: skip
    model = wse.from_config(config)
    model.save(directory / "model", dtype="float32")
    matrices = [w for w in all_weights(model.spec) if len(w.shape) == 2 and w.name != "embed"]
    groups = [[w for w in matrices if w.name.startswith(layer_prefix(layer))] for layer in range(n_layers)]
    groups.append([w for w in matrices if w.name == "lm_head"])
    assert sum(map(len, groups)) == len(matrices)
    streamed = Streamed(directory, groups, (2, 3) if smoke else (32, 32))
    store = streamed.store(0)
    with open(store.path, "rb+") as f:
        os.fsync(f.fileno())  # a page that still has to be written cannot be dropped
    store.close()
    yield streamed
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()


class Wafer(NamedTuple):
    """One token's activations, and room for the products, by their number of features."""

    wafer: wse.Wafer
    inputs: dict[int, tuple[F32, PlacedTensor]]
    outputs: dict[int, PlacedTensor]
    bands: TokenBands


def prepared(streamed: Streamed) -> Wafer:
    """Place what the products need."""
    rows, cols = streamed.grid
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols)
    shapes = {weight.shape for group in streamed.groups for weight in group}
    values = {n_in: normal(1, n_in) for n_in, _ in shapes}
    inputs = {n_in: (x, put(wafer, x)) for n_in, x in values.items()}
    outputs = {n_out: room(wafer, 1, Split.balanced(n_out, cols)) for _, n_out in shapes}
    return Wafer(wafer, inputs, outputs, TokenBands(1, rows))


def stream(streamed: Streamed, store: MappedStore, on: Wafer, *, check: bool = False) -> None:
    """All matrices past the token, the next group prepared in the background."""
    names = [[weight.name for weight in group] for group in streamed.groups]
    with LayerStream(store, depth=1) as layers:
        for group, now, then in zip(streamed.groups, names, [*names[1:], []], strict=True):
            with layers.layer(now, then):
                for weight in group:
                    n_in, n_out = weight.shape
                    x, placed = on.inputs[n_in]
                    matrix, out = StreamedMatrix(weight.name, n_in, n_out, store.tiles(weight.name)), on.outputs[n_out]
                    matmul(on.wafer, placed, matrix, out, on.bands)
                    all_gather_bands(on.wafer, out, on.bands)
                    if check:
                        first = matrix.columns(0, min(TILE_COLS, n_out))
                        error = np.abs(gathered(out)[:, : first.shape[1]] - x.astype(np.float64) @ first)
                        assert np.all(error <= linear_bound(x, first.T)), weight.name


def reader(path: Path, n_bytes: int) -> Call:
    """Reads so many bytes of a file into one small buffer."""
    buffer = bytearray(BUFFER_BYTES)

    def read() -> None:
        with open(path, "rb", buffering=0) as f:
            left = n_bytes
            while left > 0:
                n = f.readinto(memoryview(buffer)[: min(left, BUFFER_BYTES)])
                assert n, f"{path} ended early"
                left -= n

    return read


def copier(n_bytes: int) -> Call:
    """Copies so many bytes from memory to memory."""
    source, target = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    return lambda: np.copyto(target, source)


def cached_pages(path: Path) -> int:
    """Pages of a file that are in the file cache (Linux); asking brings none there."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        view = np.frombuffer(whole, np.uint8)
        answer = np.zeros(-(-view.size // mmap.PAGESIZE), np.uint8)
        address, where = (ctypes.c_void_p(a.ctypes.data) for a in (view, answer))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(view.size), where)
        del view  # or the map could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"{path}: mincore failed")
    return int((answer & 1).sum())


def dropper(path: Path) -> Call:
    """Drops a file from the file cache; skips the benchmark where that does not work.

    A page that a process has mapped stays: a fault maps a few neighbours of the page asked for, and some of these (norm weights between the
    matrices) are not streamed here, so not let go of. So one page in a hundred may stay, and as many as one fault maps.
    """
    if sys.platform != "linux":
        pytest.skip("dropping a file from the file cache, and asking whether it is gone, is done on Linux only")

    def drop() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        kept, pages = cached_pages(path), path.stat().st_size // mmap.PAGESIZE
        if kept > pages // 100 + 16:
            pytest.skip(f"the system keeps {kept} of {pages} pages of the file in its cache")

    return drop


def checked(streamed: Streamed, store: MappedStore) -> Wafer:
    """Activations on the wafer, after one pass whose products and bytes were compared."""
    on = prepared(streamed)
    on.wafer.ledger.clear()
    stream(streamed, store, on, check=True)
    assert sum(e.bytes for e in on.wafer.ledger.events() if e.kind == "stream") == streamed.n_bytes
    return on


def test_mapped(race: Race, weights: Streamed) -> None:
    store = weights.store(4 * weights.n_bytes)
    on = checked(weights, store)
    race(lambda: stream(weights, store, on), {"memcpy": copier(weights.n_bytes)}, _work(weights))
    store.close()


def test_in_the_file_cache(race: Race, weights: Streamed) -> None:
    store = weights.store(0)
    on = checked(weights, store)
    peers = {"read() from the cache": reader(store.path, weights.n_bytes), "memcpy": copier(weights.n_bytes)}
    race(lambda: stream(weights, store, on), peers, _work(weights))
    store.close()


def test_on_the_disk(race: Race, weights: Streamed) -> None:
    store = weights.store(0)
    on = checked(weights, store)
    drop = dropper(store.path)
    peers: dict[str, Any] = {"read() from the disk": reader(store.path, weights.n_bytes)}
    race(lambda: stream(weights, store, on), peers, _work(weights), before=drop, rounds=5)
    store.close()


def _work(streamed: Streamed) -> Work:
    return Work(macs=streamed.n_bytes // 4, bytes=streamed.n_bytes, tokens=1)

"""The layout file: made once, trusted only when verified, safe when two make it, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wse_emu.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from wse_emu.foundation.errors import CheckpointError, StoreError
from wse_emu.foundation.weights import all_weights
from wse_emu.memoryx import ArrayStore, MappedStore, cache_directory, cache_entries, clear_cache, open_store
from wse_emu.memoryx import build as build_module
from wse_emu.testing import contract_specs, write_checkpoint

SPEC = contract_specs()["mixtral"]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def checkpoint() -> Checkpoint:
    return random_checkpoint(SPEC, seed=0)


def built(checkpoint: Checkpoint, directory: Path) -> Path:
    with_file = open_store(checkpoint, cache_dir=directory)
    with_file.close()
    return with_file.path


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        old = f.read(1)
        f.seek(at)
        f.write(bytes([old[0] ^ 0x40]))


def content(path: Path) -> bytes:
    """A layout file without its seal, which tells when it was made."""
    data = path.read_bytes()
    return data[:20] + data[24:]


class Counter:
    """A progress callback that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def test_the_file_is_made_once_and_progress_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    progress = Counter()
    first = open_store(checkpoint, cache_dir=tmp_path, progress=progress)
    total = sum(4 * w.size for w in all_weights(SPEC))
    assert progress.calls[-1] == (total, total)
    assert [d for d, _ in progress.calls] == sorted({d for d, _ in progress.calls})
    again = Counter()
    second = open_store(checkpoint, cache_dir=tmp_path, progress=again)
    assert not again.calls
    assert first.path == second.path
    assert [p.name for p in (tmp_path / "weights").iterdir()] == [first.path.name]
    second.check()


def test_name_is_keyed_by_weights_not_by_token_ids_or_directory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    a = open_checkpoint(write_checkpoint(checkpoint, tmp_path / "x" / "model"))
    b = open_checkpoint(write_checkpoint(checkpoint, tmp_path / "y" / "model", config={**checkpoint.config, "eos_token_id": 9}))
    c = open_checkpoint(write_checkpoint(random_checkpoint(SPEC, seed=1), tmp_path / "z" / "model"))
    assert a.fingerprint != b.fingerprint
    paths = [built(x, tmp_path / "cache") for x in (a, b, c)]
    assert paths[0] == paths[1] != paths[2]
    assert open_store(b, cache_dir=tmp_path / "cache").spec.eos_token_ids == (9,)
    assert paths[0].name.startswith("model-")


def test_changed_weights_are_not_taken_from_the_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = write_checkpoint(checkpoint, tmp_path / "model")
    before = open_store(open_checkpoint(directory), cache_dir=tmp_path)
    write_checkpoint(random_checkpoint(SPEC, seed=1), directory)
    after = open_store(open_checkpoint(directory), cache_dir=tmp_path)
    np.testing.assert_array_equal(before.vector("final_norm"), ArrayStore(checkpoint).vector("final_norm"))
    assert not np.array_equal(before.vector("final_norm"), after.vector("final_norm"))


def test_cache_directory_follows_argument_environment_and_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("WSE_EMU_CACHE_DIR", str(tmp_path / "env"))
    assert cache_directory(tmp_path / "arg") == tmp_path / "arg" / "weights"
    assert cache_directory() == tmp_path / "env" / "weights"
    monkeypatch.delenv("WSE_EMU_CACHE_DIR")
    assert cache_directory() == tmp_path / "xdg" / "wse-emu" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG standard says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "wse-emu" / "weights"


@pytest.mark.parametrize("where", ["magic", "length", "crc", "json", "truncated", "longer", "empty", "version"])
def test_damage_to_header_or_size_is_found_at_opening_and_repaired(
    checkpoint: Checkpoint, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(checkpoint, tmp_path)
    good, before = path.read_bytes(), content(path)
    if where == "truncated":
        os.truncate(path, len(good) - 4096)
    elif where == "longer":
        os.truncate(path, len(good) + 1)
    elif where == "empty":
        os.truncate(path, 0)
    elif where == "version":
        path.write_bytes(good.replace(b'"layout_version": 2', b'"layout_version": 1'))
    else:
        flip(path, {"magic": 0, "length": 12, "crc": 17, "json": 40}[where])
    progress = Counter()
    store = open_store(checkpoint, cache_dir=tmp_path, progress=progress)
    assert progress.calls
    assert content(path) == before
    store.check()


def test_damage_to_a_tensor_is_found_and_repaired(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """By the seal, or on demand if whoever did it set the time back."""
    path = built(checkpoint, tmp_path)
    good, before = path.read_bytes(), content(path)
    store = open_store(checkpoint, cache_dir=tmp_path)
    flip(path, good.index(store.tiles("layers.1.w_o").tobytes()) + 5)
    with pytest.raises(StoreError, match=r"the checksum of `layers\.1\.w_o` does not match; remove the damaged file"):
        store.check()
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, store._sealed_ns))
    for damaged in ("seal", "time set back"):
        progress = Counter()
        if damaged == "seal":
            os.utime(path)
        open_store(checkpoint, cache_dir=tmp_path, progress=progress, verify=damaged != "seal").check()
        assert progress.calls
        assert content(path) == before
        other = open_store(checkpoint, cache_dir=tmp_path)
        flip(path, good.index(other.tiles("layers.1.w_o").tobytes()) + 5)
        os.utime(path, ns=(info.st_atime_ns, other._sealed_ns))


def test_a_build_that_fails_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(checkpoint, cache_dir=tmp_path, progress=stop)
    assert list((tmp_path / "weights").iterdir()) == []
    norm = checkpoint.tensors.read("model.norm.weight").copy()
    norm[3] = np.nan
    damaged = open_checkpoint(write_checkpoint(checkpoint, tmp_path / "nan", replace={"model.norm.weight": norm}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\[3\] is nan"):
        open_store(damaged, cache_dir=tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []


def test_bytes_written_wrongly_are_found_before_the_file_is_in_place(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = build_module._write

    def write_and_damage(checkpoint: Checkpoint, plan: Any, part: Path, progress: Any) -> None:
        write(checkpoint, plan, part, progress)
        flip(part, plan.data_start + 1)

    monkeypatch.setattr(build_module, "_write", write_and_damage)
    with pytest.raises(StoreError, match="the checksum of `embed` does not match"):
        open_store(checkpoint, cache_dir=tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []


def test_two_builds_at_once_are_safe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    stores: list[MappedStore] = []

    def work() -> None:
        barrier.wait()
        stores.append(open_store(random_checkpoint(SPEC, seed=0), cache_dir=tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    expected = ArrayStore(checkpoint)
    for store in stores:
        store.check()
        np.testing.assert_array_equal(store.tiles("lm_head"), expected.tiles("lm_head"))
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_too_little_space_names_the_way_out(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        StoreError, match=r"needs \d+ bytes, 1000 are free; choose another directory with `cache_dir` or .* WSE_EMU_CACHE_DIR"
    ):
        open_store(checkpoint, cache_dir=tmp_path)


def test_disk_that_fills_up_meanwhile_names_the_way_out(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="cannot be written: No space left on device; choose another directory"):
        open_store(checkpoint, cache_dir=tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []


def test_cache_directory_that_cannot_be_made_names_the_way_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: Not a directory; choose another directory"):
        open_store(checkpoint, cache_dir=tmp_path / "file")


def test_cache_directory_without_permission_names_the_way_out(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *args: Any, **kwargs: Any) -> None:  # a real one would let root through
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match="cannot be written: Permission denied; choose another directory"):
        open_store(checkpoint, cache_dir=tmp_path / "other")


def test_entries_are_listed_and_cleared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert cache_entries(tmp_path) == []
    assert clear_cache(tmp_path) == 0
    path = built(checkpoint, tmp_path)
    other = built(random_checkpoint(SPEC, seed=1), tmp_path)
    flip(other, 30)
    part = path.with_name("left.part")
    part.write_bytes(bytes(10))
    foreign = path.with_name("notes.txt")
    foreign.write_text("mine")
    entries = {e.path: e for e in cache_entries(tmp_path)}
    assert set(entries) == {path, other, part}
    assert entries[path].source == "random weights (seed 0)"
    assert entries[path].nbytes == path.stat().st_size
    assert entries[other].source == "damaged"
    assert entries[part].source == "unfinished"
    expected = sum(e.nbytes for e in entries.values())
    assert clear_cache(tmp_path) == expected
    assert [p.name for p in path.parent.iterdir()] == ["notes.txt"]


def test_a_store_outlives_the_removal_of_its_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    store = open_store(checkpoint, cache_dir=tmp_path)
    clear_cache(tmp_path)
    names = [w.name for w in all_weights(SPEC) if w.name != "embed"]
    store.drop(names)
    store.prepare(names)
    np.testing.assert_array_equal(store.tiles("lm_head"), ArrayStore(checkpoint).tiles("lm_head"))


def test_what_killed_builds_left_is_removed_but_not_a_build_that_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("old.part", "new.part"):
        (folder / name).write_bytes(b"")
    os.utime(folder / "old.part", (time.time() - 1e6,) * 2)
    built(checkpoint, tmp_path)
    assert sorted(p.suffix for p in folder.iterdir()) == [".part", ".wsew"]
    assert (folder / "new.part").exists()


@pytest.mark.parametrize("in_use", [False, True])
def test_a_file_that_was_cut_is_not_touched_again(checkpoint: Checkpoint, tmp_path: Path, in_use: bool) -> None:
    store = open_store(checkpoint, cache_dir=tmp_path)
    if in_use:
        store.prepare(["lm_head", "final_norm"])
        assert store.tiles("lm_head").size
    with open(store.path, "r+b") as file:
        file.truncate(4096)
    for ask in (lambda: store.tiles("lm_head"), lambda: store.vector("final_norm"), lambda: store.drop(["lm_head"])):
        with pytest.raises(StoreError, match="was written to while it was in use"):
            ask()
    store.close()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("resident_bytes", [0, 9 << 20])
def test_dropped_pages_beyond_the_bound_leave_this_process(tmp_path: Path, resident_bytes: int) -> None:
    config = {"vocab_size": 8, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 2}
    checkpoint = random_checkpoint({"model_type": "llama", "head_dim": 2, "eos_token_id": None, **config}, seed=0)
    names = ["layers.1.w_gate_up", "layers.1.w_down"]
    store = open_store(checkpoint, cache_dir=tmp_path, resident_bytes=resident_bytes)
    size = sum(store.tiles(n).nbytes for n in names)
    kept = min(resident_bytes, store.tiles(names[1]).nbytes)

    def resident() -> int:
        with open("/proc/self/smaps") as f:
            lines = iter(f)
            for line in lines:
                if line.rstrip().endswith(str(store.path)):
                    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("Rss:"))
        raise AssertionError("the file is not mapped")

    assert not store.is_ready(names)
    store.drop([w.name for w in all_weights(checkpoint.spec) if w.name != "embed"])
    before = resident()
    store.prepare(names)
    assert not store.is_ready(names[:1])  # used now
    for name in names:
        store.tiles(name).sum()
    assert resident() - before >= size
    store.drop(names)
    # The kernel maps a few neighbouring pages with each page that is touched; those go with their own layer.
    assert kept <= resident() - before < kept + size / 20
    assert [store.is_ready([name]) for name in names] == [False, kept > 0]


def test_layout_of_a_file_and_of_memory_are_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    opened = open_checkpoint(write_checkpoint(checkpoint, tmp_path / "model", dtype="bfloat16", n_shards=2))
    mapped, memory = open_store(opened, cache_dir=tmp_path), ArrayStore(opened)
    for weight in all_weights(SPEC):
        if weight.name == "embed":
            ids = np.arange(SPEC.vocab_size)
            np.testing.assert_array_equal(mapped.embed(ids), memory.embed(ids))
        elif len(weight.shape) == 1:
            np.testing.assert_array_equal(mapped.vector(weight.name), memory.vector(weight.name))
        else:
            np.testing.assert_array_equal(mapped.tiles(weight.name), memory.tiles(weight.name))


@pytest.mark.parametrize("name", ["stories260K", "stories260K-moe8x2-trained"])
def test_real_checkpoint_is_laid_out(name: str, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip("the real checkpoints are not beside this repository")
    with open_checkpoint(DATA / name) as checkpoint:
        store = open_store(checkpoint, cache_dir=tmp_path)
        embed = checkpoint.tensors.read("model.embed_tokens.weight")
        head = store.tiles("lm_head").reshape(4, 64, 128)  # four whole tiles of 128 of the 512 tokens
        np.testing.assert_array_equal(np.concatenate(list(head), axis=1), embed.T)

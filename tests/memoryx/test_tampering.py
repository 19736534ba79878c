"""The layout file and its directory in hostile hands: what was written to is verified or refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import random_checkpoint
from wse_emu.foundation.errors import StoreError
from wse_emu.memoryx import ArrayStore, MappedStore, open_store
from wse_emu.testing import contract_specs, write_checkpoint

MODEL = random_checkpoint(contract_specs()["mixtral"], seed=0)
CHANGED = "was written to while it was in use; open the model again"


@pytest.fixture
def store(tmp_path: Path) -> MappedStore:
    return open_store(MODEL, cache_dir=tmp_path)


def builds(directory: Path) -> bool:
    """Whether opening makes the file anew."""
    calls: list[int] = []
    open_store(MODEL, cache_dir=directory, progress=lambda done, total: calls.append(done)).close()
    return bool(calls)


def scribble(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(-4096, os.SEEK_END)
        f.write(b"\x01\x02\x03\x04")


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def touch(path: Path) -> None:
    os.utime(path)


CHANGES = [scribble, cut, empty, grow, touch]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", ["vector", "tiles", "embed", "prepare", "drop"])
def test_a_file_that_is_written_to_while_it_is_open_is_refused(
    use: str, change: Callable[[Path], None], store: MappedStore, tmp_path: Path
) -> None:
    uses = {
        "vector": lambda: store.vector("final_norm"),
        "tiles": lambda: store.tiles("lm_head"),
        "embed": lambda: store.embed(np.array([1])),
        "prepare": lambda: store.prepare(["lm_head"]),
        "drop": lambda: store.drop(["lm_head"]),
    }
    for of in uses.values():
        of()
    change(store.path)
    with pytest.raises(StoreError, match=CHANGED):
        uses[use]()
    with pytest.raises(StoreError, match=f"{CHANGED}|the checksum of") if change is not touch else nullcontext():
        store.check()
    store.close()
    assert builds(tmp_path) == (change is not touch)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_layers_of_a_pass_stops_it(change: Callable[[Path], None], tmp_path: Path) -> None:
    model = wse.from_pretrained(write_checkpoint(MODEL, tmp_path / "m"), wafer=wse.Wafer(rows=2, cols=2), cache_dir=tmp_path)
    expected = model([3, 1, 4]).logits
    drop, dropped = model.store.drop, []

    def drop_and_change(names: list[str]) -> None:
        drop(names)
        dropped.append(names)
        if len(dropped) == 2:
            change(model.store.path)

    model.store.drop = drop_and_change  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=CHANGED):
        model([3, 1, 4])
    assert not model.wafer.sram.live
    again = wse.from_pretrained(tmp_path / "m", wafer=model.wafer, cache_dir=tmp_path)
    np.testing.assert_array_equal(again([3, 1, 4]).logits, expected)


def test_a_copy_with_another_time_is_verified_once_and_sealed(store: MappedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(store.path)
    checks: list[Path] = []
    check = MappedStore.check

    def counted(self: MappedStore, progress: object = None) -> None:
        checks.append(self.path)
        check(self)

    monkeypatch.setattr(MappedStore, "check", counted)
    assert not builds(tmp_path)
    assert len(checks) == 1
    assert not builds(tmp_path)
    assert len(checks) == 1


def test_a_seal_that_cannot_be_set_does_no_harm(store: MappedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    touch(store.path)
    monkeypatch.setattr(os, "utime", denied)
    again = open_store(MODEL, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.vector("final_norm"), ArrayStore(MODEL).vector("final_norm"))


@pytest.mark.parametrize("kind", ["link", "link to nothing", "fifo"])
def test_what_is_no_file_is_replaced_and_what_it_led_to_is_not_touched(kind: str, store: MappedStore, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copy2(store.path, mine)
    before = mine.read_bytes()
    store.path.unlink()
    if kind == "fifo":
        os.mkfifo(store.path)
    else:
        store.path.symlink_to(mine if kind == "link" else tmp_path / "nothing")
    assert builds(tmp_path)
    assert store.path.is_file()
    assert not store.path.is_symlink()
    assert mine.read_bytes() == before
    assert not (tmp_path / "nothing").exists()


def test_a_directory_in_the_place_of_the_file_is_named(store: MappedStore, tmp_path: Path) -> None:
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(StoreError, match=r"\.wsew: .* cannot be written: Is a directory; choose another directory"):
        open_store(MODEL, cache_dir=tmp_path)
    assert [p.name for p in store.path.parent.iterdir()] == [store.path.name]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o1777])
def test_a_directory_that_others_may_write_is_not_used(mode: int, tmp_path: Path) -> None:
    open_store(MODEL, cache_dir=tmp_path).close()
    (tmp_path / "weights").chmod(mode)
    with pytest.raises(StoreError, match=r"weights: must be a directory \(no link\) that belongs to you .*mode 700.* choose another"):
        open_store(MODEL, cache_dir=tmp_path)
    (tmp_path / "weights").chmod(0o755)
    assert not builds(tmp_path)


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(MODEL, cache_dir=tmp_path).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(StoreError, match="belongs to you"):
        open_store(MODEL, cache_dir=tmp_path)


def test_a_directory_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "weights").symlink_to("other")
    with pytest.raises(StoreError, match="no link"):
        open_store(MODEL, cache_dir=tmp_path)
    assert not list((tmp_path / "other").iterdir())


def test_what_is_made_is_private(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        store = open_store(MODEL, cache_dir=tmp_path / "cache")
    finally:
        os.umask(previous)
    assert store.path.parent.stat().st_mode & 0o777 == 0o700
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_read_only_directory_serves_what_is_there_and_names_the_way_out_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(MODEL, cache_dir=tmp_path).close()

    def read_only(path: object, flags: int, *rest: int) -> int:  # root writes everywhere
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return plain(path, flags, *rest)  # type: ignore[arg-type]

    plain = os.open
    monkeypatch.setattr(os, "open", read_only)
    assert not builds(tmp_path)
    with pytest.raises(StoreError, match="cannot be written: Read-only file system; choose another directory with `cache_dir` or"):
        open_store(random_checkpoint(MODEL.spec, seed=1), cache_dir=tmp_path)


PROCESS = """
import resource, sys
import wse_emu as wse
from wse_emu.memoryx import open_store
from wse_emu.checkpoint import open_checkpoint
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    with open_checkpoint(sys.argv[1]) as checkpoint:
        store = open_store(checkpoint, cache_dir=sys.argv[2])
    store.check()
    print(store.vector("final_norm").tobytes().hex())
except wse.StoreError as e:
    print(e)
"""


def process(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", PROCESS, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_both_finish_with_the_same(tmp_path: Path) -> None:
    write_checkpoint(MODEL, tmp_path / "model")
    running = [process(tmp_path / "model", tmp_path / "cache") for _ in range(2)]
    said = [p.communicate(timeout=60)[0].strip() for p in running]
    assert said == [ArrayStore(MODEL).vector("final_norm").tobytes().hex()] * 2
    assert [p.returncode for p in running] == [0, 0]
    assert [p.suffix for p in (tmp_path / "cache" / "weights").iterdir()] == [".wsew"]


def test_a_write_that_the_system_stops_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(MODEL, tmp_path / "model")
    said, _ = process(tmp_path / "model", tmp_path / "cache", 50_000).communicate(timeout=60)
    assert "cannot be written: File too large; choose another directory" in said
    assert list((tmp_path / "cache" / "weights").iterdir()) == []

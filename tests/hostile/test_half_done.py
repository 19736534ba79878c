"""Callbacks that raise and weights that fail in the middle: the error comes through, and nothing is left half done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.foundation.errors import StoreError
from wse_emu.foundation.files import whole_file

from .models import NEW, PROMPT, make_model, same, what_is_there


class OfTheCallerError(Exception):
    """Raised by callbacks."""


@pytest.mark.parametrize("executor", ["batched", "isolated"])
@pytest.mark.parametrize("step", range(NEW))
def test_a_callback_that_raises_ends_the_run(executor: str, step: int) -> None:
    model = make_model(executor)
    want = model.generate(PROMPT, NEW)
    before = what_is_there(model.wafer)

    def on_token(at: int, ids: NDArray[np.int64]) -> None:
        model.wafer.place(np.zeros((3, 2), np.float32), name="left behind")
        ids[:] = -1  # a copy: the run does not depend on what becomes of it
        if at == step:
            raise OfTheCallerError

    with pytest.raises(OfTheCallerError):
        model.generate(PROMPT, NEW, on_token=on_token)
    assert what_is_there(model.wafer) == before
    assert same(model.generate(PROMPT, NEW), want)


class FailingStore:
    """A store whose n-th call fails; the others are those of `store`."""

    def __init__(self, store: Any, at: int | None) -> None:
        self.spec, self.name, self.calls, self._store, self._at = store.spec, store.name, 0, store, at

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._at:
            raise StoreError(f"call {self.calls} failed")

    def vector(self, name: str) -> NDArray[np.float32]:
        self._count()
        array: NDArray[np.float32] = self._store.vector(name)
        return array

    def tiles(self, name: str) -> NDArray[np.float32]:
        self._count()
        array: NDArray[np.float32] = self._store.tiles(name)
        return array

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._count()
        array: NDArray[np.float32] = self._store.embed(ids)
        return array

    def prepare(self, names: Sequence[str]) -> None:
        self._count()
        self._store.prepare(names)

    def check_readable(self) -> None:
        self._store.check_readable()

    def is_ready(self, names: Sequence[str]) -> bool:
        return self._store.is_ready(names)

    def drop(self, names: Sequence[str]) -> None:
        self._count()
        self._store.drop(names)

    def close(self) -> None:
        self._store.close()


def with_store(model: wse.WaferModel, store: Any) -> None:
    """Have the next runs take their weights from `store`."""
    model.store, model._engine = store, None


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("executor", ["batched", pytest.param("isolated", marks=pytest.mark.slow)])
def test_weights_that_fail_at_any_call(executor: str, depth: int) -> None:
    model = make_model(executor, prefetch_depth=depth)
    store = model.store
    want = model.generate(PROMPT, 2)
    before = what_is_there(model.wafer)
    counter = FailingStore(store, None)
    with_store(model, counter)
    model.generate(PROMPT, 2)
    assert counter.calls > 60
    points = range(1, counter.calls + 1, 1 if executor == "batched" else 4)
    errors, reached = {}, 0
    for at in points:
        failing = FailingStore(store, at)
        with_store(model, failing)
        try:
            model.generate(PROMPT, 2)
        except StoreError as error:
            errors[at] = str(error)
        reached += failing.calls >= at  # whether the thread still prepares a last group, which is then dropped, depends on time
        assert what_is_there(model.wafer) == before, at
    assert errors == {at: f"call {at} failed" for at in errors}
    assert reached >= len(points) - 2
    # A group that was prepared for a step that never came, or dropped after the last one, concerns no result.
    assert len(errors) >= reached - 3
    with_store(model, store)
    assert same(model.generate(PROMPT, 2), want)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_progress_that_raises(tmp_path: Path, share: float) -> None:
    model = make_model()
    model.save(tmp_path / "saved")

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise OfTheCallerError

    with pytest.raises(OfTheCallerError):
        model.save(tmp_path / "again", progress=progress)
    with pytest.raises(OfTheCallerError):
        wse.from_pretrained(tmp_path / "saved", wafer=model.wafer, cache_dir=tmp_path / "cache", progress=progress)
    assert [p.name for p in tmp_path.iterdir()] in (["saved", "cache"], ["cache", "saved"])
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    file = tmp_path / "out.json"

    def half() -> None:
        with whole_file(file) as out:
            out.write("half")
            raise OfTheCallerError

    with pytest.raises(OfTheCallerError):
        half()
    assert not list(tmp_path.iterdir())
    file.write_text("before")
    file.chmod(0o640)
    with pytest.raises(OfTheCallerError):
        half()
    assert file.read_text() == "before"
    link = tmp_path / "link"
    link.symlink_to(file)
    with whole_file(link) as out:
        out.write("whole")
    assert (file.read_text(), link.is_symlink(), file.stat().st_mode & 0o777) == ("whole", True, 0o640)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out.json"]


def test_devices_and_pipes_are_written_to_as_they_are(tmp_path: Path) -> None:
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with whole_file(pipe) as out:
        out.write("through")
    reader.join(10)
    assert read == ["through"]
    assert pipe.is_fifo()
    with whole_file("/dev/null") as out:
        out.write("gone")
    assert not Path("/dev/null").is_file()

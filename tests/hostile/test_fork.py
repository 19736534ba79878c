"""Processes: forked, spawned and served children compute the same bits, or are told why not; nothing hangs, nothing is killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.foundation.errors import ForkError
from wse_kernels import threads

from .models import NEW, PROMPT, make_model, same

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="about fork"),
    # Python 3.12 warns about any fork of a process with threads; these children are what the warning is about.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every driver in three parts, so that the parent has threads when it forks."""
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    with threads.limit_threads(3):
        yield


def forked(work: Callable[[], bool]) -> None:
    """Run `work` in a forked child; fails unless it returns True in time."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = threading.Event()
    status: list[int] = []

    def reap() -> None:
        status.append(os.waitpid(pid, 0)[1])
        ended.set()

    threading.Thread(target=reap, daemon=True).start()
    if not ended.wait(60):
        os.kill(pid, 9)
        raise AssertionError("the child hangs")
    assert os.waitstatus_to_exitcode(status[0]) == 0


def test_a_child_runs_the_parents_model() -> None:
    model = make_model()
    want = model.generate(PROMPT, NEW)
    forked(lambda: same(model.generate(PROMPT, NEW), want))
    assert same(model.generate(PROMPT, NEW), want)


def test_a_grandchild_too() -> None:
    model = make_model()
    want = model.generate(PROMPT, NEW)

    def child() -> bool:
        forked(lambda: same(model.generate(PROMPT, NEW), want))
        return same(model.generate(PROMPT, NEW), want)

    forked(child)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_child_that_is_forked_in_the_middle_of_a_run_goes_on_with_it(depth: int) -> None:
    """Without the prefetch thread, which stayed with the parent."""
    model = make_model(prefetch_depth=depth)
    want = model.generate(PROMPT, NEW)
    parent, child = os.getpid(), []

    def on_token(step: int, ids: np.ndarray) -> None:
        if step == 0:
            child.append(os.fork())

    try:
        ids = model.generate(PROMPT, NEW, on_token=on_token)
        if os.getpid() != parent:
            again = model.generate(PROMPT, NEW)
            os._exit(0 if same(ids, want) and same(again, want) and not model.wafer.sram.live else 1)
    finally:
        if os.getpid() != parent:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == 0
    assert same(ids, want)


def test_a_wafer_that_another_thread_ran_on_is_refused_in_the_child() -> None:
    model, other = make_model(), make_model(seed=4)
    want, of_other = model.generate(PROMPT, NEW), other.generate(PROMPT, NEW)
    running, go_on = threading.Event(), threading.Event()

    def on_token(step: int, ids: np.ndarray) -> None:
        running.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=lambda: model.generate(PROMPT, NEW, on_token=on_token))
    thread.start()
    assert running.wait(60)

    def child() -> bool:
        for call in (lambda: model.generate(PROMPT, 1), lambda: model.wafer.place(np.zeros((2, 2), np.float32))):
            with pytest.raises(ForkError, match=r"forked while another thread ran on the wafer.*make the model anew in the child"):
                call()
        return same(other.generate(PROMPT, NEW), of_other) and same(make_model().generate(PROMPT, NEW), want)

    try:
        forked(child)
    finally:
        go_on.set()
        thread.join(60)
    assert same(model.generate(PROMPT, NEW), want)


def test_a_store_whose_lock_another_thread_held_is_free_in_the_child(tmp_path: Path) -> None:
    model = make_model()
    want = model.generate(PROMPT, NEW)
    model.save(tmp_path / "saved")
    mapped = wse.from_pretrained(tmp_path / "saved", wafer=model.wafer, cache_dir=tmp_path / "cache")
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with mapped.store._lock, mapped.store._tensors._lock:  # type: ignore[attr-defined]
            held.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        forked(lambda: same(mapped.generate(PROMPT, NEW), want))
    finally:
        go_on.set()
        thread.join(60)


def run_in_a_process(tokens: list[int]) -> list[int]:
    """Work of a pool's process."""
    return [int(i) for i in make_model().generate(np.array(tokens), NEW)]


@pytest.mark.parametrize("method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))])
def test_a_pool_of_processes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [run_in_a_process(p) for p in prompts]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(run_in_a_process, prompts, timeout=120)) == want

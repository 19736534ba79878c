"""Drivers in parts: each part once, whoever does it; nobody waits for helpers that do not come; forked children compute."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from numba import config

from wse_kernels import threads
from wse_kernels.threads import HELP, LEAVE, STAY, Driver, SharedDriver, in_parts, limit_threads, n_threads

pytestmark = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="plain Python starts no threads")


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threads._Helpers]:
    """Helpers of this test's own."""
    own = threads._Helpers()
    monkeypatch.setattr(threads, "_helpers", own)
    return own


def test_every_part_is_done_once_and_helpers_take_part(helpers: threads._Helpers) -> None:
    both = threading.Barrier(3)
    done: list[tuple[int, int, str, str]] = []

    def part(i: int, n: int, word: str) -> None:
        if i < 3:
            both.wait(60)  # passes only if three threads work at once
        done.append((i, n, word, threading.current_thread().name))

    in_parts(part, 3, ("x",))
    assert sorted(d[:3] for d in done) == [(i, 3, "x") for i in range(3)]
    assert {d[3] for d in done} == {threading.current_thread().name, "wse-kernels-1", "wse-kernels-2"}


def test_nobody_waits_for_a_helper_that_is_busy(helpers: threads._Helpers) -> None:
    go_on = threading.Event()
    in_parts(lambda i, n: None, 2, ())
    helpers._jobs.put(type("Busy", (), {"help": lambda self: go_on.wait(60)})())  # type: ignore[arg-type]
    try:
        names: list[str] = []
        in_parts(lambda i, n: names.append(threading.current_thread().name), 2, ())
        assert names == [threading.current_thread().name] * 2
    finally:
        go_on.set()


def test_a_helper_that_comes_too_late_finds_nothing(helpers: threads._Helpers) -> None:
    parts: list[int] = []
    job = threads._Job(lambda i, n: parts.append(i), 3, ())
    job.close()
    job.help()
    assert parts == []


def test_what_a_part_raises_is_raised_once_nothing_runs_any_more(helpers: threads._Helpers) -> None:
    both = threading.Barrier(2)
    ended: list[int] = []
    for of_helper in (True, False):

        def part(i: int, n: int, of_helper: bool = of_helper) -> None:
            both.wait(60)
            if (threading.current_thread().name == "wse-kernels-1") == of_helper:
                raise ZeroDivisionError("of a part")
            time.sleep(0.05)
            ended.append(i)

        with pytest.raises(ZeroDivisionError, match="of a part"):
            in_parts(part, 2, ())
        assert len(ended) == 1
        ended.clear()


def test_an_interrupt_waits_for_the_helpers_too(helpers: threads._Helpers) -> None:
    """Ctrl-C while the caller waits: helpers still write to its arrays."""
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def part(i: int, n: int) -> None:
        if threading.current_thread().name == "wse-kernels-1":
            begun.set()
            may_end.wait(60)
            ended.append(i)
        else:
            begun.wait(60)

    class Interrupted:
        def __init__(self) -> None:
            self.n = 0

        def put(self, item: None) -> None:
            pass

        def get(self, timeout: float) -> None:
            self.n += 1
            if self.n == 3:
                may_end.set()
            if self.n < 5:
                raise KeyboardInterrupt
            time.sleep(0.001)

    class Job(threads._Job):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._leaving = Interrupted()  # type: ignore[assignment]

    threads_job, threads._Job = threads._Job, Job  # type: ignore[misc]
    try:
        with pytest.raises(KeyboardInterrupt):
            in_parts(part, 2, ())
    finally:
        threads._Job = threads_job  # type: ignore[misc]
    assert len(ended) == 1


def test_where_the_system_grants_no_thread_the_caller_works_alone(helpers: threads._Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    parts: list[int] = []
    in_parts(lambda i, n: parts.append(i), 3, ())
    assert parts == [0, 1, 2]


def test_only_work_that_is_worth_it_is_shared(helpers: threads._Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, numbers = [0], []
    monkeypatch.setattr(threads.time, "perf_counter_ns", lambda: clock[0])

    def part(i: int, n: int, ns: int) -> None:
        clock[0] += ns // n
        numbers.extend([n] if i == 0 else [])

    monkeypatch.setattr(helpers, "offer", lambda job, n: None)
    driver, worth = Driver(part), threads.WORTH_NS
    with limit_threads(4):
        driver(10, 100 * worth)  # compiles: tells nothing
        driver(10, worth // 2)  # nothing is known yet
        driver(10, worth // 2)
        driver(10_000, 500 * worth)  # the same for each unit
        driver(19, worth)
        assert numbers == [1, 4, 1, 4, 1]
        driver(10, 8 * worth)  # it turns out to be slow
        driver(10, worth // 2)
        assert numbers[5:] == [1, 4]
        for _ in range(4):
            driver(10, worth // 2)
        assert numbers[-1] == 1
    with limit_threads(1):
        driver(10_000, 500 * worth)
    assert numbers[-1] == 1


def test_number_of_threads() -> None:
    assert n_threads() == config.NUMBA_NUM_THREADS
    with limit_threads(5), limit_threads(3):
        assert n_threads() == 3
    seen = []
    with limit_threads(5):
        other = threading.Thread(target=lambda: seen.append(n_threads()))
        other.start()
        other.join()
    assert seen == [config.NUMBA_NUM_THREADS]
    for n in (0, -1, True, 1.0):
        with pytest.raises(ValueError, match="`n` \\(threads\\) must be an integer >= 1"), limit_threads(n):  # type: ignore[arg-type]
            pass


SCRIPT = """
import os, threading
import numba, numpy as np
from wse_kernels import threads
from wse_kernels.matmul import STORE, mesh_matmul

threads.WORTH_NS = 0

def product():
    x = w = np.arange(16, dtype=np.float32)
    w.flags.writeable = False
    out, all_, rows = np.zeros(16, np.float32), np.array([0, 4]), np.arange(4)
    with threads.limit_threads(3):
        for _ in range(2):
            mesh_matmul(x.copy(), 4, all_, rows, w, 0, 4, 4, out, 4, all_, rows, np.zeros(1, np.float32), STORE)
    return out

before = product()
assert threading.active_count() == 3, threading.enumerate()
pid = os.fork()
if pid == 0:
    alone = threading.active_count() == 1
    os._exit(0 if alone and np.array_equal(before, product()) and threading.active_count() == 3 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    print(numba.threading_layer())
except ValueError:
    print("none")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="about fork")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=env, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["0", "none"], "no threading layer of Numba's may start: GNU OpenMP's ends a forked child"


# ---- work by tickets


class Pieces:
    """A function for a `SharedDriver` that notes who did what; each thread does a piece when it is told to."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.lock = threading.Lock()
        self.next = 0
        self.done: list[tuple[int, str]] = []
        self.roles: list[int] = []
        self.helper_has_begun, self.helper_may_go_on = threading.Event(), threading.Event()

    def __call__(self, role: int, n_threads: int, progress: Any) -> None:
        self.roles.append(role)
        progress[1] = self.n
        mine = 0
        while True:
            with self.lock:
                piece, self.next = self.next, self.next + 1
            if piece >= self.n:
                break
            mine += 1
            if role == HELP:
                self.helper_has_begun.set()
                assert self.helper_may_go_on.wait(60)
            elif role == LEAVE:
                assert self.helper_has_begun.wait(60)
            self.done.append((piece, threading.current_thread().name))
            with self.lock:
                progress[0] += 1
            if role == LEAVE and self.next > mine:
                return
        while role == STAY and progress[0] < self.n:
            time.sleep(0.001)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is worth helpers."""
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    with limit_threads(2):
        yield


def begun_driver(function: Any) -> SharedDriver:
    driver = SharedDriver(function)
    driver._began = True  # the first call is for one thread
    return driver


def test_a_caller_leaves_its_work_to_a_helper_that_has_begun(helpers: threads._Helpers, shared: None) -> None:
    pieces = Pieces(5)
    call = begun_driver(pieces).begin(1)
    assert call is not None
    assert not call.is_done
    assert len(pieces.done) == 1  # and the helper is at another
    pieces.helper_may_go_on.set()
    call.finish()
    assert call.is_done
    assert sorted(piece for piece, _ in pieces.done) == list(range(5))
    assert pieces.roles == [LEAVE, HELP, STAY] or pieces.roles == [HELP, LEAVE, STAY]


def test_what_is_finished_may_be_finished_again(helpers: threads._Helpers, shared: None) -> None:
    pieces = Pieces(2)
    pieces.helper_may_go_on.set()
    call = begun_driver(pieces).begin(1)
    assert call is not None
    call.finish()
    call.finish()
    assert sorted(piece for piece, _ in pieces.done) == [0, 1]


def test_a_call_waits_for_what_helpers_are_at(helpers: threads._Helpers, shared: None) -> None:
    pieces = Pieces(4)
    threading.Timer(0.05, pieces.helper_may_go_on.set).start()
    begun_driver(pieces)(1)
    assert sorted(piece for piece, _ in pieces.done) == list(range(4))


def test_without_a_helper_the_caller_does_it_all(helpers: threads._Helpers, shared: None) -> None:
    go_on = threading.Event()
    in_parts(lambda i, n: None, 2, ())
    helpers._jobs.put(type("Busy", (), {"help": lambda self: go_on.wait(60)})())  # type: ignore[arg-type]
    try:
        pieces = Pieces(3)
        pieces.helper_has_begun.set()
        call = begun_driver(pieces).begin(1)
        assert call is not None
        assert call.is_done
        assert {name for _, name in pieces.done} == {threading.current_thread().name}
    finally:
        go_on.set()


def test_a_helper_without_memory_leaves_the_work_to_others(helpers: threads._Helpers, shared: None) -> None:
    pieces, tried = Pieces(3), threading.Event()
    pieces.helper_has_begun.set()

    def function(role: int, n: int, progress: Any) -> None:
        if role == HELP:
            tried.set()
            raise MemoryError
        assert tried.wait(60)
        pieces(role, n, progress)

    begun_driver(function)(1)
    assert sorted(piece for piece, _ in pieces.done) == [0, 1, 2]
    in_parts(lambda i, n: None, 2, ())  # the helper lives


def test_the_first_call_and_small_work_are_for_one_thread(helpers: threads._Helpers) -> None:
    numbers: list[tuple[int, int]] = []

    def function(role: int, n: int, progress: Any) -> None:
        numbers.append((role, n))
        progress[:] = 1

    driver = SharedDriver(function)
    assert next(driver.begin(1) for _ in range(2)) is None
    driver._ns_per_unit, driver._last = 1.0, None
    assert driver.begin(threads.WORTH_NS - 1) is None
    assert numbers[0] == numbers[-1] == (STAY, 1)


def test_an_interrupt_of_shared_work_waits_for_the_helpers(helpers: threads._Helpers, shared: None) -> None:
    pieces = Pieces(3)
    interrupts = [KeyboardInterrupt, KeyboardInterrupt]

    def function(role: int, n: int, progress: Any) -> None:
        if role == STAY and interrupts:
            pieces.helper_may_go_on.set()
            raise interrupts.pop()
        pieces(role, n, progress)

    with pytest.raises(KeyboardInterrupt):
        begun_driver(function)(1)
    assert sorted(piece for piece, _ in pieces.done) == [0, 1, 2]


def test_an_error_of_the_caller_is_raised(helpers: threads._Helpers, shared: None) -> None:
    def function(role: int, n: int, progress: Any) -> None:
        raise MemoryError("no room for scratch")

    with pytest.raises(MemoryError, match="no room for scratch"):
        begun_driver(function)(1)


def test_time_is_learned_from_the_call_before(helpers: threads._Helpers, shared: None) -> None:
    driver = begun_driver(Pieces(0))
    driver.begin(10)
    assert driver._last is not None
    driver._last[0].ns[:] = [300, 700]
    driver.begin(10)
    assert driver._ns_per_unit == 100.0


def test_what_is_done_is_not_held_on_to(helpers: threads._Helpers, shared: None) -> None:
    class Argument:
        pass

    def function(role: int, n: int, progress: Any, argument: Argument) -> None:
        progress[:] = 1

    driver = begun_driver(function)
    argument = Argument()
    gone = weakref.ref(argument)
    driver(1, argument)
    del argument
    for _ in range(1000):  # a helper may be about to find that it is late
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None

"""Threads of the project's own: the one place through which a compiled driver runs in parts, several at a time.

A driver is serial code that does one of `n` parts of its work without Python's lock. The caller works through the parts itself; helper
threads take parts too, if they wake in time: a busy machine delays nobody, for nobody waits for a helper that has not begun. No threading
layer of Numba's is ever started, so any number of Python threads may call drivers at once, and a forked child computes with threads of its
own. Results never depend on any of this.

A caller may also leave the work of a `SharedDriver` to the helpers once one of them has begun, do something else, and come back for the
rest. Python's own work then costs no time of its own, while there is as much to compute.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numba
import numpy as np
from numpy.typing import NDArray

WORTH_NS = 500_000
"""Work below this many nanoseconds is done by the caller alone: waking a helper costs more than it brings."""

LEAVE, STAY, HELP = -1, 0, 1
"""What a thread does that calls the function of a `SharedDriver`: work until another one has begun; do all that is left and wait for what
the others are at; or do what it can get."""

Runner = Callable[..., None]
"""How a driver is called: ``run(driver, units, *args)``."""

_config: Any = numba.config  # which Numba's types do not name
_limit: ContextVar[int | None] = ContextVar("wse_kernels_threads", default=None)


def n_threads() -> int:
    """Threads that a driver may use, the caller's included: Numba's number (``NUMBA_NUM_THREADS``, the processors), or `limit_threads`."""
    limit = _limit.get()
    return int(_config.NUMBA_NUM_THREADS) if limit is None else limit


@contextmanager
def limit_threads(n: int) -> Iterator[None]:
    """Let the drivers called inside the block, from this thread, use `n` threads; more than there are processors is allowed.

    Raises
    ------
    ValueError
        If `n` is not a positive integer.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` (threads) must be an integer >= 1, got {n!r}")
    token = _limit.set(n)
    try:
        yield
    finally:
        _limit.reset(token)


class Driver:
    """A compiled function that does one part of its work, and how long that takes here.

    Parameters
    ----------
    function : callable
        ``function(part, n_parts, *args)``. Parts write to different places; the result does not depend on their number or order.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._ns_per_unit: float | None = None
        """Of the last calls; None before the second, for the first one compiles."""
        self._began = False

    def __call__(self, units: int, *args: Any) -> None:
        """Do all parts: in several threads if work of so many `units` took long enough lately (any unit; the same in all calls)."""
        if not self._began:
            self.function(0, 1, *args)
            self._began = True
            return
        n_parts = n_threads() if self._ns_per_unit is None or units * self._ns_per_unit >= WORTH_NS else 1
        measured = in_parts(self.function, n_parts, args) / max(units, 1)
        self._ns_per_unit = measured if self._ns_per_unit is None else (self._ns_per_unit + measured) / 2


    def begin(self, units: int, *args: Any) -> Unfinished | None:
        """Do all parts, as a call does, unless the driver can leave work to helpers: then what is unfinished."""
        self(units, *args)
        return None


def at_once(driver: Driver, units: int, *args: Any) -> None:
    """Call a driver and wait for it: the plain `Runner`."""
    driver(units, *args)


class SharedDriver(Driver):
    """A driver whose threads take its work by tickets, so that nobody has a part that the others must wait for.

    Parameters
    ----------
    function : callable
        ``function(role, n_threads, progress, *args)`` with `role` one of `LEAVE`, `STAY` and `HELP`. Every thread writes the number of
        pieces to ``progress[1]`` before it takes one, and takes a ticket of ``progress[:1]`` for each that it has finished. The result does
        not depend on who does what. What it raises, it raises before it takes a piece.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        self._last: tuple[Unfinished, int] | None = None
        """The call before, and its units."""

    def __call__(self, units: int, *args: Any) -> None:
        """Do all of the work: with helpers if so many `units` took long enough lately."""
        call = self.begin(units, *args)
        if call is not None:
            call.finish_or_stop()

    def begin(self, units: int, *args: Any) -> Unfinished | None:
        """Do all of the work, or as much as it takes for a helper to come: then what is unfinished."""
        progress = np.zeros(2, np.int64)
        if not self._began:  # compiles
            self.function(STAY, 1, progress, *args)
            self._began = True
            return None
        self._note_time()
        n = n_threads() if self._ns_per_unit is None or units * self._ns_per_unit >= WORTH_NS else 1
        if _config.DISABLE_JIT:  # tickets are for one thread then
            n = 1
        call = Unfinished(self.function, n, progress, args)
        self._last = call, units
        if n == 1:
            call.finish()
            return None
        _helpers.offer(call, n - 1)
        call.finish_or_stop(LEAVE)
        return call

    def _note_time(self) -> None:
        """Learn from the call before; a helper that has not yet said what it took is left out."""
        last, self._last = self._last, None
        if last is not None:
            call, units = last
            measured = sum(call.ns) / max(units, 1)
            self._ns_per_unit = measured if self._ns_per_unit is None else (self._ns_per_unit + measured) / 2


class Unfinished:
    """A call of a `SharedDriver` that helpers may still be at work on: what it writes must not be looked at before `finish`."""

    __slots__ = ("_args", "_function", "_n_threads", "_progress", "ns")

    def __init__(self, function: Callable[..., None], n_threads: int, progress: NDArray[np.int64], args: tuple[Any, ...]) -> None:
        self._function, self._n_threads, self._progress = function, n_threads, progress
        self._args: tuple[Any, ...] | None = args
        """None once all is done: nothing is held on to."""
        self.ns: list[int] = []
        """Nanoseconds that each thread was at it, each time."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left, so that `finish` would not wait."""
        done, of = self._progress.tolist()
        return bool(0 < of <= done)

    def work(self, role: int) -> None:
        """Take part, unless all is done."""
        args = self._args
        if args is None:
            return
        start = time.perf_counter_ns()
        self._function(role, self._n_threads, self._progress, *args)
        self.ns.append(time.perf_counter_ns() - start)

    def help(self) -> None:
        """What a helper does, which may come too late."""
        with suppress(Exception):  # of memory, say, before it took a piece: the others do them all, and meet it if it is one of all
            self.work(HELP)

    def finish(self) -> None:
        """Do what is left, and wait until all is done."""
        self.work(STAY)
        self._args = None

    def finish_or_stop(self, role: int = STAY) -> None:
        """Take part; when interrupted (Ctrl-C), go on only once nobody writes to the caller's arrays any more."""
        try:
            if role == STAY:
                self.finish()
            else:
                self.work(role)
        except KeyboardInterrupt:
            while not self.is_done:
                with suppress(KeyboardInterrupt):
                    self.finish()
            raise


def in_parts(function: Callable[..., None], n_parts: int, args: tuple[Any, ...]) -> int:
    """Call ``function(part, n_parts, *args)`` once for each part; returns, or raises what a part raised, when nothing runs any more.

    Returns
    -------
    int
        Nanoseconds that the parts took, all together.
    """
    if n_parts == 1 or _config.DISABLE_JIT:
        start = time.perf_counter_ns()
        for part in range(n_parts):
            function(part, n_parts, *args)
        return time.perf_counter_ns() - start
    job = _Job(function, n_parts, args)
    _helpers.offer(job, n_parts - 1)
    try:
        job.work()
    finally:
        job.close()
    if job.error is not None:
        raise job.error
    return sum(job.ns)


class _Job:
    """Parts of one call that are still to be done, and the helpers that are at it."""

    def __init__(self, function: Callable[..., None], n_parts: int, args: tuple[Any, ...]) -> None:
        self.error: BaseException | None = None
        self.ns: list[int] = []
        self._function, self._n_parts, self._args = function, n_parts, args
        self._left = deque(range(n_parts))
        self._gate = threading.Lock()
        self._closed = False
        self._inside = 0
        self._leaving: SimpleQueue[None] = SimpleQueue()

    def work(self) -> None:
        """Do parts until none is left."""
        while self._left:
            try:
                part = self._left.popleft()
            except IndexError:  # another thread was faster
                return
            start = time.perf_counter_ns()
            self._function(part, self._n_parts, *self._args)
            self.ns.append(time.perf_counter_ns() - start)

    def help(self) -> None:
        """What a helper does, unless it comes too late."""
        with self._gate:
            if self._closed:
                return
            self._inside += 1
        try:
            self.work()
        except BaseException as error:  # raised by the caller
            self._left.clear()
            self.error = error
        finally:
            with self._gate:
                self._inside -= 1
            self._leaving.put(None)

    def close(self) -> None:
        """Let nobody begin any more and wait for those who have, also when interrupted (Ctrl-C): they write to the caller's arrays."""
        interrupt: BaseException | None = None
        while not self._closed or self._inside:
            try:
                with self._gate:
                    self._left.clear()
                    self._closed = True
                while self._inside:
                    self._leaving.get(timeout=1.0)
            except Empty:
                continue
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


class _Helped(Protocol):
    """What helpers take part in."""

    def help(self) -> None:
        """Called by a helper, maybe too late."""


class _Helpers:
    """Threads that wait for jobs; started when first needed, gone in a forked child, which starts its own."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, without threads."""
        self._jobs: SimpleQueue[_Helped] = SimpleQueue()
        self._lock = threading.Lock()
        self._n = 0

    def offer(self, job: _Helped, n: int) -> None:
        """Ask `n` helpers to take part; fewer come where the system grants no more threads."""
        if self._n < n:
            self._start(n)
        for _ in range(min(n, self._n)):
            self._jobs.put(job)

    def _start(self, n: int) -> None:
        with self._lock:
            while self._n < n:
                thread = threading.Thread(target=_help, args=(self._jobs,), name=f"wse-kernels-{self._n + 1}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # too many threads, or the interpreter is about to end
                    return
                self._n += 1


def _help(jobs: SimpleQueue[_Helped]) -> None:
    while True:
        jobs.get().help()


_helpers = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.forget)

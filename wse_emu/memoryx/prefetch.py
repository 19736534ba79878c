"""Bounded prefetch: while one group of weights is used, one thread makes the next one resident."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import TracebackType

from wse_emu.foundation.errors import SpecError, StoreError
from wse_emu.memoryx.store import WeightStore

_Job = tuple[tuple[str, ...], "Future[None]"]


class LayerStream:
    """Weights of one group (a layer, or some of its experts) at a time, with the next group prepared in the background.

    Results never depend on `depth`: it only moves the moment at which pages become resident.

    Parameters
    ----------
    store : WeightStore
        Its ``prepare`` is called from this stream's thread.
    depth : int
        Groups that may be prepared and not yet used; 0 starts no thread.
    behind : callable, optional
        ``behind(function, *args)`` calls a function when what was asked of the group's readers is done; by default at once.

    Raises
    ------
    SpecError
        If `depth` is not a non-negative integer.
    """

    def __init__(self, store: WeightStore, *, depth: int = 1, behind: Callable[..., None] | None = None) -> None:
        if type(depth) is not int or depth < 0:
            raise SpecError(f"`depth` (prefetch) must be a non-negative integer, got {depth!r}")
        self._store = store
        self._depth = depth
        self._behind = behind
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending: dict[tuple[str, ...], Future[None]] = {}
        self._thread: threading.Thread | None = None
        self._open = False

    def __enter__(self) -> LayerStream:
        if self._open:
            raise StoreError(f"{self._store.name}: this LayerStream is in use already")
        self._open = True
        if self._depth:
            self._thread = threading.Thread(target=_prepare_jobs, args=(self._store, self._jobs), name="memoryx-prefetch", daemon=True)
            # A stream that nobody leaves (Ctrl-C may fall between the end of its block and `__exit__`) ends its thread all the same.
            self._end = weakref.finalize(self, self._jobs.put, None)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        for future in self._pending.values():
            future.cancel()
        if self._thread is not None:
            self._end()
            self._thread.join()
            self._thread = None
        # Groups that were prepared and never used: a failure there concerns no result.
        for names, future in self._pending.items():
            if not future.cancelled():
                with suppress(StoreError):
                    self._store.drop(names)
        self._pending.clear()

    def schedule(self, names: Sequence[str]) -> bool:
        """Ask for a group in the background.

        False if `depth` groups are pending already, or there is nothing to wait for; it is then prepared when it is used.
        """
        key = tuple(names)
        if not key or key in self._pending or not self._prefetching or len(self._pending) >= self._depth or self._store.is_ready(key):
            return False
        future: Future[None] = Future()
        self._pending[key] = future
        self._jobs.put((key, future))
        return True

    @contextmanager
    def layer(self, names: Sequence[str], then: Sequence[str] = ()) -> Iterator[None]:
        """Hold a group of weights resident while the body runs.

        Parameters
        ----------
        names : sequence of str
            Waited for, whether or not they were scheduled; dropped on leaving, or `behind` that, except what a scheduled group needs again.
        then : sequence of str
            The group after this one; prepared in the background while the body runs.

        Raises
        ------
        StoreError
            If the stream is not entered, or whatever the preparation of `names` raised.
        """
        if not self._open:
            raise StoreError(f"{self._store.name}: a LayerStream is used inside `with`")
        key = tuple(names)
        future = self._pending.pop(key, None)
        if future is None or not self._wait(future):
            self._store.prepare(key)
        self.schedule(then)
        try:
            yield
        finally:
            if self._behind is None:
                self._let_go(key)
            else:
                self._behind(self._let_go, key)

    def _let_go(self, key: tuple[str, ...]) -> None:
        again = set().union(*self._pending)
        self._store.drop([n for n in key if n not in again] if again else key)

    @property
    def _prefetching(self) -> bool:
        """Whether there is a thread: a forked child has the stream, but not its thread, and prepares every group when it is used."""
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, future: Future[None]) -> bool:
        """Wait until the thread has prepared a group; False if there is no thread that could."""
        while not future.done():
            if not self._prefetching:
                return False
            wait([future], timeout=1.0)
        future.result()
        return True


def _prepare_jobs(store: WeightStore, jobs: SimpleQueue[_Job | None]) -> None:
    """Body of the thread: prepare groups in order until None comes."""
    while (job := jobs.get()) is not None:
        names, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            store.prepare(names)
        except BaseException as e:  # handed to whoever waits for the group
            future.set_exception(e)
        else:
            future.set_result(None)

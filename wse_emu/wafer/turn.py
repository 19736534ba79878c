"""Whose turn it is on a wafer: one thread at a time, and one program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

from wse_emu.foundation.errors import BusyError, ForkError
from wse_emu.foundation.forks import note_forks

F = TypeVar("F", bound=Callable[..., Any])


class Turn:
    """One thread at a time; others wait. A thread may take its turn again inside of it, but not start a second program."""

    def __init__(self) -> None:
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self._program = threading.Lock()
        note_forks(self)

    @contextmanager
    def program(self, name: str) -> Iterator[None]:
        """Hold the turn for a whole program, from its first allocation to its last.

        Raises
        ------
        BusyError
            If this thread is inside of a program already: a callback started it.
        """
        with self.lock:
            if self._program.locked():
                raise BusyError(
                    f"{name} was called by a callback of a run that is not finished, on the same wafer; "
                    f"keep what it needs and call it after the run, or give it a model on a wafer of its own"
                )
            with self._program:
                yield

    def after_fork(self) -> None:
        """Refuse every turn from now on if a thread of the parent, which did not come along, was in the middle of one."""
        lock: Any = self.lock
        if lock.acquire(blocking=False):
            lock.release()
        else:
            self.lock = _Lost()


class _Lost:
    """Lock of a thread that does not exist in this process."""

    def acquire(self, *, blocking: bool) -> bool:
        """Never possible."""
        return False

    def __enter__(self) -> NoReturn:
        raise ForkError(
            "this process was forked while another thread ran on the wafer, and half a run lies on it; "
            "make the model anew in the child, fork from the thread that runs, or start processes with 'spawn' or 'forkserver'"
        )

    def __exit__(self, *error: object) -> None:
        """Never entered."""


def in_turn(method: F) -> F:
    """Let one thread at a time run a method of what has a `turn`."""

    @wraps(method)
    def alone(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
        with owner.turn.lock:
            return method(owner, *args, **kwargs)

    return cast(F, alone)

"""Arithmetic of a wafer that is not done: a driver call that helper threads are at, and what comes behind it, in order.

A program on the wafer decides little by the numbers it computes: which experts were chosen, which token comes next. Everything else (what
is reserved, moved and written down) follows from shapes. So the program goes on while its numbers are still being computed, and what it
asks for meanwhile waits in line; whoever looks at a number first has everything computed that was asked for before. Results and ledger are
those of a program that waits each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from wse_emu.foundation.errors import ForkError
from wse_emu.foundation.forks import note_forks
from wse_emu.wafer.turn import Turn
from wse_kernels.threads import Driver, Unfinished

MOST = 64
"""Calls that may wait in line: each holds on to the buffers it works on."""


class _Next(NamedTuple):
    """One call in line."""

    call: Callable[[], None]
    is_driver: bool


class Pending:
    """What a wafer was asked to compute and has not computed yet.

    `PlacedTensor.data` and all that reads or writes by it wait for that; only who hands `PlacedTensor.unsettled` to `run` or `behind` does
    not. A thread that looks at a tensor while another one runs waits for its turn.

    Parameters
    ----------
    turn : Turn
        The wafer's.
    """

    __slots__ = ("__weakref__", "_call", "_line", "_lost", "_turn", "check")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.check: Callable[[], None] | None = None
        """Called before drivers in line go on, and again when something else came between: raises if what they read is gone."""
        self._call: Unfinished | None = None
        """What helpers are at."""
        self._line: deque[_Next] = deque()
        """What comes after it; empty without it."""
        self._lost = False
        note_forks(self)

    @property
    def is_empty(self) -> bool:
        """Whether everything is done."""
        return self._call is None

    def run(self, driver: Driver, units: int, *args: Any) -> None:
        """Call a driver after all that was asked for before: now, or in its turn while helpers are at something else."""
        if self._call is not None:
            if not self._call.is_done and len(self._line) < MOST:
                self._line.append(_Next(partial(driver, units, *args), True))
                return
            self.finish()
        self._call = driver.begin(units, *args)

    def behind(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function after all that was asked for before."""
        if self._call is None:
            function(*args)
        else:
            self._line.append(_Next(partial(function, *args), False))

    def now(self, function: Callable[..., None], *args: Any) -> None:
        """Have everything computed, then call a function, whatever comes of the first."""
        try:
            self.finish()
        finally:
            function(*args)

    def finish(self) -> None:
        """Have everything computed.

        Raises
        ------
        ForkError
            In a child that was forked while helpers, which do not exist there, were at work.
        """
        if self._call is not None:
            with self._turn.lock:
                self._finish()

    def _finish(self) -> None:
        if self._call is None:  # another thread was at it
            return
        if self._lost:
            raise ForkError(
                "this process was forked in the middle of a computation on the wafer, whose threads stayed in the parent; "
                "make the model anew in the child, or fork between runs"
            )
        self._call.finish()
        something_else = True
        while self._line:
            call, is_driver = self._line[0]
            if is_driver and something_else and self.check is not None:
                self.check()
            self._line.popleft()
            something_else = not is_driver
            call()
        self._call = None

    def abandon(self) -> None:
        """Nobody wants the numbers any more: wait for the helpers, compute nothing, and do what else is in line, whatever comes of it."""
        if self._call is None or self._lost:
            return
        with suppress(Exception):  # of memory, say: whatever comes of it
            self._call.finish()
        while self._line:
            call, is_driver = self._line.popleft()
            if not is_driver:
                with suppress(Exception):
                    call()
        self._call = None

    def after_fork(self) -> None:
        """Note whether there is something that nobody will finish."""
        self._lost = self._call is not None and not self._call.is_done

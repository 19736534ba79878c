"""Ctrl-C at the n-th moment at which Python looks for signals."""

from __future__ import annotations

import gc
import os
import sys
from types import FrameType
from typing import Any

_HERE = os.path.dirname(__file__)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th point inside the ``with`` block; without n it only counts.

    Points are where the interpreter handles signals: a Python function (or generator) begins to run, or a C function has returned. Only
    those of this thread count, and none in the tests themselves, so the number is the same in every run.
    """

    def __init__(self, at: int | None = None) -> None:
        self.points = 0
        self.where = ""
        self._at = at

    def __enter__(self) -> Interrupt:
        self._before = sys.getprofile()
        gc.disable()  # what it finalizes has points of its own, now here, now there
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)
        gc.enable()

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_return") or os.path.dirname(frame.f_code.co_filename) == _HERE:
            return
        self.points += 1
        if self.points == self._at:
            sys.setprofile(None)
            self.where = f"point {self.points}: {event} in {frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
            raise KeyboardInterrupt


def spread(n_points: int, n: int, dense: int = 0) -> list[int]:
    """`n` of the points 1 to `n_points`, evenly spread, and the first and last `dense` ones."""
    ends = {*range(1, min(dense, n_points) + 1), *range(max(1, n_points - dense + 1), n_points + 1)}
    return sorted(ends | {1 + i * n_points // n for i in range(n)})

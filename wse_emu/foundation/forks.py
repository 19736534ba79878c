"""What a forked child must put right: locks whose holders are threads of the parent."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Something that holds locks."""

    def after_fork(self) -> None:
        """Called in a forked child, in its only thread, before anything else runs there."""


_alive: WeakSet[Forked] = WeakSet()


def note_forks(holder: Forked) -> None:
    """Have ``holder.after_fork()`` called in every child that is forked while `holder` lives."""
    _alive.add(holder)


def _after_fork() -> None:
    for holder in list(_alive):
        holder.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

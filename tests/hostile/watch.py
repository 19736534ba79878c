"""A guard around one case: what is opened, what is left behind, how long it takes and how much memory it asks for."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wse_emu
import wse_kernels
from wse_kernels import _cache as kernel_cache

SECONDS = 60
"""For one call; a thousand times what it takes, for machines that are busy."""
MORE_BYTES = 1 << 30
"""Address space that a case may ask for beyond what the process has."""

_opened: list[str | bytes] | None = None
"""Files that were opened, links followed as they were at that moment."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        path, flags = arguments[0], arguments[2]
        if flags & getattr(os, "O_NOFOLLOW", 0):  # the system refuses a link there
            folder, name = os.path.split(os.path.abspath(path))
            _opened.append(os.path.join(os.path.realpath(folder), name))
        else:
            _opened.append(os.path.realpath(path))


sys.addaudithook(_hook)


class TimeIsUpError(BaseException):
    """The call took too long."""


def own_files() -> tuple[str, ...]:
    """Where the interpreter, the packages and the kernels' cache lie: opened whenever a module is first used."""
    packages = [Path(m.__file__).parent for m in (wse_emu, wse_kernels) if m.__file__ is not None]
    found = [sys.prefix, sys.base_prefix, *packages, kernel_cache.kernels_root(), Path(os.__file__).parent, "/proc", "/sys", "/dev/null"]
    return tuple(os.path.realpath(p) for p in found)


def listing(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every entry below `root`, with its kind, size and time."""
    found: dict[str, tuple[int, int, int]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            found[path] = (info.st_mode, info.st_size if name not in folders else 0, 0 if name in folders else info.st_mtime_ns)
    return found


def _late(*_: object) -> None:
    raise TimeIsUpError


@contextmanager
def watched_opens(root: Path) -> Iterator[None]:
    """Guard the body: it may read below `root`, not in ``root/outside``, in bounded time and memory.

    Raises
    ------
    AssertionError
        Naming what was opened elsewhere.
    TimeIsUpError
        If the body takes longer than `SECONDS`.
    """
    global _opened
    with open("/proc/self/statm") as f:
        has = int(f.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, _late)
    allowed, opened = (*own_files(), os.path.realpath(root)), []
    _opened = opened
    try:
        resource.setrlimit(resource.RLIMIT_AS, (has + MORE_BYTES, limits[1]))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _opened = None
    outside = os.path.realpath(root / "outside")
    for path in map(os.fsdecode, opened):
        assert path.startswith(allowed), f"opened outside of the directory: {path}"
        assert not path.startswith(outside), f"opened through a link: {path}"


@contextmanager
def watched(root: Path, cache: Path) -> Iterator[None]:
    """Guard the body as `watched_opens` does; it may write nothing below `root` but finished files in `cache`.

    Raises
    ------
    AssertionError
        Naming what was opened elsewhere, changed or left behind.
    """
    before = listing(root)
    with watched_opens(root):
        yield
    after = listing(root)
    made = {p for p in after.keys() - before.keys() if not (Path(p).parent == cache and p.endswith(".wsew"))} - {str(cache)}
    assert not made, f"left behind: {sorted(made)}"
    assert not before.keys() - after.keys(), f"removed: {sorted(before.keys() - after.keys())}"
    changed = [p for p in before if before[p] != after[p] and not (Path(p).parent == cache and p.endswith(".wsew"))]
    assert not changed, f"changed: {changed}"

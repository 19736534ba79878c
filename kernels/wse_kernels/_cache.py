"""Where compiled kernels rest on disk: stamps, private folders, whole files. Knows bytes only; imports no Numba.

``<base>/kernels/<stamp>/<function>-<key>.nbc`` holds one compiled function for one signature on one kind of CPU. The stamp is a hash of
all sources of `wse_kernels` and of the versions that produce the code, so that a change in any helper leads to another folder. There is no
index file: two processes that compile the same function write the same name, each whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ENV_CACHE_DIR = "WSE_EMU_CACHE_DIR"
"""Environment variable that names the base folder of all caches of the project."""

_MAGIC = b"wse-kernel-1\n"
_STAMP = re.compile(r"[0-9a-f]{24}")
_SUFFIX = ".nbc"
_PARTIAL = ".part"

Snapshot = dict[str, tuple[int, int]]
"""Source file to (modification time in ns, bytes)."""


class CacheEntry(NamedTuple):
    """One folder of compiled kernels."""

    stamp: str
    path: Path
    n_files: int
    size_bytes: int
    is_current: bool
    """Whether this installation uses it; the others belong to other versions or to edited sources."""


def cache_base() -> Path:
    """Return the base folder of the project's caches; it may not exist.

    The environment variable ``WSE_EMU_CACHE_DIR`` if set, else ``wse-emu`` in the user's cache folder (``XDG_CACHE_HOME``, by default
    ``~/.cache``; ``LOCALAPPDATA`` on Windows).
    """
    explicit = os.environ.get(ENV_CACHE_DIR)
    if explicit:
        return Path(explicit).expanduser().absolute()
    parent = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and to be ignored.
    return (Path(parent) if os.path.isabs(parent) else Path.home() / ".cache") / "wse-emu"


def kernels_root() -> Path:
    """Return the folder that holds one folder per stamp."""
    return cache_base() / "kernels"


def snapshot(package: Path) -> Snapshot:
    """Return modification time and size of every source file below `package`."""
    found: Snapshot = {}
    for folder, _, files in os.walk(package):
        for name in files:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                info = os.stat(path)
                found[path] = (info.st_mtime_ns, info.st_size)
    return found


def hash_sources(package: Path) -> str:
    """Return the SHA-256 of every source file below `package`, names included."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        body = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.hexdigest()


def kernels_stamp(sources: str | None = None) -> str:
    """Return the stamp of this installation: `sources` of `wse_kernels` (their hash, if known) and what turns them into code."""
    versions = (sys.version_info[:3], sys.implementation.cache_tag, version("numba"), version("llvmlite"), version("numpy"))
    return hashlib.sha256(f"{sources or hash_sources(Path(__file__).parent)}{versions!r}".encode()).hexdigest()[:24]


def make_private(folder: Path) -> bool:
    """Make `folder` (mode 0700) where missing; return whether it is a folder that only this user can write."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return is_private(folder)


def is_private(folder: Path) -> bool:
    """Return whether `folder` is a real folder, owned by this user and writable by nobody else."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and _is_ours(info)


def _is_ours(info: os.stat_result) -> bool:
    if sys.platform == "win32":
        return True  # the user's profile folder carries its own access list; there are no owner and mode bits to ask
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read_entry(path: Path) -> bytes | None:
    """Return the payload of a cache file, or None where it is missing, torn, or not this user's own."""
    if not is_private(path.parent):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(file.fileno())
            if not (stat.S_ISREG(info.st_mode) and _is_ours(info)):
                return None
            data = file.read()
    except OSError:
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    payload = data[head:]
    return payload if data[:head] == _MAGIC + hashlib.sha256(payload).digest() else None


def write_entry(path: Path, payload: bytes) -> bool:
    """Write a cache file whole or not at all; return whether it was written."""
    if not (make_private(path.parent.parent) and make_private(path.parent)):
        return False
    partial = path.with_name(f"{os.getpid()}-{uuid.uuid4().hex}{_PARTIAL}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(payload).digest() + payload)
        os.replace(partial, path)
    except OSError:
        return False
    finally:
        try:  # nothing that a second Ctrl-C could stop before it begins
            os.unlink(partial)
        except OSError:
            pass
    return True


def cache_entries() -> list[CacheEntry]:
    """List the folders of compiled kernels, the current one first, then by stamp."""
    root = kernels_root()
    current = kernels_stamp()
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if _STAMP.fullmatch(folder.name) and is_private(folder):
            sizes = [path.stat().st_size for path in _cache_files(folder)]
            found.append(CacheEntry(folder.name, folder, len(sizes), sum(sizes), folder.name == current))
    return sorted(found, key=lambda entry: (not entry.is_current, entry.stamp))


def clear_cache(*, keep_current: bool = False) -> list[CacheEntry]:
    """Remove folders of compiled kernels and return what was removed.

    Parameters
    ----------
    keep_current : bool
        Leave the folder that this installation uses.

    Raises
    ------
    OSError
        If a file cannot be removed. Only files that the cache wrote are touched; a folder that holds anything else stays.
    """
    removed = []
    for entry in cache_entries():
        if keep_current and entry.is_current:
            continue
        for path in _cache_files(entry.path):
            path.unlink(missing_ok=True)
        if not any(entry.path.iterdir()):
            entry.path.rmdir()
        removed.append(entry)
    return removed


def _cache_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (_SUFFIX, _PARTIAL)]


def entry_name(function: str, key: str) -> str:
    """Return the file name for a function (its dotted name) and the text that identifies this compilation of it."""
    readable = re.sub(r"[^A-Za-z0-9_.]", "_", function)[-80:]
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{_SUFFIX}"

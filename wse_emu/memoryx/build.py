"""Layout files in the cache directory: made once per checkpoint, found again by fingerprint, listed and removed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

from wse_emu.checkpoint import Checkpoint
from wse_emu.foundation.arguments import check_path
from wse_emu.foundation.errors import StoreError
from wse_emu.memoryx.layout import LAYOUT_VERSION, Layout, variant
from wse_emu.memoryx.mapped import (
    RESIDENT_BYTES,
    FilePlan,
    MappedStore,
    Progress,
    check_resident_bytes,
    plan_file,
    read_header,
    seal_now,
    sealed_ns,
)
from wse_kernels._cache import make_private

CACHE_ENV = "WSE_EMU_CACHE_DIR"
SUFFIX = ".wsew"
_PART = ".part"
_STALE_SECONDS = 24 * 3600
_WAY_OUT = f"choose another directory with `cache_dir` or the environment variable {CACHE_ENV}"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One file of the weight cache."""

    path: Path
    nbytes: int
    source: str
    """Name of the checkpoint, or why the file is not usable."""
    modified: float
    """Seconds since the epoch."""


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Directory of the layout files: ``weights`` in `cache_dir`, else in $WSE_EMU_CACHE_DIR, else in ``wse-emu`` of the user's cache.

    Parameters
    ----------
    cache_dir : str or path, optional

    Returns
    -------
    Path
        Absolute; it need not exist.
    """
    if cache_dir is not None:
        root = check_path("cache_dir", cache_dir, StoreError)
    elif os.environ.get(CACHE_ENV):
        root = Path(os.environ[CACHE_ENV])
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        root = (Path(xdg) if os.path.isabs(xdg) else Path("~/.cache")) / "wse-emu"
    try:
        return root.expanduser().absolute() / "weights"
    except RuntimeError as e:
        raise StoreError(f"{root}: there is no home directory; {_WAY_OUT}") from e


def open_store(
    checkpoint: Checkpoint,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    resident_bytes: int = RESIDENT_BYTES,
) -> MappedStore:
    """Mapped store of a checkpoint; its layout file is made first if it is not there or is damaged.

    Parameters
    ----------
    checkpoint : Checkpoint
        Not needed any more afterwards.
    cache_dir : str or path, optional
        See `cache_directory`.
    progress : callable, optional
        Called with bytes written and bytes in all, while the file is made; never called if it is there.
    verify : bool
        Check every tensor of a file that is there even if its seal is whole; reads it whole.
    resident_bytes : int
        Mapped pages that may stay in the process behind the layer; see `MappedStore`.

    Returns
    -------
    MappedStore
        Of a file whose header, size and seal were verified at this opening, and every tensor when it was made and whenever it was written
        to since.

    Raises
    ------
    StoreError
        If the cache directory cannot be made or written, is not the user's own or has too little space; the message names the way out.
    CheckpointError
        If a weight is not finite.
    """
    check_resident_bytes(resident_bytes)
    folder = cache_directory(cache_dir)
    plan = plan_file(checkpoint.spec, fingerprint=checkpoint.tensors.fingerprint + variant(checkpoint.spec), source=checkpoint.name)
    path = folder / _file_name(checkpoint.name, plan)
    _check_private(folder)
    if os.path.lexists(path):
        # What is damaged is made again.
        with contextlib.suppress(StoreError):
            return _open_checked(path, plan, checkpoint, verify, resident_bytes)
    _build(checkpoint, plan, path, progress)
    return MappedStore(path, plan, checkpoint.spec, checkpoint.name, resident_bytes=resident_bytes)


def _open_checked(path: Path, plan: FilePlan, checkpoint: Checkpoint, verify: bool, resident_bytes: int) -> MappedStore:
    store = MappedStore(path, plan, checkpoint.spec, checkpoint.name, resident_bytes=resident_bytes)
    if verify or not store.is_sealed:
        try:
            store.seal()
        except BaseException:
            store.close()
            raise
    return store


def _check_private(folder: Path) -> None:
    """Refuse a directory that somebody else may write; one that is not there is made, or refused by whoever makes files in it."""
    if os.path.lexists(folder) and not make_private(folder):
        rule = "must be a directory (no link) that belongs to you and that nobody else may write (mode 700)"
        raise StoreError(f"{folder}: {rule}, for others could change weights there; {_WAY_OUT}")


def _file_name(name: str, plan: FilePlan) -> str:
    """Readable part, then a key of everything the bytes depend on."""
    shapes = ";".join(f"{p.weight.name}:{p.weight.shape}" for p in plan.placed)
    key = hashlib.sha256(f"{LAYOUT_VERSION}|{plan.fingerprint}|{shapes}".encode()).hexdigest()[:24]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "model"
    return f"{slug}-{key}{SUFFIX}"


def _build(checkpoint: Checkpoint, plan: FilePlan, path: Path, progress: Progress | None) -> None:
    """Write the layout file beside its final name, verify it and put it in place in one step."""
    # A name of its own for each attempt: two processes that build the same file do not meet, and the later replaces an equal one.
    part = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{_PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_private(path.parent)
        _remove_stale(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < plan.file_bytes:
            need = f"the layout file of {checkpoint.name} needs {plan.file_bytes} bytes, {free} are free"
            raise StoreError(f"{path.parent}: {need}; {_WAY_OUT}")
        _write(checkpoint, plan, part, progress)
        _open_checked(part, plan, checkpoint, True, 0).close()
        os.replace(part, path)
    except StoreError:
        raise
    except OSError as e:
        raise StoreError(f"{path}: the layout file of {checkpoint.name} cannot be written: {e.strerror or e}; {_WAY_OUT}") from e
    finally:
        try:  # nothing that a second Ctrl-C could stop before it begins
            os.unlink(part)
        except OSError:
            pass


def _write(checkpoint: Checkpoint, plan: FilePlan, part: Path, progress: Progress | None) -> None:
    if sys.byteorder != "little":
        raise StoreError(f"{part.parent}: layout files are little-endian, this machine is not")
    layout = Layout(checkpoint.tensors, checkpoint.spec, checkpoint.name)
    total = sum(p.nbytes for p in plan.placed)
    checksums: list[int] = []
    done = 0
    with open(part, "xb", opener=_private) as f:
        for placed in plan.placed:
            f.seek(placed.offset)
            crc = 0
            for chunk in layout.chunks(placed.weight):
                data = chunk.data.cast("B")
                crc = zlib.crc32(data, crc)
                f.write(data)
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)
            checksums.append(crc)
        f.truncate(plan.file_bytes)
        seal = seal_now()
        f.seek(0)
        f.write(plan.header(checksums, seal))
        f.flush()
        os.fsync(f.fileno())
    os.utime(part, ns=(time.time_ns(), sealed_ns(seal)))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_stale(folder: Path) -> None:
    """Remove what builds left that were killed; a build that runs has touched its file lately."""
    for part in folder.glob(f"*{_PART}"):
        try:
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()
        except OSError:
            continue


def cache_entries(cache_dir: str | os.PathLike[str] | None = None) -> list[CacheEntry]:
    """Layout files of the cache, unfinished ones included, by name.

    Parameters
    ----------
    cache_dir : str or path, optional
        See `cache_directory`.

    Raises
    ------
    StoreError
        If the directory is there but cannot be read.
    """
    folder = cache_directory(cache_dir)
    entries: list[CacheEntry] = []
    try:
        for path in sorted(folder.iterdir()):
            if not path.name.endswith((SUFFIX, _PART)) or not path.is_file():
                continue
            try:
                info = path.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            entries.append(CacheEntry(path, info.st_size, _source_of(path), info.st_mtime))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise StoreError(f"{folder}: cannot be read: {e.strerror or e}; {_WAY_OUT}") from e
    return entries


def _source_of(path: Path) -> str:
    if path.name.endswith(_PART):
        return "unfinished"
    try:
        with open(path, "rb") as f:
            return str(read_header(f, path)[0].get("source"))
    except OSError:
        return "damaged"


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove every layout file of the cache; stores that are open keep working where the system allows it.

    Parameters
    ----------
    cache_dir : str or path, optional
        See `cache_directory`.

    Returns
    -------
    int
        Bytes removed.

    Raises
    ------
    StoreError
        If a file cannot be removed.
    """
    removed = 0
    for entry in cache_entries(cache_dir):
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as e:
            raise StoreError(f"{entry.path}: cannot be removed: {e.strerror or e}") from e
        removed += entry.nbytes
    return removed

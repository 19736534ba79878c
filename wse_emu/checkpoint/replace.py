"""A directory that appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wse_emu.foundation.errors import SaveError, WseError

_SHOWN = 4


@contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool, replaceable: Callable[[str], bool]) -> Iterator[Path]:
    """Give a directory to write in; on leaving it takes the name `path`, after an error or Ctrl-C it is gone and `path` is as before.

    Parameters
    ----------
    path : str or path
        Parents are made. It lies on the same file system as what is written.
    overwrite : bool
        Whether a directory of that name that is not empty may go. For an instant between two renames neither then has the name.
    replaceable : callable
        Takes the name of an entry of that directory and tells whether it may go.

    Yields
    ------
    Path
        Beside `path`, under a hidden name.

    Raises
    ------
    SaveError
        Before anything is written, if `path` is no directory, is not empty without `overwrite`, holds what may not go or is the working
        directory; afterwards, if the file system refuses.
    """
    target, part = Path(path), None
    try:
        target = target.resolve()
        _check(target, overwrite, replaceable)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
        part.mkdir()
        yield part
        _put(part, target)
    except WseError:
        raise
    except OSError as e:
        raise SaveError(f"{target}: cannot be written: {e.strerror or e}; nothing was saved") from e
    finally:
        if part is not None:
            try:
                _clean(part, target)
            except KeyboardInterrupt:  # nor does Ctrl-C just now
                _clean(part, target)
                raise


def _check(target: Path, overwrite: bool, replaceable: Callable[[str], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise SaveError(f"{target}: is there and not a directory; choose another name")
    if target.samefile(os.curdir):
        raise SaveError(f"{target}: is the working directory, which cannot be replaced; name a directory below it or elsewhere")
    names = sorted(entry.name for entry in os.scandir(target))
    if names and not overwrite:
        raise SaveError(f"{target}: is not empty; choose another directory, or `overwrite=True` to replace what it holds")
    others = [name for name in names if not replaceable(name) or not (target / name).is_file()]
    if others:
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise SaveError(f"{target}: holds {shown}, which would be lost and is no part of a checkpoint; choose another directory")


def _put(part: Path, target: Path) -> None:
    """Give `part` the name `target`; what had it waits under another name for `_clean`."""
    if target.exists():
        shutil.copymode(target, part)
        os.rename(target, _old(part))
    os.rename(part, target)


def _old(part: Path) -> Path:
    return part.with_suffix(".old")


def _clean(part: Path, target: Path) -> None:
    """Remove what is left of our own; a target that was moved away and not replaced gets its name back."""
    old = _old(part)
    if old.exists() and not target.exists():
        os.rename(old, target)
    for folder in (old, part):  # they hold files alone
        with suppress(OSError):
            for name in os.listdir(folder):
                os.unlink(folder / name)
            os.rmdir(folder)

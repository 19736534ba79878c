"""A text file that appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: str | os.PathLike[str], *, errors: str = "strict") -> Iterator[TextIO]:
    """Give a text file (UTF-8) to write to; on leaving it takes the name `path`, after an error or Ctrl-C `path` is as before.

    Parameters
    ----------
    path : str or path
        Replaced if it is a file. Devices and pipes (``/dev/stdout``) are written to as they are.
    errors : str
        What becomes of characters that UTF-8 has not; as for `open`.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    given = os.path.abspath(path)
    if given.startswith(("/dev/", "/proc/")) or (os.path.exists(given) and not os.path.isfile(given)):
        with open(given, "w", encoding="utf-8", errors=errors) as file:
            yield file
        return
    target = Path(os.path.realpath(given))
    part = target.with_name(f".{target.name[:100]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "x", encoding="utf-8", errors=errors) as file:
            yield file
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        try:  # nothing that a second Ctrl-C could stop before it begins
            os.unlink(part)
        except OSError:
            pass

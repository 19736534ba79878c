"""Files that options name to be written: refused before anything runs, named when they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wse_emu.foundation.errors import StoreError


def check_output_file(option: str, file: Path) -> None:
    """Refuse, before anything runs, a file that may not be written, whose folder is not there or that is a folder itself.

    Raises
    ------
    StoreError
        Saying which.
    """
    if file.is_dir():
        raise StoreError(f"{option} {file}: cannot be written (Is a directory)")
    if not file.absolute().parent.is_dir():
        raise StoreError(f"{option} {file}: cannot be written (there is no directory {file.absolute().parent})")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise StoreError(f"{option} {file}: cannot be written (Permission denied)")


@contextmanager
def writing(option: str, file: Path) -> Iterator[None]:
    """Name the option of a file that the block cannot write.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    try:
        yield
    except OSError as e:
        raise StoreError(f"{option} {file}: cannot be written ({e.strerror or e})") from e

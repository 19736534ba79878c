"""Files that nobody vouches for, opened safely: regular ones only, no link out of the directory, and no change that goes unseen."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from pathlib import Path
from typing import Any

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import CheckpointError, ConfigError

Named = type[ConfigError] | type[CheckpointError]
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_HASH_BYTES = 1 << 20


class OpenFile:
    """One regular file, held open by descriptor and read in bounded pieces; never mapped, for a mapped file that shrinks kills its reader.

    Parameters
    ----------
    path : Path
        A file, or a link to one in the same directory or in the ``blobs`` of the Hugging Face cache whose snapshot that directory is.
    error : type
        What to raise.

    Raises
    ------
    FileNotFoundError
        If there is nothing of that name.
    ConfigError or CheckpointError
        If it is anything else, leads out of the directory or cannot be opened.
    """

    def __init__(self, path: Path, error: Named) -> None:
        self.path = path
        self._error = error
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not any(real.is_relative_to(home) for home in _homes(path.parent)):
                rule = "only files of its own directory are read; put a copy there in the place of the link"
                raise error(f"{path}: leads to {real}, outside of the checkpoint's directory; {rule}")
            if not stat.S_ISREG(os.stat(real).st_mode):  # before opening: that of a device may do something
                raise error(f"{path}: not a regular file")
            fd = os.open(real, _FLAGS)
        except FileNotFoundError:
            if os.path.islink(path):
                raise error(f"{path}: a link to nothing: {os.readlink(path)}; download the file again") from None
            raise
        except OSError as e:
            name = show(str(path)) if e.errno == errno.ENAMETOOLONG else path
            raise error(f"{name}: cannot be opened: {os.strerror(e.errno) if e.errno else e}") from e
        self._fd = fd
        self._finalizer = weakref.finalize(self, os.close, fd)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise error(f"{path}: not a regular file")
        self.n_bytes = info.st_size
        self.stat_key = f"{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}:{info.st_ino}"
        self._written = info.st_mtime_ns

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes from a position of the file.

        Raises
        ------
        ConfigError or CheckpointError
            If the file ends before, cannot be read, or is not the one any more that was opened.
        """
        done = 0
        while done < buffer.nbytes:
            try:
                n = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise self._error(f"{self.path}: cannot be read: {os.strerror(e.errno) if e.errno else e}") from e
            if n == 0:
                break
            done += n
        info = os.fstat(self._fd)
        if done < buffer.nbytes or (info.st_size, info.st_mtime_ns) != (self.n_bytes, self._written):
            raise self._error(f"{self.path}: changed while it was read; wait until it is written and open it again")

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Bytes at a position; raises as `read_into` does."""
        buffer = bytearray(n_bytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def hash_into(self, digest: Any) -> None:
        """Feed the whole file to a hashlib object; raises as `read_into` does."""
        buffer = memoryview(bytearray(min(_HASH_BYTES, self.n_bytes)))
        for offset in range(0, self.n_bytes, _HASH_BYTES):
            part = buffer[: min(_HASH_BYTES, self.n_bytes - offset)]
            self.read_into(part, offset)
            digest.update(part)

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        self._finalizer()


def _homes(directory: Path) -> list[Path]:
    """Directories in which the files of a checkpoint may lie: its own, and the blobs beside the snapshots of a Hugging Face cache."""
    own = Path(os.path.realpath(directory))
    return [own, *(parent.parent / "blobs" for parent in own.parents if parent.name == "snapshots")]


def read_bytes(path: Path, *, limit: int, error: Named) -> bytes | None:
    """Content of a file of at most ``limit`` bytes, None if there is none of that name; opened and read as `OpenFile` says."""
    try:
        file = OpenFile(path, error)
    except FileNotFoundError:
        return None
    try:
        if file.n_bytes > limit:
            raise error(f"{path}: {file.n_bytes} bytes, at most {limit} are allowed for this file")
        return file.read(0, file.n_bytes)
    finally:
        file.close()

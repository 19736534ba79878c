"""The layout file: one checkpoint in the wafer layout, checksummed, and the store that maps it.

File: magic (8 bytes), length of the JSON header (8, little-endian), CRC-32 of the header (4), seal (4), JSON header, zeros up to
``data_start``; then every tensor at an offset that is a multiple of 4,096, float32 little-endian. The header lists name, shape, offset and
CRC-32 of each tensor. The seal is the file's own modification time, set when it was finished (in units of `SEAL_SECONDS`): a file that was
written to afterwards has another one, and every checksum is verified before it is used.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import sys
import threading
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import StoreError
from wse_emu.foundation.forks import note_forks
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import WeightShape, all_weights
from wse_emu.memoryx.layout import LAYOUT_VERSION
from wse_emu.memoryx.store import Tensors

MAGIC = b"WSEMEMX2"
ALIGN = 4096
_PREFIX = 24
_MAX_HEADER_BYTES = 256 << 20
_CHECK_BYTES = 16 << 20
SEAL_SECONDS = 2
"""Unit of the seal: a time that every file system can hold."""
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one tensor lies in the layout file."""

    weight: WeightShape
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return 4 * self.weight.size


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Layout of the file for one model: known before any weight is read."""

    fingerprint: str
    """Of the checkpoint's tensors."""
    source: str
    """The checkpoint's name, for people."""
    placed: tuple[Placed, ...]
    data_start: int
    file_bytes: int
    spec_json: str

    def header(self, checksums: Sequence[int], seal: int) -> bytes:
        """First ``data_start`` bytes of the file; their length depends neither on the checksums nor on the seal."""
        body = self._json(checksums)
        prefix = MAGIC + len(body).to_bytes(8, "little") + zlib.crc32(body).to_bytes(4, "little") + seal.to_bytes(4, "little")
        return (prefix + body).ljust(self.data_start, b"\0")

    def _json(self, checksums: Sequence[int]) -> bytes:
        table = [
            {"name": p.weight.name, "shape": p.weight.shape, "offset": p.offset - self.data_start, "crc32": f"{c:08x}"}
            for p, c in zip(self.placed, checksums, strict=True)
        ]
        head = {
            "layout_version": LAYOUT_VERSION,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "spec": json.loads(self.spec_json),
            "data_bytes": self.file_bytes - self.data_start,
            "tensors": table,
        }
        return json.dumps(head).encode()


def plan_file(spec: ModelSpec, *, fingerprint: str, source: str) -> FilePlan:
    """Offsets of every tensor of a model's layout file."""
    relative: list[Placed] = []
    at = 0
    for weight in all_weights(spec):
        relative.append(Placed(weight, at))
        at += -(-4 * weight.size // ALIGN) * ALIGN
    spec_json = json.dumps(asdict(spec))
    draft = FilePlan(fingerprint, source, tuple(relative), 0, at, spec_json)
    start = -(-(_PREFIX + len(draft._json([0] * len(relative)))) // ALIGN) * ALIGN
    return FilePlan(fingerprint, source, tuple(Placed(p.weight, p.offset + start) for p in relative), start, at + start, spec_json)


def seal_now() -> int:
    """Seal for a file that is finished now."""
    return int(time.time()) // SEAL_SECONDS


def sealed_ns(seal: int) -> int:
    """Modification time that a file with this seal has, in nanoseconds since the epoch."""
    return seal * SEAL_SECONDS * 1_000_000_000


def read_header(f: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """JSON header of a layout file, its checksum verified, and the seal."""
    prefix = f.read(_PREFIX)
    if len(prefix) < _PREFIX or prefix[:8] != MAGIC:
        raise StoreError(f"{path}: not a layout file")
    n = int.from_bytes(prefix[8:16], "little")
    if n > _MAX_HEADER_BYTES or n > os.fstat(f.fileno()).st_size:
        raise StoreError(f"{path}: header of {n} bytes; the file is damaged")
    body = f.read(n)
    if len(body) != n or zlib.crc32(body) != int.from_bytes(prefix[16:20], "little"):
        raise StoreError(f"{path}: the header's checksum does not match; the file is damaged")
    try:
        header = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{path}: the header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise StoreError(f"{path}: the header is not an object")
    return header, int.from_bytes(prefix[20:24], "little")


def ranges(placed: Sequence[Placed]) -> Iterator[tuple[int, int]]:
    """Byte ranges of tensors, padding included, neighbours merged, rounded inwards to pages."""
    page = mmap.PAGESIZE
    spans = sorted((p.offset, p.offset + -(-p.nbytes // ALIGN) * ALIGN) for p in placed)
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    for begin, end in merged:
        begin, end = -(-begin // page) * page, end // page * page
        if begin < end:
            yield begin, end


RESIDENT_BYTES = 1 << 30
"""Mapped pages that a store leaves in the process by default."""


def check_resident_bytes(resident_bytes: int) -> None:
    """Raise `StoreError` unless it is a number of bytes."""
    if type(resident_bytes) is not int or resident_bytes < 0:
        raise StoreError(f"`resident_bytes` must be an integer >= 0, got {show(resident_bytes)}")


class MappedStore:
    """Weights in a layout file, mapped: resident only where they were touched, forgotten behind the layer.

    The file is held open, so that it may be removed or replaced meanwhile. One that was written to since it was opened is noticed whenever
    tensors are prepared, or asked for without that, and when they are let go of, and refused; one that was cut also whenever a tensor is
    asked for. What this cannot catch is a cut at the very moment at which a kernel reads: the system then ends the process (SIGBUS). Only
    this user can do that, and nothing here does: files are made aside and renamed.

    Parameters
    ----------
    path : Path
        A file made by `wse_emu.memoryx.build.open_store`.
    plan : FilePlan
        What the file must hold.
    spec : ModelSpec
        The model.
    name : str
        What to call the store in messages.
    resident_bytes : int
        Mapped pages that `drop` may leave in this process, the latest used ones; 0 leaves none. They are clean pages of the system's file
        cache, no anonymous memory.

    Raises
    ------
    StoreError
        If the file cannot be read, is damaged (header checksum, sizes), no regular file or a link, or holds another model; later, if it was
        written to while it was open.
    """

    def __init__(self, path: Path, plan: FilePlan, spec: ModelSpec, name: str, *, resident_bytes: int = RESIDENT_BYTES) -> None:
        check_resident_bytes(resident_bytes)
        if sys.byteorder != "little":
            raise StoreError(f"{path}: layout files are little-endian, this machine is not")
        self.spec = spec
        self.name = name
        self.path = path
        try:
            self._fd = os.open(path, _OPEN)
            self._close_file = weakref.finalize(self, os.close, self._fd)
            info = os.fstat(self._fd)
            if not stat.S_ISREG(info.st_mode):
                raise StoreError(f"{path}: not a regular file")
            with open(self._fd, "rb", closefd=False) as f:
                header, seal = read_header(f, path)
            self._checksums = _matching_checksums(header, plan, path)
            if info.st_size != plan.file_bytes:
                raise StoreError(f"{path}: {info.st_size} bytes, must have {plan.file_bytes}; the file is damaged")
            self._map = mmap.mmap(self._fd, plan.file_bytes, access=mmap.ACCESS_READ)
        except StoreError:
            raise
        except (OSError, ValueError) as e:  # a ValueError if the file became shorter meanwhile
            raise StoreError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
        self._sealed_ns = sealed_ns(seal)
        self._as_opened = info.st_size, info.st_mtime_ns
        self._placed = {p.weight.name: p for p in plan.placed}
        self._resident_bytes = resident_bytes
        self._idle: OrderedDict[str, int] = OrderedDict()
        """Bytes of the tensors that were used and not forgotten yet, least recently used first."""
        self._idle_bytes = 0
        """Their sum."""
        self._in_use: set[str] = set()
        """Tensors that were prepared and not let go of yet."""
        self.after_fork()
        note_forks(self)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, dtype=np.uint8)
        self._tensors = Tensors(name, spec, self._view)

    @property
    def is_sealed(self) -> bool:
        """Whether nobody wrote to the file since it was finished, as far as its modification time tells."""
        return self._as_opened[1] == self._sealed_ns

    def seal(self) -> None:
        """Verify every checksum, then seal the file again, where its times may be set.

        Raises
        ------
        StoreError
            As `check`.
        """
        self.check()
        self._check_untouched()
        with contextlib.suppress(OSError):
            os.utime(self._fd, ns=(time.time_ns(), self._sealed_ns))
            self._as_opened = self._as_opened[0], os.fstat(self._fd).st_mtime_ns

    def _check_untouched(self, *, size_only: bool = False) -> None:
        """Raise unless the file has the size and the modification time that it had when it was opened."""
        if not self._close_file.alive:
            return
        info = os.fstat(self._fd)
        if info.st_size != self._as_opened[0] or (info.st_mtime_ns != self._as_opened[1] and not size_only):
            way_out = "open the model again: the file is then verified, or made anew"
            raise StoreError(f"{self.path}: was written to while it was in use; {way_out}")

    def _check_asked_for(self, name: str) -> None:
        """`_check_untouched`; of a tensor that was prepared, and whose file is looked at again when it is let go of, the size alone."""
        if name not in self._in_use or not self._close_file.alive:
            self._check_untouched()
        else:
            self.check_readable()

    def check_readable(self) -> None:
        """Raise `StoreError` if the file was cut: a page beyond its end kills whoever touches it."""
        if self._close_file.alive and os.lseek(self._fd, 0, os.SEEK_END) != self._as_opened[0]:
            self._check_untouched()

    def after_fork(self) -> None:
        """Begin with a free lock: no thread that may have held it came along, and what it guards is whole at any moment."""
        self._lock = threading.Lock()

    def _view(self, weight: WeightShape) -> NDArray[np.float32]:
        return np.frombuffer(self._map, dtype=np.float32, count=weight.size, offset=self._placed[weight.name].offset)

    def vector(self, name: str) -> NDArray[np.float32]:
        """Norm weight (n,), read-only."""
        self._check_asked_for(name)
        return self._tensors.vector(name)

    def tiles(self, name: str) -> NDArray[np.float32]:
        """Flat tiled matrix (n_in * n_out,), read-only."""
        self._check_asked_for(name)
        return self._tensors.tiles(name)

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding, a new array (t, hidden)."""
        self._check_untouched()
        rows = self._tensors.embed(ids)
        self._check_untouched()
        return rows

    def prepare(self, names: Sequence[str]) -> None:
        """Have the system read the tensors' pages ahead, unless they are mapped still.

        Pages are then mapped by the threads that first use them: touching them here took the processor from the layer at work (a decode
        step that maps every layer anew took 1.3 times as long).
        """
        self._tensors.check_names(names)
        if self._bytes is None:
            return
        self._check_untouched()
        with self._lock:
            try:
                was_idle = [self._idle.pop(n, 0) for n in names]
                self._idle_bytes -= sum(was_idle)
            except BaseException:
                self._count_anew()
                raise
            self._in_use.update(names)
        new = [n for n, was in zip(names, was_idle, strict=True) if not was]
        if new and hasattr(mmap, "MADV_WILLNEED"):
            for begin, end in ranges([self._placed[n] for n in new]):
                self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def is_ready(self, names: Sequence[str]) -> bool:
        """Whether all of the tensors were used and did not leave this process since."""
        return all(name in self._idle for name in names)

    def _count_anew(self) -> None:
        """Add up what is idle after an interrupt (Ctrl-C), which may have come between a change of it and of its sum."""
        self._idle_bytes = sum(self._idle.values())

    def drop(self, names: Sequence[str]) -> None:
        """Let go of the tensors: of all that were let go of, the least recently used leave this process beyond `resident_bytes`.

        What leaves stays in the system's file cache while it has room. Raises `StoreError` if what was used may have been written to.
        """
        self._tensors.check_names(names)
        self._check_untouched()
        if self._bytes is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        leaving: list[str] = []
        with self._lock:
            try:
                for name in names:
                    n_bytes = self._placed[name].nbytes
                    self._idle_bytes += n_bytes - self._idle.pop(name, 0)
                    self._idle[name] = n_bytes
                while self._idle_bytes > self._resident_bytes:
                    name, n_bytes = self._idle.popitem(last=False)
                    self._idle_bytes -= n_bytes
                    leaving.append(name)
            except BaseException:
                self._count_anew()
                raise
            self._in_use.difference_update(names)
            if leaving:
                for begin, end in ranges([self._placed[n] for n in leaving]):
                    self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def check(self, progress: Progress | None = None) -> None:
        """Verify the checksum of every tensor.

        Parameters
        ----------
        progress : callable, optional
            Called with bytes done and bytes in all.

        Raises
        ------
        StoreError
            Naming the first tensor whose bytes are not those that were written, or if the store is closed.
        """
        data = self._bytes
        if data is None:
            raise StoreError(f"{self.name}: the store is closed")
        total = sum(p.nbytes for p in self._placed.values())
        done = 0
        for name, placed in self._placed.items():
            crc = 0
            for begin in range(placed.offset, placed.offset + placed.nbytes, _CHECK_BYTES):
                self._check_untouched(size_only=True)  # a page beyond the end of a file kills whoever touches it
                end = min(begin + _CHECK_BYTES, placed.offset + placed.nbytes)
                crc = zlib.crc32(data[begin:end].data, crc)
                done += end - begin
                if progress is not None:
                    progress(done, total)
            if hasattr(mmap, "MADV_DONTNEED"):
                for begin, end in ranges([placed]):
                    self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
            if crc != self._checksums[name]:
                raise StoreError(f"{self.path}: the checksum of `{name}` does not match; remove the damaged file and it is made again")

    def close(self) -> None:
        """Let go of the file; the map goes with the last array that was handed out."""
        self._tensors.clear()
        self._bytes = None
        self._close_file()
        with contextlib.suppress(BufferError):
            self._map.close()


def _matching_checksums(header: dict[str, Any], plan: FilePlan, path: Path) -> dict[str, int]:
    """Checksums by tensor, if the header is the plan's in everything else."""
    table = header.get("tensors")
    if not isinstance(table, list):
        raise StoreError(f"{path}: the header has no table of tensors")
    try:
        checksums = [int(row["crc32"], 16) for row in table]
        expected = json.loads(plan._json(checksums)) if len(checksums) == len(plan.placed) else None
    except (KeyError, TypeError, ValueError) as e:
        raise StoreError(f"{path}: the header's table of tensors is malformed") from e
    # The name a checkpoint goes by, and its token ids, do not change a byte of the weights.
    ignored = ("source", "spec")
    if expected is None or {**header, **dict.fromkeys(ignored)} != {**expected, **dict.fromkeys(ignored)}:
        raise StoreError(f"{path}: holds another model or another version of the layout")
    return {p.weight.name: c for p, c in zip(plan.placed, checksums, strict=True)}

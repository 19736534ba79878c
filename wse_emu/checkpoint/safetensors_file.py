"""One safetensors file, checked before any tensor is read: header size, names, types, shapes and offsets.

Format: eight bytes of little-endian header length, a JSON header, then the data; the entries cover the data exactly, without holes
or overlaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.files import OpenFile
from wse_emu.checkpoint.jsonfile import parse_object
from wse_emu.foundation.errors import CheckpointError

MAX_HEADER_BYTES = 32 << 20
"""The format's own library allows 100 MB; the tensors of a model that we accept are named in less than this."""
_MAX_DIMS = 8
_LFS_POINTER = b"version "
"""How the text file begins that Git leaves where Git LFS is not installed."""
_ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip
READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Type names of the format that are read, and what we call them."""
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    dtype: str
    """Type as the format writes it, for instance ``"BF16"``."""
    shape: tuple[int, ...]
    begin: int
    """First byte, from the start of the file."""
    nbytes: int


class SafetensorsFile:
    """One open file; the header has been checked, so no read can leave the file or disagree with a shape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = OpenFile(path, CheckpointError)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file") from None
        try:
            self.file_bytes = self._file.n_bytes
            self.header, data_start = self._read_header()
            self.entries = self._check_entries(data_start)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[bytes, int]:
        if self.file_bytes < 8:
            raise CheckpointError(f"{self.path}: {self.file_bytes} bytes, too short for a safetensors file; download it again")
        head = self._file.read(0, 8)
        n = int.from_bytes(head, "little")
        if head == _LFS_POINTER:
            raise CheckpointError(f"{self.path}: a Git LFS pointer in the place of the weights; fetch them with `git lfs pull`")
        if n > MAX_HEADER_BYTES:
            rule = f"at most {MAX_HEADER_BYTES} are allowed; not a safetensors file, or damaged"
            raise CheckpointError(f"{self.path}: header of {n} bytes, {rule}")
        if 8 + n > self.file_bytes:
            raise CheckpointError(f"{self.path}: truncated: header of {n} bytes in a file of {self.file_bytes}; download it again")
        return self._file.read(8, n), 8 + n

    @property
    def stat_key(self) -> str:
        """Size, times and number of the file when it was opened."""
        return self._file.stat_key

    def _check_entries(self, data_start: int) -> dict[str, TensorEntry]:
        where = f"{self.path}: header"
        table = parse_object(self.header, where=where, error=CheckpointError)
        table.pop("__metadata__", None)
        data_bytes = self.file_bytes - data_start
        entries: dict[str, TensorEntry] = {}
        for name, value in table.items():
            entries[name] = self._entry(name, value, data_start, data_bytes)
        end, before = data_start, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin < end:
                raise CheckpointError(f"{where}: {name!r} overlaps {before}")
            if entry.begin > end:
                raise CheckpointError(f"{where}: {entry.begin - end} bytes before {name!r} belong to no tensor")
            end, before = entry.begin + entry.nbytes, repr(name)
        if end != self.file_bytes:
            raise CheckpointError(f"{where}: tensors end at byte {end}, the file at {self.file_bytes}; download it again")
        return entries

    def _entry(self, name: str, value: Any, data_start: int, data_bytes: int) -> TensorEntry:
        where = f"{self.path}: header: {name!r}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
            raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}; readable are {', '.join(READABLE)}")
        limit = self.file_bytes + 1
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(s) is int and 0 <= s < limit * 8 for s in shape):
            rule = f"shape must be at most {_MAX_DIMS} sizes that fit the file of {self.file_bytes} bytes"
            raise CheckpointError(f"{where}: {rule}, got {str(shape)[:80]}; not the whole file, or damaged: download it again")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and 0 <= o < limit for o in offsets):
            rule = f"data_offsets must be two byte positions inside the file of {self.file_bytes} bytes"
            raise CheckpointError(f"{where}: {rule}, got {str(offsets)[:80]}; not the whole file, or damaged: download it again")
        begin, end = offsets
        if not begin <= end <= data_bytes:
            raise CheckpointError(f"{where}: bytes {begin}:{end} do not lie in the file's {data_bytes} bytes of data; download it again")
        bits = math.prod(shape) * _ITEM_BITS[dtype]
        if bits != 8 * (end - begin):
            raise CheckpointError(f"{where}: shape {shape} of {dtype} needs {bits / 8:g} bytes, data_offsets give {end - begin}")
        return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis as float32, read-only; a single number is one entry."""
        entry = self.entries[name]
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{self.path}: {name!r} is stored as {entry.dtype}; readable are {', '.join(READABLE)}")
        rows, *below = entry.shape or (1,)
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"{self.path}: {name!r} has shape {entry.shape}, rows {start}:{stop} asked")
        return self._widened(name, self._stored(name, start * math.prod(below), (stop - start, *below)))

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects of a tensor, as float32, read-only; reads no more than the rows of the first axis that is sliced."""
        return self._widened(name, self._part(name, key, tuple(READABLE)))

    def read_codes(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.uint8]:
        """The same of a tensor of bytes, or of numbers of eight bits, as they are."""
        codes: NDArray[np.uint8] = self._part(name, key, ("U8", "F8_E4M3", "F8_E8M0"))
        return codes

    def _part(self, name: str, key: tuple[int | slice, ...], dtypes: tuple[str, ...]) -> NDArray[Any]:
        entry = self.entries[name]
        if entry.dtype not in dtypes or len(key) > len(entry.shape):
            raise CheckpointError(f"{self.path}: {name!r} is {entry.dtype} of shape {entry.shape}, {len(key)} indices asked")
        if not key:
            return self._stored(name, 0, entry.shape)
        first, axis = 0, 0
        while isinstance(index := key[axis], int):
            first, axis = (first + index) * entry.shape[axis + 1], axis + 1
        rows, below = range(entry.shape[axis])[index], entry.shape[axis + 1 :]
        span = range(rows.start, rows[-1] + 1) if rows else range(0)
        raw = self._stored(name, (first + span.start) * math.prod(below), (len(span), *below))
        return raw[:: rows.step, *key[axis + 1 :]]

    def _stored(self, name: str, first: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """As many elements as `shape` holds, from the `first` on, as they lie in the file."""
        if self._file.closed:
            raise CheckpointError(f"{self.path}: {name!r} was asked for after the checkpoint was closed")
        raw: NDArray[Any] = np.empty(shape, dtype=_STORED[self.entries[name].dtype])
        self._file.read_into(raw.reshape(-1).view(np.uint8).data, self.entries[name].begin + first * raw.itemsize)
        return raw

    def _widened(self, name: str, raw: NDArray[Any]) -> NDArray[np.float32]:
        if self.entries[name].dtype == "BF16":
            bits = raw.astype(np.uint32)
            bits <<= 16
            out = bits.view(np.float32)
        else:
            out = raw.astype(np.float32, copy=False)
        out.flags.writeable = False
        return out

    def hash_into(self, digest: Any) -> None:
        """Feed the whole file to a hashlib object."""
        self._file.hash_into(digest)

    def close(self) -> None:
        """Let go of the file; arrays handed out stay valid."""
        self._file.close()

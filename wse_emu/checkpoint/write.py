"""A checkpoint written as a Hugging Face directory: in bounded pieces, rounded to a storage type, and all of it or nothing."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.config import parse_config, to_config
from wse_emu.checkpoint.directory import INDEX, SINGLE, open_checkpoint
from wse_emu.checkpoint.finite import first_not_finite
from wse_emu.checkpoint.names import stored_shapes
from wse_emu.checkpoint.replace import new_directory
from wse_emu.checkpoint.source import Checkpoint
from wse_emu.foundation.arguments import check_callable, check_flag, check_path, show
from wse_emu.foundation.errors import CheckpointError, SaveError, SpecError

StorageType = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

MAX_SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one file, as transformers splits them."""
_PIECE_ELEMENTS = 1 << 20
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "LICENSE*",
)  # fmt: skip
"""What else lies in a checkpoint's directory: copied along, and replaced with it."""
_REPLACEABLE = ("config.json", INDEX, "*.safetensors", *_COMPANIONS)
_TRAINING = ("attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef", "use_cache")
"""Fields of config.json that a spec does not hold and that are kept."""


@dataclass(frozen=True, slots=True)
class _Format:
    """A type that values are stored in."""

    name: str
    """As the safetensors format writes it."""
    dtype: np.dtype[Any]

    @property
    def max_finite(self) -> float:
        """Largest value."""
        return float(ml_dtypes.finfo(self.dtype).max)  # type: ignore[no-untyped-call]

    def round(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Nearest values, ties to even; beyond the largest value infinity."""
        with np.errstate(over="ignore"):
            return values.astype(self.dtype, copy=False)

    def codes(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Bits of rounded values, little-endian."""
        size = self.dtype.itemsize
        return stored.view(f"u{size}").astype(f"<u{size}", copy=False)


_FORMATS: dict[str, _Format] = {
    "float32": _Format("F32", np.dtype(np.float32)),
    "bfloat16": _Format("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": _Format("F16", np.dtype(np.float16)),
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor as it will be stored."""

    name: str
    shape: tuple[int, ...]
    format: _Format

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.format.dtype.itemsize


def save_checkpoint(
    checkpoint: Checkpoint, path: str | os.PathLike[str], *, dtype: StorageType | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write a checkpoint as a Hugging Face directory; memory holds a few MB of it at a time.

    Parameters
    ----------
    checkpoint : Checkpoint
        Opened from a directory, of which the tokenizer and what else belongs to it are copied along, or with random weights.
    path : str or path
        The directory: made with its parents, or empty. It appears whole or, after an error or Ctrl-C, not at all.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Stored type; values are rounded to nearest, ties to even. By default every tensor keeps the type that it has.
    max_shard_bytes : int
        Most bytes of tensors in one file; with more, files are numbered and an index names them. A larger tensor has a file of its own.
    overwrite : bool
        Replace a checkpoint that is there; a directory that holds anything else is never replaced.
    progress : callable, optional
        Called with bytes written and bytes in all.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    SpecError
        If an argument has another type, or `dtype` or `max_shard_bytes` is not one of those.
    SaveError
        If `path` is taken, the file system refuses or has too little space.
    CheckpointError
        If a value is not finite, or is beyond the largest value of `dtype`; it is named.
    """
    path = check_path("path", path)
    check_flag("overwrite", overwrite)
    check_callable("progress", progress)
    if dtype is not None and not (isinstance(dtype, str) and dtype in _FORMATS):
        raise SpecError(f"`dtype` must be one of {', '.join(_FORMATS)} or None, got {show(dtype)}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise SpecError(f"`max_shard_bytes` must be an integer >= 1, got {show(max_shard_bytes)}")
    stored = _stored_tensors(checkpoint, dtype)
    shards = _shards(stored, max_shard_bytes)
    total = sum(t.nbytes for t in stored)
    with new_directory(path, overwrite=overwrite, replaceable=_is_replaceable) as part:
        free = shutil.disk_usage(part).free
        if free < total:
            raise SaveError(f"{path}: the weights of {checkpoint.name} need {total} bytes, {free} are free; choose another directory")
        _write_json(part / "config.json", _config(checkpoint, stored))
        done = 0
        for file, tensors in shards.items():
            done = _write_file(part / file, checkpoint, tensors, done, total, progress)
        if len(shards) > 1:
            weight_map = {t.name: file for file, tensors in shards.items() for t in tensors}
            metadata = {"total_parameters": sum(math.prod(t.shape) for t in stored), "total_size": total}
            _write_json(part / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        _copy_companions(checkpoint, part)
        with open_checkpoint(part) as written:  # names, shapes, types and sizes, before anybody finds it
            assert written.spec == checkpoint.spec, "config.json of a spec gives another spec"
    return path


def _stored_tensors(checkpoint: Checkpoint, dtype: str | None) -> list[_Tensor]:
    """Tensors in the order of use, each once, wider types first: so each begins at a multiple of its own size."""
    stored = [
        _Tensor(name, shape, _FORMATS[dtype or checkpoint.tensors.dtype(name)]) for name, shape in stored_shapes(checkpoint.spec).items()
    ]
    return sorted(stored, key=lambda t: -t.format.dtype.itemsize)


def _shards(stored: Sequence[_Tensor], max_bytes: int) -> dict[str, list[_Tensor]]:
    """File name to tensors: filled in order, a new file where the next tensor would be too much."""
    groups: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in stored:
        if size and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    stem = SINGLE.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _config(checkpoint: Checkpoint, stored: Sequence[_Tensor]) -> dict[str, Any]:
    """config.json in the style of released checkpoints; its type is that of most parameters."""
    sizes: dict[str, int] = dict.fromkeys(_FORMATS, 0)
    for tensor in stored:
        sizes[tensor.format.dtype.name] += math.prod(tensor.shape)
    kept = {name: checkpoint.config[name] for name in _TRAINING if name in checkpoint.config}
    config = {**to_config(checkpoint.spec), **kept, "torch_dtype": max(sizes, key=sizes.__getitem__)}
    said, spec = parse_config(config), checkpoint.spec
    unsaid = [f.name for f in fields(spec) if getattr(said, f.name) != getattr(spec, f.name) and (spec.is_moe or f.name != "routing")]
    if unsaid:
        what = ", ".join(f"`{name}` ({getattr(spec, name)})" for name in unsaid)
        raise SaveError(f"config.json of a {spec.family} model cannot say this model's {what}; nothing is written")
    return config


def _write_file(
    file: Path, checkpoint: Checkpoint, tensors: Sequence[_Tensor], done: int, total: int, progress: Progress | None
) -> int:  # fmt: skip
    """Write one safetensors file: length of the header, the header, then the tensors one after the other; returns bytes done."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    at = 0
    for tensor in tensors:
        table[tensor.name] = {"dtype": tensor.format.name, "shape": tensor.shape, "data_offsets": (at, at + tensor.nbytes)}
        at += tensor.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with open(file, "xb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            for codes in _codes(checkpoint, tensor):
                f.write(codes.data)
                done += codes.nbytes
                if progress is not None:
                    progress(done, total)
        f.flush()
        os.fsync(f.fileno())
    return done


def _codes(checkpoint: Checkpoint, tensor: _Tensor) -> Iterator[NDArray[Any]]:
    """Pieces of a tensor as they are stored."""
    step = max(1, _PIECE_ELEMENTS // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], step):
        rows = checkpoint.tensors.read_rows(tensor.name, start, min(start + step, tensor.shape[0]))
        stored = tensor.format.round(rows)
        at = first_not_finite(stored.astype(np.float32, copy=False), start)
        if at is not None:
            value = rows[at[0] - start, *at[1:]]
            rule = "weights must be finite"
            if np.isfinite(value):
                rule = f"the largest value of {tensor.format.dtype.name} is {tensor.format.max_finite:g}; choose another `dtype`"
            raise CheckpointError(f"{checkpoint.name}: {tensor.name}[{', '.join(map(str, at))}] is {value}; {rule}")
        yield tensor.format.codes(stored)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_replaceable(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _REPLACEABLE)


def _copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    if checkpoint.path is None:
        return
    for entry in os.scandir(checkpoint.path):
        if entry.is_file() and any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _COMPANIONS):
            shutil.copyfile(entry.path, directory / entry.name)

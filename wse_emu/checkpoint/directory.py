"""A Hugging Face directory as a `Checkpoint`: which files it has, and whether they hold what config.json promises."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.config import read_published, unread_fields
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.checkpoint.files import read_bytes
from wse_emu.checkpoint.fp8 import Fp8Tensors
from wse_emu.checkpoint.fp8_config import fp8_format
from wse_emu.checkpoint.jsonfile import parse_object
from wse_emu.checkpoint.mxfp4 import Codes, Mxfp4Tensors, is_mxfp4
from wse_emu.checkpoint.names import is_unused_expert, own_head, stored_shapes
from wse_emu.checkpoint.safetensors_file import READABLE, SafetensorsFile, TensorEntry
from wse_emu.checkpoint.source import Checkpoint, TensorSource
from wse_emu.checkpoint.wrapped import LanguageTensors, is_wrapped, language_config
from wse_emu.foundation.arguments import check_path
from wse_emu.foundation.errors import CheckpointError, ConfigError
from wse_emu.foundation.model_spec import ModelSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
_HASH_WHOLE_BYTES = 64 << 20
"""Weights of up to this size are fingerprinted by content, larger ones by file identity, size, times and headers."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IDENTITY_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
_SHOWN = 8
_IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Old files carry the rotary frequencies; they follow from the config, and transformers ignores them too."""


class DirectoryTensors:
    """Tensors of one or more safetensors files, held open; a `TensorSource`."""

    def __init__(self, path: Path, files: dict[str, SafetensorsFile], where: dict[str, str]) -> None:
        self._path = path
        self._files = files
        self._file_of = where
        self._fingerprint = self._identify()

    def _identify(self) -> str:
        digest = hashlib.sha256()
        whole = sum(f.file_bytes for f in self._files.values()) <= _HASH_WHOLE_BYTES
        for name in sorted(self._files):
            file = self._files[name]
            digest.update(f"{name}:{file.file_bytes};".encode())
            if whole:
                file.hash_into(digest)
            else:
                digest.update(file.stat_key.encode())
                digest.update(file.header)
        return ("content-" if whole else "files-") + digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Text that changes when a tensor file changes: its content up to 64 MiB in all, else its identity, size, times and header."""
        return self._fingerprint

    def _entry(self, name: str) -> tuple[SafetensorsFile, TensorEntry]:
        try:
            file = self._files[self._file_of[name]]
        except KeyError:
            raise CheckpointError(f"{self._path}: there is no tensor {name!r}") from None
        return file, file.entries[name]

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published; matrices are (out, in)."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> str:
        """Stored type: ``"float32"``, ``"float16"`` or ``"bfloat16"``; another type in the format's own words."""
        dtype = self._entry(name)[1].dtype
        return READABLE.get(dtype, dtype)

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in its file."""
        return self._entry(name)[1].nbytes

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""
        file, entry = self._entry(name)
        return file.read_rows(name, 0, entry.shape[0] if entry.shape else 1).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""
        return self._entry(name)[0].read_rows(name, start, stop)

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only."""
        return self._entry(name)[0].read_part(name, key)

    def read_codes(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.uint8]:
        """Elements that `key` selects of a tensor of bytes, as they are stored."""
        return self._entry(name)[0].read_codes(name, key)

    def close(self) -> None:
        """Let go of the files; arrays handed out stay valid."""
        for file in self._files.values():
            file.close()


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shards(path: Path) -> dict[str, str]:
    """Tensor name to shard file name, from the index; every file is in this directory and there."""
    index_file = path / INDEX
    data = read_bytes(index_file, limit=MAX_INDEX_BYTES, error=CheckpointError)
    if data is None:
        raise _no_weights(path)
    index = parse_object(data, where=str(index_file), error=CheckpointError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: `weight_map` must be an object that is not empty")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or any(c in shard for c in "/\\:\0") or shard in (".", ".."):
            raise CheckpointError(f"{index_file}: {tensor!r}: file {str(shard)[:80]!r} is not a plain name of a file in this directory")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_file}: {tensor!r}: {shard[:80]!r} is not a .safetensors file; other formats are never opened")
    absent = sorted({s for s in weight_map.values() if not os.path.lexists(path / s)})
    if absent:
        raise CheckpointError(f"{index_file}: files that it names are not there: {_list(absent)}; download them again")
    return weight_map


def _open_tensors(path: Path) -> DirectoryTensors:
    files: dict[str, SafetensorsFile] = {}
    try:
        if os.path.lexists(path / SINGLE):
            files[SINGLE] = SafetensorsFile(path / SINGLE)
            return DirectoryTensors(path, files, dict.fromkeys(files[SINGLE].entries, SINGLE))
        weight_map = _shards(path)
        owner: dict[str, str] = {}
        for shard in sorted(set(weight_map.values())):
            files[shard] = SafetensorsFile(path / shard)
            for tensor in files[shard].entries:
                if tensor in owner:
                    raise CheckpointError(f"{path}: {tensor!r} stands in both {owner[tensor]} and {shard}")
                owner[tensor] = shard
        wrong = sorted(t for t, s in weight_map.items() if owner.get(t) != s)
        if wrong:
            raise CheckpointError(f"{path / INDEX}: tensors are not in the file that it names for them: {_list(wrong)}")
        return DirectoryTensors(path, files, owner)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def _no_weights(path: Path) -> CheckpointError:
    try:
        found = sorted(os.listdir(path))
    except OSError as e:
        return CheckpointError(f"{path}: cannot be read: {e.strerror or e}")
    pickles = [n for n in found if n.endswith(_PICKLES)]
    if pickles:
        return CheckpointError(
            f"{path}: has no {SINGLE} but {_list(pickles)}; pickle files can run any code and are never opened; "
            "convert them where you trust them: model.save_pretrained(directory, safe_serialization=True)"
        )
    others = [n for n in found if n.endswith((".safetensors", ".gguf"))]
    hint = f"; {_list(others)} are not names that a checkpoint uses" if others else ""
    return CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}{hint}")


def _check_against_spec(path: Path, spec: ModelSpec, tensors: TensorSource) -> tuple[str, ...]:
    """Names, shapes and types of all tensors, before any is read; returns those that are left out, as transformers does."""
    left = set(tensors.names())
    missing: list[str] = []

    def check(name: str, shape: tuple[int, ...]) -> None:
        if tensors.shape(name) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tensors.shape(name)}, config.json asks for {shape}")
        if tensors.dtype(name) not in READABLE.values():
            coded = "; in FP8 where `quantization_config` of config.json says so" if tensors.dtype(name) == "F8_E4M3" else ""
            rule = f"readable are {', '.join(READABLE.values())}{coded}"
            raise CheckpointError(f"{path}: {name} is stored as {tensors.dtype(name)}; {rule}")
        left.discard(name)

    for name, shape in stored_shapes(spec).items():
        if name in left:
            check(name, shape)
        else:
            missing.append(name)
    if missing:
        fused = any(".experts.gate_up_proj" in n for n in left)
        way = "; experts are fused in this file: save it with transformers' original names (save_original_format=True)" if fused else ""
        raise CheckpointError(f"{path}: tensors that config.json promises are missing: {_list(missing)}{way}")
    head = own_head(spec)
    if spec.tie_word_embeddings and head.name in left:
        check(head.name, head.shape)
    ignored = {n for n in left if any(re.fullmatch(pattern, n) for pattern in (*_IGNORED, *FAMILIES[spec.family].ignored))}
    ignored |= {n for n in left if _layer_of(spec, n) >= spec.num_layers or is_unused_expert(spec, n)}
    extra = sorted(left - ignored)
    if extra:
        raise CheckpointError(f"{path}: tensors that config.json does not promise: {_list(extra)}; is it another architecture?")
    return tuple(sorted(ignored))


def _layer_of(spec: ModelSpec, name: str) -> int:
    """Layer that a tensor's name speaks of, -1 if none; a family may publish layers behind the last, which predict further tokens."""
    before = str(FAMILIES[spec.family].names["layer"]).partition("{n}")[0]
    number = name.removeprefix(before).partition(".")[0] if name.startswith(before) and FAMILIES[spec.family].predicts_further else ""
    return int(number) if number.isdecimal() else -1


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face directory; reads headers only, the tensors stay in their files.

    Parameters
    ----------
    path : str or path
        Directory with config.json and either model.safetensors or an index with its shards. Never downloaded.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ConfigError
        If the directory or config.json is missing, or `parse_config` refuses it.
    CheckpointError
        If weights are missing, only pickled, truncated or inconsistent, if the index points outside the directory or to absent files, or if
        tensors' names, shapes or types are not those that config.json promises.
    """
    directory = check_path("path", path, ConfigError)
    try:
        directory = directory.resolve()
    except (OSError, RuntimeError) as e:
        raise ConfigError(f"{path}: not a usable path: {e}") from e
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ConfigError(f"{path}: not a directory; a checkpoint is a directory with config.json and *.safetensors files")
    if not os.path.isdir(directory):
        raise ConfigError(f"{path}: there is no such directory; checkpoints are opened from local directories and never downloaded")
    published, spec = read_published(directory)
    config = dict(language_config(published, str(directory)))
    stored: Codes = _open_tensors(directory)
    tensors: TensorSource = stored
    try:
        ignored: tuple[str, ...] = ()
        if is_wrapped(published):
            stored = tensors = language = LanguageTensors(stored, str(directory))
            ignored = language.left_out
        if is_mxfp4(config):
            tensors = Mxfp4Tensors(stored, str(directory))
        form = fp8_format(config, str(directory / "config.json"))
        if form is not None:
            tensors = coded = Fp8Tensors(stored, form, str(directory))
            ignored = (*ignored, *coded.left_out)
        ignored = unread_fields(config) + tuple(sorted((*ignored, *_check_against_spec(directory, spec, tensors))))
        digest = hashlib.sha256(tensors.fingerprint.encode())
        for name in _IDENTITY_FILES:
            content = read_bytes(directory / name, limit=MAX_INDEX_BYTES, error=CheckpointError)
            if content is not None:
                digest.update(name.encode() + hashlib.sha256(content).digest())
    except BaseException:
        tensors.close()
        raise
    tokenizer = directory / "tokenizer.json"
    return Checkpoint(
        name=directory.name,
        spec=spec,
        config=config,
        tensors=tensors,
        fingerprint=digest.hexdigest(),
        ignored=ignored,
        path=directory,
        tokenizer_path=tokenizer if os.path.exists(tokenizer) else None,
    )

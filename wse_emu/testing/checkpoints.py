"""Small checkpoints on disk, written with the safetensors library: inputs for tests of what reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from wse_emu.checkpoint import Checkpoint, published_tensors

_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_checkpoint(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    n_shards: int = 1,
    replace: Mapping[str, NDArray[Any] | None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face directory; holds all of it in memory.

    Parameters
    ----------
    checkpoint : Checkpoint
        For instance from `wse_emu.checkpoint.random_checkpoint`.
    directory : str or path
        Made if it is not there.
    dtype : str
        Stored type; values are rounded to it.
    n_shards : int
        1 writes model.safetensors, more write an index and as many files.
    replace : mapping, optional
        Published name to another array, stored as it is, or None to leave the tensor out; new names are added.
    config : mapping, optional
        Takes the place of the checkpoint's config.json.

    Returns
    -------
    Path
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(checkpoint.config if config is None else config)))
    tensors: dict[str, NDArray[Any]] = {}
    for _, tensor in published_tensors(checkpoint.spec):
        tensors[tensor.name] = checkpoint.tensors.read(tensor.name).astype(_DTYPES[dtype])
    for name, array in (replace or {}).items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = np.ascontiguousarray(array)
    if n_shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for n in range(n_shards):
        file = f"model-{n + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[n::n_shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory

"""Directories in FP8, made by ml_dtypes, and the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wse_emu.checkpoint import published_names, random_checkpoint

TYPES = {
    np.dtype(np.float32): "F32", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3", np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.float64): "F64", np.dtype(np.uint8): "U8", np.dtype(ml_dtypes.bfloat16): "BF16",
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def coded(weight: np.ndarray, block: tuple[int, int] = (8, 6)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and numbers of matrices on the last two axes, block by block."""
    *lead, n, m = weight.shape
    codes, values = weight.astype(ml_dtypes.float8_e4m3fn), np.empty_like(weight)
    scales = np.empty((*lead, -(-n // block[0]), -(-m // block[1])), np.float32)
    for at in np.ndindex(scales.shape):
        *which, i, j = at
        part = (*which, slice(block[0] * i, block[0] * (i + 1)), slice(block[1] * j, block[1] * (j + 1)))
        scales[at] = np.abs(weight[part]).max() / 448
        codes[part] = (weight[part] / scales[at]).astype(ml_dtypes.float8_e4m3fn)
        values[part] = codes[part].astype(np.float32) * scales[at]
    return codes, scales, values


def in_full(role: str) -> bool:
    """Whether a role's tensor is none that released checkpoints have in FP8."""
    last = role.rpartition(".")[2]
    return not last.removeprefix("index_").startswith("w_") or role == "index_weights"


def twins(
    config: dict[str, Any], *, block: tuple[int, int] = (8, 6), kept: Callable[[str], bool] = in_full, seed: int = 1
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """A random model as it is stored, all its matrices coded but those of roles that are `kept`, and the numbers that they stand for."""
    checkpoint = random_checkpoint({name: value for name, value in config.items() if name != "quantization_config"}, seed=seed)
    stored: Tensors = {name: checkpoint.tensors.read(name) for name in checkpoint.tensors.names()}
    plain = dict(stored)
    for name in {tensor.name for role, tensor in published_names(checkpoint.spec).items() if not kept(role)}:
        stored[name], stored[name + "_scale_inv"], plain[name] = coded(plain[name], block)
    return stored, plain


def write(directory: Path, stored: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of these tensors."""
    directory.mkdir()
    header, data, at = {}, b"", 0
    for name, array in stored.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": TYPES[array.dtype], "shape": array.shape, "data_offsets": (at, at + len(raw))}
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (directory / "config.json").write_text(json.dumps(config))
    return directory

"""How many bytes tensors take as a config.json says that they are stored, before any file of weights is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from wse_emu.checkpoint.fp8_config import fp8_format
from wse_emu.checkpoint.mxfp4 import BLOCK, is_mxfp4
from wse_emu.checkpoint.names import published_tensors
from wse_emu.foundation.model_spec import ModelSpec

_HALVES = ("bfloat16", "float16")
_NEVER_FP8 = ("router", "index_weights")
"""Matrices of a layer that transformers keeps in full whatever config.json says."""


def bytes_by_config(config: Mapping[str, Any], spec: ModelSpec) -> Callable[[str], int]:
    """Published name to bytes, codes and scales.

    What `torch_dtype` (or `dtype`) says holds for all tensors, float32 without it; in a quantised model not for what it codes: the experts'
    matrices in MXFP4; in FP8 all matrices of layers but the routers and those of ``modules_to_not_convert``. A scale of FP8 counts one byte
    where ``scale_fmt`` is "ue8m0", four otherwise. A checkpoint's files may hold others; once there, they are what counts.

    Parameters
    ----------
    config : mapping
        Of config.json.
    spec : ModelSpec
        Of the model, or of some of its layers.
    """
    fp8, coded = fp8_format(config, "config.json"), is_mxfp4(config)
    width = 2 if config.get("torch_dtype", config.get("dtype")) in _HALVES else 4
    shapes: dict[str, tuple[int, ...]] = {}
    in_fp8: set[str] = set()
    for role, tensor in published_tensors(spec):
        shapes[tensor.name] = tensor.whole
        matrix = role.startswith("layers.") and len(tensor.shape) == 2 and role.split(".", 2)[2] not in _NEVER_FP8
        if fp8 is not None and matrix and tensor.name.removesuffix(".weight") not in fp8.kept:
            in_fp8.add(tensor.name)

    def count(name: str) -> int:
        shape = shapes[name]
        n = math.prod(shape)
        if coded and len(shape) == 3:
            return n // 2 + n // BLOCK
        if fp8 is not None and name in in_fp8:
            block = fp8.block or shape[-2:]
            scales = math.prod(shape[:-2]) * math.prod(-(-size // of) for size, of in zip(shape[-2:], block, strict=True))
            return n + (1 if fp8.powers else 4) * scales
        return n * width

    return count

"""How many bytes tensors take as a config.json says that they are stored, before any file of weights is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from wse_emu.checkpoint.fp8 import fp8_block
from wse_emu.checkpoint.mxfp4 import BLOCK, is_mxfp4
from wse_emu.checkpoint.names import stored_shapes
from wse_emu.foundation.model_spec import ModelSpec

_HALVES = ("bfloat16", "float16")


def bytes_by_config(config: Mapping[str, Any], spec: ModelSpec) -> Callable[[str], int]:
    """Published name to bytes, codes and scales.

    What `torch_dtype` (or `dtype`) says holds for all tensors, float32 without it; in a quantised model not for what it codes: the experts'
    matrices in MXFP4, all projections in FP8.

    Parameters
    ----------
    config : mapping
        Of config.json.
    spec : ModelSpec
        Of the model, or of some of its layers.
    """
    shapes, block, coded = stored_shapes(spec), fp8_block(config, "config.json"), is_mxfp4(config)
    width = 2 if config.get("torch_dtype", config.get("dtype")) in _HALVES else 4

    def count(name: str) -> int:
        shape = shapes[name]
        n = math.prod(shape)
        if coded and len(shape) == 3:
            return n // 2 + n // BLOCK
        if block is not None and len(shape) == 2 and "_proj" in name:
            return n + 4 * math.prod(-(-size // of) for size, of in zip(shape, block, strict=True))
        return n * width

    return count

"""How many bytes the matrices of the wafer layout take as the checkpoint holds them: what crosses the wafer's edge when they stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property

from wse_emu.checkpoint import published_names
from wse_emu.checkpoint.names import PublishedTensor
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import all_weights

_MADE_OF = {
    "w_qkv": ("w_q", "w_k", "w_v"), "w_gate_up": ("w_gate", "w_up"), "w_uk": ("w_kv_b",), "w_uv": ("w_kv_b",), "w_k_rope": ("w_kv_a",),
}  # fmt: skip
"""Matrix of the layout to the published ones that it is made of, where that is not the one of its own name."""


class DiskBytes:
    """Bytes of every matrix of the layout on disk, codes and scales; a part of a published tensor takes its share.

    Parameters
    ----------
    stored_bytes : callable
        Published name to the bytes of the tensor, scales included.
    spec : ModelSpec
    """

    def __init__(self, stored_bytes: Callable[[str], int], spec: ModelSpec) -> None:
        self._stored_bytes, self._spec = stored_bytes, spec
        self._known: dict[str, int] = {}

    @cached_property
    def _published(self) -> dict[str, PublishedTensor]:
        return published_names(self._spec)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {w.name: w.size for w in all_weights(self._spec) if len(w.shape) > 1}

    def __call__(self, name: str) -> int:
        """Bytes of one matrix, rounded up where its share is no whole number."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = math.ceil(self._count(name))
        return found

    def _count(self, name: str) -> Fraction:
        stem, dot, kind = name.rpartition(".")
        latent = self._spec.latent
        if kind in ("w_q_nope", "w_q_rope"):
            parts: tuple[str, ...] = ("w_q" if latent is None or latent.q_lora_rank is None else "w_q_b",)
        else:
            parts = _MADE_OF.get(kind, (kind,))
        tensors = [self._published[stem + dot + part] for part in parts]
        sizes = [self._sizes[name]] if len(tensors) == 1 else [math.prod(tensor.shape) for tensor in tensors]
        each = (
            Fraction(self._stored_bytes(tensor.name) * size, math.prod(tensor.whole))
            for tensor, size in zip(tensors, sizes, strict=True)
        )
        return sum(each, Fraction(0))

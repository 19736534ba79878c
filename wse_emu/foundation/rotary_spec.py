"""Which elements of a head form rotary pairs, and in which layers they turn how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class RotarySpec:
    """Rotary pairs; by default all of a head is rotated, element ``u`` with ``u + head_dim / 2``, alike in every layer."""

    dim: int | None = None
    """Elements of a head that are rotated, the first ones; None is all."""
    interleaved: bool = False
    """Whether neighbours ``(2 u, 2 u + 1)`` are the pairs, not the halves ``(u, u + dim / 2)``."""
    local_theta: float | None = None
    """Base of the layers with a sliding window, whose frequencies are not stretched; None is as in the others."""
    skipped_layers: tuple[int, ...] = ()
    """Layers without rotation, ascending."""

    def __post_init__(self) -> None:
        if self.dim is not None and (type(self.dim) is not int or self.dim < 2 or self.dim % 2):
            raise SpecError(f"`dim` of `rotary` must be an even integer >= 2 or None, got {self.dim!r}")
        if self.local_theta is not None and not (0 < self.local_theta < math.inf):
            raise SpecError(f"`local_theta` of `rotary` must be positive and finite, got {self.local_theta!r}")
        if any(type(i) is not int or i < 0 for i in self.skipped_layers) or any(a >= b for a, b in pairwise(self.skipped_layers)):
            raise SpecError(f"`skipped_layers` of `rotary` must be ascending layers, got {self.skipped_layers}")

    def rotated(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return head_dim if self.dim is None else self.dim

    def pairs(self, head_dim: int) -> NDArray[np.int64]:
        """Published elements of every *pair unit* of a head, (head_dim / 2, 2) int64: rotated pairs first, then what is not rotated."""
        n = self.rotated(head_dim)
        turning = np.arange(n).reshape(-1, 2) if self.interleaved else np.arange(n).reshape(2, -1).T
        still = np.arange(n, head_dim).reshape(-1, 2)
        return np.concatenate([turning, still]).astype(np.int64)

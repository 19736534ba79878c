"""What the cases of kernels and layers share: their table, data, bounds, and torch where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.racing import HAS_TORCH, Call, Case
from wse_emu.equivalence.tolerance import U

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Make = Callable[[bool], Case]
"""Makes a case; True asks for a tiny one."""


class Cases(dict[str, Make]):
    """Cases by the name of the kernel or layer, and what sets several cases of one apart after a comma."""

    def add(self, name: str) -> Callable[[Make], Make]:
        """Decorator that keeps a maker under a name."""

        def keep(make: Make) -> Make:
            assert name not in self, name
            self[name] = make
            return make

        return keep


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> F32:
    """Seeded normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def relative(values: Any, roundings: float) -> F64:
    """Error of so many roundings of values; nothing is asked of what is subnormal."""
    bound: F64 = roundings * U * np.abs(np.asarray(values, np.float64)) + 2.0**-126
    return bound


def composed(values: Any) -> float:
    """Error allowed where several products follow each other: 2e-5 of the values' standard deviation. A wrong formula is off by about 1."""
    return 2e-5 * float(np.std(np.asarray(values, np.float64)))


def torch_call(function: Callable[..., object], *arrays: Any) -> dict[str, Call]:
    """The peer ``function(torch, *arrays)``, the arrays as tensors; none where torch is not installed."""
    return torch_side(lambda torch, of: partial(function, torch, *map(of, arrays)))


def torch_side(make: Callable[[Any, Any], Call]) -> dict[str, Call]:
    """The peer that `make` returns for torch and ``torch.from_numpy``; none where torch is not installed."""
    if not HAS_TORCH:
        return {}
    import torch

    return {"torch": make(torch, torch.from_numpy)}

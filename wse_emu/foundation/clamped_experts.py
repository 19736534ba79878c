"""Experts with biases whose gate and up projection are held within a limit (gpt-oss)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedExperts:
    """An expert is ``((up + 1) * gate * sigmoid(alpha * gate)) @ w_down + b_down``.

    ``gate = min(x @ w_gate + b_gate, limit)`` and ``up = x @ w_up + b_up``, held within plus and minus the limit.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            if not (isinstance(value, float) and math.isfinite(value) and value > 0):
                raise SpecError(f"`{name}` of `clamped_experts` must be a positive finite number, got {value!r}")

"""Queries that grow with their position, in layers without rotation, so that attention over many keys stays sharp."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.arguments import MAX_FLOAT32
from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryTemperature:
    """Factor ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))`` of the queries in layers that are not rotated.

    References
    ----------
    Nakanishi, "Scalable-Softmax is superior for attention", 2025; constants as in Llama 4.
    """

    floor_scale: int = 8192
    """Positions that share one factor."""
    attn_scale: float = 0.1
    """How much it grows."""

    def __post_init__(self) -> None:
        if type(self.floor_scale) is not int or self.floor_scale < 1:
            raise SpecError(f"`floor_scale` of the queries' temperature must be an integer >= 1, got {self.floor_scale!r}")
        if type(self.attn_scale) is not float or not 0 <= self.attn_scale <= MAX_FLOAT32:
            raise SpecError(f"`attn_scale` of the queries' temperature must be a number >= 0, in float32, got {self.attn_scale!r}")

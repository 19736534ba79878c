"""Constant factors in a model's forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.arguments import MAX_FLOAT32
from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Constant factors; the defaults are a Llama's."""

    embedding: float = 1.0
    """Times the looked-up embedding; rounded to float32."""
    residual: float = 1.0
    """Times the output of attention and of the feed-forward network, before it joins the residual stream."""
    attention: float | None = None
    """Times the scores; None is one by the root of a query's elements."""
    scores_cap: float | None = None
    """The scaled scores ``x`` become ``cap * tanh(x / cap)``; None leaves them."""
    logits: float = 1.0
    """Divides the logits."""
    logits_cap: float | None = None
    """The logits ``x`` become ``cap * tanh(x / cap)``; None leaves them."""

    def __post_init__(self) -> None:
        for name in ("embedding", "residual", "attention", "scores_cap", "logits", "logits_cap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float) and 0 < value <= MAX_FLOAT32):
                raise SpecError(f"`{name}` of `scales` must be a positive number that float32 can hold, got {value!r}")

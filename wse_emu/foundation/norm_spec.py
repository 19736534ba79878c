"""How a model normalises: the residual stream before (and after) each half of a layer, and queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """Norms of the residual stream; the default is a Llama's RMSNorm in front of each half of a layer."""

    kind: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm, which takes the mean away first; norms of queries and keys are RMSNorm always."""
    bias: bool = False
    """Whether a LayerNorm has a bias."""
    unit_offset: bool = False
    """Whether the published weight ``w`` means ``1 + w`` (Gemma), also in norms of queries and keys."""
    after: bool = False
    """Whether the output of attention and of the feed-forward network is normalised too, before it joins the residual stream."""

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise SpecError(f"`kind` of `norm` must be 'rms' or 'layer', got {self.kind!r}")
        if self.bias and self.kind != "layer":
            raise SpecError("`bias` of `norm` needs `kind` 'layer': an RMSNorm has none")


@dataclass(frozen=True, kw_only=True, slots=True)
class QkNorm:
    """RMSNorm of queries and keys."""

    over: Literal["head", "row"] = "head"
    """Every head by itself, or all heads of a token together."""
    after_rotary: bool = False
    """Whether they are rotated first."""
    weighted: bool = True
    """Whether the norm has weights; without them it is that of every head."""
    rotated_only: bool = False
    """Whether layers without rotation have no such norm either."""

    def __post_init__(self) -> None:
        if self.over not in ("head", "row"):
            raise SpecError(f"`over` of `qk_norm` must be 'head' or 'row', got {self.over!r}")
        if self.over == "row" and self.after_rotary:
            raise SpecError("`qk_norm` over a row comes before the rotation: `after_rotary` must be false")
        if self.over == "row" and not self.weighted:
            raise SpecError("`qk_norm` over a row has weights: `weighted` must be true")
        if self.rotated_only and self.weighted:
            raise SpecError("`rotated_only` of `qk_norm` is for norms without weights: `weighted` must be false")

"""How rotary frequencies are stretched for contexts longer than those a model was trained on: constants only, as config.json gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from wse_emu.foundation.arguments import MAX_FLOAT32
from wse_emu.foundation.errors import SpecError

RopeKind = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
ROPE_KINDS: Final[tuple[str, ...]] = get_args(RopeKind)
MAX_CONTEXT: Final = 1 << 40
"""More positions than this are taken for a damaged configuration."""

_MOST_MSCALE = 1e15
"""The scale of the scores takes the square of what follows from it, which must fit float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Parameters of one kind of scaled rotary embedding; names are those of ``rope_parameters`` in config.json.

    References
    ----------
    linear: Chen et al., "Extending context window of large language models via position interpolation", 2023. yarn: Peng et al., "YaRN",
    2023, sections 3.2 to 3.4. longrope: Ding et al., "LongRoPE", 2024. dynamic and llama3: the formulas of transformers 5,
    ``modeling_rope_utils``.
    """

    kind: RopeKind
    factor: float
    """How many times longer the context is."""
    original_max_position_embeddings: int
    """Context before it was stretched."""
    attention_factor: float | None = None
    """yarn, longrope: factor of cosine and sine; None follows from the other values."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this in the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often are interpolated in full."""
    truncate: bool = True
    """yarn: whether the range between the two is widened to whole pairs."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: numerator and denominator of the default attention factor."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    """llama3: turns in the original context below which a pair is interpolated, and above which it is left alone; none is between
    where they are alike."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """longrope: divisor of every pair's frequency, for sequences within the original context and beyond it."""
    short_mscale: float | None = None
    long_mscale: float | None = None
    """longrope of Phi-3.5-MoE: factor of cosine and sine within the original context and beyond it. Where they are given, frequencies are
    those of `short_factor` at every length: transformers has it so."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise SpecError(f"`kind` of a rotary scaling must be one of {', '.join(ROPE_KINDS)}, got {self.kind!r}")
        if not 1 <= self.factor < math.inf:
            raise SpecError(f"rotary scaling {self.kind}: `factor` must be finite and at least 1, got {self.factor!r}")
        if type(self.original_max_position_embeddings) is not int or self.original_max_position_embeddings < 1:
            raise SpecError(
                f"rotary scaling {self.kind}: `original_max_position_embeddings` must be a positive integer, "
                f"got {self.original_max_position_embeddings!r}"
            )
        if self.factor * self.original_max_position_embeddings > MAX_CONTEXT:
            raise SpecError(
                f"rotary scaling {self.kind}: `factor` times `original_max_position_embeddings` must be at most {MAX_CONTEXT} positions, "
                f"got {self.factor!r} and {self.original_max_position_embeddings!r}"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor <= MAX_FLOAT32:
            raise SpecError(f"rotary scaling {self.kind}: `attention_factor` must be positive, in float32, got {self.attention_factor!r}")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _MOST_MSCALE:
                raise SpecError(f"rotary scaling {self.kind}: `{name}` must lie in 0..{_MOST_MSCALE:g}, got {value!r}")
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise SpecError(
                f"rotary scaling {self.kind}: `beta_slow` and `beta_fast` must be positive, the first not larger, "
                f"got {self.beta_slow!r} and {self.beta_fast!r}"
            )
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or not 0 < low <= high < math.inf:
                raise SpecError(
                    "rotary scaling llama3: `low_freq_factor` and `high_freq_factor` must be positive, the first not larger, got "
                    f"{low!r} and {high!r}"
                )
        if self.kind == "longrope" and self.attention_factor is None and self.original_max_position_embeddings < 2:
            raise SpecError("rotary scaling longrope: `original_max_position_embeddings` must be at least 2 to give an attention factor")
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if bool(values) != (self.kind == "longrope") or not all(0 < v < math.inf for v in values):
                raise SpecError(f"rotary scaling {self.kind}: `{name}` must hold positive numbers with longrope, and none otherwise")

        if (self.short_mscale is None) != (self.long_mscale is None) or (self.short_mscale is not None and self.kind != "longrope"):
            raise SpecError(f"rotary scaling {self.kind}: `short_mscale` and `long_mscale` belong together, and to longrope")
        for name in ("short_mscale", "long_mscale"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_FLOAT32:
                raise SpecError(f"rotary scaling {self.kind}: `{name}` must be positive, in float32, got {value!r}")
        if self.short_mscale is not None and self.attention_factor is not None:
            raise SpecError("rotary scaling longrope: `attention_factor` must be None beside `short_mscale` and `long_mscale`")

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on how long the sequence is (and keys in the cache keep those they were rotated with)."""
        return self.kind in ("dynamic", "longrope")

    @property
    def context_length(self) -> int:
        """Longest sequence that the scaling is meant for."""
        return math.ceil(self.factor * self.original_max_position_embeddings)

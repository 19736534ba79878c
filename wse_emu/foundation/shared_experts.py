"""A feed-forward network that every token of a layer with a mixture passes, beside the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExperts:
    """Shared experts; several of them are one network of their widths together."""

    intermediate_size: int
    """Width of all of them together."""
    gated: bool = False
    """Whether their output is multiplied by ``sigmoid(x @ gate)``, one number for each token."""

    def __post_init__(self) -> None:
        if type(self.intermediate_size) is not int or self.intermediate_size < 1:
            raise SpecError(f"`intermediate_size` of `shared_experts` must be a positive integer, got {self.intermediate_size!r}")

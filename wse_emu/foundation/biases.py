"""Which linear maps of a model add a bias."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Biases:
    """Biases of linear maps; a Llama has none."""

    qkv: bool = False
    """Projections to queries, keys and values."""
    out: bool = False
    """Projection of the attention's context."""
    head: bool = False
    """Output projection to the vocabulary."""

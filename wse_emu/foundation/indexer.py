"""The lightning indexer of DeepSeek Sparse Attention: small queries and keys of its own say which keys a token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.rotary_spec import RotarySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexer:
    """Sizes and rules of the indexer.

    A key at position ``s`` scores ``sum_h weight[h] * relu(q[h] . k[s])`` for a token: its queries ``q`` are made of the short vector that
    attention's queries are made of, the one key of a token and the weights of the heads of the token itself. The `topk` keys that score
    highest are attended to, of equal scores the earlier ones.

    References
    ----------
    DeepSeek-AI, "DeepSeek-V3.2: Pushing the frontier of open large language models", 2025, section 2.1.
    """

    num_heads: int
    head_dim: int
    """Elements of a query and of the key, even; as many as the rotary key are rotated, the first ones."""
    topk: int
    """Keys that a token attends to, at most."""
    interleaved: bool = False
    """Whether neighbours are the rotary pairs, not halves; whatever attention itself does."""
    shared_layers: tuple[int, ...] = ()
    """Layers that attend to the keys that the layer before them chose, ascending; they have no indexer."""
    norm_eps: float = 1e-6
    """Of the LayerNorm of the keys."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "topk"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SpecError(f"`{name}` of `indexer` must be an integer >= 1, got {value!r}")
        if self.head_dim % 2:
            raise SpecError(f"`head_dim` of `indexer` must be even, got {self.head_dim}")
        layers = self.shared_layers
        if any(type(i) is not int or i < 1 for i in layers) or any(a >= b for a, b in pairwise(layers)):
            raise SpecError(f"`shared_layers` of `indexer` must be ascending layers, the first layer not among them, got {layers}")
        if not 0 < self.norm_eps < 1:
            raise SpecError(f"`norm_eps` of `indexer` must lie in (0, 1), got {self.norm_eps!r}")

    def runs_in(self, layer: int) -> bool:
        """Whether a layer chooses its keys itself."""
        return layer not in self.shared_layers

    def pairs(self, rope_dim: int) -> NDArray[np.int64]:
        """Elements of every pair unit of a query or key, (head_dim / 2, 2): the rotated ones, `rope_dim` elements, then the others."""
        return RotarySpec(dim=rope_dim, interleaved=self.interleaved).pairs(self.head_dim)

    @property
    def score_scale(self) -> float:
        """Factor of a query's product with a key."""
        return float(self.head_dim**-0.5)

    @property
    def weight_scale(self) -> float:
        """Factor of the weights of the heads."""
        return float(self.num_heads**-0.5)

    def params(self, hidden: int, q_lora_rank: int) -> int:
        """Parameters of one layer's indexer."""
        return self.num_heads * (self.head_dim * q_lora_rank + hidden) + self.head_dim * (hidden + 2)

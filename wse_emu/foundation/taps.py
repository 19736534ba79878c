"""What the probe channel brings back: the value of every stage of a forward pass, in published (Hugging Face) order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stage = tuple[int | None, str]
"""Layer index (None outside the layers) and the stage's name."""


def joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Values of tokens after one another; where they have an axis of keys, the shorter ones are filled with zeros."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
    return np.concatenate(parts)


@dataclass(slots=True)
class TapRecord:
    """Stages of one forward pass over ``T`` flattened, unpadded tokens ordered by (sequence, position)."""

    seq: NDArray[np.int64]
    """(T,) sequence of each token."""
    pos: NDArray[np.int64]
    """(T,) absolute position of each token in its sequence."""
    token_ids: NDArray[np.int64]
    """(T,) token ids."""
    stages: dict[Stage, NDArray[Any]] = field(default_factory=dict)
    """Stage to array, in the order in which the stages ran."""
    row_of_token: NDArray[np.int64] | None = None
    """(T,) row of cores that holds each token, if a wafer ran it."""
    row_in_attention: NDArray[np.int64] | None = None
    """(T,) the same in attention, where the batch goes through it in tiles."""
    pass_of_token: NDArray[np.int64] | None = None
    """(T,) number of the forward pass that took each token in, if there was more than one: where a routing rule lets tokens meet, those of
    one sequence and one pass do."""
    col_starts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Axis name ("hidden", "ffn", "expert", "heads", "vocab") to the first element of every column's block, in the wafer layout's order."""

    @property
    def together(self) -> NDArray[np.int64]:
        """(T,) one number for the tokens of one sequence that one forward pass took in."""
        passes = np.zeros_like(self.seq) if self.pass_of_token is None else self.pass_of_token
        return np.unique(np.stack([self.seq, passes]), axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)

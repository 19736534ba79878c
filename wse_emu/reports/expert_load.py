"""How evenly tokens spread over experts, and each expert's tokens over the rows of cores.

Tokens never leave their row: while an expert's weights stream past, each row applies them to its own tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.wafer.placement import TokenBands


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Decisions of one MoE layer, over all forward passes of a run."""

    by_expert: NDArray[np.int64]
    """(n_experts,) times that each expert was chosen."""
    by_row: NDArray[np.float64]
    """(n_experts, rows) the same by row of cores: a choice of a token whose band spans several rows, which share its features, counts in
    equal parts on each of them."""
    busiest_rows: float
    """Sum over passes and experts of the load of the expert's busiest row."""

    @property
    def expert_ratio(self) -> float:
        """Load of the busiest expert over the mean of all experts."""
        return float(self.by_expert.max() / self.by_expert.mean())

    @property
    def row_ratio(self) -> float:
        """Expert by expert and pass by pass, load of the busiest row over the mean of all rows of the grid, weighted by load."""
        return float(self.busiest_rows / (self.by_expert.sum() / self.by_row.shape[1]))


def expert_load(routing: Sequence[RoutingTrace], n_experts: int, rows: int) -> tuple[ExpertLoad, ...]:
    """Load of every MoE layer.

    Parameters
    ----------
    routing : sequence of RoutingTrace
        One for each forward pass.
    n_experts : int
    rows : int
        Rows of cores; the bands of rows that hold the tokens are those of `TokenBands`.

    Returns
    -------
    tuple of ExpertLoad
        Empty if the traces hold no layer.
    """
    return tuple(_layer_load([trace.topk_ids[i] for trace in routing], n_experts, rows) for i in range(len(routing[0].topk_ids)))


def _layer_load(passes: Sequence[NDArray[np.int64]], n_experts: int, rows: int) -> ExpertLoad:
    by_expert = np.zeros(n_experts, np.int64)
    by_row = np.zeros((n_experts, rows))
    busiest = 0.0
    for ids in passes:
        bands = TokenBands(ids.shape[0], rows)
        span = bands.n_feature_bands
        band = bands.split.owner // span
        by_band = np.zeros((n_experts, bands.n_token_bands), np.int64)
        taken = ids >= 0
        np.add.at(by_band, (ids[taken], np.broadcast_to(band[:, None], ids.shape)[taken]), 1)
        by_expert += by_band.sum(axis=1)
        by_row[:, : bands.used_rows] += np.repeat(by_band / span, span, axis=1)
        busiest += float(by_band.max(axis=1).sum() / span)
    return ExpertLoad(by_expert, by_row, busiest)

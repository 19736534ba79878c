"""What the last call of a model did, taken from public accounts: ledger, SRAM, recorded routing, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.wafer_spec import WaferSpec
from wse_emu.reports.expert_load import ExpertLoad, expert_load
from wse_emu.wafer.ledger import FABRIC_KINDS, ForwardPass, Ledger
from wse_emu.wafer.sram import SramMap
from wse_emu.wafer.wafer import Wafer

Ints = NDArray[np.int64]


class Model(Protocol):
    """What a report reads of a model; `wse_emu.WaferModel` has it."""

    spec: ModelSpec
    recorded_routing: list[RoutingTrace]
    recorded_kv: Ints | None
    recorded_from: int

    @property
    def wafer(self) -> Wafer:
        """The wafer that ran it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTotals:
    """What one forward pass did."""

    phase: str
    n_tokens: int
    macs: int
    streamed_bytes: int
    """Weights from MemoryX."""
    fabric_bytes: int
    """Moved between cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call of a model, as `Run.of` found it; later calls do not change it."""

    model: ModelSpec
    wafer: WaferSpec
    rows: int
    cols: int
    executor: str
    totals: tuple[Mapping[str, Any], ...]
    """Rows of `Ledger.totals` by layer, stage and kind."""
    passes: tuple[PassTotals, ...]
    sram: Ints
    """(rows, cols) bytes on every core, code included, at the fullest moment since the wafer was made."""
    worst: SramMap | None
    """What lay on the fullest core then; None if nothing was placed."""
    experts: tuple[ExpertLoad, ...]
    """One for each MoE layer; empty for a dense model."""
    kv: Ints
    """(n_layers, n_sequences, rows) tokens whose keys and values each row of cores held at the end."""

    @staticmethod
    def of(model: Model) -> Run:
        """Look at the last call (forward, `generate`, `verify`) of a model.

        Parameters
        ----------
        model : WaferModel

        Returns
        -------
        Run

        Raises
        ------
        InputError
            If the model was not called, or the wafer's ledger was cleared since.
        """
        wafer, ledger, routing = model.wafer, model.wafer.ledger, model.recorded_routing
        passes = ledger.passes(model.recorded_from)[: len(routing)]
        if not routing or model.recorded_kv is None:
            raise InputError("there is nothing to report: the model was not called, or its last call ended before the first forward pass")
        taken = [trace.topk_ids[0].shape[0] for trace in routing if trace.topk_ids]
        if len(passes) < len(routing) or taken not in ([], [p.n_tokens for p in passes]):
            raise InputError("the ledger does not hold the model's last call any more: take the report before the ledger is cleared")
        return Run(
            model=model.spec,
            wafer=wafer.spec,
            rows=wafer.rows,
            cols=wafer.cols,
            executor=wafer.executor,
            totals=tuple(ledger.totals(by=("layer", "stage", "kind"), start=passes[0].start, stop=passes[-1].stop)),
            passes=tuple(_pass_totals(ledger, p) for p in passes),
            sram=wafer.sram.high_water_by_core,
            worst=wafer.sram.high_water_map,
            experts=expert_load(routing, model.spec.num_experts, wafer.rows),
            kv=model.recorded_kv,
        )

    def total(self, field: str, *kinds: str) -> int:
        """Sum of a field of the ledger over some kinds of events, by default all."""
        return sum(int(row[field]) for row in self.totals if not kinds or row["kind"] in kinds)


def _pass_totals(ledger: Ledger, p: ForwardPass) -> PassTotals:
    rows: Sequence[Mapping[str, Any]] = ledger.totals(by=("kind",), start=p.start, stop=p.stop)
    return PassTotals(
        phase=p.phase,
        n_tokens=p.n_tokens,
        macs=sum(row["macs"] for row in rows),
        streamed_bytes=sum(row["bytes"] for row in rows if row["kind"] == "stream"),
        fabric_bytes=sum(row["bytes"] for row in rows if row["kind"] in FABRIC_KINDS),
    )

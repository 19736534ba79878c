"""What a run tells people: emulated quantities from the ledger; host seconds apart from them, always."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from wse_emu.wafer.ledger import EDGE_KINDS, FABRIC_KINDS
from wse_emu.wafer.sram import numbered_runs


class StageTotals(NamedTuple):
    """What one stage of the program did, over all layers and tokens."""

    stage: str
    macs: int
    """Multiply-adds on cores."""
    streamed_bytes: int
    """Weights from MemoryX over the wafer's edge."""
    edge_bytes: int
    """Tokens in, logits out."""
    fabric_wavelets: int
    """32-bit words moved between cores; a multicast counts once."""
    busiest_link_wavelets: int
    """Most wavelets over one link in one move, streaming included."""


class _Console(Console):
    """A console on which a reader that left is an error like any other, not an exit of its own."""

    def on_broken_pipe(self) -> None:
        """Let the error through that is being handled."""
        raise


def console() -> Console:
    """Console for stdout, so wide that no number is ever cut; the tables are made for 80 columns."""
    return _Console(file=sys.stdout, width=200, highlight=False)


def stage_totals(rows: Iterable[Mapping[str, Any]]) -> list[StageTotals]:
    """Sum ledger rows (grouped by stage and kind) to one line per stage, in order of first appearance; probes are left out."""
    stages: dict[str, StageTotals] = {}
    for row in rows:
        kind = row["kind"]
        if kind in ("probe", "control"):
            continue
        old = stages.get(row["stage"], StageTotals(row["stage"], 0, 0, 0, 0, 0))
        stages[row["stage"]] = StageTotals(
            stage=old.stage,
            macs=old.macs + row["macs"],
            streamed_bytes=old.streamed_bytes + (row["bytes"] if kind == "stream" else 0),
            edge_bytes=old.edge_bytes + (row["bytes"] if kind in EDGE_KINDS else 0),
            fabric_wavelets=old.fabric_wavelets + (row["wavelets"] if kind in FABRIC_KINDS else 0),
            busiest_link_wavelets=max(old.busiest_link_wavelets, row["max_link_wavelets"]),
        )
    return list(stages.values())


def channel_bytes(rows: Iterable[Mapping[str, Any]], kind: str) -> int:
    """Bytes over one of the side channels, ``"control"`` or ``"probe"``."""
    return sum(int(row["bytes"]) for row in rows if row["kind"] == kind)


def ledger_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Table of emulated quantities by stage, with their totals."""
    table = _table(title)
    stages = stage_totals(rows)
    total = StageTotals(
        "all",
        sum(s.macs for s in stages),
        sum(s.streamed_bytes for s in stages),
        sum(s.edge_bytes for s in stages),
        sum(s.fabric_wavelets for s in stages),
        max((s.busiest_link_wavelets for s in stages), default=0),
    )
    table.add_column("stage", footer=total.stage)
    heads = (
        "MACs",
        "weights\nstreamed\nbytes",
        "tokens in,\nlogits out\nbytes",
        "between\ncores\nwavelets",
        "busiest\nlink\nwavelets",
    )
    for head, value in zip(heads, total[1:], strict=True):
        table.add_column(head, footer=f"{value:,}", justify="right")
    for stage in stages:
        table.add_row(stage.stage, *(f"{value:,}" for value in stage[1:]))
    return table


def sram_table(title: str, blocks: Sequence[tuple[str, int]], used_bytes: int, capacity_bytes: int) -> Table:
    """Table of what lies on one core."""
    table = _table(title)
    table.add_column("block", footer="together")
    table.add_column("bytes", footer=f"{used_bytes:,} of {capacity_bytes:,}", justify="right")
    for name, size in numbered_runs(blocks):
        table.add_row(name, f"{size:,}")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_footer=True, box=SIMPLE, show_edge=False, pad_edge=False)

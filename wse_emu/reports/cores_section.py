"""What lay where: SRAM of all cores, experts' tokens by row, keys and values by row."""

from __future__ import annotations

from typing import Final

import numpy as np

from wse_emu.foundation.units import counted
from wse_emu.reports.charts import Axes, Binned, RowBars, Segment, bar, binned, heat_map, scale
from wse_emu.reports.expert_load import ExpertLoad
from wse_emu.reports.markup import Markup, join, table, tag
from wse_emu.reports.run import Run
from wse_emu.wafer.placement import Split
from wse_emu.wafer.sram import SramMap

_MOST: Final = 96
"""Rows and columns of cores that a map tells apart."""
_MOST_EXPERTS: Final = 64
_MOST_ROWS: Final = 48
"""Experts and rows of cores, in the maps of experts."""


def binning(shown: Binned, row: str, col: str) -> str:
    """What a square of a map stands for; empty if for one entry."""
    if not shown.is_binned:
        return ""
    return f" Each square shows the largest of up to {shown.rows.max_size} {row} x {shown.cols.max_size} {col}."


def sram_section(run: Run) -> Markup:
    """Heat map of all cores, and what lay on the fullest one."""
    capacity = run.wafer.sram_bytes_per_core
    shown = binned(run.sram, _MOST, _MOST)
    low, middle, high = int(run.sram.min()), int(np.median(run.sram)), int(run.sram.max())
    gauge = bar(
        [Segment("least", low, f"every core: {low:,} bytes"), Segment("most", high - low, f"up to {high:,} bytes")], capacity, "bar gauge"
    )
    return join([
        tag("p", f"Bytes on every core, code included, at the fullest moment since the wafer was made. Rows of cores run down, columns "
                 f"across.{binning(shown, 'rows', 'columns')}", class_="lead"),
        tag("p", f"Of {capacity:,} bytes the fullest core held ", tag("b", f"{high:,}"), f" ({high / capacity:.1%}), the emptiest {low:,}, "
                 f"the median core {middle:,}."),
        gauge,
        tag("div", tag("div", *_sram_map(run, shown)), None if run.worst is None else _worst_core(run.worst), class_="pair"),
    ])  # fmt: skip


def _sram_map(run: Run, shown: Binned) -> list[Markup]:
    picture = heat_map(shown, run.wafer.sram_bytes_per_core, Axes("row", "column", "bytes"))
    return [tag("h3", "Bytes per core"), tag("div", picture, class_="scroll", tabindex=0), scale(run.wafer.sram_bytes_per_core, "bytes")]


def _worst_core(lies: SramMap) -> Markup:
    rows = [[name, join([f"{size:,}", bar([Segment("held", size, f"{size:,} bytes")], lies.capacity_bytes)])] for name, size in lies.blocks]
    foot = ["together", f"{lies.used_bytes:,}"]
    head = tag("h3", f"Blocks on the fullest core, row {lies.row}, column {lies.col}")
    return tag("div", head, table(["block", f"bytes of {lies.capacity_bytes:,}"], rows, foot, id="worst-core"), class_="wide")


_WORDS: Final = (
    "Tokens never leave their row of cores: an expert's weights stream past, and each row applies them to its own tokens that chose it. "
    "Experts run down, rows of cores across; the bars at the right are an expert's choices in all rows. A token whose band spans several "
    "rows, which share its features, counts in equal parts on each of them."
)
_RATIOS: Final = (
    ": choices of the busiest expert over the mean of all. ",
    ": load of the busiest row over the mean row, taken for every expert in every forward pass and weighted by load. 1 would be even.",
)


def experts_section(run: Run) -> Markup:
    """For each MoE layer, how often each expert was chosen, by row of cores."""
    full = max(float(load.by_row.max()) for load in run.experts)
    most = max(int(load.by_expert.max()) for load in run.experts)
    word = "layer" if len(run.experts) == run.model.num_layers else "MoE layer"
    note = binning(binned(run.experts[0].by_row, _MOST_EXPERTS, _MOST_ROWS), "experts", "rows")
    chosen = counted(sum(int(load.by_expert.sum()) for load in run.experts), "choice")
    return join([
        tag("p", f"{chosen} among {run.model.num_experts} experts, {run.model.top_k} per token and layer. {_WORDS}{note}", class_="lead"),
        tag("p", tag("b", "experts"), _RATIOS[0], tag("b", "rows"), _RATIOS[1], class_="lead"),
        tag("div", *(_expert_map(load, f"{word} {i}", full, most) for i, load in enumerate(run.experts)), class_="maps"),
        scale(full, "choices on one row"),
    ])  # fmt: skip


def _expert_map(load: ExpertLoad, name: str, full: float, most: int) -> Markup:
    shown = binned(load.by_row, _MOST_EXPERTS, _MOST_ROWS)
    beside = binned(load.by_expert[:, None], _MOST_EXPERTS, 1).values[:, 0]
    ratios = f", max/mean: experts {load.expert_ratio:.2f}, rows {load.row_ratio:.2f}"
    axes = Axes("expert", "row", "choices", width=220)
    return tag(
        "figure", tag("figcaption", tag("b", name), ratios), heat_map(shown, full, axes, beside=RowBars(beside.tolist(), most)),
    )  # fmt: skip


def kv_section(run: Run) -> Markup:
    """Tokens of the key/value cache by layer and row of cores; layers that are alike share a line."""
    by_layer = run.kv.sum(axis=1)
    first = np.flatnonzero(np.concatenate([[True], (np.diff(by_layer, axis=0) != 0).any(axis=1)]))
    groups = Split(len(by_layer), first, np.append(first[1:], len(by_layer)))
    shown = binned(by_layer[first], len(first), _MOST)._replace(rows=groups)
    note = f" Each square shows the largest of up to {shown.cols.max_size} rows." if shown.cols.max_size > 1 else ""
    full = int(by_layer.max())
    lengths = run.kv.sum(axis=2)
    alike = "All layers hold the same." if len(first) == 1 else "Layers that follow each other and hold the same share a line."
    sequences = table(
        ["sequence", "tokens held", "fewest on a row", "most on a row"],
        [[str(s), *(f"{n:,}" for n in (lengths[:, s].max(), run.kv[:, s].min(), run.kv[:, s].max()))] for s in range(run.kv.shape[1])],
        id="kv",
        style="narrow",
    )
    return join([
        tag("p", f"Tokens whose keys and values each row of cores held at the end, all sequences together. Layers run down, rows of cores "
                 f"across. {alike}{note}", class_="lead"),
        tag("div", heat_map(shown, full, Axes("layer", "row", "tokens")), class_="scroll", tabindex=0),
        scale(full, "tokens"),
        tag("h3", "By sequence"),
        sequences,
    ])  # fmt: skip

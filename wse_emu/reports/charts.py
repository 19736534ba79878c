"""Pictures as inline SVG: bars, columns and heat maps. Colors are classes, so that one style sheet serves light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wse_emu.reports.markup import Markup, join, tag
from wse_emu.wafer.placement import Split

LEVELS: Final = 12
"""Steps of a color scale; of 49,152 bytes, one step is 4,096."""
_TITLED_CELLS: Final = 600
"""Cells up to which each is an element with a text of its own; larger maps are drawn level by level."""


class Segment(NamedTuple):
    """One part of a bar."""

    style: str
    """CSS class that gives the color."""
    value: float
    title: str
    """Shown by the browser when the pointer rests on it."""


def bar(segments: Iterable[Segment], full: float, style: str = "bar") -> Markup:
    """Parts of one bar side by side; `full` fills the width. `style` names its CSS classes."""
    x, parts = 0.0, []
    for part in segments:
        width = 100 * part.value / full if full else 0.0
        if width:
            parts.append(tag("rect", tag("title", part.title), x=x, y=0, width=width, height=10, class_=part.style))
        x += width
    return tag("svg", *parts, class_=style, viewBox="0 0 100 10", preserveAspectRatio="none", role="img")


def columns(values: Sequence[Segment], full: float) -> Markup:
    """One upright bar for each value; `full` fills the height."""
    step = 100 / max(1, len(values))
    gap = 0.12 * step if len(values) > 1 else 0.0
    parts = []
    for i, part in enumerate(values):
        height = 100 * part.value / full if full else 0.0
        box = tag("rect", x=i * step, y=0, width=step, height=100, class_="hit")
        parts.append(
            tag("g", tag("title", part.title), box,
                tag("rect", x=i * step + gap / 2, y=100 - height, width=step - gap, height=height, class_=part.style))
        )  # fmt: skip
    return tag("svg", *parts, class_="columns", viewBox="0 0 100 100", preserveAspectRatio="none", role="img")


class Binned(NamedTuple):
    """A table made small enough to be seen: each entry is the largest of its bin."""

    values: NDArray[np.float64]
    rows: Split
    """Which rows of the table each row of `values` stands for."""
    cols: Split

    @property
    def is_binned(self) -> bool:
        """Whether some bin holds more than one entry."""
        return self.rows.max_size > 1 or self.cols.max_size > 1


def binned(table: NDArray[np.float64] | NDArray[np.int64], max_rows: int, max_cols: int) -> Binned:
    """Largest values of a table in at most `max_rows` x `max_cols` bins of adjacent entries, sizes differing by at most one."""
    rows, cols = (Split.balanced(n, min(n, most)) for n, most in zip(table.shape, (max_rows, max_cols), strict=True))
    largest = np.maximum.reduceat(np.maximum.reduceat(table.astype(np.float64), rows.starts, axis=0), cols.starts, axis=1)
    return Binned(largest, rows, cols)


def bin_name(split: Split, i: int) -> str:
    """The entries of one bin, for instance ``"7"`` or ``"4-7"``."""
    first, last = int(split.starts[i]), int(split.stops[i]) - 1
    return str(first) if first == last else f"{first}\N{EN DASH}{last}"


def level(value: float, full: float) -> int:
    """Step of the color scale from 0 (nothing) to `LEVELS` (more than eleven twelfths of `full`)."""
    return int(np.ceil(LEVELS * min(value, full) / full)) if full and value > 0 else 0


class Axes(NamedTuple):
    """What the rows and columns of a heat map are called, and how wide it is drawn."""

    row: str
    col: str
    unit: str
    width: int = 680
    """Largest width of the cells together, in CSS pixels."""


class RowBars(NamedTuple):
    """Bars to the right of a heat map, one for each of its rows."""

    values: Sequence[float]
    full: float
    """Value of the longest bar."""


_WIDE: Final = 64
"""Width of a cell that holds its number."""
_LABEL: Final = 44
_TOP: Final = 18
_BAR: Final = 70
"""Room for row labels, for column labels, and for the longest bar beside a row."""


def heat_map(table: Binned, full: float, axes: Axes, *, beside: RowBars | None = None) -> Markup:
    """Cells colored by value, `full` being the last step of the scale; with few cells, their numbers are written in them.

    Parameters
    ----------
    table : Binned
    full : float
    axes : Axes
    beside : RowBars, optional
        Drawn where the rows are high enough to be told apart.
    """
    n_rows, n_cols = table.values.shape
    written = n_cols * _WIDE <= axes.width and n_rows <= 24
    width = _WIDE if written else min(22.0, max(axes.width / n_cols, 3.0))
    height = 24.0 if written else max(min(width, 22.0), 5.0)
    right = _LABEL + n_cols * width + 1
    return tag(
        "svg", *_labels(table, width, height), _cells(table, full, axes, width, height, written),
        *([] if beside is None else _row_bars(beside, right, height)), role="img", class_="heat",
        width=right if beside is None else right + _BAR + 60, height=_TOP + n_rows * height + 1,
        aria_label=f"{axes.unit} by {axes.row} and {axes.col}",
    )  # fmt: skip


def _row_bars(beside: RowBars, left: float, height: float) -> list[Markup]:
    """Bars beside the rows, with their numbers where they can be read."""
    out = []
    for i, value in enumerate(beside.values):
        y, width = _TOP + i * height, _BAR * value / beside.full if beside.full else 0.0
        out.append(
            tag("rect", tag("title", number(value)), x=left + 9, y=y + 0.2 * height, width=width, height=0.6 * height, class_="held")
        )
        if height >= 11:
            out.append(tag("text", number(value), x=left + width + 14, y=y + height / 2, class_="beside"))
    return out


def _labels(table: Binned, width: float, height: float) -> list[Markup]:
    """Names beside rows and above columns, of as many as can be read; the first entry of a bin where they stand close."""
    rows, cols = _shown(table.rows, height, 12), _shown(table.cols, width, 40)
    out = [tag("text", name, x=_LABEL - 6, y=_TOP + (i + 0.5) * height, class_="tick row") for i, name in rows]
    return out + [tag("text", name, x=_LABEL + (i + 0.5) * width, y=_TOP - 6, class_="tick col") for i, name in cols]


def _shown(split: Split, size: float, room: float) -> list[tuple[int, str]]:
    """``(bin, name)`` of every bin if one of `size` pixels has the `room`, else of some, by steps of 1, 2 or 5 times a power of ten."""
    if size >= room:
        return [(i, bin_name(split, i)) for i in range(len(split))]
    step = next(m * 10**e for e in range(9) for m in (1, 2, 5) if m * 10**e * size >= room)
    return [(i, str(split.starts[i])) for i in range(0, len(split), step)]


def _cells(table: Binned, full: float, axes: Axes, width: float, height: float, written: bool) -> Markup:
    levels = np.vectorize(level, otypes=[np.int64])(table.values, full)
    if levels.size > _TITLED_CELLS:
        return _areas(levels, width, height)
    parts = []
    for (i, j), value in np.ndenumerate(table.values):
        x, y = _LABEL + j * width, _TOP + i * height
        where = f"{axes.row} {bin_name(table.rows, i)}, {axes.col} {bin_name(table.cols, j)}: {number(value)} {axes.unit}"
        cell = tag("rect", tag("title", where), x=x, y=y, width=width, height=height, class_=f"c c{levels[i, j]}")
        text = None
        if written:
            text = tag("text", number(value), x=x + width / 2, y=y + height / 2, class_=f"in in{levels[i, j]}")
        parts.append(join([cell, text]))
    return join(parts)


def _areas(levels: NDArray[np.int64], width: float, height: float) -> Markup:
    """One path for each level, of runs along the rows."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(levels):
        edges = np.concatenate([[0], np.flatnonzero(np.diff(row)) + 1, [row.size]]).tolist()
        for first, stop in pairwise(edges):
            paths.setdefault(int(row[first]), []).append(f"M{first} {i}h{stop - first}v1H{first}z")
    cells = (tag("path", d="".join(paths[n]), class_=f"c{n}") for n in sorted(paths))
    return tag("g", *cells, transform=f"translate({_LABEL} {_TOP}) scale({width:.4f} {height:.4f})", shape_rendering="crispEdges")


def scale(full: float, unit: str) -> Markup:
    """The color scale of a heat map: nothing, then `LEVELS` steps up to `full`."""
    steps = [tag("rect", x=n * 20, y=0, width=20, height=12, class_=f"c c{n}") for n in range(LEVELS + 1)]
    picture = tag("svg", *steps, width=20 * (LEVELS + 1), height=12, class_="scale", role="img", aria_label="color scale")
    return tag("p", tag("span", "0"), picture, tag("span", f"{number(full)} {unit}"), class_="scale")


def number(value: float) -> str:
    """A number for people: thousands apart, at most two decimals."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")

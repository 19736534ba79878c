"""Closed forms of what moves cost: sums over rows and columns instead of messages one by one.

Every function counts exactly what `traffic.Traffic` counts when the isolated executor sends the same messages; tests hold them together.
Lines are rows or columns of cores; `sizes` are 32-bit words per line. Empty messages are never sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.wafer_spec import BYTES_PER_WAVELET
from wse_emu.wafer.ledger import Event

Ints = NDArray[np.int64]

COLORS = {
    "inject": 1,
    "drain": 1,
    "stream": 1,
    "broadcast": 2,
    "chain": 2,
    "deliver": 2,
    "allgather": 2,
    "shift": 2,
    "send": 4,
    "gather": 4,
    "control": 2,
    "probe": 1,
}
"""Colors that the routes of each kind of move need: one for a stream in one direction, two where both directions of a line are used or
neighbours alternate between sending and receiving, four for routes that turn."""


def moved(kind: str, name: str, *, count: int, words: int, hops: int, max_link: int, max_hops: int) -> Event:
    """An event from its sums; a move without messages needs no colors."""
    return Event(
        None, "", kind, name, count=count, bytes=words * BYTES_PER_WAVELET, wavelets=words, wavelet_hops=hops,
        max_link_wavelets=max_link, max_hops=max_hops, colors=COLORS[kind] if count else 0,
    )  # fmt: skip


def chain(name: str, sizes: Ints, stations: Ints, *, messages: int = 1, kind: str = "chain") -> Event:
    """Each line passes its block from station to station; `messages` pieces per line and hop between stations."""
    lines = sizes[sizes > 0]
    if stations.size < 2 or not lines.size:
        return moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    total = int(lines.sum())
    hands = int(stations.size - 1)
    return moved(
        kind, name, count=messages * int(lines.size) * hands, words=total * hands, hops=total * int(stations[-1] - stations[0]),
        max_link=int(lines.max()), max_hops=int(np.diff(stations).max()),
    )  # fmt: skip


def multicast(name: str, sizes: Ints, source: int, targets: Ints, *, messages: int = 1, kind: str = "broadcast") -> Event:
    """Each line sends its block from `source` to all `targets` as one tree (`messages` pieces); a target may be the source itself."""
    lines = sizes[sizes > 0]
    away = targets[targets != source]
    if not away.size or not lines.size:
        return moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    low, high = min(int(away.min()), source), max(int(away.max()), source)
    total = int(lines.sum())
    return moved(
        kind, name, count=messages * int(lines.size), words=total, hops=total * (high - low), max_link=int(lines.max()),
        max_hops=max(source - low, high - source),
    )  # fmt: skip


def deliver(name: str, sizes: Ints, source: int, shares: Ints, *, messages: int | None = None, kind: str = "deliver") -> Event:
    """Each line sends ``sizes[line] * shares[p]`` words from `source` to every position p, one message each; its own share stays."""
    lines = sizes[sizes > 0]
    places = np.flatnonzero(shares)
    places = places[places != source]
    if not places.size or not lines.size:
        return moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    total = int(lines.sum())
    part = shares[places]
    distance = np.abs(places - source)
    west = int(part[places < source].sum())
    east = int(part[places > source].sum())
    count = int(places.size) * int(lines.size) if messages is None else messages
    return moved(
        kind, name, count=count, words=total * int(part.sum()), hops=total * int((part * distance).sum()),
        max_link=int(lines.max()) * max(west, east), max_hops=int(distance.max()),
    )  # fmt: skip


def edge(kind: str, name: str, row_words: Ints, col_factor: Ints) -> Event:
    """Every core (r, c) exchanges ``row_words[r] * col_factor[c]`` words with the host at the north end of its column."""
    rows = np.flatnonzero(row_words)
    cols = col_factor[col_factor > 0]
    if not rows.size or not cols.size:
        return moved(kind, name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    words = row_words[rows]
    total = int(cols.sum())
    below = int(words[rows > 0].sum())
    return moved(
        kind, name, count=int(rows.size * cols.size), words=int(words.sum()) * total, hops=int((words * rows).sum()) * total,
        max_link=below * int(cols.max()), max_hops=int(rows.max()),
    )  # fmt: skip


def shift(name: str, row_words: Ints, col_factor: Ints, n: int) -> Event:
    """Every core sends its block `n` rows down (up if negative); blocks that would leave the grid stay where they are."""
    rows = np.arange(row_words.size)
    stays = (rows + n < 0) | (rows + n >= row_words.size)
    words = np.where(stays, 0, row_words)
    cols = col_factor[col_factor > 0]
    if n == 0 or not words.any() or not cols.size:
        return moved("shift", name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    total = int(words.sum()) * int(cols.sum())
    step = abs(n)
    window = np.convolve(words, np.ones(step, np.int64))
    return moved(
        "shift", name, count=int(np.count_nonzero(words)) * int(cols.size), words=total, hops=total * step,
        max_link=int(window.max()) * int(cols.max()), max_hops=step,
    )  # fmt: skip


def gather(name: str, row_words: Ints, col_factor: Ints, core: tuple[int, int]) -> Event:
    """Every core sends its block to `core`, along its row first, then along the column."""
    row, col = core
    rows, cols = np.arange(row_words.size), np.arange(col_factor.size)
    n_rows, n_cols = np.count_nonzero(row_words), np.count_nonzero(col_factor)
    count = int(n_rows * n_cols) - int(row_words[row] > 0 and col_factor[col] > 0)
    if count <= 0:
        return moved("gather", name, count=0, words=0, hops=0, max_link=0, max_hops=0)
    row_sum, col_sum = int(row_words.sum()), int(col_factor.sum())
    sides = max(int(col_factor[:col].sum()), int(col_factor[col + 1 :].sum())) * int(row_words.max())
    ends = max(int(row_words[:row].sum()), int(row_words[row + 1 :].sum())) * col_sum
    hops = int((row_words * np.abs(rows - row)).sum()) * col_sum + row_sum * int((col_factor * np.abs(cols - col)).sum())
    far = int(np.abs(rows[row_words > 0] - row).max()) + int(np.abs(cols[col_factor > 0] - col).max())
    return moved(
        "gather", name, count=count, words=row_sum * col_sum - int(row_words[row] * col_factor[col]), hops=hops,
        max_link=max(sides, ends), max_hops=far,
    )  # fmt: skip


def allgather(name: str, groups: Sequence[tuple[Ints, Ints, int]]) -> Event:
    """All-gather inside groups of adjacent rows: every member multicasts its share to the others.

    Parameters
    ----------
    name : str
        Tensor.
    groups : sequence of (sizes, shares, n_lines)
        For each kind of line: ``sizes`` words per unit share of every group (one entry a group), ``shares`` of the members in order, and
        the number of equal lines (columns).
    """
    count = words = hops = max_link = max_hops = 0
    for sizes, shares, n_lines in groups:
        lines = sizes[sizes > 0]
        members = shares.size
        senders = np.flatnonzero(shares)
        if members < 2 or not senders.size or not lines.size or not n_lines:
            continue
        total = int(lines.sum()) * n_lines
        part = int(shares.sum())
        count += int(senders.size) * int(lines.size) * n_lines
        words += total * part
        hops += total * part * (members - 1)
        max_link = max(max_link, int(lines.max()) * (part - int(min(shares[0], shares[-1]))))
        max_hops = max(max_hops, int(np.maximum(senders, members - 1 - senders).max()))
    return moved("allgather", name, count=count, words=words, hops=hops, max_link=max_link, max_hops=max_hops)


def merge(kind: str, name: str, events: Sequence[Event]) -> Event:
    """One event for moves that share no link: counts add up, maxima are maxima."""
    return Event(
        None, "", kind, name,
        count=sum(e.count for e in events), macs=sum(e.macs for e in events), bytes=sum(e.bytes for e in events),
        wavelets=sum(e.wavelets for e in events), wavelet_hops=sum(e.wavelet_hops for e in events),
        max_link_wavelets=max((e.max_link_wavelets for e in events), default=0), max_hops=max((e.max_hops for e in events), default=0),
        colors=max((e.colors for e in events), default=0),
    )  # fmt: skip


class LineLoad:
    """Load of the links along one line of cores, from many messages at once."""

    def __init__(self, n: int) -> None:
        self._up: Ints = np.zeros(n + 1, np.int64)
        self._down: Ints = np.zeros(n + 1, np.int64)

    def add(self, source: Ints, target: Ints, words: Ints) -> None:
        """Count messages of `words` from `source` to `target` positions."""
        for steps, low, high in ((self._up, source, target), (self._down, target, source)):
            ahead = high > low
            np.add.at(steps, low[ahead], words[ahead])
            np.add.at(steps, high[ahead], -words[ahead])

    def busiest(self) -> int:
        """Words on the busiest link of either direction."""
        return int(max(np.cumsum(self._up).max(initial=0), np.cumsum(self._down).max(initial=0)))

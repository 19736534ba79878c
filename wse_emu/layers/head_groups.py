"""Query heads that go over the rows of keys together: those of one key/value head that admit the same keys and fit the work blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.layers.heads import HeadLayout
from wse_emu.wafer.placement import Ints, Split


class Group(NamedTuple):
    """Query heads of one key/value head."""

    head: int
    """The key/value head."""
    first: int
    """First of its query heads that go together."""
    n: int


@dataclass(frozen=True)
class QueryGroups:
    """Groups that admit the same keys; a tile of queries goes its way once for each. What they count and send, for one token."""

    heads: HeadLayout
    groups: tuple[Group, ...]

    @cached_property
    def array(self) -> Ints:
        """(n, 3) the groups, those side by side as one, for `wse_kernels.attention_mesh.mesh_attention`: nothing depends on how it cuts."""
        joined: list[Group] = []
        for group in self.groups:
            if joined and joined[-1].head == group.head and joined[-1].first + joined[-1].n == group.first:
                joined[-1] = joined[-1]._replace(n=joined[-1].n + group.n)
            else:
                joined.append(group)
        return np.array(joined, np.int64)

    @cached_property
    def n_queries(self) -> int:
        """Query heads of all groups."""
        return sum(group.n for group in self.groups)

    @cached_property
    def n_parts(self) -> int:
        """Parts of their heads."""
        return sum(len(self.heads.heads[group.head]) for group in self.groups)

    @cached_property
    def n_value_parts(self) -> int:
        """Those of them that have values."""
        return sum(part.n_values > 0 for group in self.groups for part in self.heads.heads[group.head])

    @cached_property
    def queries(self) -> tuple[int, int]:
        """Words of all packed queries, and of the column that has most."""
        return self._words(keys=2)

    @cached_property
    def maxima(self) -> tuple[int, int]:
        """Likewise of the maxima, which every part has."""
        return self._words(each=1)

    @cached_property
    def accumulators(self) -> tuple[int, int]:
        """Likewise of denominators and outputs, on parts that have values."""
        return self._words(valued=1, values=2)

    @cached_property
    def context(self) -> tuple[int, int]:
        """Likewise of outputs alone."""
        return self._words(values=2)

    def _words(self, *, keys: int = 0, each: int = 0, valued: int = 0, values: int = 0) -> tuple[int, int]:
        """So many for each unit, part, part with values and unit with values, and each query head: all, and those of the fullest column."""
        words = np.zeros(self.heads.n_cols, np.int64)
        for group in self.groups:
            for part in self.heads.heads[group.head]:
                of_part = keys * part.n_units + each + (valued + values * part.n_values if part.n_values else 0)
                words[part.col] += group.n * of_part
        return int(words.sum()), int(words.max())

    @cached_property
    def chain(self) -> ScoreChain:
        """How scores are chained over the parts of a head."""
        cut = [group for group in self.groups if len(self.heads.heads[group.head]) > 1]
        parts = {group.head: self.heads.heads[group.head] for group in cut}
        of_head = {head: sum(group.n for group in cut if group.head == head) for head in parts}
        spans = {head: of[-1].col - of[0].col for head, of in parts.items()}
        return ScoreChain(
            n_cut=len(cut), cut_queries=sum(of_head.values()), n_hands=sum(len(parts[group.head]) - 1 for group in cut),
            hand_queries=sum(n * (len(parts[head]) - 1) for head, n in of_head.items()),
            hop_queries=sum(n * spans[head] for head, n in of_head.items()), most_queries=max(of_head.values(), default=0),
            max_gap=max((b.col - a.col for of in parts.values() for a, b in pairwise(of)), default=0),
            max_span=max(spans.values(), default=0),
        )  # fmt: skip


class ScoreChain(NamedTuple):
    """Groups whose heads are cut into parts on several columns; query heads are counted for each hand."""

    n_cut: int
    """Such groups."""
    cut_queries: int
    """Their query heads."""
    n_hands: int
    """Hands from part to part of all groups."""
    hand_queries: int
    """Query heads that are handed on, hand by hand."""
    hop_queries: int
    """Query heads times the columns that they cross."""
    most_queries: int
    """Query heads that cross the busiest columns."""
    max_gap: int
    """Most columns of one hand."""
    max_span: int
    """Most columns of one head."""


@lru_cache(maxsize=256)
def query_groups(heads: HeadLayout, pattern: AttentionPattern, largest: int) -> tuple[QueryGroups, ...]:
    """Groups of at most `largest` query heads, for each layout of a pattern."""
    out: dict[AttentionPattern, list[Group]] = {layout: [] for layout in pattern.layouts}
    for head in range(heads.n_kv_heads):
        for layout, first, n in _runs(pattern, head * heads.queries_per_kv, heads.queries_per_kv):
            offsets = Split.balanced(n, -(-n // largest)).offsets.tolist()
            out[layout] += [Group(head, first + begin, end - begin) for begin, end in pairwise(offsets)]
    return tuple(QueryGroups(heads, tuple(groups)) for groups in out.values())


def _runs(pattern: AttentionPattern, start: int, n: int) -> Iterator[tuple[AttentionPattern, int, int]]:
    """Query heads side by side with one layout, among `n` from `start` on: the layout, the first of them and how many."""
    if not pattern.heads:
        yield pattern, 0, n
        return
    first = 0
    for layout, run in groupby(pattern.heads[start : start + n]):
        count = len(list(run))
        yield layout, first, count
        first += count

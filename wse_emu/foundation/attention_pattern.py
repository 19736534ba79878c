"""Which keys a query attends to: causal, and beyond that a window, a chunk, sinks, columns, blocks or any mask.

A pattern answers one question, for any query position: the ranges of key positions that it admits. Everything else (which rows of cores are
visited, what is computed, sent and kept) follows from those ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.key_ranges import Ints, KeyRanges, merged, within
from wse_emu.foundation.listed_keys import ListedKeys
from wse_emu.foundation.mask_array import MaskArray

MAX_KEYS = 1 << 48
"""Largest number in a pattern; sums of positions stay exact."""
MaskFunction = Callable[[Ints, Ints], NDArray[np.bool_]]
"""``mask(q, k)``: query and key positions, int64, of shapes that broadcast, to booleans; what is not causal is cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPattern:
    """Keys that a query at position q admits, among those at positions k <= q; by default all.

    The local part is a window or a chunk; sinks and columns are added to it. Names and masks are those of Cerebras ModelZoo 2.10
    (``attention_sliding_window_length``, ``attention_sink_tokens``, ``attention_chunk_size``, ``attention_vertical_column_*``).

    Raises
    ------
    SpecError
        If a number is no positive integer, or parts contradict each other; the message names the rule.
    """

    window: int | None = None
    """Keys with ``q - k < window``: that many, the query's own included."""
    chunk: int | None = None
    """Keys of the query's own block of so many: ``k >= chunk * (q // chunk)``. Not with `window`."""
    sinks: int = 0
    """And the first so many keys; with `window` or `chunk`."""
    column_spacing: int | None = None
    column_width: int | None = None
    """And ``column_width`` keys from each of the positions ``spacing - 1, 2 spacing - 1, ...``; both or none, with `window` or `chunk`."""
    column_start: int | None = None
    """Where the first column begins, if not at ``spacing - 1``."""
    block_size: int | None = None
    blocks: tuple[tuple[int, ...], ...] = ()
    """Block-sparse: block i of `block_size` queries sees the listed blocks of keys, its own among them. Alone."""
    mask: MaskFunction | NDArray[np.bool_] | None = None
    """Any mask, as a function or as booleans (queries, keys) by position; every query must admit at least one key. Alone."""
    heads: tuple[AttentionPattern, ...] = ()
    """A pattern of its own for every query head. Alone; see `layouts`."""

    def __post_init__(self) -> None:
        if isinstance(self.mask, np.ndarray):
            object.__setattr__(self, "mask", MaskArray(self.mask))
        if isinstance(self.blocks, list | tuple):
            object.__setattr__(self, "blocks", tuple(tuple(seen) if isinstance(seen, list) else seen for seen in self.blocks))
        if isinstance(self.heads, list):
            object.__setattr__(self, "heads", tuple(self.heads))
        for name in ("window", "chunk", "column_spacing", "column_width", "block_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SpecError(f"attention pattern: `{name}` must be an integer >= 1 or None, got {value!r}")
        if type(self.sinks) is not int or self.sinks < 0:
            raise SpecError(f"attention pattern: `sinks` must be an integer >= 0, got {self.sinks!r}")
        if self.column_start is not None and (type(self.column_start) is not int or self.column_start < 0):
            raise SpecError(f"attention pattern: `column_start` must be an integer >= 0 or None, got {self.column_start!r}")
        if self.column_start is not None and self.column_spacing is None:
            raise SpecError("attention pattern: `column_start` needs `column_spacing` and `column_width`")
        for name in ("window", "chunk", "sinks", "column_spacing", "column_width", "column_start", "block_size"):
            if (getattr(self, name) or 0) > MAX_KEYS:
                raise SpecError(f"attention pattern: `{name}` must be at most {MAX_KEYS}, got {show(getattr(self, name))}")
        local = self.window is not None or self.chunk is not None
        if self.window is not None and self.chunk is not None:
            raise SpecError(f"attention pattern: `window` and `chunk` are two local parts, give one; got {self.window} and {self.chunk}")
        if (self.column_spacing is None) != (self.column_width is None):
            raise SpecError(
                "attention pattern: `column_spacing` and `column_width` belong together, got "
                f"{self.column_spacing} and {self.column_width}"
            )
        for name in ("sinks", "column_spacing"):
            if getattr(self, name) and not local:
                raise SpecError(f"attention pattern: `{name}` adds keys to a local part: give `window` or `chunk` too")
        if self.column_spacing is not None and self.column_width is not None and self.column_width > self.column_spacing:
            raise SpecError(
                f"attention pattern: `column_width` must be at most `column_spacing` ({self.column_spacing}), got {self.column_width}"
            )
        self._check_alone()

    def _check_alone(self) -> None:
        """Blocks and masks stand alone; blocks must name their own."""
        if (self.block_size is None) != (not self.blocks):
            raise SpecError(f"attention pattern: `block_size` and `blocks` belong together, got {self.block_size} and {self.blocks}")
        alone = [name for name in ("block_size", "mask", "heads") if getattr(self, name) not in (None, ())]
        others = [f.name for f in fields(self) if f.name not in ("block_size", "blocks", "mask", "heads") and getattr(self, f.name)]
        if len(alone) > 1 or (alone and others):
            raise SpecError(f"attention pattern: `{alone[0]}` stands alone, got {', '.join(f'`{n}`' for n in alone[1:] + others)} too")
        for i, seen in enumerate(self.blocks):
            of_ints = isinstance(seen, tuple) and all(type(b) is int and 0 <= b <= i for b in seen)
            if not of_ints or i not in seen or list(seen) != sorted(set(seen)):
                raise SpecError(
                    f"attention pattern: `blocks[{i}]` must name blocks 0..{i} in ascending order, its own among them, got {seen}"
                )
        if self.mask is not None and not callable(self.mask):
            raise SpecError(
                f"attention pattern: `mask` must be a function of query and key positions, or an array of booleans, got {self.mask!r}"
            )
        for i, of_head in enumerate(self.heads):
            if not isinstance(of_head, AttentionPattern) or of_head.heads:
                raise SpecError(f"attention pattern: `heads[{i}]` must be an AttentionPattern without `heads`, got {of_head!r}")

    @staticmethod
    def fixed(*, local_attn_ctx: int = 128, vert_size: int = 8, subset: int = 0) -> AttentionPattern:
        """Child et al.'s fixed pattern, as GPT-3 and ModelZoo have it: a query's own block, and in every block some of the last columns.

        Parameters
        ----------
        local_attn_ctx : int
            Keys of a block (the stride).
        vert_size : int
            Columns of a block; must divide it.
        subset : int
            Which ones: the last `vert_size`, or so many times `vert_size` further to the front.

        Raises
        ------
        SpecError
            If they do not fit a block.
        """
        for name, value, least in (("local_attn_ctx", local_attn_ctx, 1), ("vert_size", vert_size, 1), ("subset", subset, 0)):
            if type(value) is not int or value < least:
                raise SpecError(f"fixed pattern: `{name}` must be an integer >= {least}, got {value!r}")
        if local_attn_ctx % vert_size:
            raise SpecError(f"fixed pattern: `vert_size` must divide `local_attn_ctx`, got {vert_size} and {local_attn_ctx}")
        if subset >= local_attn_ctx // vert_size:
            raise SpecError(f"fixed pattern: `subset` must be below {local_attn_ctx // vert_size} (blocks of {vert_size}), got {subset}")
        start = local_attn_ctx - (subset + 1) * vert_size
        return AttentionPattern(chunk=local_attn_ctx, column_spacing=local_attn_ctx, column_width=vert_size, column_start=start)

    @staticmethod
    def fixed_per_head(*, num_heads: int, num_verts: int, local_attn_ctx: int = 128, vert_size: int = 8) -> AttentionPattern:
        """The fixed pattern with another subset of columns for each head (ModelZoo's ``different_layout_per_head``): ``h % num_verts``.

        Parameters
        ----------
        num_heads : int
            Query heads of the model.
        num_verts : int
            Subsets; must divide it, and a block must have so many.
        local_attn_ctx, vert_size : int
            As `fixed` takes them.

        Raises
        ------
        SpecError
            If they do not fit the heads or a block.
        """
        for name, value in (("num_heads", num_heads), ("num_verts", num_verts)):
            if type(value) is not int or value < 1:
                raise SpecError(f"fixed pattern: `{name}` must be an integer >= 1, got {value!r}")
        if num_heads % num_verts:
            raise SpecError(f"fixed pattern: `num_verts` must divide the number of heads ({num_heads}), got {num_verts}")
        one = [AttentionPattern.fixed(local_attn_ctx=local_attn_ctx, vert_size=vert_size, subset=i) for i in range(num_verts)]
        return AttentionPattern(heads=tuple(one[h % num_verts] for h in range(num_heads)))

    @staticmethod
    def listed(indices: ArrayLike, topk_length: ArrayLike | None = None) -> AttentionPattern:
        """Keys listed for every query, as FlashMLA takes them (see `wse_kernels.sparse_attention.flash_mla_sparse_fwd`).

        Parameters
        ----------
        indices : integers, (queries, topk)
            Positions of the keys that the query at each position admits, in any order; -1 is none, and what is not causal is cut off.
        topk_length : integers, (queries,), optional
            Only so many of each query's entries count; all by default.

        Raises
        ------
        SpecError
            If they are no such integers; when a query has no key, or is beyond those that are listed.
        """
        return AttentionPattern(mask=ListedKeys(indices, topk_length))

    @staticmethod
    def memory(*, attn_memory_chunk_size: int, num_memory_tokens_per_chunk: int) -> AttentionPattern:
        """ModelZoo's chunked mask for memory tokens, which follow every chunk of a prompt (see `wse_emu.foundation.memory_tokens`).

        A query sees its own chunk with its memory tokens, and columns as wide as those of each earlier one; their first is the last memory
        token (ModelZoo's columns begin at ``spacing - 1``), so with several they reach into the next chunk.
        """
        for name, value in (
            ("attn_memory_chunk_size", attn_memory_chunk_size), ("num_memory_tokens_per_chunk", num_memory_tokens_per_chunk),
        ):  # fmt: skip
            if type(value) is not int or value < 1:
                raise SpecError(f"memory tokens: `{name}` must be an integer >= 1, got {value!r}")
        size = attn_memory_chunk_size + num_memory_tokens_per_chunk
        return AttentionPattern(chunk=size, column_spacing=size, column_width=num_memory_tokens_per_chunk)

    @property
    def mask_function(self) -> MaskFunction | None:
        """`mask` as a function."""
        assert not isinstance(self.mask, np.ndarray)  # it was made one at construction
        return self.mask

    @property
    def is_full(self) -> bool:
        """Whether every earlier key is admitted."""
        if self.heads:
            return all(of_head.is_full for of_head in self.heads)
        return self.window is None and self.chunk is None and self.block_size is None and self.mask is None

    @property
    def n_positions(self) -> int | None:
        """How many positions blocks, or a mask given as an array or as lists, describe; None is any number."""
        if self.heads:
            return min((n for layout in self.layouts if (n := layout.n_positions) is not None), default=None)
        if isinstance(self.mask, MaskArray):
            return len(self.mask.values)
        if isinstance(self.mask, ListedKeys):
            return self.mask.n_queries
        return None if self.block_size is None else self.block_size * len(self.blocks)

    @property
    def layouts(self) -> tuple[AttentionPattern, ...]:
        """The different patterns of its heads, in the order of their first heads; itself alone where all heads have one."""
        return tuple(dict.fromkeys(self.heads)) or (self,)

    @property
    def forgets(self) -> bool:
        """Whether later queries admit none of the keys that a query does not admit, so that these need not be kept."""
        if self.heads:
            return all(of_head.forgets for of_head in self.heads)
        return self.window is not None or self.chunk is not None

    def held_after(self, n: int) -> Ints:
        """Keys that are kept when a sequence has n: (m, 2) ranges. Those that its last query admits, or all."""
        if n == 0:
            return np.zeros((0, 2), np.int64)
        return self.ranges(np.array([n - 1], np.int64)).ranges if self.forgets else np.array([[0, n]], np.int64)

    def held_during(self, start: int, n: int) -> Ints:
        """Keys that the queries at positions start to ``start + n`` need between them: (m, 2) ranges."""
        if not self.forgets:
            return np.array([[0, start + n]], np.int64)
        first = self.ranges(np.array([start], np.int64)).ranges
        return merged(np.concatenate([first, np.array([[start, start + n]], np.int64)]))

    def most_held(self, n: int) -> int:
        """Most keys that are kept of a sequence of up to n."""
        if not self.forgets:
            return n
        longest = max(layout.chunk or 1 for layout in self.layouts)
        last = np.arange(max(n - longest, 0), n, dtype=np.int64)
        if len(self.layouts) == 1:  # within a chunk it only grows: up to the last query, or to the end of the chunk before
            last = np.unique([max(n - 1 - n % longest, 0), n - 1])
        ends = self.ranges(last)
        return int(np.add.reduceat(ends.ranges[:, 1] - ends.ranges[:, 0], ends.first[:-1]).max())

    def ranges(self, positions: Ints) -> KeyRanges:
        """Keys that queries at these positions admit, with some head.

        Parameters
        ----------
        positions : ndarray, (n,), int64

        Raises
        ------
        SpecError
            If a mask admits no key for some query, or is not a mask.
        """
        if self.heads:
            return KeyRanges.joined([layout.ranges(positions) for layout in self.layouts])
        if isinstance(self.mask, ListedKeys):
            return self.mask.ranges(positions)
        if self.mask_function is not None:
            return _from_mask(self.mask_function, positions)
        if self.block_size is not None:
            return self._block_ranges(positions, self.block_size)
        low = np.zeros_like(positions)
        if self.window is not None:
            low = np.maximum(positions + 1 - self.window, 0)
        elif self.chunk is not None:
            low = positions // self.chunk * self.chunk
        sinks = np.minimum(self.sinks, low)
        counts, columns = self._columns(sinks, low)
        n_extra = (sinks > 0) + counts
        first = np.concatenate([[0], np.cumsum(n_extra + 1)]).astype(np.int64)
        ranges = np.empty((int(first[-1]), 2), np.int64)
        with_sinks = np.flatnonzero(sinks > 0)
        ranges[first[with_sinks]] = np.stack([np.zeros_like(with_sinks), sinks[with_sinks]], axis=1)
        at = np.repeat(first[:-1] + (sinks > 0), counts) + within(counts)
        ranges[at] = columns
        ranges[first[1:] - 1] = np.stack([low, positions + 1], axis=1)
        return KeyRanges(first, ranges)

    def _columns(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Columns between `low` and `high` of each query: how many, and their ranges, cut to between."""
        if self.column_spacing is None or self.column_width is None:
            return np.zeros_like(low), np.zeros((0, 2), np.int64)
        p, w = self.column_spacing, self.column_width
        # Column i begins at s + i p; those that end after `low` and begin before `high`.
        s = p - 1 if self.column_start is None else self.column_start
        begin = np.maximum((low - w - s) // p + 1, 0)
        end = np.maximum(-((s - high) // p), begin)
        counts = np.where(high > low, end - begin, 0)
        starts = s + (np.repeat(begin, counts) + within(counts)) * p
        cut = np.stack([np.maximum(starts, np.repeat(low, counts)), np.minimum(starts + w, np.repeat(high, counts))], axis=1)
        keep = cut[:, 0] < cut[:, 1]
        owner = np.repeat(np.arange(len(low)), counts)[keep]
        return np.bincount(owner, minlength=len(low)).astype(np.int64), cut[keep].astype(np.int64)

    def _block_ranges(self, positions: Ints, size: int) -> KeyRanges:
        block = positions // size
        if block.max(initial=-1) >= len(self.blocks):
            beyond = int(positions[block >= len(self.blocks)][0])
            raise SpecError(
                f"attention pattern: `blocks` describes {len(self.blocks)} blocks of {size} queries, there is one at position {beyond}"
            )
        kinds = sorted(set(block.tolist()))
        listed = [merged(np.array([[b * size, (b + 1) * size] for b in self.blocks[i]], np.int64)) for i in kinds]
        counts = np.array([len(ranges) for ranges in listed], np.int64)
        kind = np.searchsorted(kinds, block)
        first = np.concatenate([[0], np.cumsum(counts[kind])]).astype(np.int64)
        if not kinds:
            return KeyRanges(first, np.zeros((0, 2), np.int64))
        before = np.cumsum(counts) - counts
        ranges = np.concatenate(listed)[np.repeat(before[kind], counts[kind]) + within(counts[kind])]
        ranges[first[1:] - 1, 1] = positions + 1  # its own block is the last
        return KeyRanges(first, ranges)


FULL = AttentionPattern()
"""Every query admits all keys up to its own."""


_MASK_ROWS = 1 << 20
"""Elements of a mask that are evaluated at one time."""


def _from_mask(mask: MaskFunction, positions: Ints) -> KeyRanges:
    parts = []
    step = max(1, _MASK_ROWS // (int(positions.max(initial=0)) + 1))
    for at in range(0, len(positions), step):
        q = positions[at : at + step, None]
        keys = np.arange(int(q.max()) + 1, dtype=np.int64)[None, :]
        shape = q.size, keys.size
        seen: Any = np.asarray(mask(q, keys))
        fits = seen.ndim <= 2 and all(n in (1, whole) for n, whole in zip(seen.shape[::-1], shape[::-1], strict=False))
        if seen.dtype != np.bool_ or not fits:
            raise SpecError(f"attention pattern: `mask` must give booleans of shape {shape}, got {seen.dtype} of shape {seen.shape}")
        seen = np.broadcast_to(seen, shape) & (keys <= q)
        blind = np.flatnonzero(~seen.any(axis=1))
        if blind.size:
            raise SpecError(f"attention pattern: `mask` admits no key for the query at position {int(q[blind[0], 0])}")
        parts.append(KeyRanges.of_mask(seen))
    counts = [np.diff(part.first) for part in parts]
    first = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
    return KeyRanges(first, np.concatenate([np.zeros((0, 2), np.int64), *(part.ranges for part in parts)]))

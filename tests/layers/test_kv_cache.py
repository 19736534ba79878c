"""Keys and values over the rows of cores: balanced at every length, shifted as sequences grow, the same in every account."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.plan import sequences_of
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import KVCache
from wse_emu.wafer.placement import Split, TokenBands

from .conversations import Conversation, conversations
from .programs import agree, assert_same_bits, tokens

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def grow(wafer: wse.Wafer, conversation: Conversation, capacity: tuple[int, ...] | None = None) -> KVCache:
    """A cache of one layer after all passes."""
    heads = conversation.heads(wafer.cols)
    cache = KVCache(wafer, heads, 1, np.array(capacity or conversation.lengths))
    for sequences, qkv in conversation.steps():
        bands = TokenBands(sequences.n_tokens, wafer.rows)
        with tokens(wafer, qkv, bands, heads.qkv, "qkv") as placed:
            cache.append(0, placed, sequences, bands)
        cache.advance(sequences)
    return cache


def held(cache: KVCache, slot: int, row: int) -> list[np.ndarray]:
    """Keys and values of one sequence on one row of cores, by pair unit and element, each (tokens, units, 2); one core at a time."""
    n = int(cache.split(slot, cache.keys_held(0, slot)).sizes[row])
    columns = cache.heads.units.used.tolist()
    whole = []
    for which in (0, 1):
        blocks = [cache.block(0, slot, row, col)[which] for col in columns]
        assert all(not block.defined[n:].any() for block in blocks), "what moved away is not to be read here any more"
        whole.append(np.hstack([block.read(slice(0, n)) for block in blocks]).reshape(n, cache.heads.units.total, 2))
    return whole


@settings(max_examples=60)
@given(GRIDS, conversations())
@example((5, 2), Conversation(0, 2, 1, 2, ((1,), (1,), (1,), (1,), (1,), (1,), (1,))))
@example((3, 5), Conversation(1, 1, 2, 3, ((7, 0), (0, 2), (4, 1))))
def test_every_row_holds_its_balanced_share_of_every_sequence(grid, conversation) -> None:
    wafer = wse.Wafer(rows=grid[0], cols=grid[1], executor="isolated")
    cache = grow(wafer, conversation)
    assert tuple(cache.lengths.tolist()) == conversation.lengths
    for slot, length in enumerate(conversation.lengths):
        _, k, v = conversation.published(slot)
        at = 0
        sizes = []
        for row in range(wafer.rows):
            mine = held(cache, slot, row)
            n = len(mine[0])
            for ours, expected in zip(mine, (k, v), strict=True):
                halves = expected[at : at + n].reshape(n, conversation.n_kv, 2, conversation.half).swapaxes(2, 3)
                assert_same_bits(ours, np.ascontiguousarray(halves).reshape(ours.shape))
            sizes.append(n)
            at += n
        assert at == length
        assert max(sizes) - min(sizes) <= 1
    cache.free()
    assert not wafer.sram.live


@settings(max_examples=60)
@given(GRIDS, conversations())
def test_growth_leaves_the_same_ledger_on_every_executor(grid, conversation) -> None:
    def program(wafer: wse.Wafer) -> list[np.ndarray]:
        cache = grow(wafer, conversation)
        n_bytes = cache.n_bytes
        cache.free()
        return [np.array(n_bytes)]

    (n_bytes,), wafer = agree(program, *grid)
    heads = conversation.heads(grid[1])
    assert n_bytes == sum(conversation.lengths) * 2 * conversation.n_kv * heads.head_dim * 4
    shifts = iter([e for e in wafer.ledger.events() if e.kind == "shift"])
    for sequences, _ in conversation.steps():
        moved = 0  # tokens that another row holds afterwards
        for start, n in zip(sequences.start.tolist(), sequences.n_new.tolist(), strict=True):
            before, after = Split.balanced(start, grid[0]).owner, Split.balanced(start + n, grid[0]).owner
            moved += int((before != after[:start]).sum())
        assert next(shifts).bytes == moved * 2 * conversation.n_kv * heads.head_dim * 4
    assert next(shifts, None) is None


@given(st.integers(1, 12), st.integers(0, 60))
def test_one_more_token_moves_others_by_one_row_at_most(rows: int, more: int) -> None:
    """Once every row holds a token: the shift is to the neighbour, not a new layout."""
    before, after = (Split.balanced(rows + n, rows).owner for n in (more, more + 1))
    assert set(np.unique(before - after[:-1]).tolist()) <= {0, 1}


def test_room_for_all_layers_and_all_tokens_is_reserved_at_once() -> None:
    heads = HeadLayout(2, 1, 4, 3)
    wafer = wse.Wafer(rows=4, cols=3)
    cache = KVCache(wafer, heads, 3, np.array([5, 8]))
    assert wafer.sram.live == tuple(f"keys and values of layer {i}" for i in range(3))
    # Two tokens of each sequence on a row at most; a column holds two pair units at most, keys and values.
    assert wafer.sram.core_map(0, 0).blocks[1:] == tuple((f"keys and values of layer {i}", 4 * 2 * 2 * 2 * 4) for i in range(3))
    assert cache.n_bytes == 0
    cache.free()
    assert not wafer.sram.live


@pytest.mark.parametrize("executor", ["batched", "isolated", "dry"])
def test_a_cache_that_does_not_fit_reserves_nothing(executor: str) -> None:
    small = replace(wse.TINY, sram_bytes_per_core=6000)
    wafer = wse.Wafer(small, rows=2, cols=2, executor=executor)
    with pytest.raises(wse.SramOverflowError, match="keys and values of layer 1"):
        KVCache(wafer, HeadLayout(2, 1, 8, 2), 2, np.array([32]))
    assert not wafer.sram.live
    KVCache(wafer, HeadLayout(2, 1, 8, 2), 1, np.array([32])).free()


def test_tokens_beyond_the_capacity_are_refused_by_sequence() -> None:
    cache = KVCache(wse.Wafer(rows=2, cols=2), HeadLayout(1, 1, 2, 2), 1, np.array([4, 4, 3]))
    cache.check(sequences_of([1, 2], [1, 1], [3, 2]))
    with pytest.raises(wse.InputError, match=r"sequence 2: 4 tokens do not fit a cache of 3; ask for more room .*`capacity`"):
        cache.check(sequences_of([1, 2], [1, 1], [3, 3]))


def test_sequences_know_their_tokens_and_positions() -> None:
    sequences = sequences_of([1, 0], [2, 3], [7, 0])
    assert sequences.n_tokens == 5
    assert sequences.positions.tolist() == [7, 8, 0, 1, 2]

"""Which tiles of queries visit which rows of keys, against a count key by key."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.plan import sequences_of
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.key_ranges import keys_of
from wse_emu.layers import attention_plan
from wse_emu.layers.head_groups import query_groups
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import KVCache
from wse_emu.wafer.placement import TokenBands

PATTERNS = {
    "full": FULL,
    "window and sinks": AttentionPattern(window=3, sinks=2),
    "columns": AttentionPattern(chunk=5, column_spacing=4, column_width=2),
    "mask": AttentionPattern(mask=lambda q, k: ((q * 7 + k * 5) % 3 == 0) | (q == k)),
}
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", PATTERNS)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_visits_are_those_of_every_key_that_a_tile_admits(name, lengths, n_rows, tile_tokens, most_tiles) -> None:
    pattern, heads = PATTERNS[name], HeadLayout(1, 1, 2, 1)
    past, new = (list(of) for of in zip(*lengths, strict=True))
    slots = list(range(len(lengths)))
    cache = KVCache(wse.Wafer(rows=n_rows, cols=1, executor="dry"), heads, 1, np.array(past) + np.array(new), (pattern,))
    if any(past):
        some = [s for s in slots if past[s]]
        cache.advance(sequences_of(some, [past[s] for s in some], [0] * len(some)))
    sequences, bands = sequences_of(slots, new, past), TokenBands(sum(new), n_rows)
    (groups,) = query_groups(heads, pattern, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "_MOST_TILES", most_tiles)
        plan = attention_plan.plan_attention(cache, 0, sequences, bands, pattern, tile_tokens, groups)

    tiles, visits = [], []
    for s in slots:
        first = int(sequences.first_token[s])
        held = keys_of(plan.held[s]).tolist()
        row_of_key = dict(zip(held, cache.split(s, plan.held[s]).owner.tolist(), strict=True))
        token = first
        while token < first + new[s]:
            row, mine = int(bands.split.owner[token]), [token]
            while len(mine) < tile_tokens and mine[-1] + 1 < first + new[s] and bands.split.owner[mine[-1] + 1] == row:
                mine.append(mine[-1] + 1)
            keys = {k for t in mine for k in keys_of(pattern.ranges(np.array([past[s] + t - first])).ranges).tolist()}
            tiles.append((s, token, len(mine), row))
            visits.append(sorted(Counter(row_of_key[k] for k in keys).items()))
            token += len(mine)
    found = plan.visits
    assert list(zip(found.sequence, found.first, found.n, found.row, strict=True)) == tiles
    assert np.diff(found.first_visit).tolist() == [len(of) for of in visits]
    assert list(zip(found.key_row, found.n_keys, strict=True)) == [visit for of in visits for visit in of]

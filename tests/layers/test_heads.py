"""Heads over columns of cores: whole heads while there are enough of them, else slices of one head; rotary pairs never part."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from wse_emu.layers.heads import HeadLayout


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 20))
@example(4, 4, 32, 32)
@example(1, 1, 1, 20)
def test_parts_cover_every_head_once_and_never_mix_heads_in_a_group(n_kv: int, q: int, half: int, n_cols: int) -> None:
    heads = HeadLayout(n_kv, q, 2 * half, n_cols)
    assert heads.units.total == n_kv * half
    assert (heads.qkv.total, heads.context.total) == (n_kv * half * 2 * (q + 2), n_kv * half * 2 * q)
    seen = np.zeros(n_kv * half, np.int64)
    for head, parts in enumerate(heads.heads):
        assert sum(part.n_units for part in parts) == half
        assert [part.col for part in parts] == sorted(part.col for part in parts)
        if n_cols <= n_kv:
            assert len(parts) == 1, "a head is cut though there are heads enough"
        unit = head * half
        for part in parts:
            assert heads.units.starts[part.col] + part.first_unit == unit
            seen[unit : unit + part.n_units] += 1
            unit += part.n_units
    assert (seen == 1).all()
    assert heads.n_parts == int(heads.heads_per_col.sum())
    assert heads.max_part_units == max(part.n_units for parts in heads.heads for part in parts)
    if n_cols > n_kv:
        assert heads.heads_per_col.max() == 1
        sizes = [part.n_units for parts in heads.heads for part in parts]
        assert max(sizes) <= -(-half // (n_cols // n_kv))


def test_scale_is_rounded_once() -> None:
    assert HeadLayout(1, 1, 24, 1).scale == np.float32(1 / np.sqrt(24))

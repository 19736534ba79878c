"""Patterns of attention: the keys that every query admits, against masks written key by key; and what contradicts itself."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.plan import plan_model
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.key_ranges import merged
from wse_emu.reference.formulas import visible


def admits(q: int, k: int, *, window: int | None = None, chunk: int | None = None, sinks: int = 0, spacing: int | None = None,
           width: int | None = None) -> bool:  # fmt: skip
    """One query and one key, by the words of ModelZoo's options."""
    if k > q:
        return False
    local = True
    if window is not None:
        local = q - k < window
    if chunk is not None:
        local = k >= chunk * (q // chunk)
    column = spacing is not None and any(i <= k < i + width for i in range(spacing - 1, k + 1, spacing))
    return local or k < sinks or column


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    """Numbers of a pattern that do not contradict each other."""
    local = draw(st.sampled_from(["window", "chunk", None]))
    if local is None:
        return {}
    out = {local: draw(st.integers(1, 20)), "sinks": draw(st.integers(0, 8))}
    if draw(st.booleans()):
        out["spacing"] = draw(st.integers(1, 9))
        out["width"] = draw(st.integers(1, out["spacing"]))
    return out


def pattern_of(numbers: dict[str, Any]) -> AttentionPattern:
    names = {"spacing": "column_spacing", "width": "column_width"}
    return AttentionPattern(**{names.get(name, name): value for name, value in numbers.items()})


def keys_of(pattern: AttentionPattern, positions: np.ndarray) -> list[list[int]]:
    """Keys of each query, and on the way that ranges are ascending, disjoint and not empty."""
    first, ranges = pattern.ranges(positions)
    assert first[0] == 0
    assert first[-1] == len(ranges)
    out = []
    for a, b in pairwise(first.tolist()):
        mine = ranges[a:b]
        assert (mine[:, 0] < mine[:, 1]).all()
        assert (mine[1:, 0] >= mine[:-1, 1]).all()
        out.append([k for start, stop in mine.tolist() for k in range(start, stop)])
    return out


@given(numbers(), st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_ranges_and_the_references_masks_are_those_of_the_words(numbers, positions) -> None:
    pattern, q = pattern_of(numbers), np.array(positions, np.int64)
    expected = [[k for k in range(at + 1) if admits(at, k, **numbers)] for at in positions]
    assert keys_of(pattern, q) == expected
    t = np.arange(61)
    mask = visible(np.zeros_like(t), t, pattern)
    assert [np.flatnonzero(mask[at]).tolist() for at in positions] == expected


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_blocks_and_any_mask(size, n_blocks, random) -> None:
    blocks = tuple(tuple(sorted({i, *random.sample(range(i + 1), random.randint(0, i))})) for i in range(n_blocks))
    pattern, q = AttentionPattern(block_size=size, blocks=blocks), np.arange(size * n_blocks)
    expected = [[k for k in range(at + 1) if k // size in blocks[at // size]] for at in q]
    assert keys_of(pattern, q) == expected
    mask = visible(np.zeros_like(q), q, pattern)
    assert [np.flatnonzero(row).tolist() for row in mask] == expected
    allowed = [i * 100 + j for i, row in enumerate(blocks) for j in row]
    assert AttentionPattern(block_size=size, blocks=[list(row) for row in blocks]) == pattern
    assert keys_of(pattern, q[::-2]) == expected[::-2]
    same = AttentionPattern(mask=lambda q, k: np.isin(q // size * 100 + k // size, allowed))
    assert keys_of(same, q) == expected
    assert keys_of(same, q[::-1]) == expected[::-1]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12))
def test_merged_ranges_hold_the_same_keys(spans) -> None:
    ranges = np.array([(a, a + n) for a, n in spans], np.int64).reshape(-1, 2)
    out = merged(ranges)
    assert (out[1:, 0] > out[:-1, 1]).all()
    assert [k for a, b in out.tolist() for k in range(a, b)] == sorted({k for a, b in ranges.tolist() for k in range(a, b)})


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"window": 0}, "`window` must be an integer >= 1 or None, got 0"),
        ({"window": True}, "`window` must be an integer >= 1 or None, got True"),
        ({"chunk": 2.0}, "`chunk` must be an integer >= 1 or None, got 2.0"),
        ({"window": 4, "chunk": 4}, "`window` and `chunk` are two local parts, give one; got 4 and 4"),
        ({"window": 4, "sinks": -1}, "`sinks` must be an integer >= 0, got -1"),
        ({"sinks": 3}, "`sinks` adds keys to a local part: give `window` or `chunk` too"),
        ({"window": 4, "column_spacing": 4}, "`column_spacing` and `column_width` belong together, got 4 and None"),
        ({"column_spacing": 4, "column_width": 1}, "`column_spacing` adds keys to a local part"),
        ({"window": 4, "column_spacing": 4, "column_width": 5}, "`column_width` must be at most `column_spacing` (4), got 5"),
        ({"block_size": 4}, "`block_size` and `blocks` belong together"),
        ({"block_size": 4, "blocks": ((0,),), "window": 3}, "`block_size` stands alone, got `window` too"),
        ({"block_size": 4, "blocks": ((0,), (0,))}, "`blocks[1]` must name blocks 0..1 in ascending order, its own among them, got (0,)"),
        ({"block_size": 4, "blocks": ((0,), (0, 1, 2))}, "`blocks[1]` must name blocks 0..1"),
        ({"block_size": 4, "blocks": (0, (0, 1))}, "`blocks[0]` must name blocks 0..0 in ascending order, its own among them, got 0"),
        ({"mask": 3}, "`mask` must be a function of query and key positions, or an array of booleans, got 3"),
        ({"mask": np.ones((2, 3), bool)}, "as many keys as queries, got bool of shape (2, 3); give one pattern for each head as `heads`"),
        ({"mask": np.ones((0, 0), bool)}, "as many keys as queries, got bool of shape (0, 0)"),
        ({"mask": np.ones((2, 2))}, "must hold booleans (queries, keys), as many keys as queries, got float64 of shape (2, 2)"),
        ({"heads": (FULL, 4)}, "`heads[1]` must be an AttentionPattern without `heads`, got 4"),
        ({"heads": (AttentionPattern(heads=(FULL,)),)}, "`heads[0]` must be an AttentionPattern without `heads`"),
        ({"heads": (FULL,), "window": 2}, "`heads` stands alone, got `window` too"),
        ({"mask": max, "sinks": 1, "window": 2}, "`mask` stands alone, got `window`, `sinks` too"),
    ],
)
def test_contradictions_are_refused_at_construction(numbers, rule) -> None:
    with pytest.raises(wse.SpecError, match=re.escape(rule)):
        AttentionPattern(**numbers)


def test_a_mask_given_as_an_array_is_that_of_its_entries() -> None:
    values = np.random.default_rng(0).random((9, 9)) < 0.5
    values[np.arange(9), np.arange(9)] = True
    pattern, again = AttentionPattern(mask=values), AttentionPattern(mask=values.copy())
    expected = [np.flatnonzero(values[q, : q + 1]).tolist() for q in range(9)]
    assert keys_of(pattern, np.arange(9)) == expected
    assert pattern == again
    assert hash(pattern) == hash(again)
    values[8, 0] ^= True
    assert keys_of(pattern, np.arange(9)) == expected, "the array was copied"
    assert pattern != AttentionPattern(mask=values)
    with pytest.raises(wse.SpecError, match="`mask` describes 9 positions, there is a query at position 9"):
        pattern.ranges(np.array([3, 9]))


@given(st.integers(1, 12), st.integers(1, 6), st.randoms(use_true_random=False))
def test_listed_keys_are_those_of_the_list(n, topk, random) -> None:
    indices = np.array([[random.randint(-1, n + 2) for _ in range(topk)] for _ in range(n)])
    lengths = np.array([random.randint(0, topk) for _ in range(n)])
    expected = [sorted({int(k) for k in row[:length] if 0 <= k <= q}) for q, (row, length) in enumerate(zip(indices, lengths, strict=True))]
    pattern = AttentionPattern.listed(indices, lengths)
    t = np.arange(n)
    assert [np.flatnonzero(row).tolist() for row in visible(np.zeros_like(t), t, pattern)] == expected
    some = np.array([q for q in range(n) if expected[q]] * 2, np.int64)
    if some.size:
        assert keys_of(pattern, some) == [expected[q] for q in some]
    for q in (q for q in range(n) if not expected[q]):
        with pytest.raises(wse.SpecError, match=f"`indices` list no key for the query at position {q}"):
            pattern.ranges(np.array([q]))
    with pytest.raises(wse.SpecError, match=f"`indices` lists keys of {n} queries, there is one at position {n}"):
        pattern.ranges(np.array([n]))
    assert pattern == AttentionPattern.listed(np.array(indices), lengths.copy())
    assert (pattern == AttentionPattern.listed(indices)) == (expected == [sorted({int(k) for k in indices[q] if 0 <= k <= q}) for q in t])


def test_lists_of_keys_that_are_none_are_refused() -> None:
    for indices, lengths, rule in (
        (np.zeros((2, 2)), None, "`indices` must be integers (queries, topk), got float64 of shape (2, 2)"),
        (np.zeros((2, 2, 1), int), None, "got int64 of shape (2, 2, 1); give one pattern for each head as `heads`"),
        (np.full((2, 2), -2), None, "`indices` must be positions or -1, got -2"),
        (np.zeros((2, 2), int), [1], "`topk_length` must be integers (2,), got int64 of shape (1,)"),
        (np.zeros((2, 2), int), [1, 3], "`topk_length` must lie in 0..2, got 1 to 3"),
    ):
        with pytest.raises(wse.SpecError, match=re.escape(rule)):
            AttentionPattern.listed(indices, lengths)


@given(st.lists(numbers(), min_size=1, max_size=4), st.integers(0, 50), st.integers(1, 20))
def test_heads_with_patterns_of_their_own_need_the_keys_of_all(of_heads, start, n) -> None:
    """Ranges, masks, and what a cache must hold: each against every head's words, key by key."""
    pattern = AttentionPattern(heads=tuple(pattern_of(numbers) for numbers in of_heads))
    end = start + n

    def seen(q: int) -> set[int]:
        return {k for k in range(q + 1) for numbers in of_heads if admits(q, k, **numbers)}

    assert [set(keys) for keys in keys_of(pattern, np.arange(start, end))] == [seen(q) for q in range(start, end)]
    t = np.arange(end)
    for mask, numbers in zip(visible(np.zeros_like(t), t, pattern), of_heads, strict=True):
        assert np.flatnonzero(mask[end - 1]).tolist() == [k for k in range(end) if admits(end - 1, k, **numbers)]
    if pattern.forgets:  # no later query needs a key that is not held
        held = {k for a, b in pattern.held_after(start).tolist() for k in range(a, b)}
        during = {k for a, b in pattern.held_during(start, n).tolist() for k in range(a, b)}
        for q in range(start, end):
            assert {k for k in seen(q) if k < start} <= held
            assert seen(q) <= during
    assert pattern.most_held(end) == (max(len(seen(q)) for q in range(end)) if pattern.forgets else end)
    assert pattern.is_full == all(not numbers for numbers in of_heads)


def test_a_fixed_pattern_has_another_subset_of_columns_for_each_head() -> None:
    pattern = AttentionPattern.fixed_per_head(num_heads=8, num_verts=4, local_attn_ctx=16, vert_size=4)
    assert len(pattern.layouts) == 4
    q = 35
    for head, of_head in enumerate(pattern.heads):
        first = 16 - (head % 4 + 1) * 4
        columns = {k for k in range(32) if first <= k % 16 < first + 4}
        assert set(keys_of(of_head, np.array([q]))[0]) == columns | {32, 33, 34, 35}
    for changes, rule in (
        ({"num_verts": 3}, "`num_verts` must divide the number of heads (8), got 3"),
        ({"num_verts": 8}, "`subset` must be below 4 (blocks of 4), got 4"),
        ({"num_verts": 0}, "`num_verts` must be an integer >= 1, got 0"),
        ({"num_heads": 2.0}, "`num_heads` must be an integer >= 1, got 2.0"),
    ):
        with pytest.raises(wse.SpecError, match=re.escape(rule)):
            AttentionPattern.fixed_per_head(**{"num_heads": 8, "num_verts": 4, "local_attn_ctx": 16, "vert_size": 4} | changes)


def test_masks_that_are_none_are_refused() -> None:
    q = np.arange(4)
    with pytest.raises(wse.SpecError, match="admits no key for the query at position 2"):
        AttentionPattern(mask=lambda q, k: (q != 2) & (k >= 0)).ranges(q)
    with pytest.raises(wse.SpecError, match=r"must give booleans of shape \(4, 4\), got int64 of shape \(4, 4\)"):
        AttentionPattern(mask=lambda q, k: q * k).ranges(q)
    for other in (np.ones((3, 4), bool), np.ones((4, 2), bool), np.ones((2, 4, 4), bool)):
        with pytest.raises(wse.SpecError, match=rf"must give booleans of shape \(4, 4\), got bool of shape {re.escape(str(other.shape))}"):
            AttentionPattern(mask=lambda q, k, other=other: other).ranges(q)
    assert AttentionPattern(mask=lambda q, k: np.True_).ranges(q).n_admitted == 10
    with pytest.raises(wse.SpecError, match=r"describes 1 blocks of 2 queries, there is one at position 2"):
        AttentionPattern(block_size=2, blocks=((0,),)).ranges(q)


def test_a_text_longer_than_its_patterns_describe_is_refused_before_anything_runs() -> None:
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    listed, blocks = AttentionPattern.listed([[q] for q in range(12)]), AttentionPattern(block_size=4, blocks=((0,), (0, 1)))
    model = wse.from_config(config, attention=[AttentionPattern(heads=(FULL, listed)), blocks], wafer=wse.Wafer(rows=2, cols=2))
    assert (model.spec.context_length, model.spec.most_tokens) == (64, 8)
    assert np.isfinite(model(np.arange(8)).logits).all()
    n_events = len(model.wafer.ledger)
    for refused in (lambda: model(np.arange(9)), lambda: model.generate(np.arange(6), 3)):
        with pytest.raises(wse.InputError, match="new ones are more than the 8 tokens that its patterns of attention describe"):
            refused()
    assert len(model.wafer.ledger) == n_events
    with pytest.raises(wse.InputError, match="7 tokens of prompt and 2 new ones are more than the 8 tokens"):
        plan_model(model.spec, rows=2, cols=2, prompt_tokens=7, new_tokens=2)
    assert plan_model(model.spec, rows=2, cols=2, prompt_tokens=7, new_tokens=1).max_context == 8
    memory = wse.MemoryTokens(attn_memory_chunk_size=3, num_memory_tokens_per_chunk=2)
    assert replace(model.spec, memory_tokens=memory).most_tokens == 6, "six of the text and two between them"


def test_layers_of_a_model_take_patterns_and_some_stay_dense() -> None:
    spec = wse.ModelSpec(
        family="llama", vocab_size=9, hidden_size=4, intermediate_size=4, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=2,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64, sliding_window=5, sliding_layers=(0, 2),
    )  # fmt: skip
    window = AttentionPattern(window=5)
    assert [spec.pattern(i) for i in range(3)] == [window, FULL, window]
    sparse = AttentionPattern(window=2, sinks=1)
    assert [spec.with_attention(sparse, dense_attention_layers=(1,)).pattern(i) for i in range(3)] == [sparse, FULL, sparse]
    assert [spec.with_attention([FULL, sparse, window]).pattern(i) for i in range(3)] == [FULL, sparse, window]
    with pytest.raises(wse.SpecError, match="layer 0: `heads` of its attention pattern must have one entry for each of 2 query heads"):
        spec.with_attention(AttentionPattern(heads=(FULL, sparse, FULL)))
    with pytest.raises(wse.SpecError, match="`attention` must be one pattern or one for each of 3 layers, got 2"):
        spec.with_attention([FULL, sparse])
    with pytest.raises(wse.SpecError, match=r"`attention\[1\]` must be an AttentionPattern \(of a mask: `mask=...`\), got 4"):
        spec.with_attention([FULL, 4, FULL])
    with pytest.raises(wse.SpecError, match=r"`dense_attention_layers` must name layers in 0\.\.2, got 3"):
        spec.with_attention(sparse, (3,))
    with pytest.raises(wse.SpecError, match="give `attention` too"):
        wse.from_config(spec, dense_attention_layers=(0,))

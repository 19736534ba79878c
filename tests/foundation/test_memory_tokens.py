"""Memory tokens: where they stand, who sees them, and fixed patterns, mask by mask."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.key_ranges import keys_of
from wse_emu.foundation.memory_tokens import insert_memory_tokens, is_memory, positions_with_memory


def seen(pattern: AttentionPattern, n: int) -> np.ndarray:
    """(n, n) whether query row admits key column."""
    found = pattern.ranges(np.arange(n))
    out = np.zeros((n, n), bool)
    for q in range(n):
        out[q, keys_of(found.ranges[found.first[q] : found.first[q + 1]])] = True
    return out


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(1, 40))
def test_the_fixed_pattern_key_by_key(vert: int, times: int, subset: int, n: int) -> None:
    stride, subset = vert * times, subset % times
    mask = seen(AttentionPattern.fixed(local_attn_ctx=stride, vert_size=vert, subset=subset), n)
    columns = range(stride - (subset + 1) * vert, stride - subset * vert)  # counted back from the end of a block
    for q in range(n):
        for k in range(n):
            assert mask[q, k] == (k <= q and (q // stride == k // stride or k % stride in columns))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40))
def test_the_memory_mask_key_by_key(chunk: int, memory: int, n: int) -> None:
    size = chunk + memory
    mask = seen(AttentionPattern.memory(attn_memory_chunk_size=chunk, num_memory_tokens_per_chunk=memory), n)
    columns = {k for first in range(size - 1, n, size) for k in range(first, first + memory)}
    for q in range(n):
        for k in range(n):
            assert mask[q, k] == (k <= q and (k >= size * (q // size) or k in columns))
    if memory == 1:
        assert all(mask[q, k] for q in range(n) for k in np.flatnonzero(is_memory(n, chunk_size=chunk, per_chunk=1)) if k <= q)


def test_memory_tokens_follow_every_whole_chunk_that_something_follows() -> None:
    ids = insert_memory_tokens(np.arange(8), chunk_size=3, per_chunk=2, token_id=99)
    assert ids.tolist() == [0, 1, 2, 99, 99, 3, 4, 5, 99, 99, 6, 7]
    assert ids[~is_memory(len(ids), chunk_size=3, per_chunk=2)].tolist() == list(range(8))
    assert insert_memory_tokens(np.zeros((2, 4), int), chunk_size=2, per_chunk=1, token_id=7).tolist() == [[0, 0, 7, 0, 0]] * 2
    assert positions_with_memory(8, chunk_size=3, per_chunk=2) == 8 + 2 * 11 // 3


def test_a_model_with_memory_tokens_and_a_fixed_pattern_is_verified() -> None:
    config = {
        "model_type": "llama", "vocab_size": 60, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    memory = AttentionPattern.memory(attn_memory_chunk_size=3, num_memory_tokens_per_chunk=1)
    fixed = AttentionPattern.fixed(local_attn_ctx=4, vert_size=2)
    ids = insert_memory_tokens(np.arange(11), chunk_size=3, per_chunk=1, token_id=59)
    wafers = [wse.Wafer(rows=3, cols=2, executor=executor) for executor in ("batched", "isolated")]
    models = [wse.from_config(config, wafer=wafer, attention=[memory, fixed]) for wafer in wafers]
    outs = [model(ids) for model in models]
    np.testing.assert_array_equal(outs[0].logits, outs[1].logits)
    assert models[0].wafer.ledger.events() == models[1].wafer.ledger.events()
    assert models[0].verify(models[0].generate(ids, 5), n_prompt=len(ids)).passed


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"local_attn_ctx": 16, "vert_size": 5}, "`vert_size` must divide `local_attn_ctx`, got 5 and 16"),
        ({"local_attn_ctx": 16, "vert_size": 4, "subset": 4}, "`subset` must be below 4 (blocks of 4), got 4"),
        ({"local_attn_ctx": 0}, "`local_attn_ctx` must be an integer >= 1, got 0"),
    ],
)
def test_what_does_not_fit_a_block_is_refused(numbers: dict[str, int], rule: str) -> None:
    with pytest.raises(wse.SpecError, match=re.escape(rule)):
        AttentionPattern.fixed(**numbers)


def test_other_contradictions_are_refused() -> None:
    with pytest.raises(wse.SpecError, match="`column_start` needs `column_spacing` and `column_width`"):
        AttentionPattern(window=2, column_start=1)
    with pytest.raises(wse.SpecError, match="`num_memory_tokens_per_chunk` must be an integer >= 1, got 0"):
        AttentionPattern.memory(attn_memory_chunk_size=3, num_memory_tokens_per_chunk=0)
    with pytest.raises(wse.InputError, match="`chunk_size` must be an integer >= 1, got 0"):
        insert_memory_tokens([1, 2], chunk_size=0, per_chunk=1, token_id=3)
    with pytest.raises(wse.InputError, match="`input_ids` must be integers"):
        insert_memory_tokens([0.5], chunk_size=1, per_chunk=1, token_id=3)

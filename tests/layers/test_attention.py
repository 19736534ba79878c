"""Attention over keys on many rows: the float64 formula within the rule, the same bits on every executor and in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence import tolerance
from wse_emu.layers.attention import attention
from wse_emu.layers.kv_cache import KVCache
from wse_emu.wafer.placement import TokenBands

from .conversations import Conversation, context_to_heads, conversations
from .programs import agree, assert_same_bits, look, room, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def run(wafer: wse.Wafer, conversation: Conversation, *, probe: bool = True) -> list[list[F32]]:
    """Context (T, heads, d), and with `probe` maximum and denominator (T, heads), of every sequence."""
    heads = conversation.heads(wafer.cols)
    n_heads = conversation.n_kv * conversation.q
    cache = KVCache(wafer, heads, 1, np.array(conversation.lengths))
    found: list[list[list[F32]]] = [[] for _ in conversation.lengths]
    for sequences, qkv in conversation.steps():
        bands = TokenBands(sequences.n_tokens, wafer.rows)
        with tokens(wafer, qkv, bands, heads.qkv, "qkv") as placed, room(wafer, bands, heads.context, "context") as context:
            cache.append(0, placed, sequences, bands)
            statistics = attention(wafer, placed, context, cache, 0, sequences, bands, probe=probe)
            values = [context_to_heads(look(context), conversation.n_kv, conversation.q, conversation.half)]
        assert (statistics is not None) == probe
        values += statistics or ()
        assert all(value.shape[:2] == (sequences.n_tokens, n_heads) for value in values)
        for slot, first, n in zip(sequences.slot, sequences.first_token, sequences.n_new, strict=True):
            found[slot].append([value[first : first + n] for value in values])
        cache.advance(sequences)
    cache.free()
    return [[np.concatenate(parts) for parts in zip(*steps, strict=True)] for steps in found]


def assert_is_attention(conversation: Conversation, slot: int, context: F32, maximum: F32, denominator: F32) -> None:
    """Softmax of ``q.k / sqrt(d)`` over keys up to one's own, times v, in float64; every stage from what the run had before it."""
    q, k, v = (array.astype(np.float64) for array in conversation.published(slot))
    t, n_heads, d = q.shape
    seen = np.tri(t, dtype=np.bool_)
    n = seen.sum(axis=1)
    for head in range(n_heads):
        qh, kh, vh = q[:, head], k[:, head // conversation.q], v[:, head // conversation.q]
        scores = np.where(seen, qh @ kh.T / np.sqrt(d), -np.inf)
        e_scores = np.where(seen, tolerance.score_bound(qh, kh, d**-0.5), 0.0)
        m, den = maximum[:, head].astype(np.float64), denominator[:, head].astype(np.float64)
        assert (np.abs(m - scores.max(axis=1)) <= tolerance.maximum_bound(scores, e_scores)).all()
        p = np.where(seen, np.exp(scores - m[:, None]), 0.0)
        e_p = tolerance.softmax_term_error(scores, m, e_scores)
        assert (np.abs(den - p.sum(axis=1)) <= tolerance.denominator_bound(p, e_p, n)).all()
        exact = p @ vh / den[:, None]
        assert (np.abs(context[:, head] - exact) <= tolerance.context_bound(p, e_p, vh, den, n)).all()


@settings(max_examples=40)
@given(GRIDS, conversations())
@example((1, 1), Conversation(0, 1, 1, 1, ((1,),)))
@example((6, 5), Conversation(1, 2, 2, 3, ((5, 1), (1, 1), (1, 1), (0, 1))))
@example((2, 6), Conversation(2, 1, 3, 2, ((20,),)))
@example((6, 2), Conversation(3, 1, 1, 1, ((9, 3),)))  # the second sequence's first keys lie far above its queries
def test_context_is_the_formula_on_every_executor(grid, conversation) -> None:
    flat, _ = agree(lambda wafer: [value for values in run(wafer, conversation) for value in values], *grid)
    for slot in range(len(conversation.lengths)):
        assert_is_attention(conversation, slot, *flat[3 * slot : 3 * slot + 3])


@settings(max_examples=30)
@given(GRIDS, GRIDS, conversations(max_passes=1, max_new=12), st.data())
def test_rows_chunks_and_neighbours_change_no_bit(grid, other, whole, data) -> None:
    """One pass over all prompts against the same tokens in any pieces, on another number of rows; the columns stay."""
    left, passes = list(whole.lengths), []
    while any(left):
        step = tuple(data.draw(st.integers(0, n)) for n in left)
        if any(step):
            passes.append(step)
            left = [n - taken for n, taken in zip(left, step, strict=True)]
    pieces = Conversation(whole.seed, whole.n_kv, whole.q, whole.half, tuple(passes))
    first = run(wse.Wafer(rows=grid[0], cols=grid[1]), whole)
    second = run(wse.Wafer(rows=other[0], cols=grid[1]), pieces)
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("grid", [(3, 4), (8, 16)])
def test_a_long_prompt_keeps_the_rule(grid: tuple[int, int]) -> None:
    """More keys and wider heads than a tile of queries takes at a time."""
    conversation = Conversation(5, 2, 2, 16, ((90, 33), (10, 1)))
    for slot, values in enumerate(run(wse.Wafer(rows=grid[0], cols=grid[1]), conversation)):
        assert_is_attention(conversation, slot, *values)


@pytest.mark.parametrize("executor", ["batched", "isolated", "dry"])
def test_statistics_are_probed_only_if_asked_for(executor: str) -> None:
    conversation = Conversation(0, 1, 2, 2, ((5,), (1,)))
    ledgers = []
    for probe in (False, True):
        wafer = wse.Wafer(rows=3, cols=2, executor=executor)
        values = run(wafer, conversation, probe=probe)
        assert len(values[0]) == (3 if probe else 1)
        ledgers.append([e for e in wafer.ledger.events() if e.name != "softmax statistics"])
        assert len(wafer.ledger) - len(ledgers[-1]) == (2 if probe else 0)
    assert ledgers[0] == ledgers[1]


def test_one_key_gives_its_value_back() -> None:
    conversation = Conversation(9, 2, 3, 2, ((1,),))
    ((context, maximum, denominator),) = run(wse.Wafer(rows=2, cols=3), conversation)
    _, _, v = conversation.published(0)
    assert_same_bits(context, np.repeat(v, 3, axis=1))
    assert (denominator == 1).all()
    assert np.isfinite(maximum).all()

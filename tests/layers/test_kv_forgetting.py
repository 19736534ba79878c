"""Layers whose pattern forgets: what is kept and what is needed, in every row's SRAM; the same in every account."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.inference import Engine
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import kv_bytes, plan_model, sequences_of
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.key_ranges import keys_below, keys_of, merged, n_keys_of
from wse_emu.foundation.precision import Precision
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import KVCache
from wse_emu.wafer.placement import TokenBands

from .conversations import Conversation, conversations
from .programs import agree, assert_same_bits, tokens

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 4))


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    local = {draw(st.sampled_from(["window", "chunk"])): draw(st.integers(1, 9))}
    columns = {}
    if draw(st.booleans()):
        spacing = draw(st.integers(1, 6))
        columns = {"column_spacing": spacing, "column_width": draw(st.integers(1, spacing))}
    return AttentionPattern(**local, **columns, sinks=draw(st.integers(0, 4)))


@given(patterns(), st.integers(1, 40), st.integers(1, 9))
def test_what_is_kept_is_what_later_queries_need(pattern: AttentionPattern, start: int, n: int) -> None:
    """Key by key, for 40 queries more; and no more of them than are reserved."""
    queries = np.arange(start, start + 40)
    seen = pattern.ranges(queries)
    needed = set(keys_of(merged(seen.ranges)).tolist())
    kept = set(keys_of(pattern.held_after(start)).tolist())
    assert {k for k in needed if k < start} <= kept <= set(range(start))
    during = keys_of(pattern.held_during(start, n)).tolist()
    assert set(keys_of(merged(seen.ranges[: seen.first[n]])).tolist()) <= set(during)
    assert set(keys_of(pattern.held_after(start + n)).tolist()) <= set(during)
    assert {k for k in during if k < start} <= kept
    assert [n_keys_of(pattern.held_after(m)) <= pattern.most_held(start) for m in range(1, start + 1)] == [True] * start
    assert max(n_keys_of(pattern.held_after(m)) for m in range(1, start + 1)) == pattern.most_held(start)


def test_a_window_with_sinks_keeps_sinks_and_window() -> None:
    pattern = AttentionPattern(window=8, sinks=3)
    assert [n_keys_of(pattern.held_after(n)) for n in (0, 1, 8, 11, 12, 500)] == [0, 1, 8, 11, 11, 11]
    assert pattern.held_after(20).tolist() == [[0, 3], [12, 20]]
    assert pattern.held_during(20, 1).tolist() == [[0, 3], [13, 21]]
    assert keys_below(pattern.held_after(20), np.array([2, 12, 19])).tolist() == [2, 3, 10]
    for keeps_all in (FULL, AttentionPattern(mask=lambda q, k: k >= 0), AttentionPattern(block_size=2, blocks=((0,),))):
        assert keeps_all.held_after(5).tolist() == [[0, 5]]


def grow(wafer: wse.Wafer, conversation: Conversation, pattern: AttentionPattern, look: list | None = None) -> KVCache:
    heads = conversation.heads(wafer.cols)
    cache = KVCache(wafer, heads, 1, np.array(conversation.lengths), [pattern])
    for sequences, qkv in conversation.steps():
        bands = TokenBands(sequences.n_tokens, wafer.rows)
        with tokens(wafer, qkv, bands, heads.qkv, "qkv") as placed:
            cache.append(0, placed, sequences, bands)
            cache.forget(0, sequences, bands)
        cache.advance(sequences)
        if look is not None:
            look.append(cache.n_bytes)
    return cache


@settings(max_examples=40)
@given(GRIDS, conversations(), patterns())
@example((5, 2), Conversation(0, 2, 1, 2, ((3,), (1,), (1,), (1,), (1,), (1,), (1,))), AttentionPattern(window=3, sinks=1))
def test_every_row_holds_its_balanced_share_of_what_is_kept(grid, conversation, pattern) -> None:
    wafer = wse.Wafer(rows=grid[0], cols=grid[1], executor="isolated")
    cache = grow(wafer, conversation, pattern)
    for slot, length in enumerate(conversation.lengths):
        _, k, v = conversation.published(slot)
        kept = keys_of(pattern.held_after(length))
        split, at = cache.split(slot, cache.keys_held(0, slot)), 0
        for row, n in enumerate(split.sizes.tolist()):
            for which, expected in enumerate((k, v)):
                blocks = [cache.block(0, slot, row, col)[which] for col in cache.heads.units.used.tolist()]
                assert all(not block.defined[n:].any() for block in blocks)
                ours = np.hstack([block.read(slice(0, n)) for block in blocks]).reshape(n, cache.heads.units.total, 2)
                halves = expected[kept[at : at + n]].reshape(n, conversation.n_kv, 2, conversation.half).swapaxes(2, 3)
                assert_same_bits(ours, np.ascontiguousarray(halves).reshape(ours.shape))
            at += n
        assert split.sizes.max() - split.sizes.min() <= 1
        assert cache.tokens_by_row[0, slot].tolist() == split.sizes.tolist()
    cache.free()
    assert not wafer.sram.live


@settings(max_examples=40)
@given(GRIDS, conversations(), patterns())
def test_it_leaves_the_same_ledger_and_sram_on_every_executor(grid, conversation, pattern) -> None:
    def program(wafer: wse.Wafer) -> list[np.ndarray]:
        sizes: list[int] = []
        grow(wafer, conversation, pattern, sizes).free()
        return [np.array(sizes)]

    (sizes,), _ = agree(program, *grid)
    kept = [n_keys_of(pattern.held_after(n)) for n in conversation.lengths]
    assert sizes[-1] == sum(kept) * 2 * conversation.n_kv * 2 * conversation.half * 4


def model_of(pattern: AttentionPattern, executor: str = "batched", **options) -> wse.WaferModel:
    config = {
        "model_type": "llama", "vocab_size": 90, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    wafer = wse.Wafer(rows=4, cols=4, executor=executor)
    return wse.from_config(config, seed=0, wafer=wafer, attention=pattern, dense_attention_layers=(1,), **options)


@pytest.mark.parametrize("pattern", [AttentionPattern(window=7, sinks=2), AttentionPattern(chunk=6, sinks=1)])
def test_decoding_with_what_is_kept_gives_the_bits_of_the_whole_sequence(pattern) -> None:
    ids = np.random.default_rng(0).integers(0, 90, 24)
    for executor, n in (("batched", 24), ("isolated", 13)):
        model = model_of(pattern, executor)
        whole = model(ids[:n]).logits[0]
        engine = Engine(model.wafer, model.store, spec=model.spec)
        cache = engine.new_cache([n])
        engine.forward(ids[:9], sequences_of([0], [9], [0]), cache, np.arange(9))
        for at in range(9, n):
            step = engine.forward(ids[at : at + 1], sequences_of([0], [1], [at]), cache, np.arange(1))
            np.testing.assert_array_equal(step.logits[0], whole[at])
        assert n_keys_of(cache.keys_held(0, 0)) == n_keys_of(pattern.held_after(n)) <= 9
        assert n_keys_of(cache.keys_held(1, 0)) == n
        cache.free()


def test_sram_falls_with_what_is_kept() -> None:
    """A layer at a time holds a whole prompt; the others what their window and sinks are."""
    ids = np.random.default_rng(1).integers(0, 90, 96)
    models = [model_of(pattern) for pattern in (FULL, AttentionPattern(window=8, sinks=4))]
    blocks = []
    for model in models:
        model.generate(ids, 2)
        lies = model.wafer.sram.high_water_map
        assert lies is not None
        blocks.append({name: size for name, size in lies.blocks if name.startswith("keys and values")})
    width = 2 * 2 * 4  # key and value of one pair unit (a head of two lies on two columns), two elements each, 4 bytes
    assert list(blocks[0].values()) == [-(-98 // 4) * width] * 3
    assert sorted(blocks[1].values())[0] == -(-12 // 4) * width
    assert models[1].wafer.sram.high_water_bytes < models[0].wafer.sram.high_water_bytes
    assert models[1].recorded_kv is not None
    assert models[1].recorded_kv.sum(axis=(1, 2)).tolist() == [12, 97, 12]


LLAMA_8B = wse.ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072,
)  # fmt: skip
LAMBDA = AttentionPattern(window=8192, sinks=512)
HALVES = EngineOptions(precision=Precision(kv_dtype="bfloat16"))


@pytest.mark.parametrize(("dense", "gigabytes"), [(7, 1.3757), (4, 1.2751)])
def test_keys_and_values_of_published_sparse_models(dense: int, gigabytes: float) -> None:
    """Llama-3.1-8B, 16,384 tokens and 512 sinks before them, window 8,192: published at 2 bytes a number."""
    spec = LLAMA_8B.with_attention(LAMBDA, range(dense))
    found = kv_bytes(spec, wse.WSE3, 1170, 755, [16384 + 512], HALVES)
    assert round(found / 1e9, 4) == gigabytes


@pytest.mark.slow
def test_keys_and_values_of_the_dense_model_and_a_plan_of_the_sparse_one() -> None:
    assert round(kv_bytes(LLAMA_8B, wse.WSE3, 1170, 755, [16384], HALVES) / 1e9, 4) == 2.1475
    assert kv_bytes(LLAMA_8B, wse.WSE3, 1170, 755, [16384]) == 2 * kv_bytes(LLAMA_8B, wse.WSE3, 1170, 755, [16384], HALVES)
    shape = {"rows": 1170, "cols": 755, "prompt_tokens": 16384, "new_tokens": 512, "prefill_chunk": 1024}
    dense, sparse = (plan_model(spec, **shape) for spec in (LLAMA_8B, LLAMA_8B.with_attention(LAMBDA, (0, 10, 20, 31))))
    assert dense.fits
    assert sparse.fits
    assert sparse.kv_bytes < 0.6 * dense.kv_bytes
    assert sparse.peak_bytes < dense.peak_bytes
    assert sparse.max_context > 1.5 * dense.max_context


def test_exhaustion_names_layer_and_core_and_does_not_spill() -> None:
    small = replace(wse.WSE3, sram_bytes_per_core=6400)
    wafer = wse.Wafer(small, rows=2, cols=2)
    cache = KVCache(wafer, HeadLayout(2, 1, 8, 2), 2, np.array([64]), [AttentionPattern(window=8)] * 2)
    cache.free()
    with pytest.raises(wse.SramOverflowError, match=r"core \(0, 0\): `keys and values of layer 1` needs \d+ bytes"):
        KVCache(wafer, HeadLayout(2, 1, 8, 2), 2, np.array([64]), [AttentionPattern(window=8), FULL])
    assert not wafer.sram.live

"""Growth behind the last token against growth by shifts: where keys lie, what moves, what it takes; the same bits of every result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import plan_model
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.key_ranges import keys_of
from wse_emu.foundation.precision import Precision
from wse_emu.layers.key_rows import ConcatenatedRows
from wse_emu.layers.kv_cache import KVCache
from wse_emu.wafer.placement import TokenBands

from .conversations import Conversation, conversations
from .programs import agree, assert_same_bits, tokens

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 4))
PATTERNS = st.sampled_from([FULL, AttentionPattern(window=3), AttentionPattern(window=4, sinks=2), AttentionPattern(chunk=5, sinks=1)])
CONCAT = EngineOptions(kv_growth="concat")


def row_of(position: int, n_prompt: int, n_rows: int) -> int:
    """The rule, token by token: a prompt lies in equal shares, everything else on the last row."""
    if position >= n_prompt:
        return n_rows - 1
    return next(row for row in range(n_rows) if position < (row + 1) * n_prompt // n_rows)


def grow(wafer: wse.Wafer, conversation: Conversation, prompts: list[int], pattern: AttentionPattern) -> KVCache:
    heads = conversation.heads(wafer.cols)
    cache = KVCache(wafer, heads, 1, np.array(conversation.lengths), [pattern], lies=ConcatenatedRows(wafer.rows, prompts))
    for sequences, qkv in conversation.steps():
        bands = TokenBands(sequences.n_tokens, wafer.rows)
        with tokens(wafer, qkv, bands, heads.qkv, "qkv") as placed:
            cache.append(0, placed, sequences, bands)
            cache.forget(0, sequences, bands)
        cache.advance(sequences)
    return cache


@st.composite
def with_prompts(draw: st.DrawFn) -> tuple[Conversation, list[int]]:
    conversation = draw(conversations())
    return conversation, [draw(st.integers(1, n)) for n in conversation.lengths]


@settings(max_examples=12)
@given(GRIDS, with_prompts(), PATTERNS)
@example((4, 2), (Conversation(0, 1, 1, 2, ((5,), (1,), (1,), (1,))), [5]), FULL)
@example((3, 2), (Conversation(0, 1, 1, 2, ((4,), (4,), (1,), (1,))), [8]), AttentionPattern(window=3))
def test_keys_lie_where_they_came_to_lie(grid, talk, pattern) -> None:
    conversation, prompts = talk
    wafer = wse.Wafer(rows=grid[0], cols=grid[1], executor="isolated")
    cache = grow(wafer, conversation, prompts, pattern)
    for slot, length in enumerate(conversation.lengths):
        _, k, v = conversation.published(slot)
        kept = keys_of(pattern.held_after(length))
        rows = np.array([row_of(p, prompts[slot], wafer.rows) for p in kept.tolist()])
        for row in range(wafer.rows):
            here = kept[rows == row]
            assert cache.tokens_by_row[0, slot, row] == here.size
            for which, expected in enumerate((k, v)):
                blocks = [cache.block(0, slot, row, col)[which] for col in cache.heads.units.used.tolist()]
                assert all(not block.defined[here.size :].any() for block in blocks)
                ours = np.hstack([block.read(slice(0, here.size)) for block in blocks]).reshape(here.size, cache.heads.units.total, 2)
                halves = expected[here].reshape(here.size, conversation.n_kv, 2, conversation.half).swapaxes(2, 3)
                assert_same_bits(ours, np.ascontiguousarray(halves).reshape(ours.shape))
    cache.free()
    assert not wafer.sram.live


@settings(max_examples=8)
@given(GRIDS, with_prompts(), PATTERNS)
def test_nothing_shifts_and_every_executor_leaves_the_same_ledger_and_sram(grid, talk, pattern) -> None:
    def program(wafer: wse.Wafer) -> list[np.ndarray]:
        cache = grow(wafer, *talk, pattern)
        n_bytes = cache.n_bytes
        cache.free()
        return [np.array(n_bytes)]

    _, wafer = agree(program, *grid)
    shifts = [event for event in wafer.ledger.events() if event.kind == "shift"]
    assert shifts
    assert all(event[4:11] == (0,) * 7 for event in shifts)


CONFIG = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
SHAPE = wse.from_config(CONFIG, wafer=wse.Wafer(rows=1, cols=1, executor="dry")).spec
DSA = {
    "model_type": "deepseek_v32", "vocab_size": 71, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "kv_lora_rank": 10, "q_lora_rank": 7,
    "intermediate_size": 14, "moe_intermediate_size": 9, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "index_topk": 3, "index_head_dim": 8, "index_n_heads": 2, "max_position_embeddings": 64,
    "eos_token_id": None,
}  # fmt: skip


def model_of(growth: str, executor: str = "batched", config=CONFIG, **options) -> wse.WaferModel:
    return wse.from_config(config, wafer=wse.Wafer(rows=4, cols=3, executor=executor), kv_growth=growth, **options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, {"attention": AttentionPattern(window=6, sinks=1), "dense_attention_layers": (1,)}),
        pytest.param(CONFIG, {"prefill_chunk": 4, "bta_max_tile": 1}, marks=pytest.mark.slow),
        pytest.param(DSA, {"kv_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["window", "tiles and chunks", "indexer"],
)  # fmt: skip
def test_results_do_not_depend_on_the_row_that_holds_a_token(config, options) -> None:
    ids = np.random.default_rng(0).integers(0, 70, (2, 7))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    models = {growth: model_of(growth, config=config, **options) for growth in ("shift", "concat")}
    made = {growth: model.generate(ids, 5, attention_mask=mask) for growth, model in models.items()}
    np.testing.assert_array_equal(made["concat"], made["shift"])
    kv = {growth: model.recorded_kv for growth, model in models.items()}
    isolated = model_of("concat", "isolated", config, **options)
    np.testing.assert_array_equal(isolated.generate(ids, 5, attention_mask=mask), made["shift"])
    assert isolated.wafer.ledger.events() == models["concat"].wafer.ledger.events()
    assert isolated.wafer.sram.high_water_bytes == models["concat"].wafer.sram.high_water_bytes
    np.testing.assert_array_equal(isolated(ids, mask).logits, models["shift"](ids, mask).logits)

    def moved(growth: str) -> int:
        return sum(event.wavelet_hops for event in models[growth].wafer.ledger.events() if event.kind == "shift")

    assert (moved("concat"), moved("shift") > 0) == (0, True)
    np.testing.assert_array_equal(kv["concat"].sum(axis=2), kv["shift"].sum(axis=2))
    assert (np.ptp(kv["shift"], axis=2) <= 1).all()
    assert kv["concat"][-1, :, -1].tolist() == [7 - 7 * 3 // 4 + 4, 4 - 4 * 3 // 4 + 4]  # the last token is sampled, never run
    assert models["concat"].verify(ids, mask).passed


@pytest.mark.parametrize(
    ("window", "n_prompt", "n_new", "batch", "prefill_chunk"),
    [
        (6, 11, 9, 1, None), (None, 3, 8, 1, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((None, 13, 5, 2, 4), (6, 13, 5, 2, 4), (6, 3, 8, 1, 1))),
    ],
)  # fmt: skip
def test_the_plan_is_the_runs_peak_and_the_longest_context_is_sharp(window, n_prompt, n_new, batch, prefill_chunk) -> None:
    spec = SHAPE if window is None else SHAPE.with_attention(AttentionPattern(window=window), (1,))
    shape = {"rows": 4, "cols": 3, "prompt_tokens": n_prompt, "batch": batch, "prefill_chunk": prefill_chunk, "options": CONCAT}
    plan = plan_model(spec, new_tokens=n_new, **shape)
    for executor in ("batched", "dry"):
        wafer = wse.Wafer(rows=4, cols=3, executor=executor)
        model = wse.from_config(spec, wafer=wafer, kv_growth="concat", prefill_chunk=prefill_chunk)
        model.generate(np.zeros((batch, n_prompt), np.int64) + np.arange(n_prompt), n_new)
        assert wafer.sram.high_water_bytes == plan.peak_bytes
    small = replace(wse.WSE3, sram_bytes_per_core=14000)
    longest = plan_model(spec, new_tokens=1, wafer_spec=small, **shape).max_context
    assert n_prompt < longest < SHAPE.max_position_embeddings
    assert plan_model(spec, new_tokens=longest - n_prompt, wafer_spec=small, **shape).fits
    assert not plan_model(spec, new_tokens=longest - n_prompt + 1, wafer_spec=small, **shape).fits


def test_the_last_row_is_exhausted_first_and_named() -> None:
    small = replace(wse.WSE3, sram_bytes_per_core=12000)
    shape = {"rows": 4, "cols": 3, "prompt_tokens": 8, "wafer_spec": small}
    plans = {growth: plan_model(SHAPE, new_tokens=1, options=EngineOptions(kv_growth=growth), **shape) for growth in ("shift", "concat")}
    contexts = {growth: plan.max_context for growth, plan in plans.items()}
    assert contexts["concat"] < 0.6 * contexts["shift"]
    wafer = wse.Wafer(small, rows=4, cols=3)
    model = wse.from_config(SHAPE, wafer=wafer, kv_growth="concat")
    with pytest.raises(wse.SramOverflowError, match=r"^core \(3, \d\): `(keys and values of layer \d|attention work)` needs \d+ bytes"):
        model.generate(np.arange(8), contexts["shift"] - 8)
    assert not wafer.sram.live
    wse.from_config(SHAPE, wafer=wafer).generate(np.arange(8), 4)


@pytest.mark.parametrize("growth", ["append", None, ["shift"]])
def test_another_growth_is_refused(growth) -> None:
    with pytest.raises(wse.SpecError, match="`kv_growth` must be 'shift' or 'concat', got"):
        model_of(growth)


@pytest.mark.slow
def test_the_figures_of_the_page() -> None:
    """What ``docs/how-the-wafer-works.md`` says."""
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": None,
    }  # fmt: skip
    columns = []
    for growth in ("shift", "concat"):
        wafer = wse.Wafer(rows=16, cols=16)
        model = wse.from_config(config, wafer=wafer, kv_growth=growth)
        model.generate(np.arange(64), 129)
        passes, kv = wafer.ledger.passes(), model.recorded_kv[0, 0]
        decoded = wafer.ledger.events(passes[1].start)
        shifts = [e for e in decoded if e.kind == "shift"]
        sent = [e for e in decoded if (e.stage, e.kind) == ("kv_cache", "send")]
        scores = [e for e in wafer.ledger.events(passes[-1].start) if (e.kind, e.name) == ("chain", "scores")]
        assert sum(e.wavelets for e in shifts) == sum(e.wavelet_hops for e in shifts)
        columns.append(
            (
                f"{sum(e.wavelets for e in shifts):,}", f"{sum(e.wavelets for e in sent):,}, {sum(e.wavelet_hops for e in sent):,}",
                f"{kv.max()}, {kv.min()}", f"{max(e.max_link_wavelets for e in scores):,}", f"{wafer.sram.high_water_bytes:,}",
            )
        )  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "how-the-wafer-works.md").read_text()
    for row in zip(*columns, strict=True):
        assert f"| {row[0]} | {row[1]} |" in page
    llama = wse.ModelSpec(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072,
    )  # fmt: skip

    def longest(dtype: str, growth: str) -> int:
        options = EngineOptions(precision=Precision(dtype=dtype), kv_growth=growth)
        return plan_model(llama, rows=1170, cols=755, prompt_tokens=2048, new_tokens=1, options=options).max_context

    assert f"| bfloat16 | {longest('bfloat16', 'shift'):,} (the model's positions) | {longest('bfloat16', 'concat'):,} |" in page
    assert f"| float32 | {longest('float32', 'shift'):,} | {longest('float32', 'concat'):,} |" in page

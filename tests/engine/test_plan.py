"""The plan against what runs: peaks, refusals, smallest grids, longest contexts, streamed bytes; and the sizes the design speaks of."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.checkpoint import parse_config
from wse_emu.engine.options import CHUNKS, EngineOptions
from wse_emu.engine.plan import Plan, Workload, _last, peak_sram, plan_model, prompt_chunks, sequences_of, settle, smallest_square
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.precision import Precision

MOE = wse.ModelSpec(
    family="mixtral", vocab_size=150, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=400, num_experts=5, top_k=2, moe_intermediate_size=20,
)  # fmt: skip
DENSE = replace(
    MOE, family="llama", num_experts=0, top_k=0, moe_intermediate_size=0, num_heads=3, num_kv_heads=3, head_dim=6, hidden_size=18,
    vocab_size=67,
)  # fmt: skip
SPECS = {"mixtral": MOE, "llama": DENSE}
FAMILIES = st.sampled_from(sorted(SPECS))
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
MIDDLE = wse.ModelSpec(
    family="mixtral", vocab_size=32000, hidden_size=1024, intermediate_size=1792, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=64,
    rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768, num_experts=8, top_k=2, moe_intermediate_size=1792,
)  # fmt: skip
MIXTRAL_8X7B = replace(
    MIDDLE, hidden_size=4096, intermediate_size=14336, moe_intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128,
)  # fmt: skip


def wafer_with(sram_bytes: int) -> wse.WaferSpec:
    """A wafer whose cores have just so much."""
    return replace(wse.WSE3, sram_bytes_per_core=sram_bytes)


def model_on(spec: wse.ModelSpec, rows: int, cols: int, executor: str = "batched", wafer_spec=wse.WSE3, **options) -> wse.WaferModel:
    return wse.from_config(spec, wafer=wse.Wafer(wafer_spec, rows=rows, cols=cols, executor=executor), **options)


def prompts_of(batch: int, n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 60, (batch, n))


# ---- peaks


@settings(max_examples=12)
@given(FAMILIES, GRIDS, st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(1, 6))
@example("mixtral", (1, 1), 1, 1, 1, None)
@example("mixtral", (3, 2), 9, 3, 2, 4)
def test_a_run_takes_exactly_the_planned_peak(family, grid, n_prompt, n_new, batch, prefill_chunk) -> None:
    spec = SPECS[family]
    shape = {"prompt_tokens": n_prompt, "new_tokens": n_new, "batch": batch, "prefill_chunk": prefill_chunk}
    plan = plan_model(spec, rows=grid[0], cols=grid[1], **shape)
    assert plan.fits
    for executor in ("batched", "dry"):
        model = model_on(spec, *grid, executor, prefill_chunk=prefill_chunk)
        model.generate(prompts_of(batch, n_prompt), n_new)
        lies = model.wafer.sram.high_water_map
        assert (model.wafer.sram.high_water_bytes, lies.blocks, (lies.row, lies.col)) == (plan.peak_bytes, plan.blocks, plan.worst_core)
    assert sum(size for _, size in plan.blocks) == plan.peak_bytes


@settings(max_examples=6)
@given(FAMILIES, GRIDS, st.integers(1, 9), st.none() | st.integers(1, 5))
def test_a_verified_run_takes_exactly_the_planned_peak(family, grid, n_prompt, prefill_chunk) -> None:
    shape = {"prompt_tokens": n_prompt, "new_tokens": 0, "prefill_chunk": prefill_chunk}
    plan = plan_model(SPECS[family], rows=grid[0], cols=grid[1], verify=True, **shape)
    model = model_on(SPECS[family], *grid, prefill_chunk=prefill_chunk)
    model.record(prompts_of(1, n_prompt))
    assert model.wafer.sram.high_water_bytes == plan.peak_bytes
    assert plan.peak_bytes >= plan_model(SPECS[family], rows=grid[0], cols=grid[1], **shape).peak_bytes


@settings(max_examples=60)
@given(
    FAMILIES, GRIDS, st.sampled_from([150, 5000, 32000]), st.integers(1, 60), st.integers(0, 300), st.integers(1, 60),
    st.integers(0, 300), st.sampled_from([2, 32]), st.booleans(),
)  # fmt: skip
@example("mixtral", (2, 2), 5000, 57, 7, 15, 284, 32, False)
@example("mixtral", (3, 4), 150, 13, 38, 44, 2, 2, False)
@example("llama", (1, 6), 150, 44, 4, 1, 0, 32, False)
@example("llama", (1, 6), 150, 47, 1, 1, 0, 32, False)
def test_fewer_tokens_and_shorter_contexts_never_need_more(family, grid, vocab, new, more_new, before, more_before, chunk, probe) -> None:
    """Whoever planned for much may run less: a shorter prompt, a batch of which some sequences ended.

    Up to 64 tokens on a core, where a streamed piece of 32 columns still fits the room for logits.
    """
    more_new = min(new + more_new, 64 * grid[0])
    spec, options = replace(SPECS[family], vocab_size=vocab), EngineOptions(chunk=chunk)

    def peak(n: int, length: int) -> int:
        work = Workload(capacity=(length,), passes=(((0, n),),), probe=probe)
        return peak_sram(spec, wafer_with(1 << 22), *grid, work, options).used_bytes

    most = peak(more_new, more_new + before + more_before)
    assert peak(min(new, more_new), more_new + before + more_before) <= most
    assert peak(more_new, more_new + before) <= most


def test_a_batch_of_which_some_sequences_ended_still_fits_exactly_planned_cores() -> None:
    """Sixteen sequences decode together, then fewer: rounding to whole tiles of the vocabulary must not make those need more."""
    spec = replace(MOE, vocab_size=5000)
    work = {"prompt_tokens": 1, "new_tokens": 3, "batch": 16}
    options = EngineOptions(chunk=32)
    plan = plan_model(spec, wafer_spec=wafer_with(1 << 20), rows=2, cols=2, options=options, **work)
    prompts = np.arange(16)[:, None]
    exact = wafer_with(plan.peak_bytes)
    first = model_on(spec, 2, 2, wafer_spec=exact, chunk=32).generate(prompts, 1)[:, -1]
    ending = set(first[:3].tolist())
    n_ended = int(np.isin(first, list(ending)).sum())
    assert 0 < n_ended < 16
    model = model_on(replace(spec, eos_token_ids=tuple(ending)), 2, 2, wafer_spec=exact, chunk=32)
    assert model.generate(prompts, 3).shape == (16, 4)
    assert model.wafer.sram.high_water_bytes == plan.peak_bytes


# ---- refusals


@pytest.mark.parametrize("executor", ["batched", "isolated", "dry"])
@pytest.mark.parametrize("family", sorted(SPECS))
def test_what_does_not_fit_is_refused_before_anything_happens(family: str, executor: str) -> None:
    spec, work = SPECS[family], {"prompt_tokens": 12, "new_tokens": 4}
    needed = plan_model(spec, rows=2, cols=2, options=EngineOptions(chunk=2), **work).peak_bytes
    small = wafer_with(needed - 4)
    plan = plan_model(spec, wafer_spec=small, rows=2, cols=2, **work)
    assert not plan.fits
    assert 0 < plan.max_context < 16  # fewer tokens do fit
    assert plan.message.startswith("does not fit 2 x 2 cores: core (")
    assert plan.peak_bytes == sum(size for _, size in plan.blocks) > small.sram_bytes_per_core
    assert plan.blocks[-1][0].endswith("(does not fit)")
    model = model_on(spec, 2, 2, executor, small)
    with pytest.raises(wse.SramOverflowError, match="use more rows or columns, shorter prompt chunks, or fewer tokens") as caught:
        model.generate(prompts_of(1, 12), 4)
    assert caught.value.core_map.blocks == plan.blocks
    assert not model.wafer.ledger.events()
    assert not model.wafer.sram.live
    assert model.wafer.sram.high_water_bytes == small.base_code_bytes
    enough = wafer_with(needed)
    assert plan_model(spec, wafer_spec=enough, rows=2, cols=2, **work).fits
    model_on(spec, 2, 2, executor, enough).generate(prompts_of(1, 12), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "`prompt_tokens` must be an integer >= 1, got 0"),
        ({"prompt_tokens": 2.0}, r"`prompt_tokens` must be an integer >= 1, got 2\.0"),
        ({"new_tokens": -1}, "`new_tokens` must be an integer >= 0, got -1"),
        ({"batch": 0}, "`batch` must be an integer >= 1, got 0"),
        ({"batch": True}, "`batch` must be an integer >= 1, got True"),
        ({"prefill_chunk": 0}, "`prefill_chunk` must be an integer >= 1 or None, got 0"),
        ({"rows": 0}, r"`rows` must be an integer in 1\.\.1172 or None, got 0"),
        ({"rows": 0, "cols": 4}, r"`rows` must be an integer in 1\.\.1172 or None, got 0"),
        ({"cols": 763}, r"`cols` must be an integer in 1\.\.762 or None, got 763"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(wse.SpecError, match=message):
        plan_model(MOE, **options)


def test_sequences_beyond_the_models_positions_are_refused() -> None:
    with pytest.raises(wse.InputError, match="390 tokens of prompt and 11 new ones are more than the model's 400 positions"):
        plan_model(MOE, prompt_tokens=390, new_tokens=11)
    plan_model(MOE, rows=8, prompt_tokens=390, new_tokens=10)


def test_one_side_asks_for_a_square() -> None:
    for side in ({"rows": 3}, {"cols": 3}):
        plan = plan_model(MOE, prompt_tokens=4, new_tokens=1, **side)
        assert (plan.rows, plan.cols) == (3, 3)


def test_a_plan_is_json() -> None:
    plan = plan_model(MOE, rows=3, prompt_tokens=4, new_tokens=1)
    back = json.loads(json.dumps(plan.to_dict()))
    assert back["peak_bytes"] == plan.peak_bytes
    assert back["blocks"] == [list(block) for block in plan.blocks]


# ---- the smallest grid and the longest context


@pytest.mark.slow
@settings(max_examples=8)
@given(FAMILIES, st.integers(5500, 60000), st.integers(1, 200), st.integers(0, 3), st.integers(1, 3), st.none() | st.integers(1, 64))
@example("mixtral", 5500, 200, 3, 3, None)
def test_the_smallest_square_fits_and_no_smaller_one_does(family, sram_bytes, n_prompt, n_new, batch, prefill_chunk) -> None:
    spec, work = wafer_with(sram_bytes), {"prompt_tokens": n_prompt, "new_tokens": n_new, "batch": batch, "prefill_chunk": prefill_chunk}
    plan = plan_model(SPECS[family], wafer_spec=spec, **work)
    assert plan.rows == plan.cols
    if not plan.fits:
        assert plan.rows == 755
        return
    for side in range(max(1, plan.rows - 3), plan.rows):
        assert not plan_model(SPECS[family], wafer_spec=spec, rows=side, cols=side, **work).fits


def test_no_square_is_none_and_the_plan_shows_the_largest() -> None:
    spec = wafer_with(wse.WSE3.base_code_bytes + 100)
    assert smallest_square(MOE, spec, Workload.of((4,), 1, None), EngineOptions()) is None
    plan = plan_model(MOE, wafer_spec=spec, prompt_tokens=4, new_tokens=1)
    assert (plan.fits, plan.rows, plan.cols) == (False, 755, 755)


@pytest.mark.parametrize("prefill_chunk", [None, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", sorted(SPECS))
@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (5, 3)])
def test_the_longest_context_fits_and_one_more_token_does_not(family: str, grid: tuple[int, int], batch: int, prefill_chunk) -> None:
    spec, rows, cols = SPECS[family], *grid
    n_prompt = 6
    small = wafer_with(plan_model(spec, rows=rows, cols=cols, prompt_tokens=n_prompt, new_tokens=60, batch=batch).peak_bytes)

    def plan(new_tokens: int) -> Plan:
        return plan_model(
            spec, wafer_spec=small, rows=rows, cols=cols, prompt_tokens=n_prompt, new_tokens=new_tokens, batch=batch,
            prefill_chunk=prefill_chunk,
        )  # fmt: skip

    longest = plan(2).max_context
    assert 66 <= longest < spec.max_position_embeddings
    assert plan(longest - n_prompt).fits
    assert not plan(longest + 1 - n_prompt).fits
    assert {plan(n).max_context for n in (2, 30, longest - n_prompt)} == {longest}
    model_on(spec, rows, cols, "dry", small, prefill_chunk=prefill_chunk).generate(prompts_of(batch, n_prompt), longest - n_prompt)


def test_the_models_positions_bound_the_context() -> None:
    assert plan_model(MOE, rows=8, cols=8, prompt_tokens=6, new_tokens=2).max_context == MOE.max_position_embeddings


# ---- pieces


def test_the_largest_piece_that_fits_is_taken() -> None:
    work = Workload.of((40,), 2, None)
    peaks = [peak_sram(MOE, wse.WSE3, 2, 2, work, EngineOptions(chunk=chunk)).used_bytes for chunk in CHUNKS]
    assert peaks == sorted(peaks, reverse=True)
    for chunk, peak in zip(CHUNKS, peaks, strict=True):
        settled, lies = settle(MOE, wafer_with(peak), 2, 2, work, EngineOptions())
        assert (settled.chunk, lies.used_bytes) == (CHUNKS[peaks.index(peak)], peak)
        assert chunk <= settled.piece
    assert len(set(peaks)) >= 4
    with pytest.raises(wse.SramOverflowError):
        settle(MOE, wafer_with(peaks[-1] - 4), 2, 2, work, EngineOptions())


def test_a_given_piece_is_kept_or_refused() -> None:
    work = Workload.of((40,), 2, None)
    options = EngineOptions(chunk=12, stream_experts="all", prefetch_depth=0)
    settled, lies = settle(MOE, wse.WSE3, 2, 2, work, options)
    assert settled is options
    with pytest.raises(wse.SramOverflowError):
        settle(MOE, wafer_with(lies.used_bytes - 4), 2, 2, work, options)
    others = settle(MOE, wafer_with(lies.used_bytes - 4), 2, 2, work, replace(options, chunk=None))[0]
    assert others == replace(options, chunk=8)


# ---- what is streamed


@pytest.mark.parametrize("policy", ["activated", "all"])
@pytest.mark.parametrize("family", sorted(SPECS))
@pytest.mark.parametrize(
    ("n_prompt", "batch", "prefill_chunk"), [(1, 1, None), (2, 1, None), (7, 2, None), (7, 1, 3), (9, 2, 4), (5, 1, 4)]
)
def test_streamed_bytes_are_those_of_a_run_with_the_worst_routing(family, policy, n_prompt, batch, prefill_chunk) -> None:
    spec = SPECS[family]
    plan = plan_model(
        spec, rows=3, cols=4, prompt_tokens=n_prompt, new_tokens=3, batch=batch, prefill_chunk=prefill_chunk,
        options=EngineOptions(stream_experts=policy),
    )  # fmt: skip
    model = model_on(spec, 3, 4, "dry", stream_experts=policy, prefill_chunk=prefill_chunk)
    streamed, seen = [], 0
    for n_new in (1, 3):
        model.generate(prompts_of(batch, n_prompt), n_new)
        streamed.append(sum(e.bytes for e in model.wafer.ledger.events(seen) if e.kind == "stream"))
        seen = len(model.wafer.ledger)
    assert streamed == [plan.stream_bytes_prefill, plan.stream_bytes_prefill + 2 * plan.stream_bytes_token]
    computed = model_on(spec, 3, 4, stream_experts=policy, prefill_chunk=prefill_chunk)
    computed.generate(prompts_of(batch, n_prompt), 1)
    assert sum(e.bytes for e in computed.wafer.ledger.events() if e.kind == "stream") <= plan.stream_bytes_prefill


@pytest.mark.parametrize("tile", [1, 2])
def test_weights_of_attention_are_counted_once_for_each_tile(tile: int) -> None:
    plan = plan_model(MOE, rows=3, cols=4, prompt_tokens=3, new_tokens=2, batch=4, options=EngineOptions(bta_max_tile=tile))
    model = model_on(MOE, 3, 4, "dry", bta_max_tile=tile)
    streamed, seen = [], 0
    for n_new in (1, 2):
        model.generate(prompts_of(4, 3), n_new)
        streamed.append(sum(e.bytes for e in model.wafer.ledger.events(seen) if e.kind == "stream"))
        seen = len(model.wafer.ledger)
    assert streamed == [plan.stream_bytes_prefill, plan.stream_bytes_prefill + plan.stream_bytes_token]


def test_streaming_everything_is_every_parameter_but_the_embedding() -> None:
    plan = plan_model(MOE, rows=3, prompt_tokens=4, new_tokens=2, options=EngineOptions(stream_experts="all"))
    assert plan.stream_bytes_token == 4 * (MOE.n_params - MOE.vocab_size * MOE.hidden_size)


# ---- workloads


def test_prompts_are_cut_into_passes() -> None:
    assert list(prompt_chunks((5, 2), None)) == [[(0, 5), (1, 2)]]
    assert list(prompt_chunks((5, 2), 2)) == [[(0, 2), (1, 2)], [(0, 2)], [(0, 1)]]
    assert list(prompt_chunks((2, 5), 9)) == [[(0, 2), (1, 5)]]


def test_workload_lists_every_kind_of_pass_once() -> None:
    work = Workload.of((9, 2), 3, 2, probe=True)
    assert work.capacity == (12, 5)
    assert work.passes == (((0, 2), (1, 2)), ((0, 2),), ((0, 1),), ((0, 1), (1, 1)))
    assert work.probe
    assert Workload.of((9,), 1, None).passes == (((0, 9),),), "the only new token comes from the prompt's pass"


def test_sequences_are_flattened_in_the_given_order() -> None:
    sequences = sequences_of([2, 0], [3, 1], [4, 0])
    assert sequences.first_token.tolist() == [0, 3]
    assert sequences.slot.tolist() == [2, 0]
    assert sequences.positions.tolist() == [4, 5, 6, 0]


# ---- the sizes that the design speaks of


@pytest.mark.parametrize(("side", "prefill_chunk", "fits"), [(32, None, True), (28, None, True), (16, None, False), (16, 128, True)])
def test_where_a_mid_size_mixture_fits(side: int, prefill_chunk: int | None, fits: bool) -> None:
    """Four layers, 512 + 32 tokens: 32 x 32 and 28 x 28 cores hold it, 16 x 16 only with prompts in chunks."""
    plan = plan_model(MIDDLE, rows=side, cols=side, prompt_tokens=512, new_tokens=32, prefill_chunk=prefill_chunk)
    assert plan.fits == fits
    assert (plan.peak_bytes <= wse.WSE3.sram_bytes_per_core) == fits
    assert (plan.max_context >= 544) == fits


@pytest.mark.slow
@pytest.mark.parametrize("prompt_tokens", [512, 4096])
def test_deepseek_v3_is_planned_on_the_full_wafer_in_seconds(prompt_tokens: int) -> None:
    spec = parse_config(
        {
            "model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "moe_intermediate_size": 2048, "max_position_embeddings": 163_840,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }
    )  # fmt: skip
    assert spec.n_params == 671_026_419_200
    begin = time.process_time()
    plan = plan_model(spec, rows=1170, cols=755, prompt_tokens=prompt_tokens, new_tokens=32)
    assert time.process_time() - begin < 5
    assert plan.fits, plan.message
    assert plan.kv_bytes == 61 * (prompt_tokens + 32) * (512 + 64) * 4
    if prompt_tokens == 512:
        assert plan.max_context > 80_000, "work blocks of a group of heads, not of all 128, bound what keys and values leave"


@pytest.mark.parametrize(("n_sparse", "gigabytes"), [(0, 2.1475), (28, 1.2751), (25, 1.3757)])
def test_llama_8b_is_planned_on_the_full_wafer_in_seconds(n_sparse: int, gigabytes: float) -> None:
    """32 layers, 16,384 tokens in 16 bits, some layers with a window of 8,192 behind 512 sinks: the published sizes of keys and values."""
    spec = parse_config(
        {
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rope_theta": 5e5,
        }
    )  # fmt: skip
    pattern = AttentionPattern(window=8192, sinks=512)
    spec = spec.with_attention([pattern if layer < n_sparse else FULL for layer in range(32)])
    begin = time.process_time()
    options, n_tokens = EngineOptions(precision=Precision(dtype="bfloat16")), 16_384 + (512 if n_sparse else 0)
    plan = plan_model(spec, rows=1170, cols=755, prompt_tokens=n_tokens, new_tokens=0, options=options)
    assert time.process_time() - begin < 5
    assert plan.fits, plan.message
    assert round(plan.kv_bytes / 1e9, 4) == gigabytes


def test_mixtral_8x7b_is_planned_on_the_full_wafer_in_seconds() -> None:
    began = time.process_time()
    plan = plan_model(MIXTRAL_8X7B, rows=wse.WSE3.usable_rows, cols=wse.WSE3.usable_cols, prompt_tokens=2048, new_tokens=32)
    assert time.process_time() - began < 5
    assert plan.fits
    assert plan.chunk == CHUNKS[0]
    assert plan.peak_bytes < 16 * 1024, "a third of a core's SRAM is far more than this shape took when it was designed"
    assert plan.max_context == MIXTRAL_8X7B.max_position_embeddings
    # Two of eight experts for one token; all but the embedding table for a prompt.
    assert plan.stream_bytes_prefill == 4 * (MIXTRAL_8X7B.n_params - 32000 * 4096)
    assert plan.stream_bytes_token == plan.stream_bytes_prefill - 4 * 32 * 6 * 3 * 4096 * 14336


@pytest.mark.parametrize("step", [1, 3, 10, 64, 1000])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (7, 300), (64, 128)])
def test_the_last_that_fits_is_found_whatever_the_step(step: int, low: int, high: int) -> None:
    for limit in {low, low + 1, (low + high) // 2, (low + high) // 2 // step * step, high - 1, high}:
        if low <= limit <= high:
            asked: list[int] = []

            def fits(n: int, limit: int = limit, asked: list[int] = asked) -> bool:
                asked.append(n)
                return n <= limit

            assert _last(low, high, fits, step=step) == limit
            assert all(low < n <= high for n in asked)


def test_a_context_that_ends_with_a_row_of_keys_is_found_soon() -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= 69 * 1170

    assert _last(0, 163_840, fits, step=1170) == 69 * 1170
    assert len(asked) <= 10

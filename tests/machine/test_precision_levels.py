"""Sums in 16 bits: the same bits in every executor and however the work is cut, two bytes in the account, verified at every level."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import plan_model
from wse_emu.engine.weights import ModelWeights
from wse_emu.foundation.precision import HalfType, Precision
from wse_emu.layers.attention import _tile_size
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.linear import matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.placement import TokenBands

from .models import RULES, make_model
from .test_precision import ALL, HALVES, IDS, MASK, executors_agree, rounded

OTHERS = [one for one in ALL if one[0] in ("qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v32", "gemma2", "llama4_text", "dbrx")]
"""Of all families those whose products and attention differ."""
TRIED = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("level", [1, 2])
def test_isolated_cores_hand_on_the_bits_of_the_batch(level: int) -> None:
    model = executors_agree("mixtral", False, grid=(2, 3), dtype="bfloat16", precision_opt_level=level)
    report = model.verify(IDS, MASK)
    assert report.passed, report
    assert report.notes[0] == f"stored in bfloat16, precision_opt_level {level}; bounds follow that"
    assert not np.array_equal(model(IDS).logits, make_model("mixtral", 2, 3, dtype="bfloat16", precision_opt_level=level - 1)(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rules", "dtype"), [(*one, HALVES[i % 3]) for i, one in enumerate(OTHERS)], ids=str)
def test_other_families_with_sums_in_16_bits(family: str, rules: bool, dtype: str) -> None:
    model = executors_agree(family, rules, grid=(2, 3), dtype=dtype, precision_opt_level=2)
    report = model.verify(IDS, MASK)
    assert report.passed, report


@pytest.mark.slow
def test_interpreted_cores_too() -> None:
    executors_agree("llama", True, "interpreted", (2, 3), dtype="float16", precision_opt_level=2)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("family", "dtype"), [*zip(TRIED, (*HALVES, "bfloat16"), strict=True)])
def test_verify_passes(family: str, dtype: str, level: int) -> None:
    report = make_model(family, 3, 4, rules=family in RULES, dtype=dtype, precision_opt_level=level).verify(IDS, MASK)
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("cols", "level"), [(1, 2), (2, 1), (7, 2), (30, 1)])
def test_verify_passes_on_any_number_of_columns(cols: int, level: int, dtype: str) -> None:
    for family in TRIED:
        report = make_model(family, 2, cols, rules=family in RULES, dtype=dtype, precision_opt_level=level).verify(IDS, MASK)
        assert report.passed, report


@pytest.mark.parametrize("level", [1, 2])
def test_nothing_but_columns_and_formats_changes_the_result(level: int) -> None:
    options = {"dtype": "bfloat16", "precision_opt_level": level}
    model = make_model("mixtral", 3, 4, **options)
    base = model(IDS).logits
    assert np.array_equal(base[1], model(IDS[1]).logits[0]), "neighbours in the batch"
    changes = ((1, {}), (5, {"prefill_chunk": 3}), (2, {"chunk": 5, "stream_experts": "all"}), (3, {"bta_max_tile": 1}))
    for rows, more in (*changes, (4, {"kv_growth": "concat"}), (3, {"kv": "recompute", "prefill_chunk": 4})):
        assert np.array_equal(make_model("mixtral", rows, 4, **options, **more)(IDS).logits, base), (rows, more)
    for implementation in ("functional", "optimized"):
        assert np.array_equal(make_model("mixtral", 2, 4, **options, moe_implementation=implementation)(IDS).logits, base)
    generated = model.generate(IDS, 4)
    assert model.verify(generated, n_prompt=7).passed, "decoding with the cache gives the bits of the whole sequence"
    assert not np.array_equal(make_model("mixtral", 3, 3, **options)(IDS).logits, base)


def test_one_column_hands_nothing_on() -> None:
    plain, level_1 = (make_model("mixtral", 2, 1, dtype="cb16", precision_opt_level=level)(IDS).logits for level in (0, 1))
    assert np.array_equal(plain, level_1)


def test_scores_that_decide_are_summed_in_float32() -> None:
    model = make_model("qwen2_moe", 2, 4, rules=True, dtype="bfloat16", precision_opt_level=1)
    weights = ModelWeights(model.store, model.spec, model.options, shapes_only=True)
    assert weights.matrix("layers.0.w_qkv", 2, 2).slice(0, 2).sums == "bfloat16"
    assert weights.heads("layers.0.w_uk", 2, 2).head(0).sums == "bfloat16"
    assert weights.router(0).gate.sums is None
    assert weights.score_matrix("lm_head", 2, 128).slice(0, 128).sums is None


def test_sums_that_come_in_take_two_bytes() -> None:
    wide = {"intermediate_size": 200}  # so that a product is where a core holds the most
    spec = make_model("llama", 1, 1, "dry", changes=wide).spec
    shape = {"rows": 2, "cols": 3, "prompt_tokens": 24, "new_tokens": 8}
    plans = [plan_model(spec, **shape, options=EngineOptions(precision=Precision(dtype="cb16", precision_opt_level=i))) for i in (0, 1)]
    assert plans[1].peak_bytes < plans[0].peak_bytes
    assert plans[1].kv_bytes == plans[0].kv_bytes
    wafers = []
    for level in (0, 1):
        model = make_model("llama", 2, 3, changes=wide, dtype="cb16", precision_opt_level=level)
        model.generate(np.arange(24), 8)
        wafers.append(model.wafer)
    dry = make_model("llama", 2, 3, "dry", changes=wide, dtype="cb16", precision_opt_level=1)
    dry.generate(np.arange(24), 8)
    assert dry.wafer.sram.high_water_bytes == wafers[1].sram.high_water_bytes < wafers[0].sram.high_water_bytes
    assert dry.wafer.ledger.events() == wafers[1].ledger.events() == wafers[0].ledger.events(), "a number of 16 bits is a wavelet too"
    before, after = (dict(wafer.sram.high_water_map.blocks) for wafer in reversed(wafers))
    assert 2 * before["incoming sums"] - 4 < after["incoming sums"] <= 2 * before["incoming sums"]
    assert before["partial sums"] == after["partial sums"]


def product(executor: str, x: np.ndarray, w: np.ndarray, sums: HalfType) -> np.ndarray:
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=3, executor=executor)
    bands = TokenBands(len(x), 2)
    places = [wafer.placement((len(x), n), ("row", bands.split), ("col", wse.Split.balanced(n, 3))) for n in w.shape]
    tiles = w.flatten()
    tiles.flags.writeable = False  # as weights are: one compiled specialisation
    matrix = StreamedMatrix("w", *w.shape, tiles, sums=sums)
    with wafer.empty("x", places[0]) as placed, wafer.empty("y", places[1]) as y:
        wafer.inject(placed, x)
        with wafer.ledger.scope("qkv", 0):
            matmul(wafer, placed, matrix, y, bands)
        return y.gather()


def test_the_state_of_softmax_is_of_the_format_and_takes_two_bytes() -> None:
    long = np.arange(60)
    events = []
    for level in (1, 2):
        model = make_model("llama", 2, 3, dtype="cb16", precision_opt_level=level)
        record = model.record(long)
        for stage in ("attn_max", "attn_denominator"):
            x = record.stages[0, stage]
            assert np.array_equal(x, rounded(x, "cb16")) == (level == 2)
        dry = make_model("llama", 2, 3, "dry", dtype="cb16", precision_opt_level=level)
        for one in (model, dry):
            one.generate(long, 3)
        events.append(dry.wafer.ledger.events())
        assert model.wafer.ledger.events()[-len(events[-1]) :] == events[-1]
        assert dry.wafer.sram.high_water_bytes == model.wafer.sram.high_water_bytes
    names = [{event.name for event in of_level} for of_level in events]
    assert names[0] ^ names[1] == {"softmax_accumulate", "softmax_accumulate_rounded"}
    heads = HeadLayout(3, 1, 6, 3)
    # Of a query, words: 6 of it, 2 x 2 scores, maximum, denominator and 6 of output twice (two bytes each at level 2), 6 of context;
    # for 16 tokens; two keys' lists; at level 2 the largest number.
    assert _tile_size(heads, 2, None) == (16, 1, 16 * (6 + 4 + 16 + 6) + 8)
    assert _tile_size(heads, 2, "cb16") == (16, 1, 16 * (6 + 4 + 8 + 6) + 8 + 1)


@pytest.mark.parametrize(("executor", "where"), [("batched", "layer 0, attention"), ("isolated", r"core \(\d, \d\)")])
def test_a_softmax_beyond_the_format_is_an_error_by_name(executor: str, where: str) -> None:
    changes = {"initializer_range": 1.0, "attention_multiplier": 1e4}
    model = make_model("granitemoe", 2, 2, executor, rules=True, changes=changes, dtype="float16", precision_opt_level=2)
    with pytest.raises(wse.NumberOverflowError, match=f"{where}: `(softmax|maxima)`: .* is beyond the largest number of float16, 65504"):
        model([1, 2, 3])
    assert not model.wafer.sram.live
    at_level_1 = make_model("granitemoe", 2, 2, executor, rules=True, changes=changes, dtype="float16", precision_opt_level=1)
    assert np.isfinite(at_level_1([1, 2, 3]).logits).all()


@pytest.mark.parametrize(("executor", "where"), [("batched", "layer 0, qkv"), ("isolated", r"core \(1, 1\)")])
def test_a_sum_beyond_the_format_is_an_error_by_name(executor: str, where: str) -> None:
    x, w = np.ones((4, 6), np.float32), np.ones((6, 5), np.float32)
    x[3, 1], w[1, 4] = 300, 250
    with pytest.raises(wse.NumberOverflowError, match=f"{where}: `incoming sums`: 75001 is beyond the largest number of float16, 65504"):
        product(executor, x, w, "float16")
    assert product(executor, x, w, "bfloat16")[3, 4] == 74752 + 2, "75001 in bfloat16, twice, and what the last column adds"
    x[3, 5] = 300
    x[3, 1], w[1, 4], w[5, 4] = 1, 1, 250
    assert product(executor, x, w, "float16")[3, 4] == 75005, "the last sum is not handed on"
    x[0, 0] = np.inf
    assert np.isinf(product(executor, x, w, "float16")[0]).all(), "what float32 itself makes is kept"


def test_wrong_levels_are_refused() -> None:
    for level in (-1, 3, True, "1", 1.0, None):
        with pytest.raises(wse.SpecError, match="`precision_opt_level` must be one of 0, 1, 2, got"):
            make_model("llama", 1, 1, dtype="bfloat16", precision_opt_level=level)
    for level in (1, 2):
        with pytest.raises(wse.SpecError, match=f"`precision_opt_level` {level} hands sums on in the 16 bits of `dtype`, which is"):
            make_model("llama", 1, 1, kv_dtype="bfloat16", precision_opt_level=level)
    assert np.array_equal(make_model("llama", 2, 3, precision_opt_level=0)(IDS).logits, make_model("llama", 2, 3)(IDS).logits)

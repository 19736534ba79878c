"""Formats of 16 bits: rounded where SRAM is written, the same bits in every executor, two bytes each in the account."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import plan_model
from wse_emu.foundation.precision import Precision
from wse_emu.wafer.storage import FORMATS
from wse_kernels.formats import decode, encode

from .models import CONFIGS, EVERY_FAMILY, RULES, VARIANTS, make_model
from .test_executors import assert_same, everything

HALVES = ("bfloat16", "float16", "cb16")
IDS = np.random.default_rng(2).integers(0, 60, (2, 7))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
ALL = [(name, False) for name in CONFIGS] + [(name, True) for name in (*RULES, *VARIANTS)]


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return decode(encode(x, FORMATS[dtype]), FORMATS[dtype])


def executors_agree(family: str, rules: bool, executor: str = "isolated", grid: tuple[int, int] = (3, 4), **options: str) -> wse.WaferModel:
    batched, alone = (make_model(family, *grid, e, rules=rules, **options) for e in ("batched", executor))
    assert_same(everything(batched, IDS, MASK, 2), everything(alone, IDS, MASK, 2))
    assert batched.wafer.ledger.events() == alone.wafer.ledger.events()
    assert batched.wafer.sram.high_water_bytes == alone.wafer.sram.high_water_bytes
    return batched


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "bfloat16"), ("llama", "cb16")])
def test_isolated_cores_store_the_bits_of_the_batch_and_verify_passes(family: str, dtype: str) -> None:
    model = executors_agree(family, False, grid=(2, 3), dtype=dtype)
    report = model.verify(IDS, MASK)
    assert report.passed, report
    assert report.notes[0] == f"stored in {dtype}; bounds follow that"


def verified(family: str, dtype: str) -> None:
    """A prompt, then tokens from the cache, of the small model of a family."""
    model = wse.from_config(EVERY_FAMILY[family], seed=3, wafer=wse.Wafer(wse.WSE3, rows=2, cols=3), dtype=dtype)
    n_prompt = IDS.shape[1]
    generated = model.generate(IDS, 2, attention_mask=MASK)
    report = model.verify(generated, np.pad(MASK, ((0, 0), (0, 2)), constant_values=1), n_prompt=n_prompt)
    assert report.passed, report


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_verify_passes_in_all_formats(family: str, dtype: str) -> None:
    verified(family, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_passes_in_all_formats_for_every_family(family: str) -> None:
    for dtype in ("float32", *HALVES):
        verified(family, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rules", "dtype"), [(*one, HALVES[i % 3]) for i, one in enumerate(ALL)], ids=str)
def test_every_family_in_16_bits(family: str, rules: bool, dtype: str) -> None:
    model = executors_agree(family, rules, grid=(2, 3), dtype=dtype)
    if family in VARIANTS:  # the others above, in every format
        report = model.verify(IDS, MASK)
        assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize(("family", "executor"), [("llama", "interpreted"), ("deepseek_v3", "isolated")])
def test_keys_and_values_of_a_format_of_their_own(family: str, executor: str) -> None:
    for dtype, kv_dtype in (("float32", "float16"), ("bfloat16", "cb16"), ("float16", "float32")):
        model = executors_agree(family, True, executor, (2, 3), dtype=dtype, kv_dtype=kv_dtype)
        assert model.verify(IDS, MASK).passed


def test_keys_and_values_alone_in_16_bits_change_the_result_a_little_and_are_verified() -> None:
    plain, halves = make_model("llama", 2, 3), make_model("llama", 2, 3, kv_dtype="bfloat16")
    a, b = plain(IDS).logits, halves(IDS).logits
    assert 1e-4 < np.abs(a - b).max() / np.abs(a).std() < 0.1
    record = halves.record(IDS)
    k = record.stages[0, "k_rope"]
    assert not np.array_equal(k, rounded(k, "bfloat16")), "the stage itself is float32: only the cache rounds"
    report = halves.verify(IDS)
    assert report.passed, report
    assert not make_wrong(halves).verify(IDS).passed


def make_wrong(model: wse.WaferModel) -> wse.WaferModel:
    """A model whose verification expects float32 keys and values."""
    model.options = EngineOptions()
    real = model.record

    def record(*args: object) -> object:
        model.options, kept = EngineOptions(precision=Precision(kv_dtype="bfloat16")), model.options
        try:
            return real(*args)  # type: ignore[arg-type]
        finally:
            model.options = kept

    model.record = record  # type: ignore[method-assign, assignment]
    return model


@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_stage_stores_is_of_the_format_and_sums_are_not(dtype: str) -> None:
    model = make_model("qwen2_moe", 3, 2, rules=True, dtype=dtype)
    record = model.record(IDS)
    for stage in ("attn_norm", "q", "k_rope", "v", "attn_context", "attn_out", "attn_residual", "expert_hidden", "ffn_out", "layer_out"):
        x = record.stages[0, stage]
        assert np.array_equal(x, rounded(x, dtype)), stage
    for stage in ("router_logits", "topk_weights", "attn_denominator", "expert_out", "shared_out"):
        x = record.stages[0, stage]
        assert not np.array_equal(x, rounded(x, dtype)), stage
    logits = record.stages[None, "logits"]
    assert not np.array_equal(logits, rounded(logits, dtype))


def test_nothing_that_the_result_may_not_depend_on_changes_it_in_16_bits() -> None:
    model = make_model("mixtral", 3, 4, dtype="bfloat16")
    base = model(IDS).logits
    assert np.array_equal(base[1], model(IDS[1]).logits[0]), "neighbours in the batch"
    for rows, options in ((1, {}), (5, {"prefill_chunk": 3}), (2, {"chunk": 5, "stream_experts": "all"}), (3, {"bta_max_tile": 1})):
        other = make_model("mixtral", rows, 4, dtype="bfloat16", **options)
        assert np.array_equal(other(IDS).logits, base), (rows, options)
    for implementation in ("functional", "optimized"):
        other = make_model("mixtral", 2, 4, dtype="bfloat16", moe_implementation=implementation)
        assert np.array_equal(other(IDS).logits, base), implementation
    generated = model.generate(IDS, 4)
    assert model.verify(generated, n_prompt=7).passed


def test_float32_is_what_it_was_without_the_option() -> None:
    named = make_model("mixtral", 3, 4, dtype="float32", kv_dtype="float32")
    assert np.array_equal(make_model("mixtral", 3, 4)(IDS).logits, named(IDS).logits)


def test_sram_counts_two_bytes() -> None:
    spec = make_model("llama", 1, 1, "dry").spec
    shape = {"rows": 2, "cols": 3, "prompt_tokens": 24, "new_tokens": 8}
    plans = {
        (dtype, kv): plan_model(spec, **shape, options=EngineOptions(precision=Precision(dtype=dtype, kv_dtype=kv)))
        for dtype, kv in (("float32", None), ("bfloat16", None), ("float32", "cb16"), ("float16", "float32"))
    }
    full, half, kv_half, kv_full = plans.values()
    assert full.kv_bytes == 2 * half.kv_bytes == 2 * kv_half.kv_bytes == kv_full.kv_bytes
    assert half.peak_bytes < kv_full.peak_bytes < full.peak_bytes
    assert half.max_context == full.max_context == 64  # the model's positions
    small = {name: n for name, n in half.blocks if "layer" in name or name == "residual stream"}
    large = {name: n for name, n in full.blocks if "layer" in name or name == "residual stream"}
    for name, n in small.items():
        assert 2 * n - 4 < large[name] <= 2 * n, name  # rounded up to whole words
    dry, run = (make_model("llama", 2, 3, executor, dtype="bfloat16") for executor in ("dry", "batched"))
    for model in (dry, run):
        model.generate(np.arange(24), 8)
    assert dry.wafer.sram.high_water_bytes == run.wafer.sram.high_water_bytes
    assert dry.wafer.ledger.events() == run.wafer.ledger.events()


@pytest.mark.parametrize(("executor", "where"), [("batched", "layer 0, attention_out"), ("isolated", r"core \(\d, \d\)")])
def test_a_number_beyond_the_format_is_an_error_by_name(executor: str, where: str) -> None:
    changes = {"residual_multiplier": 1e6}
    model = make_model("granitemoe", 2, 2, executor, rules=True, changes=changes, dtype="float16")
    with pytest.raises(wse.NumberOverflowError, match=f"{where}: `residual stream`: .* is beyond the largest number of float16, 65504"):
        model([1, 2, 3])
    assert not model.wafer.sram.live
    assert np.isfinite(make_model("granitemoe", 2, 2, executor, rules=True, changes=changes, dtype="bfloat16")([1, 2, 3]).logits).all()


def test_wrong_formats_are_refused() -> None:
    with pytest.raises(wse.SpecError, match="`dtype` must be one of float32, bfloat16, float16, cb16, got 'fp16'"):
        make_model("llama", 1, 1, dtype="fp16")
    with pytest.raises(wse.SpecError, match="`kv_dtype` must be one of float32, bfloat16, float16, cb16, got 8"):
        make_model("llama", 1, 1, kv_dtype=8)
    wafer = wse.Wafer(wse.WSE3, rows=1, cols=2)
    place = wafer.placement((2, 4), (None, None), ("col", None))
    for stored, dtype in (("float8", np.float32), ("bfloat16", np.int32)):
        with pytest.raises(wse.PlacementError, match="`x`: `stored` must be one of bfloat16, float16, cb16 or None, of float32 numbers"):
            wafer.empty("x", place, dtype, stored=stored)
    parts = wafer.empty("p", wafer.placement((2, 4), (None, None), ("col", wse.Split.uniform(2, 2))), stored="bfloat16")
    total = wafer.empty("t", wafer.placement((2, 2), (None, None), ("col", wse.Split.single(2, 1, 2))))
    with pytest.raises(wse.RouteError, match="`p`: partial results are chained in float32, got bfloat16"):
        wse.moves.chain_row(wafer, parts, total)


@pytest.mark.parametrize("executor", ["batched", "isolated", "interpreted"])
def test_a_kernel_of_ones_own_stores_what_its_tensor_takes(executor: str) -> None:
    @wse.kernel(out=("y",))
    def third(x, y):
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                y[i, j] = x[i, j] / np.float32(3.0)

    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2, executor=executor)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with wafer.place(x) as placed, wafer.empty("y", placed.placement, stored="cb16") as y, wafer.empty("z", placed.placement) as z:
        wafer.launch(third, x=placed, y=y)
        wafer.launch(third, x=y, y=z)
        want = rounded(x / np.float32(3), "cb16")
        assert np.array_equal(y.gather(), want)
        assert np.array_equal(z.gather(), want / np.float32(3))
        assert repr(y) == "PlacedTensor('y', (3, 4), cb16)"
        wafer.inject(y, x / np.float32(7))
        assert np.array_equal(y.gather(), rounded(x / np.float32(7), "cb16"))

"""Batch tiling on attention: the bits of one tile, less SRAM in attention, experts that see the whole batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine.plan import plan_model

from .test_routing_rules import SPEC

IDS = np.random.default_rng(4).integers(0, 41, (4, 6))
MASK = np.ones((4, 6), np.int64)
MASK[1, :4] = MASK[2, :1] = 0


def model_of(tile: int | None, rows: int = 5, cols: int = 3, executor: str = "batched", spec: wse.ModelSpec = SPEC, **options: Any):
    return wse.from_config(spec, seed=1, wafer=wse.Wafer(rows=rows, cols=cols, executor=executor), bta_max_tile=tile, **options)


@pytest.mark.parametrize("tile", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"rows": 13}, {"prefill_chunk": 2}])
def test_tiles_change_no_bit(tile: int, options: dict[str, Any]) -> None:
    whole, cut = model_of(None)(IDS, MASK, output_hidden_states=True), model_of(tile, **options)(IDS, MASK, output_hidden_states=True)
    np.testing.assert_array_equal(cut.logits, whole.logits)
    for name in ("topk_ids", "topk_weights", "hidden_states"):
        for ours, theirs in zip(getattr(cut, name), getattr(whole, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model_of(tile, **options).generate(IDS, 4), model_of(None).generate(IDS, 4))


@pytest.mark.parametrize("rows", [3, 11])
def test_every_executor_leaves_one_ledger(rows: int) -> None:
    ids = IDS[:, :3]
    models = [model_of(2, rows, executor=executor) for executor in ("batched", "isolated", "interpreted", "dry")]
    outs = [model(ids) for model in models[:3]]
    models[3](ids, routing=models[0].recorded_routing)
    for out, model in zip(outs, models[1:], strict=True):
        np.testing.assert_array_equal(out.logits, outs[0].logits)
        assert model.wafer.ledger.events() == models[0].wafer.ledger.events()
        assert model.wafer.sram.high_water_bytes == models[0].wafer.sram.high_water_bytes


def test_verification_reads_every_stage_of_every_tile() -> None:
    for rows in (3, 11):
        report = model_of(2, rows).verify(IDS, MASK)
        assert report.passed, report
    record = model_of(1, 3).record(IDS)
    assert record.row_in_attention is not None
    assert record.row_in_attention.tolist() == [0, 0, 1, 1, 2, 2] * 4


def test_memory_of_attention_is_proportional_to_the_tile() -> None:
    """Wide heads, a narrow network: the high-water mark lies in attention. 16 tokens of each of 8 sequences on 2 rows."""
    spec = replace(SPEC, num_heads=32, num_kv_heads=1, head_dim=32, num_layers=1)
    ids = np.random.default_rng(0).integers(0, 41, (8, 16))
    of_attention, experts = {}, {}
    for tile in (8, 4, 2, 1):
        roomy = wse.Wafer(replace(wse.WSE3, sram_bytes_per_core=1 << 20), rows=2, cols=2)
        model = wse.from_config(spec, seed=1, wafer=roomy, bta_max_tile=tile)
        out = model(ids)
        experts[tile] = Counter(out.topk_ids[0].reshape(-1).tolist())
        lies = model.wafer.sram.high_water_map
        assert lies is not None
        blocks = dict(lies.blocks)
        of_attention[tile] = sum(blocks.get(name, 0) for name in ("queries, keys and values", "attention context"))
    assert of_attention == {tile: of_attention[1] * tile for tile in (8, 4, 2, 1)}
    assert of_attention[1] == 8 * (32 + 2 + 32) * 32 * 4 // 2  # 8 tokens on a row, half of the features on a column
    assert all(counts == experts[8] for counts in experts.values())


def test_weights_of_attention_stream_once_for_each_tile_and_experts_once() -> None:
    def streamed(tile: int) -> Counter[str]:
        model = model_of(tile, stream_experts="all")
        model(IDS)
        out: Counter[str] = Counter()
        for event in model.wafer.ledger.events():
            if event.kind == "stream":
                out["experts" if "experts" in event.name else "attention" if "w_qkv" in event.name or "w_o" in event.name else "other"] += (
                    event.bytes
                )
        return out

    whole, cut = streamed(4), streamed(1)
    assert cut["attention"] == 4 * whole["attention"]
    assert cut["experts"] == whole["experts"]


def test_a_tile_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(wse.InputError, match="`bta_max_tile` must divide the batch, got tiles of 3 and 4 sequences"):
        model_of(3)(IDS)
    with pytest.raises(wse.InputError, match="got tiles of 8 and 4 sequences"):
        model_of(8).generate(IDS, 1)
    with pytest.raises(wse.SpecError, match="`bta_max_tile` must be an integer >= 1 or None, got 0"):
        model_of(0)
    with pytest.raises(wse.InputError, match="got tiles of 2 and 3 sequences"):
        plan_model(SPEC, rows=4, cols=4, prompt_tokens=4, new_tokens=1, batch=3, options=model_of(2).options)
    assert plan_model(SPEC, rows=4, cols=4, prompt_tokens=4, new_tokens=1, batch=4, options=model_of(2).options).fits

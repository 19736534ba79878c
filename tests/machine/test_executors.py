"""One program, four ways to run it: the same bits and the same ledger, on any grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.errors import SramOverflowError
from wse_emu.wafer.cores import Arena, Block
from wse_kernels import threads

from .models import CONFIGS, make_model

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=3)
FAMILIES = st.sampled_from(sorted(CONFIGS))


def prompt_of(lengths: list[int], vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids and mask."""
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((len(lengths), max(lengths)), np.int64), np.zeros((len(lengths), max(lengths)), np.int64)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, -n:] = rng.integers(0, vocab, n), 1
    return ids, mask


def everything(model: wse.WaferModel, ids: np.ndarray, mask: np.ndarray, new_tokens: int = 3) -> list[np.ndarray]:
    """All values that a caller can see."""
    out = model(ids, mask, output_hidden_states=True, output_router_logits=True)
    generated = model.generate(ids, new_tokens, attention_mask=mask)
    return [out.logits, *out.hidden_states, *out.router_logits, *out.topk_ids, *out.topk_weights, generated]


def assert_same(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=4)
@given(FAMILIES, GRIDS, LENGTHS, st.sampled_from(["activated", "all"]), st.integers(2, 9))
def test_isolated_cores_give_the_bits_and_the_ledger_of_the_batch(family, grid, lengths, experts, chunk) -> None:
    isolated_is_batched(family, grid, lengths, experts, chunk)


@pytest.mark.slow
@settings(max_examples=12)
@given(FAMILIES, GRIDS, LENGTHS, st.sampled_from(["activated", "all"]), st.integers(2, 9))
def test_isolated_cores_give_the_bits_and_the_ledger_of_the_batch_on_many_grids(family, grid, lengths, experts, chunk) -> None:
    isolated_is_batched(family, grid, lengths, experts, chunk)


def isolated_is_batched(family: str, grid: tuple[int, int], lengths: list[int], experts: str, chunk: int) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    results, ledgers, peaks = [], [], []
    for executor in ("batched", "isolated"):
        model = make_model(family, *grid, executor, stream_experts=experts, chunk=chunk)
        results.append(everything(model, ids, mask))
        ledgers.append(model.wafer.ledger.events())
        peaks.append(model.wafer.sram.high_water_bytes)
        assert not model.wafer.sram.live
    assert_same(*results)
    assert ledgers[0] == ledgers[1]
    assert peaks[0] == peaks[1]


def test_an_arena_never_holds_more_than_the_account_of_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    real, wafers, seen = Arena.allocate, [], []

    def allocate(arena: Arena, *args: Any) -> Block:
        block = real(arena, *args)
        if wafers:
            lies = wafers[0].sram.core_map(*arena.core)
            charged = sum(size for name, size in lies.blocks if not name.endswith("code"))
            seen.append(charged - sum(b.n_bytes for b in arena._blocks))
            assert seen[-1] >= 0, f"{block.name} on core {arena.core} is not charged: {lies}"
        return block

    monkeypatch.setattr(Arena, "allocate", allocate)
    for family, grid, options in (("mixtral", (3, 4), {}), ("llama", (2, 2), {"prefill_chunk": 3, "dtype": "cb16"}), ("llama", (1, 5), {})):
        wafers.clear()
        model = make_model(family, *grid, "isolated", **options)
        wafers.append(model.wafer)
        ids, mask = prompt_of([7, 2], CONFIGS[family]["vocab_size"])
        model.generate(ids, 2, attention_mask=mask)
        model.verify(ids, mask)
    assert seen


def test_what_does_not_fit_one_core_at_a_time_does_not_fit_at_once() -> None:
    # 44 heads of two elements: the keys and values on their way to the cache are what lies on the core at its fullest.
    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 44,
        "num_key_value_heads": 44, "head_dim": 2, "max_position_embeddings": 16, "eos_token_id": None,
    }  # fmt: skip
    for executor in ("batched", "isolated", "dry"):
        model = wse.from_config(config, wafer=wse.Wafer(wse.WSE3, rows=1, cols=1, executor=executor), chunk=2)
        with pytest.raises(SramOverflowError, match=r"outgoing keys and values"):
            model(np.zeros(16, np.int64))


@settings(max_examples=3)
@given(FAMILIES, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_plain_python_gives_the_bits_and_counts_the_multiply_adds_of_the_ledger(family, grid, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    batched, interpreted = (make_model(family, *grid, executor) for executor in ("batched", "interpreted"))
    assert_same(everything(batched, ids, mask, 1), everything(interpreted, ids, mask, 1))
    assert batched.wafer.ledger.events() == interpreted.wafer.ledger.events()
    assert sum(event.macs for event in interpreted.wafer.ledger.events()) > 0


@settings(max_examples=8)
@given(FAMILIES, GRIDS, LENGTHS, st.sampled_from(["activated", "all"]))
def test_a_dry_run_with_the_recorded_routing_leaves_the_same_ledger(family, grid, lengths, experts) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    model = make_model(family, *grid, stream_experts=experts)
    model.generate(ids, 4, attention_mask=mask)
    dry = make_model(family, *grid, "dry", stream_experts=experts)
    dry.generate(ids, 4, attention_mask=mask, routing=model.recorded_routing)
    assert dry.wafer.ledger.events() == model.wafer.ledger.events()
    assert dry.wafer.sram.high_water_bytes == model.wafer.sram.high_water_bytes


def test_a_dry_run_without_a_trace_streams_the_worst_case() -> None:
    model, dry = make_model("mixtral", 3, 3), make_model("mixtral", 3, 3, "dry")
    model([1, 2, 3])
    dry([1, 2, 3])
    streamed = [sum(e.bytes for e in m.wafer.ledger.events() if e.kind == "stream") for m in (model, dry)]
    assert streamed[0] <= streamed[1]
    counts = [[8, 1, 1, 1, 1], [1, 1, 1, 1, 8]]
    drawn = make_model("mixtral", 3, 3, "dry")
    drawn([1, 2, 3], routing=RoutingTrace.from_histogram(counts, 3, 2))
    assert sum(e.bytes for e in drawn.wafer.ledger.events() if e.kind == "stream") <= streamed[1]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_one_thread_gives_the_bits_of_several(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    ids, mask = prompt_of([17, 40, 1], CONFIGS[family]["vocab_size"])
    results = []
    for n in (1, 2, 3):
        with threads.limit_threads(n):
            results.append(everything(make_model(family, 5, 3), ids, mask))
    for other in results[1:]:
        assert_same(results[0], other)

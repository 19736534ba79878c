"""What the reports rest on: forward passes in the ledger, SRAM of all cores, keys and values by row."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.wafer_spec import WSE3
from wse_emu.wafer.ledger import Event, Ledger, NewTokens
from wse_emu.wafer.sram import SramTracker

from .runs import make_model, prompts


def test_every_event_of_a_generation_lies_in_one_pass() -> None:
    model = make_model(prefill_chunk=4)
    model.generate(prompts(2, 6), max_new_tokens=3)
    ledger = model.wafer.ledger
    passes = ledger.passes()
    assert [p.phase for p in passes] == ["prompt", "prompt", "decode", "decode"]
    assert [p.n_tokens for p in passes] == [8, 4, 2, 2]
    assert passes[1].tokens == (NewTokens(0, 4, 2), NewTokens(1, 4, 2))
    assert passes[3].tokens == (NewTokens(0, 7, 1), NewTokens(1, 7, 1))
    assert [p.start for p in passes] == [0, *(p.stop for p in passes[:-1])]
    assert passes[-1].stop == len(ledger)


@pytest.mark.parametrize("executor", ["isolated", "interpreted"])
def test_all_executors_mark_the_same_passes(executor: str) -> None:
    ledgers = []
    for name in ("batched", executor):
        model = make_model(rows=2, cols=2, executor=name)
        model.generate(prompts(1, 3), max_new_tokens=2)
        ledgers.append(model.wafer.ledger)
    assert ledgers[0].passes() == ledgers[1].passes()
    assert ledgers[0].events() == ledgers[1].events()


def test_a_pass_that_raises_leaves_no_mark_and_the_next_one_does() -> None:
    ledger = Ledger()

    def broken() -> None:
        with ledger.forward_pass("prompt", ()):
            ledger.record(Event(None, "", "launch", "x"))
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with ledger.forward_pass("decode", [NewTokens(0, 3, 1)]):
        ledger.record(Event(None, "", "launch", "y"))
    assert [(p.start, p.stop, p.n_tokens) for p in ledger.passes()] == [(1, 2, 1)]
    assert ledger.passes(start=2) == []
    ledger.clear()
    assert ledger.passes() == []


def test_totals_of_passes_add_up_to_the_totals() -> None:
    model = make_model()
    model.generate(prompts(1, 5), max_new_tokens=3)
    ledger = model.wafer.ledger
    (whole,) = ledger.totals(by=())
    parts = [ledger.totals(by=(), start=p.start, stop=p.stop)[0] for p in ledger.passes()]
    for name in ("count", "macs", "bytes", "wavelets", "wavelet_hops"):
        assert sum(part[name] for part in parts) == whole[name]
    assert max(part["max_link_wavelets"] for part in parts) == whole["max_link_wavelets"]


def test_passes_are_in_the_json_document() -> None:
    ledger = Ledger()
    with ledger.forward_pass("prompt", [NewTokens(1, 0, 4)]):
        ledger.record(Event(None, "", "launch", "x"))
    document = json.loads(ledger.to_json())
    assert document["passes"] == [{"start": 0, "stop": 1, "phase": "prompt", "tokens": [{"sequence": 1, "start": 0, "n": 4}]}]


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=3, max_size=3),
                          st.booleans()), min_size=1, max_size=12))  # fmt: skip
def test_sram_of_all_cores_is_that_of_the_fullest_moment(steps: list[tuple[list[int], list[int], bool]]) -> None:
    tracker = SramTracker(WSE3, 4, 3)
    used = np.zeros((4, 3), np.int64)
    live, best = [], used + WSE3.base_code_bytes
    for rows, cols, free in steps:
        size = np.multiply.outer(rows, cols) * 4
        live.append((tracker.allocate("x", np.array(rows), np.array(cols), 4), size))
        used = used + size
        with tracker.code("k", 100):
            now = used + WSE3.base_code_bytes + 100
            if now.max() > best.max():
                best = now
        if free:
            reservation, size = live.pop(0)
            tracker.free(reservation)
            used = used - size
    np.testing.assert_array_equal(tracker.high_water_by_core, best)
    assert tracker.high_water_by_core.max() == tracker.high_water_bytes
    lies = tracker.high_water_map
    assert lies is not None
    assert tracker.high_water_by_core[lies.row, lies.col] == lies.used_bytes


def test_sram_of_an_empty_wafer_is_its_base_code() -> None:
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=5)
    np.testing.assert_array_equal(wafer.sram.high_water_by_core, np.full((2, 5), WSE3.base_code_bytes))


def test_keys_and_values_are_told_by_row_at_the_end_of_a_call() -> None:
    model = make_model(rows=4)
    mask = np.ones((2, 6), np.int64)
    mask[1, :3] = 0
    model.generate(prompts(2, 6), max_new_tokens=4, attention_mask=mask)
    assert model.recorded_kv is not None
    assert model.recorded_kv.shape == (3, 2, 4)
    np.testing.assert_array_equal(model.recorded_kv.sum(axis=2), [[9, 6]] * 3)  # the last token is sampled, never run
    assert (np.ptp(model.recorded_kv, axis=2) <= 1).all()

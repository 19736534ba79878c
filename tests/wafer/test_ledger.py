"""The ledger: sums by layer, stage, kind and name; its JSON document; colors; wrong questions are told."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.wafer.ledger import KINDS, SCHEMA_VERSION, Event, Ledger, NewTokens

KEYS = ("layer", "stage", "kind", "name")
SUMMED = ("count", "macs", "bytes", "wavelets", "wavelet_hops")
MAXED = ("max_link_wavelets", "max_hops", "colors")
COUNTS = st.integers(0, 2**40)
SCOPED = st.tuples(
    st.none() | st.integers(0, 2), st.sampled_from(["attention", "ffn"]), st.sampled_from(KINDS[:4]), st.sampled_from("xy"),
    st.tuples(*[COUNTS] * 8),
)  # fmt: skip


def filled(rows: list[Any]) -> Ledger:
    ledger = Ledger()
    for layer, stage, kind, name, numbers in rows:
        with ledger.scope(stage, layer):
            ledger.record(Event(None, "", kind, name, *numbers))
    return ledger


@given(st.lists(SCOPED, max_size=12), st.sets(st.sampled_from(KEYS)).map(sorted), st.integers(0, 12), st.integers(0, 12))
def test_totals_are_sums_and_maxima_of_the_events(rows: list[Any], by: list[str], start: int, stop: int) -> None:
    ledger = filled(rows)
    groups: dict[tuple[Any, ...], list[Event]] = {}
    for event in ledger.events()[start:stop]:
        groups.setdefault(tuple(getattr(event, key) for key in by), []).append(event)
    expected = [
        {
            **dict.fromkeys(KEYS), **dict(zip(by, key, strict=True)),
            **{f: sum(getattr(e, f) for e in events) for f in SUMMED}, **{f: max(getattr(e, f) for e in events) for f in MAXED},
        }
        for key, events in groups.items()
    ]  # fmt: skip
    assert ledger.totals(by=by, start=start, stop=stop) == expected


@given(st.lists(SCOPED, max_size=12), st.integers(0, 3))
def test_the_document_gives_every_event_back(rows: list[Any], n_tokens: int) -> None:
    ledger = Ledger()
    with ledger.forward_pass("prompt", [NewTokens(0, 0, n_tokens)]):
        for layer, stage, kind, name, numbers in rows:
            with ledger.scope(stage, layer):
                ledger.record(Event(None, "", kind, name, *numbers))
    document = json.loads(ledger.to_json())
    assert document["schema"] == SCHEMA_VERSION
    assert document["fields"] == list(Event._fields)
    assert [Event(*row) for row in document["events"]] == ledger.events()
    assert document["totals"] == ledger.totals()
    assert document["passes"] == [
        {"start": 0, "stop": len(rows), "phase": "prompt", "tokens": [{"sequence": 0, "start": 0, "n": n_tokens}]}
    ]


def test_the_document_is_written_to_a_file(tmp_path: Any) -> None:
    ledger = filled([(0, "ffn", "launch", "x", (1,) * 8)])
    assert (text := ledger.to_json(tmp_path / "ledger.json")) == (tmp_path / "ledger.json").read_text(encoding="utf-8")
    assert json.loads(text)["events"] == [[0, "ffn", "launch", "x", 1, 1, 1, 1, 1, 1, 1, 1]]


def test_what_a_wafer_records_is_plain_numbers(tmp_path: Any) -> None:
    """Counts of NumPy's types would not go into the document."""
    for executor in ("batched", "isolated", "dry"):
        wafer = wse.Wafer(wse.TINY, rows=2, cols=3, executor=executor)
        with wafer.place(np.ones((4, 6), np.float32)) as x, wafer.empty("y", wafer.placement((4, 6), x.placement.axis0, (None, None))) as y:
            wse.moves.all_gather_row(wafer, x, y)
        for event in wafer.ledger.events():
            assert {type(v) for v in event[4:]} == {int}
        assert json.loads(wafer.ledger.to_json())["schema"] == SCHEMA_VERSION


@pytest.mark.parametrize("by", ["kind", ("kind", "core"), ("bytes",), 3, None, ([],), (None,), ("kind", ["name"])])
def test_totals_by_anything_else_are_refused(by: Any) -> None:
    ledger = filled([(0, "ffn", "launch", "x", (1,) * 8)])
    with pytest.raises(wse.InputError, match=r"`by` must be a sequence of layer, stage, kind and name, for instance \('kind',\); got "):
        ledger.totals(by=by)


@pytest.mark.parametrize("by", [(), [], ("kind",), ["name", "kind"], ("kind", "kind")])
def test_any_sequence_of_fields_will_do(by: Any) -> None:
    (row,) = filled([(0, "ffn", "launch", "x", (1,) * 8)] * 2).totals(by=by)
    assert row["count"] == 2
    assert {key for key in KEYS if row[key] is not None} == set(by)


def test_a_scope_ends_with_its_block_also_when_it_fails() -> None:
    ledger = Ledger()

    def fail() -> None:
        with ledger.scope("ffn", 3):
            ledger.record(Event(None, "", "launch", "in"))
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    ledger.record(Event(None, "", "launch", "out"))
    assert [(e.layer, e.stage, e.name) for e in ledger.events()] == [(3, "ffn", "in"), (None, "host", "out")]


def test_a_pass_that_fails_leaves_no_mark() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="x"), ledger.forward_pass("prompt", []):
        raise ValueError("x")
    assert ledger.passes() == []
    ledger.record(Event(None, "", "launch", "x"))
    ledger.clear()
    assert (len(ledger), ledger.events(), ledger.totals(), ledger.passes()) == (0, [], [], [])


@pytest.mark.parametrize(("kind", "n"), [("chain", 2), ("send", 4)])
def test_colors_are_taken_once_for_each_kind_of_move(kind: str, n: int) -> None:
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2)
    for _ in range(30):
        wafer.record(Event(None, "", kind, "x", colors=n))
    with pytest.raises(wse.RouteError, match=rf"stream of `w`: the routes need 25 colors \({kind} {n}, stream {25 - n}\), WSE-3 has 24"):
        wafer.record(Event(None, "", "launch", "k"), Event(None, "", "stream", "w", colors=25 - n))
    assert len(wafer.ledger) == 30, "all or none"

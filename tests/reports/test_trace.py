"""The trace file: valid by the rules of the Trace Event Format, in logical time, with the ledger's sums."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from wse_emu.reports import LOGICAL_TIME, trace_events, write_trace
from wse_emu.wafer.ledger import FABRIC_KINDS, KINDS, Event, Ledger, NewTokens

from .runs import make_model, prompts

NUMBERS = ("count", "macs", "bytes", "wavelets", "wavelet_hops")
REQUIRED = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "C": {"name", "cat", "ph", "ts", "pid", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
}
"""Keys by phase, as the Trace Event Format asks for them (and ``cat``, without which chrome://tracing prints "undefined")."""


def validate(document: dict[str, Any]) -> None:
    """Raise if the document breaks a rule of the format, or slices of one track overlap without nesting."""
    assert isinstance(document["traceEvents"], list)
    assert document["displayTimeUnit"] in ("ms", "ns")
    named, used = set(), set()
    open_slices: dict[tuple[int, int], list[int]] = defaultdict(list)
    last = 0
    for event in document["traceEvents"]:
        assert REQUIRED[event["ph"]] <= set(event), event
        assert isinstance(event["args"], dict)
        track = (event["pid"], event.get("tid"))
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                assert track not in named
                named.add(track)
            continue
        assert type(event["ts"]) is int
        assert event["ts"] >= last
        last = event["ts"]
        if event["ph"] == "C":
            assert all(type(value) is int for value in event["args"].values())
            continue
        used.add(track)
        assert type(event["dur"]) is int
        assert event["dur"] > 0
        stack = open_slices[track]
        while stack and stack[-1] <= event["ts"]:
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1], f"{event} crosses the end of what holds it"
        stack.append(event["ts"] + event["dur"])
    assert used <= named
    assert named - used <= {(1, 1)}  # the program's track is named also where nothing happened


def slices(document: dict[str, Any], category: str | None = None) -> list[dict[str, Any]]:
    """Complete events of one category, or those that stand for one event of the ledger each."""
    found = [e for e in document["traceEvents"] if e["ph"] == "X"]
    return [e for e in found if (e["cat"] == category if category else "event" in e["args"])]


def written(ledger: Ledger, tmp_path: Path, **options: Any) -> dict[str, Any]:
    file = tmp_path / "trace.json"
    write_trace(ledger, file, **options)
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    validate(document)
    return document


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """Prompt chunks and decode steps of a batch, then a pass with probes."""
    model = make_model(prefill_chunk=4)
    model.generate(prompts(2, 6), max_new_tokens=3)
    model.verify(prompts(1, 4))
    return model.wafer.ledger


def test_sums_over_the_events_are_the_totals_of_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    leaves = slices(written(ledger, tmp_path))
    for row in ledger.totals(by=("layer", "stage", "kind", "name")):
        same = [e["args"] for e in leaves if all(e["args"][k] == row[k] for k in ("layer", "stage", "kind", "name"))]
        assert {n: sum(args[n] for args in same) for n in NUMBERS} == {n: row[n] for n in NUMBERS}
        assert max(args["max_link_wavelets"] for args in same) == row["max_link_wavelets"]
    everything = [e["args"] for e in written(ledger, tmp_path)["traceEvents"] if e["ph"] == "X"]
    (whole,) = ledger.totals(by=())
    for name in NUMBERS:  # passes, layers and stages do not count what is inside them a second time
        assert sum(args.get(name, 0) for args in everything) == whole[name]


def test_every_event_has_all_fields_and_its_place_in_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    leaves = slices(written(ledger, tmp_path))
    assert [e["args"].pop("event") for e in leaves] == list(range(len(ledger)))
    assert [Event(**e["args"]) for e in leaves] == ledger.events()
    assert all((e["ts"], e["dur"], e["name"], e["cat"]) == (i, 1, e["args"]["name"], e["args"]["kind"]) for i, e in enumerate(leaves))


def test_passes_hold_layers_and_layers_hold_stages(ledger: Ledger, tmp_path: Path) -> None:
    document = written(ledger, tmp_path)
    passes = slices(document, "pass")
    assert [e["name"] for e in passes] == [
        "pass 0: prompt, 8 tokens", "pass 1: prompt, 4 tokens", "pass 2: decode, 2 tokens", "pass 3: decode, 2 tokens",
        "pass 4: prompt, 4 tokens",
    ]  # fmt: skip
    assert [(e["ts"], e["ts"] + e["dur"]) for e in passes] == [(p.start, p.stop) for p in ledger.passes()]
    assert passes[1]["args"]["tokens"] == [{"sequence": 0, "start": 4, "n": 2}, {"sequence": 1, "start": 4, "n": 2}]
    for outer in passes:
        layers = [e for e in slices(document, "layer") if e["args"]["pass"] == outer["args"]["pass"]]
        assert [e["name"] for e in layers] == ["layer 0", "layer 1", "layer 2"]
        assert all(outer["ts"] <= e["ts"] and e["ts"] + e["dur"] <= outer["ts"] + outer["dur"] for e in layers)
        stages = [e for e in slices(document, "stage") if e["args"]["pass"] == outer["args"]["pass"]]
        assert sum(e["dur"] for e in stages) == outer["dur"]
        for layer in layers:
            inside = [e for e in stages if e["args"]["layer"] == layer["args"]["layer"]]
            assert sum(e["dur"] for e in inside) == layer["dur"]
            assert (inside[0]["ts"], inside[0]["name"]) == (layer["ts"], "attention_norm")
        assert [e["name"] for e in stages if e["args"]["layer"] is None] == ["embedding", "final_norm", "lm_head"]


def test_passes_layers_and_stages_carry_the_sums_of_what_is_inside(ledger: Ledger, tmp_path: Path) -> None:
    document = written(ledger, tmp_path)
    for category in ("pass", "layer", "stage"):
        for span in slices(document, category):
            first, stop = span["ts"], span["ts"] + span["dur"]
            (row,) = ledger.totals(by=(), start=first, stop=stop)
            assert span["args"]["inside"] == {"events": stop - first, **{n: row[n] for n in NUMBERS}}


def test_every_kind_has_a_track_of_its_own(ledger: Ledger, tmp_path: Path) -> None:
    document = written(ledger, tmp_path)
    names = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert names[1] == "program"
    assert len(set(names.values())) == len(names)
    tracks = defaultdict(set)
    for event in slices(document):
        tracks[names[event["tid"]]].add(event["cat"])
    assert tracks["launches"] == {"launch"}
    assert tracks["MemoryX stream"] == {"stream"}
    assert tracks["probe channel"] == {"probe"}
    assert tracks["fabric: chain"] == {"chain"}
    assert all(len(kinds) == 1 for kinds in tracks.values())
    assert set(names.values()) == {"program", *tracks}


def test_all_kinds_can_be_shown(tmp_path: Path) -> None:
    ledger = Ledger()
    for kind in KINDS:
        ledger.record(Event(None, "", kind, "x", bytes=4, wavelets=1))
    assert {e["cat"] for e in slices(written(ledger, tmp_path))} == set(KINDS)


def test_counters_end_at_the_totals(ledger: Ledger, tmp_path: Path) -> None:
    document = written(ledger, tmp_path)
    series: dict[str, list[tuple[int, dict[str, int]]]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "C":
            series[event["name"]].append((event["ts"], event["args"]))
    rows = {row["kind"]: row for row in ledger.totals(by=("kind",))}
    assert series["weights streamed, so far"][-1][1] == {"bytes": rows["stream"]["bytes"]}
    assert series["moved between cores, so far"][-1][1] == {"wavelets": sum(rows[k]["wavelets"] for k in FABRIC_KINDS if k in rows)}
    assert series["multiply-adds, so far"][-1][1] == {"macs": rows["launch"]["macs"]}
    assert series["busiest link of the move"][-1][1] == {"wavelets": 0}
    for name, points in series.items():
        assert points[0][0] == 0
        values = [next(iter(args.values())) for _, args in points]
        assert all(a != b for a, b in pairwise(values)), name
        if name.endswith("so far"):
            assert values == sorted(values)
    link = dict(series["busiest link of the move"])
    assert all(link[i] == {"wavelets": e.max_link_wavelets} for i, e in enumerate(ledger.events()) if i in link)


def test_a_trace_may_begin_later_and_says_so(ledger: Ledger, tmp_path: Path) -> None:
    start = ledger.passes()[2].start
    document = written(ledger, tmp_path, start=start, about={"model": "a <model>"})
    assert document["otherData"]["first_event"] == start
    assert document["otherData"]["model"] == "a <model>"
    leaves = slices(document)
    assert [e["args"]["event"] for e in leaves] == list(range(start, len(ledger)))
    assert leaves[0]["ts"] == 0
    assert [e["args"]["phase"] for e in slices(document, "pass")] == ["decode", "decode", "prompt"]


def test_the_file_says_what_its_time_is_and_knows_no_host_second(ledger: Ledger, tmp_path: Path) -> None:
    document = written(ledger, tmp_path)
    assert document["otherData"]["time"] == LOGICAL_TIME
    assert "one event of the ledger" in LOGICAL_TIME
    assert "nor time on a wafer" in LOGICAL_TIME
    again = written(ledger, tmp_path)
    assert again == document


def test_work_outside_a_pass_is_shown_without_one(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.record(Event(None, "", "launch", "mine", macs=7))
    with ledger.forward_pass("prompt", [NewTokens(0, 0, 1)]), ledger.scope("attention", 0):
        ledger.record(Event(None, "", "launch", "matmul", macs=5))
    document = written(ledger, tmp_path)
    (span,) = slices(document, "pass")
    assert (span["ts"], span["dur"]) == (1, 1)
    assert [(e["name"], e["args"]["pass"]) for e in slices(document, "stage")] == [("host", None), ("attention", 0)]


def test_an_empty_ledger_gives_an_empty_trace(tmp_path: Path) -> None:
    assert slices(written(Ledger(), tmp_path)) == []


def test_identical_runs_of_all_executors_give_the_same_trace() -> None:
    traces = []
    for executor in ("batched", "isolated"):
        model = make_model("llama", rows=2, cols=2, executor=executor)
        model.generate(prompts(1, 3), max_new_tokens=2)
        traces.append(list(trace_events(model.wafer.ledger)))
    assert traces[0] == traces[1]

"""The ledger in the Trace Event Format, which Perfetto and chrome://tracing show.

Time in the file is logical: event `i` of the ledger lasts from microsecond `i` to microsecond ``i + 1``, whatever it stands for. So a
length counts events; it is neither time on a host nor time on a wafer, which is not modelled.

References
----------
"Trace Event Format", the Chromium project: the JSON object format, complete (``X``), counter (``C``) and metadata (``M``) events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final, TypeVar

from wse_emu.foundation.files import whole_file
from wse_emu.foundation.units import counted
from wse_emu.wafer.ledger import EDGE_KINDS, FABRIC_KINDS, SCHEMA_VERSION, Event, ForwardPass, Ledger

T = TypeVar("T")

LOGICAL_TIME: Final = (
    "logical: one microsecond is one event of the ledger, in the order of the ledger; a length counts events and is neither time on a host "
    "nor time on a wafer"
)
"""What the file says about its time axis."""

_PROCESS: Final = 1
_PROGRAM: Final = 1
_TRACKS: Final = {
    "launch": "launches",
    "stream": "MemoryX stream",
    **{kind: f"edge: {kind}" for kind in EDGE_KINDS},
    **{kind: f"fabric: {kind}" for kind in FABRIC_KINDS},
    "control": "control channel",
    "probe": "probe channel",
}
"""Kind of events to the name of its track, in the order in which they are shown."""
_INSIDE: Final = ("count", "macs", "bytes", "wavelets", "wavelet_hops")
"""Sums that a pass, a layer and a stage carry."""
_TRACK_OF: Final = {kind: _PROGRAM + 1 + n for n, kind in enumerate(_TRACKS)}


def write_trace(ledger: Ledger, path: str | Path, *, start: int = 0, about: Mapping[str, Any] | None = None) -> None:
    """Write what a wafer did as a trace file for Perfetto (ui.perfetto.dev) or chrome://tracing.

    Parameters
    ----------
    ledger : Ledger
    path : path
        Written anew, whole or not at all; JSON.
    start : int
        First event to show (``len(ledger)`` taken earlier).
    about : mapping, optional
        JSON values that the file carries in ``otherData``, for instance the model's name.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    other = {"time": LOGICAL_TIME, "ledger_schema": SCHEMA_VERSION, "first_event": start, **(about or {})}
    with whole_file(path) as file:
        file.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(other)}, "traceEvents": [\n')
        separator = ""
        for event in trace_events(ledger, start):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")


def trace_events(ledger: Ledger, start: int = 0) -> Iterator[dict[str, Any]]:
    """Trace events in ascending order of time, parents before what lies inside them.

    Yields
    ------
    dict
        Names of the tracks; then, on the track "program", forward passes that hold layers that hold stages; on a track for each kind, one
        complete event for each event of the ledger, with all its fields in ``args``; and counters. ``args["inside"]`` of a pass, layer or
        stage holds sums over the events inside, which are not counted a second time in the ``args`` themselves.
    """
    events = ledger.events(start)
    spans = _spans(events, ledger.passes(start), start)
    counters = _counters(events)
    yield from _track_names(events)
    for i, event in enumerate(events):
        yield from spans.get(i, ())
        yield _complete(_TRACK_OF[event.kind], i, 1, event.name, event.kind, {"event": start + i, **event._asdict()})
        yield from _changed(counters, i)
    yield from _changed(counters, len(events))


def _complete(track: int, first: int, length: int, name: str, category: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": _PROCESS, "tid": track, "ts": first, "dur": length, "name": name, "cat": category, "args": args}


def _track_names(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Name the process and the tracks on which something lies."""
    used = {event.kind for event in events}
    names = {_PROGRAM: "program", **{_TRACK_OF[kind]: name for kind, name in _TRACKS.items() if kind in used}}
    process = {"ph": "M", "pid": _PROCESS, "tid": _PROGRAM, "ts": 0}
    yield {**process, "name": "process_name", "args": {"name": "wafer (logical time: 1 us is one event)"}}
    for track, name in names.items():
        yield {**process, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield {**process, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def _spans(events: Sequence[Event], passes: Sequence[ForwardPass], start: int) -> dict[int, list[dict[str, Any]]]:
    """Passes, layers and stages by the event with which they begin, outer ones first."""
    out: dict[int, list[dict[str, Any]]] = {}
    pass_of: list[int | None] = [None] * len(events)
    for number, p in enumerate(passes):
        pass_of[p.start - start : p.stop - start] = [number] * (p.stop - p.start)
    layers = [None if event.layer is None else (number, event.layer) for number, event in zip(pass_of, events, strict=True)]
    stages = [(number, event.layer, event.stage) for number, event in zip(pass_of, events, strict=True)]
    sums = [list(accumulate((getattr(event, field) for event in events), initial=0)) for field in _INSIDE]

    def add(first: int, last: int, name: str, category: str, args: dict[str, Any]) -> None:
        inside = {field: total[last] - total[first] for field, total in zip(_INSIDE, sums, strict=True)}
        span = _complete(_PROGRAM, first, last - first, name, category, {**args, "inside": {"events": last - first, **inside}})
        out.setdefault(first, []).append(span)

    for first, last, number in _runs(pass_of):
        p = passes[number]
        args = {"pass": number, "phase": p.phase, "tokens": [t._asdict() for t in p.tokens]}
        add(first, last, f"pass {number}: {p.phase}, {counted(p.n_tokens, 'token')}", "pass", args)
    for first, last, (of_pass, layer) in _runs(layers):
        add(first, last, f"layer {layer}", "layer", {"pass": of_pass, "layer": layer})
    for first, last, (of_pass, of_layer, stage) in _runs(stages):
        add(first, last, stage, "stage", {"pass": of_pass, "layer": of_layer, "stage": stage})
    return out


def _runs(keys: Sequence[T | None]) -> Iterator[tuple[int, int, T]]:
    """``(first, stop, key)`` of adjacent equal keys; None is no key."""
    at = 0
    for key, group in groupby(keys):
        first, at = at, at + sum(1 for _ in group)
        if key is not None:
            yield first, at, key


def _counters(events: Sequence[Event]) -> dict[str, tuple[str, list[int]]]:
    """Name to unit and values: from the moment before each event on, then after the last."""

    def so_far(each: Iterator[int]) -> list[int]:
        return list(accumulate(each, initial=0))

    return {
        "weights streamed, so far": ("bytes", so_far(e.bytes if e.kind == "stream" else 0 for e in events)),
        "moved between cores, so far": ("wavelets", so_far(e.wavelets if e.kind in FABRIC_KINDS else 0 for e in events)),
        "multiply-adds, so far": ("macs", so_far(e.macs for e in events)),
        "busiest link of the move": ("wavelets", [*(e.max_link_wavelets for e in events), 0]),
    }


def _changed(counters: Mapping[str, tuple[str, list[int]]], i: int) -> Iterator[dict[str, Any]]:
    for name, (unit, values) in counters.items():
        if i == 0 or values[i] != values[i - 1]:
            yield {"ph": "C", "pid": _PROCESS, "tid": _PROGRAM, "ts": i, "name": name, "cat": "counter", "args": {unit: values[i]}}

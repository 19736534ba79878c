"""What a run streamed, moved and multiplied: by forward pass, by layer, by stage and by kind of move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from wse_emu.foundation.units import bytes_text, counted
from wse_emu.reports.charts import Segment, bar, columns, number
from wse_emu.reports.markup import Child, Markup, join, table, tag
from wse_emu.reports.run import PassTotals, Run
from wse_emu.wafer.ledger import EDGE_KINDS, FABRIC_KINDS
from wse_emu.wafer.placement import Split

_MOST_COLUMNS: Final = 160
"""Forward passes that a chart tells apart."""


class _Part(NamedTuple):
    """Bytes of some kinds of moves, as one column of a table."""

    head: str
    kinds: tuple[str, ...]


_STREAM: Final = _Part("weights streamed, bytes", ("stream",))
_FABRIC: Final = _Part("between cores, bytes", FABRIC_KINDS)
_EDGE: Final = _Part("tokens in, logits out, bytes", EDGE_KINDS)
_CHANNELS: Final = (_Part("control channel, bytes", ("control",)), _Part("probe channel, bytes", ("probe",)))


def passes_section(run: Run) -> Markup:
    """Charts of the forward passes in their order."""
    charts: tuple[tuple[str, Callable[[PassTotals], int]], ...] = (
        ("weights streamed, bytes", lambda p: p.streamed_bytes),
        ("between cores, bytes", lambda p: p.fabric_bytes),
        ("multiply-adds", lambda p: p.macs),
    )
    bins = Split.balanced(len(run.passes), min(len(run.passes), _MOST_COLUMNS))
    note = f" Each bar is the largest of up to {bins.max_size} passes that follow each other." if bins.max_size > 1 else ""
    return join([
        tag("p", f"{pass_counts(run)}, from left to right.{note}", class_="lead"),
        _legend([("prompt-pass", "prompt"), ("decode", "decode")]),
        tag("div", *(_chart(run.passes, bins, name, value) for name, value in charts), class_="charts"),
    ])  # fmt: skip


def pass_counts(run: Run) -> str:
    """How many passes of each phase, and their tokens."""
    parts = []
    for phase in dict.fromkeys(p.phase for p in run.passes):
        mine = [p for p in run.passes if p.phase == phase]
        parts.append(f"{len(mine):,} {phase} with {counted(sum(p.n_tokens for p in mine), 'token')}")
    return f"{counted(len(run.passes), 'forward pass', 'forward passes')}: {', '.join(parts)}"


def _chart(passes: Sequence[PassTotals], bins: Split, name: str, value: Callable[[PassTotals], int]) -> Markup:
    chosen = []
    for first, stop in zip(bins.starts.tolist(), bins.stops.tolist(), strict=True):
        i = max(range(first, stop), key=lambda n: value(passes[n]))
        p = passes[i]
        style = "prompt-pass" if p.phase == "prompt" else "decode"
        chosen.append(Segment(style, value(p), f"pass {i}, {p.phase}, {counted(p.n_tokens, 'token')}: {value(p):,}"))
    largest = max(part.value for part in chosen)
    caption = tag("figcaption", tag("b", name), f"largest {number(largest)}")
    return tag("figure", caption, columns(chosen, largest))


def traffic_section(run: Run) -> Markup:
    """Tables with bars: by layer, by stage, by kind."""
    kinds = {row["kind"] for row in run.totals}
    by_layer, by_stage = _sums(run, "layer"), _sums(run, "stage")
    layers = {"outside" if key is None else f"layer {key}": value for key, value in by_layer.items()}
    outside = ", ".join(dict.fromkeys(row["stage"] for row in run.totals if row["layer"] is None))
    return join([
        tag("p", "Payload in bytes, each message once (a multicast is one message), over all forward passes. Every column of bars has a "
                 "scale of its own.", class_="lead"),
        _legend([(f"k {kind}", kind) for kind in (*_EDGE.kinds, *_FABRIC.kinds) if kind in kinds]),
        tag("h3", "By layer"),
        _traffic_table(run, "layer", layers, "by-layer"),
        tag("p", f"Outside the layers: {outside}.", class_="note") if outside else None,
        tag("h3", "By stage"),
        _traffic_table(run, "stage", by_stage, "by-stage"),
        tag("h3", "By kind of move"),
        _kind_table(run),
    ])  # fmt: skip


Sums = Mapping[str, Mapping[str, int]]
"""Kind of event to the sums of its fields."""


def _sums(run: Run, key: str) -> dict[Any, dict[str, dict[str, int]]]:
    """Multiply-adds and bytes by `key` and kind, in order of first appearance; what has no layer comes last."""
    out: dict[Any, dict[str, dict[str, int]]] = {}
    for row in sorted(run.totals, key=lambda row: key == "layer" and row["layer"] is None):
        kinds = out.setdefault(row[key], {})
        sums = kinds.setdefault(row["kind"], {"macs": 0, "bytes": 0})
        for field in sums:
            sums[field] += row[field]
    return out


def _traffic_table(run: Run, name: str, groups: Mapping[Any, Sums], id: str) -> Markup:
    present = {row["kind"] for row in run.totals if row["bytes"]}
    parts = [_STREAM, _FABRIC, _EDGE, *(part for part in _CHANNELS if present & set(part.kinds))]
    most = {part: max(_bytes(sums, part) for sums in groups.values()) for part in parts}
    most_macs = max(_macs(sums) for sums in groups.values())
    rows: list[Sequence[Child]] = []
    for key, sums in groups.items():
        cells = [_cell([Segment("held", _macs(sums), f"{_macs(sums):,}")], most_macs)]
        cells += [_cell([_segment(kind, sums) for kind in part.kinds], most[part]) for part in parts]
        rows.append([str(key), *cells])
    foot = ["all", f"{run.total('macs'):,}", *(f"{run.total('bytes', *part.kinds):,}" for part in parts)]
    return table([name, "multiply-adds", *(part.head for part in parts)], rows, foot, id=id)


def _macs(sums: Sums) -> int:
    return sum(of_kind["macs"] for of_kind in sums.values())


def _bytes(sums: Sums, part: _Part) -> int:
    return sum(sums[kind]["bytes"] for kind in part.kinds if kind in sums)


def _segment(kind: str, sums: Sums) -> Segment:
    n = sums[kind]["bytes"] if kind in sums else 0
    return Segment(f"k {kind}", n, f"{kind}: {n:,} bytes ({bytes_text(n)})")


def _cell(segments: Sequence[Segment], full: float) -> Markup:
    """The sum as a number, and its parts as a bar below."""
    total = sum(part.value for part in segments)
    return join([f"{total:,}", bar(segments, full)]) if total else tag("span", "0", class_="none")


def _kind_table(run: Run) -> Markup:
    heads = ("kind", "messages", "bytes", "wavelets", "links crossed", "busiest link, wavelets", "longest path, links", "colors")
    summed, largest = ("count", "bytes", "wavelets", "wavelet_hops"), ("max_link_wavelets", "max_hops", "colors")
    rows: list[Sequence[Child]] = []
    for kind in dict.fromkeys(row["kind"] for row in run.totals if row["kind"] != "launch"):
        mine = [row for row in run.totals if row["kind"] == kind]
        cells = [sum(row[f] for row in mine) for f in summed] + [max(row[f] for row in mine) for f in largest]
        rows.append([kind, *(f"{n:,}" for n in cells)])
    words = (
        "A link is the connection of a core to one neighbour, in one direction. Links crossed are summed over wavelets of 32 bits. The "
        "busiest link and the longest path are those of one event, as the ledger has them."
    )
    return join([table(heads, rows, id="by-kind"), tag("p", words, class_="note")])


def _legend(entries: Sequence[tuple[str, str]]) -> Markup:
    swatch = [tag("svg", tag("rect", width=11, height=11, class_=style), viewBox="0 0 11 11") for style, _ in entries]
    return tag("ul", *(tag("li", s, name) for s, (_, name) in zip(swatch, entries, strict=True)), class_="legend")
